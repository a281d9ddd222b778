"""Products and values of 4-bit weights on CPUs: which code of nf4_cpu.c takes how many rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels import cpu
from minillava.kernels.cpu import Weight

FEW = 8  # rows up to which the product by codes is faster than what comes next (bench/LOG.md)
FEW_FOR_TILES = 3  # the same where the CPU has AMX tiles, which then take up to TILED rows of bf16
TILED = 64


def takes(dtype: torch.dtype, packed: Tensor, absmax: Tensor, K: int) -> bool:
    """Whether the C code is there and takes these weights of K inputs."""
    fits = K % 32 == 0 and packed.is_contiguous() and absmax.is_contiguous()
    return fits and dtype in (torch.float32, torch.bfloat16) and cpu.library() is not None


def fill(out: Tensor, *weight: Any) -> Tensor:
    """`out`, bf16 or fp32 and contiguous, becomes the values of the weight."""
    code, half, threads = cpu.library(), int(out.dtype == torch.bfloat16), torch.get_num_threads()
    assert code is not None
    code.nf4_values(Weight.of(*weight), out.data_ptr(), out.numel(), half, threads)
    return out


def values(N: int, K: int, dtype: torch.dtype, *weight: Any) -> Tensor:
    """The weight's values [N, K], in memory that the next call overwrites."""
    return fill(cpu.workspace("values", (N, K), dtype), *weight)


def forward(x_MK: Tensor, bias_N: Tensor | None, N: int, *weight: Any) -> Tensor:
    """x W^T + bias: a few rows by codes, in bf16 where x is and the CPU multiplies bf16, else in fp32; more with the
    weight's values in x's type, of which AMX tiles hold some at a time, or else a buffer for all layers."""
    (M, K), code, threads = x_MK.shape, cpu.library(), torch.get_num_threads()
    assert code is not None
    x_MK, w = x_MK.contiguous(), Weight.of(*weight)
    can = code.can if x_MK.dtype == torch.bfloat16 else 0
    tiles = can & cpu.TILES and N % 16 == 0 and K % 64 == 0 and weight[-1] >= 64
    if len(x_MK) <= (FEW_FOR_TILES if tiles else FEW):
        if can & cpu.PRODUCTS and K % min(weight[-1], 128) == 0:
            bias = None if bias_N is None else bias_N.to(x_MK.dtype).contiguous()
            return cpu.matrix_rows(x_MK, cpu.Matrix.of((N, K), bias, None, weight))
        x, y_MN = torch.empty(2, M, K // 2).copy_(x_MK.view(M, K // 2, 2).permute(2, 0, 1)), torch.empty(M, N)
        code.nf4_product(x.data_ptr(), w, y_MN.data_ptr(), M, N, K, threads)
        return (y_MN if bias_N is None else y_MN.add_(bias_N)).to(x_MK.dtype)
    if tiles and M <= TILED:
        blocks = -(-M // 16)
        x = F.pad(x_MK, (0, 0, 0, 16 * blocks - M)).view(16 * blocks, K // 64, 16, 2, 2)
        x = x.flip(-1).permute(0, 1, 3, 4, 2).reshape(16 * blocks, K)  # in the order of the codes
        x = x.view(torch.int32).T.contiguous()  # pairs of inputs, of all rows
        y_NM = torch.empty(N, 16 * blocks)
        code.nf4_tiles(x.data_ptr(), w, y_NM.data_ptr(), blocks, N, K, threads)
        y_MN = y_NM[:, :M].T
        return (y_MN if bias_N is None else y_MN + bias_N).to(x_MK.dtype, memory_format=torch.contiguous_format)
    return F.linear(x_MK, values(N, K, x_MK.dtype, *weight), bias_N)
