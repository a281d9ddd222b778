"""SwiGLU against plain PyTorch, both against float64: never more than twice its error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import assert_no_worse, needs_compiler, needs_gpu, needs_triton

from minillava.kernels import swiglu as module
from minillava.kernels.swiglu import plain_backward, plain_forward, reference, swiglu, triton_backward, triton_forward

CONFIG = {"block": 256, "warps": 4, "stages": 1}
NAMES = ("y", "dgate", "dup")


def inputs(rows, width, dtype, device="cpu"):
    """gate, up and dy; the gates reach far to both sides."""
    torch.manual_seed(rows)
    gate, up, dy = (torch.randn(rows, width, device=device) for _ in range(3))
    return (gate * 4).to(dtype), up.to(dtype), dy.to(dtype)


def run(function, gate, up, dy):
    gate, up = gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
    y = function(gate, up)
    return y.detach(), *torch.autograd.grad(y, (gate, up), dy)


def registered(gate, up):
    """The operation itself: `swiglu` prefers the plain code on a CPU."""
    return torch.ops.minillava.swiglu(gate, up)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("function", (swiglu, registered))
@pytest.mark.parametrize(("rows", "width"), ((1, 11008), (7, 4864), (577, 96)))
def test_error(rows, width, function, dtype):
    tensors = inputs(rows, width, dtype)
    exact = run(reference, *(t.double() for t in tensors))
    assert_no_worse(NAMES, run(function, *tensors), run(reference, *tensors), exact)


@needs_gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize(("rows", "width"), ((1, 11008), (729, 4864), (4608, 11008), (4608, 13824)))
def test_error_on_gpu(rows, width, dtype):
    tensors = inputs(rows, width, dtype, "cuda")
    exact = run(reference, *(t.double() for t in tensors))
    assert_no_worse(NAMES, run(swiglu, *tensors), run(reference, *tensors), exact)


@needs_triton
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("rows", (1, 37))
def test_triton_kernels_in_the_interpreter(rows, dtype):
    gate, up, dy = inputs(rows, 104, dtype)
    exact = run(reference, gate.double(), up.double(), dy.double())
    ours = triton_forward(gate, up, CONFIG), *triton_backward(dy, gate, up, CONFIG)
    assert_no_worse(NAMES, ours, run(reference, gate, up, dy), exact)
    strided = [torch.stack((t, t), -1)[..., 0] for t in (gate, up, dy)]
    assert torch.equal(triton_forward(*strided[:2], CONFIG), ours[0])
    assert torch.equal(triton_backward(strided[2], *strided[:2], CONFIG)[0], ours[1])


@needs_triton
def test_extreme_gates_in_the_interpreter():
    gate = torch.tensor([0.0, -0.0, 1e-8, 80.0, -80.0, 1e4, -1e4])
    one = torch.ones(7)
    exact = run(reference, gate.double(), one.double(), one.double())
    with np.errstate(over="ignore"):  # exp(1e4) is inf, as on a GPU; the interpreter is numpy
        ours = triton_forward(gate, one, CONFIG), *triton_backward(one, gate, one, CONFIG)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-30)


def test_saves_gate_and_up_only():
    gate, up, _ = inputs(16, 8, torch.float32)
    gate.requires_grad_(), up.requires_grad_()
    for function, count in ((registered, 2), (reference, 3)):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.setdefault(t.data_ptr(), t), lambda t: t):
            y = function(gate, up)
        assert len(kept) == count and y.requires_grad


def test_a_cpu_takes_the_operation_where_it_is_faster(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_forward", lambda gate, up: calls.append(gate.dtype) or reference(gate, up))
    monkeypatch.setattr(module, "LARGE", 40)
    for rows, dtype in ((5, torch.float32), (4, torch.float32), (5, torch.bfloat16)):
        swiglu(*inputs(rows, 8, dtype)[:2])
    with torch.no_grad():
        swiglu(*inputs(5, 8, torch.float32)[:2])
    assert calls == [torch.float32]


def test_strided_empty_and_expanded():
    gate, up, _ = inputs(6, 10, torch.float32)
    whole = torch.cat((gate, up), 1)
    halves = whole[:, :10], whole[:, 10:]
    dy = torch.ones(()).expand(6, 10)
    for a, b in zip(run(registered, gate, up, dy), run(reference, gate, up, dy), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(plain_forward(*halves), plain_forward(gate, up))
    for a, b in zip(plain_backward(dy, *halves), plain_backward(dy, gate, up), strict=True):
        assert torch.equal(a, b) and a.is_contiguous()
    gate, up = gate[:0].requires_grad_(), up[:0].requires_grad_()
    for function in (swiglu, registered):
        assert function(gate, up).shape == (0, 10)
        assert torch.autograd.grad(function(gate, up).sum(), (gate, up))[0].shape == (0, 10)


def test_gradcheck_and_opcheck():
    gate, up, dy = (t.requires_grad_() for t in inputs(3, 4, torch.float64))
    assert torch.autograd.gradcheck(registered, (gate, up))
    torch.library.opcheck(torch.ops.minillava.swiglu.default, (gate, up))
    backward = [t.detach() for t in (dy, gate, up)]
    torch.library.opcheck(torch.ops.minillava.swiglu_backward.default, backward)


@needs_compiler
def test_compiles_in_one_graph(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 0)
    tensors = inputs(20, 16, torch.float32)
    compiled = torch.compile(swiglu, fullgraph=True)
    for a, b in zip(run(compiled, *tensors), run(reference, *tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_misshapen_input_is_refused_with_the_shapes():
    gate, up, _ = inputs(5, 8, torch.float32)
    with pytest.raises(ValueError, match=r"gate \[5, 8\], up \[5, 7\]"):
        swiglu(gate, up[:, :7])
    with pytest.raises(ValueError, match=r"float32 and torch\.float64"):
        swiglu(gate, up.double())
