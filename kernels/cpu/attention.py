"""Attention of packed sequences on CPUs in bf16 without gradients: attention.c."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from minillava.kernels.cpu import library as cpu

WIDEST = 128  # numbers of a head
_pointer, _long = ctypes.c_void_p, ctypes.c_long


class _Queries(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("q", "k", "v", "o", "room", "starts")),
        *((name, _long) for name in ("B", "H", "G", "K", "q_next", "k_next", "v_next")),
        ("scale", ctypes.c_float),
        ("causal", ctypes.c_int),
    ]


def attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, starts: Sequence[int], causal: bool, scale: float
) -> Tensor | None:
    """softmax(q k^T * scale) v within each sequence [T, H, K]; `starts` are the boundaries, from 0 to T. None where the
    caller has to compute it otherwise."""
    (T, H, K), G, all_ = q_THK.shape, k_TGK.shape[1], (q_THK, k_TGK, v_TGK)
    code, heads_apart = cpu.inference(*all_), any(t.stride()[1:] != (K, 1) for t in all_)
    if code is None or K > WIDEST or K % 2 or heads_apart:
        return None
    ends, o_THK = (_long * len(starts))(*starts), q_THK.new_empty(T, H, K)
    sizes = len(starts) - 1, H, G, K, *(t.stride(0) for t in all_)
    padded = sum(b - a + (a - b) % 32 for a, b in pairwise(starts))
    room = cpu.workspace("attention", (padded, G, 2 * (K + -K % 32)), torch.bfloat16 if code.bf16 else torch.float32)
    pointers = *(t.data_ptr() for t in (*all_, o_THK, room)), ctypes.addressof(ends)
    code.packed_attention(ctypes.byref(_Queries(*pointers, *sizes, scale, causal)), torch.get_num_threads())
    return o_THK
