"""Attention of packed sequences on CPUs: PyTorch's, called for many where that costs little padding.

Sequences of similar length form a block: rows of T queries and S keys. Letters: T queries and S keys of all sequences
or of a block's row, B rows of a block, H heads, G key/value heads, K head size, P places in all blocks together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels.cpu import library as cpu
from minillava.kernels.cpu.attention import attention as by_tiles

# With causal attention, sequences whose length is at least this share of the longest one's are computed as one
# right-padded block: no real query comes after a padded key, so no mask is needed. Anything shorter starts a block of
# its own. On two AVX-512 cores a block beats its rows one by one down to about there (32 rows of 150 to 250 tokens).
SIMILAR = 0.6
# Up to this many queries the explicit formula trains faster on a CPU than SDPA, whose backward is slow there. One core,
# forward and backward, 4 heads of 64: 32 x 230 tokens in bf16 (AMX) 25 ms against 59, in fp32 57 against 50;
# 192 x 30 tokens 12 against 52 and 10 against 11.
SHORT = {2: 512, 4: 64, 8: 64}  # bytes of a number -> queries


@dataclass(frozen=True)
class Block:
    """Sequences that are computed together, as rows of T queries and S keys."""

    rows: int
    T: int
    S: int
    causal: bool = False  # T = S, and a query sees the keys up to its own place
    mask_TS: Tensor | None = None  # True where a query sees a key, if that is neither all nor `causal`


def attention(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], causal: bool, window: int,
    scale: float,
) -> Tensor:  # fmt: skip
    """`minillava.kernels.attention.attention` [T, H, K], differentiable."""
    plain, training = cu_q == cu_k and not window, torch.is_grad_enabled() and q_THK.requires_grad
    if plain and not training and (o_THK := by_tiles(q_THK, k_SGK, v_SGK, cu_q, causal, scale)) is not None:
        return o_THK
    if q_THK.dtype == torch.bfloat16 and not cpu.multiplies_bf16():  # which PyTorch would emulate
        q, k, v = (x.float() for x in (q_THK, k_SGK, v_SGK))
        return attention(q, k, v, cu_q, cu_k, causal, window, scale).to(q_THK.dtype)
    longest = max(b - a for a, b in pairwise(cu_q))
    short = plain and training and q_THK.shape[1] == k_SGK.shape[1] and longest <= SHORT[q_THK.itemsize]

    # Sequences of similar length become the rows of a block, padded where they must be, and tokens again behind it.
    blocks, token_P, place_T = blocks_of(tuple(cu_q), tuple(cu_k), causal, window, coarse=short)
    if token_P is not None:
        q_THK, k_SGK, v_SGK = (_Pad.apply(x, token_P, place_T) for x in (q_THK, k_SGK, v_SGK))
    out = []
    for block, q, k, v in zip(blocks, *_by_block(blocks, q_THK, k_SGK, v_SGK)):
        if q.numel():
            o_BHTK = formula(q, k, v, causal, scale) if short else by_sdpa(block, q, k, v, scale)
            out.append(o_BHTK.transpose(1, 2).flatten(0, 1))
    o_THK = out[0] if len(out) == 1 else torch.cat(out or [q_THK])
    return o_THK.contiguous() if place_T is None else _Unpad.apply(o_THK, place_T)


def by_sdpa(block: Block, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, scale: float) -> Tensor:
    """PyTorch's own, which leaves its flash kernel where heads do not lie as that wants them; a mask is added."""
    mask_TS = block.mask_TS
    if mask_TS is not None:
        mask_TS = torch.zeros_like(mask_TS, dtype=q_BHTK.dtype).masked_fill_(~mask_TS, float("-inf"))
    groups = q_BHTK.shape[1] != k_BGSK.shape[1]
    how: dict[str, Any] = {"is_causal": block.causal, "scale": scale, "enable_gqa": groups}
    return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, mask_TS, **how)


def formula(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, causal: bool, scale: float) -> Tensor:
    """Two batched products. While the scores stay in cache, their backward beats SDPA's."""
    T = q_BHTK.shape[2]
    mask_TT = q_BHTK.new_zeros(T, T)
    if causal:
        mask_TT.masked_fill_(~torch.ones(T, T, dtype=torch.bool).tril(), float("-inf"))
    scores = torch.baddbmm(mask_TT, q_BHTK.flatten(0, 1), k_BHTK.flatten(0, 1).mT, alpha=scale)
    return (scores.softmax(-1) @ v_BHTK.flatten(0, 1)).unflatten(0, q_BHTK.shape[:2])


# ---- which sequences are computed together ----


