"""Training: the loss over a whole batch, float32 masters under bfloat16, and runs that go on to the same bits."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, disk_of, load_model, talk, write_world
from PIL import Image
from safetensors.torch import save_file

from minillava.chat.tokenizer import load_tokenizer
from minillava.checkpoints.names import rename
from minillava.cli import main
from minillava.config import DecoderConfig, ModelConfig, VisionConfig
from minillava.data.batch import rounded_up
from minillava.device import compute_dtype
from minillava.errors import UserError
from minillava.llava import LLaVAModel
from minillava.recipe import ModelRecipe, StageConfig, read_recipe
from minillava.synthetic.train_tokenizer import train_small_tokenizer
from minillava.training import optim, pipeline, train_state
from minillava.training.llava_task import LLaVATask
from minillava.training.metrics import Clock
from minillava.training.optim import Muon, make_optimizer
from minillava.training.pipeline import export_newest, make_run, run_recipe
from minillava.training.progress import Log, read_log
from minillava.training.trainer import MAX_NON_FINITE, Trainer, schedule

CPU = torch.device("cpu")
COLORS = ("red", "green", "blue", "black")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
RECIPE = """
name = "tiny"
device = "cpu"

[model]
tokenizer = "{root}/tokenizer"
vision = {{hidden_size = 16, intermediate_size = 32, num_layers = 2, num_heads = 2, image_size = 16, patch_size = 8}}

[model.decoder]
hidden_size = 16
intermediate_size = 32
num_layers = 2
num_heads = 2
num_kv_heads = 1
head_dim = 8
max_positions = 256
tie_embeddings = true

[[stage]]
name = "pretrain"
data = [{{path = "{root}/data.json", images = "{root}/images"}}]
chat = {{template = "plain"}}
lr = {{projector = 1e-2}}
steps = 6
batch_size = 8

[[stage]]
name = "finetune"
data = [{{path = "{root}/data.json", images = "{root}/images"}}, {{path = "{root}/text.json"}}]
lr = {{projector = 1e-2, decoder = 2e-2}}
epochs = 3
batch_size = 8
micro_batch = 3
eval_samples = 6
eval_every = 8
save_every = 4
"""


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """48 pictures with answers of unequal length; 8 conversations without a picture; a tokenizer; a recipe."""
    root = tmp_path_factory.mktemp("world")
    write_world(root, 48, COLORS, 3, [talk("Sure?", "Yes. It is. Yes.") * 2] * 8)
    words = f"{SYSTEM} USER: \nWhich? ASSISTANT: It is red. It is green. It is blue. It is black.</s>USER: Sure? Yes."
    train_small_tokenizer([words] * 3, root / "tokenizer", vocab_size=400)
    (root / "recipe.toml").write_text(RECIPE.format(root=root))
    return root


def recipe_of(world, out, *sets):
    return read_recipe(world / "recipe.toml", sets, str(out))


def trainer_of(world, out, *sets, stage="finetune", resume=False):
    """A Trainer of one stage, on a model as it is at the start of a run."""
    recipe = recipe_of(world, out, *sets)
    torch.manual_seed(0)
    run = make_run(recipe, recipe.folder, CPU)
    chosen = next(s for s in recipe.stage if s.name == stage)
    log = Log(recipe.folder / "log.jsonl")
    return Trainer(LLaVATask(run, chosen), chosen, CPU, recipe.folder / stage, log, resume, recipe)


def gradients_of_step(trainer, micros):
    """The gradients that the optimizer is given for these micro-batches, by name."""
    seen = {}
    trainer.optimizer.step = lambda: seen.update({n: p.grad.clone() for n, p in trainer.trained.items()})
    values = trainer.train_step(micros)
    return values, seen


# ---- a step ----


def test_accumulated_equals_the_big_batch(world, tmp_path):
    """Four micro-batches of one give what one of four gives, although they have unequally many supervised tokens."""
    fp32 = "stage.finetune.dtype=float32", "stage.finetune.clip=0.0", "stage.finetune.seed=5"
    one = trainer_of(world, tmp_path / "1", *fp32, "stage.finetune.batch_size=4", "stage.finetune.micro_batch=4")
    four = trainer_of(world, tmp_path / "4", *fp32, "stage.finetune.batch_size=4", "stage.finetune.micro_batch=1")
    for step in range(3):
        whole, parts = (next(t.task.batches(step, step + 1)) for t in (one, four))
        assert len(whole) == 1 and len(parts) == 4
    assert len({micro.supervised for micro in parts}) > 1  # so a mean of means would be something else
    a, grads_a = gradients_of_step(one, whole)
    b, grads_b = gradients_of_step(four, parts)
    assert a["supervised"] == b["supervised"] == sum(micro.supervised for micro in parts)
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-6) and a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-6)
    scale = max(g.abs().max() for g in grads_a.values())
    assert scale > 1e-3
    for name, grad in grads_a.items():
        assert (grad - grads_b[name]).abs().max() <= 1e-6, name


def test_the_loss_is_the_mean_over_supervised_tokens(world, tmp_path):
    trainer = trainer_of(world, tmp_path, "stage.finetune.dtype=float32")
    micros = next(trainer.task.batches(0, 1))
    losses, model = [], trainer.task.model
    for micro in micros:
        logits_TV = model(micro.ids_T, micro.pixels_NCHW, cu_seqlens=micro.cu_seqlens).double()
        for t in (micro.labels_T != -100).nonzero().flatten().tolist():
            losses.append(torch.nn.functional.cross_entropy(logits_TV[t - 1], micro.labels_T[t]).item())
    values, _ = gradients_of_step(trainer, micros)
    assert values["supervised"] == len(losses)
    assert values["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize("norm", [0.01, 1e9])
def test_gradients_are_clipped_to_the_norm(world, tmp_path, norm):
    trainer = trainer_of(world, tmp_path, f"stage.finetune.clip={norm}", "stage.finetune.dtype=float32")
    values, grads = gradients_of_step(trainer, next(trainer.task.batches(0, 1)))
    given = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads.values()])).item()
    assert given == pytest.approx(min(norm, values["grad_norm"]), rel=1e-4)


def test_bfloat16_computes_on_copies_of_float32_masters(world, tmp_path):
    """Gradients are those of the same model held in bfloat16, to the bit, the tied embedding's too; masters float32."""
    trainer = trainer_of(world, tmp_path, "stage.finetune.dtype=bfloat16", "stage.finetune.clip=0.0")
    (micro, *_) = next(trainer.task.batches(0, 1))
    half = copy.deepcopy(trainer.task.model).bfloat16()
    loss, count = trainer.task.loss(half, micro)
    loss.backward()
    values, grads = gradients_of_step(trainer, [micro])
    assert values["loss"] == pytest.approx(loss.item() / count, rel=1e-6)
    theirs = dict(half.named_parameters())
    assert grads.keys() == {n for n, p in theirs.items() if not n.startswith("vision.")}
    for name, grad in grads.items():
        assert grad.dtype == torch.float32 and trainer.trained[name].dtype == torch.float32
        assert torch.equal(grad, theirs[name].grad.float() * (1 / count)), name
    assert all(p.dtype == torch.float32 for p in trainer.task.model.vision.parameters())  # the run's own stay as read
    assert all(p.dtype == torch.bfloat16 for p in trainer.frozen.values())


