"""python -m minillava.kernels.tools.tune: find this card's best configurations and write them to tuned/<kernel>.json.

Every bucket that the card's architecture ships is timed on its case, a candidate a process: its results are compared
with PyTorch's, then it is timed with a cold L2 cache, medians. One that does not compile or fit, is wrong, or reads
where it must not is named and left out. What is written is compiled by the tests like everything shipped: a spill
fails them.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from statistics import median
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from minillava.kernels import configs, rms_norm
from minillava.kernels.frame import Card, card_of
from minillava.kernels.tools.cases import CASES, Run

Config = dict[str, Any]
MOST_OFF = 0.03  # of a result's length: both are rounded to bf16 on the way

# Configurations worth timing for a part of a kernel and a bucket; the compiler says which it cannot take.


def grid(**choices: Sequence[Any]) -> Iterator[Config]:
    """Every combination of these."""
    return (dict(zip(choices, values)) for values in product(*choices.values()))


def mlp_candidates(card: Card, part: str, bucket: Config) -> Iterator[Config]:
    few_rows = "rows" in bucket
    blocks = ((16, 64, 128), (16, 128, 64), (32, 64, 64)) if few_rows else ((64, 64, 64), (64, 128, 64), (128, 128, 32))
    shares = (1, 2, 4, 8) if few_rows and part == "forward" else (1,)
    for m, n, k in blocks:
        tile = {"variant": "pointer", "block_m": m, "block_n": n, "block_k": k, "group": 8}
        yield from (tile | rest for rest in grid(split_k=shares, warps=(4, 8), stages=(3, 4)))
    if few_rows or not card.has_descriptors:
        return
    sizes = {"block_m": [128], "block_n": [128, 256], "block_k": [64], "group": [4, 8, 16], "stages": [3, 4]}
    yield from grid(variant=["descriptor"], **sizes, parts=[2], specialize=[False], warps=[8])
    if card.arch == "sm_90" and part == "forward":
        yield from grid(variant=["descriptor"], **sizes, parts=[1], specialize=[True], warps=[4])


def loss_candidates(card: Card, part: str, bucket: Config) -> Iterator[Config]:
    """A row in registers only where the bucket says how long it may be."""
    if bucket.get("width", 1 << 30) <= 65536:
        yield from grid(one_pass=[True], warps=(4, 8, 16, 32), stages=[2])
    yield from grid(one_pass=[False], block=(2048, 4096, 8192, 16384), warps=(4, 8, 16, 32), stages=[2])


def norm_candidates(card: Card, part: str, bucket: Config) -> Iterator[Config]:
    least = min(bucket.get("width", rms_norm.WIDEST), 16384)
    numbers = [n for n in (2048, 4096, 8192, 16384) if n >= least]
    programs = {"programs": (1, 2, 4)} if part == "backward" else {}
    return grid(numbers=numbers, warps=(4, 8, 16), stages=[1], **programs)


def swiglu_candidates(card: Card, part: str, bucket: Config) -> Iterator[Config]:
    return grid(block=(512, 1024, 2048, 4096, 8192), warps=(4, 8, 16), stages=[1])


def flash_candidates(card: Card, part: str, bucket: Config) -> Iterator[Config]:
    if part == "decode":
        yield from grid(block_n=(32, 64, 128), programs=(2, 4, 8), warps=(4, 8), stages=(2, 3, 4))
        return
    sizes = {"block_m": (32, 64, 128), "block_n": (32, 64, 128), "stages": (2, 3)}
    variants = ("pointer", "descriptor") if card.has_descriptors else ("pointer",)
    yield from grid(variant=variants, specialize=[False], **sizes, warps=(4, 8))
    if card.arch == "sm_90" and part in ("forward", "backward_keys"):
        yield from grid(variant=["descriptor"], specialize=[True], **sizes, warps=[4])


def nf4_candidates(card: Card, part: str, bucket: Config) -> Iterator[Config]:
    """For one row the shuffle kernel (tiles of 4 blocks divide nearly every width, of 8 fewer), for more the tensor
    cores, and from 16 rows on the library, so that what is measured decides where it takes over."""
    if part == "dequantize":
        yield from grid(words=(128, 256, 512, 1024), warps=(2, 4, 8))
        return
    rows = bucket.get("rows", 1 << 30)
    if rows <= 4:
        yield from gemv_candidates()
    if rows >= 16:
        yield {"variant": "library"}
    if "rows" not in bucket:
        return
    m = min(max(16, 1 << (rows - 1).bit_length()), 256)
    sizes = {"block_m": sorted({m, max(16, m // 2)}), "block_n": (64, 128), "warps": (4, 8), "stages": (3, 4)}
    for config in grid(variant=["product"], **sizes, split_k=(1, 2, 4, 8) if rows <= 64 else (1,)):
        if config["block_n"] // config["warps"] >= 16:  # else loads are not asynchronous
            yield config


def gemv_candidates() -> Iterator[Config]:
    """A thread holds a word of each of block_n rows; more warps are more loads under way."""
    for blocks, warps in ((4, 1), (8, 2), (16, 4), (32, 8)):
        yield from grid(variant=["gemv"], block_n=(4, 8, 16), blocks=[blocks], warps=[warps])


def decode_candidates(card: Card, part: str, bucket: Config) -> Iterator[Config]:
    """One row by multiply-adds, or up to 16 on tensor cores; shares only where they can be added (few outputs)."""
    one = bucket.get("rows", 16) == 1
    if part == "nf4":
        yield from gemv_candidates() if one else ()
        shares = (1, 2, 4, 8) if "width" in bucket else (1,)
        yield from grid(variant=["product"], block_m=[16], block_n=(64, 128), split_k=shares, warps=[4], stages=(3, 4))
        return
    if one:
        yield from grid(variant=["row"], block_n=(2, 4, 8), block_k=(512, 1024, 2048), warps=(4, 8))
    sizes = {"block_m": [16], "block_n": (16, 32, 64), "block_k": (128, 256)}
    yield from grid(variant=["rows"], **sizes, warps=(1, 2, 4), stages=(4, 6))


CANDIDATES: dict[str, Callable[[Card, str, Config], Iterator[Config]]] = {
    "fused_mlp": mlp_candidates,
    "linear_cross_entropy": loss_candidates,
    "rms_norm": norm_candidates,
    "swiglu": swiglu_candidates,
    "flash": flash_candidates,
    "nf4_matmul": nf4_candidates,
    "decode_linear": decode_candidates,
}


def measure(kernel: str, part: str, bucket: Config, config: Config, rounds: int) -> float:
    """Median seconds of a configuration with a cold L2 cache; ValueError where its results are not PyTorch's."""
    torch.manual_seed(0)
    run = CASES[kernel](part, bucket, "cuda")
    compare(run, config)
    flush, times = torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), []
    for _ in range(rounds):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(config)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return median(times)


