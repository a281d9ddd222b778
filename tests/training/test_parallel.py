"""Several ranks under torchrun, on the CPU: one process's losses, whatever they draw and however they stop."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, load_model, talk, tiny_config, write_world
from safetensors.torch import load_file

from minillava import decoder, vit
from minillava.chat.tokenizer import load_tokenizer
from minillava.checkpoints.checkpoint import Checkpoint
from minillava.checkpoints.save import save_model
from minillava.config import DecoderConfig
from minillava.errors import UserError
from minillava.llava import LLaVAModel
from minillava.recipe import read_recipe
from minillava.synthetic.train_tokenizer import train_small_tokenizer
from minillava.training import parallel
from minillava.training.llava_task import LLaVATask
from minillava.training.pipeline import export_newest, make_run, run_recipe
from minillava.training.progress import Log, read_log
from minillava.training.trainer import Trainer

pytestmark = pytest.mark.xdist_group("ranks")  # one worker of pytest-xdist launches what all these tests look at
STEPS = 12
STOP = 5  # the step in which one rank of a stopped run is told to end
RECIPE = """
name = "tiny"
device = "cpu"
[model]
base = "{root}/base"
[[stage]]
name = "a"
data = [{{path = "{root}/data.json", images = "{root}/images"}}, {{path = "{root}/text.json"}}]
lr = {{projector = 1e-2}}
steps = {steps}
batch_size = 8
micro_batch = 2
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
FULL = MODES["full"]
SHORT = [*FULL, "stage.a.steps=8"]
FOUR = [*SHORT, "stage.a.micro_batch=1"]  # so that four ranks add up micro-batches too
MIXED = ["stage.a.batch_size=2", "stage.a.steps=8"]  # a sample a rank: one may have text while the other has a picture
HAS_CXX = shutil.which("g++") is not None
ALL = bool(os.environ.get("MINILLAVA_FULL"))  # also four ranks, and ways that others imply: minutes more
MANY = (2, 4) if ALL else (2,)
WAYS = {  # to train the whole model: on how many ranks, and what is set
    "short": ([1], SHORT),
    "hsdp": ([4], [*FOUR, "shard=2"]),  # two groups of two ranks, each with all of the model
    "offload": ([2], [*FULL, "offload=true"]),
    "selective": ([2], [*FULL, "stage.a.checkpointing=selective"]),
    "compiled": ([2], [*SHORT, "stage.a.compile=true"]),
    "muon-float32": ([1, *MANY], [*FULL, "stage.a.optimizer=muon"]),
    "adamw8bit": ([1, 2], [*FULL, "stage.a.optimizer=adamw8bit", "model.base={root}/even"]),
    "mixed": ([1, 2], [*FULL, *MIXED]),
    "mixed-projector": ([1, 2], [*MODES["projector"], *MIXED]),
}
if ALL:
    WAYS |= {
        "four": ([4], FOUR),
        "recomputed": ([2], [*FULL, "stage.a.checkpointing=full"]),
        "muon": ([1, 2, 4], [*FULL, "stage.a.optimizer=muon"]),
    }
MORE = {"muon-float32": {"muon": "float32"}}  # what ranks.py is told of them


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """24 pictures, 16 texts without one, a checkpoint of a tiny model, and a recipe."""
    root = tmp_path_factory.mktemp("ranks")
    write_world(root, 24, ("red", "green", "blue"), 4, [talk("Sure?", "Yes." * (1 + i % 5)) for i in range(16)])
    words = "USER: \nWhich? ASSISTANT: It is red. It is green. It is blue. Sure? Yes.</s>"
    train_small_tokenizer([words] * 3, root / "tokenizer", vocab_size=381)
    tokenizer = load_tokenizer(root / "tokenizer")
    config = tiny_config(
        tokenizer, DecoderConfig(tokenizer.vocab_size, 24, 40, 2, 2, 1, 8, max_positions=256), layers=2
    )
    # Blocks of 256 numbers, which 8-bit moments are scaled by, end in the same places on one rank and on two.
    even = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=384, tie_embeddings=True))
    for name, sizes in {"base": config, "even": even}.items():
        model = LLaVAModel(sizes)
        model.init_weights(seed=0)
        save_model(model, root / name, tokenizer)
    (root / "recipe.toml").write_text(RECIPE.format(root=root, steps=STEPS))
    return root


