"""The product with 4-bit weights against float64 with the exact dequantised weights: at most twice PyTorch's error.

An output's error is taken in units of |x| |w|, the lengths of its row of x and of W, which is what rounding is
proportional to, and of all outputs together (root mean square): large outputs do not hide small ones. Small cases are
drawn several times: where one block has one scale and 16 values, how well they round to 16 bits is luck.
"""

from __future__ import annotations

import itertools
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from checks import apart, needs_compiler, needs_gpu, needs_triton

from minillava.kernels import nf4_dequantize
from minillava.kernels import nf4_matmul as module
from minillava.kernels.cpu import library as cpu
from minillava.kernels.nf4_dequantize import BLOCKSIZES, CODES, plain_dequantize, triton_dequantize
from minillava.kernels.nf4_matmul import nf4_matmul, triton_forward
from minillava.layers.quantize import quantize

GEMV = {"variant": "gemv", "block_n": 8, "blocks": 4, "warps": 2}
PRODUCTS = [
    {"variant": "product", "block_m": 16, "block_n": 32, "split_k": split, "warps": 4, "stages": 3} for split in (1, 3)
]


def inputs(M, N, K, dtype, quant_type="nf4", blocksize=64, double=False, device="cpu", seed=0):
    """x, the weight's parts, bias; rows of x and of W differ by orders of magnitude, as far as fp16 holds y."""
    torch.manual_seed(M + N + 1000 * seed)
    x = torch.randn(M, K, device=device) * torch.logspace(-2, 0.5, M, device=device)[:, None]
    w = torch.randn(N, K, device=device) * torch.logspace(-2, 1, N, device=device)[:, None]
    parts = quantize(w, quant_type, blocksize, double)
    exact = plain_dequantize(*parts, N, K, quant_type, blocksize, torch.float64)
    return x.to(dtype), parts, torch.randn(N, device=device).to(dtype), exact


def assert_no_worse(*cases):
    """(got, x, bias, exact W): against x W^T + bias in float64 no more than twice as far off as PyTorch with W in x's
    dtype."""
    ours = plain = 0.0
    for got, x, bias, exact in cases:
        want = F.linear(x.double(), exact, None if bias is None else bias.double())
        assert got.shape == want.shape and got.dtype == x.dtype
        unit = (x.double().norm(dim=1)[:, None] * exact.norm(dim=1)).clamp_min(1e-30)  # a small row may be all zeros
        ours += ((got.double() - want) / unit).square().mean().item()
        plain += ((F.linear(x, exact.to(x.dtype), bias).double() - want) / unit).square().mean().item()
    ours, plain = ((total / len(cases)) ** 0.5 for total in (ours, plain))
    assert ours <= 2 * plain, f"{ours:.2e} against {plain:.2e}"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize(
    ("M", "N", "K", "quant_type", "blocksize", "double"),
    (
        (1, 896, 896, "nf4", 64, True),
        (5, 300, 4304, "nf4", 64, False),  # SigLIP: a row ends in a quarter of a block
        (3, 64, 136, "fp4", 4096, False),
        (2, 33, 9, "fp4", 32, True),  # rows that begin in the middle of a byte
        (40, 1100, 1024, "nf4", 128, True),
    ),
)
def test_error(M, N, K, quant_type, blocksize, double, dtype):
    x, parts, bias, exact = inputs(M, N, K, dtype, quant_type, blocksize, double)
    for b in (bias, None):
        assert_no_worse((nf4_matmul(x, *parts, b, N, quant_type, blocksize), x, b, exact))
    x.requires_grad_()
    dy = torch.randn(M, N).to(dtype)
    y = nf4_matmul(x, *parts, bias.requires_grad_(), N, quant_type, blocksize)
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    assert_no_worse((dx, dy, None, exact.T))
    assert torch.equal(dbias, dy.sum(0))


