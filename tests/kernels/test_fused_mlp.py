"""The fused projector against plain PyTorch, both against float64: never more than twice its error."""

from __future__ import annotations

import os

import pytest
import torch
from checks import CUDA, apart, assert_no_worse, error, needs_triton, one_rank
from torch import nn

from minillava.kernels import fused_mlp as module
from minillava.kernels.fused_mlp import fused_mlp, plain_backward, plain_forward, reference

ROWS = (1, 7, 576, 577, 729, 4608)
# K, H, O of LLaVA-1.5 7B and 13B, OneVision 0.5B and 7B (SigLIP)
REAL_WIDTHS = ((1024, 4096, 4096), (1024, 5120, 5120), (1152, 896, 896), (1152, 3584, 3584))
FULL = bool(os.environ.get("MINILLAVA_FULL"))
takes_minutes = pytest.mark.skipif(
    not CUDA and not FULL, reason="takes minutes without a GPU; MINILLAVA_FULL=1 runs it"
)
NAMES = ("y", "dx", "dw1", "db1", "dw2", "db2")


def inputs(N, K, H, O, dtype, device="cpu", seed=0):
    torch.manual_seed(seed)
    scales = ((N, K), 1), ((H, K), K**-0.5), ((H,), 0.5), ((O, H), H**-0.5), ((O,), 0.5)
    return [torch.randn(shape, device=device).mul(scale).to(dtype) for shape, scale in scales]


