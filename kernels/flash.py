"""Flash attention in Triton (arXiv 2205.14135, 2307.08691, 2407.08608): the forward, and what the backward shares.

A program works on one tile of queries of one head of one sequence; a table of tiles, those with most work first, says
which, so nothing is padded and no program is idle. Softmax in base 2. Head sizes that are no power of two are two
products, as 72 = 64 + 16. Tiles come through pointers (any card) or through the tensor memory accelerator (Hopper and
later), where SPECIALIZE splits the warps into a loader and two consumers. Letters: T queries, S keys, H heads, G
key/value heads, R = H / G query heads that share one, K head size.
"""

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from minillava.kernels import configs
from minillava.kernels.frame import card_of, coordinate, jit, launch, tl

LOG2_E = 1.4426950408889634

# -- Triton ------------------------------------------------------------------------------------------------------------


@jit
def _view(ptr, rows, heads, stride_t, stride_h, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
          TMA: tl.constexpr):  # fmt: skip
    """The numbers [rows, heads, K] at ptr, to be read in tiles of ROWS x WIDTH: a descriptor, or the address itself."""
    if TMA:
        columns = (heads - 1) * stride_h + K
        return tl.make_tensor_descriptor(ptr, [tl.maximum(rows, 1), columns], [stride_t, 1], [ROWS, WIDTH])
    else:
        return ptr


@jit
def _at(ptr, row, head, stride_t, stride_h, COLUMN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses of a tile. Rows count in 64 bits: 174,763 of a 7B decoder's joined q, k, v are 2^31 numbers."""
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)
    return ptr + (rows[:, None] * stride_t + (head * stride_h + COLUMN + tl.arange(0, WIDTH))[None, :])


