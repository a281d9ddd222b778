"""A decode step's linear layers against float64: never more than twice as far off as the same steps one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import apart, error, needs_gpu, needs_triton

from minillava.kernels import decode_linear as module
from minillava.kernels import nf4_matmul
from minillava.kernels.decode_linear import decode_linear, nf4_decode_linear, reference, triton_dense, triton_nf4
from minillava.kernels.nf4_dequantize import plain_dequantize
from minillava.layers.quantize import quantize

ROW = {"variant": "row", "block_n": 4, "block_k": 64, "warps": 4}
ROWS = {"variant": "rows", "block_m": 16, "block_n": 16, "block_k": 64, "warps": 2, "stages": 3}
GEMV = {"variant": "gemv", "block_n": 8, "blocks": 2, "warps": 1}
PRODUCT = {"variant": "product", "block_m": 16, "block_n": 64, "split_k": 2, "warps": 4, "stages": 3}
# rows, outputs, inputs, what is around the product: whole tiles, partial ones, inputs that are no whole steps
CASES = [
    (1, 32, 128, {"norm", "bias"}),
    (1, 44, 192, {"norm", "gated"}),
    (3, 40, 320, {"residual"}),
    (2, 22, 64, {"norm", "gated", "residual", "bias"}),
]


def inputs(M, N, K, around, dtype, device="cpu"):
    """x, weight and what is around them, from float64."""
    torch.manual_seed(N)
    sizes = {"bias": (N,), "norm": (K,), "residual": (M, N // 2 if "gated" in around else N)}
    x, weight = torch.randn(M, K) * 3, torch.randn(N, K) / K**0.5
    rest = {name: torch.randn(size) if name in around else None for name, size in sizes.items()}
    tensors = [None if t is None else t.to(device, dtype) for t in (x, weight, *rest.values())]
    return tensors, "gated" in around


def formula(x, weight, bias, norm, residual, gated):
    """In float64."""
    x, weight, bias, norm, residual = (None if t is None else t.double() for t in (x, weight, bias, norm, residual))
    x = x if norm is None else x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm
    y = F.linear(x, weight, bias)
    y = F.silu(y[:, : y.shape[1] // 2]) * y[:, y.shape[1] // 2 :] if gated else y
    return y if residual is None else residual + y


def quantized(weight, double=True):
    parts = quantize(weight.float().cpu(), "nf4", 64, double)
    return [None if t is None else t.to(weight.device) for t in parts]


def check(run, M, N, K, around, dtype, device="cpu", double=None):
    (x, weight, bias, norm, residual), gated = inputs(M, N, K, around, dtype, device)
    parts = () if double is None else quantized(weight, double)
    if parts:
        weight = plain_dequantize(*parts, N, K, "nf4", 64, torch.float32)
    exact = formula(x, weight, bias, norm, residual, gated)
    peer = reference(x, weight.to(dtype), bias, norm, 1e-5, gated, residual)
    rest = bias, norm, 1e-5, gated, residual
    y = run(x, *parts, *rest, N, "nf4", 64) if parts else run(x, weight, *rest)
    assert y.shape == exact.shape and y.dtype == dtype
    off, bound = error(y, exact), 2 * error(peer, exact)
    assert off <= bound, (off, bound)
    return off, bound


@needs_triton
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize(("M", "N", "K", "around"), CASES)
def test_triton_kernels_in_the_interpreter(M, N, K, around, dtype):
    for config in (ROW,) if dtype == torch.float32 else (ROW, ROWS):
        check(lambda *a, c=config: triton_dense(*a, c), M, N, K, around, dtype)
    for config in (GEMV,) if dtype == torch.float32 else (GEMV, PRODUCT):
        for double in (False, True):
            check(lambda *a, c=config: triton_nf4(*a, c), M, N, K, around, dtype, double=double)


@needs_triton
def test_what_is_around_the_product_may_have_any_strides():
    (x, weight, *rest), gated = inputs(2, 44, 128, {"norm", "gated", "residual", "bias"}, torch.float16)
    parts = quantized(weight)
    for run, given, configs in (
        (triton_dense, (x, weight), (ROW, ROWS)),
        (lambda *a: triton_nf4(*a[:-1], 44, "nf4", 64, a[-1]), (x, *parts), (GEMV, PRODUCT)),
    ):
        for config in configs:
            bias, norm, residual = map(apart, rest)
            y = run(*given, bias, norm, 1e-5, gated, residual, config)
            bias, norm, residual = rest
            assert torch.equal(y, run(*given, bias, norm, 1e-5, gated, residual, config))


@needs_triton
@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
def test_compiled_code_thread_by_thread(monkeypatch, arch):
    import ptx

    for file in (module, nf4_matmul):
        monkeypatch.setattr(file, "launch", ptx.launch(arch))
    for M, N, K, around in CASES:
        for config in (ROW, ROWS):
            check(lambda *a, c=config: triton_dense(*a, c), M, N, K, around, torch.bfloat16)
        for config in (GEMV, PRODUCT):
            check(lambda *a, c=config: triton_nf4(*a, c), M, N, K, around, torch.bfloat16, double=True)


@needs_gpu
@pytest.mark.parametrize("M", (1, 2, 8, 16, 17))
def test_error_on_gpu(M):
    """The layers of a 7B decoder."""
    for N, K, around in (
        (12288, 4096, {"norm", "bias"}),
        (4096, 4096, {"residual"}),
        (22016, 4096, {"norm", "gated"}),
        (4096, 11008, {"residual"}),
    ):
        check(triton_dense, M, N, K, around, torch.bfloat16, "cuda")
        check(triton_nf4, M, N, K, around, torch.bfloat16, "cuda", double=True)


def test_the_operations_on_a_cpu_and_opcheck():
    for M, N, K, around in CASES:
        (x, weight, bias, norm, residual), gated = inputs(M, N, K, around, torch.float32)
        exact = formula(x, weight, bias, norm, residual, gated).float()
        torch.testing.assert_close(decode_linear(x, weight, bias, norm, 1e-5, gated, residual), exact)
        args = x, weight, bias, norm, 1e-5, gated, residual
        torch.library.opcheck(torch.ops.minillava.decode_linear.default, args)
        parts = quantized(weight)
        values = plain_dequantize(*parts, N, K, "nf4", 64, torch.float32)
        y = nf4_decode_linear(x, *parts, bias, N, "nf4", 64, norm, 1e-5, gated, residual)
        torch.testing.assert_close(y, formula(x, values, bias, norm, residual, gated).float())
        args = x, *parts, bias, norm, 1e-5, gated, residual, N, "nf4", 64
        torch.library.opcheck(torch.ops.minillava.nf4_decode_linear.default, args)


def test_what_does_not_fit_is_refused():
    (x, weight, bias, norm, residual), _ = inputs(2, 8, 16, {"norm", "bias", "residual"}, torch.float32)
    for args in ((x, weight, bias[:7]), (x, weight, bias, norm[:9]), (x, weight, None, None, 0.0, True, residual)):
        with pytest.raises(ValueError, match=r"a weight \[8, 16\]"):
            decode_linear(*args)
