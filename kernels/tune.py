"""python -m minillava.kernels.tune: find this card's best configurations and write them to tuned/<kernel>.json.

Every bucket that the card's architecture ships is timed on its case: candidates one after another in each round, a cold
L2 cache, medians. A candidate that does not compile or fit is named and left out. What is written is compiled by the
tests like everything shipped: a spill fails them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import product
from statistics import median
from typing import Any

import torch
import triton

from minillava.kernels import configs, rms_norm
from minillava.kernels.cases import CASES, Run
from minillava.kernels.frame import Card, card_of

Config = dict[str, Any]

# Configurations worth timing for a part of a kernel and a bucket; what the compiler cannot take is dropped when it says
# so.


def mlp_candidates(card: Card, part: str, bucket: Config) -> Iterator[Config]:
    few_rows = "rows" in bucket
    blocks = ((16, 64, 128), (16, 128, 64), (32, 64, 64)) if few_rows else ((64, 64, 64), (64, 128, 64), (128, 128, 32))
    shares = (1, 2, 4, 8) if few_rows and part == "forward" else (1,)
    for (m, n, k), split, warps, stages in product(blocks, shares, (4, 8), (3, 4)):
        sizes = {"block_m": m, "block_n": n, "block_k": k, "group": 8}
        yield {"variant": "pointer", **sizes, "split_k": split, "warps": warps, "stages": stages}
    if few_rows or not card.has_descriptors:
        return
    for (m, n), stages, group in product(((128, 128), (128, 256)), (3, 4), (4, 8, 16)):
        sizes = {"block_m": m, "block_n": n, "block_k": 64, "group": group}
        yield {"variant": "descriptor", **sizes, "parts": 2, "specialize": False, "warps": 8, "stages": stages}
        if card.arch == "sm_90" and part == "forward":
            yield {"variant": "descriptor", **sizes, "parts": 1, "specialize": True, "warps": 4, "stages": stages}


def loss_candidates(card: Card, part: str, bucket: Config) -> Iterator[Config]:
    """A row in registers only where the bucket says how long it may be."""
    for warps in (4, 8, 16, 32):
        if bucket.get("width", 1 << 30) <= 65536:
            yield {"one_pass": True, "warps": warps, "stages": 2}
        for block in (2048, 4096, 8192, 16384):
            yield {"one_pass": False, "block": block, "warps": warps, "stages": 2}


def norm_candidates(card: Card, part: str, bucket: Config) -> Iterator[Config]:
    for numbers, warps, programs in product((2048, 4096, 8192, 16384), (4, 8, 16), (1, 2, 4)):
        forward = {"numbers": numbers, "warps": warps, "stages": 1}
        if numbers < min(bucket.get("width", rms_norm.WIDEST), 16384):
            continue
        if part == "backward":
            yield {**forward, "programs": programs}
        elif programs == 1:
            yield forward


def swiglu_candidates(card: Card, part: str, bucket: Config) -> Iterator[Config]:
    for block, warps in product((512, 1024, 2048, 4096, 8192), (4, 8, 16)):
        yield {"block": block, "warps": warps, "stages": 1}


def flash_candidates(card: Card, part: str, bucket: Config) -> Iterator[Config]:
    if part == "decode":
        for block, warps, stages, programs in product((32, 64, 128), (4, 8), (2, 3, 4), (2, 4, 8)):
            yield {"block_n": block, "programs": programs, "warps": warps, "stages": stages}
        return
    for m, n, warps, stages in product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3)):
        sizes = {"block_m": m, "block_n": n, "warps": warps, "stages": stages}
        yield {"variant": "pointer", "specialize": False, **sizes}
        if card.has_descriptors:
            yield {"variant": "descriptor", "specialize": False, **sizes}
            if card.arch == "sm_90" and part in ("forward", "backward_keys") and warps == 4:
                yield {"variant": "descriptor", "specialize": True, **sizes}


def nf4_candidates(card: Card, part: str, bucket: Config) -> Iterator[Config]:
    """For one row the shuffle kernel (tiles of 4 blocks divide nearly every width, of 8 fewer), for more the tensor
    cores, and from 16 rows on the library, so that what is measured decides where it takes over."""
    if part == "dequantize":
        yield from ({"words": words, "warps": warps} for words in (128, 256, 512, 1024) for warps in (2, 4, 8))
        return
    rows = bucket.get("rows", 1 << 30)
    if rows <= 4:
        for (n, blocks, warps), stages in product(
            ((16, 4, 2), (32, 4, 2), (32, 4, 4), (64, 4, 8), (16, 8, 4)), (1, 3, 4)
        ):
            yield {"variant": "gemv", "block_n": n, "blocks": blocks, "warps": warps, "stages": stages}
    if rows >= 16:
        yield {"variant": "library"}
    if "rows" not in bucket:
        return
    m = min(max(16, 1 << (rows - 1).bit_length()), 256)
    for block_m, n, warps, stages in product({m, max(16, m // 2)}, (64, 128), (4, 8), (3, 4)):
        if n // warps < 16:
            continue  # loads are not asynchronous then
        sizes = {"block_m": block_m, "block_n": n, "warps": warps, "stages": stages}
        for split in (1, 2, 4, 8) if rows <= 64 else (1,):
            yield {"variant": "product", **sizes, "split_k": split, "late": rows <= 64}


CANDIDATES: dict[str, Callable[[Card, str, Config], Iterator[Config]]] = {
    "fused_mlp": mlp_candidates,
    "linear_cross_entropy": loss_candidates,
    "rms_norm": norm_candidates,
    "swiglu": swiglu_candidates,
    "flash": flash_candidates,
    "nf4_matmul": nf4_candidates,
}


def fastest(run: Run, candidates: Iterator[Config], rounds: int) -> tuple[float, Config]:
    """The least median time in seconds, and whose it is."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    fit: list[tuple[list[float], Config]] = []
    for config in candidates:
        try:
            run(config)
        except (
            triton.OutOfResources,
            triton.CompilationError,
            triton.runtime.errors.PTXASError,
            RuntimeError,
        ) as refused:
            print(f"  left out {config}: {str(refused).splitlines()[0]}")
            continue
        fit.append(([], config))
    for _ in range(rounds):
        for times, config in fit:
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(config)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
    return min(((median(times), config) for times, config in fit), key=lambda pair: pair[0])


def tune(kernel: str, card: Card, part: str, bucket: Config, rounds: int) -> Config:
    """The bucket with the best configuration for it."""
    candidates = CANDIDATES[kernel](card, part, bucket)
    seconds, best = fastest(CASES[kernel](part, bucket, "cuda"), candidates, rounds)
    bounds = {name: bound for name, bound in bucket.items() if name != "config"}
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
    parser = argparse.ArgumentParser(prog="python -m minillava.kernels.tune", description=__doc__)
    parser.add_argument("--kernel", choices=CASES, action="append")
    parser.add_argument("--rounds", type=int, default=30)
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("minillava.kernels.tune: no GPU here; run it on the card that is to be tuned")
        return 2
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
