"""python -m bench.train_7b: training at the shapes of LLaVA-1.5 7B on one GPU, ours beside transformers + PEFT + Liger.

Weights are random and made on the card, pictures and texts are made up with the lengths of LLaVA-1.5's data, and what
runs is the shipped recipes' stages through the Trainer and its data pipeline, data included: stage 1, LoRA, QLoRA, full
fine-tuning with 8-bit AdamW, each with activations kept and computed again. The peer (bench.train_peer) gets the same
weights and the same batches, ready-made. MFU is FLOPs of the model (`metrics.Work`; what is computed again does not
count) over the measured matmul peak. Memory is what 1 x 2048 tokens take. Then 50 steps from one start (AdamW in 32
bits): in bf16 our losses have to be as near to those of transformers in float32 as its own in bf16 are, whole batches
or one sample at a time, times two, on average and in the root mean square; in float32 within 1e-5 of its own.
Without a GPU all of it is rehearsed at tiny sizes. Results: train_7b.json and .md, after every part of the run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import io
import json
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from bench import machine
from bench.train_made import build, draw, make_data
from bench.train_peer import Peer, Spec, absent
from minillava.data.batch import Batch
from minillava.layers.scheme import Scheme
from minillava.recipe import DataConfig, read_recipe, stage_index
from minillava.training import parallel
from minillava.training.build import read_config
from minillava.training.llava_task import LLaVATask
from minillava.training.progress import Log
from minillava.training.task import Run
from minillava.training.trainer import Trainer

EXACT = 1e-5  # how far apart float32's losses may be, relatively
Way = tuple[str, int, bool]  # activations (off, selective, full), samples a forward pass, compiled


@dataclasses.dataclass(frozen=True)
class Mode:
    recipe: str
    stage: str
    sets: tuple[str, ...]
    samples: int  # of a timed step; what the recipe gives to eight GPUs is more
    ways: tuple[Way, ...]
    mfu: float = 0.0  # the goals of the project
    memory_gb: float = 0.0


WAYS_2: tuple[Way, ...] = (("off", 4, False), ("selective", 8, False), ("full", 16, False))
MODES = {
    "lora": Mode("llava-1.5-7b-lora", "finetune", (), 32, WAYS_2, 0.45, 24.0),
    "full": Mode("llava-1.5-7b", "finetune", ("stage.*.optimizer=adamw8bit",), 32, WAYS_2, 0.45),
    "pretrain": Mode("llava-1.5-7b", "pretrain", (), 32, (("off", 8, False), ("full", 32, False)), 0.40),
    "qlora": Mode("llava-1.5-7b-qlora", "finetune", (), 8, (("off", 4, False), ("full", 2, False)), 0.0, 12.0),
}
SIZES = {  # what the recipes' downloads would bring
    "7b": ["model.decoder.vocab_size=32000"],
    "tiny": [
        "model.vision={hidden_size=32, intermediate_size=64, num_layers=3, num_heads=2, image_size=28, patch_size=14}",
        "model.decoder={vocab_size=1000, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, "
        "num_kv_heads=2, head_dim=32, max_positions=2048}",
        "model.image.size=28",
    ],
}


class Ours:
    """A stage of a shipped recipe, on made-up data and weights, with the Trainer that train.py uses."""

    def __init__(self, bench: Bench, mode: Mode, sets: Iterable[str]):
        data = bench.folder / ("captions" if mode.stage == "pretrain" else "mix")
        images, words = bench.folder / "images", bench.folder / "tokenizer"
        changes = [
            *SIZES[bench.size], "model.base=", "model.decoder_from=", "model.vision_from=", "model.image.fit=pad",
            "model.projector.layers=2", "model.chat.template=vicuna_v1", f"model.tokenizer={words}",
            f"stage.{mode.stage}.data=[{{path='{data}.json', images='{images}'}}]",
            "stage.*.epochs=0", "stage.*.steps=100", f"stage.*.dtype={str(bench.dtype).removeprefix('torch.')}",
            *([] if bench.device.type == "cuda" else ["stage.*.workers=0"]), *mode.sets, *sets,
        ]  # fmt: skip
        recipe = read_recipe(machine.ROOT / "recipes" / f"{mode.recipe}.toml", changes, str(bench.folder))
        config, tokenizer = read_config(recipe, bench.folder, None)
        scheme = Scheme.parse(recipe.model.quantize) if recipe.model.quantize else None
        model = build(config, scheme, bench.device, bench.dtype)
        self.run = Run(recipe, bench.folder, model, tokenizer, bench.device, torch.bfloat16)
        self.stage = recipe.stage[stage_index(recipe, mode.stage)]
        self.spec = Spec(config, self.stage, scheme)
        log = Log(bench.folder / "log.jsonl")
        self.trainer = Trainer(self.task(), self.stage, bench.device, bench.folder, log, False, recipe)
        self.model, self.undo = model, lambda: None
        model.train()

    def task(self, **changes: Any) -> LLaVATask:
        with contextlib.redirect_stdout(io.StringIO()):  # the look at the data that every task begins with
            return LLaVATask(self.run, dataclasses.replace(self.stage, **changes))

    def prepare(self, checkpointing: str, compiled: bool = False) -> None:
        self.undo()
        self.undo = parallel.wrap_blocks(self.run.model, checkpointing, compiled)

    def step(self, micros: list[Batch]) -> float:
        loss = self.trainer.train_step(micros)["loss"]
        self.trainer.step += 1
        return loss

    def close(self) -> None:
        self.undo()
        self.trainer.clock.close()


# ---- the measurements ----


@dataclasses.dataclass
class Bench:
    device: torch.device
    dtype: torch.dtype
    size: str
    folder: Path
    steps: int
    peers: bool
    result: dict[str, Any]
    peak: float = 1.0  # FLOP/s of a large product

    @property
    def liger(self) -> bool:
        return self.device.type == "cuda" and find_spec("liger_kernel") is not None

    def clean(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_gb(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None

    def forget_peak(self) -> None:
        self.clean()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peer(self, spec: Spec, dtype: torch.dtype, steps: int, liger: bool) -> Peer:
        return Peer(spec, steps, self.device, dtype, draw, liger)


Step = tuple[list[Batch], tuple[float, ...]]  # and its samples, supervised tokens, tokens and FLOPs


def counted(task: LLaVATask, steps: int) -> Iterator[Step]:
    for micros in task.batches(0, steps):
        counts, supervised = task.counts(micros), sum(micro.supervised for micro in micros)
        yield micros, (counts["samples"], supervised, counts["tokens"], counts["flops"])


def timed(bench: Bench, engine: Ours | Peer, steps: Iterable[Step]) -> dict[str, Any]:
    """Medians over all steps but the first; a step is from the one before's end to its own."""
    bench.forget_peak()
    ends, rows = [], []
    for micros, counts in steps:
        loss = engine.step(micros)
        ends.append(bench.now())
        rows.append(counts)
    seconds = [b - a for a, b in pairwise(ends)]
    rates = [median(count / s for count, s in zip(column, seconds)) for column in zip(*rows[1:])]
    names = "samples_per_s", "supervised_per_s", "tokens_per_s"
    return {
        "step_s": median(seconds), **dict(zip(names, rates)), "mfu": rates[3] / bench.peak,
        "peak_gb": bench.peak_gb(), "loss": loss,
    }  # fmt: skip


