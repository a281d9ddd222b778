"""What is shown of samples and answers is what is trained and what the exported model says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from minillava.config import ChatConfig, ImageConfig, LayoutConfig, ModelConfig, UserError, VisionConfig
from minillava.data import IGNORE, Sample
from minillava.loader import Dataset
from minillava.look import describe, pieces, show
from minillava.shapes_samples import Samples, write


@pytest.fixture
def dataset(tiny_tokenizer):
    config = ModelConfig(
        vision=VisionConfig(16, 32, 2, 2, 16, 4),
        image=ImageConfig(16),
        layout=LayoutConfig(grids=((1, 2), (2, 1), (1, 3)), merge="unpad", several="pad"),
        chat=ChatConfig(image_token_id=tiny_tokenizer.token_id("<image>"), bos_id=tiny_tokenizer.bos_id),
    )
    return Dataset(Samples(40, seed=0, kinds=("picture", "text", "several", "video")), config, tiny_tokenizer, 4000)


def test_colours_are_around_what_is_trained(dataset):
    """All of it and nothing else, for every kind of sample; pictures are their views and tokens."""
    for sample, example in ((dataset.samples[i], dataset[i]) for i in range(len(dataset))):
        runs = list(pieces(example, dataset))
        learned = [label for label in example.labels if label != IGNORE]
        assert "".join(text for text, trained in runs if trained) == dataset.tokenizer.decode(learned, False)
        answers = [f" {m.text}</s>" for m in sample.messages if m.role == "assistant"]
        assert [text for text, trained in runs if trained] == answers
        shown = describe(sample, example, dataset, ("«", "»"))
        assert shown.count("[picture:") == len(sample.images) and shown.count("[clip:") == len(sample.videos)
        assert f"{len(example.ids):,} tokens, {len(learned):,} trained" in shown
        for span in example.spans:
            assert f"{span.tokens:,} tokens]" in shown
            assert span.views == 1 or f"{span.views} {'frames' if span.clip else 'views'}, " in shown


def test_the_report_counts_by_file_and_stops_on_samples_that_train_nothing(dataset, capsys):
    show(dataset, 3)
    out = capsys.readouterr().out
    assert out.count("trained\n") == 3 and "«" in out
    for kind in ("picture", "text", "several", "video"):
        assert f"  {kind}: 10 tried," in out
    assert "; 0 (0.0%) longer than 4,000 and cut" in out
    dataset.max_tokens = 120  # not enough for most
    with pytest.raises(UserError, match=r"\d+ of 40 samples tried cannot be used, the first: .*has no token to learn"):
        show(dataset, 0)


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
    done = run(recipe, "--inspect", 0)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no token to learn" in done.stderr


def test_losses_by_source_and_answers_of_the_exported_model(recipe, tmp_path):
    from minillava.pipeline import run_recipe
    from minillava.pretrained import LLaVA
    from minillava.progress import read_log
    from minillava.recipe import read_recipe

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
        images = [ref.open("") for ref in sample.images]
        answer = model.generate(sample.messages[0].text, images=images, max_new_tokens=64)
        assert answer.text == row["answer"]


def test_a_mixture_takes_what_it_says(tmp_path):
    from minillava.samples import take

    samples = [Sample(str(i), (), (), "x") for i in range(70)]
    assert take(samples, "all", "") == samples
    assert take(samples, "first:10%", "") == samples[:7] and take(samples, "first:1%", "") == samples[:1]
    assert take(samples, "end:3", "") == samples[-3:] and take(samples, "first:99", "") == samples
    assert take(samples, "end:0", "") == []
    drawn = take(samples, "random:20", "a")
    assert len(set(drawn)) == 20 and drawn == sorted(drawn, key=samples.index)
    assert take(samples, "random:20", "a") == drawn != take(samples, "random:20", "b")


def test_tensorboard_is_told_what_the_log_is_told(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from minillava.progress import Log

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

    from minillava import progress

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
    from minillava.trainer import schedule

    stage = StageConfig(floor=0.1, warmup=0.0)
    assert schedule(stage, 0, 1000) == 1.0 and schedule(stage, 500, 1000) == pytest.approx(0.55)
    assert schedule(stage, 999, 1000) == pytest.approx(0.1, abs=1e-5)
    assert torch.tensor([schedule(stage, i, 100) for i in range(100)]).diff().max() <= 0
