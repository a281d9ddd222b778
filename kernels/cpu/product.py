"""Linear layers on CPUs: which code takes how many rows, and weights in 16, 8 and 4 bits as it takes them.

Letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels.cpu import library as cpu

HALVES, BYTES, CODES, ROUNDED = range(4)  # kinds of a weight in weight.c
TYPES = (torch.float32, torch.bfloat16)  # of inputs
MANY = 64  # rows up to which AMX multiplies bytes no slower than bf16, and weight @ x^T is the fastest of bf16
_pointer, _long = ctypes.c_void_p, ctypes.c_long


class Matrix(ctypes.Structure):
    """A linear layer [N, K] in C: addresses of tensors that are contiguous and outlive it."""

    pointers = ("bias", "values", "scales", "nested", "dynamic", "table")
    _fields_ = [
        *((name, _long) for name in "NK"),
        *((name, _pointer) for name in pointers),
        *(("groups", _long), ("shift", ctypes.c_int), ("kind", ctypes.c_int)),
    ]


@dataclass(frozen=True)
class Weight:
    """A weight [N, K] in bf16; in int8, where 127 is worth `scales` [N]; or `codes`: packed, absmax, nested, dynamic,
    the 16 values, block size. With `rounded`, codes are multiplied as bytes, and so are bf16 inputs then."""

    shape: tuple[int, int]
    values: Tensor | None = None
    scales: Tensor | None = None
    codes: tuple | None = None
    rounded: bool = False

    @property
    def kind(self) -> int:
        """How the C code multiplies it."""
        if self.codes is None:
            return HALVES if self.scales is None else BYTES
        # A group of 128 inputs is whole blocks or within one; what is rounded together, 64, has one scale.
        whole = self.shape[1] % min(self.codes[-1], 128) == 0 and self.codes[-1] >= 64
        return ROUNDED if self.rounded and whole else CODES

    def fits(self) -> bool:
        """Whether the C code is there and takes it."""
        tensors = [t for t in (self.values, self.scales, *(self.codes or ())) if isinstance(t, Tensor)]
        fits = self.shape[1] % 32 == 0 and all(t.is_cpu and t.is_contiguous() for t in tensors)
        fits &= self.kind != HALVES or tensors[0].dtype == torch.bfloat16
        return fits and cpu.library() is not None

    def matrix(self, bias_N: Tensor | None = None) -> Matrix:
        """With a bias in bf16."""
        *parts, blocksize = self.codes or (self.values, self.scales, None, None, None, 1)
        pointers = (None if t is None else t.data_ptr() for t in (bias_N, *parts))
        groups = 0 if parts[2] is None else parts[2].stride(0)
        return Matrix(*self.shape, *pointers, groups, blocksize.bit_length() - 1, self.kind)


def values(weight: Weight, out: Tensor) -> Tensor:
    """`out`, bf16 or fp32 and contiguous, becomes the values of a weight."""
    half, threads = out.dtype == torch.bfloat16, torch.get_num_threads()
    cpu.library().weight_values(ctypes.byref(weight.matrix()), out.data_ptr(), half, threads)
    return out


def codes(flat: Tensor, bounds: Tensor, order: Tensor, absmax: Tensor, packed: Tensor, blocksize: int) -> int:
    """Quantise the whole blocks of `flat` where C code can: `absmax` and `packed` are written; returns how many values
    that are. `bounds` [15] are those between the 16 values in ascending order, whose codes are in `order`."""
    code, blocks = cpu.library(), len(flat) // blocksize
    if not flat.is_cpu or flat.dtype not in TYPES or not flat.is_contiguous() or code is None:
        return 0
    pointers = (t.data_ptr() for t in (bounds, order, absmax, packed))
    half, threads = flat.dtype == torch.bfloat16, torch.get_num_threads()
    code.nf4_codes(flat.data_ptr(), half, *pointers, blocks, blocksize, threads)
    return blocks * blocksize


def by_rows(x_MK: Tensor, weight: Weight, bias_N: Tensor | None) -> Tensor:
    """x weight^T + bias in x's type: bf16, or fp32 of up to FEW rows."""
    code, M, fp32, threads = cpu.library(), len(x_MK), x_MK.dtype == torch.float32, torch.get_num_threads()
    x_MK, y_MN = x_MK.contiguous(), x_MK.new_empty(M, weight.shape[0])
    inside = None if fp32 or bias_N is None else bias_N.to(torch.bfloat16).contiguous()
    matrix = weight.matrix(inside)
    pointers = x_MK.data_ptr(), ctypes.byref(matrix), y_MN.data_ptr()
    if M > cpu.FEW:
        room = cpu.workspace("rows", (M + -M % 32, weight.shape[1] + -weight.shape[1] % 128), torch.float32)
        code.many_rows(*pointers, room.data_ptr(), M, threads)
    else:
        code.few_rows(*pointers, M, fp32, threads)
    return y_MN.add_(bias_N) if fp32 and bias_N is not None else y_MN