def torchrun(world, ranks, jobs, *options):
    """The jobs on so many ranks; returns what came of it."""
    file = world / f"jobs-{ranks}-{len(list(world.glob('jobs-*')))}.json"
    file.write_text(json.dumps([{"recipe": str(world / "recipe.toml"), **job} for job in jobs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
    # A rank that crashes says where; compiled code is not shared with tests that run at the same time.
    own = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "TORCHINDUCTOR_CACHE_DIR": str(world / "inductor-cache")}
    environment = os.environ | own
    return subprocess.run(
        [*command, str(ROOT / "tests" / "ranks.py"), str(file)], env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def losses(world):
    """loss and gradient norm of every step, by ranks and mode; the most ranks leave a stopped run of each mode."""
    found = {}
    for ranks in (4, 2, 1):
        modes = MODES if ranks <= MANY[-1] else {}
        jobs = [{"sets": sets, "out": f"{world}/{mode}-{ranks}"} for mode, sets in modes.items()]
        for way, (on, sets) in WAYS.items():
            sets = [line.replace("{root}", str(world)) for line in sets]
            job = {"sets": sets, "out": f"{world}/{way}-{ranks}", "record": True}
            jobs += [job | MORE.get(way, {})] * (ranks in on)
        for mode, sets in modes.items():
            if ranks == MANY[-1]:
                saves = [*sets, "stage.a.save_every=2"]
                jobs.append({"sets": saves, "out": f"{world}/{mode}-stopped", "stop_at": STOP})
            else:
                shutil.copytree(world / f"{mode}-stopped", world / f"{mode}-resumed-{ranks}")
                jobs.append({"sets": sets, "out": f"{world}/{mode}-resumed-{ranks}", "resume": True})
        done = torchrun(world, ranks, jobs)
        assert done.returncode == 0, done.stderr[-12000:]
        for job in jobs:
            found[ranks, Path(job["out"]).name.removesuffix(f"-{ranks}")] = curve(Path(job["out"]))
    return found


def curve(out):
    return [(row["loss"], row["grad_norm"]) for row in read_log(out / "log.jsonl") if "loss" in row]


@pytest.mark.parametrize("mode", MODES)
def test_the_losses_do_not_depend_on_the_ranks(losses, mode):
    one = torch.tensor(losses[1, mode], dtype=torch.float64)
    assert len(one) == STEPS and one[-1, 0] < one[0, 0] - 0.1
    for ranks in MANY:
        assert (torch.tensor(losses[ranks, mode], dtype=torch.float64) - one).abs().max() < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_stopped_on_several_ranks_and_resumed_on_fewer(world, losses, mode):
    """SIGTERM reaches one rank: all save in the same step and stop; another number of them goes on."""
    assert losses[MANY[-1], f"{mode}-stopped"] == losses[MANY[-1], mode][:STOP]
    kept = [path.name for path in sorted((world / f"{mode}-stopped" / "a" / "checkpoints").iterdir())]
    assert kept == [f"step-{STOP - 1:08d}", f"step-{STOP:08d}"]  # of those of steps 2, 4 and 5
    for ranks in (1, *MANY[:-1]):
        resumed = torch.tensor(losses[ranks, f"{mode}-resumed"], dtype=torch.float64)
        assert len(resumed) == STEPS
        assert (resumed - torch.tensor(losses[1, mode], dtype=torch.float64)).abs().max() < 1e-5


def test_exports_of_all_ranks_are_one_model(world, losses):
    for mode in MODES:
        one, most = (load_model(world / f"{mode}-{ranks}" / "a" / "model").state_dict() for ranks in (1, MANY[-1]))
        base = load_model(world / "base").state_dict()
        changed = {name.split(".")[0] for name in base if not torch.equal(one[name], base[name])}
        parts = {"projector": {"projector"}, "full": {"vision", "projector", "decoder"}}
        assert changed == parts.get(mode, {"projector", "decoder"}), mode
        for name in one:
            assert (one[name] - most[name]).abs().max() < 2e-4, name


def trainer_of(world, out, sets, resume=False):
    """A Trainer of the recipe's stage in this process."""
    recipe = read_recipe(world / "recipe.toml", sets, str(out))
    run, stage = make_run(recipe, out, torch.device("cpu")), recipe.stage[0]
    return Trainer(LLaVATask(run, stage), stage, run.device, out / "a", Log(out / "log.jsonl"), resume, recipe)


@pytest.mark.parametrize("base", ["base", "even"])
@pytest.mark.parametrize("mode", MODES)
def test_a_save_before_the_first_step_loads_strictly(world, tmp_path, capsys, mode, base):
    """Checkpoint and export, with a head of its own and with a tied one: the same tensors, the same logits."""
    sets = [*MODES[mode], f"model.base={world / base}"]
    first = trainer_of(world, tmp_path, sets)
    first.save()
    first.saver.wait()
    stage = first.stage
    rates = {group["part"]: group["lr"] for group in first.optimizer.param_groups}
    assert rates == dict(stage.lr)
    kinds = {(name.split(".")[0], "lora_" in name) for name in first.trained}
    assert kinds == {(part, part in stage.lora) for part in stage.lr}
    assert {id(p) for p in first.task.model.parameters() if p.requires_grad} == {id(p) for p in first.trained.values()}
    again = trainer_of(world, tmp_path, sets, resume=True)
    assert again.step == 0 and again.trained.keys() == first.trained.keys()
    assert all(torch.equal(again.trained[name], p) for name, p in first.trained.items())
    again.export()
    exported = load_model(tmp_path / "a" / "model")
    assert exported.config.decoder.tie_embeddings == (base == "even")
    with torch.no_grad():
        wanted = first.task.probe(first.task.model)
        assert (again.task.probe(exported) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert bool(stage.lora) == ("the merged model's logits are within" in capsys.readouterr().out)


@pytest.mark.parametrize("mode", MODES)
def test_the_newest_checkpoint_is_exported_at_any_time(world, losses, tmp_path, mode):
    """Of a run that was stopped, what its trainer would export; of one that is over, what it left."""
    out = tmp_path / "stopped"
    shutil.copytree(world / f"{mode}-stopped", out)
    trainer_of(world, out, MODES[mode], resume=True).export()
    shutil.copytree(world / f"{mode}-1", tmp_path / "over")
    for run, step in {out: STOP, tmp_path / "over": STEPS}.items():
        command = [sys.executable, str(ROOT / "train.py"), "--out", str(run), "--export"]
        if mode == "lora":
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            path = Path(done.stdout.strip())
        else:
            path = export_newest(run)
        assert path == run / "a" / f"model-step-{step:08d}"
        files = [(run / "a" / "model" / "model.safetensors", path / "model.safetensors")]
        if mode in ("lora", "qlora"):
            adapter = run / "a" / "adapter"
            files += [
                (folder / "adapter_model.safetensors" for folder in (adapter, Path(f"{adapter}-{path.name[6:]}")))
            ]
        for theirs, ours in files:
            left, found = load_file(theirs), load_file(ours)
            assert left.keys() == found.keys() and all(torch.equal(left[name], found[name]) for name in left)
    recipe = read_recipe(world / "recipe.toml", MODES[mode], str(tmp_path / "over"))
    assert run_recipe(recipe, resume=True) == {"a": {}}  # there is nothing left to do


def test_an_export_needs_a_checkpoint(world, tmp_path):
    with pytest.raises(UserError, match="holds no run; give the folder of one with --out"):
        export_newest(tmp_path)
    shutil.copy(world / "recipe.toml", tmp_path)
    with pytest.raises(UserError, match="stage a has no checkpoint yet"):
        export_newest(tmp_path)


@pytest.mark.parametrize(
    "way",
    ["muon-float32", "adamw8bit", *["muon"] * ALL],
)
def test_optimizers_do_the_same_on_every_number_of_ranks(losses, way):
    one = torch.tensor(losses[1, way], dtype=torch.float64)
    assert len(one) == STEPS and one[-1, 0] < one[0, 0] - 0.1 and losses[1, way] != losses[1, "full"]
    # In bfloat16 rounding makes more of what sums of gradients differ by.
    loss, norm = (4e-4, 2e-3) if way == "muon" else (1e-5, 1e-4)
    for ranks in (number for number, name in losses if name == way and number > 1):
        apart = (torch.tensor(losses[ranks, way], dtype=torch.float64) - one).abs().amax(0)
        assert apart[0] < loss and apart[1] < norm, (ranks, apart)


def test_the_merged_model_is_compared_block_by_block(world, tmp_path, capsys, monkeypatch):
    """Of it, one block at a time is beside the training on the device; a merge that went wrong is told."""
    trainer = trainer_of(world, tmp_path, MODES["lora"])
    held, most, to, load = set(), [], torch.nn.Module.to, Checkpoint.load

    def spied(module, *where):
        if isinstance(module, decoder.Block | vit.Block):
            (held.discard if where == ("meta",) else held.add)(module)
            most.append(len(held))
        return to(module, *where)

    def spoiled(checkpoint):
        model = load(checkpoint)
        model.decoder.blocks[0].mlp.down.weight.data *= 30
        return model

    monkeypatch.setattr(torch.nn.Module, "to", spied)
    trainer.export()
    config = trainer.task.model.config
    assert most == [1, 0] * (config.vision.layers_run + config.decoder.num_layers)
    assert "THAT IS MUCH" not in capsys.readouterr().out
    monkeypatch.setattr(Checkpoint, "load", spoiled)
    trainer.export()
    assert "THAT IS MUCH" in capsys.readouterr().out


def test_memory_and_time_are_saved_without_a_change(world, losses):
    """Activations computed again are those that were forgotten; two copies of the model are one, and so is its code."""
    for way in ("selective", "offload", *["recomputed"] * ALL):
        assert losses[2, way] == losses[2, "full"], way
    short = torch.tensor(losses[1, "short"], dtype=torch.float64)
    for way in ((4, "hsdp"), (2, "compiled"), *[(4, "four")] * ALL):
        assert (torch.tensor(losses[way], dtype=torch.float64) - short).abs().max() < 1e-5, way
    graphs = json.loads((world / "compiled-2" / "graphs.json").read_text())
    assert 3 <= graphs["graphs"] <= 16 and not graphs["given_up"], graphs  # few serve all lengths; torch gave none up


def test_every_block_has_something_to_compile(world):
    """compile = true never leaves one part plain without a word: here the decoder, behind a tower that is compiled."""
    model = load_model(world / "base")
    model.decoder.blocks[1] = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="Sequential: nothing has the names of what is compiled"):
        parallel.wrap_blocks(model, "off", compiled=True)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_CXX, reason="inductor needs g++ for code that runs on a CPU")
def test_blocks_compiled_by_inductor(world, losses):
    """The code that training with compile = true really runs, over two ranks' shards, and recomputed."""
    job = {"sets": WAYS["compiled"][1] + ["stage.a.checkpointing=full"], "out": f"{world}/inductor-2"}
    done = torchrun(world, 2, [job | {"record": True, "backend": "inductor"}])
    assert done.returncode == 0, done.stderr[-12000:]
    found, short = (torch.tensor(x, dtype=torch.float64) for x in (curve(Path(job["out"])), losses[1, "short"]))
    assert (found - short).abs().max() < 1e-5
    graphs = json.loads((world / "inductor-2" / "graphs.json").read_text())
    assert 3 <= graphs["graphs"] <= 16 and graphs["inductor"] >= graphs["graphs"] and not graphs["given_up"], graphs


@pytest.mark.parametrize("way", ["mixed", "mixed-projector"])
def test_text_on_one_rank_and_a_picture_on_the_other(world, losses, way):
    """No rank waits for another, whichever has the picture, and gradients are one process's."""
    one, two = (torch.load(world / f"{way}-{ranks}" / "record.pt") for ranks in (1, 2))
    drew = [tuple(seen) for seen, _ in two]
    assert {(False, True), (True, False), (True, True)} <= set(drew) and len(drew) == len(one) == 8
    for (_, alone), (_, shared), seen in zip(one, two, drew):
        for grads in (alone, shared):
            assert any(seen) == any(grad.any() for name, grad in grads.items() if "projector" in name)
        for name, grad in shared.items():
            assert (grad - alone.get(name, torch.zeros(()))).abs().max() <= 1e-6, name


def test_the_log_counts_what_all_ranks_did(world, losses):
    for mode in MODES:
        logs = {ranks: read_log(world / f"{mode}-{ranks}" / "log.jsonl") for ranks in (1, *MANY)}
        for key in ("tokens", "samples", "supervised", "flops"):
            assert len({tuple(row[key] for row in rows) for rows in logs.values()}) == 1, key
        for ranks, rows in logs.items():
            rates = [row["tokens"] / row["step_s"] for row in rows]
            assert [row["tok_per_s"] for row in rows] == pytest.approx(rates, rel=0.01, abs=0.1)
            peaks = [row["flops"] / (row["mfu"] * row["step_s"] * ranks) for row in rows]
            assert peaks == pytest.approx([peaks[0]] * STEPS, rel=0.01)


def test_a_killed_rank_is_restarted_and_nothing_changes(world, losses):
    """SIGKILL of one of two ranks in a random step; torchrun starts both again, which go on at the last checkpoint."""
    jobs = [{"sets": [*MODES["lora"], "stage.a.save_every=4"], "out": f"{world}/killed"}]
    jobs[0]["kill_at"] = random.randrange(2, STEPS + 1)
    print(f"killed in step {jobs[0]['kill_at']}")
    done = torchrun(world, 2, jobs, "--max-restarts=1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "SIGKILL" in done.stderr or "-9" in done.stderr
    assert curve(world / "killed") == losses[2, "lora"]


def test_a_rank_that_stands_still_is_found(world):
    """The others wait for `timeout`, and no longer; every rank has then written where it stood."""
    jobs = [{"sets": [*MODES["projector"], "timeout=0.4"], "out": f"{world}/hanging", "hang_at": 3}]
    done = torchrun(world, 2, jobs)
    assert done.returncode != 0 and len(curve(world / "hanging")) == 2
    first, last = ((world / "hanging" / "a" / f"stacks-{rank}.txt").read_text() for rank in (0, 1))
    assert first.startswith("rank 0 of 2, stage a, step 3\n") and "in all_reduce" in first and "in train_step" in first
    assert last.startswith("rank 1 of 2, stage a, step 3\n") and "in stand_still" in last


def test_the_first_rank_may_work_alone_for_longer_than_a_step_may(tmp_path):
    (tmp_path / "alone.py").write_text(
        "import datetime, time, torch\n"
        "from torch.distributed import distributed_c10d\n"
        "from minillava.training import parallel\n"
        "parallel.start(torch.device('cpu'), 5)\n"
        "distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1))\n"
        "with parallel.main_first():\n"
        "    time.sleep(4 if parallel.is_main() else 0)\n"
        "assert parallel.agree([parallel.rank()]) == [1]\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(tmp_path / "alone.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_chosen_gpu_is_the_current_one(monkeypatch):
    """Its random state is the one that checkpoints hold."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert parallel.start(torch.device("cuda:1"), 1) == torch.device("cuda:1") and chosen == [torch.device("cuda:1")]
    parallel.start(torch.device("cuda"), 1), parallel.start(torch.device("cpu"), 1)
    assert len(chosen) == 1
