"""Norms and activations in bf16 on CPUs without gradients, in one pass where PyTorch takes several: pointwise.c.

The norm and SwiGLU, which have kernels elsewhere, return None where the caller has to use those or PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from minillava.kernels.cpu import library as cpu


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor | None:
    """x [..., D] / rms(x) * weight."""
    code, D = cpu.inference(x, weight_D), x.shape[-1]
    if code is None or D % 16 or not (x.is_contiguous() and weight_D.is_contiguous()):
        return None
    y = torch.empty_like(x)
    code.rms_norm(x.data_ptr(), weight_D.data_ptr(), y.data_ptr(), x.numel() // D, D, eps, torch.get_num_threads())
    return y


def swiglu(gate_ND: Tensor, up_ND: Tensor) -> Tensor | None:
    """silu(gate) * up of matrices [N, D], which may be columns of wider ones."""
    code, alike = cpu.inference(gate_ND, up_ND), gate_ND.stride() == up_ND.stride()
    if code is None or gate_ND.shape[-1] % 16 or not alike or gate_ND.dim() != 2 or gate_ND.stride(1) != 1:
        return None
    (N, D), y_ND = gate_ND.shape, gate_ND.new_empty(gate_ND.shape)
    pointers = gate_ND.data_ptr(), up_ND.data_ptr(), y_ND.data_ptr()
    code.swiglu(*pointers, N, D, gate_ND.stride(0), torch.get_num_threads())
    return y_ND


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), CLIP's approximation; on any device, differentiable."""
    if (code := cpu.inference(x)) is None or x.shape[-1] % 16 or not x.is_contiguous():
        return x * torch.sigmoid(1.702 * x)
    y = torch.empty_like(x)
    code.quick_gelu(x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads())
    return y
