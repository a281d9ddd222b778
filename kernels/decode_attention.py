"""Attention of one new query a row over a long cache of keys and values, rows of different lengths.

`decode_attention` takes queries, and a cache that holds the new keys. `decode_step_attention` takes the joined product
as it is: norms of heads, rotary embedding and the write to the cache are the start of the same kernel.
Letters: B rows, S room in the cache, H heads, G key/value heads, R = H / G queries that share one, K head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels.decode_tile import wait
from minillava.kernels.flash import LOG2_E, _once, _put_both, _tile, _times, aligned, choose, parts, takes, unit
from minillava.kernels.frame import card_of, contiguous, jit, launch, register, shapes, tl, wide
from minillava.kernels.rms_norm import rms_norm

# On a CPU rows of different lengths go through SDPA in one masked call, unless the keys and values that it reads in
# vain are more than this many numbers a row: then a call a row is faster (about 12 us of calling, two cores).
READ_IN_VAIN = 120_000

# -- reference ---------------------------------------------------------------------------------------------------------


def reference(q_BHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, lengths_B: Tensor, scale: float, window: int) -> Tensor:
    """The formula in plain PyTorch."""
    q_BGRK = q_BHK.unflatten(1, (k_BSGK.shape[2], -1)) * scale
    hidden_BS = _hidden(lengths_B, 0, k_BSGK.shape[1], window)[:, None, None]
    scores = torch.einsum("bgrk,bsgk->bgrs", q_BGRK, k_BSGK)
    p_BGRS = scores.to(wide(scores)).masked_fill(hidden_BS, float("-inf"))
    p_BGRS = p_BGRS.softmax(-1).masked_fill(hidden_BS, 0.0)  # not NaN for a row without keys
    o_BGRK = torch.einsum("bgrs,bsgk->bgrk", p_BGRS.to(v_BSGK.dtype), v_BSGK)
    return o_BGRK.flatten(1, 2)


def _hidden(lengths_B: Tensor, start: int, end: int, window: int) -> Tensor:
    """Which of the keys from `start` to `end` each row does not see, [B, end - start]."""
    keys_S, lengths_B1 = torch.arange(start, end, device=lengths_B.device), lengths_B[:, None]
    hidden_BS = keys_S >= lengths_B1
    return hidden_BS | (keys_S < lengths_B1 - window) if window else hidden_BS


def plain(q_BHK, k_BSGK, v_BSGK, lengths_B, scale, window) -> Tensor:
    """SDPA. The query heads of a key/value head go through as its queries, so no key is repeated: on a CPU 2.4 times as
    fast as SDPA's own grouping (8 heads a group, 700 tokens)."""
    lengths = lengths_B.tolist()
    starts = [max(0, length - window) if window else 0 for length in lengths]
    B, _, G, K = k_BSGK.shape
    first, last = min(starts, default=0), max(lengths, default=0)
    q_BGRK, k_BGSK, v_BGSK = q_BHK.unflatten(1, (G, -1)), k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2)
    in_vain = (B * (last - first) - sum(lengths) + sum(starts)) * G * 2 * K
    if in_vain > B * READ_IN_VAIN or (in_vain and not min(lengths)) or not last:
        o_BGRK = torch.zeros_like(q_BGRK)
        for b, (start, end) in enumerate(zip(starts, lengths)):
            if end:
                k, v = (x[b : b + 1, :, start:end] for x in (k_BGSK, v_BGSK))
                o_BGRK[b] = F.scaled_dot_product_attention(q_BGRK[b : b + 1], k, v, scale=scale)[0]
        return o_BGRK.flatten(1, 2)
    mask = None
    if in_vain:
        hidden_BS = _hidden(lengths_B, first, last, window)
        mask = torch.zeros_like(hidden_BS, dtype=q_BHK.dtype).masked_fill_(hidden_BS, float("-inf"))[:, None, None]
    k, v = k_BGSK[:, :, first:last], v_BGSK[:, :, first:last]
    return F.scaled_dot_product_attention(q_BGRK, k, v, attn_mask=mask, scale=scale).flatten(1, 2).contiguous()


