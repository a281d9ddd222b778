"""Answers that are written at a stage's end are those of the exported model; what other loggers get is the log."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from minillava.chat.messages import Message
from minillava.data.llava_json import Sample
from minillava.errors import UserError
from minillava.recipe import read_recipe
from minillava.synthetic.samples import Samples, write
from minillava.training import build
from minillava.training.export import write_answers

RECIPE = """
name = "tiny"
device = "cpu"
[model]
tokenizer = "shapes"
vision = {{hidden_size = 16, intermediate_size = 32, num_layers = 2, num_heads = 2, image_size = 16, patch_size = 8}}
decoder = {{hidden_size = 16, intermediate_size = 32, num_layers = 2, num_heads = 2, num_kv_heads = 1, head_dim = 8}}
[[stage]]
name = "finetune"
data = [
    {{path = "{root}/picture.json", images = "{root}/media", take = "random:50%"}},
    {{path = "{root}/text.json", take = "first:3"}},
]
eval_data = [{{path = "{root}/picture.json", images = "{root}/media", take = "end:4"}}, {{path = "{root}/text.json"}}]
lr = {{projector = 1e-2, decoder = 1e-2}}
steps = 2
batch_size = 4
"""


@pytest.fixture
def recipe(tmp_path):
    write(tmp_path, 12)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(root=tmp_path))
    return tmp_path / "recipe.toml"


def run(*words):
    command = [sys.executable, str(ROOT / "train.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_inspect_from_the_command_line(recipe, tmp_path):
    done = run(recipe, "--inspect", 3, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "6 of them are taken (random:50%)" in done.stdout and "3 of them are taken (first:3)" in done.stdout
    assert done.stdout.count("[picture: 4 tokens]") == 2 and "picture.json: 6 tried" in done.stdout
    assert not (tmp_path / "run").exists()  # nothing is trained, nothing is left
    rows = json.loads((tmp_path / "text.json").read_text())
    rows[0]["conversations"][0]["value"] = "Why? " * 4000
    (tmp_path / "text.json").write_text(json.dumps(rows))
    done = run(recipe, "--inspect", 1)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no token to learn" in done.stderr


def test_losses_by_source_and_answers_of_the_exported_model(recipe, tmp_path):
    from minillava.api import LLaVA
    from minillava.recipe import read_recipe
    from minillava.training.pipeline import run_recipe
    from minillava.training.progress import read_log

    measured = run_recipe(read_recipe(recipe, out=str(tmp_path / "run")))["finetune"]
    assert set(measured) == {"eval_loss", "eval_loss/picture", "eval_loss/text"}
    assert min(measured["eval_loss/picture"], measured["eval_loss/text"]) <= measured["eval_loss"]
    assert max(measured["eval_loss/picture"], measured["eval_loss/text"]) >= measured["eval_loss"]
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["eval"] == measured

    rows = [json.loads(line) for line in (tmp_path / "run" / "finetune" / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and {Path(row["source"]).stem for row in rows} == {"picture", "text"}
    samples = {sample.id: sample for kind in ("picture", "text") for sample in Samples(12, 0, (kind,))}
    model = LLaVA.from_pretrained(tmp_path / "run" / "finetune" / "model", device="cpu")
    for row in rows[:2] + rows[-2:]:
        sample: Sample = samples[row["id"]]
        assert (row["question"], row["expected"]) == (sample.messages[0].text, sample.messages[1].text)
        images = [picture.image() for picture in sample.images]
        answer = model.generate(sample.messages[0].text, images=images, max_new_tokens=64)
        assert answer.text == row["answer"]
    # A picture that comes later belongs to no first question.
    media = (samples["picture-0"].media[0], samples["picture-1"].media[0])
    turns = [("user", "<image>\nWhat?"), ("assistant", "this"), ("user", "<image>\nAnd?"), ("assistant", "that")]
    later = Sample("later", media, tuple(Message(*turn) for turn in turns))
    write_answers(tmp_path / "run" / "finetune" / "model", [later], tmp_path / "one.jsonl", torch.device("cpu"))
    assert json.loads((tmp_path / "one.jsonl").read_text())["expected"] == "this"


def test_tensorboard_is_told_what_the_log_is_told(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from minillava.training.progress import Log

    log = Log(tmp_path / "log.jsonl", ["tensorboard"])
    for step in (1, 2):
        log.write(stage="a", step=step, loss=1 / step, lr={"projector": 0.1}, grad_norm=None)
    log.write(stage="b", step=1, eval={"eval_loss/x": 3.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "a"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr/projector"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "b"))
    events.Reload()
    assert [e.value for e in events.Scalars("eval/eval_loss/x")] == [3.0]


def test_wandb_is_told_what_the_log_is_told(tmp_path, monkeypatch):
    """A stand-in for the package, which wants a network: what it is called with, and one run however often resumed."""
    from types import SimpleNamespace

    from minillava.training import progress

    calls: list = []
    fake = SimpleNamespace(
        define_metric=lambda *a, **k: calls.append((a, k)), log=calls.append, finish=lambda: calls.append("end")
    )
    started: list = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **k: started.append(k) or fake))
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: True if name == "wandb" else None)
    for _ in range(2):
        log = progress.Log(tmp_path / "run" / "log.jsonl", ["wandb"])
        log.write(stage="a", step=3, loss=0.5, lr={"decoder": 1e-4})
        log.close()
    assert calls[:3] == [
        (("a/*",), {"step_metric": "a/step"}),
        {"a/step": 3, "a/loss": 0.5, "a/lr/decoder": 1e-4},
        "end",
    ]
    assert started[0]["id"] == started[1]["id"] and started[0]["resume"] == "allow"
    with pytest.raises(UserError, match="tensorboard is not installed; pip install tensorboard"):
        progress.Log(tmp_path / "run" / "log.jsonl", ["tensorboard"])


def test_the_floor_of_the_schedule():
    from minillava.recipe import StageConfig
    from minillava.training.trainer import schedule

    stage = StageConfig(floor=0.1, warmup=0.0)
    assert schedule(stage, 0, 1000) == 1.0 and schedule(stage, 500, 1000) == pytest.approx(0.55)
    assert schedule(stage, 999, 1000) == pytest.approx(0.1, abs=1e-5)
    assert torch.tensor([schedule(stage, i, 100) for i in range(100)]).diff().max() <= 0


@pytest.mark.parametrize("part", ["tower", "decoders", "text"])
def test_inspect_refuses_a_rate_for_a_part_that_does_not_exist(recipe, part):
    done = run(recipe, "--inspect", 1, "--set", f"stage.*.lr.{part}=1e-3")
    assert done.returncode == 2 and f"lr for '{part}', which task 'llava' has not" in done.stderr


@pytest.mark.parametrize("change", [
    'layout={grids=[[1, 2], [2, 1]], merge="flat"}', "decoder.head_dim=7", "vision.num_heads=3",
    "vision.select_layers=[-9]", "image.size=24",
])  # fmt: skip
def test_a_model_that_could_not_be_loaded_again_is_refused_before_the_start(recipe, change, tmp_path):
    read = read_recipe(recipe, [f"model.{change}"])
    with pytest.raises(UserError, match=r"^model: what comes out could not be loaded \((preprocessor_)?config\.json"):
        build.read_config(read, tmp_path, None)