def test_copies_follow_the_masters(world, tmp_path):
    """A step smaller than bfloat16 can tell is not lost: many of them move the copy."""
    trainer = trainer_of(world, tmp_path, "stage.finetune.dtype=bfloat16", "stage.finetune.schedule=constant",
                         "stage.finetune.lr.decoder=2e-5", "stage.finetune.warmup=0.0")  # fmt: skip
    name = "decoder.norm.weight"  # starts at 1, where bfloat16 has steps of 2^-8 = 0.0039
    before = trainer.trained[name].detach().clone()
    micros = next(trainer.task.batches(0, 1))[:1]
    for _ in range(200):
        trainer.train_step(micros)
    moved = (trainer.trained[name] - before).abs().max().item()
    assert moved > 1e-3
    assert not torch.equal(trainer.trained[name].bfloat16(), before.bfloat16())


def test_rounding_up_a_batch_changes_nothing(world, tmp_path):
    trainer = trainer_of(world, tmp_path, "stage.finetune.dtype=float32")
    (micro, *_) = next(trainer.task.batches(0, 1))
    padded = rounded_up(micro, trainer.task.config.chat.image_token_id)
    assert len(padded.ids_T) % 64 == 0 and len(micro.ids_T) % 64 != 0
    assert len(padded.cu_seqlens) == len(micro.cu_seqlens) + 1 and padded.supervised == micro.supervised
    results = []
    for batch in (micro, padded):
        model = copy.deepcopy(trainer.task.model)
        loss = model(batch.ids_T, batch.pixels_NCHW, batch.labels_T, batch.cu_seqlens)
        loss.backward()
        results.append((loss.item(), [p.grad for p in model.parameters() if p.grad is not None]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert (a - b).abs().max() <= 1e-6 * max(1, a.abs().max())
    assert rounded_up(padded, 0) is padded
    filler = rounded_up(micro, image_token_id=0).ids_T[len(micro.ids_T) :]
    assert (filler != 0).all()  # never a placeholder


def test_packed_equals_unpacked(world, tmp_path):
    """The same samples in rows of a token budget, in micro-batches of one sample, and as one batch: one loss, one
    gradient."""
    sets = "stage.finetune.dtype=float32", "stage.finetune.eval_samples=0", "stage.finetune.batch_size=999"
    ways = {
        "alone": ["stage.finetune.micro_batch=1"],
        "together": ["stage.finetune.micro_batch=0"],
        "packed": ["stage.finetune.micro_batch=1", "stage.finetune.row_tokens=256", "stage.finetune.max_tokens=200"],
    }
    results = {}
    for name, more in ways.items():
        trainer = trainer_of(world, tmp_path / name, *sets, *more)
        micros = next(trainer.task.batches(0, 1))
        results[name] = gradients_of_step(trainer, micros)
        if name == "packed":
            assert all(len(micro.ids_T) <= 256 for micro in micros)
            counts = trainer.task.counts(micros)
            assert counts["room"] == 256 * len(micros) and counts["samples"] == 56 and 1 < len(micros) < 30
            assert counts["tokens"] > 0.7 * counts["room"]
    for name in ("together", "packed"):
        assert results[name][0]["supervised"] == results["alone"][0]["supervised"]
        assert results[name][0]["loss"] == pytest.approx(results["alone"][0]["loss"], abs=1e-5)
        for part, grad in results["alone"][1].items():
            assert (grad - results[name][1][part]).abs().max() <= 1e-6, (name, part)


def test_text_alone_trains_no_projector_and_does_not_fail(world, tmp_path):
    sets = (
        f'stage.pretrain.data=[{{path="{world}/text.json"}}]',
        "stage.pretrain.chat={}",
        "stage.pretrain.lr.decoder=1e-2",
    )
    trainer = trainer_of(world, tmp_path, *sets, stage="pretrain")
    before = trainer.trained["projector.linears.0.weight"].detach().clone()
    trainer.train_step(next(trainer.task.batches(0, 1)))
    assert torch.equal(before, trainer.trained["projector.linears.0.weight"])
    alone = trainer_of(world, tmp_path / "2", *sets[:2], stage="pretrain")
    values = alone.train_step(next(alone.task.batches(0, 1)))
    assert values["grad_norm"] == 0 and alone.skipped == 0 and values["loss"] > 0


def test_logged_times_of_phases_are_those_of_a_step(world, tmp_path, monkeypatch):
    """Of a line for several steps too, with an evaluation among them."""
    seen, read = [], Clock.read

    def count(clock, steps):
        seen.append((steps, sum(phase == "backward" for phase, *_ in clock.marks)))
        return read(clock, steps)

    monkeypatch.setattr(Clock, "read", count)
    sets = [f"stage.pretrain.{word}" for word in ("log_every=4", "eval_every=3", "eval_samples=6", "save_every=0")]
    trainer_of(world, tmp_path, *sets, stage="pretrain").run()
    assert seen == [(4, 4), (2, 2)]


# ---- what is trained, how fast ----


@pytest.mark.parametrize("parts", [("projector",), ("projector", "decoder"), ("vision", "projector", "decoder")])
def test_exactly_the_parts_with_a_rate_are_trained(world, tmp_path, parts):
    rates = {part: 1e-3 * (i + 1) for i, part in enumerate(parts)}
    table = ", ".join(f"{part} = {rate}" for part, rate in rates.items())
    trainer = trainer_of(world, tmp_path, f"stage.finetune.lr={{{table}}}", "stage.finetune.weight_decay=0.1")
    model = trainer.task.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = trainer.optimizer.param_groups
    in_groups = {id(p): group for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        assert p.requires_grad == (part in parts) == (id(p) in in_groups), name
        if part in parts:
            assert in_groups[id(p)]["lr"] == rates[part]
            matrix = p.ndim > 1 and "norm" not in name and "embed.weight" not in name and "position_emb" not in name
            assert in_groups[id(p)]["weight_decay"] == (0.1 if matrix else 0.0), name
    for step in range(2):
        trainer.train_step(next(trainer.task.batches(step, step + 1)))
    reached = {n for n, p in trainer.trained.items() if p in trainer.optimizer.state}
    for name, p in model.named_parameters():
        assert torch.equal(before[name], p) == (name not in reached), name
    behind = {n for n in trainer.trained if n.startswith(("vision.post_norm", "vision.blocks.1"))}  # layer -2 is used
    assert trainer.trained.keys() - reached == behind
    shown = trainer.describe()
    for part in ("vision", "projector", "decoder"):
        count = sum(p.numel() for p in getattr(model, part).parameters())
        assert (f"{part} {count:,} at {rates[part]:g}" if part in parts else f"{part} {count:,} frozen") in shown


def test_adapters_start_by_the_recipes_seed_or_the_stages(world, tmp_path):
    def start(name, *sets):
        trainer = trainer_of(world, tmp_path / name, "stage.finetune.lora={decoder = {rank = 2}}", *sets)
        return trainer.trained["decoder.blocks.0.attn.q.lora_A"]

    one, two = start("a", "seed=1"), start("b", "seed=2")
    assert not torch.equal(one, two) and torch.equal(one, start("c", "seed=2", "stage.finetune.seed=1"))


def test_a_rate_for_a_part_that_is_not_there(world, tmp_path):
    with pytest.raises(UserError, match=r"lr for 'projektor'.*did you mean 'projector'"):
        run_recipe(recipe_of(world, tmp_path / "w", "stage.finetune.lr.projektor=1e-3"))
    with pytest.raises(UserError, match=r"no task 'lava'.*did you mean 'llava'"):
        run_recipe(recipe_of(world, tmp_path / "x", "stage.*.task=lava"))
    with pytest.raises(UserError, match="task 'text' trains no adapters; leave lora out"):
        sets = "stage.*.task=text", "stage.*.lr={decoder = 1.0}", "stage.*.lora={decoder = {rank = 2}}"
        run_recipe(recipe_of(world, tmp_path / "y", *sets))


def test_parts_that_overlap_are_refused(world, tmp_path):
    trainer = trainer_of(world, tmp_path)

    class Overlapping(type(trainer.task)):
        def __init__(self):
            pass

        model = trainer.task.model
        parts = {"projector": model, "decoder": model.decoder}  # noqa: RUF012
        stage = dataclasses.replace(trainer.stage, steps=1, epochs=0)

    with pytest.raises(RuntimeError, match="parts overlap"):
        Trainer(Overlapping(), Overlapping.stage, CPU, tmp_path, trainer.log, False)


def test_schedule_rises_linearly_and_falls_to_zero(world, tmp_path):
    stage = dataclasses.replace(recipe_of(world, tmp_path).stage[0], warmup=0.03)
    factors = [schedule(stage, step, 1000) for step in range(1000)]
    assert factors[:30] == pytest.approx([(i + 1) / 30 for i in range(30)])
    assert factors[30] == 1.0 and factors[-1] < 1e-5
    assert factors[30 + 485] == pytest.approx(0.5, abs=1e-3)
    assert sorted(factors[30:], reverse=True) == factors[30:]
    constant = dataclasses.replace(stage, schedule="constant", warmup=0.0)
    assert {schedule(constant, step, 10) for step in range(10)} == {1.0}


def test_compute_dtype():
    assert compute_dtype("float32", CPU) == torch.float32 and compute_dtype("bfloat16", CPU) == torch.bfloat16
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    assert compute_dtype("auto", CPU) == (torch.bfloat16 if native else torch.float32)


def test_steps_without_a_finite_gradient_are_skipped_counted_and_then_fatal(world, tmp_path):
    trainer = trainer_of(world, tmp_path)
    (micro, *_) = next(trainer.task.batches(0, 1))
    before = {name: p.detach().clone() for name, p in trainer.trained.items()}
    broken = dataclasses.replace(micro, pixels_NCHW=torch.full_like(micro.pixels_NCHW, math.inf))
    for _ in range(MAX_NON_FINITE - 1):
        trainer.train_step([broken])
    assert trainer.skipped == MAX_NON_FINITE - 1
    assert all(torch.equal(before[name], p) for name, p in trainer.trained.items())
    trainer.train_step([micro])  # a good one in between starts the count again
    for _ in range(MAX_NON_FINITE - 1):
        trainer.train_step([broken])
    assert all(p.isfinite().all() for p in trainer.trained.values())
    with pytest.raises(UserError, match=f"{MAX_NON_FINITE} steps in a row"):
        trainer.train_step([broken])


# ---- runs ----


def test_a_run_learns_and_leaves_what_it_promises(world, tmp_path):
    out = tmp_path / "run"
    results = run_recipe(recipe_of(world, out, "stage.finetune.epochs=8"))
    rows = read_log(out / "log.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps if row["stage"] == "finetune"] == list(range(1, 57))  # (56 - 6) / 8, 8 times
    for row in steps:
        assert row.keys() >= {
            *("loss", "grad_norm", "supervised", "lr", "tokens", "samples", "skipped", "tok_per_s", "supervised_per_s"),
            *("data_s", "forward_s", "backward_s", "optimizer_s", "step_s", "mfu", "peak_bytes"),
        }
        assert row["samples"] <= 8 and 0 < row["mfu"] < 1.5 and row["peak_bytes"] > 1e7
        phases = [row.get(f"{phase}_s", 0) for phase in ("data", "vision", "forward", "backward", "optimizer")]
        assert min(phases) >= 0 and sum(phases) <= row["step_s"] + 1e-3
    assert sum(row.get("vision_s", 0) for row in steps) > 0
    losses = [row["eval"]["eval_loss"] for row in rows if "eval" in row]
    assert len(losses) == 56 // 8 and losses[-1] < 0.5 * losses[0]
    assert results["pretrain"] == {} and results["finetune"]["eval_loss"] == losses[-1]
    assert results["finetune"].keys() == {"eval_loss", "eval_loss/data", "eval_loss/text"}
    assert Image.open(out / "curves.png").size[0] > 500
    assert read_recipe(out / "recipe.toml").stage[1].epochs == 8
    assert len(list((out / "finetune" / "checkpoints").iterdir())) == 1
    assert not list(out.rglob(".*partial*"))

    model = load_model(out / "finetune" / "model")  # the export is the model that was evaluated
    assert load_tokenizer(out / "finetune" / "model").vocab_size == model.config.decoder.vocab_size
    stage = recipe_of(world, out).stage[1]
    task = LLaVATask(dataclasses.replace(make_run(recipe_of(world, tmp_path / "2"), tmp_path, CPU), model=model), stage)
    dtype = compute_dtype("auto", CPU)
    with torch.no_grad():
        assert task.evaluate(model.to(dtype))["eval_loss"] == pytest.approx(losses[-1], rel=1e-5)

    tables = "model.tokenizer=''", "model.vision={}", "model.decoder={}"
    short = "stage.finetune.steps=2", "stage.finetune.epochs=0"
    base = recipe_of(world, tmp_path / "on", f"model.base={out}/finetune/model", *tables, *short)
    run_recipe(base, only="finetune")  # and a start for another run
    first = next(row for row in read_log(tmp_path / "on" / "log.jsonl") if row["step"] == 1)
    assert first["loss"] < 0.7 * next(row["loss"] for row in steps if row["stage"] == "finetune")


def test_the_papers_start_takes_tower_and_language_model_from_their_own_folders(world, tmp_path):
    """As recipes/llava-1.5-7b.toml does: weights to the bit, sizes from their config.json, 16 bits stay 16 bits."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    clip = {**sizes, "model_type": "clip_vision_model", "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    llama = {**sizes, "model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500}
    decoder = DecoderConfig(500, 32, 48, 3, 4, 2, 8)
    model = LLaVAModel(ModelConfig(vision=VisionConfig(32, 48, 3, 2, 16, 8), decoder=decoder))
    model.init_weights(1)
    model.half()
    for folder, part, layout, config in (("clip", "vision", "tower", clip), ("llm", "decoder", "original", llama)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        state = {n: p for n, p in model.state_dict().items() if n.startswith(part)}
        foreign = {rename(name, layout, to_ours=False): tensor for name, tensor in state.items()}
        save_file(foreign, tmp_path / folder / "model.safetensors")
    processor = {"image_processor_type": "CLIPImageProcessor", "crop_size": 16, "size": {"shortest_edge": 16}}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(processor))
    load_tokenizer(world / "tokenizer").save(tmp_path / "llm")

    wanted = ModelRecipe(vision_from=f"{tmp_path}/clip", decoder_from=f"{tmp_path}/llm", image={"fit": "pad"})
    recipe = dataclasses.replace(recipe_of(world, tmp_path / "run", "stage.*.dtype=bfloat16"), model=wanted)
    run = make_run(recipe, tmp_path, CPU)
    assert run.model.config.vision == model.config.vision and run.model.config.decoder.num_kv_heads == 2
    assert run.model.config.image.fit == "pad" and run.model.config.image.size == 16
    assert run.save_dtype == torch.bfloat16
    found = run.model.state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith("projector"):
            assert found[name].dtype == torch.float32 and found[name].std() > 0
        else:
            assert torch.equal(found[name], tensor.bfloat16()), name
    run_recipe(dataclasses.replace(recipe, out=str(tmp_path / "run")), only="pretrain")
    saved = load_model(tmp_path / "run" / "pretrain" / "model").state_dict()
    assert all(torch.equal(saved[n], found[n]) for n in saved if not n.startswith("projector"))
    assert not torch.equal(saved["projector.linears.0.weight"], found["projector.linears.0.weight"].bfloat16())


def launch(world, out, *more):
    command = [sys.executable, str(ROOT / "train.py"), str(world / "recipe.toml"), "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def computed(out):
    """What each step and each evaluation measured, times aside, in the order of the log."""
    measured = ("stage", "step", "loss", "grad_norm", "supervised", "lr", "tokens", "eval")
    return [{key: row[key] for key in measured if key in row} for row in read_log(out / "log.jsonl")]


def wait_for_rows(process, log, count):
    """Until stage 2 has written more than `count` rows."""
    give_up_s = time.monotonic() + 300
    while not (log.exists() and log.read_text().count('"finetune"') > count):
        assert process.poll() is None and time.monotonic() < give_up_s, process.communicate()
        time.sleep(0.005)


def test_a_deterministic_recipe_asks_pytorch_for_it(world, tmp_path, monkeypatch):
    """Before anything is on a device; by itself no recipe does."""
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, warn_only: asked.append((on, warn_only)))
    monkeypatch.setattr(pipeline.parallel, "start", lambda *_: 1 / 0)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    for sets, expected in ((), []), (("deterministic=true",), [(True, True)]):
        with pytest.raises(ZeroDivisionError):
            run_recipe(read_recipe(world / "recipe.toml", sets, str(tmp_path / "run")))
        assert asked == expected


def test_terminated_saves_and_resumes(world, tmp_path):
    """SIGTERM finishes the step and saves, whatever save_every is. SIGKILL is in test_kills.py."""
    sets = ["--set", "stage.*.save_every=0", "--set", "stage.finetune.epochs=20"]
    process = launch(world, tmp_path / "run", *sets)
    log = tmp_path / "run" / "log.jsonl"
    wait_for_rows(process, log, 10)
    process.terminate()
    error = process.communicate()[1]
    assert process.returncode == 130 and "--resume continues" in error and "Traceback" not in error
    saved = train_state.latest(tmp_path / "run" / "finetune" / "checkpoints")
    steps = [row["step"] for row in computed(tmp_path / "run") if row["stage"] == "finetune" and "loss" in row]
    assert saved.name == f"step-{steps[-1]:08d}" and steps[-1] < 140
    resumed = launch(world, tmp_path / "run", *sets, "--resume")
    said = resumed.communicate()[0]
    assert resumed.returncode == 0 and "stage pretrain: finished before" in said
    assert f"going on at step {steps[-1]}" in said


def test_stages_one_by_one_equal_all_at_once(world, tmp_path):
    run_recipe(recipe_of(world, tmp_path / "all"))
    run_recipe(recipe_of(world, tmp_path / "one"), only="pretrain")
    run_recipe(recipe_of(world, tmp_path / "one"), only="finetune")
    assert computed(tmp_path / "one") == computed(tmp_path / "all")
    again = run_recipe(recipe_of(world, tmp_path / "one"), resume=True)  # nothing is left to do
    assert again == {"pretrain": {}, "finetune": computed(tmp_path / "all")[-1]["eval"]}
    assert computed(tmp_path / "one") == computed(tmp_path / "all")


def test_adapters_name_the_model_that_they_are_over(world, tmp_path):
    """That of the stage before where it trained the decoder; a projector is in adapter/ itself."""
    short = "stage.pretrain.steps=1", "stage.finetune.epochs=0.1", "stage.finetune.lora={decoder = {rank = 2}}"
    run_recipe(recipe_of(world, tmp_path, *short, "stage.pretrain.lr={projector = 1e-2, decoder = 1e-2}"))
    ours, merged = (dict(load_model(tmp_path / "finetune" / n).named_parameters()) for n in ("adapter", "model"))
    base = dict(load_model(tmp_path / "pretrain" / "model").named_parameters())
    assert all((ours[name] - merged[name]).abs().max() <= 1e-6 for name in merged)
    assert any((base[name] - merged[name]).abs().max() > 1e-4 for name in merged)

    named = []
    for name in ("finetune/adapter", export_newest(tmp_path).name.replace("model", "finetune/adapter")):
        named.append(json.loads((tmp_path / name / "adapter_config.json").read_text())["base_model_name_or_path"])
    assert named == [str((tmp_path / "pretrain" / "model").resolve())] * 2
    trainer = trainer_of(world, tmp_path / "one", *short)
    trainer.task.run.finished.append(trainer.recipe.stage[0])  # which trained the projector
    trainer.export()
    assert (
        json.loads((tmp_path / "one/finetune/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == ""
    )


def test_a_folder_holds_one_run(world, tmp_path):
    out = tmp_path / "run"
    run_recipe(recipe_of(world, out), only="pretrain")
    with pytest.raises(UserError, match=r"earlier run.*--resume"):
        run_recipe(recipe_of(world, out))
    with pytest.raises(UserError, match=r"begun with other values \(seed: 42 -> 1\).*leave them.*--out"):
        run_recipe(recipe_of(world, out, "seed=1", "stage.finetune.lr.decoder=0.1"), resume=True)
    with pytest.raises(
        UserError, match=r"stage 'pretrain' is finished, stage.pretrain.steps cannot change; .*model.base="
    ):
        run_recipe(recipe_of(world, out, "stage.pretrain.steps=99"), resume=True)
    with pytest.raises(UserError, match=r"no stage 'finetun'.*did you mean 'finetune'"):
        run_recipe(recipe_of(world, out), only="finetun")
    (out / "pretrain" / "done.json").unlink()
    with pytest.raises(UserError, match=r"not finished.*--resume --stage pretrain"):
        run_recipe(recipe_of(world, out), only="finetune")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="something else than a run"):
        run_recipe(recipe_of(world, other), resume=True)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """The folder of a run of both stages."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run_recipe(recipe_of(world, out))
    return out


def interrupt(*_):
    """As a kill would: nothing is done any more."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["before the export", "before the last word", "behind the last word", "in a line"])
def test_killed_at_the_end_and_resumed_has_every_row_once(world, finished, tmp_path, monkeypatch, where):
    out = tmp_path / "run"
    places = {
        "before the export": (Trainer, "finish"), "before the last word": (pipeline.train_state.files, "write_whole"),
        "behind the last word": (train_state, "keep_weights"), "in a line": (Trainer, "finish"),
    }  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        write_whole = train_state.files.write_whole
        patch.setattr(*places[where], interrupt if "before the last" not in where else (
            lambda path, text: interrupt() if path.name == "done.json" else write_whole(path, text)))  # fmt: skip
        run_recipe(recipe_of(world, out))
    if where == "in a line":
        with (out / "log.jsonl").open("a") as file:
            file.write('{"stage": "pretrain", "step": 7, "lo')
    run_recipe(recipe_of(world, out), resume=True)
    assert computed(out) == computed(finished)
    left = [path.name for path in out.rglob("*") if ".partial" in path.name or ".gone" in path.name]
    assert not left and sorted(path.name for path in (out / "pretrain" / "checkpoints").iterdir()) == ["step-00000006"]
    assert not (out / "pretrain" / "checkpoints" / "step-00000006" / "optimizer").exists()


@pytest.mark.parametrize(
    ("step", "size", "file", "kept"),
    [
        (0, 999, "log.jsonl", "no checkpoint was saved yet"),
        (3, 999, "log.jsonl", "--resume goes on from {out}/pretrain/checkpoints/step-00000002"),
        (3, 5_000, "pretrain/checkpoints", "--resume goes on from {out}/pretrain/checkpoints/step-00000002"),
        (6, 20_000, "pretrain/model", "--resume goes on from {out}/pretrain/checkpoints/step-00000006"),
    ],
)
def test_a_full_disk_is_one_line_and_names_what_is_kept(world, finished, tmp_path, monkeypatch, step, size, file, kept):
    recipe, full = recipe_of(world, tmp_path / "run", "stage.pretrain.save_every=2"), contextlib.ExitStack()
    at = (Trainer, "_next_step") if step < 6 else (Trainer, "finish")
    before = getattr(*at)

    def fill_up(trainer, *arguments):
        if trainer.step == step:
            trainer.saver.wait()
            full.enter_context(disk_of(size))
        return before(trainer, *arguments)

    monkeypatch.setattr(*at, fill_up)
    with full, pytest.raises(UserError) as caught:
        run_recipe(recipe, only="pretrain")
    assert str(caught.value).startswith(f"{recipe.folder / file}: File too large; make room")
    assert str(caught.value).endswith(kept.format(out=recipe.folder)) and "\n" not in str(caught.value)
    monkeypatch.undo()
    run_recipe(recipe, resume=True, only="pretrain")
    assert computed(recipe.folder) == [row for row in computed(finished) if row["stage"] == "pretrain"]


def flipped(path, at=-9):
    """One bit of a file is another."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("pretrain/checkpoints/*/trained/*.safetensors", flipped, "is not what was written there"),
        ("pretrain/checkpoints/*/state.json", lambda path: flipped(path, path.read_bytes().index(b'"step": 6') + 8),
         "state.json: is not what was written there"),
        ("pretrain/checkpoints/*/state.json", lambda path: path.write_text("[]"), "state.json: cannot be read"),
        ("pretrain/checkpoints/*/state.json", lambda path: path.write_text("[" * 99999), "state.json: cannot be read"),
        ("pretrain/checkpoints/*/state.json", lambda path: path.write_bytes(b"\xff"), "state.json: cannot be read"),
        ("pretrain/checkpoints/*/trained/*.safetensors", lambda path: path.unlink(), "trained/.*is not what was"),
        ("pretrain/done.json", lambda path: path.write_text("[]"), "done.json: holds a list"),
        ("pretrain/done.json", lambda path: path.write_text("{}"), "done.json: has no measurements"),
        ("pretrain/done.json", lambda path: path.write_text("{"), "done.json: cannot be read as JSON"),
        ("log.jsonl", lambda path: path.write_text('{"stage": 1}\n\n'), "line 1 is no row of a log; remove the line"),
        ("log.jsonl", lambda path: path.write_text("[]\n\n"), "line 1 is no row"),
        ("log.jsonl", lambda path: path.write_text("[" * 99999 + "\n\n"), "line 1 is no row"),
        ("log.jsonl", lambda path: path.write_bytes(b"\xff\n\n"), "line 1 is no row"),
        ("recipe.toml", lambda path: path.write_text("x = " + "[" * 9999), "recipe.toml: is not TOML"),
        ("recipe.toml", lambda path: path.write_bytes(b"\xff"), "recipe.toml: is not UTF-8"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_run_is_one_line(world, finished, tmp_path, file, damage, said):
    out = tmp_path / "run"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("model", "finetune"))
    damage(next(out.glob(file)))
    with pytest.raises(UserError, match=said) as caught:
        run_recipe(recipe_of(world, out), resume=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "recipe", [[], ["recipe.toml"]], ids=["by the folder alone", "by a recipe that says otherwise"]
)
def test_resume_needs_no_set_and_takes_changes_of_steps_and_rates(world, tmp_path, monkeypatch, capsys, recipe):
    out, words = tmp_path / "run", [str(world / name) for name in recipe]
    short = ["--set", "stage.finetune.epochs=1", "--set", "stage.pretrain.steps=1"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "export", lambda self: interrupt() if self.stage.name == "finetune" else None)
        assert main(["train", str(world / "recipe.toml"), "--out", str(out), *short]) == 130
    ended = computed(out)[-2]["step"]
    with (out / "log.jsonl").open("a") as log:
        log.write('{"stage": "finetune", "st')  # as a kill leaves it
    capsys.readouterr()
    assert main(["train", *words, "--resume", "--out", str(out), "--stage", "finetune",
                 "--set", "stage.finetune.epochs=2", "--set", "stage.finetune.lr.decoder=0.005"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert ("goes on as it was begun, not by" in said and "stage.pretrain.steps: 1 -> 6" in said) == bool(recipe)
    assert "goes on with stage.finetune.epochs: 1.0 -> 2.0" in said
    rows = read_log(out / "log.jsonl")
    assert {"stage": "finetune", "step": ended, "changed": {"stage.finetune.epochs": "1.0 -> 2.0"}} in rows
    steps = [row for row in rows if row["stage"] == "finetune" and "loss" in row]
    assert [row["step"] for row in steps] == [*range(1, 2 * ended + 1)]
    assert steps[ended]["lr"]["decoder"] < 0.005 < steps[ended // 2]["lr"]["decoder"]
    assert read_recipe(out / "recipe.toml").stage[1].lr == {"projector": 0.01, "decoder": 0.005}
    assert main(["train", "--resume", "--out", str(out), "--set", "stage.finetune.clip=0.5"]) == 2
    assert "stage 'finetune' is finished" in capsys.readouterr().err


def test_a_run_is_resumed_from_another_folder(world, finished, tmp_path, monkeypatch):
    """It was begun with relative paths; the other folder has files of the same names."""
    out, other = str(tmp_path / "run"), tmp_path / "other"
    other.mkdir()
    for name in ("data.json", "text.json"):
        (other / name).write_text("[]")
    (tmp_path / "near.toml").write_text(RECIPE.format(root="."))
    monkeypatch.chdir(world)
    assert main(["train", str(tmp_path / "near.toml"), "--out", out, "--stage", "pretrain"]) == 0
    monkeypatch.chdir(other)
    assert main(["train", "--resume", "--out", out]) == 0
    assert computed(tmp_path / "run") == computed(finished)


def test_steps_that_are_behind_already(world, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "finish", interrupt)
        run_recipe(recipe_of(world, tmp_path / "run"), only="pretrain")
    fewer = recipe_of(world, tmp_path / "run", "stage.pretrain.steps=4")
    with pytest.raises(
        UserError, match=r"step-00000006 is past its 4 steps; give --set stage.pretrain.steps=6 or more"
    ):
        run_recipe(fewer, resume=True, only="pretrain")


@pytest.mark.parametrize("way", [{}, {"resume": True}, {"resume": True, "only": "finetune"}, {"only": "pretrain"}])
def test_a_second_run_on_a_live_ones_folder_is_refused_and_touches_nothing(world, finished, way):
    code = "import sys, pathlib, minillava.files as f; c = f.claimed(pathlib.Path(sys.argv[1])); c.__enter__(); input()"
    command = [sys.executable, "-c", code + " if not print(flush=True) else 0", str(finished)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
        with pytest.raises(UserError, match=f"process {other.pid} .* is writing there"):
            run_recipe(recipe_of(world, finished), **way)
        assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
        other.kill()


def test_checkpoints_are_whole_and_the_last_few(tmp_path):
    x = torch.zeros(2)
    saver = train_state.Saver(tmp_path, keep=2)
    for step in (1, 2, 30):
        (tmp_path / ".step-x.partial").mkdir()  # of a killed run
        saver.save(step, {"x": x.fill_(step)}, [("m/x", x)], {"s": step})
        x.fill_(-1)  # what the next step does while the files are still being written
    saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000030"]
    newest = train_state.latest(tmp_path)
    assert train_state.read(newest / "trained")["x"].tolist() == [30, 30]
    assert (
        train_state.read(newest / "optimizer")["m/x"].tolist() == [30, 30] and train_state.read_state(newest)["s"] == 30
    )
    assert not [p for p in newest.rglob("*") if p.is_file() and p.suffix not in (".safetensors", ".json")]  # no pickle
    with pytest.raises(UserError, match="does not fit this model: y"):
        train_state.load(newest / "trained", {"x": torch.zeros(2), "y": torch.ones(2)})
    with pytest.raises(UserError, match="does not fit this model: x"):
        train_state.load(newest / "trained", {"x": torch.zeros(3)})
    for file in (newest / "trained").iterdir():
        file.write_bytes(b"cut")
    with pytest.raises(UserError, match=r"cannot be read.*remove"):
        train_state.read(newest / "trained")


def test_a_folder_of_checkpoints_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    """A run that is resumed there must not begin again."""

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    assert train_state.latest(tmp_path) is None
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(PermissionError):
        train_state.latest(tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
def test_a_checkpoint_holds_all_of_the_optimizer(world, tmp_path, optimizer, monkeypatch):
    """And is written and read some parameters at a time, as 8-bit moments are four times as large in it."""
    sets = f"stage.finetune.optimizer={optimizer}", "stage.finetune.lr.vision=1e-2"
    trainer = trainer_of(world, tmp_path, *sets)
    batches = [next(trainer.task.batches(step, step + 1)) for step in range(6)]
    for trainer.step in range(3):
        trainer.train_step(batches[trainer.step])
    trainer.step = 3
    trainer.save()
    trainer.saver.wait()
    monkeypatch.setattr(train_state, "AT_ONCE", 1 << 12)
    reads, load = [], train_state.load
    monkeypatch.setattr(
        train_state, "load", lambda path, tensors, **how: (reads.append(tensors), load(path, tensors, **how))
    )
    resumed = trainer_of(world, tmp_path, *sets, resume=True)
    assert sum(any("exp_avg/" in name for name in tensors) for tensors in reads) >= 3
    made = iter(train_state.optimizer_tensors(trainer.optimizer, trainer.trained))
    asked, moments = [], trainer.optimizer.moments
    monkeypatch.setattr(trainer.optimizer, "moments", lambda p: (asked.append(p), moments(p))[1])
    next(made)
    assert len(asked) == 1
    assert resumed.step == 3 and len(resumed.optimizer.state) == len(trainer.optimizer.state) > 10
    for step in range(3, 6):
        trainer.step = resumed.step = step
        assert trainer.train_step(batches[step]) == resumed.train_step(batches[step])
    for name, parameter in trainer.trained.items():
        assert torch.equal(parameter, resumed.trained[name]), name


def test_muon_in_batches_gives_what_torchs_gives(monkeypatch):
    """Up to the rounding of bfloat16."""
    monkeypatch.setattr(Muon, "dtype", torch.bfloat16)
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (24, 8), (8, 24), (8, 8), (5, 7))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for _ in range(3):
        before = [p.detach().clone() for p in theirs]
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for a, b, start in zip(ours, theirs, before):
            assert (a - b).norm() < 0.02 * (b - start).norm()
            assert torch.equal(optimizers[0].state[a]["momentum_buffer"], optimizers[1].state[b]["momentum_buffer"])
            a.data.copy_(b.data)


@pytest.mark.parametrize("fast", (True, False))
def test_muon_multiplies_in_what_the_cpu_multiplies(monkeypatch, fast):
    seen, p = [], torch.nn.Parameter(torch.randn(4, 6))
    monkeypatch.setattr(optim, "multiplies_bf16", lambda _: fast)
    monkeypatch.setattr(optim, "orthogonal", lambda x_NAB, **_: (seen.append(x_NAB.dtype), x_NAB)[1])
    p.grad = torch.randn(4, 6)
    Muon([p], adjust_lr_fn="match_rms_adamw").step()
    assert seen == [torch.bfloat16 if fast else torch.float32]


def test_eight_bit_moments_come_back_as_they_were():
    """Through the float32 of a checkpoint, to the bit: large moments in 8 bits, small ones in float32."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    stage = StageConfig(name="a", lr={"x": 1e-2}, optimizer="adamw8bit")
    a = torch.nn.Linear(128, 64)

    def optimizer_of(model):
        return make_optimizer(model, {f"x.{name}": p for name, p in model.named_parameters()}, stage)

    def step(seed, *pairs):
        for model, _ in pairs:
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
        for _, optimizer in pairs:
            optimizer.step()

    before = optimizer_of(a)
    for seed in range(3):
        step(seed, (a, before))
    b = copy.deepcopy(a)
    after = optimizer_of(b)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        moments = before.moments(p)
        assert moments["exp_avg"].shape == p.shape and moments["exp_avg"].dtype == torch.float32
        after.load_moments(q, {key: value.clone() for key, value in moments.items()})
    assert before.state[a.weight]["state1"].dtype == torch.uint8 and before.state[a.bias]["state1"].is_floating_point()
    for seed in range(3, 6):
        step(seed, (a, before), (b, after))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---- bad data ----


def write_samples(folder, world, count, answer="It is red.", image=lambda i: f"{i % 48}.png"):
    turns = talk("<image>\nWhich?", answer)
    samples = [{"id": f"s{i}", "image": image(i), "conversations": turns} for i in range(count)]
    (folder / "data.json").write_text(json.dumps(samples))
    return f'stage.*.data=[{{path="{folder}/data.json", images="{world}/images"}}]'


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d, w: [write_samples(d, w, 9, image=lambda i: "none.png" if i > 6 else "0.png")],
         ["sample 's7'", "none.png is missing", "1 more"]),
        (lambda d, w: [write_samples(d, w, 9), "stage.*.max_tokens=5"], ["no token to learn", "max_tokens"]),
        (lambda d, w: [write_samples(d, w, 9, answer="<image>")], ["sample 's0'", "2 <image>"]),
        (lambda d, w: [write_samples(d, w, 9), "stage.*.data.0.path=nowhere.json"], ["nowhere.json"]),
        (lambda d, w: ["stage.*.data=[]"], ["stage 'pretrain': no data"]),
        (lambda d, w: ["stage.*.eval_samples=99"], ["eval_samples leaves nothing"]),
        (lambda d, w: ["model.tokenizer=''"], ["no tokenizer"]),
        (lambda d, w: ["model.decoder.vocab_size=10"], ["embedding 10 rows"]),
        (lambda d, w: ["stage.finetune.lr.visoin=1e-3"], ["stage 'finetune': lr for 'visoin'", "'vision'"]),
        (lambda d, w: ["stage.finetune.task=clip"], ["stage 'finetune': lr for", "task 'clip' has not"]),
        (lambda d, w: ["device=cdua"], ["'cdua'", "'cuda'"]),
        (lambda d, w: ["model.base=nowhere/at/all"], ["nowhere/at/all"]),
    ],
)  # fmt: skip
def test_a_run_on_bad_input_does_not_start(world, tmp_path, change, words):
    with pytest.raises(UserError) as caught:
        run_recipe(recipe_of(world, tmp_path / "run", *change(tmp_path, world)))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "run" / "pretrain" / "checkpoints").exists()


def test_the_command_line_says_it_in_one_line(world, tmp_path):
    process = launch(world, tmp_path / "run", "--set", "stage.pretrain.step=3")
    out, error = process.communicate()
    assert process.returncode == 2 and out == ""
    assert error.count("\n") == 1 and error.startswith("error: ") and "did you mean 'steps'" in error


def test_one_unreadable_picture_costs_that_sample_and_two_stop_the_run(world, tmp_path, capsys):
    (world / "images" / "broken.png").write_bytes(b"no picture")
    bad = write_samples(tmp_path, world, 130, image=lambda i: "broken.png" if i == 77 else f"{i % 48}.png")
    sets = bad, "stage.*.steps=17", "stage.*.epochs=0.0", "stage.finetune.eval_samples=0"
    # One in 130 is above what the look before the start allows in what it sees (1 in 200), so it shall not look there.
    with pytest.raises(UserError, match="1 of 130 samples tried cannot be used"):
        run_recipe(recipe_of(world, tmp_path / "a", *sets), only="pretrain")
    bad = write_samples(tmp_path, world, 401, image=lambda i: "broken.png" if i == 77 else f"{i % 48}.png")
    run_recipe(recipe_of(world, tmp_path / "b", *sets, "stage.*.epochs=1.0", "stage.*.steps=0"), only="pretrain")
    assert "1 different ones unusable and replaced" in capsys.readouterr().out
    broken = range(1, 401, 40)
    write_samples(tmp_path, world, 401, image=lambda i: "broken.png" if i in broken else f"{i % 48}.png")
    with pytest.raises(UserError, match=r"broken.png.*5 of 401 samples could not be used"):
        run_recipe(recipe_of(world, tmp_path / "c", *sets, "stage.*.epochs=1.0", "stage.*.steps=0"), only="pretrain")
