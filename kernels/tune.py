"""python -m minillava.kernels.tune: find this card's best configurations and write them to tuned/<kernel>.json.

Every bucket that the card's architecture ships is timed at its largest real shape: candidates one after another in each
round, a cold L2 cache, medians. A candidate that does not compile or fit is named and left out. What is written is
compiled by the tests like everything shipped: a spill fails them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import triton

from minillava.kernels import (
    configs,
    decode_attention,
    flash,
    flash_backward,
    fused_mlp,
    linear_cross_entropy,
    nf4_dequantize,
    nf4_matmul,
    rms_norm,
    swiglu,
)
from minillava.kernels.frame import Card, card_of

SHAPE = 1024, 4096, 4096  # K, H, O of LLaVA-1.5 7B
ROWS = {64: 64, 3_000_000: 576, 20_000_000: 4608}  # a bucket's bound -> the rows that it is timed at
LARGEST_ROWS = 9216
TOKENS = 4608  # rows of what goes by rows
VOCABULARY = 32000


def mlp_candidates(card: Card, part: str, few_rows: bool) -> Iterator[dict[str, Any]]:
    """Configurations worth timing; what the compiler cannot take is dropped when it says so."""
    blocks = ((16, 64, 128), (16, 128, 64), (32, 64, 64)) if few_rows else ((64, 64, 64), (64, 128, 64), (128, 128, 32))
    shares = (1, 2, 4, 8) if few_rows and part == "forward" else (1,)
    for (m, n, k), split, warps, stages in itertools.product(blocks, shares, (4, 8), (3, 4)):
        sizes = {"block_m": m, "block_n": n, "block_k": k, "group": 8}
        yield {"variant": "pointer", **sizes, "split_k": split, "warps": warps, "stages": stages}
    if few_rows or not card.has_descriptors:
        return
    for (m, n), stages, group in itertools.product(((128, 128), (128, 256)), (3, 4), (4, 8, 16)):
        sizes = {"block_m": m, "block_n": n, "block_k": 64, "group": group}
        yield {"variant": "descriptor", **sizes, "parts": 2, "specialize": False, "warps": 8, "stages": stages}
        if card.arch == "sm_90" and part == "forward":
            yield {"variant": "descriptor", **sizes, "parts": 1, "specialize": True, "warps": 4, "stages": stages}


def loss_candidates(width: int) -> Iterator[dict[str, Any]]:
    for warps in (4, 8, 16, 32):
        yield {"one_pass": True, "warps": warps, "stages": 2}
        for block in (2048, 4096, 8192, 16384):
            yield {"one_pass": False, "block": block, "warps": warps, "stages": 2}


def fastest(run: Callable[[dict], Any], candidates: list[dict], rounds: int) -> tuple[dict, list[tuple[float, dict]]]:
    """The candidate of least median time, and all (seconds, candidate) in order."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    fit = []
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
        fit.append(config)
    seconds: list[list[float]] = [[] for _ in fit]
    for _ in range(rounds):
        for config, times in zip(fit, seconds):
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(config)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
    ranked = sorted(((median(times), config) for config, times in zip(fit, seconds)), key=lambda pair: pair[0])
    return ranked[0][1], ranked


