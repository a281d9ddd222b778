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
    blocks, token_S, slot_T = _layout(tuple(cu_seqlens), SIMILAR if causal else 1.0, q_THK.device)
    sizes = [rows * length for rows, length in blocks]
    padded = [_Pad.apply(x, token_S, slot_T).split(sizes) for x in (q_THK, k_TGK, v_TGK)]
    out = []
    for block, q, k, v in zip(blocks, *padded):
        out.append(
            _sdpa(q.unflatten(0, block), k.unflatten(0, block), v.unflatten(0, block), causal, scale).flatten(0, 1)
        )
    return _Unpad.apply(torch.cat(out), slot_T)


@lru_cache(maxsize=16)  # all layers of a step ask for the same
def _layout(
    cu_seqlens: tuple[int, ...], similar: float, device: torch.device
) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
    """Sequences of similar length side by side: (rows, length) of each block; the token in each of the S slots of all
    blocks, where a slot behind the end of its sequence repeats the last token; and the slot of each token."""
    spans = sorted(pairwise(cu_seqlens), key=lambda span: span[0] - span[1])  # longest first
    blocks: list[tuple[int, int]] = []
    for start, end in spans:
        if not blocks or end - start < similar * blocks[-1][1]:
            blocks.append((0, end - start))
        blocks[-1] = (blocks[-1][0] + 1, blocks[-1][1])
    starts, ends = np.array([span for span in spans if span[0] < span[1]]).reshape(-1, 2).T
    lengths = np.repeat([length for _, length in blocks], [rows for rows, _ in blocks])[: len(starts)]
    first_slots = np.cumsum(lengths) - lengths
    token_S = np.arange(lengths.sum()) - np.repeat(first_slots - starts, lengths)
    token_S = np.minimum(token_S, np.repeat(ends - 1, lengths))
    order = np.argsort(starts)
    sizes = (ends - starts)[order]
    slot_T = np.arange(sizes.sum()) + np.repeat((first_slots - starts)[order], sizes)
    return blocks, torch.from_numpy(token_S).to(device), torch.from_numpy(slot_T).to(device)


class _Pad(torch.autograd.Function):
    """Tokens into slots. A slot that repeats a token has no gradient, so that the backward gathers and adds nothing."""

    @staticmethod
    def forward(ctx, x_THK: Tensor, token_S: Tensor, slot_T: Tensor) -> Tensor:
        ctx.slot_T = slot_T
        return x_THK.index_select(0, token_S)

    @staticmethod
    def backward(ctx, grad_SHK: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad_SHK.index_select(0, ctx.slot_T), None, None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SHK: Tensor, slot_T: Tensor) -> Tensor:
        ctx.slots, ctx.slot_T = len(x_SHK), slot_T
        return x_SHK.index_select(0, slot_T)

    @staticmethod
    def backward(ctx, grad_THK: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad_SHK = grad_THK.new_zeros(ctx.slots, *grad_THK.shape[1:])
        return grad_SHK.index_copy_(0, ctx.slot_T, grad_THK), None


def _explicit(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, causal: bool, scale: float | None) -> Tensor:
    """The formula as two batched products: while the scores stay in cache, its backward beats SDPA's on a CPU."""
    T, S = q_BHTK.shape[2], k_BHSK.shape[2]
    scale = q_BHTK.shape[3] ** -0.5 if scale is None else scale
    mask_TS = q_BHTK.new_zeros(T, S)
    if causal:
        mask_TS.fill_(float("-inf")).triu_(S - T + 1)
    scores = torch.baddbmm(mask_TS, q_BHTK.flatten(0, 1), k_BHSK.flatten(0, 1).transpose(1, 2), alpha=scale)
    return (scores.softmax(-1) @ v_BHSK.flatten(0, 1)).unflatten(0, q_BHTK.shape[:2])


def _sdpa(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, causal: bool, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cpu" and q.requires_grad and q.shape[2] <= SHORT and not grouped:
        return _explicit(q, k, v, causal, scale).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped).transpose(1, 2)
