"""Attention of one new query a row over a long cache of keys and values, rows of different lengths.

Letters: B rows, S room in the cache, H heads, G key/value heads, R = H / G queries that share one, K head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels.frame import register, shapes

# On a CPU rows of different lengths go through SDPA in one masked call, unless the keys and values that it reads in
# vain are more than this many numbers a row: then a call a row is faster (about 12 us of calling, two cores).
READ_IN_VAIN = 120_000

# -- reference ---------------------------------------------------------------------------------------------------------


def reference(q_BHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, lengths_B: Tensor, scale: float, window: int):
    """o [B, H, K] and each key's share of the attention, the mean over the heads [B, S], in plain PyTorch."""
    q_BGRK = q_BHK.unflatten(1, (k_BSGK.shape[2], -1)) * scale
    hidden_BS = _hidden(lengths_B, 0, k_BSGK.shape[1], window)[:, None, None]
    scores = torch.einsum("bgrk,bsgk->bgrs", q_BGRK, k_BSGK)
    p_BGRS = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(hidden_BS, float("-inf"))
    p_BGRS = p_BGRS.softmax(-1).masked_fill(hidden_BS, 0.0)  # not NaN for a row without keys
    o_BGRK = torch.einsum("bgrs,bsgk->bgrk", p_BGRS.to(v_BSGK.dtype), v_BSGK)
    return o_BGRK.flatten(1, 2), p_BGRS.mean((1, 2)).float()


def _hidden(lengths_B: Tensor, start: int, end: int, window: int) -> Tensor:
    """Which of the keys from `start` to `end` each row does not see, [B, end - start]."""
    keys_S, lengths_B1 = torch.arange(start, end, device=lengths_B.device), lengths_B[:, None]
    hidden_BS = keys_S >= lengths_B1
    return hidden_BS | (keys_S < lengths_B1 - window) if window else hidden_BS


def plain(q_BHK, k_BSGK, v_BSGK, lengths_B, scale, window, mass) -> tuple[Tensor, Tensor]:
    """SDPA. The query heads of a key/value head go through as its queries, so no key is repeated: on a CPU 2.4 times as
    fast as SDPA's own grouping (8 heads a group, 700 tokens)."""
    if mass:
        return reference(q_BHK, k_BSGK, v_BSGK, lengths_B, scale, window)
    lengths, none = lengths_B.tolist(), q_BHK.new_empty(0)
    starts = [max(0, length - window) if window else 0 for length in lengths]
    B, _, G, K = k_BSGK.shape
    first, last = min(starts), max(lengths)
    q_BGRK, k_BGSK, v_BGSK = q_BHK.unflatten(1, (G, -1)), k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2)
    in_vain = (B * (last - first) - sum(lengths) + sum(starts)) * G * 2 * K
    if in_vain > B * READ_IN_VAIN or (in_vain and not min(lengths)) or not last:
        o_BGRK = torch.zeros_like(q_BGRK)
        for b, (start, end) in enumerate(zip(starts, lengths)):
            if end:
                k, v = (x[b : b + 1, :, start:end] for x in (k_BGSK, v_BGSK))
                o_BGRK[b] = F.scaled_dot_product_attention(q_BGRK[b : b + 1], k, v, scale=scale)[0]
        return o_BGRK.flatten(1, 2), none
    mask = None
    if in_vain:
        hidden_BS = _hidden(lengths_B, first, last, window)
        mask = torch.zeros_like(hidden_BS, dtype=q_BHK.dtype).masked_fill_(hidden_BS, float("-inf"))[:, None, None]
    k, v = k_BGSK[:, :, first:last], v_BGSK[:, :, first:last]
    return F.scaled_dot_product_attention(q_BGRK, k, v, attn_mask=mask, scale=scale).flatten(1, 2).contiguous(), none


# -- wrapper -----------------------------------------------------------------------------------------------------------


def decode_attention(
    q_BHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    lengths_B: Tensor,
    scale: float | None = None,
    window: int | None = None,
    mass: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v of one query a row over the first `lengths_B[b]` keys of row b: [B, H, K].

    The cache k, v [B, S, G, K] may have any strides (a transposed [B, G, S, K] too); what it holds after a row's length
    does not count if it is finite. `lengths_B` is an integer tensor on q's device and includes the new token; a row of
    length 0 gets 0. `window` leaves the last so many keys. With `mass` also each key's share of the attention, the mean
    over heads, [B, S] in fp32. No gradient. Raises ValueError when shapes do not fit.
    """
    B, H, K = q_BHK.shape if q_BHK.dim() == 3 else (-1, -1, -1)
    fits = k_BSGK.dim() == 4 and k_BSGK.shape == v_BSGK.shape and (k_BSGK.shape[0], k_BSGK.shape[3]) == (B, K)
    if not fits or H % max(k_BSGK.shape[2], 1) or lengths_B.shape != (B,) or not q_BHK.dtype == k_BSGK.dtype:
        raise ValueError(
            f"decode_attention: want q [B, H, K], k and v [B, S, G, K], lengths [B], "
            f"got {shapes(q=q_BHK, k=k_BSGK, v=v_BSGK, lengths=lengths_B)}"
        )
    scale = K**-0.5 if scale is None else scale
    o_BHK, mass_BS = _decode(q_BHK, k_BSGK, v_BSGK, lengths_B, scale, window or 0, mass)
    return (o_BHK, mass_BS) if mass else o_BHK


def _fake(q_BHK, k_BSGK, v_BSGK, lengths_B, scale, window, mass):
    share = q_BHK.new_empty(k_BSGK.shape[:2], dtype=torch.float32) if mass else q_BHK.new_empty(0)
    return q_BHK.new_empty(q_BHK.shape), share


_decode = register(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor lengths, float scale, SymInt window, bool mass)"
    " -> (Tensor, Tensor)",
    plain=plain,
    cuda=plain,
    fake=_fake,
)