def step_reference(
    qkv_BN, cos_BK, sin_BK, q_norm_K, k_norm_K, eps: float, k_BSGK, v_BSGK, positions_B, scale: float
) -> Tensor:
    """One step after the other: norms, rotary embedding, the write at `positions_B`, attention [B, H K]."""
    G, K = k_BSGK.shape[2:]
    q_BHK, k_BGK, v_BGK = qkv_BN.unflatten(1, (-1, K)).split((qkv_BN.shape[1] // K - 2 * G, G, G), 1)
    q_BHK, k_BGK = (x if norm is None else rms_norm(x, norm, eps) for x, norm in ((q_BHK, q_norm_K), (k_BGK, k_norm_K)))
    q_BHK, k_BGK = (torch.addcmul(x * cos_BK[:, None], x.roll(K // 2, -1), sin_BK[:, None]) for x in (q_BHK, k_BGK))
    rows_B = torch.arange(len(positions_B), device=positions_B.device)
    for cache, new in ((k_BSGK, k_BGK), (v_BSGK, v_BGK)):
        cache.index_put_((rows_B, positions_B), new)
    return _decode(q_BHK, k_BSGK, v_BSGK, positions_B + 1, scale, 0).flatten(1)


# -- Triton ------------------------------------------------------------------------------------------------------------


@jit
def _turned(x_ptr, norm_ptr, cos_ptr, sin_ptr, eps, rows, K: tl.constexpr, COLUMN: tl.constexpr, ROWS: tl.constexpr,
            WIDTH: tl.constexpr, HEAD: tl.constexpr):  # fmt: skip
    """Columns COLUMN on of heads [rows, K], normed and turned, in fp32: x cos + partner sin, half a head apart, where
    the first half of sin is negated."""
    r, column, whole = tl.arange(0, ROWS)[:, None], (COLUMN + tl.arange(0, WIDTH))[None, :], tl.arange(0, HEAD)[None, :]
    partner = (column + K // 2) % K
    keep = (r < rows) & (column < K)
    x = tl.load(x_ptr + r * K + column, mask=keep, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + r * K + partner, mask=keep, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        all = tl.load(x_ptr + r * K + whole, mask=(r < rows) & (whole < K), other=0.0).to(tl.float32)
        rstd = (1.0 / tl.sqrt_rn(tl.sum(all * all, 1) / K + eps))[:, None]
        x *= rstd * tl.load(norm_ptr + column, mask=column < K, other=0.0).to(tl.float32)
        y *= rstd * tl.load(norm_ptr + partner).to(tl.float32)
    cos = tl.load(cos_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    return x * cos + y * tl.load(sin_ptr + column, mask=column < K, other=0.0).to(tl.float32)


@jit
def _new_part(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, eps, k_ptr, v_ptr, g, G, R, K: tl.constexpr,
    COLUMN: tl.constexpr, BLOCK_R: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Columns COLUMN on of the queries; of the new key and value, which share 0 writes to the cache; their scores."""
    TYPE: tl.constexpr = k_ptr.dtype.element_ty
    q = _turned(qkv_ptr + g * R * K, q_norm_ptr, cos_ptr, sin_ptr, eps, R, K, COLUMN, BLOCK_R, WIDTH, HEAD).to(TYPE)
    key_ptr = qkv_ptr + (G * R + g) * K
    k = _turned(key_ptr, k_norm_ptr, cos_ptr, sin_ptr, eps, 1, K, COLUMN, 1, WIDTH, HEAD).to(TYPE)
    column = (COLUMN + tl.arange(0, WIDTH))[None, :]
    v = tl.load(key_ptr + G * K + column, mask=column < K, other=0.0)
    mine = column < tl.where(tl.program_id(1) == 0, K, 0)
    tl.store(k_ptr + column, k, mask=mine)
    tl.store(v_ptr + column, v, mask=mine)
    return q, v.to(tl.float32), tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)


# ---- the loop over the cache ----


@jit
def _share(length, window, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr):
    """The keys of this program's share of a row, in whole blocks: the device knows the length, the host does not."""
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    blocks = tl.cdiv(tl.cdiv(length - first, BLOCK_S), SPLITS)
    start = first + tl.program_id(1) * blocks * BLOCK_S
    return start, tl.minimum(start + blocks * BLOCK_S, length)


@jit
def _put_share(out_ptr, lse_ptr, acc0, acc1, m, l, R, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
               BLOCK_R: tl.constexpr):  # fmt: skip
    """Write what R queries saw in a share of the keys, and the base 2 log sum exp: 0 and -inf where there was none."""
    keyless = l == 0.0
    inverse = (1.0 / tl.where(keyless, 1.0, l))[:, None]
    heads = tl.arange(0, BLOCK_R)
    lse = tl.where(keyless, -float("inf"), m + tl.log2(tl.where(keyless, 1.0, l)))
    tl.store(lse_ptr + heads, lse, mask=heads < R)
    _put_both(out_ptr, acc0 * inverse, acc1 * inverse, 0, R, K, K, BLOCK_R, MAIN, TAIL, False)


@jit
def _decode_split(
    q_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, lengths_ptr, o_ptr, partial_ptr, lse_ptr,
    G, R, eps, scale, window, k_b, k_s, k_g, v_b, v_s, v_g, K: tl.constexpr, UNIT: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Online softmax of the R queries that share a key/value head over a share of a row's keys: a program for each
    (row, head, share). Reads every key and value once, 4 R FLOPs for each two numbers. With one share writes o,
    otherwise partial [B, G, SPLITS, R, K] in fp32; the base 2 log sum exp [B, G, SPLITS, R] always. With tables of
    cosines q is the joined product [B, (H + 2 G) K], lengths are without the new token, and share 0 begins with it."""
    wait(PDL)
    program = tl.program_id(0)
    b, g = (program // G).to(tl.int64), program % G
    length = tl.load(lengths_ptr + b).to(tl.int32)
    start, end = _share(length, window, SPLITS, BLOCK_S)
    k_s, v_s = k_s * UNIT, v_s * UNIT
    k_ptr += b * (k_b * UNIT) + g * (k_g * UNIT)
    v_ptr += b * (v_b * UNIT) + g * (v_g * UNIT)
    m = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_R,), tl.float32)
    acc0 = tl.zeros((BLOCK_R, MAIN), tl.float32)
    acc1 = tl.zeros((BLOCK_R, TAIL if TAIL else 16), tl.float32)
    if cos_ptr is None:
        q0, q1 = _once(q_ptr + (b * G + g) * R * K, 0, R, K, 0, K, BLOCK_R, MAIN, TAIL, False)
    else:
        HEAD: tl.constexpr = MAIN if TAIL == 0 else 2 * MAIN
        q_ptr += b * (G * (R + 2) * K)
        new_k, new_v = k_ptr + length.to(tl.int64) * k_s, v_ptr + length.to(tl.int64) * v_s
        q0, new0, score = _new_part(q_ptr, q_norm_ptr, k_norm_ptr, cos_ptr + b * K, sin_ptr + b * K, eps, new_k,
                                new_v, g, G, R, K, 0, BLOCK_R, MAIN, HEAD)  # fmt: skip
        q1 = q0
        here = tl.where(tl.program_id(1) == 0, 1.0, 0.0)
        acc0 += new0 * here
        if TAIL:
            q1, new1, more = _new_part(q_ptr, q_norm_ptr, k_norm_ptr, cos_ptr + b * K, sin_ptr + b * K, eps,
                                       new_k, new_v, g, G, R, K, MAIN, BLOCK_R, TAIL, HEAD)  # fmt: skip
            acc1 += new1 * here
            score += more
        m = tl.where(here > 0.0, score * scale, -float("inf"))
        l += here
    for row in tl.range(start, end, BLOCK_S):
        s, _k0, _k1 = _times(q0, q1, k_ptr, k_ptr, row, length, 0, k_s, 0, K, BLOCK_S, MAIN, TAIL, False)
        s = tl.where((row + tl.arange(0, BLOCK_S) < end)[None, :], s * scale, -float("inf"))
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
    share = (b * G + g) * SPLITS + tl.program_id(1)
    out_ptr = o_ptr + (b * G + g) * R * K if SPLITS == 1 else partial_ptr + share * R * K
    _put_share(out_ptr, lse_ptr + share * R, acc0, acc1, m, l, R, K, MAIN, TAIL, BLOCK_R)


@jit
def _decode_combine(partial_ptr, lse_ptr, o_ptr, R, K: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
                    PDL: tl.constexpr):  # fmt: skip
    """o of a query from its shares, weighted by their sums of exponentials."""
    wait(PDL)
    group, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    shares, columns = tl.arange(0, SPLITS), tl.arange(0, BLOCK_K)
    at = (group * SPLITS + shares) * R + head
    lse = tl.load(lse_ptr + at)
    highest = tl.max(lse, 0)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    weight = tl.exp2(lse - highest)
    total = tl.sum(weight, 0)
    total = tl.where(total == 0.0, 1.0, total)
    part = tl.load(partial_ptr + at[:, None] * K + columns[None, :], mask=(columns < K)[None, :], other=0.0)
    o = tl.sum(part * weight[:, None], 0) / total
    tl.store(o_ptr + (group * R + head) * K + columns, o.to(o_ptr.dtype.element_ty), mask=columns < K)


# -- wrapper -----------------------------------------------------------------------------------------------------------


def decode_attention(
    q_BHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    lengths_B: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v of one query a row over the first `lengths_B[b]` keys of row b: [B, H, K].

    The cache k, v [B, S, G, K] may have any strides (a transposed [B, G, S, K] too); what it holds after a row's length
    does not count if it is finite. `lengths_B` is an integer tensor on q's device and includes the new token; a row of
    length 0 gets 0. `window` leaves the last so many keys. No gradient. Raises ValueError when shapes do not fit.
    """
    B, H, K = q_BHK.shape if q_BHK.dim() == 3 else (-1, -1, -1)
    fits = k_BSGK.dim() == 4 and k_BSGK.shape == v_BSGK.shape and (k_BSGK.shape[0], k_BSGK.shape[3]) == (B, K)
    fits &= lengths_B.shape == (B,) and q_BHK.dtype == k_BSGK.dtype == v_BSGK.dtype
    if not fits or H % max(k_BSGK.shape[2], 1):
        raise ValueError(
            f"decode_attention: want q [B, H, K], k and v [B, S, G, K] of one dtype, lengths [B], "
            f"got {shapes(q=q_BHK, k=k_BSGK, v=v_BSGK, lengths=lengths_B)}"
        )
    scale = K**-0.5 if scale is None else scale
    return _decode(q_BHK, k_BSGK, v_BSGK, lengths_B, scale, window or 0)


def decode_step_attention(
    qkv_BN: Tensor, rotary: tuple[Tensor, Tensor], k_BSGK: Tensor, v_BSGK: Tensor, positions_B: Tensor,
    q_norm_K: Tensor | None = None, k_norm_K: Tensor | None = None, eps: float = 0.0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention [B, H K] of a decode step from the joined product of q, k and v [B, (H + 2 G) K].

    Queries and new keys are normed where there are weights [K], turned by `rotary` (cos and sin [B, 1, K], sin's first
    half negated), and keys and values written to the cache [B, S, G, K] at `positions_B`, which is also how many keys
    each row had before. No gradient. Raises ValueError when shapes do not fit.
    """
    B, _, G, K = k_BSGK.shape
    heads = qkv_BN.shape[-1] / K - 2 * G
    cos_BK, sin_BK = (x.view(-1, K) for x in rotary)
    fits = k_BSGK.shape == v_BSGK.shape and len(qkv_BN) == len(positions_B) == len(cos_BK) == B
    if not fits or heads < 1 or heads % G:
        got = shapes(qkv=qkv_BN, k=k_BSGK, v=v_BSGK, positions=positions_B, cos=cos_BK)
        raise ValueError(f"decode_step_attention: want qkv [B, (H + 2 G) K], k and v [B, S, G, K], got {got}")
    scale = K**-0.5 if scale is None else scale
    return _step(qkv_BN, cos_BK, sin_BK, q_norm_K, k_norm_K, eps, k_BSGK, v_BSGK, positions_B, scale)


def triton_decode(q_BHK, k_BSGK, v_BSGK, lengths_B, scale, window, config: dict | None = None) -> Tensor:
    """`plain` by the kernels. How many programs share a row follows from rows, heads and room, not from lengths."""
    if not takes(q_BHK, scale) or not q_BHK.numel() or not k_BSGK.shape[1]:
        if q_BHK.is_cuda:  # asks nothing of the host, so that a decode step can be captured in fp32 too
            return reference(q_BHK, k_BSGK, v_BSGK, lengths_B, scale, window)
        return plain(q_BHK, k_BSGK, v_BSGK, lengths_B, scale, window)
    start = q_BHK.contiguous(), None, None, None, None
    o_BHK = torch.empty_like(start[0])
    _launch(start, 0.0, aligned(k_BSGK), aligned(v_BSGK), lengths_B, o_BHK, scale, window, config)
    return o_BHK


def triton_step(
    qkv_BN, cos_BK, sin_BK, q_norm_K, k_norm_K, eps: float, k_BSGK, v_BSGK, positions_B, scale: float,
    config: dict | None = None,
) -> Tensor:  # fmt: skip
    """`step_reference` in one kernel, two where several programs share a row."""
    G, K = k_BSGK.shape[2:]
    q_BHK = qkv_BN[:, : qkv_BN.shape[1] - 2 * G * K].unflatten(1, (-1, K))
    written = aligned(k_BSGK) is k_BSGK and aligned(v_BSGK) is v_BSGK  # a copy would not be the cache
    if not takes(q_BHK, scale) or not q_BHK.numel() or not written or qkv_BN.dtype != k_BSGK.dtype:
        return step_reference(qkv_BN, cos_BK, sin_BK, q_norm_K, k_norm_K, eps, k_BSGK, v_BSGK, positions_B, scale)
    o_BHK = q_BHK.new_empty(q_BHK.shape)
    start = tuple(map(contiguous, (qkv_BN, q_norm_K, k_norm_K, cos_BK, sin_BK)))
    _launch(start, eps, k_BSGK, v_BSGK, positions_B, o_BHK, scale, 0, config)
    return o_BHK.flatten(1)


def _launch(start: tuple, eps: float, k_BSGK, v_BSGK, lengths_B, o_BHK, scale, window, config: dict | None) -> None:
    """The kernels, from what queries are made of."""
    (B, H, K), (S, G) = o_BHK.shape, k_BSGK.shape[1:3]
    R, config = H // G, config or choose("decode", o_BHK, S)
    splits = shares(B * G, S, config, card_of(o_BHK).multiprocessors)
    partial = o_BHK.new_empty((B, G, splits, R, K) if splits > 1 else 0, dtype=torch.float32)
    lse = o_BHK.new_empty(B, G, splits, R, dtype=torch.float32)
    strides = [stride // unit(x) for x in (k_BSGK, v_BSGK) for stride in x.stride()[:3]]
    sizes = {"K": K, "UNIT": unit(o_BHK), **parts(K), "BLOCK_R": max(16, 1 << (R - 1).bit_length())}
    sizes |= {"BLOCK_S": config["block_n"], "SPLITS": splits}
    tensors = *start, k_BSGK, v_BSGK, lengths_B.contiguous(), o_BHK, partial, lse
    args = *tensors, G, R, eps, scale * LOG2_E, window, *strides
    launch(_decode_split, (B * G, splits), *args, config=config, **sizes)
    if splits > 1:
        block = 1 << (K - 1).bit_length()
        launch(_decode_combine, (B * G, R), partial, lse, o_BHK, R, K=K, BLOCK_K=block, SPLITS=splits)


def shares(rows: int, S: int, config: dict, multiprocessors: int) -> int:
    """A power of two: enough programs for the card, but at least four blocks of keys in each of a full row's; one where
    there are rows for every multiprocessor, as a second kernel costs more than it gains."""
    if rows >= multiprocessors:
        return 1
    wanted = min(config["programs"] * multiprocessors // rows, S // (4 * config["block_n"]), 128)
    return 1 << max(0, wanted.bit_length() - 1)


_decode = register(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor lengths, float scale, SymInt window) -> Tensor",
    plain=plain,
    cuda=triton_decode,
    fake=lambda q, *_: q.new_empty(q.shape),
)
_step = register(
    "decode_step_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor? q_norm, Tensor? k_norm, float eps,"
    " Tensor(a!) k, Tensor(b!) v, Tensor positions, float scale) -> Tensor",
    plain=step_reference,
    cuda=triton_step,
    fake=lambda qkv, cos, sin, q_norm, k_norm, eps, k, *_: qkv.new_empty(
        qkv.shape[0], qkv.shape[1] - 2 * k.shape[2] * k.shape[3]
    ),
)