def run(function, tensors, activation, dy):
    """Output and the five gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves, activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def assert_error_is_small(N, K, H, O, dtype, activation, device="cpu"):
    tensors = inputs(N, K, H, O, dtype, device)
    dy = torch.randn(N, O, device=device).to(dtype)
    exact = run(reference, [t.double() for t in tensors], activation, dy)
    assert_no_worse(NAMES, run(fused_mlp, tensors, activation, dy), run(reference, tensors, activation, dy), exact)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh"))
@pytest.mark.parametrize("rows", ROWS)
def test_error_at_every_row_count(rows, activation, dtype):
    assert_error_is_small(rows, 32, 64, 48, dtype, activation)


@pytest.mark.parametrize("widths", REAL_WIDTHS)
def test_error_at_real_widths(widths):
    assert_error_is_small(7, *widths, torch.bfloat16, "gelu")


@takes_minutes
@pytest.mark.parametrize(
    "dtype", (torch.bfloat16, torch.float16, torch.float32) if CUDA else (torch.bfloat16, torch.float32)
)
@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh"))
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("widths", REAL_WIDTHS)
def test_error_at_every_real_size(widths, rows, activation, dtype):
    assert_error_is_small(rows, *widths, dtype, activation, "cuda" if CUDA else "cpu")


SMALL = {"block_m": 16, "block_n": 32, "block_k": 16, "group": 2, "warps": 4, "stages": 2}
VARIANTS = (
    {"variant": "pointer", "split_k": 1},
    {"variant": "pointer", "split_k": 3},
    {"variant": "descriptor", "parts": 1, "specialize": True},
    {"variant": "descriptor", "parts": 2, "specialize": False},
)


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "activation"),
    [
        (torch.bfloat16, "gelu"),
        (torch.bfloat16, "gelu_tanh"),
        (torch.float16, "gelu_tanh"),
        (torch.float32, "gelu"),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(str(x) for x in v.values()))
@pytest.mark.parametrize("rows", (1, 37))
def test_triton_kernels_in_the_interpreter(rows, variant, activation, dtype):
    """Both products of every variant, on sizes that leave partial tiles in all three directions."""
    K, H, O = (40, 264, 248) if rows == 1 else (40, 72, 24)  # enough numbers for a fair error
    config = {**SMALL, **variant}
    x, w1, b1, w2, b2 = inputs(rows, K, H, O, dtype)
    dy = torch.randn(rows, O).to(dtype)
    x64, w164, b164, w264, b264 = (t.double() for t in (x, w1, b1, w2, b2))
    plain_y, pre = plain_forward(x, w1, b1, w2, b2, activation, True)
    exact_y, exact_pre = plain_forward(x64, w164, b164, w264, b264, activation, True)
    ours_y, ours_pre = module.triton_forward(x, w1, b1, w2, b2, activation, True, config)
    assert error(ours_y, exact_y) <= 2 * error(plain_y, exact_y)
    assert error(ours_pre, exact_pre) <= 2 * error(pre, exact_pre)
    without_saving, nothing = module.triton_forward(x, w1, b1, w2, b2, activation, False, config)
    assert torch.equal(without_saving, ours_y) and nothing.numel() == 0

    config["split_k"] = 1
    ours = module.triton_backward(dy, x, w1, w2, pre, activation, [True] * 5, config)
    plain = plain_backward(dy, x, w1, w2, pre, activation, [True] * 5)
    exact = plain_backward(dy.double(), x64, w164, w264, pre.double(), activation, [True] * 5)
    assert_no_worse(NAMES, (ours_y, *ours), (plain_y, *plain), (exact_y, *exact))


@needs_triton
def test_gelu_of_extreme_values_in_the_interpreter():
    pre = torch.tensor([0.0, -0.0, 1e-8, -1e-8, 6.0, -6.0, 60.0, -60.0])
    w1, w2 = torch.eye(8), torch.eye(8)
    for activation in ("gelu", "gelu_tanh"):
        exact, _ = plain_forward(pre.double()[None], w1.double(), None, w2.double(), None, activation, False)
        config = {**SMALL, **VARIANTS[0]}
        ours, _ = module.triton_forward(pre[None], w1, None, w2, None, activation, False, config)
        assert (ours - exact).abs().max() < 1e-6
        slope = module.triton_backward(torch.ones(1, 8), pre[None], w1, w2, pre[None], activation, [True] * 5, config)[
            0
        ]
        wide = plain_backward(
            *(t.double() for t in (torch.ones(1, 8), pre[None], w1, w2, pre[None])), activation, [True] * 5
        )
        assert (slope - wide[0]).abs().max() < 1e-6


def test_only_the_gradients_that_are_needed():
    x, w1, b1, w2, b2 = inputs(5, 8, 16, 8, torch.float32)
    for t in (w1, b2):
        t.requires_grad_()
    y = fused_mlp(x, w1, b1, w2, b2)
    y.sum().backward()
    expected = [t.detach().clone().requires_grad_() for t in (w1, b2)]
    reference(x, expected[0], b1, w2, expected[1], "gelu").sum().backward()
    torch.testing.assert_close(w1.grad, expected[0].grad)
    torch.testing.assert_close(b2.grad, expected[1].grad)
    assert x.grad is None and b1.grad is None and w2.grad is None


def test_saves_the_pre_activation_and_no_activation():
    kept = []
    x, w1, b1, w2, b2 = (t.requires_grad_() for t in inputs(64, 8, 128, 16, torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_mlp(x, w1, b1, w2, b2)
    assert sum(t.numel() for t in kept if t.shape == (64, 128)) == 64 * 128
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        reference(x, w1, b1, w2, b2, "gelu")
    assert sum(t.numel() for t in kept if t.shape == (64, 128)) == 2 * 64 * 128


def test_gradcheck_and_opcheck():
    tensors = [t.requires_grad_() for t in inputs(5, 4, 6, 3, torch.float64)]
    for activation in ("gelu", "gelu_tanh"):
        assert torch.autograd.gradcheck(lambda *t, a=activation: fused_mlp(*t, a), tensors)
        torch.library.opcheck(torch.ops.minillava.fused_mlp.default, (*tensors, activation, True))
        x, w1, _, w2, _ = (t.detach() for t in tensors)
        args = (
            torch.randn(5, 3).double(),
            x,
            w1,
            w2,
            torch.randn(5, 6).double(),
            activation,
            [True, False, True, True, True],
        )
        torch.library.opcheck(torch.ops.minillava.fused_mlp_backward.default, args)
    x, w1, _, w2, _ = tensors
    assert torch.autograd.gradcheck(lambda x, w1, w2: fused_mlp(x, w1, None, w2, None), (x, w1, w2))


class Projector(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 16)

    def forward(self, x):
        return fused_mlp(x, self.up.weight, self.up.bias, self.down.weight, self.down.bias)


def gradients(model, loss):
    loss.backward()
    return [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in model.parameters()]


def test_compiles_in_one_graph():
    torch.manual_seed(0)
    model, x = Projector(), torch.randn(3, 5, 8)
    expected = gradients(model, model(x).square().sum())
    model.zero_grad()
    got = gradients(model, torch.compile(model, fullgraph=True)(x).square().sum())
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_under_activation_checkpointing():
    torch.manual_seed(0)
    model, x = Projector(), torch.randn(5, 8)
    expected = gradients(model, model(x).square().sum())
    model.zero_grad()
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    for a, b in zip(gradients(model, y.square().sum()), expected):
        torch.testing.assert_close(a, b)


def test_under_fsdp2(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model, x = Projector(), torch.randn(5, 8)
    expected = gradients(model, model(x).square().sum())
    model.zero_grad()
    with one_rank(tmp_path) as mesh:
        fully_shard(model, mesh=mesh)
        for a, b in zip(gradients(model, model(x).square().sum()), expected):
            torch.testing.assert_close(a, b)


def strided(t):
    return t.T.contiguous().T if t.dim() == 2 else apart(t)


def test_non_contiguous_inputs_and_zero_stride_gradients():
    tensors = inputs(33, 16, 32, 24, torch.float32)
    expected = run(reference, tensors, "gelu", torch.ones(33, 24))
    leaves = [strided(t).requires_grad_() for t in tensors]
    assert not any(t.is_contiguous() for t in leaves)
    y = fused_mlp(*leaves)
    for a, b in zip([y, *torch.autograd.grad(y.sum(), leaves)], expected):
        torch.testing.assert_close(a, b)


@needs_triton
@pytest.mark.parametrize("variant", VARIANTS)
def test_triton_takes_non_contiguous_inputs(variant):
    tensors, rest = inputs(5, 16, 32, 24, torch.float32), ("gelu", True, {**SMALL, **variant})
    expected = module.triton_forward(*tensors, *rest)
    assert all(map(torch.equal, module.triton_forward(*map(apart, tensors), *rest), expected))


@needs_triton
def test_triton_backward_takes_a_zero_stride_gradient():
    x, w1, b1, w2, b2 = inputs(5, 16, 32, 24, torch.float32)
    _, pre = plain_forward(x, w1, b1, w2, b2, "gelu", True)
    dy = torch.ones(()).expand(5, 24)
    ours = module.triton_backward(dy, x, w1, w2, pre, "gelu", [True] * 5, {**SMALL, **VARIANTS[2]})
    for a, b in zip(ours, plain_backward(dy, x, w1, w2, pre, "gelu", [True] * 5)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_empty_input_and_leading_dimensions():
    x, w1, b1, w2, b2 = (t.requires_grad_() for t in inputs(0, 8, 16, 24, torch.float32))
    y = fused_mlp(x, w1, b1, w2, b2)
    y.sum().backward()
    assert y.shape == (0, 24) and torch.equal(w1.grad, torch.zeros(16, 8))
    assert fused_mlp(torch.randn(2, 3, 8), w1, b1, w2, b2).shape == (2, 3, 24)


def test_misshapen_input_is_refused_with_the_shapes():
    x, w1, b1, w2, b2 = inputs(5, 8, 16, 24, torch.float32)
    with pytest.raises(ValueError, match=r"x \[5, 7\], w1 \[16, 8\], b1 \[16\], w2 \[24, 16\], b2 \[24\]"):
        fused_mlp(x[:, :7], w1, b1, w2, b2)
    with pytest.raises(ValueError, match=r"b1 \[24\]"):
        fused_mlp(x, w1, b2, w2, b2)
    with pytest.raises(ValueError, match="silu"):
        fused_mlp(x, w1, b1, w2, b2, "silu")
    with pytest.raises(ValueError, match="bfloat16"):
        fused_mlp(x.bfloat16(), w1, b1, w2, b2)
