"""Several ranks under torchrun, on the CPU: one process's losses, whatever they draw and however they stop."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from minillava.config import ChatConfig, DecoderConfig, ImageConfig, ModelConfig, ProjectorConfig, VisionConfig
from minillava.llava import LLaVA
from minillava.pipeline import make_run
from minillava.progress import Log, read_log
from minillava.recipe import read_recipe
from minillava.tasks import LLaVATask
from minillava.tokenizer import load_tokenizer
from minillava.train_tokenizer import train_small_tokenizer
from minillava.trainer import Trainer
from minillava.weights import load_model, save_model

ROOT = Path(__file__).parents[1]
STEPS = 20
STOP = 7  # the step in which one rank of a stopped run is told to end
RECIPE = """
name = "tiny"
device = "cpu"
[model]
base = "{root}/base"
[[stage]]
name = "a"
data = [{{path = "{root}/data.json", images = "{root}/images"}}, {{path = "{root}/text.json"}}]
lr = {{projector = 1e-2}}
steps = 20
batch_size = 8
micro_batch = 1
dtype = "float32"
save_every = 0
"""
LORA = "stage.a.lora={decoder = {rank = 4, alpha = 8, dropout = 0.0}}"
MODES = {
    "projector": [],
    "full": ["stage.a.lr={vision = 1e-3, projector = 1e-2, decoder = 1e-3}"],
    "qlora": ["stage.a.lr={projector = 1e-3, decoder = 1e-2}", LORA, "model.quantize=nf4"],
    "lora": ["stage.a.lr={projector = 1e-3, decoder = 1e-2}", LORA],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """24 pictures, 16 texts without one, a checkpoint of a tiny model, and a recipe."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "images").mkdir()
    pictures, texts = [], []
    for i in range(24):
        picture = Image.new("RGB", (24, 16), "white")
        ImageDraw.Draw(picture).ellipse((2, 2, 10 + i % 7, 10 + i % 5), fill=("red", "green", "blue")[i % 3])
        picture.save(root / "images" / f"{i}.png")
        answer = f"It is {('red', 'green', 'blue')[i % 3]}." + " Yes." * (i % 4)
        turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": answer}]
        pictures.append({"id": f"s{i}", "image": f"{i}.png", "conversations": turns})
    for i in range(16):
        turns = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes." * (1 + i % 5)}]
        texts.append({"id": f"t{i}", "conversations": turns})
    (root / "data.json").write_text(json.dumps(pictures))
    (root / "text.json").write_text(json.dumps(texts))
    words = "USER: \nWhich? ASSISTANT: It is red. It is green. It is blue. Sure? Yes.</s>"
    train_small_tokenizer([words] * 3, root / "tokenizer", vocab_size=381)
    tokenizer = load_tokenizer(root / "tokenizer")
    config = ModelConfig(
        vision=VisionConfig(16, 32, 2, 2, 16, 8),
        projector=ProjectorConfig(),
        decoder=DecoderConfig(tokenizer.vocab_size, 24, 40, 2, 2, 1, 8, max_positions=256),
        image=ImageConfig(16),
        chat=ChatConfig(
            image_token_id=tokenizer.token_id("<image>"), bos_id=tokenizer.bos_id, eos_ids=(tokenizer.eos_id,)
        ),
    )
    model = LLaVA(config)
    model.init_weights(seed=0)
    save_model(model, root / "base", tokenizer)
    (root / "recipe.toml").write_text(RECIPE.format(root=root))
    return root


