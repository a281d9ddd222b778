"""Attention over packed rows: sequences of unequal length lie end to end, none sees another.

Shapes: T tokens of all sequences together, H heads (G for key/value heads), K head size, B sequences, M the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# With causal attention, sequences whose length is at least this share of the longest one's are computed as one
# right-padded block: no real query comes after a padded key, so no mask is needed. Anything shorter starts a block of
# its own. On two AVX-512 cores a block beats its rows one by one down to about there (32 rows of 150 to 250 tokens).
SIMILAR = 0.6
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
    B, M = len(lengths), max(lengths)
    if min(lengths) == M:
        q, k, v = (x.unflatten(0, (B, M)) for x in (q_THK, k_TGK, v_TGK))
        return _sdpa(q, k, v, causal, scale).flatten(0, 1)
    blocks, inverse_T = _blocks(tuple(cu_seqlens), SIMILAR if causal else 1.0, q_THK.device)
    out = []
    for rows, length, take_T, put_T in blocks:
        q, k, v = (_to_block(x, take_T, put_T, rows, length) for x in (q_THK, k_TGK, v_TGK))
        out.append(_sdpa(q, k, v, causal, scale).flatten(0, 1).index_select(0, put_T))
    return torch.cat(out).index_select(0, inverse_T)


@lru_cache(maxsize=16)  # all layers of a step ask for the same
def _blocks(
    cu_seqlens: tuple[int, ...], similar: float, device: torch.device
) -> tuple[list[tuple[int, int, Tensor, Tensor]], Tensor]:
    """Sequences of similar length together: for each block its rows, its length, which tokens it takes and where they
    lie in it; and the order that brings the blocks' tokens back."""
    spans = sorted(pairwise(cu_seqlens), key=lambda span: span[0] - span[1])  # longest first
    groups: list[list[tuple[int, int]]] = []
    for start, end in spans:
        if not groups or end - start < similar * (groups[-1][0][1] - groups[-1][0][0]):
            groups.append([])
        groups[-1].append((start, end))
    blocks = []
    for group in groups:
        length = group[0][1] - group[0][0]
        take = np.concatenate([np.arange(start, end) for start, end in group])
        put = np.concatenate([np.arange(end - start) + row * length for row, (start, end) in enumerate(group)])
        blocks.append((len(group), length, torch.from_numpy(take).to(device), torch.from_numpy(put).to(device)))
    return blocks, torch.argsort(torch.cat([take for _, _, take, _ in blocks]))


def _explicit(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, causal: bool, scale: float | None) -> Tensor:
    """The formula as two batched products: while the scores stay in cache, its backward beats SDPA's on a CPU."""
    T, S = q_BHTK.shape[2], k_BHSK.shape[2]
    q = q_BHTK * (q_BHTK.shape[3] ** -0.5 if scale is None else scale)
    scores = q.flatten(0, 1) @ k_BHSK.flatten(0, 1).transpose(1, 2)
    if causal:
        scores = scores + torch.full((T, S), float("-inf"), dtype=scores.dtype).triu(S - T + 1)
    return (scores.softmax(-1) @ v_BHSK.flatten(0, 1)).unflatten(0, q_BHTK.shape[:2])


def _to_block(x_THK: Tensor, take_T: Tensor, put_T: Tensor, rows: int, length: int) -> Tensor:
    block = x_THK.new_zeros(rows * length, *x_THK.shape[1:]).index_copy(0, put_T, x_THK.index_select(0, take_T))
    return block.unflatten(0, (rows, length))


def _sdpa(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, causal: bool, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cpu" and q.requires_grad and q.shape[2] <= SHORT and not grouped:
        return _explicit(q, k, v, causal, scale).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped).transpose(1, 2)
