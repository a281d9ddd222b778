"""Attention of one new query a row over a long cache of keys and values, rows of different lengths.

Letters: B rows, S room in the cache, H heads, G key/value heads, R = H / G queries that share one, K head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels.flash import LOG2_E, _put, _tile, aligned, choose, parts, takes, unit
from minillava.kernels.frame import card_of, jit, launch, register, shapes, tl

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


# -- Triton ------------------------------------------------------------------------------------------------------------


@jit
def _share(length, window, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr):
    """The keys of this program's share of a row, in whole blocks: the device knows the length, the host does not."""
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    blocks = tl.cdiv(tl.cdiv(length - first, BLOCK_S), SPLITS)
    start = first + tl.program_id(1) * blocks * BLOCK_S
    return start, tl.minimum(start + blocks * BLOCK_S, length)


@jit
def _scores(q0, q1, k_ptr, row, length, k_s, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
            BLOCK_S: tl.constexpr):  # fmt: skip
    """q k^T of BLOCK_S keys from `row` on."""
    k0 = _tile(k_ptr, row, length, 0, k_s, 0, K, 0, BLOCK_S, MAIN, False)
    s = tl.dot(q0, k0.T, input_precision="ieee")
    if TAIL:
        k1 = _tile(k_ptr, row, length, 0, k_s, 0, K, MAIN, BLOCK_S, TAIL, False)
        s = tl.dot(q1, k1.T, s, input_precision="ieee")
    return s


@jit
def _decode_split(
    q_ptr, k_ptr, v_ptr, lengths_ptr, o_ptr, partial_ptr, lse_ptr, G, R, scale, window, k_b, k_s, k_g, v_b, v_s, v_g,
    K: tl.constexpr, UNIT: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Online softmax of the R queries that share a key/value head over a share of a row's keys: a program for each
    (row, head, share). Reads every key and value once, 4 R FLOPs for each two numbers. With one share writes o,
    otherwise partial [B, G, SPLITS, R, K] in fp32; the base 2 log sum exp [B, G, SPLITS, R] always."""
    program = tl.program_id(0)
    b, g = (program // G).to(tl.int64), program % G
    length = tl.load(lengths_ptr + b).to(tl.int32)
    start, end = _share(length, window, SPLITS, BLOCK_S)
    k_s, v_s = k_s * UNIT, v_s * UNIT
    k_ptr += b * (k_b * UNIT) + g * (k_g * UNIT)
    v_ptr += b * (v_b * UNIT) + g * (v_g * UNIT)
    q_ptr += (b * G + g) * R * K
    q0 = _tile(q_ptr, 0, R, 0, K, 0, K, 0, BLOCK_R, MAIN, False)
    q1 = q0
    acc0 = tl.zeros((BLOCK_R, MAIN), tl.float32)
    acc1 = tl.zeros((BLOCK_R, TAIL if TAIL else 16), tl.float32)
    if TAIL:
        q1 = _tile(q_ptr, 0, R, 0, K, 0, K, MAIN, BLOCK_R, TAIL, False)
    m = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_R,), tl.float32)
    for row in tl.range(start, end, BLOCK_S):
        s = _scores(q0, q1, k_ptr, row, length, k_s, K, MAIN, TAIL, BLOCK_S) * scale
        s = tl.where((row + tl.arange(0, BLOCK_S) < end)[None, :], s, -float("inf"))
        highest = tl.maximum(m, tl.max(s, 1))  # finite: a block has at least one key
        p = tl.exp2(s - highest[:, None])
        fade = tl.exp2(m - highest)
        l = l * fade + tl.sum(p, 1)
        m = highest
        v0 = _tile(v_ptr, row, end, 0, v_s, 0, K, 0, BLOCK_S, MAIN, False)
        acc0 = tl.dot(p.to(v0.dtype), v0, acc0 * fade[:, None], input_precision="ieee")
        if TAIL:
            v1 = _tile(v_ptr, row, end, 0, v_s, 0, K, MAIN, BLOCK_S, TAIL, False)
            acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * fade[:, None], input_precision="ieee")
    keyless = l == 0.0
    inverse = (1.0 / tl.where(keyless, 1.0, l))[:, None]
    heads = tl.arange(0, BLOCK_R)
    share = (b * G + g) * SPLITS + tl.program_id(1)
    tl.store(
        lse_ptr + share * R + heads,
        tl.where(keyless, -float("inf"), m + tl.log2(tl.where(keyless, 1.0, l))),
        mask=heads < R,
    )
    out_ptr = o_ptr + (b * G + g) * R * K if SPLITS == 1 else partial_ptr + share * R * K
    _put(out_ptr, acc0 * inverse, 0, R, 0, 1, K, 0, K, 0, BLOCK_R, MAIN, False)
    if TAIL:
        _put(out_ptr, acc1 * inverse, 0, R, 0, 1, K, 0, K, MAIN, BLOCK_R, TAIL, False)


@jit
def _decode_combine(partial_ptr, lse_ptr, o_ptr, R, K: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr):
    """o of a query from its shares, weighted by their sums of exponentials; leaves their log sum exp in share 0."""
    group, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    shares, columns = tl.arange(0, SPLITS), tl.arange(0, BLOCK_K)
    at = (group * SPLITS + shares) * R + head
    lse = tl.load(lse_ptr + at)
    highest = tl.max(lse, 0)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    weight = tl.exp2(lse - highest)
    total = tl.sum(weight, 0)
    keyless = total == 0.0
    total = tl.where(keyless, 1.0, total)
    part = tl.load(partial_ptr + at[:, None] * K + columns[None, :], mask=(columns < K)[None, :], other=0.0)
    o = tl.sum(part * weight[:, None], 0) / total
    tl.store(o_ptr + (group * R + head) * K + columns, o.to(o_ptr.dtype.element_ty), mask=columns < K)
    tl.store(lse_ptr + group * SPLITS * R + head, tl.where(keyless, -float("inf"), highest + tl.log2(total)))


@jit
def _decode_mass(
    q_ptr, k_ptr, lengths_ptr, lse_ptr, mass_ptr, S, G, R, scale, window, k_b, k_s, k_g,
    K: tl.constexpr, UNIT: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Each key's probability, the mean over the heads, for BLOCK_S keys of a row: reads the keys once more."""
    b = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_S
    length = tl.load(lengths_ptr + b).to(tl.int32)
    keys, heads = row + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_R)
    seen = (keys < length) & ((window == 0) | (keys >= length - window))
    k_ptr += b * (k_b * UNIT)
    total = tl.zeros((BLOCK_S,), tl.float32)
    for g in range(0, G):
        group = b * G + g
        q0 = _tile(q_ptr + group * R * K, 0, R, 0, K, 0, K, 0, BLOCK_R, MAIN, False)
        q1 = q0
        if TAIL:
            q1 = _tile(q_ptr + group * R * K, 0, R, 0, K, 0, K, MAIN, BLOCK_R, TAIL, False)
        s = _scores(q0, q1, k_ptr + g * (k_g * UNIT), row, length, k_s * UNIT, K, MAIN, TAIL, BLOCK_S) * scale
        lse = tl.load(lse_ptr + group * SPLITS * R + heads, mask=heads < R, other=float("inf"))
        p = tl.where(seen[None, :] & (heads < R)[:, None], tl.exp2(s - lse[:, None]), 0.0)
        total += tl.sum(p, 0)
    tl.store(mass_ptr + b * S + keys, total / (G * R), mask=keys < S)


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