Feed = tuple[Way, bool, Callable[[], Iterable[Step]]]  # the bool: one long sample, for the memory


def rows_of(bench: Bench, engine: Ours | Peer, head: dict[str, str], feeds: Iterable[Feed]) -> None:
    for (checkpointing, micro, compiled), long, steps in feeds:
        row: dict[str, Any] = {**head, "activations": checkpointing, "micro": micro} | ({"long": True} if long else {})
        row["who"] += " compiled" * compiled
        try:
            engine.prepare(checkpointing, compiled)
            row |= timed(bench, engine, steps())
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
            engine.model.zero_grad()
        bench.clean()
        bench.result["speed"].append(row)
        print("  " + line(row), flush=True)
    engine.close()


def speed_of_ours(bench: Bench, name: str, compiled: bool) -> tuple[Spec, list[Feed]]:
    """Rows of a mode's ways and of 1 x 2048 tokens. Returns what the peer needs for its own; the model is let go of."""
    mode = MODES[name]
    ours = Ours(bench, mode, [f"stage.*.batch_size={mode.samples if bench.size == '7b' else 8}"])
    ways = mode.ways + tuple((*way[:2], True) for way in mode.ways if way[0] == "full" and compiled)
    feeds: list[Feed] = [(way, False, partial(counted, ours.task(micro_batch=way[1]), bench.steps + 1)) for way in ways]
    if mode.memory_gb:
        data = DataConfig(str(bench.folder / "long.json"), str(bench.folder / "images"))
        long = ours.task(data=(data,), batch_size=1, micro_batch=1)
        assert all(len(micro.ids_T) == 2048 for micros in long.batches(0, 2) for micro in micros)
        feeds.append((("full", 1, False), True, partial(counted, long, 2)))
    # The peer's batches are ready, so its steps have no data in them.
    shared = [feed for feed in feeds if feed[0][0] != "selective" and not feed[0][2]]
    ready: list[Feed] = [(way, long, partial(iter, list(steps()))) for way, long, steps in shared]
    rows_of(bench, ours, {"mode": name, "who": "minillava"}, feeds)
    return ours.spec, ready