@jit
def _inside(row, rows, K: tl.constexpr, COLUMN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    keep = ((row + tl.arange(0, ROWS)) < rows)[:, None]
    if COLUMN + WIDTH > K:
        keep = keep & ((COLUMN + tl.arange(0, WIDTH)) < K)[None, :]
    return keep


@jit
def _tile(view, row, rows, head, stride_t, stride_h, K: tl.constexpr, COLUMN: tl.constexpr, ROWS: tl.constexpr,
          WIDTH: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """ROWS x WIDTH numbers from (row, COLUMN) on, zeros outside the sequence and the head; but a descriptor of several
    heads reads on into the next head, whose numbers then meet the zeros of the other factor."""
    if TMA:
        return view.load([coordinate(row), coordinate(head * stride_h + COLUMN)])
    else:
        at = _at(view, row, head, stride_t, stride_h, COLUMN, ROWS, WIDTH)
        return tl.load(at, mask=_inside(row, rows, K, COLUMN, ROWS, WIDTH), other=0.0)


# A head's numbers are one tile or two, MAIN and TAIL wide (`parts`); what stands for a missing second is never read.


@jit
def _once(ptr, row, rows, stride_t, stride_h, K: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr,
          TAIL: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """The tiles of some rows of one head, the only ones to be read there."""
    view = _view(ptr, rows, 1, stride_t, stride_h, K, ROWS, MAIN, TMA)
    x0 = _tile(view, row, rows, 0, stride_t, stride_h, K, 0, ROWS, MAIN, TMA)
    x1 = x0
    if TAIL:
        view = _view(ptr, rows, 1, stride_t, stride_h, K, ROWS, TAIL, TMA)
        x1 = _tile(view, row, rows, 0, stride_t, stride_h, K, MAIN, ROWS, TAIL, TMA)
    return x0, x1


@jit
def _views(ptr, rows, heads, stride_t, stride_h, K: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr,
           TAIL: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    view0 = _view(ptr, rows, heads, stride_t, stride_h, K, ROWS, MAIN, TMA)
    view1 = view0
    if TAIL:
        view1 = _view(ptr, rows, heads, stride_t, stride_h, K, ROWS, TAIL, TMA)
    return view0, view1


@jit
def _times(x0, x1, view0, view1, row, rows, head, stride_t, stride_h, K: tl.constexpr, ROWS: tl.constexpr,
           MAIN: tl.constexpr, TAIL: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """x y^T with the tiles y of some rows, and these."""
    y0 = _tile(view0, row, rows, head, stride_t, stride_h, K, 0, ROWS, MAIN, TMA)
    s = tl.dot(x0, y0.T, input_precision="ieee")
    y1 = y0
    if TAIL:
        y1 = _tile(view1, row, rows, head, stride_t, stride_h, K, MAIN, ROWS, TAIL, TMA)
        s = tl.dot(x1, y1.T, s, input_precision="ieee")
    return s, y0, y1


@jit
def _put(ptr, tile, row, rows, head, heads, stride_t, stride_h, K: tl.constexpr, COLUMN: tl.constexpr,
         ROWS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Write the part of a tile that lies inside."""
    if TMA:
        view = _view(ptr, rows, heads, stride_t, stride_h, K, ROWS, WIDTH, True)
        view.store([coordinate(row), coordinate(head * stride_h + COLUMN)], tile.to(ptr.dtype.element_ty))
    else:
        at = _at(ptr, row, head, stride_t, stride_h, COLUMN, ROWS, WIDTH)
        tl.store(at, tile.to(ptr.dtype.element_ty), mask=_inside(row, rows, K, COLUMN, ROWS, WIDTH))


@jit
def _put_both(ptr, x0, x1, row, rows, stride_t, K: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr,
              TAIL: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Write the tiles of some rows of one head."""
    _put(ptr, x0, row, rows, 0, 1, stride_t, K, K, 0, ROWS, MAIN, TMA)
    if TAIL:
        _put(ptr, x1, row, rows, 0, 1, stride_t, K, K, MAIN, ROWS, TAIL, TMA)


@jit
def _entry(table_ptr, index):
    """A tile's place: start and length of its sequence's queries and keys, its first row."""
    entry = table_ptr + index * 8
    return (tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2).to(tl.int64), tl.load(entry + 3),
            tl.load(entry + 4))  # fmt: skip


@jit
def _seen(rows, columns, level, k_len, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which key each query sees, broadcast from rows and columns; `level` is the key beside query 0. With causal
    attention no query of the sequence sees a key behind it, so the comparison with k_len is saved."""
    if not CAUSAL:
        return columns < k_len
    else:
        seen = columns <= rows + level
        if WINDOW:
            seen = seen & (columns > rows + level - window)
        return seen


@jit
def _keys_seen(first, k_len, level, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr):  # fmt: skip
    """Where the keys start and end that some query of the tile at `first` sees; all see those before `by_all`."""
    start, end, by_all = 0, k_len, k_len
    if CAUSAL:
        end = tl.minimum(k_len, first + BLOCK_M + level)
        by_all = tl.minimum(k_len, first + level + 1)
        if WINDOW:
            start = tl.maximum(first + level - window + 1, 0) // BLOCK_N * BLOCK_N
            by_all = 0
    return start, end, by_all


@jit
def _fold(s, m, l, scale):
    """Probabilities of a tile of scores, what the sums so far fade by, and the new maxima and sums."""
    highest = tl.maximum(m, tl.max(s, 1) * scale)
    shift = tl.where(highest == -float("inf"), 0.0, highest)  # has seen nothing yet: no -inf - -inf
    p = tl.exp2(s * scale - shift[:, None])
    fade = tl.exp2(m - shift)
    return p, fade, highest, l * fade + tl.sum(p, 1)


@jit
def _flash_forward(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, table_ptr, T, H, R, scale, window, q_t, q_h, k_s, k_g, v_s, v_g,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, K: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """o = softmax(q k^T scale) v and lse [H, T]: 4 FLOPs a query, key and number of a head; reads q, k, v about once.

    `scale` is in base 2. Only tiles that some query does not see whole are masked. fp16,
    bf16; K up to 256; descriptors want multiples of 16 bytes.
    """
    program = tl.program_id(0)
    head = program % H
    q_start, q_len, k_start, k_len, first = _entry(table_ptr, program // H)
    q_t, q_h, k_s, k_g, v_s, v_g = q_t * UNIT, q_h * UNIT, k_s * UNIT, k_g * UNIT, v_s * UNIT, v_g * UNIT
    q_ptr += q_start * q_t + head * q_h
    k_ptr += k_start * k_s + (head // R) * k_g
    v_ptr += k_start * v_s + (head // R) * v_g
    o_ptr += q_start * (H * K) + head * K
    q0, q1 = _once(q_ptr, first, q_len, q_t, q_h, K, BLOCK_M, MAIN, TAIL, TMA)
    k0_view, k1_view = _views(k_ptr, k_len, 1, k_s, k_g, K, BLOCK_N, MAIN, TAIL, TMA)
    v0_view, v1_view = _views(v_ptr, k_len, 1, v_s, v_g, K, BLOCK_N, MAIN, TAIL, TMA)
    acc0 = tl.zeros((BLOCK_M, MAIN), tl.float32)
    acc1 = tl.zeros((BLOCK_M, TAIL if TAIL else 16), tl.float32)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    rows = first + tl.arange(0, BLOCK_M)
    NONE: tl.constexpr = -float("inf")
    level = k_len - q_len
    start, end, by_all = _keys_seen(first, k_len, level, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    for n in tl.range(start, end, BLOCK_N, warp_specialize=SPECIALIZE):
        s, _k0, _k1 = _times(q0, q1, k0_view, k1_view, n, k_len, 0, k_s, k_g, K, BLOCK_N, MAIN, TAIL, TMA)
        columns = (n + tl.arange(0, BLOCK_N))[None, :]
        if SPECIALIZE:  # noqa: SIM114 (a branch of the device's would undo the specialisation)
            s = tl.where(_seen(rows[:, None], columns, level, k_len, window, CAUSAL, WINDOW), s, NONE)
        elif n + BLOCK_N > by_all:
            s = tl.where(_seen(rows[:, None], columns, level, k_len, window, CAUSAL, WINDOW), s, NONE)
        p, fade, m, l = _fold(s, m, l, scale)
        v0 = _tile(v0_view, n, k_len, 0, v_s, v_g, K, 0, BLOCK_N, MAIN, TMA)
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0 * fade[:, None], input_precision="ieee")
        if TAIL:
            v1 = _tile(v1_view, n, k_len, 0, v_s, v_g, K, MAIN, BLOCK_N, TAIL, TMA)
            acc1 = tl.dot(p, v1, acc1 * fade[:, None], input_precision="ieee")
    keyless = l == 0.0
    inverse = 1.0 / tl.where(keyless, 1.0, l)
    o0, o1 = acc0 * inverse[:, None], acc1 * inverse[:, None]
    _put_both(o_ptr, o0, o1, first, q_len, H * K, K, BLOCK_M, MAIN, TAIL, TMA)
    lse = tl.where(keyless, -float("inf"), (m + tl.log2(tl.where(keyless, 1.0, l))) * 0.6931471805599453)
    tl.store(lse_ptr + head * T + q_start + rows, lse, mask=rows < q_len)


# -- wrapper -----------------------------------------------------------------------------------------------------------


def takes(q: Tensor, scale: float) -> bool:
    """Whether the kernels run this: else it is PyTorch's. fp32 is the interpreter's: compiled, exact products spill."""
    dtypes = (torch.float16, torch.bfloat16, *((torch.float32,) if q.is_cpu else ()))
    whole = q.dtype in dtypes and q.shape[-1] % unit(q) == 0
    return whole and 16 <= q.shape[-1] <= 256 and scale > 0


def unit(x: Tensor) -> int:
    """Numbers in 16 bytes."""
    return 16 // x.itemsize


def parts(K: int) -> dict[str, int]:
    """A head's numbers as one product or two: 64 = 64, 72 = 64 + 16, 96 = 64 + 32, 112 = 128."""
    main = 1 << (K.bit_length() - 1)
    tail = max(16, 1 << (K - main - 1).bit_length()) if main < K else 0
    return {"MAIN": main, "TAIL": tail} if tail < main else {"MAIN": 2 * main, "TAIL": 0}


def choose(part: str, q: Tensor, rows: int) -> dict:
    """The configuration for sequences of up to `rows` tokens."""
    return configs.choose("flash", part, card_of(q), rows, q.shape[-1])


@lru_cache(maxsize=64)  # all layers of a step ask for the same
def tiles(
    cu_q: tuple[int, ...], cu_k: tuple[int, ...], keys: bool, block: int, causal: bool, device: torch.device
) -> Tensor:
    """The table that `_entry` reads, [tiles, 8] in int32: tiles of queries or of keys, those with most work first."""
    q, k = np.array(list(pairwise(cu_q))), np.array(list(pairwise(cu_k)))
    q_len, k_len = q[:, 1] - q[:, 0], k[:, 1] - k[:, 0]
    counts = -(-(k_len if keys else q_len) // block)
    b = np.repeat(np.arange(len(counts)), counts)
    first = (np.arange(len(b)) - np.repeat(np.cumsum(counts) - counts, counts)) * block
    table = np.stack([q[b, 0], q_len[b], k[b, 0], k_len[b], first, b, b, b], axis=1).astype(np.int32)
    if causal:
        level = (k_len - q_len)[b]
        work = q_len[b] - np.maximum(first - level, 0) if keys else np.minimum(k_len[b], first + block + level)
        table = table[np.argsort(-work, kind="stable")]
    return torch.from_numpy(table).to(device)


def forward(q, k, v, cu_q, cu_k, causal, window, scale, config: dict | None = None) -> tuple[Tensor, Tensor]:
    """attention.plain_forward by the kernel."""
    T, H, _ = q.shape
    o, lse = q.new_empty(q.shape), q.new_empty(H, T, dtype=torch.float32)
    config = config or choose("forward", q, max(b - a for a, b in pairwise(cu_q)))
    q, k, v = (aligned(x) for x in (q, k, v))
    table = tiles(tuple(cu_q), tuple(cu_k), False, config["block_m"], causal, q.device)
    if len(table):
        args = (q, k, v, o, lse, table, T, H, H // k.shape[1], scale * LOG2_E, window, *strides(q, k, v))
        launch(_flash_forward, (len(table) * H,), *args, config=config, **constants(q, causal, window, config))
    return o, lse


def constants(q: Tensor, causal: bool, window: int, config: dict) -> dict:
    """What a kernel is made for, its configuration apart."""
    kind = {"CAUSAL": causal, "WINDOW": bool(window)}
    return {**kind, "TMA": config["variant"] == "descriptor", "K": q.shape[2], "UNIT": unit(q), **parts(q.shape[2])}


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """In units of 16 bytes, so that the compiler knows that loads are aligned."""
    return tuple(stride // unit(x) for x in tensors for stride in x.stride()[:2])


def aligned(x: Tensor) -> Tensor:
    """With heads in one piece, at addresses and distances of 16 bytes, as descriptors and vector loads want them."""
    whole = x.stride(-1) == 1 and all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:-1])
    return x if whole and (x.is_meta or x.data_ptr() % 16 == 0) else x.clone(memory_format=torch.contiguous_format)
