"""Packed attention against the same sequences one by one, and the formula's gradients against SDPA's, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from minillava.kernels import attention as module
from minillava.kernels.attention import SHORT, attention

HEADS, SIZE = 4, 8
EQUAL = (5, 5, 5)
BLOCK = (4, 5, 5)  # 1 of 15 places is padding
LOOP = (1, 2, 9)  # 15 of 27 are
LENGTHS = (EQUAL, BLOCK, LOOP, (7,), (1, 1))


def inputs(lengths, kv_heads=HEADS, dtype=torch.float64):
    torch.manual_seed(sum(lengths))
    q, k, v = (torch.randn(sum(lengths), heads, SIZE, dtype=dtype) for heads in (HEADS, kv_heads, kv_heads))
    return q, k, v


def boundaries(lengths):
    return (0, *torch.tensor(lengths).cumsum(0).tolist())


def plain(q_THK, k_TGK, v_TGK, causal, scale=None):
    """One sequence by the formula, written out: softmax(q k^T * scale) v, a key/value head for each group of heads."""
    groups = q_THK.shape[1] // k_TGK.shape[1]
    q_HTK, k_HTK, v_HTK = (
        x.transpose(0, 1) for x in (q_THK, *(y.repeat_interleave(groups, 1) for y in (k_TGK, v_TGK)))
    )
    scores_HTT = q_HTK @ k_HTK.mT * (SIZE**-0.5 if scale is None else scale)
    if causal:
        scores_HTT = scores_HTT.masked_fill(torch.ones_like(scores_HTT, dtype=torch.bool).triu(1), float("-inf"))
    return (scores_HTT.softmax(-1) @ v_HTK).transpose(0, 1)


def one_by_one(q, k, v, lengths, causal, scale=None):
    return torch.cat([plain(*part, causal, scale) for part in zip(*(x.split(lengths) for x in (q, k, v)))])


def with_gradients(function, tensors):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    incoming = torch.arange(out.numel(), dtype=out.dtype).sin().view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, incoming)]


def blocks(monkeypatch):
    """Shapes [B, M] of the blocks that are computed, call by call."""
    seen, sdpa = [], module._sdpa
    monkeypatch.setattr(module, "_sdpa", lambda q, *rest: seen.append(tuple(q.shape[:2])) or sdpa(q, *rest))
    return seen


@pytest.mark.parametrize("scale", (None, 0.7))
@pytest.mark.parametrize("kv_heads", (HEADS, 2, 1))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_equals_one_by_one(lengths, causal, kv_heads, scale):
    tensors = inputs(lengths, kv_heads)
    with torch.no_grad():  # inference: SDPA's own way
        exact = one_by_one(*tensors, lengths, causal, scale)
        torch.testing.assert_close(attention(*tensors, boundaries(lengths), causal, scale), exact)
    got = with_gradients(lambda q, k, v: attention(q, k, v, boundaries(lengths), causal, scale), tensors)
    expected = with_gradients(lambda q, k, v: one_by_one(q, k, v, lengths, causal, scale), tensors)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_similar_lengths_share_a_block(monkeypatch):
    seen = blocks(monkeypatch)
    for lengths, causal, expected in (
        (EQUAL, True, [(3, 5)]),
        (EQUAL, False, [(3, 5)]),
        (BLOCK, True, [(3, 5)]),
        (BLOCK, False, [(2, 5), (1, 4)]),  # without causality padded keys would be seen
        (LOOP, True, [(1, 9), (1, 2), (1, 1)]),
    ):
        attention(*inputs(lengths), boundaries(lengths), causal)
        assert seen == expected
        seen.clear()


@pytest.mark.parametrize("lengths", (EQUAL, BLOCK, LOOP))
@pytest.mark.parametrize("causal", (True, False))
def test_no_sequence_sees_another(lengths, causal):
    """What the others hold, infinities included, does not move a bit of a sequence's result."""
    q, k, v = inputs(lengths)
    before = attention(q, k, v, boundaries(lengths), causal)
    start, end = boundaries(lengths)[1:3]
    outside = torch.ones(len(q), dtype=torch.bool)
    outside[start:end] = False
    k, v = k.clone(), v.clone()
    k[outside], v[outside] = float("inf"), float("nan")
    assert torch.equal(attention(q, k, v, boundaries(lengths), causal)[start:end], before[start:end])


@pytest.mark.parametrize("causal", (True, False))
def test_the_explicit_formula_has_sdpas_gradients(causal, monkeypatch):
    tensors = inputs((3 * 6,))
    cu_seqlens = range(0, 19, 6)
    used = []
    explicit = module._explicit
    monkeypatch.setattr(module, "_explicit", lambda *rest: used.append(1) or explicit(*rest))
    ours = with_gradients(lambda q, k, v: attention(q, k, v, cu_seqlens, causal), tensors)
    assert used

    def sdpa(q, k, v):
        q, k, v = (x.unflatten(0, (3, 6)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(0, 1)

    for a, b in zip(ours, with_gradients(sdpa, tensors)):
        torch.testing.assert_close(a, b)


def test_long_sequences_and_groups_train_through_sdpa(monkeypatch):
    """The explicit formula holds all scores, so it stays with short sequences."""
    monkeypatch.setattr(module, "_explicit", lambda *_: pytest.fail("the explicit formula was used"))
    for lengths, kv_heads in (((SHORT + 1,), HEADS), ((5,), 2)):
        tensors = inputs(lengths, kv_heads)
        got = with_gradients(lambda q, k, v, n=lengths: attention(q, k, v, boundaries(n), True), tensors)
        expected = with_gradients(lambda q, k, v: plain(q, k, v, True), tensors)
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("lengths", (EQUAL, BLOCK, LOOP))
def test_error_against_plain_pytorch_in_the_same_dtype(lengths, dtype):
    def far(got, exact):
        return ((got.double() - exact).norm() / exact.norm()).item()

    tensors = inputs(lengths, dtype=dtype)
    ours = with_gradients(lambda q, k, v: attention(q, k, v, boundaries(lengths), True), tensors)
    same = with_gradients(lambda q, k, v: one_by_one(q, k, v, lengths, True), tensors)
    exact = with_gradients(lambda q, k, v: one_by_one(q, k, v, lengths, True), [x.double() for x in tensors])
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), ours, same, exact):
        assert a.dtype == dtype and far(a, c) <= 2 * far(b, c), f"{name}: {far(a, c):.2e} against {far(b, c):.2e}"


@pytest.mark.parametrize("cu_seqlens", ((), (0,), (0, 9), (1, 10), (0, 4, 11), (0, 6, 4, 10)))
def test_boundaries_that_do_not_cover_the_tokens_are_refused(cu_seqlens):
    with pytest.raises(ValueError, match="cover 10 tokens"):
        attention(*inputs((10,)), cu_seqlens, True)