def speed(bench: Bench, name: str, compiled: bool) -> None:
    """Rows of one mode: ours, then the peer's."""
    spec, ready = speed_of_ours(bench, name, compiled)
    bench.clean()
    why = absent(spec)
    if bench.peers and why:
        print(f"  {name}: no peer, as {why}")
    elif bench.peers:
        who = "transformers" + " + PEFT" * bool(spec.stage.lora) + " + bitsandbytes" * (spec.scheme is not None)
        peer = bench.peer(spec, bench.dtype, spec.stage.steps, bench.liger)
        rows_of(bench, peer, {"mode": name, "who": who + " + Liger" * bench.liger}, ready)


def apart(a: list[float], b: list[float]) -> dict[str, float]:
    """How far losses are from others, relatively."""
    each = [abs(x - y) / abs(y) if math.isfinite(x) and math.isfinite(y) else math.inf for x, y in zip(a, b)]
    return {"greatest": max(each), "mean": fmean(each), "rms": fmean(x * x for x in each) ** 0.5}


def compare(bench: Bench, name: str, steps: int, layers: int) -> None:
    """Losses step by step: ours, the peer's, and the peer's in float32, from one start over one order of batches."""
    mode = MODES[name]
    sets = [
        "stage.*.batch_size=2",
        f"stage.*.steps={steps}",
        "stage.*.optimizer=adamw",
    ]  # 8 bits make noise of rounding
    sets += [f"model.decoder.num_layers={layers}"] if layers else []
    sets += ["stage.finetune.lora.decoder.dropout=0.0"] if "lora" in name else []
    sets += ["stage.*.lr.projector=1e-3"] if bench.size == "tiny" else []  # the recipes' rates are for wide models
    sets += ["stage.finetune.lr.decoder=1e-3"] if bench.size == "tiny" and mode.stage == "finetune" else []

    def curve(engine: Ours | Peer, batches: list[list[Batch]]) -> list[float]:
        engine.prepare("full")
        losses = [engine.step(micros) for micros in batches]
        engine.close()
        return losses

    ours = Ours(bench, mode, sets)
    spec = ours.spec
    if why := absent(spec):
        print(f"  {name}: no losses to compare with, as {why}")
        return
    whole, apiece = (list(ours.task(micro_batch=micro).batches(0, steps)) for micro in (2, 1))
    result: dict[str, Any] = {"mode": name, "layers": spec.config.decoder.num_layers, "minillava": curve(ours, whole)}
    del ours
    bench.clean()
    runs = {"transformers": (bench.dtype, whole)}
    if bench.dtype == torch.bfloat16:
        runs |= {"transformers one by one": (bench.dtype, apiece), "float32": (torch.float32, whole)}
    for who, (dtype, batches) in runs.items():
        result[who] = curve(bench.peer(spec, dtype, steps, False), batches)
        bench.clean()
    result["apart"] = apart(result["minillava"], result["transformers"])
    if "float32" in result:
        result["error"] = {
            who: apart(result[who], result["float32"]) for who in ("minillava", *runs) if who != "float32"
        }
        mine, *theirs = result["error"].values()
        result["holds"] = all(mine[key] <= 2 * max(their[key] for their in theirs) for key in ("mean", "rms"))
    else:
        result["holds"] = result["apart"]["greatest"] <= EXACT
    bench.result["losses"].append(result)
    print("  " + loss_line(result), flush=True)