def tune_mlp(card: Card, part: str, bucket: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The bucket with the best configuration for it."""
    rows = ROWS.get(bucket.get("rows", bucket.get("outputs", 0)), LARGEST_ROWS)
    K, H, O = SHAPE
    x, w1, w2 = (torch.randn(s, device="cuda").mul(s[1] ** -0.5).bfloat16() for s in ((rows, K), (H, K), (O, H)))
    b1, pre, dy = (torch.randn(s, device="cuda").bfloat16() for s in ((H,), (rows, H), (rows, O)))
    act, dpre, none = torch.empty_like(pre), torch.empty_like(pre), None

    def run(config: dict) -> None:
        if part == "forward":
            fused_mlp._product(x, w1, b1, pre, act, act, none, "gelu", False, True, config)
            return
        sums = torch.empty(-(-rows // config["block_m"]), H, device="cuda")
        fused_mlp._product(dy, w2, none, pre, act, dpre, sums, "gelu", True, False, config)

    best, ranked = fastest(run, list(mlp_candidates(card, part, "rows" in bucket)), rounds)
    print(f"fused_mlp {part} {rows} rows: {ranked[0][0] * 1e6:.1f} us {best}")
    return {**bucket, "config": best}


def tune_loss(card: Card, part: str, bucket: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The bucket with the best configuration for it."""
    width = bucket.get("width", VOCABULARY)
    logits = torch.randn(4096, width, device="cuda").bfloat16()
    targets = torch.randint(0, width, (4096,), device="cuda")
    candidates = [c for c in loss_candidates(width) if width <= 65536 or not c["one_pass"]]
    best, ranked = fastest(
        lambda c: linear_cross_entropy.triton_loss(logits, targets, -100, True, c), candidates, rounds
    )
    print(f"linear_cross_entropy {width} wide: {ranked[0][0] * 1e6:.1f} us {best}")
    if best["one_pass"] and "width" not in bucket:
        best = next(config for _, config in ranked if not config["one_pass"])  # the open bucket holds any width
    return {**bucket, "config": best}


def tune_norm(card: Card, part: str, bucket: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The bucket with the best configuration for it."""
    width = bucket.get("width", rms_norm.WIDEST)
    x, dy = (torch.randn(TOKENS, width, device="cuda").bfloat16() for _ in range(2))
    weight, rstd = torch.ones(width, device="cuda").bfloat16(), torch.rand(TOKENS, 1, device="cuda")
    sizes = itertools.product((2048, 4096, 8192, 16384), (4, 8, 16), (1,) if part == "forward" else (1, 2, 4))
    candidates = [
        {"numbers": numbers, "warps": warps, "stages": 1} | ({} if part == "forward" else {"programs": programs})
        for numbers, warps, programs in sizes
        if numbers >= width or numbers == 16384
    ]

    def run(config: dict) -> None:
        if part == "forward":
            rms_norm.triton_forward(x, weight, 1e-5, config)
        else:
            rms_norm.triton_backward(dy, x, weight, rstd, config)

    best, ranked = fastest(run, candidates, rounds)
    print(f"rms_norm {part} {width} wide: {ranked[0][0] * 1e6:.1f} us {best}")
    return {**bucket, "config": best}


def tune_swiglu(card: Card, part: str, bucket: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The bucket with the best configuration for it."""
    dy, gate, up = (torch.randn(TOKENS, 11008, device="cuda").bfloat16() for _ in range(3))
    blocks = itertools.product((512, 1024, 2048, 4096, 8192), (4, 8, 16))
    candidates = [{"block": block, "warps": warps, "stages": 1} for block, warps in blocks]

    def run(config: dict) -> None:
        if part == "forward":
            swiglu.triton_forward(gate, up, config)
        else:
            swiglu.triton_backward(dy, gate, up, config)

    best, ranked = fastest(run, candidates, rounds)
    print(f"swiglu {part}: {ranked[0][0] * 1e6:.1f} us {best}")
    return {**bucket, "config": best}


def flash_candidates(card: Card, part: str) -> Iterator[dict[str, Any]]:
    if part == "decode":
        for block, warps, stages, programs in itertools.product((32, 64, 128), (4, 8), (2, 3, 4), (2, 4, 8)):
            yield {"block_n": block, "programs": programs, "warps": warps, "stages": stages}
        return
    blocks = list(itertools.product((32, 64, 128), repeat=2))
    for (m, n), warps, stages in itertools.product(blocks, (4, 8), (2, 3)):
        sizes = {"block_m": m, "block_n": n, "warps": warps, "stages": stages}
        yield {"variant": "pointer", "specialize": False, **sizes}
        if card.has_descriptors:
            yield {"variant": "descriptor", "specialize": False, **sizes}
            if card.arch == "sm_90" and part in ("forward", "backward_keys") and warps == 4:
                yield {"variant": "descriptor", "specialize": True, **sizes}


def tune_flash(card: Card, part: str, bucket: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The bucket with the best configuration for it: 8192 tokens of a 7B decoder, causal."""
    K, T, H = bucket.get("width", 256), 8192, 32
    q, k, v, do = (torch.randn(T, H, K, device="cuda").bfloat16() for _ in range(4))
    rest: tuple = ((0, T // 2, T), (0, T // 2, T), (), True, 0, K**-0.5)
    if part == "decode":
        cache, lengths = k.view(1, T, H, K), torch.full((1,), T, device="cuda")

        def run(config: dict) -> Any:
            return decode_attention.triton_decode(q[:1], cache, cache, lengths, K**-0.5, 0, False, config)
    elif part == "forward":

        def run(config: dict) -> Any:
            return flash.forward(q, k, v, *rest, config)
    else:
        o, lse = flash.forward(q, k, v, *rest)

        def run(config: dict) -> Any:
            return flash_backward.backward(do, q, k, v, o, lse, *rest, {part: config})

    best, ranked = fastest(run, list(flash_candidates(card, part)), rounds)
    print(f"flash {part} {K} wide: {ranked[0][0] * 1e6:.1f} us {best}")
    return {**bucket, "config": best}


def nf4_candidates(rows: int) -> Iterator[dict[str, Any]]:
    """For one row the shuffle kernel (tiles of 4 blocks divide nearly every width, of 8 fewer), for more the tensor
    cores, and from 16 rows on the library, so that what is measured decides where it takes over."""
    if rows <= 4:
        for (n, blocks, warps), stages in itertools.product(
            ((16, 4, 2), (32, 4, 4), (64, 4, 8), (16, 8, 4)), (1, 3, 4)
        ):
            yield {"variant": "gemv", "block_n": n, "blocks": blocks, "warps": warps, "stages": stages}
    m = min(max(16, 1 << (rows - 1).bit_length()), 256)
    for block_m, n, warps, stages in itertools.product({m, max(16, m // 2)}, (64, 128), (4, 8), (3, 4)):
        if n // warps < 16:
            continue  # loads are not asynchronous then
        sizes = {"block_m": block_m, "block_n": n, "warps": warps, "stages": stages}
        for split in (1, 2, 4, 8) if rows <= 64 else (1,):
            yield {"variant": "product", **sizes, "split_k": split, "late": rows <= 64}
    if rows >= 16:
        yield {"variant": "library"}


def tune_nf4(card: Card, part: str, bucket: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The bucket with the best configuration for it, on layers of a 7B decoder; rotated, as the cache is cold."""
    rows, N = min(bucket.get("rows", 4096), 4096), 4096 if "width" in bucket else 22016
    K = 11008 if N == 4096 else 4096
    x = torch.randn(rows, K, device="cuda").bfloat16()
    packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device="cuda")
    weight = packed, torch.rand(N * K // 64, device="cuda"), None, None
    if part == "dequantize":
        candidates: list[dict[str, Any]] = [
            {"words": words, "warps": warps} for words in (128, 256, 512, 1024) for warps in (2, 4, 8)
        ]

        def run(config: dict) -> Any:
            return nf4_dequantize.triton_dequantize(*weight, N, K, "nf4", 64, torch.bfloat16, config)
    else:
        candidates = list(nf4_candidates(rows)) if "rows" in bucket else [{"variant": "library"}]

        def run(config: dict) -> Any:
            return nf4_matmul.triton_forward(x, *weight, None, N, "nf4", 64, config)

    best, ranked = fastest(run, candidates, rounds)
    print(f"nf4_matmul {part} {rows} x {N}-{K}: {ranked[0][0] * 1e6:.1f} us {best}")
    return {**bucket, "config": best}


TUNERS: dict[str, Callable[[Card, str, dict[str, Any], int], dict[str, Any]]] = {
    "fused_mlp": tune_mlp,
    "linear_cross_entropy": tune_loss,
    "rms_norm": tune_norm,
    "swiglu": tune_swiglu,
    "flash": tune_flash,
    "nf4_matmul": tune_nf4,
}


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
    parser.add_argument("--kernel", choices=TUNERS, action="append")
    parser.add_argument("--rounds", type=int, default=30)
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("minillava.kernels.tune: no GPU here; run it on the card that is to be tuned")
        return 2
    card = card_of(torch.empty(1, device="cuda"))
    for kernel in chosen.kernel or TUNERS:
        table = configs.table(kernel)
        for part, cards in table.items():
            buckets = cards[configs.entry(cards, card)]
            cards[card.name] = [TUNERS[kernel](card, part, bucket, chosen.rounds) for bucket in buckets]
        write(kernel, table)
        print(f"wrote {configs.FOLDER / kernel}.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
