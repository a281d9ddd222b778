"""The backward of flash attention in Triton (arXiv 2307.08691): two kernels that agree to the bit in every run, or one.

Probabilities are computed again from the log sum exp. Two kernels: one goes over tiles of keys and makes dk and dv, one
over tiles of queries and makes dq; 14 FLOPs a query, key and number of a head, each result written once. One kernel, 10
FLOPs: the first adds its shares of dq in memory (reduced by the tensor memory accelerator on Hopper), in any order.
Letters as in flash.py.
"""

from itertools import pairwise

import torch
from torch import Tensor

from minillava.kernels.flash import (
    _at,
    _entry,
    _inside,
    _keys_seen,
    _once,
    _put_both,
    _seen,
    _tile,
    _times,
    _views,
    aligned,
    choose,
    constants,
    strides,
    tiles,
)
from minillava.kernels.frame import coordinate, jit, launch, tl

# -- Triton ------------------------------------------------------------------------------------------------------------


@jit
def _delta(o_ptr, do_ptr, delta_ptr, T, H, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """delta [H, T] = sum over a head of o do, what the backward of softmax subtracts. Reads two numbers for each."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_K)
    at = (rows.to(tl.int64) * H + head)[:, None] * K + columns[None, :]
    keep = (rows < T)[:, None] & (columns < K)[None, :]
    o = tl.load(o_ptr + at, mask=keep, other=0.0).to(tl.float32)
    do = tl.load(do_ptr + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(delta_ptr + head * T + rows, tl.sum(o * do, 1), mask=rows < T)


@jit
def _lse_and_delta(lse_ptr, delta_ptr, at, keep):
    """In base 2; a query that has no key (or does not exist) gets +inf, which makes its probabilities 0."""
    lse = tl.load(lse_ptr + at, mask=keep, other=float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), lse) * 1.4426950408889634
    return lse, tl.load(delta_ptr + at, mask=keep, other=0.0)


@jit
def _probabilities(exponents):
    """At most 1, so that a key outside its sequence, whose numbers are zeros, adds nothing: never inf times 0."""
    return tl.exp2(tl.minimum(exponents, 0.0))


@jit
def _queries_that_see(first, q_len, level, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_N: tl.constexpr):  # fmt: skip
    """The first query that sees some key of the tile at `first`, in whole tiles, and how many tiles there are."""
    start, stop = 0, q_len
    if CAUSAL:
        start = tl.maximum(first - level, 0) // BLOCK_M * BLOCK_M
        if WINDOW:
            stop = tl.minimum(q_len, first + BLOCK_N - 1 + window - level)
    return start, tl.maximum(tl.cdiv(stop - start, BLOCK_M), 0)


@jit
def _flash_backward_keys(
    k_ptr, v_ptr, q_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dq_ptr, table_ptr, T, H, R, scale, window,
    q_t, q_h, k_s, k_g, v_s, v_g,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, K: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, over the queries of all heads that share it: p^T do and ds^T q, with
    ds = p (do v^T - delta), p from lse. 8 FLOPs a query, key and number of a head.

    With REDUCE the tile's share of dq is added to fp32 dq in memory as well (10 FLOPs, in any order); without,
    `_flash_backward_queries` makes it. dtypes and sizes as forward.
    """
    G = H // R
    group = tl.program_id(0) % G
    q_start, q_len, k_start, k_len, first = _entry(table_ptr, tl.program_id(0) // G)
    q_t, q_h, k_s, k_g, v_s, v_g = q_t * UNIT, q_h * UNIT, k_s * UNIT, k_g * UNIT, v_s * UNIT, v_g * UNIT
    k_ptr += k_start * k_s + group * k_g
    v_ptr += k_start * v_s + group * v_g
    q_ptr += q_start * q_t + group * R * q_h
    do_ptr += (q_start * H + group * R) * K
    dq_ptr += (q_start * H + group * R) * K
    at = group * R * T + q_start
    o_t = H * K
    k0, k1 = _once(k_ptr, first, k_len, k_s, k_g, K, BLOCK_N, MAIN, TAIL, TMA)
    v0, v1 = _once(v_ptr, first, k_len, v_s, v_g, K, BLOCK_N, MAIN, TAIL, TMA)
    q0_view, q1_view = _views(q_ptr, q_len, R, q_t, q_h, K, BLOCK_M, MAIN, TAIL, TMA)
    do0_view, do1_view = _views(do_ptr, q_len, R, o_t, K, K, BLOCK_M, MAIN, TAIL, TMA)
    if REDUCE:
        dq0_view, dq1_view = _views(dq_ptr, q_len, R, o_t, K, K, BLOCK_M, MAIN, TAIL, TMA)
    dk0, dv0 = tl.zeros((BLOCK_N, MAIN), tl.float32), tl.zeros((BLOCK_N, MAIN), tl.float32)
    WIDTH1: tl.constexpr = TAIL if TAIL else 16
    dk1, dv1 = tl.zeros((BLOCK_N, WIDTH1), tl.float32), tl.zeros((BLOCK_N, WIDTH1), tl.float32)
    columns = (first + tl.arange(0, BLOCK_N))[:, None]
    level = k_len - q_len
    start, tiles = _queries_that_see(first, q_len, level, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    for i in tl.range(0, R * tiles, warp_specialize=SPECIALIZE):
        head = i // tiles
        row = start + (i % tiles) * BLOCK_M
        rows = row + tl.arange(0, BLOCK_M)
        s, q0, q1 = _times(k0, k1, q0_view, q1_view, row, q_len, head, q_t, q_h, K, BLOCK_M, MAIN, TAIL, TMA)
        lse, delta = _lse_and_delta(lse_ptr, delta_ptr, at + head * T + rows, rows < q_len)
        p = _probabilities(s * (scale * 1.4426950408889634) - lse[None, :])
        if CAUSAL:
            p = tl.where(_seen(rows[None, :], columns, level, k_len, window, CAUSAL, WINDOW), p, 0.0)
        dp, do0, do1 = _times(v0, v1, do0_view, do1_view, row, q_len, head, o_t, K, K, BLOCK_M, MAIN, TAIL, TMA)
        dv0 = tl.dot(p.to(do0.dtype), do0, dv0, input_precision="ieee")
        if TAIL:
            dv1 = tl.dot(p.to(do0.dtype), do1, dv1, input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q0.dtype)
        dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
        if TAIL:
            dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
        if REDUCE:
            _add(dq0_view, ds, k0, scale, row, q_len, head, o_t, K, 0, BLOCK_M, MAIN, TMA)
            if TAIL:
                _add(dq1_view, ds, k1, scale, row, q_len, head, o_t, K, MAIN, BLOCK_M, TAIL, TMA)
    own = (k_start * G + group) * K
    _put_both(dk_ptr + own, dk0 * scale, dk1 * scale, first, k_len, G * K, K, BLOCK_N, MAIN, TAIL, TMA)
    _put_both(dv_ptr + own, dv0, dv1, first, k_len, G * K, K, BLOCK_N, MAIN, TAIL, TMA)


@jit
def _add(view, ds, k, scale, row, rows, head, stride_t, K: tl.constexpr, COLUMN: tl.constexpr, ROWS: tl.constexpr,
         WIDTH: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Add a share of dq to memory, whoever else does."""
    tile = tl.dot(ds.T, k, input_precision="ieee") * scale
    if TMA:
        view.atomic_add([coordinate(row), coordinate(head * K + COLUMN)], tile)
    else:
        at = _at(view, row, head, stride_t, K, COLUMN, ROWS, WIDTH)
        tl.atomic_add(at, tile, mask=_inside(row, rows, K, COLUMN, ROWS, WIDTH), sem="relaxed")


@jit
def _flash_backward_queries(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, table_ptr, T, H, R, scale, window,
    q_t, q_h, k_s, k_g, v_s, v_g,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, K: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dq = ds k scale of one tile of queries: the same to the bit in every run. 6 FLOPs a query, key and number."""
    program = tl.program_id(0)
    head = program % H
    q_start, q_len, k_start, k_len, first = _entry(table_ptr, program // H)
    q_t, q_h, k_s, k_g, v_s, v_g = q_t * UNIT, q_h * UNIT, k_s * UNIT, k_g * UNIT, v_s * UNIT, v_g * UNIT
    q_ptr += q_start * q_t + head * q_h
    k_ptr += k_start * k_s + (head // R) * k_g
    v_ptr += k_start * v_s + (head // R) * v_g
    do_ptr += (q_start * H + head) * K
    o_t = H * K
    q0, q1 = _once(q_ptr, first, q_len, q_t, q_h, K, BLOCK_M, MAIN, TAIL, TMA)
    do0, do1 = _once(do_ptr, first, q_len, o_t, K, K, BLOCK_M, MAIN, TAIL, TMA)
    k0_view, k1_view = _views(k_ptr, k_len, 1, k_s, k_g, K, BLOCK_N, MAIN, TAIL, TMA)
    v0_view, v1_view = _views(v_ptr, k_len, 1, v_s, v_g, K, BLOCK_N, MAIN, TAIL, TMA)
    dq0 = tl.zeros((BLOCK_M, MAIN), tl.float32)
    dq1 = tl.zeros((BLOCK_M, TAIL if TAIL else 16), tl.float32)
    rows = first + tl.arange(0, BLOCK_M)
    lse, delta = _lse_and_delta(lse_ptr, delta_ptr, head * T + q_start + rows, rows < q_len)
    level = k_len - q_len
    start, end, _by_all = _keys_seen(first, k_len, level, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    for n in tl.range(start, end, BLOCK_N):
        columns = (n + tl.arange(0, BLOCK_N))[None, :]
        k0 = _tile(k0_view, n, k_len, 0, k_s, k_g, K, 0, BLOCK_N, MAIN, TMA)
        v0 = _tile(v0_view, n, k_len, 0, v_s, v_g, K, 0, BLOCK_N, MAIN, TMA)
        s = tl.dot(q0, k0.T, input_precision="ieee")
        dp = tl.dot(do0, v0.T, input_precision="ieee")
        if TAIL:
            k1 = _tile(k1_view, n, k_len, 0, k_s, k_g, K, MAIN, BLOCK_N, TAIL, TMA)
            v1 = _tile(v1_view, n, k_len, 0, v_s, v_g, K, MAIN, BLOCK_N, TAIL, TMA)
            s = tl.dot(q1, k1.T, s, input_precision="ieee")
            dp = tl.dot(do1, v1.T, dp, input_precision="ieee")
        p = _probabilities(s * (scale * 1.4426950408889634) - lse[:, None])
        if CAUSAL:
            p = tl.where(_seen(rows[:, None], columns, level, k_len, window, CAUSAL, WINDOW), p, 0.0)
        ds = (p * (dp - delta[:, None])).to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
        if TAIL:
            dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    dq_ptr += (q_start * H + head) * K
    _put_both(dq_ptr, dq0 * scale, dq1 * scale, first, q_len, o_t, K, BLOCK_M, MAIN, TAIL, TMA)


# -- wrapper -----------------------------------------------------------------------------------------------------------


def backward(
    do, q, k, v, o, lse, cu_q, cu_k, causal, window, scale, found: dict[str, dict] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """attention.plain_backward by the kernels: one, which adds to dq in memory, or two, the same to the bit every time.

    `found` holds configurations: {"backward": ...}, or {"backward_keys": ..., "backward_queries": ...} for two kernels,
    which are taken too when torch.use_deterministic_algorithms says so.
    """
    T, H, K = q.shape
    names = ("backward_keys", "backward_queries") if torch.are_deterministic_algorithms_enabled() else ("backward",)
    longest = max(b - a for a, b in pairwise(cu_q))
    found = found or {name: choose(name, q, longest) for name in names}
    q, k, v, do, o = aligned(q), aligned(k), aligned(v), aligned(do.contiguous()), o.contiguous()
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    dq = q.new_zeros(q.shape, dtype=torch.float32) if "backward" in found else q.new_empty(q.shape)
    if not T or not len(k):
        return dq.to(q.dtype).zero_(), dk.zero_(), dv.zero_()
    delta = torch.empty_like(lse)
    launch(_delta, (-(-T // 32), H), o, do, delta, T, H, K=K, BLOCK_T=32, BLOCK_K=1 << (K - 1).bit_length())
    common = (T, H, H // k.shape[1], scale, window, *strides(q, k, v))
    shape = (tuple(cu_q), tuple(cu_k))
    for name, config in found.items():
        keys = name != "backward_queries"
        table = tiles(*shape, keys, config["block_n" if keys else "block_m"], causal, q.device)
        settings = constants(q, causal, window, config)
        if not keys:
            args = (q, k, v, do, lse, delta, dq, table, *common)
            launch(_flash_backward_queries, (len(table) * H,), *args, config=config, **settings)
            continue
        args = (k, v, q, do, lse, delta, dk, dv, dq, table, *common)
        reduce = name == "backward"
        launch(_flash_backward_keys, (len(table) * k.shape[1],), *args, config=config, REDUCE=reduce, **settings)
    return dq.to(q.dtype), dk, dv
