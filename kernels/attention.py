"""Attention over packed rows: sequences of unequal length lie end to end, none sees another.

One operation for the towers (bidirectional), the decoder's prefill and training (causal, grouped queries), a sliding
window and a bidirectional prefix. On a GPU it is flash attention (arXiv 2205.14135, 2307.08691) in Triton, flash.py; on
a CPU PyTorch's own flash kernel, called for many sequences at once where that costs little padding.

Letters: T queries and S keys of all sequences together or of a block's rows, B sequences or rows of a block, H heads, G
key/value heads, K head size, P slots of a layout, where every sequence has the length of its block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels import attention_cpu, flash, flash_backward
from minillava.kernels.frame import register, shapes, wide

# With causal attention, sequences whose length is at least this share of the longest one's are computed as one
# right-padded block: no real query comes after a padded key, so no mask is needed. Anything shorter starts a block of
# its own. On two AVX-512 cores a block beats its rows one by one down to about there (32 rows of 150 to 250 tokens).
SIMILAR = 0.6
# Up to this many queries the explicit formula trains faster on a CPU than SDPA, whose backward is slow there. One core,
# forward and backward, 4 heads of 64: 32 x 230 tokens in bf16 (AMX) 25 ms against 59, in fp32 57 against 50;
# 192 x 30 tokens 12 against 52 and 10 against 11.
SHORT = {2: 512, 4: 64, 8: 64}  # bytes of a number -> queries

FLASH_ON = "cpu"
flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# -- reference ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Sequences that are computed together, as rows of T queries and S keys."""

    rows: int
    T: int
    S: int
    causal: bool = False  # T = S, and a query sees the keys up to its own place
    keyless: int = 0  # so many of the first queries see nothing
    mask_TS: Tensor | None = None  # True where one of the others sees a key, if that is neither all nor `causal`


def reference(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, cu_q, cu_k, prefix, causal: bool, window: int, scale: float
) -> Tensor:
    """softmax(q k^T * scale) v within each sequence in differentiable PyTorch: two batched products a block. While the
    scores stay in cache, its backward beats SDPA's on a CPU."""
    at = tuple(cu_q), tuple(cu_k), tuple(prefix), causal, window, q_THK.device
    blocks, token_P, slot_T = _layout(*at, coarse=q_THK.device.type == "cpu")
    if token_P is not None:
        q_THK, k_SGK, v_SGK = (_Pad.apply(x, token_P, slot_T) for x in (q_THK, k_SGK, v_SGK))
    out = []
    for block, q, k, v in zip(blocks, *_by_block(blocks, (q_THK,), (k_SGK, v_SGK))):
        q, repeats = q[:, :, block.keyless :], q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (k, v))
        mask, visible = q.new_zeros(q.shape[2], block.S), _visible(block, q)
        if visible is not None:
            mask.masked_fill_(~visible, float("-inf"))
        scores = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=scale)
        o = (scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, q.shape[:2])
        out.append(_tokens(F.pad(o, (0, 0, block.keyless, 0)) if block.keyless else o))
    o_THK = out[0] if len(out) == 1 else torch.cat(out)
    return o_THK if slot_T is None else _Unpad.apply(o_THK, slot_T)