# ---- what is shown ----


def line(row: dict[str, Any]) -> str:
    what = "1 x 2048 tokens" if "long" in row else f"{row['micro']} samples a pass"
    head = f"{row['mode']:9} {row['who']:44} activations {row['activations']:10} {what:20}"
    if "failed" in row:
        return f"{head} {row['failed']}"
    memory = "" if row["peak_gb"] is None else f", peak {row['peak_gb']:.1f} GB"
    return (f"{head} {row['step_s']:.3f} s a step, {row['samples_per_s']:.2f} samples/s, "
            f"{row['supervised_per_s']:.0f} supervised tokens/s, MFU {row['mfu']:.1%}{memory}")  # fmt: skip


def loss_line(found: dict[str, Any]) -> str:
    text = (f"{found['mode']:9} {found['layers']} layers, {len(found['minillava'])} steps: "
            f"{found['minillava'][0]:.4f} to {found['minillava'][-1]:.4f}; from transformers' "
            f"{found['apart']['greatest']:.1e} at most, {found['apart']['mean']:.1e} on average")  # fmt: skip
    for who, error in found.get("error", {}).items():
        text += f"; {who} from float32's {error['mean']:.1e} (rms {error['rms']:.1e})"
    return text + ("" if found["holds"] else "; TOO FAR")


def goals(result: dict[str, Any]) -> list[str]:
    """What was wanted, and what was found."""
    said = []
    for name, mode in MODES.items():
        rows = [r for r in result["speed"] if r["mode"] == name and "failed" not in r and r["who"][:4] == "mini"]
        fast, large = ([r for r in rows if ("long" in r) == long] for long in (False, True))
        if mode.mfu and fast and result["size"] == "7b":
            best = max(row["mfu"] for row in fast)
            said.append(f"{name}: MFU {best:.1%}, goal {mode.mfu:.0%}: {'met' if best >= mode.mfu else 'missed'}")
        if mode.memory_gb and large and large[0]["peak_gb"] is not None:
            peak = large[0]["peak_gb"]
            verdict = "met" if peak < mode.memory_gb else "missed"
            said.append(f"{name}: 1 x 2048 tokens peak at {peak:.1f} GB, goal {mode.memory_gb:.0f}: {verdict}")
    for found in result["losses"]:
        said.append(f"{found['mode']}: losses {'agree' if found['holds'] else 'DO NOT AGREE'}")
    return said