@lru_cache(maxsize=16)  # all layers of a step ask for the same
def blocks_of(
    cu_q: tuple[int, ...], cu_k: tuple[int, ...], causal: bool, window: int, coarse: bool = False
) -> tuple[list[Block], Tensor | None, Tensor | None]:
    """The blocks; the token in each of the P places of all blocks, where a place behind the end of its sequence repeats
    the last token; and the place of each token. Both None where tokens lie as the blocks want them: sequences of equal
    length in one block, or each in its own, as they are if queries and keys differ or not all of them are seen.
    With `coarse` the sizes of padded blocks are rounded up: oneDNN compiles a batched product for its very sizes."""
    spans = list(pairwise(cu_q))
    lengths = {end - start for start, end in spans}
    if cu_q != cu_k or window:
        both = zip(spans, pairwise(cu_k), strict=True)
        return [_alone(b - a, d - c, causal, window) for (a, b), (c, d) in both], None, None
    if len(lengths) == 1:
        (length,) = lengths
        return [Block(len(spans), length, length, causal)], None, None
    blocks, rows, real = [], [], []
    for group in _similar(spans, SIMILAR if causal else 1.0):
        length = group[0][1] - group[0][0]
        length = _coarse(length) if coarse and causal else length
        more = _coarse(len(group)) - len(group) if coarse else 0  # rows that nobody reads
        blocks.append(Block(len(group) + more, length, length, causal))
        rows += group + group[-1:] * more
        real += [True] * len(group) + [False] * more
    return blocks, *_places(blocks, np.array(rows).reshape(-1, 2), np.flatnonzero(real))


def _alone(T: int, S: int, causal: bool, window: int) -> Block:
    """A sequence of its own: the last query is level with the last key."""
    if not causal or (T == S and not window):
        return Block(1, T, S, causal)
    mask_TS = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return Block(1, T, S, False, mask_TS.triu(S - T - window + 1) if window else mask_TS)


def _similar(spans: list[tuple[int, int]], share: float) -> list[list[tuple[int, int]]]:
    """Sequences in groups, longest first, none shorter than `share` of its group's longest; empty ones in none."""
    groups: list[list[tuple[int, int]]] = []
    for start, end in sorted((span for span in spans if span[0] < span[1]), key=lambda span: span[0] - span[1]):
        if not groups or end - start < share * (groups[-1][0][1] - groups[-1][0][0]):
            groups.append([])
        groups[-1].append((start, end))
    return groups


def _places(blocks: list[Block], rows: np.ndarray, real: np.ndarray) -> tuple[Tensor, Tensor]:
    """The token in each place of all blocks, and the place of each token; `real` are the rows that somebody reads."""
    starts, ends = rows.T
    longest = np.repeat([block.T for block in blocks], [block.rows for block in blocks])
    first_places = np.cumsum(longest) - longest
    token_P = np.arange(longest.sum()) - np.repeat(first_places - starts, longest)
    token_P = np.minimum(token_P, np.repeat(ends - 1, longest))
    order = real[np.argsort(starts[real])]
    counts = (ends - starts)[order]
    place_T = np.arange(counts.sum()) + np.repeat((first_places - starts)[order], counts)
    return torch.from_numpy(token_P), torch.from_numpy(place_T)


def _coarse(size: int) -> int:
    """Up to the next number of four significant bits: at most an eighth more."""
    return size + -size % (1 << max(0, size.bit_length() - 4))


def _by_block(blocks: list[Block], q_PHK: Tensor, k_PGK: Tensor, v_PGK: Tensor) -> list[list[Tensor]]:
    """Tokens [P, H, K] as [B, H, T or S, K] of each block."""
    out = []
    for x, name in ((q_PHK, "T"), (k_PGK, "S"), (v_PGK, "S")):
        sizes = [(block.rows, getattr(block, name)) for block in blocks]
        parts = x.split([rows * length for rows, length in sizes]) if len(sizes) > 1 else (x,)
        out.append([part.unflatten(0, size).transpose(1, 2) for part, size in zip(parts, sizes)])
    return out


class _Pad(torch.autograd.Function):
    """Tokens into places. One that repeats a token has no gradient, so that the backward gathers and adds nothing."""

    @staticmethod
    def forward(ctx, x_THK: Tensor, token_P: Tensor, place_T: Tensor) -> Tensor:
        ctx.place_T = place_T
        return x_THK.index_select(0, token_P)

    @staticmethod
    def backward(ctx, grad_PHK: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad_PHK.index_select(0, ctx.place_T), None, None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_PHK: Tensor, place_T: Tensor) -> Tensor:
        ctx.places, ctx.place_T = len(x_PHK), place_T
        return x_PHK.index_select(0, place_T)

    @staticmethod
    def backward(ctx, grad_THK: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad_THK.new_zeros(ctx.places, *grad_THK.shape[1:]).index_copy_(0, ctx.place_T, grad_THK), None