def multiply(x: Tensor, weight: Weight, bias_N: Tensor | None) -> Tensor | None:
    """x weight^T + bias over the last dimension, x in bf16 or fp32, by the code that is fastest for so many rows; None
    where gradients are wanted or the C code does not take it."""
    if cpu.inference(x, *([] if bias_N is None else [bias_N]), types=TYPES) is None or not weight.fits():
        return None
    x_MK, code, half = x.reshape(-1, x.shape[-1]), cpu.library(), x.dtype == torch.bfloat16
    exact = weight.kind in (HALVES, CODES)  # what PyTorch multiplies as fast, once it is in x's type
    best = half and not (code.bf16 and exact) and not (code.tiles and len(x_MK) > MANY)
    if len(x_MK) <= cpu.FEW or best:
        y_MN = by_rows(x_MK, weight, bias_N)
    else:
        y_MN = _by_onednn(x_MK, values(weight, cpu.workspace("values", weight.shape, x.dtype)), bias_N)
    return y_MN.view(*x.shape[:-1], weight.shape[0])


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x weight^T + bias over the last dimension: F.linear, but on CPUs in bf16 without gradients what is faster there.

    Few rows are bound by reading the weight: FEW or fewer go through our own code (four on AMX), then several through
    weight @ x^T (31 and 29 GB/s where F.linear reaches 22 on two AMX cores). CPUs that do not multiply bf16 widen it in
    registers.
    """
    if torch.is_grad_enabled() or not x.is_cpu or not x.dtype == weight_NK.dtype == torch.bfloat16 or not x.numel():
        return F.linear(x, weight_NK, bias_N)
    x_MK, weight = x.reshape(-1, x.shape[-1]), Weight((weight_NK.shape[0], weight_NK.shape[1]), weight_NK)
    M, slow, ours = len(x_MK), not cpu.multiplies_bf16(), not torch.compiler.is_compiling() and weight.fits()
    few = 4 if ours and cpu.library().tiles else cpu.FEW
    if ours and (slow or few >= M):
        y_MN = by_rows(x_MK, weight, bias_N)
    elif slow:
        bias = None if bias_N is None else bias_N.float()
        y_MN = F.linear(x_MK.float(), weight_NK.float(), bias).to(x.dtype)
    elif M <= MANY:
        y_MN = torch.mv(weight_NK, x_MK[0])[None] if M == 1 else torch.mm(weight_NK, x_MK.T).T
        y_MN = y_MN if bias_N is None else y_MN + bias_N
    else:
        y_MN = _by_onednn(x_MK, weight_NK, bias_N)
    return y_MN.view(*x.shape[:-1], len(weight_NK))


def _by_onednn(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Of bf16 in whole eights of rows: oneDNN splits rows into equal parts, and CLIP's 577 take 1.25 times as long as
    584, others without small factors up to 1.8 times (bench/LOG.md)."""
    M, more = len(x_MK), -len(x_MK) % 8 if x_MK.dtype == torch.bfloat16 else 0
    return F.linear(F.pad(x_MK, (0, 0, 0, more)) if more else x_MK, weight_NK, bias_N)[:M]