def triton_decode(
    q_BHK, k_BSGK, v_BSGK, lengths_B, scale, window, mass, config: dict | None = None
) -> tuple[Tensor, Tensor]:
    """`plain` by the kernels. How many programs share a row follows from rows, heads and room, not from lengths."""
    if not takes(q_BHK, scale) or not q_BHK.numel() or not k_BSGK.shape[1]:
        if q_BHK.is_cuda:  # asks nothing of the host, so that a decode step can be captured in fp32 too
            return reference(q_BHK, k_BSGK, v_BSGK, lengths_B, scale, window)
        return plain(q_BHK, k_BSGK, v_BSGK, lengths_B, scale, window, mass)
    (B, H, K), (S, G), none = q_BHK.shape, k_BSGK.shape[1:3], q_BHK.new_empty(0)
    R, config = H // G, config or choose("decode", q_BHK, S)
    q_BHK, k_BSGK, v_BSGK = q_BHK.contiguous(), aligned(k_BSGK), aligned(v_BSGK)
    splits = shares(B * G, S, config, card_of(q_BHK).multiprocessors)
    o_BHK = torch.empty_like(q_BHK)
    partial = q_BHK.new_empty(B, G, splits, R, K, dtype=torch.float32) if splits > 1 else none
    lse = q_BHK.new_empty(B, G, splits, R, dtype=torch.float32)
    k_strides, v_strides = ([stride // unit(x) for stride in x.stride()[:3]] for x in (k_BSGK, v_BSGK))
    sizes = {"K": K, "UNIT": unit(q_BHK), **parts(K), "BLOCK_R": max(16, 1 << (R - 1).bit_length())}
    sizes |= {"BLOCK_S": config["block_n"], "SPLITS": splits}
    common = (G, R, scale * LOG2_E, window, *k_strides)
    args = (q_BHK, k_BSGK, v_BSGK, lengths_B, o_BHK, partial, lse, *common, *v_strides)
    launch(_decode_split, (B * G, splits), *args, config=config, **sizes)
    if splits > 1:
        block = 1 << (K - 1).bit_length()
        launch(_decode_combine, (B * G, R), partial, lse, o_BHK, R, K=K, BLOCK_K=block, SPLITS=splits)
    if not mass:
        return o_BHK, none
    mass_BS = q_BHK.new_empty(B, S, dtype=torch.float32)
    grid = (B, -(-S // config["block_n"]))
    launch(_decode_mass, grid, q_BHK, k_BSGK, lengths_B, lse, mass_BS, S, *common, config=config, **sizes)
    return o_BHK, mass_BS


def shares(rows: int, S: int, config: dict, multiprocessors: int) -> int:
    """A power of two: enough programs for the card, but at least four blocks of keys in each of a full row's."""
    wanted = min(config["programs"] * multiprocessors // rows, S // (4 * config["block_n"]), 128)
    return 1 << max(0, wanted.bit_length() - 1)


def _fake(q_BHK, k_BSGK, v_BSGK, lengths_B, scale, window, mass):
    share = q_BHK.new_empty(k_BSGK.shape[:2], dtype=torch.float32) if mass else q_BHK.new_empty(0)
    return q_BHK.new_empty(q_BHK.shape), share


_decode = register(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor lengths, float scale, SymInt window, bool mass)"
    " -> (Tensor, Tensor)",
    plain=plain,
    cuda=triton_decode,
    fake=_fake,
)