def table(result: dict[str, Any]) -> str:
    facts, limits = result["facts"], result["limits"]
    rehearsal = " (a rehearsal: tiny sizes)" if result["size"] == "tiny" else ""
    lines = [
        f"# Training LLaVA-1.5 {result['size'].upper()} on {facts['device']}{rehearsal}", "",
        f"{machine.made_of(facts)}; {result['dtype']}; {result['steps']} steps timed. Measured: "
        f"matmul {limits['matmul_flop_per_s'] / 1e12:.3f} TFLOP/s, copy {limits['copy_bytes_per_s'] / 1e12:.3f} TB/s. "
        "Ours with data, the peer's batches are ready.", "",
        "| | activations | samples a pass | s a step | samples/s | supervised tokens/s | MFU | peak GB |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in result["speed"]:
        what = "1 x 2048 tokens" if "long" in row else str(row["micro"])
        again = {"off": "kept", "selective": "the wide half again", "full": "computed again"}[row["activations"]]
        cells = [f"{row['mode']}, {row['who']}", again, what]
        if "failed" in row:
            cells += [row["failed"], *[""] * 4]
        else:
            peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}"
            cells += [f"{row['step_s']:.3f}", f"{row['samples_per_s']:.2f}", f"{row['supervised_per_s']:.0f}",
                      f"{row['mfu']:.1%}", peak]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {said}" for said in goals(result)), *(f"- {loss_line(found)}" for found in result["losses"])]
    lines += [f"- not run: {what}" for what in result["not run"]]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.train_7b", description=(__doc__ or "").split("\n")[0])
    cuda = torch.cuda.is_available()
    names = ",".join(MODES)
    parser.add_argument("--modes", default=names, help=f"whose speed and memory are measured ({names}); or none")
    parser.add_argument("--compare", default="lora,full" if cuda else names, help="whose losses; or none")
    parser.add_argument("--steps", type=int, default=3 if cuda else 2, help="timed steps of each row")
    parser.add_argument("--compare-steps", type=int, default=50)
    parser.add_argument("--layers", type=int, default=16 if cuda else 0,
                        help="decoder blocks where losses are compared, most of it in float32; 0: all")  # fmt: skip
    parser.add_argument("--size", choices=SIZES, default="7b" if cuda else "tiny")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--seconds", type=float, default=540.0, help="no part begins that would end later")
    parser.add_argument("--no-peers", action="store_true", help="ours alone: no peer's speed, no losses")
    parser.add_argument("--compile", action="store_true", help="ours with compiled blocks too")
    machine.add_out(parser)
    chosen = parser.parse_args(arguments)
    began, device = time.perf_counter(), torch.device("cuda" if cuda else "cpu")
    if not cuda:
        print("no GPU: a rehearsal at tiny sizes, without Liger, whose Triton kernels need one", flush=True)
    elif not find_spec("liger_kernel"):
        print("liger_kernel is not installed: the peer goes without", flush=True)
    dtype = getattr(torch, chosen.dtype)
    out = machine.out(chosen, device.type)
    result: dict[str, Any] = {
        "facts": machine.facts(device.type), "limits": machine.limits(device.type, dtype, tiny=False),
        "size": chosen.size, "dtype": chosen.dtype, "steps": chosen.steps, "speed": [], "losses": [], "not run": [],
    }  # fmt: skip
    chosen_modes, compared = ([] if x == "none" else x.split(",") for x in (chosen.modes, chosen.compare))
    parts = [(f"speed of {name}", partial(speed, name=name, compiled=chosen.compile)) for name in chosen_modes]
    parts += [
        (f"losses of {name}", partial(compare, name=name, steps=chosen.compare_steps, layers=chosen.layers))
        for name in compared if not chosen.no_peers
    ]  # fmt: skip
    longest: dict[str, float] = {}  # parts of a kind take about the same time
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        make_data(folder, 128, 1 if chosen.size == "7b" else 16)
        bench = Bench(device, dtype, chosen.size, folder, chosen.steps, not chosen.no_peers, result)
        bench.peak = result["limits"]["matmul_flop_per_s"]
        for title, part in parts:
            started, kind = time.perf_counter(), title.split()[0]
            if started - began + longest.get(kind, 0.0) > chosen.seconds:
                result["not run"].append(f"{title}: no time left")
                continue
            print(f"{title}, after {started - began:.0f} s", flush=True)
            try:
                part(bench)
            except Exception as error:  # noqa: BLE001  what the other parts measure is worth keeping
                result["not run"].append(f"{title}: {type(error).__name__}: {error}")
                traceback.print_exc()
            bench.clean()
            longest[kind] = max(longest.get(kind, 0.0), time.perf_counter() - started)
            (out / "train_7b.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            (out / "train_7b.md").write_text(table(result), encoding="utf-8")
    print(*goals(result), *(f"not run: {what}" for what in result["not run"]), sep="\n")
    print(f"{time.perf_counter() - began:.0f} s; wrote {out}/train_7b.json, train_7b.md")
    return int(bool(result["not run"]) or not all(found["holds"] for found in result["losses"]))


if __name__ == "__main__":
    raise SystemExit(main())
