"""Norms and activations in C: no further from float64 than PyTorch's in bf16."""

import pytest
import torch
import torch.nn.functional as F

from minillava.kernels.cpu import pointwise as pointwise_cpu

pytestmark = pytest.mark.usefixtures("c_code")


def assert_as_good(got, plain, exact):
    off, allowed = ((y.double() - exact).abs().mean() for y in (got, plain))
    assert got.dtype == torch.bfloat16 and off <= allowed


def wide_range(*shape):
    """From far below to far above where a sigmoid bends."""
    torch.manual_seed(0)
    return (torch.randn(shape) * torch.logspace(-3, 2, shape[-1])).bfloat16()


@pytest.mark.parametrize("shape", ((1, 16), (37, 208), (2, 5, 1024)))
def test_rms_norm(shape):
    x, weight = wide_range(*shape), torch.randn(shape[-1]).bfloat16()
    exact = F.rms_norm(x.double(), x.shape[-1:], weight.double(), 1e-5)
    plain = F.rms_norm(x.float(), x.shape[-1:], eps=1e-5).bfloat16() * weight
    assert_as_good(pointwise_cpu.rms_norm(x, weight, 1e-5), plain, exact)


@pytest.mark.parametrize("shape", ((1, 32), (37, 208)))
def test_swiglu_of_columns(shape):
    both = wide_range(shape[0], 2 * shape[1])
    for gate, up in (both.split(shape[1], dim=1), (both[:, : shape[1]].contiguous(), both[:, shape[1] :].contiguous())):
        y = pointwise_cpu.swiglu(gate, up)
        assert y.is_contiguous()
        assert_as_good(y, F.silu(gate) * up, F.silu(gate.double()) * up.double())


def test_quick_gelu():
    x = wide_range(3, 5, 64)
    exact = x.double() * torch.sigmoid(1.702 * x.double())
    assert_as_good(pointwise_cpu.quick_gelu(x), x * torch.sigmoid(1.702 * x), exact)
    ends = torch.tensor([0.0, -0.0, 1e38, -1e38, float("inf"), -88, 88, -1e4] * 2).bfloat16()
    assert torch.equal(pointwise_cpu.quick_gelu(ends), (ends.float() * torch.sigmoid(1.702 * ends.float())).bfloat16())


def test_what_it_does_not_take():
    x, weight = torch.randn(4, 32).bfloat16(), torch.ones(32).bfloat16()
    assert pointwise_cpu.rms_norm(x, weight, 1e-5) is not None
    assert pointwise_cpu.rms_norm(x, weight.requires_grad_(), 1e-5) is None
    assert pointwise_cpu.rms_norm(x.float(), torch.ones(32), 1e-5) is None
    assert pointwise_cpu.rms_norm(x[:, :30].contiguous(), weight.detach()[:30], 1e-5) is None
    assert pointwise_cpu.rms_norm(x, torch.ones(64).bfloat16()[::2], 1e-5) is None
    assert pointwise_cpu.quick_gelu(x[:0]).shape == (0, x.shape[1])
    assert torch.equal(pointwise_cpu.quick_gelu(x.T), x.T * torch.sigmoid(1.702 * x.T))
    assert pointwise_cpu.swiglu(x.T, x.T) is None
    assert pointwise_cpu.swiglu(x, torch.randn(4, 64).bfloat16()[:, ::2]) is None
