"""Attention over packed rows: sequences of unequal length lie end to end, none sees another.

One operation for the towers (bidirectional), the decoder's prefill and training (causal, grouped queries) and a sliding
window. On a GPU it is flash attention (arXiv 2205.14135, 2307.08691) in Triton, flash.py; on a CPU cpu/blocks.py.

Letters: T queries and S keys of all sequences together or of one, B sequences, H heads, G key/value heads, K head size.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels import flash, flash_backward
from minillava.kernels.cpu import blocks
from minillava.kernels.frame import register, shapes, wide

# -- reference ---------------------------------------------------------------------------------------------------------


def reference(q_THK, k_SGK, v_SGK, cu_q, cu_k, causal, window, scale) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v within each sequence [T, H, K], differentiable, and the log sum exp of its scores [H, T]
    in at least fp32; without a key 0 and -inf."""
    out = []
    for q, k, v, seen_TS in _sequences(q_THK, k_SGK, v_SGK, cu_q, cu_k, causal, window):
        lse_HT = (q @ k.mT * scale).masked_fill(~seen_TS, float("-inf")).logsumexp(-1)
        o_HTK = _probabilities(q, k, seen_TS, lse_HT, scale) @ v
        out.append((o_HTK.transpose(0, 1).to(q_THK.dtype), lse_HT))
    o, lse = zip(*out)
    return torch.cat(o), torch.cat(lse, 1)


def reference_backward(do_THK, q_THK, k_SGK, v_SGK, o_THK, lse_HT, cu_q, cu_k, causal, window, scale):
    """dq, dk, dv from the probabilities, which are computed again."""
    out = []
    sequences = _sequences(q_THK, k_SGK, v_SGK, cu_q, cu_k, causal, window)
    for (q, k, v, seen_TS), start, end in zip(sequences, cu_q, cu_q[1:]):
        do, o = (x[start:end].transpose(0, 1).to(q.dtype) for x in (do_THK, o_THK))
        p_HTS = _probabilities(q, k, seen_TS, lse_HT[:, start:end], scale)
        ds_HTS = p_HTS * (do @ v.mT - (do * o).sum(-1, keepdim=True)) * scale
        grads = ds_HTS @ k, ds_HTS.mT @ q, p_HTS.mT @ do
        # The heads that share keys and values add their gradients up.
        heads = q_THK.shape[1], k_SGK.shape[1], v_SGK.shape[1]
        out.append([x.unflatten(0, (n, -1)).sum(1).transpose(0, 1).to(q_THK.dtype) for x, n in zip(grads, heads)])
    return tuple(map(torch.cat, zip(*out)))


def _sequences(q_THK, k_SGK, v_SGK, cu_q, cu_k, causal, window) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """q [H, T, K], k and v [H, S, K] of each sequence in at least fp32, and which key each query sees [T, S]."""
    repeats = q_THK.shape[1] // k_SGK.shape[1]
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k)):
        k, v = (x[c:d].repeat_interleave(repeats, 1).transpose(0, 1).to(wide(x)) for x in (k_SGK, v_SGK))
        # The last query is level with the last key.
        ahead_TS = torch.arange(d - c, device=k.device) - torch.arange(d - c - (b - a), d - c, device=k.device)[:, None]
        seen_TS = ahead_TS <= 0 if causal else torch.ones_like(ahead_TS, dtype=torch.bool)
        yield q_THK[a:b].transpose(0, 1).to(k.dtype), k, v, seen_TS & (ahead_TS > -window) if window else seen_TS


