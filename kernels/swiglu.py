"""SwiGLU's elementwise half: y = silu(gate) * up (arXiv 2002.05202), saving gate and up and nothing else.

Plain PyTorch keeps silu(gate) for the backward as well: three tensors of the hidden width a block. Here the backward
computes it again while it makes both gradients. Letters: E numbers (rows times hidden width).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels import configs
from minillava.kernels.cpu import pointwise as pointwise_cpu
from minillava.kernels.frame import card_of, jit, launch, register, shapes, tl

LARGE = 1 << 21  # fp32 numbers; from here on this is faster than the plain code on a CPU too (bench/LOG.md)

# -- reference ---------------------------------------------------------------------------------------------------------


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """The same function in plain, differentiable PyTorch."""
    return F.silu(gate) * up


def plain_forward(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.contiguous()).mul_(up)


def plain_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate and dup, both products in place: two tensors are made, where autograd makes four and keeps one."""
    gate = gate.contiguous()
    dup = F.silu(gate).mul_(dy)
    dgate = torch.mul(dy, up).contiguous()
    return torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate), dup


# -- Triton ------------------------------------------------------------------------------------------------------------


@jit
def _swiglu(gate_ptr, up_ptr, y_ptr, E, BLOCK: tl.constexpr):
    """y = gate / (1 + exp(-gate)) * up, in fp32 inside. Reads two numbers and writes one; fp16, bf16, fp32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < E
    gate = tl.load(gate_ptr + at, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=keep, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=keep)


@jit
def _swiglu_backward(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, E, BLOCK: tl.constexpr):
    """With s = sigmoid(gate): dup = dy gate s, dgate = dy up s (1 + gate (1 - s)).

    Reads three numbers and writes two; one exponential. fp16, bf16, fp32.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < E
    dy = tl.load(dy_ptr + at, mask=keep, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=keep, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    dup = dy * gate * s
    dgate = dy * up * s * (1.0 + gate * (1.0 - s))
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=keep)
    tl.store(dup_ptr + at, dup.to(dup_ptr.dtype.element_ty), mask=keep)


# -- wrapper -----------------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, for two tensors of one shape, dtype and device.

    On a CPU the plain code runs, as it is faster there, except for gradients of `LARGE` fp32 tensors and for bf16
    without gradients, which has C code. Raises ValueError with the shapes in sight when they differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: want gate and up of one shape and dtype, got {shapes(gate=gate, up=up)} "
            f"in {gate.dtype} and {up.dtype}"
        )
    if (y := pointwise_cpu.swiglu(gate, up)) is not None:
        return y
    large = gate.itemsize >= 4 and gate.numel() >= LARGE and torch.is_grad_enabled()
    if gate.device.type == "cpu" and not large:
        return reference(gate, up)
    return _forward(gate, up)


def triton_forward(gate: Tensor, up: Tensor, config: dict | None = None) -> Tensor:
    if gate.dtype == torch.float64 or gate.numel() == 0:
        return plain_forward(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _launch(_swiglu, "forward", (gate, up, y), config)
    return y


def triton_backward(dy: Tensor, gate: Tensor, up: Tensor, config: dict | None = None) -> tuple[Tensor, Tensor]:
    if gate.dtype == torch.float64 or gate.numel() == 0:
        return plain_backward(dy, gate, up)
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _launch(_swiglu_backward, "backward", (dy, gate, up, dgate, dup), config)
    return dgate, dup


def _launch(kernel, part: str, tensors: tuple[Tensor, ...], config: dict | None) -> None:
    E, width = tensors[0].numel(), tensors[0].shape[-1] if tensors[0].dim() else 1
    config = config or configs.choose("swiglu", part, card_of(tensors[0]), E // width, width)
    launch(kernel, (-(-E // config["block"]),), *tensors, E, config=config)


_backward = register(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    plain=plain_backward,
    cuda=triton_backward,
    fake=lambda dy, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
)

_forward = register(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    plain=plain_forward,
    cuda=triton_forward,
    fake=lambda gate, up: gate.new_empty(gate.shape),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    backward=lambda ctx, dy: _backward(dy, *ctx.saved_tensors),
)
