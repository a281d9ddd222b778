"""y = W2 gelu(W1 x + b1) + b2, the projector that LLaVA-1.5 made famous, forward and backward.

The forward saves only the pre-activation; the backward recomputes the activation, so the memory kept for it is half of
autograd's for the same three modules. GELU is exact (erf) or the tanh form, as the model says: they differ by up to 5e-4.
Letters: N rows, K input width, H hidden width, O output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels.frame import register, shapes

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}

# -- reference ---------------------------------------------------------------------------------------------------------


def reference(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> Tensor:
    """The same function in plain, differentiable PyTorch."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate=APPROXIMATE[activation]), w2, b2)


def plain_forward(x_NK, w1_HK, b1_H, w2_OH, b2_O, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    pre_NH = F.linear(x_NK, w1_HK, b1_H)
    if save:
        act_NH = F.gelu(pre_NH, approximate=APPROXIMATE[activation])
        return F.linear(act_NH, w2_OH, b2_O), pre_NH
    act_NH = torch.ops.aten.gelu_(pre_NH, approximate=APPROXIMATE[activation])
    return F.linear(act_NH, w2_OH, b2_O), x_NK.new_empty(0)


def plain_backward(dy_NO, x_NK, w1_HK, w2_OH, pre_NH, activation: str, needs: list[bool]) -> tuple[Tensor, ...]:
    """Gradients of x, w1, b1, w2, b2; an empty tensor where `needs` says that nobody asked."""
    need_x, need_w1, need_b1, need_w2, need_b2 = needs
    none = x_NK.new_empty(0)
    dw2_OH = dy_NO.T @ F.gelu(pre_NH, approximate=APPROXIMATE[activation]) if need_w2 else none
    db2_O = dy_NO.sum(0) if need_b2 else none
    if not (need_x or need_w1 or need_b1):
        return none, none, none, dw2_OH, db2_O
    dpre_NH = torch.ops.aten.gelu_backward(dy_NO @ w2_OH, pre_NH, approximate=APPROXIMATE[activation])
    dw1_HK = dpre_NH.T @ x_NK if need_w1 else none
    db1_H = dpre_NH.sum(0) if need_b1 else none
    dx_NK = dpre_NH @ w1_HK if need_x else none
    return dx_NK, dw1_HK, db1_H, dw2_OH, db2_O


# -- wrapper -----------------------------------------------------------------------------------------------------------


def fused_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str = "gelu"
) -> Tensor:
    """w2 gelu(w1 x + b1) + b2 over the last dimension of `x`; either bias may be None.

    x [..., K], w1 [H, K], b1 [H], w2 [O, H], b2 [O] -> [..., O]. `activation` is "gelu" (erf) or "gelu_tanh".
    Raises ValueError with the shapes in sight when they do not fit.
    """
    H, K = w1.shape if w1.dim() == 2 else (-1, -1)
    O = w2.shape[0]
    fits = x.dim() >= 1 and x.shape[-1] == K and w2.dim() == 2 and w2.shape[1] == H
    if not (fits and (b1 is None or b1.shape == (H,)) and (b2 is None or b2.shape == (O,))):
        raise ValueError(f"fused_mlp: shapes do not fit: {shapes(x=x, w1=w1, b1=b1, w2=w2, b2=b2)}")
    if activation not in APPROXIMATE:
        raise ValueError(f"fused_mlp: activation {activation!r} is none of {', '.join(APPROXIMATE)}")
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, b1, w2, b2))
    y_NO, _ = _forward(x.reshape(-1, K), w1, b1, w2, b2, activation, save)
    return y_NO.view(*x.shape[:-1], O)


def _fake_forward(x_NK, w1_HK, b1_H, w2_OH, b2_O, activation, save):
    pre = x_NK.new_empty(x_NK.shape[0], w1_HK.shape[0]) if save else x_NK.new_empty(0)
    return x_NK.new_empty(x_NK.shape[0], w2_OH.shape[0]), pre


def _fake_backward(dy_NO, x_NK, w1_HK, w2_OH, pre_NH, activation, needs):
    like = (x_NK.shape, w1_HK.shape, w1_HK.shape[:1], w2_OH.shape, w2_OH.shape[:1])
    return tuple(x_NK.new_empty(shape) if need else x_NK.new_empty(0) for shape, need in zip(like, needs))


def _setup_context(ctx, inputs, output) -> None:
    x_NK, w1_HK, _, w2_OH, _, ctx.activation, _ = inputs
    ctx.save_for_backward(x_NK, w1_HK, w2_OH, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy_NO, _):
    needs = list(ctx.needs_input_grad[:5])
    if dy_NO is None or not any(needs):
        return (None,) * 7
    grads = _backward(dy_NO, *ctx.saved_tensors, ctx.activation, needs)
    return *(grad if need else None for grad, need in zip(grads, needs)), None, None


_forward = register(
    "fused_mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, bool save) -> (Tensor, Tensor)",
    plain=plain_forward,
    cuda=plain_forward,
    fake=_fake_forward,
    backward=_autograd,
    setup_context=_setup_context,
)
_backward = register(
    "fused_mlp_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor pre, str activation, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    plain=plain_backward,
    cuda=plain_backward,
    fake=_fake_backward,
)
