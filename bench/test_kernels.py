"""pytest bench: every kernel and its peers under pytest-benchmark, real shapes on a GPU and tiny ones on a CPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from bench import attention, nf4
from bench.cases import ELEMENTWISE, HEADS, PROJECTORS, TINY_ELEMENTWISE, TINY_HEADS, TINY_PROJECTORS, cases

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
REAL = 2 * len(PROJECTORS) + len(HEADS) + 2 * len(ELEMENTWISE) + attention.count("cuda") + nf4.count("cuda")
SKIPPED = f"{REAL} real shapes need a GPU; this is a CPU, so only tiny ones run"
TINY = (
    2 * len(TINY_PROJECTORS) + len(TINY_HEADS) + 2 * len(TINY_ELEMENTWISE) + attention.count("cpu") + nf4.count("cpu")
)
COUNT = REAL if CUDA else TINY
# The cases from here on have no products.
PRODUCTS = COUNT - attention.count(DEVICE) - nf4.count(DEVICE) - 2 * len(ELEMENTWISE if CUDA else TINY_ELEMENTWISE)
PAIRS = [(number, peer) for number in range(COUNT) for peer in ("ours", "eager", "products only")]


@pytest.mark.skipif(not CUDA, reason=SKIPPED)
def test_real_shapes():
    """Carries the line that says what a CPU leaves out; on a GPU the rows below are the real shapes."""


@pytest.mark.parametrize(("number", "peer"), [p for p in PAIRS if p[0] < PRODUCTS or p[1] != "products only"])
def test_kernel(benchmark, number, peer):
    case = next(itertools.islice(cases(DEVICE, torch.bfloat16, not CUDA, compiled=False), number, None))
    function = case.functions[peer]
    benchmark.group = f"{case.kernel} {case.label} {case.shape} {case.direction}"
    benchmark.extra_info.update(flops=case.flops, bytes=case.bytes, device=DEVICE)

    def call() -> None:
        function()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=20 if CUDA else 3, warmup_rounds=2)