@lru_cache(maxsize=16)  # all layers of a step ask for the same
def _layout(
    cu_q: tuple[int, ...],
    cu_k: tuple[int, ...],
    prefix: tuple[int, ...],
    causal: bool,
    window: int,
    device,
    coarse=False,
) -> tuple[list[Block], Tensor | None, Tensor | None]:
    """The blocks; the token in each of the P slots of all blocks, where a slot behind the end of its sequence repeats
    the last token; and the slot of each token. Both None where tokens lie as the blocks want them: sequences of equal
    length in one block, or each in its own, as they are if queries and keys differ or not all of them are seen.
    With `coarse` the sizes of padded blocks are rounded up: oneDNN compiles a batched product for its very sizes."""
    spans = list(pairwise(cu_q))
    lengths = {end - start for start, end in spans}
    if cu_q != cu_k or window or prefix:
        first = prefix or (0,) * len(spans)
        both = zip(spans, pairwise(cu_k), first, strict=True)
        return [_alone(b - a, d - c, min(n, d - c), causal, window, device) for (a, b), (c, d), n in both], None, None
    if len(lengths) == 1:
        (length,) = lengths
        return [Block(len(spans), length, length, causal)], None, None
    groups: list[list[tuple[int, int]]] = []
    similar = SIMILAR if causal else 1.0
    for start, end in sorted((span for span in spans if span[0] < span[1]), key=lambda span: span[0] - span[1]):
        if not groups or end - start < similar * (groups[-1][0][1] - groups[-1][0][0]):
            groups.append([])
        groups[-1].append((start, end))
    blocks, rows, real = [], [], []
    for group in groups:  # longest first
        length = group[0][1] - group[0][0]
        length = _coarse(length) if coarse and causal else length
        more = _coarse(len(group)) - len(group) if coarse else 0  # rows that nobody reads
        blocks.append(Block(len(group) + more, length, length, causal))
        rows += group + group[-1:] * more
        real += [True] * len(group) + [False] * more
    starts, ends = np.array(rows).reshape(-1, 2).T
    longest = np.repeat([block.T for block in blocks], [block.rows for block in blocks])
    first_slots = np.cumsum(longest) - longest
    token_P = np.arange(longest.sum()) - np.repeat(first_slots - starts, longest)
    token_P = np.minimum(token_P, np.repeat(ends - 1, longest))
    order = np.flatnonzero(real)
    order = order[np.argsort(starts[order])]
    counts = (ends - starts)[order]
    slot_T = np.arange(counts.sum()) + np.repeat((first_slots - starts)[order], counts)
    return blocks, torch.from_numpy(token_P).to(device), torch.from_numpy(slot_T).to(device)


def _coarse(size: int) -> int:
    """Up to the next number of four significant bits: at most an eighth more."""
    return size + -size % (1 << max(0, size.bit_length() - 4))


def _alone(T: int, S: int, prefix: int, causal: bool, window: int, device) -> Block:
    """A sequence of its own: the last query is level with the last key."""
    keyless = T if S == 0 else max(0, T - S) if causal and not prefix else 0
    seen = T - keyless
    if not causal or not seen or (seen == S and not (window or prefix)):
        return Block(1, T, S, causal, keyless)
    mask_TS = torch.ones(seen, S, dtype=torch.bool, device=device).tril(S - seen)
    mask_TS = mask_TS.triu(S - seen - window + 1) if window else mask_TS
    mask_TS[:, :prefix] = True
    return Block(1, T, S, False, keyless, mask_TS)


