"""RMSNorm against plain PyTorch, both against float64: never more than twice its error."""

from __future__ import annotations

import pytest
import torch
from checks import assert_no_worse, needs_compiler, needs_gpu, needs_triton

from minillava.kernels import rms_norm as module
from minillava.kernels.rms_norm import (
    plain_backward,
    plain_forward,
    reference,
    rms_norm,
    triton_backward,
    triton_forward,
)

EPS = 1e-5
FORWARD = {"numbers": 256, "warps": 4, "stages": 1}
BACKWARD = {**FORWARD, "programs": 1}
NAMES = ("y", "dx", "dweight")


@pytest.fixture(autouse=True)
def no_small_sizes(monkeypatch):
    """`rms_norm` prefers the plain code for few numbers on a CPU; here it is the operation at every size."""
    monkeypatch.setattr(module, "SMALL", -1)


def inputs(rows, width, dtype, device="cpu"):
    """x, weight and dy; the rows' sizes differ by orders of magnitude."""
    torch.manual_seed(rows)
    x = torch.randn(rows, width, device=device) * torch.logspace(-2, 2, rows, device=device)[:, None]
    weight, dy = torch.rand(width, device=device) + 0.5, torch.randn(rows, width, device=device)
    return x.to(dtype), weight.to(dtype), dy.to(dtype)


def run(function, x, weight, dy):
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    y = function(x, weight, EPS)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("rows", "width"), ((1, 4096), (7, 5120), (577, 896), (729, 128)))
def test_error(rows, width, dtype):
    tensors = inputs(rows, width, dtype)
    exact = run(reference, *(t.double() for t in tensors))
    assert_no_worse(NAMES, run(rms_norm, *tensors), run(reference, *tensors), exact)


@needs_gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize(("rows", "width"), ((1, 4096), (729, 896), (4608, 4096), (4608, 5120), (20000, 128)))
def test_error_on_gpu(rows, width, dtype):
    tensors = inputs(rows, width, dtype, "cuda")
    exact = run(reference, *(t.double() for t in tensors))
    assert_no_worse(NAMES, run(rms_norm, *tensors), run(reference, *tensors), exact)


@needs_triton
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize(("rows", "width"), ((1, 200), (700, 40), (37, 300)))
def test_triton_kernels_in_the_interpreter(rows, width, dtype):
    """Tiles of one row and of several, partial ones, and programs that take more than one."""
    x, weight, dy = inputs(rows, width, dtype)
    exact = run(reference, x.double(), weight.double(), dy.double())
    y, rstd = triton_forward(x, weight, EPS, FORWARD)
    ours = y, *triton_backward(dy, x, weight, rstd, BACKWARD)
    assert_no_worse(NAMES, ours, run(reference, x, weight, dy), exact)
    assert rstd.shape == (rows, 1) and rstd.dtype == torch.float32
    strided = [torch.stack((t, t), -1)[..., 0] for t in (x, dy)]
    assert torch.equal(triton_forward(strided[0], weight, EPS, FORWARD)[0], y)
    for a, b in zip(triton_backward(strided[1], strided[0], weight, rstd, BACKWARD), ours[1:], strict=True):
        assert torch.equal(a, b)


def test_rounds_before_the_weight():
    """The order that checkpoints were trained with: in bf16 it decides the last bit, which parity depends on."""
    x, weight, _ = inputs(300, 256, torch.bfloat16)
    y = rms_norm(x, weight, EPS)
    n = x.float() * torch.rsqrt(x.float().square().mean(1, keepdim=True) + EPS)
    late = (n * weight.float()).bfloat16()
    same = (y == n.bfloat16() * weight).float().mean()
    assert same > 0.999 > (y == late).float().mean()


def test_saves_x_the_weight_and_a_number_a_row():
    x, weight, _ = inputs(64, 512, torch.bfloat16)
    x.requires_grad_(), weight.requires_grad_()
    sizes = []
    for function in (rms_norm, reference):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.setdefault(t.data_ptr(), t), lambda t: t):
            y = function(x, weight, EPS)
        sizes.append(sum(t.nbytes for t in kept.values()))
        assert y.requires_grad
    assert sizes[0] == x.nbytes + weight.nbytes + 64 * 4 < sizes[1] / 2


def test_weight_gradient_is_deterministic():
    x, weight, dy = inputs(700, 64, torch.float32)
    assert torch.equal(run(rms_norm, x, weight, dy)[2], run(rms_norm, x, weight, dy)[2])


def test_shapes_strides_and_dtypes():
    x, weight, dy = inputs(600, 64, torch.float32)
    y, dx, dweight = run(rms_norm, x, weight, dy)
    heads = run(rms_norm, x.view(150, 4, 64), weight, dy.view(150, 4, 64))
    assert torch.equal(heads[0].flatten(0, 1), y) and torch.equal(heads[1].flatten(0, 1), dx)
    strided = torch.cat((x, x), 1)[:, 64:]
    rstd = plain_forward(strided, weight, EPS)[1]
    assert torch.equal(plain_forward(strided, weight, EPS)[0], y)
    assert torch.equal(plain_backward(dy, strided, weight, rstd)[0], dx)
    ones = torch.ones(()).expand(600, 64)
    for a, b in zip(run(rms_norm, x, weight, ones), run(reference, x, weight, ones), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    mixed = rms_norm(x.bfloat16(), weight, EPS)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, reference(x.bfloat16(), weight, EPS))
    y, dx, dweight = run(rms_norm, x[:0], weight, dy[:0])
    assert y.shape == dx.shape == (0, 64) and torch.equal(dweight, torch.zeros(64))


def test_few_numbers_on_a_cpu_take_the_plain_way(monkeypatch):
    calls = []
    monkeypatch.setattr(
        module, "_forward", lambda x, weight, eps: calls.append(len(x)) or plain_forward(x, weight, eps)
    )
    monkeypatch.setattr(module, "SMALL", 32)
    for rows in (4, 5):
        rms_norm(*inputs(rows, 8, torch.float32)[:2], EPS)
    assert calls == [5]


def test_gradcheck_and_opcheck():
    x, weight, dy = (t.requires_grad_() for t in inputs(5, 6, torch.float64))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    torch.library.opcheck(torch.ops.minillava.rms_norm.default, (x, weight, EPS))
    rstd = torch.rand(5, 1, dtype=torch.float64)
    args = (dy.detach(), x.detach(), weight.detach(), rstd)
    torch.library.opcheck(torch.ops.minillava.rms_norm_backward.default, args)


@needs_compiler
def test_compiles_in_one_graph():
    tensors = inputs(300, 64, torch.float32)
    compiled = torch.compile(rms_norm, fullgraph=True)
    for a, b in zip(run(compiled, *tensors), run(rms_norm, *tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_misshapen_input_is_refused_with_the_shapes():
    x, weight, _ = inputs(5, 8, torch.float32)
    with pytest.raises(ValueError, match=r"x \[5, 7\], weight \[8\]"):
        rms_norm(x[:, :7], weight, EPS)