def compare(run: Run, config: Config) -> None:
    """Raise ValueError where a result of the kernel differs from the plain code's by more than bf16 explains."""
    expected, got = (tree_leaves(run(chosen)) for chosen in (None, config))
    for a, b in zip(got, expected, strict=True):
        off = ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()
        if not off <= MOST_OFF:
            raise ValueError(f"is off by {off:.1%}")


def try_out(kernel: str, part: str, bucket: Config, config: Config, rounds: int) -> float:
    """`measure` in a process of its own, as an illegal access takes the process with it; infinite where it fails."""
    job = json.dumps([kernel, part, bucket, config, rounds])
    command = [sys.executable, "-m", "minillava.kernels.tools.tune", "--one", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        print(f"  left out {config}: no answer in 600 s")
        return math.inf
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or [f"ended with status {done.returncode}"]
        print(f"  left out {config}: {why[0]}")
        return math.inf
    return float(done.stdout.split()[-1])


def tune(kernel: str, card: Card, part: str, bucket: Config, rounds: int) -> Config:
    """The bucket with the best configuration for it; what it has stays where no candidate is right."""
    bounds = {name: bound for name, bound in bucket.items() if name != "config"}
    candidates = list(CANDIDATES[kernel](card, part, bucket))
    times = [try_out(kernel, part, bucket, config, rounds) for config in candidates]
    seconds, best = min(zip(times, candidates), key=lambda pair: pair[0], default=(math.inf, bucket["config"]))
    best = bucket["config"] if seconds == math.inf else best
    print(f"{kernel} {part} {bounds or 'beyond'}: {seconds * 1e6:.1f} us {best}")
    return {**bounds, "config": best}


def write(kernel: str, table: dict[str, Any]) -> None:
    """tuned/<kernel>.json, a bucket a line."""
    parts = []
    for part, cards in table.items():
        lines = [
            f"    {json.dumps(c)}: [\n" + ",\n".join(f"      {json.dumps(b)}" for b in bs) for c, bs in cards.items()
        ]
        parts.append(f"  {json.dumps(part)}: {{\n" + "\n    ],\n".join(lines) + "\n    ]\n  }")
    (configs.FOLDER / f"{kernel}.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minillava.kernels.tools.tune", description=__doc__)
    parser.add_argument("--kernel", choices=CASES, action="append")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("minillava.kernels.tools.tune: no GPU here; run it on the card that is to be tuned", file=sys.stderr)
        return 2
    if chosen.one:
        print(measure(*json.loads(chosen.one)))
        return 0
    card = card_of(torch.empty(1, device="cuda"))
    for kernel in chosen.kernel or CASES:
        table = configs.table(kernel)
        for part, cards in table.items():
            buckets = cards[configs.entry(cards, card)]
            cards[card.name] = [tune(kernel, card, part, bucket, chosen.rounds) for bucket in buckets]
        write(kernel, table)
        print(f"wrote {configs.FOLDER / kernel}.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