def _by_block(blocks: list[Block], queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> list[list[Tensor]]:
    """Tokens [P, H, K] as [B, H, T or S, K] of each block."""
    out = []
    for tensors, name in ((queries, "T"), (keys, "S")):
        sizes = [(block.rows, getattr(block, name)) for block in blocks]
        for x in tensors:
            parts = x.split([rows * length for rows, length in sizes]) if len(sizes) > 1 else (x,)
            out.append([part.unflatten(0, size).transpose(1, 2) for part, size in zip(parts, sizes)])
    return out


def _tokens(x_BHTK: Tensor) -> Tensor:
    return x_BHTK.transpose(1, 2).flatten(0, 1)


class _Pad(torch.autograd.Function):
    """Tokens into slots. A slot that repeats a token has no gradient, so that the backward gathers and adds nothing."""

    @staticmethod
    def forward(ctx, x_THK: Tensor, token_P: Tensor, slot_T: Tensor) -> Tensor:
        ctx.slot_T = slot_T
        return x_THK.index_select(0, token_P)

    @staticmethod
    def backward(ctx, grad_PHK: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad_PHK.index_select(0, ctx.slot_T), None, None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_PHK: Tensor, slot_T: Tensor) -> Tensor:
        ctx.slots, ctx.slot_T = len(x_PHK), slot_T
        return x_PHK.index_select(0, slot_T)

    @staticmethod
    def backward(ctx, grad_THK: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _into_slots(grad_THK, ctx.slot_T, ctx.slots), None


def _into_slots(x_THK: Tensor, slot_T: Tensor, slots: int) -> Tensor:
    return x_THK.new_zeros(slots, *x_THK.shape[1:]).index_copy_(0, slot_T, x_THK)


# -- CPU, and whatever has no kernel -----------------------------------------------------------------------------------


def plain_forward(q_THK, k_SGK, v_SGK, cu_q, cu_k, prefix, causal, window, scale) -> tuple[Tensor, Tensor]:
    """o [T, H, K], and the natural logarithm of the softmax's denominator [H, T] in fp32; without keys 0 and -inf."""
    blocks, token_P, slot_T = _layout(tuple(cu_q), tuple(cu_k), tuple(prefix), causal, window, q_THK.device)
    if token_P is not None:
        q_THK, k_SGK, v_SGK = (x.index_select(0, token_P) for x in (q_THK, k_SGK, v_SGK))
    out = []
    for block, q, k, v in zip(blocks, *_by_block(blocks, (q_THK,), (k_SGK, v_SGK))):
        q = q[:, :, block.keyless :] if block.keyless else q
        if not q.numel():
            o, lse = torch.empty_like(q), q.new_empty(*q.shape[:3], dtype=wide(q))
        elif q.device.type == FLASH_ON:
            o, lse = flash_cpu(q, k, v, 0.0, **_options(block, q), scale=scale)
        else:
            scores = _scores(q, k, block, scale)
            lse = scores.logsumexp(-1)
            o = ((scores - lse[..., None]).exp() @ _wide(v, q)).to(q.dtype)
        if block.keyless:
            o, lse = F.pad(o, (0, 0, block.keyless, 0)), F.pad(lse, (block.keyless, 0), value=float("-inf"))
        out.append((_tokens(o), lse.transpose(1, 2).flatten(0, 1)))
    o_THK, lse_TH = out[0] if len(out) == 1 else map(torch.cat, zip(*out))
    if slot_T is not None:
        o_THK, lse_TH = o_THK.index_select(0, slot_T), lse_TH.index_select(0, slot_T)
    return o_THK.contiguous(), lse_TH.T.contiguous()


def plain_backward(do_THK, q_THK, k_SGK, v_SGK, o_THK, lse_HT, cu_q, cu_k, prefix, causal, window, scale):
    """dq, dk, dv from the probabilities, which are computed again."""
    blocks, token_P, slot_T = _layout(tuple(cu_q), tuple(cu_k), tuple(prefix), causal, window, q_THK.device)
    lse_TH1 = lse_HT.T[..., None]
    if token_P is not None and slot_T is not None:
        do_THK = _into_slots(do_THK, slot_T, len(token_P))  # a slot that repeats a token sends nothing back
        q_THK, o_THK, lse_TH1 = (x.index_select(0, token_P) for x in (q_THK, o_THK, lse_TH1))
        k_SGK, v_SGK = (x.index_select(0, token_P) for x in (k_SGK, v_SGK))
    out = []
    for block, *tensors in zip(blocks, *_by_block(blocks, (q_THK, o_THK, do_THK, lse_TH1), (k_SGK, v_SGK))):
        q, o, do, lse = (x[:, :, block.keyless :] for x in tensors[:4])
        k, v = tensors[4:]
        if not q.numel():
            dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        elif q.device.type == FLASH_ON:
            options = _options(block, q)
            dq, dk, dv = flash_cpu_backward(do, q, k, v, o, lse[..., 0], 0.0, **options, scale=scale)
        else:
            p, wide_do = (_scores(q, k, block, scale) - lse).exp(), do.to(lse.dtype)
            ds = p * (wide_do @ _wide(v, q).mT - (wide_do * o).sum(-1, keepdim=True)) * scale
            dq = ds @ _wide(k, q)
            dk, dv = ((x.mT @ y).unflatten(1, (k.shape[1], -1)).sum(2) for x, y in ((ds, q.to(ds.dtype)), (p, wide_do)))
        dq = F.pad(dq, (0, 0, block.keyless, 0)) if block.keyless else dq
        out.append([_tokens(x.to(q.dtype)) for x in (dq, dk, dv)])
    grads = out[0] if len(out) == 1 else map(torch.cat, zip(*out))
    return tuple((x if slot_T is None else x.index_select(0, slot_T)).contiguous() for x in grads)


def _options(block: Block, q: Tensor) -> dict:
    """What the CPU kernel is told about visibility; its mask is added to the scores."""
    mask = block.mask_TS
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    return {"is_causal": block.causal, "attn_mask": mask}


def _visible(block: Block, q: Tensor) -> Tensor | None:
    if block.mask_TS is not None or not block.causal:
        return block.mask_TS
    return torch.ones(q.shape[2], block.S, dtype=torch.bool, device=q.device).tril()


def _wide(x_BGSK: Tensor, q_BHTK: Tensor) -> Tensor:
    """A key/value head for each query head, in at least fp32."""
    return x_BGSK.repeat_interleave(q_BHTK.shape[1] // x_BGSK.shape[1], 1).to(wide(q_BHTK))


def _scores(q: Tensor, k: Tensor, block: Block, scale: float) -> Tensor:
    scores, visible = q.to(wide(q)) @ _wide(k, q).mT * scale, _visible(block, q)
    return scores if visible is None else scores.masked_fill(~visible, float("-inf"))


# -- wrapper -----------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Sequence[int] | None = None,
    causal: bool = False,
    scale: float | None = None,
    *,
    cu_seqlens_k: Sequence[int] | None = None,
    window: int | None = None,
    prefix: Sequence[int] | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v within each sequence: q [T, H, K], k and v [S, G, K] -> [T, H, K].

    `cu_seqlens` holds the B + 1 boundaries of the queries, from 0 to T, as Python integers, `cu_seqlens_k` those of the
    keys (the same unless given); or q is [B, T, H, K] and k, v are [B, S, G, K], and there are none. H / G query heads
    share a key/value head. The scale defaults to K ** -0.5. With `causal` the last query sees all keys, the one before
    it all but the last, and so on; `window` leaves each the last so many of those, `prefix` adds the first so many keys
    of each sequence. A query without a key gets 0. Raises ValueError when shapes or boundaries do not fit.
    """
    args = _checked(q, k, v, cu_seqlens, cu_seqlens_k, prefix, causal, window, scale)
    cu, same = args[3], args[3] == args[4]
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.device.type != "cpu" or not same or not cu[-1]:
        return _forward(*args)[0].view(q.shape)
    if training and q.shape[-2] == k.shape[-2] and max(b - a for a, b in pairwise(cu)) <= SHORT[q.itemsize]:
        return reference(*args).view(q.shape)
    if not (training or window or prefix):
        starts = [int(start) for start in cu]
        if (o := attention_cpu.attention(*args[:3], starts, causal, args[-1])) is not None:
            return o.view(q.shape)
    if training or window or prefix or any(b - a != cu[1] for a, b in pairwise(cu)):
        return _forward(*args)[0].view(q.shape)
    # Inference, rows of one length: SDPA as it is, since what the operation does around it costs 2 to 5 % of a layer's
    # attention on a CPU (0.15 ms).
    rows = (x.unflatten(0, (-1, cu[1])).transpose(1, 2) for x in args[:3])
    options = {"is_causal": causal, "scale": args[-1], "enable_gqa": q.shape[-2] != k.shape[-2]}
    return F.scaled_dot_product_attention(*rows, **options).transpose(1, 2).reshape(q.shape)


def attention_with_lse(q, k, v, cu_seqlens, causal, scale=None, **options) -> tuple[Tensor, Tensor]:
    """`attention` of packed rows, and the log sum exp of each query's scaled scores [H, T] in fp32, -inf without a key
    and without a gradient: with it, results over parts of the keys can be put together."""
    names = ("cu_seqlens_k", "prefix", "window")
    cu_k, prefix, window = (options.get(name) for name in names)
    return _forward(*_checked(q, k, v, cu_seqlens, cu_k, prefix, causal, window, scale))


def _checked(q, k, v, cu_seqlens, cu_seqlens_k, prefix, causal, window, scale):
    """The operation's arguments; ValueError if they do not fit."""
    if q.dim() == k.dim() == v.dim() == 4 and cu_seqlens is None and q.shape[0] == k.shape[0]:
        (B, T), S = q.shape[:2], k.shape[1]
        cu_seqlens, cu_seqlens_k = ([b * n for b in range(B + 1)] for n in (T, S))
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    fits = q.dim() == k.dim() == 3 and k.shape == v.shape and q.shape[2] == k.shape[2] and q.dtype == k.dtype == v.dtype
    if not fits or q.shape[1] % max(k.shape[1], 1):
        raise ValueError(f"attention: want q [T, H, K], k and v [S, G, K] of one dtype, got {shapes(q=q, k=k, v=v)}")
    cu_q = list(() if cu_seqlens is None else cu_seqlens)
    cu_k = cu_q if cu_seqlens_k is None else list(cu_seqlens_k)
    for cu, x in ((cu_q, q), (cu_k, k)):
        if len(cu) < 2 or cu[0] != 0 or cu[-1] != x.shape[0] or any(a > b for a, b in pairwise(cu)):
            raise ValueError(f"cu_seqlens {tuple(cu)} do not cover {x.shape[0]} tokens")
    if len(cu_k) != len(cu_q) or (prefix is not None and len(prefix) != len(cu_q) - 1):
        raise ValueError(f"attention: {len(cu_q) - 1} sequences of queries, {len(cu_k) - 1} of keys, prefix {prefix}")
    if (window is not None and (window < 1 or not causal)) or (prefix is not None and (window or not causal)):
        raise ValueError("attention: a window (1 or more) or a prefix, not both, goes with causal attention")
    return q, k, v, cu_q, cu_k, list(prefix or ()), causal, window or 0, q.shape[2] ** -0.5 if scale is None else scale


def triton_forward(q_THK, *rest) -> tuple[Tensor, Tensor]:
    return (flash.forward if flash.takes(q_THK, rest[-1]) else plain_forward)(q_THK, *rest)


def triton_backward(do_THK, q_THK, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return (flash_backward.backward if flash.takes(q_THK, rest[-1]) else plain_backward)(do_THK, q_THK, *rest)


def _fake_forward(q_THK, k_SGK, v_SGK, cu_q, cu_k, prefix, causal, window, scale):
    return q_THK.new_empty(q_THK.shape), q_THK.new_empty(q_THK.shape[1], q_THK.shape[0], dtype=wide(q_THK))


def _fake_backward(do_THK, q_THK, k_SGK, v_SGK, o_THK, lse_HT, cu_q, cu_k, prefix, causal, window, scale):
    return q_THK.new_empty(q_THK.shape), k_SGK.new_empty(k_SGK.shape), v_SGK.new_empty(v_SGK.shape)


def _setup_context(ctx, inputs, output) -> None:
    q_THK, k_SGK, v_SGK, *ctx.rest = inputs
    ctx.save_for_backward(q_THK, k_SGK, v_SGK, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, do_THK: Tensor | None, _):
    if do_THK is None:
        return (None,) * 9
    return *_backward(do_THK, *ctx.saved_tensors, *ctx.rest), *(None,) * 6


_backward = register(
    "attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, SymInt[] cu_q, SymInt[] cu_k,"
    " SymInt[] prefix, bool causal, SymInt window, float scale) -> (Tensor, Tensor, Tensor)",
    plain=plain_backward,
    cuda=triton_backward,
    fake=_fake_backward,
)

_forward = register(
    "attention(Tensor q, Tensor k, Tensor v, SymInt[] cu_q, SymInt[] cu_k, SymInt[] prefix, bool causal,"
    " SymInt window, float scale) -> (Tensor, Tensor)",
    plain=plain_forward,
    cuda=triton_forward,
    fake=_fake_forward,
    backward=_autograd,
    setup_context=_setup_context,
)
