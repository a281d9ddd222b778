"""pytest bench: every kernel and its peers under pytest-benchmark, real shapes on a GPU and tiny ones on a CPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from bench.cases import HEADS, PROJECTORS, TINY_HEADS, TINY_PROJECTORS, cases

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SKIPPED = f"{2 * len(PROJECTORS) + len(HEADS)} real shapes need a GPU; this is a CPU, so only tiny ones run"
COUNT = 2 * len(PROJECTORS) + len(HEADS) if CUDA else 2 * len(TINY_PROJECTORS) + len(TINY_HEADS)


@pytest.mark.skipif(not CUDA, reason=SKIPPED)
def test_real_shapes():
    """Carries the line that says what a CPU leaves out; on a GPU the rows below are the real shapes."""


@pytest.mark.parametrize("peer", ("ours", "eager", "products only"))
@pytest.mark.parametrize("number", range(COUNT))
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
