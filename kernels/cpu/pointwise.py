"""Norms and activations in bf16 on CPUs without gradients, in one pass where PyTorch takes several: pointwise.c.

Each function returns None where the caller has to use PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minillava.kernels.cpu import library as cpu


def _code(*tensors: Tensor) -> Any:
    """The C code, if it takes these tensors."""
    if not all(t.is_cpu and t.dtype == torch.bfloat16 for t in tensors) or torch.compiler.is_compiling():
        return None
    if not tensors[0].numel() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return None
    code = cpu.library()
    return code if tensors[0].shape[-1] % 16 == 0 else None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor | None:
    """x [..., D] / rms(x) * weight."""
    if (code := _code(x, weight_D)) is None or not (x.is_contiguous() and weight_D.is_contiguous()):
        return None
    y, D = torch.empty_like(x), x.shape[-1]
    code.rms_norm(x.data_ptr(), weight_D.data_ptr(), y.data_ptr(), x.numel() // D, D, eps, torch.get_num_threads())
    return y


def swiglu(gate_ND: Tensor, up_ND: Tensor) -> Tensor | None:
    """silu(gate) * up of matrices [N, D], which may be columns of wider ones."""
    if (code := _code(gate_ND, up_ND)) is None or gate_ND.dim() != 2 or gate_ND.stride() != up_ND.stride():
        return None
    if gate_ND.stride(1) != 1:
        return None
    (N, D), y_ND = gate_ND.shape, gate_ND.new_empty(gate_ND.shape)
    pointers = gate_ND.data_ptr(), up_ND.data_ptr(), y_ND.data_ptr()
    code.swiglu(*pointers, N, D, gate_ND.stride(0), torch.get_num_threads())
    return y_ND


def quick_gelu(x: Tensor) -> Tensor | None:
    """x sigmoid(1.702 x)."""
    if (code := _code(x)) is None or not x.is_contiguous():
        return None
    y = torch.empty_like(x)
    code.quick_gelu(x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads())
    return y