def torchrun(world, ranks, jobs, *options):
    """The jobs on so many ranks; returns the process."""
    file = world / f"jobs-{ranks}-{len(list(world.glob('jobs-*')))}.json"
    file.write_text(json.dumps([{"recipe": str(world / "recipe.toml"), **job} for job in jobs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "ranks.py"), str(file)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def losses(world):
    """loss and gradient norm of every step, by ranks and mode; 4 ranks leave a stopped run of each mode besides."""
    found = {}
    for ranks in (4, 2, 1):
        jobs = [{"sets": sets, "out": f"{world}/{mode}-{ranks}"} for mode, sets in MODES.items()]
        if ranks == 4:
            jobs += [{"sets": sets, "out": f"{world}/{mode}-stopped", "stop_at": STOP} for mode, sets in MODES.items()]
        else:
            for mode, sets in MODES.items():
                shutil.copytree(world / f"{mode}-stopped", world / f"{mode}-resumed-{ranks}")
                jobs.append({"sets": sets, "out": f"{world}/{mode}-resumed-{ranks}", "resume": True})
        torchrun(world, ranks, jobs)
        for mode in MODES:
            found[ranks, mode] = curve(world / f"{mode}-{ranks}")
    return found


def curve(out):
    return [(row["loss"], row["grad_norm"]) for row in read_log(out / "log.jsonl") if "loss" in row]


@pytest.mark.parametrize("mode", MODES)
def test_the_losses_do_not_depend_on_the_ranks(losses, mode):
    one = torch.tensor(losses[1, mode], dtype=torch.float64)
    assert len(one) == STEPS and one[-1, 0] < one[0, 0] - 0.1
    for ranks in (2, 4):
        assert (torch.tensor(losses[ranks, mode], dtype=torch.float64) - one).abs().max() < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_stopped_on_four_ranks_and_resumed_on_two_and_on_one(world, losses, mode):
    """SIGTERM reaches one rank: all save in the same step and stop; another number of them goes on."""
    stopped = curve(world / f"{mode}-stopped")
    assert stopped == losses[4, mode][:STOP]
    for ranks in (2, 1):
        resumed = torch.tensor(curve(world / f"{mode}-resumed-{ranks}"), dtype=torch.float64)
        assert len(resumed) == STEPS
        assert (resumed - torch.tensor(losses[1, mode], dtype=torch.float64)).abs().max() < 1e-5


def test_exports_of_all_ranks_are_one_model(world, losses):
    for mode in MODES:
        one, four = (load_model(world / f"{mode}-{ranks}" / "a" / "model").state_dict() for ranks in (1, 4))
        base = load_model(world / "base").state_dict()
        changed = {name.split(".")[0] for name in base if not torch.equal(one[name], base[name])}
        parts = {"projector": {"projector"}, "full": {"vision", "projector", "decoder"}}
        assert changed == parts.get(mode, {"projector", "decoder"}), mode
        for name in one:
            assert (one[name] - four[name]).abs().max() < 2e-4, name


@pytest.mark.parametrize("mode", MODES)
def test_a_save_before_the_first_step_loads_strictly(world, tmp_path, mode):
    recipe = read_recipe(world / "recipe.toml", MODES[mode], str(tmp_path))
    stage = recipe.stage[0]

    def trainer(resume):
        run = make_run(recipe, tmp_path, torch.device("cpu"))
        return Trainer(LLaVATask(run, stage), stage, run.device, tmp_path / "a", Log(tmp_path / "l"), resume, recipe)

    first = trainer(False)
    first.save()
    first.saver.wait()
    rates = {group["part"]: group["lr"] for group in first.optimizer.param_groups}
    assert rates == dict(stage.lr)
    kinds = {(name.split(".")[0], "lora_" in name) for name in first.trained}
    assert kinds == {(part, part in stage.lora) for part in stage.lr}
    assert {id(p) for p in first.task.model.parameters() if p.requires_grad} == {id(p) for p in first.trained.values()}
    again = trainer(True)
    assert again.step == 0 and again.trained.keys() == first.trained.keys()
    assert all(torch.equal(again.trained[name], p) for name, p in first.trained.items())


def test_a_killed_rank_is_restarted_and_nothing_changes(world, losses):
    """SIGKILL of one of two ranks in the middle; torchrun starts both again, which go on at the last checkpoint."""
    jobs = [{"sets": [*MODES["lora"], "stage.a.save_every=4"], "out": f"{world}/killed", "kill_at": 11}]
    torchrun(world, 2, jobs, "--max-restarts=1")
    assert curve(world / "killed") == losses[2, "lora"]
