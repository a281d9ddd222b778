"""Attention over packed rows: sequences of unequal length lie end to end, none sees another.

Shapes: T tokens of all sequences together, H heads (G for key/value heads), K head size, B sequences, M the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# Sequences of unequal length are computed as one right-padded block while less than this share of it is padding,
# else one by one. On two AVX-512 cores the block is faster up to about a third (32 rows of 150 to 250 tokens).
MAX_PADDING = 0.33
# Up to this many queries the explicit formula trains faster on a CPU than SDPA, whose backward is slow there:
# forward and backward of 32 x 230 tokens, 4 heads of 64, bf16 on two AMX cores took 18 ms against 38 ms.
SHORT = 512


def attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Sequence[int], causal: bool, scale: float | None = None
) -> Tensor:
    """softmax(q k^T * scale) v within each sequence; returns [T, H, K].

    `cu_seqlens` holds the B + 1 boundaries, from 0 to T, as Python integers. Heads of q come in groups of H / G that
    share a key/value head. The scale defaults to K ** -0.5.
    """
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    if not lengths or min(lengths) < 0 or cu_seqlens[0] != 0 or cu_seqlens[-1] != q_THK.shape[0]:
        raise ValueError(f"cu_seqlens {tuple(cu_seqlens)} do not cover {q_THK.shape[0]} tokens")
    B, M, T = len(lengths), max(lengths), q_THK.shape[0]
    if min(lengths) == M:
        o_BMHK = _sdpa(
            q_THK.unflatten(0, (B, M)), k_TGK.unflatten(0, (B, M)), v_TGK.unflatten(0, (B, M)), causal, scale
        )
        return o_BMHK.flatten(0, 1)
    if causal and B * M - T < MAX_PADDING * B * M:
        # Right padding needs no mask: with causal attention no real query comes after a padded key.
        where_T = torch.cat([torch.arange(row * M, row * M + length) for row, length in enumerate(lengths)]).to(
            q_THK.device
        )
        q, k, v = (_scatter_rows(x, where_T, B, M) for x in (q_THK, k_TGK, v_TGK))
        return _sdpa(q, k, v, causal, scale).flatten(0, 1).index_select(0, where_T)
    parts = zip(q_THK.split(lengths), k_TGK.split(lengths), v_TGK.split(lengths))
    return torch.cat([_sdpa(q[None], k[None], v[None], causal, scale)[0] for q, k, v in parts])


def _explicit(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, causal: bool, scale: float | None) -> Tensor:
    """The formula as two batched products: while the scores stay in cache, its backward beats SDPA's on a CPU."""
    T, S = q_BHTK.shape[2], k_BHSK.shape[2]
    q = q_BHTK * (q_BHTK.shape[3] ** -0.5 if scale is None else scale)
    scores = q.flatten(0, 1) @ k_BHSK.flatten(0, 1).transpose(1, 2)
    if causal:
        scores = scores + torch.full((T, S), float("-inf"), dtype=scores.dtype).triu(S - T + 1)
    return (scores.softmax(-1) @ v_BHSK.flatten(0, 1)).unflatten(0, q_BHTK.shape[:2])


def _scatter_rows(x_THK: Tensor, where_T: Tensor, B: int, M: int) -> Tensor:
    x = x_THK.new_zeros(B * M, *x_THK.shape[1:]).index_copy(0, where_T, x_THK)
    return x.unflatten(0, (B, M))


def _sdpa(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, causal: bool, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cpu" and q.requires_grad and q.shape[2] <= SHORT and not grouped:
        return _explicit(q, k, v, causal, scale).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped).transpose(1, 2)