@pytest.mark.parametrize(
    ("M", "N", "K", "quant_type", "blocksize", "double"),
    (
        (1, 40, 4096, "nf4", 64, True),
        (7, 301, 4320, "nf4", 64, False),  # a row ends in half a block; outputs that are no whole fours
        (3, 67, 160, "fp4", 4096, False),
        (2, 1030, 32, "fp4", 32, True),  # five groups of nested scales
        (33, 1104, 4096, "nf4", 128, True),  # three blocks of AMX tiles, or several buffers of values
        (70, 40, 96, "nf4", 64, False),
        (1, 37, 320, "nf4", 64, True),  # a row ends in half a group of 128 inputs
        (4, 64, 160, "fp4", 32, False),
        (20, 32, 320, "fp4", 64, False),
        (9, 48, 256, "nf4", 2048, True),  # several rows in a block
    ),
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_c_code(c_code, monkeypatch, M, N, K, quant_type, blocksize, double, dtype):
    """The same values to the bit, the product no further off than allowed, nothing left to the plain code."""
    x, parts, bias, exact = inputs(M, N, K, dtype, quant_type, blocksize, double)
    values = plain_dequantize(*parts, N, K, quant_type, blocksize, dtype)
    for file in (nf4_dequantize, module):
        monkeypatch.setattr(file, "pieces", None)
    assert torch.equal(module.dequantize(*parts, N, K, quant_type, blocksize, dtype), values)
    for b in (bias, None):
        assert_no_worse((nf4_matmul(x, *parts, b, N, quant_type, blocksize), x, b, exact))
        assert_no_worse((nf4_matmul(apart(x), *parts, b, N, quant_type, blocksize), x, b, exact))


def test_without_a_compiler_a_line_says_so_and_the_values_are_the_same(monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert cpu.built_for.__wrapped__("avx2") is None
    assert "no C compiler (gcc)" in caplog.text and len(caplog.records) == 1
    monkeypatch.setattr(cpu, "chosen_class", lambda: None)
    assert cpu.library.__wrapped__() is None and len(caplog.records) == 1  # nothing that could be done
    x, parts, bias, exact = inputs(3, 40, 128, torch.bfloat16)
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert_no_worse((nf4_matmul(x, *parts, bias, 40, "nf4", 64), x, bias, exact))


def drawn(seed):
    """Rows, outputs, inputs and a variant at random, of those that the kernels take."""
    dice = random.Random(seed)
    sizes = dice.randint(1, 12), dice.randint(1, 32), 64 * dice.randint(1, 4)
    return *sizes, dice.choice([*CODES]), dice.choice(BLOCKSIZES[1:]), dice.choice((False, True))


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [
    (1, 32, 256, "nf4", 64, False),  # whole tiles: no masks
    (2, 33, 128, "fp4", 128, True),
    (16, 33, 64, "nf4", 64, False),
    (1, 272, 64, "nf4", 64, True),  # more than 256 blocks: two groups of nested scales
]
CASES = [*itertools.product(SIZES, DTYPES), *((drawn(seed), DTYPES[seed % 3]) for seed in range(6))]


@needs_triton
@pytest.mark.parametrize(("sizes", "dtype"), CASES)
def test_triton_kernels_in_the_interpreter(monkeypatch, sizes, dtype):
    """One row's kernel in all types, the tensor cores' in theirs, whatever the number of rows."""
    M, N, K, quant_type, blocksize, double = sizes
    seeds = 4 if 8 * blocksize >= N * K else 1
    drawn = [inputs(M, N, K, dtype, quant_type, blocksize, double, seed=seed) for seed in range(seeds)]
    monkeypatch.setattr(module, "dequantize", None)
    for config in (GEMV, *PRODUCTS) if dtype in module.TYPES["product"] else (GEMV,):
        for biased in (True, False) if config in (GEMV, PRODUCTS[0]) else (True,):
            cases = [(x, parts, bias if biased else None, exact) for x, parts, bias, exact in drawn]
            ys = [triton_forward(x, *parts, b, N, quant_type, blocksize, config) for x, parts, b, _ in cases]
            assert_no_worse(*((y, x, b, exact) for y, (x, _, b, exact) in zip(ys, cases, strict=True)))
    x, parts, b, _ = cases[-1]
    strided = map(apart, (x, *parts, b))
    assert torch.equal(triton_forward(*strided, N, quant_type, blocksize, config), ys[-1])


@needs_triton
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_100"))
def test_compiled_code_thread_by_thread(monkeypatch, arch, dtype):
    """The codes come through shuffles between the lanes of a warp, which the interpreter knows nothing of."""
    import ptx

    for file in (nf4_dequantize, module):
        monkeypatch.setattr(file, "launch", ptx.launch(arch))
    for M, N, K, quant_type, blocksize, double in (
        (2, 33, 192, "fp4", 128, True),
        (1, 16, 512, "nf4", 64, False),
        (1, 16, 704, "nf4", 64, True),  # eleven blocks: the last step of a row is partial
    ):
        x, parts, bias, exact = inputs(M, N, K, dtype, quant_type, blocksize, double)
        assert_no_worse((triton_forward(x, *parts, bias, N, quant_type, blocksize, GEMV), x, bias, exact))
        if dtype != torch.float32:  # fp32 changes places through ldmatrix
            values = triton_dequantize(*parts, N, K, quant_type, blocksize, dtype)
            assert torch.equal(values, plain_dequantize(*parts, N, K, quant_type, blocksize, dtype))


@needs_triton
@pytest.mark.parametrize("double", (False, True))
@pytest.mark.parametrize("quant_type", CODES)
def test_triton_dequantises_to_the_bit(quant_type, double):
    for N, K, blocksize in ((40, 72, 64), (33, 64, 32), (8, 512, 4096), (4, 4304, 64)):
        _, parts, _, _ = inputs(1, N, K, torch.float32, quant_type, blocksize, double)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            got = triton_dequantize(*parts, N, K, quant_type, blocksize, dtype)
            want = plain_dequantize(*parts, N, K, quant_type, blocksize, dtype)
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@needs_triton
def test_what_the_kernels_do_not_take_goes_to_the_library(monkeypatch):
    monkeypatch.setattr(module, "launch", None)
    cases = [(2, 33, 72, 64, GEMV, torch.float16), (3, 32, 96, 32, GEMV, torch.float16), (3, 4, 4304, 64, GEMV, None)]
    cases += [
        (0, 8, 64, 64, GEMV, torch.float16),
        (2, 16, 64, 64, PRODUCTS[0], None),
        (1, 8, 64, 64, GEMV, torch.float64),
    ]
    for M, N, K, blocksize, config, dtype in cases:
        x, parts, bias, exact = inputs(M, N, K, dtype or torch.float32, "nf4", blocksize)
        y = triton_forward(x, *parts, bias, N, "nf4", blocksize, config)
        torch.testing.assert_close(y, F.linear(x, exact.to(x.dtype), bias))


@needs_gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("double", (False, True))
@pytest.mark.parametrize(("N", "K"), ((4096, 11008), (12288, 4096), (4608, 3584), (1152, 4304), (896, 896)))
def test_error_on_gpu(N, K, double, dtype):
    """Every configuration that is shipped for this card, at the rows that it is for."""
    for M in (1, 2, 16, 17, 64, 512, 1000):
        x, parts, bias, exact = inputs(M, N, K, dtype, "nf4", 64, double, "cuda")
        y = nf4_matmul(x, *parts, bias, N, "nf4", 64)
        assert_no_worse((y, x, bias, exact))
    cpu = plain_dequantize(*(None if p is None else p.cpu() for p in parts), N, K, "nf4", 64, dtype)
    got = triton_dequantize(*parts, N, K, "nf4", 64, dtype).cpu()
    assert torch.equal(got, cpu)


def test_opcheck_and_gradcheck():
    for double in (False, True):
        x, parts, bias, _ = inputs(3, 5, 64, torch.float64, double=double)
        x.requires_grad_(), bias.requires_grad_()
        arguments = (x, *parts, bias, 5, "nf4", 64)
        torch.library.opcheck(torch.ops.minillava.nf4_matmul.default, arguments)
        assert torch.autograd.gradcheck(lambda x, b, p=parts: nf4_matmul(x, *p, b, 5, "nf4", 64), (x, bias))
        torch.library.opcheck(torch.ops.minillava.nf4_dequantize.default, (*parts, 5, 64, "nf4", 64, torch.float32))
        dy = torch.randn(3, 5)
        torch.library.opcheck(torch.ops.minillava.nf4_matmul_backward.default, (dy, *parts, 64, "nf4", 64))


@needs_compiler
def test_compiles_in_one_graph():
    _, parts, bias, _ = inputs(3, 5, 64, torch.float32)
    compiled = torch.compile(nf4_matmul, fullgraph=True)
    for rows in (3, 4):
        xs = torch.randn(rows, 64, requires_grad=True)
        y, z = (f(xs, *parts, bias, 5, "nf4", 64) for f in (compiled, nf4_matmul))
        torch.testing.assert_close(y, z)
        torch.testing.assert_close(*(torch.autograd.grad(t.sum(), xs) for t in (y, z)))


def test_what_does_not_fit_is_refused_with_the_shapes():
    x, parts, bias, _ = inputs(2, 6, 64, torch.float32, double=True)
    packed, absmax, nested, dynamic = parts
    cases = [
        ((x[:, :60], *parts, bias, 6, "nf4", 64), r"weight \[6, 60\].*packed \[192\], absmax \[6\]"),
        ((x, *parts, bias, 6, "nf3", 64), "no quantisation 'nf3'"),
        ((x, *parts, bias, 6, "nf4", 96), "blocks of 96"),
        ((x, packed, absmax, None, None, bias, 6, "nf4", 64), "parts do not make"),
        ((x, packed, absmax.float(), nested, dynamic, bias, 6, "nf4", 64), "parts do not make"),
        ((x, packed, absmax, nested.half(), dynamic, bias, 6, "nf4", 64), "scales in float32: .* torch.float16"),
        ((x, packed, absmax, nested, dynamic.double(), bias, 6, "nf4", 64), "scales in float32: .* torch.float64"),
        ((x, *parts, bias[:5], 6, "nf4", 64), r"bias \[6\]"),
        ((x, *parts, bias.double(), 6, "nf4", 64), "float64"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            nf4_matmul(*arguments)