def _probabilities(q_HTK: Tensor, k_HSK: Tensor, seen_TS: Tensor, lse_HT: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) [H, T, S] from its log sum exp; 0 for a query without a key."""
    scores = (q_HTK @ k_HSK.mT * scale).masked_fill(~seen_TS, float("-inf"))
    return (scores - lse_HT.clamp(min=torch.finfo(lse_HT.dtype).min)[..., None]).exp()


# -- wrapper -----------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Sequence[int],
    causal: bool = False,
    scale: float | None = None,
    *,
    cu_seqlens_k: Sequence[int] | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v within each sequence: q [T, H, K], k and v [S, G, K] -> [T, H, K].

    `cu_seqlens` holds the B + 1 boundaries of the queries, from 0 to T, as Python integers, `cu_seqlens_k` those of the
    keys (the same unless given). H / G query heads share a key/value head. The scale defaults to K ** -0.5. With
    `causal` the last query sees all keys, the one before it all but the last, and so on; `window` leaves each the last
    so many of those. Raises ValueError when shapes or boundaries do not fit, or a query has no key.
    """
    cu_q = list(cu_seqlens)
    cu_k = cu_q if cu_seqlens_k is None else list(cu_seqlens_k)
    fits = q.dim() == k.dim() == 3 and k.shape == v.shape and q.shape[2] == k.shape[2] and q.dtype == k.dtype == v.dtype
    if not fits or q.shape[1] % max(k.shape[1], 1):
        raise ValueError(f"attention: want q [T, H, K], k and v [S, G, K] of one dtype, got {shapes(q=q, k=k, v=v)}")
    _check_boundaries(cu_q, len(q), cu_k, len(k), causal)
    if window is not None and (window < 1 or not causal):
        raise ValueError("attention: a window (1 or more) goes with causal attention")
    args = q, k, v, cu_q, cu_k, causal, window or 0, q.shape[2] ** -0.5 if scale is None else scale
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        return blocks.attention(*args)
    if q.is_cuda and not flash.takes(q, args[-1]):
        return by_sdpa(*args)
    return _forward(*args)[0]


def by_sdpa(q_THK, k_SGK, v_SGK, cu_q, cu_k, causal: bool, window: int, scale: float) -> Tensor:
    """`reference` by PyTorch's attention, a call a sequence: fp32 on a GPU, and head sizes that no kernel has."""
    out = []
    for q, k, v, seen_TS in _sequences(q_THK, k_SGK, v_SGK, cu_q, cu_k, causal, window):
        full = not causal or (not window and seen_TS.shape[0] == seen_TS.shape[1])
        options = {"is_causal": causal} if full else {"attn_mask": seen_TS}
        out.append(F.scaled_dot_product_attention(q[None], k[None], v[None], **options, scale=scale)[0])
    return torch.cat(out, 1).transpose(0, 1).to(q_THK.dtype)


def _check_boundaries(cu_q: list[int], T: int, cu_k: list[int], S: int, causal: bool) -> None:
    for cu, tokens in ((cu_q, T), (cu_k, S)):
        if len(cu) < 2 or cu[0] != 0 or cu[-1] != tokens or any(a > b for a, b in pairwise(cu)):
            raise ValueError(f"cu_seqlens {tuple(cu)} do not cover {tokens} tokens")
    if len(cu_k) != len(cu_q):
        raise ValueError(f"attention: {len(cu_q) - 1} sequences of queries, {len(cu_k) - 1} of keys")
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k)) if cu_q != cu_k else ():
        if d - c < (b - a if causal else min(b - a, 1)):
            raise ValueError(f"attention: {b - a} queries and {d - c} keys; each query needs a key that it sees")


def triton_forward(q_THK, *rest) -> tuple[Tensor, Tensor]:
    return (flash.forward if flash.takes(q_THK, rest[-1]) else reference)(q_THK, *rest)


def triton_backward(do_THK, q_THK, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return (flash_backward.backward if flash.takes(q_THK, rest[-1]) else reference_backward)(do_THK, q_THK, *rest)


def _setup_context(ctx, inputs, output) -> None:
    q_THK, k_SGK, v_SGK, *ctx.rest = inputs
    ctx.save_for_backward(q_THK, k_SGK, v_SGK, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, do_THK: Tensor | None, _):
    if do_THK is None:
        return (None,) * 8
    return *_backward(do_THK, *ctx.saved_tensors, *ctx.rest), *(None,) * 5


_backward = register(
    "attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, SymInt[] cu_q, SymInt[] cu_k,"
    " bool causal, SymInt window, float scale) -> (Tensor, Tensor, Tensor)",
    plain=reference_backward,
    cuda=triton_backward,
    fake=lambda do, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
)

_forward = register(
    "attention(Tensor q, Tensor k, Tensor v, SymInt[] cu_q, SymInt[] cu_k, bool causal,"
    " SymInt window, float scale) -> (Tensor, Tensor)",
    plain=reference,
    cuda=triton_forward,
    fake=lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=wide(q))),
    backward=_autograd,
    setup_context=_setup_context,
)
