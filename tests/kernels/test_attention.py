"""Attention against float64, never more than twice SDPA's error; neighbours, strides, groups."""

from __future__ import annotations

import itertools
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from checks import assert_no_worse, error, needs_compiler, needs_gpu, needs_triton, one_rank
from torch.utils.checkpoint import checkpoint

from minillava.kernels import attention as module
from minillava.kernels import flash, flash_backward
from minillava.kernels.attention import attention
from minillava.kernels.cpu import blocks
from minillava.kernels.cpu.blocks import SHORT

MIXED = (1, 2, 577, 63, 64, 65, 729)
NAMES = ("out", "dq", "dk", "dv")
# K, H, G, causal: every head size, and many, grouped and single key/value heads
SHAPES = [(16, 2, 2, True), (64, 2, 2, False), (64, 4, 2, True), (72, 2, 2, False), (80, 3, 1, False)]
SHAPES += [(96, 2, 1, True), (128, 4, 2, True), (128, 2, 2, False), (256, 2, 1, True)]
EQUAL, BLOCK, LOOP = (5, 5, 5), (4, 5, 5), (1, 2, 9)  # one block; 1 of 15 places padding; 15 of 27 would be


def inputs(lengths, K=8, H=4, G=4, dtype=torch.float64, keys=None, device="cpu"):
    """q, k, v as slices of one fused projection when the tokens are the same, and dy."""
    torch.manual_seed(sum(lengths) + K)
    T, S = sum(lengths), sum(keys or lengths)
    if keys is None:
        fused = torch.randn(T, (H + 2 * G) * K, device=device, dtype=torch.float32).to(dtype)
        q, k, v = (x.unflatten(1, (-1, K)) for x in fused.split((H * K, G * K, G * K), dim=1))
    else:
        q, k, v = (torch.randn(n, heads, K, device=device).to(dtype) for n, heads in ((T, H), (S, G), (S, G)))
    return q, k, v, torch.randn(T, H, K, device=device).to(dtype)


def boundaries(lengths):
    return [0, *accumulate(lengths)]


def visible(T, S, causal, window=None, device="cpu"):
    """Which key each query sees, straight from the definition."""
    i, j = torch.arange(T, device=device)[:, None] + S - T, torch.arange(S, device=device)
    seen = (j <= i) if causal else torch.ones(T, S, dtype=torch.bool, device=device)
    return seen & (j > i - window) if window else seen


def formula(q_THK, k_SGK, v_SGK, seen, scale):
    repeats = q_THK.shape[1] // k_SGK.shape[1]
    q, k, v = q_THK.transpose(0, 1), *(x.repeat_interleave(repeats, 1).transpose(0, 1) for x in (k_SGK, v_SGK))
    p = (q @ k.mT * scale).masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen, 0.0)
    return (p @ v).transpose(0, 1)


def sdpa(q_THK, k_SGK, v_SGK, seen, scale):
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THK, k_SGK, v_SGK))
    mask = None if bool(seen.all()) else seen
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def one_by_one(function, q, k, v, lengths, causal, scale=None, keys=None, window=None):
    scale, out = q.shape[2] ** -0.5 if scale is None else scale, []
    for a, b, c in zip(q.split(lengths), k.split(keys or lengths), v.split(keys or lengths)):
        out.append(function(a, b, c, visible(len(a), len(b), causal, window, q.device), scale))
    return torch.cat(out)


def gradients(function, q, k, v, dy):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dy.to(out.dtype))]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("K", "H", "G", "causal"), SHAPES)
def test_error(K, H, G, causal, dtype):
    assert_error_is_small((*MIXED, 2049) if H > 2 and K == 64 else MIXED, K, H, G, causal, dtype, "cpu")


@needs_gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("K", (16, 64, 72, 80, 96, 128, 160, 256))
def test_error_on_gpu(K, dtype):
    for G, causal in itertools.product((4, 2, 1), (True, False)):
        assert_error_is_small((*MIXED, 2049), K, 4, G, causal, dtype, "cuda")


def assert_error_is_small(lengths, K, H, G, causal, dtype, device):
    *tensors, dy = inputs(lengths, K, H, G, dtype, device=device)
    exact = gradients(lambda *t: one_by_one(formula, *t, lengths, causal), *(x.double() for x in (*tensors, dy)))
    peer = gradients(lambda *t: one_by_one(sdpa, *t, lengths, causal), *tensors, dy)
    ours = gradients(lambda *t: attention(*t, boundaries(lengths), causal), *tensors, dy)
    assert_no_worse(NAMES, ours, peer, exact)
    with torch.no_grad():
        assert_no_worse(NAMES[:1], [attention(*tensors, boundaries(lengths), causal)], peer[:1], exact[:1])


# lengths of queries and keys, and what else is asked for
VARIANTS = [
    ((3, 1, 4), (5, 9, 4), {"causal": True}),
    ((3, 1, 4), (5, 9, 4), {"causal": False}),
    ((6, 0, 1), (6, 2, 5), {"causal": True}),
    ((2, 0), (1, 3), {"causal": False}),
    ((7, 2, 9), None, {"causal": True, "window": 3}),
    ((3, 1), (9, 6), {"causal": True, "window": 2}),
]
# What each interpreted case adds: lengths of queries and keys, K, H, G, dtype, how tiles are read, what is asked for
INTERPRETED = [
    ((1, 33, 40), None, 64, 2, 1, torch.float32, "pointer", {"causal": True}),
    ((1, 33, 40), None, 72, 1, 1, torch.float16, "pointer", {"causal": False}),
    ((40, 7), None, 72, 2, 1, torch.float16, "descriptor", {"causal": True}),
    ((9, 40), (50, 40), 32, 1, 1, torch.float16, "descriptor", {"causal": False}),
    ((40, 3, 2, 1), (12, 40, 0, 5), 16, 1, 1, torch.float32, "pointer", {"causal": True}),
    ((70,), None, 24, 1, 1, torch.float32, "descriptor", {"causal": True, "window": 7}),
    ((3, 2), (0, 0), 16, 1, 1, torch.float32, "pointer", {"causal": True}),
    ((40, 33), None, 72, 2, 1, torch.bfloat16, "pointer", {"causal": True}),
    ((9, 40), (50, 40), 64, 1, 1, torch.bfloat16, "descriptor", {"causal": False}),
]


@needs_triton
@pytest.mark.parametrize(("lengths", "keys", "K", "H", "G", "dtype", "variant", "options"), INTERPRETED)
def test_triton_kernels_in_the_interpreter(lengths, keys, K, H, G, dtype, variant, options):
    """Several tiles of queries and keys, partial ones, heads of one and two parts; both backwards."""
    config = {"variant": variant, "block_m": 32, "block_n": 32, "specialize": False, "warps": 4, "stages": 1}
    *tensors, dy = inputs(lengths, K, H, G, dtype, keys)
    cu = boundaries(lengths), boundaries(keys or lengths)
    rest = (*cu, options["causal"], options.get("window", 0), K**-0.5)
    o, lse = flash.forward(*tensors, *rest, config)
    two = flash_backward.backward(dy, *tensors, o, lse, *rest, {"backward_keys": config, "backward_queries": config})
    options = {"keys": keys, **options}
    exact = gradients(lambda *t: one_by_one(formula, *t, lengths, **options), *(x.double() for x in (*tensors, dy)))
    peer = gradients(lambda *t: one_by_one(sdpa, *t, lengths, **options), *tensors, dy)
    peer = [x.nan_to_num() for x in peer]  # SDPA's way with a query that has no key
    assert_no_worse(NAMES, (o, *two), peer, exact)
    expected = module.reference(*(x.double() for x in tensors), *rest)[1]
    torch.testing.assert_close(lse.double(), expected, rtol=1e-3, atol=1e-3)
    if variant == "pointer":  # the interpreter knows no reduction through a descriptor
        one = flash_backward.backward(dy, *tensors, o, lse, *rest, {"backward": config})
        assert_no_worse(NAMES, (o, *one), peer, exact)
        assert all(torch.equal(a, b) for a, b in zip(one[1:], two[1:]))


@needs_triton
def test_triton_kernels_read_nothing_outside_a_sequence():
    """Neighbours of NaN; the sequence is shorter than a tile, and its head than a power of two."""
    config = {"variant": "pointer", "block_m": 32, "block_n": 32, "specialize": False, "warps": 4, "stages": 1}
    lengths, K = (5, 37, 6), 24
    *tensors, dy = inputs(lengths, K, 2, 2, torch.float32)
    tensors, cu, found = (
        [x.clone() for x in tensors],
        boundaries(lengths),
        {"backward_keys": config, "backward_queries": config},
    )
    rest = (cu, cu, True, 0, 0.2)

    def run(q, k, v, dy):
        o, lse = flash.forward(q, k, v, *rest, config)
        return [x[5:42] for x in (o, *flash_backward.backward(dy, q, k, v, o, lse, *rest, found))]

    before = run(*tensors, dy)
    for x in (*tensors, dy):
        x[:5], x[42:] = float("nan"), float("nan")
    for variant in ("pointer", "descriptor"):
        config["variant"] = variant
        assert all(torch.equal(a, b) for a, b in zip(run(*tensors, dy), before))


@needs_gpu
def test_deterministic_backward_is_the_same_to_the_bit():
    *tensors, dy = inputs(MIXED, 128, 4, 2, torch.bfloat16, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(lambda *t: attention(*t, boundaries(MIXED), True), *tensors, dy) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@needs_gpu
@pytest.mark.parametrize("K", (64, 72, 128))
@pytest.mark.parametrize(("lengths", "keys", "options"), VARIANTS)
def test_variants_on_gpu(lengths, keys, options, K):
    """Other keys and windows in bf16, with 70 times as many tokens; NaN around a sequence."""
    lengths = tuple(70 * n for n in lengths)
    keys = tuple(70 * n for n in keys) if keys else lengths
    options = {name: 70 * x if name == "window" else x for name, x in options.items()}
    *tensors, dy = inputs(lengths, K, 4, 2, torch.bfloat16, keys, "cuda")
    rest = {**options, "keys": keys}
    exact = gradients(lambda *t: one_by_one(formula, *t, lengths, **rest), *(x.double() for x in (*tensors, dy)))
    peer = gradients(lambda *t: one_by_one(sdpa, *t, lengths, **rest), *tensors, dy)

    def ours(tensors):
        cu = {"cu_seqlens": boundaries(lengths), "cu_seqlens_k": boundaries(keys)}
        return gradients(lambda *t: attention(*t, **cu, **options), *tensors, dy)

    before = ours(tensors)
    assert_no_worse(NAMES, before, [x.nan_to_num() for x in peer], exact)
    tensors = [x.clone() for x in tensors]
    for x, n in zip(tensors, (lengths[0], keys[0], keys[0])):
        x[n:] = float("nan")
    for a, b, n in zip(ours(tensors), before, (lengths[0], lengths[0], keys[0], keys[0])):
        assert error(a[:n], b[:n].double()) < 1e-2  # dq is added up in any order


@needs_triton
def test_rows_far_apart_in_the_interpreter():
    """Offsets beyond 2^31 numbers, as row 174,763 of a 7B decoder's joined q, k, v has; here few rows, far apart."""
    config = {"variant": "pointer", "block_m": 16, "block_n": 16, "specialize": False, "warps": 4, "stages": 1}
    stride, T, K = 1 << 27, 20, 16
    far = torch.empty(T * stride, dtype=torch.float16)  # memory that nobody touches costs nothing
    tensors = [far[at:].as_strided((T, 1, K), (stride, K, 1)).copy_(torch.randn(T, 1, K)) for at in (0, K, 2 * K)]
    rest = ((0, T), (0, T), True, 0, 0.25)
    o, lse = flash.forward(*tensors, *rest, config)
    close = [x.contiguous() for x in tensors]
    assert torch.equal(o, flash.forward(*close, *rest, config)[0])
    found = {"backward_keys": config, "backward_queries": config}
    for a, b in zip(*(flash_backward.backward(o, *x, o, lse, *rest, found) for x in (tensors, close))):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("lengths", "keys", "options"), VARIANTS)
def test_pytorchs_attention_takes_what_no_kernel_takes(lengths, keys, options):
    """fp32 on a GPU: compiled, exact products spill up to 8 KB and take minutes."""
    *tensors, dy = inputs(lengths, 16, 4, 2, torch.float32, keys or lengths)
    assert not flash.takes(tensors[0].to("meta"), 0.3) and flash.takes(tensors[0].to("meta", torch.bfloat16), 0.3)
    rest = (boundaries(lengths), boundaries(keys or lengths), options["causal"], options.get("window", 0), 0.3)
    ours = gradients(lambda *t: module.by_sdpa(*t, *rest), *tensors, dy)
    exact = gradients(lambda *t: module.reference(*t, *rest)[0], *tensors, dy)
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b)


def test_head_sizes_are_covered_by_one_product_or_two():
    for K, expected in (
        (16, (16, 0)),
        (24, (32, 0)),
        (64, (64, 0)),
        (72, (64, 16)),
        (80, (64, 16)),
        (96, (64, 32)),
        (112, (128, 0)),
        (128, (128, 0)),
        (160, (128, 32)),
        (200, (256, 0)),
        (256, (256, 0)),
    ):
        assert tuple(flash.parts(K).values()) == expected


@pytest.mark.parametrize("keys", (False, True))
def test_table_of_tiles(keys):
    """Every row of every sequence once, and with causal attention the tiles with most keys (or queries) first."""
    cu_q, cu_k = (0, 5, 5, 42), (0, 7, 9, 109)
    table = flash.tiles(cu_q, cu_k, keys, 16, True, torch.device("cpu")).tolist()
    seen = {
        (row[2 if keys else 0] + first)
        for row in table
        for first in range(row[4], min(row[4] + 16, row[3 if keys else 1]))
    }
    assert seen == set(range(109 if keys else 42)) and len(table) == (9 if keys else 4)
    work = [
        q_len - max(0, first - k_len + q_len) if keys else min(k_len, first + 16 + k_len - q_len)
        for _, q_len, _, k_len, first, *_ in table
    ]
    assert work == sorted(work, reverse=True)


@pytest.mark.parametrize("scale", (None, 0.7))
@pytest.mark.parametrize("G", (4, 2, 1))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", (EQUAL, BLOCK, LOOP, (7,), (1, 1), (0, 3, 0, 2)))
def test_packed_equals_one_by_one(lengths, causal, G, scale):
    """With and without gradients, which go different ways on a CPU."""
    *tensors, dy = inputs(lengths, G=G)
    exact = gradients(lambda *t: one_by_one(formula, *t, lengths, causal, scale), *tensors, dy)
    with torch.no_grad():
        torch.testing.assert_close(attention(*tensors, boundaries(lengths), causal, scale), exact[0])
    for name, a, b in zip(
        NAMES, gradients(lambda *t: attention(*t, boundaries(lengths), causal, scale), *tensors, dy), exact
    ):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("G", (4, 1))
@pytest.mark.parametrize(("lengths", "keys", "options"), VARIANTS)
def test_other_keys_and_windows(lengths, keys, options, G):
    *tensors, dy = inputs(lengths, G=G, keys=keys or lengths)
    cu_q, cu_k = boundaries(lengths), boundaries(keys or lengths)
    exact = gradients(lambda *t: one_by_one(formula, *t, lengths, keys=keys, **options), *tensors, dy)
    ours = gradients(lambda *t: attention(*t, cu_q, cu_seqlens_k=cu_k, **options), *tensors, dy)
    for name, a, b in zip(NAMES, ours, exact):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    rest = cu_q, cu_k, options["causal"], options.get("window", 0), tensors[0].shape[2] ** -0.5
    o, lse_HT = module.reference(*tensors, *rest)
    for a, b in zip((o, *module.reference_backward(dy, *tensors, o, lse_HT, *rest)), exact):
        torch.testing.assert_close(a, b)


def test_the_reference_of_a_query_without_a_key():
    """Which no model has and the kernels bear: 0, and a log sum exp of -inf."""
    lengths, keys = (6, 3, 2, 1), (2, 3, 0, 5)
    *tensors, dy = inputs(lengths, keys=keys)
    exact = gradients(lambda *t: one_by_one(formula, *t, lengths, True, keys=keys), *tensors, dy)
    rest = boundaries(lengths), boundaries(keys), True, 0, tensors[0].shape[2] ** -0.5
    o, lse_HT = module.reference(*tensors, *rest)
    for a, b in zip((o, *module.reference_backward(dy, *tensors, o, lse_HT, *rest)), exact):
        torch.testing.assert_close(a, b)
    assert torch.equal(lse_HT[0].isinf().nonzero().squeeze(1), torch.tensor([0, 1, 2, 3, 9, 10]))


@pytest.mark.parametrize("keys", (None, (70,)))
def test_heads_may_lie_the_other_way(keys):
    """As weight @ x^T leaves a few rows of bf16, which PyTorch's flash kernel on CPUs would read as if they did not."""
    tensors = inputs((38,), 32, dtype=torch.bfloat16, keys=keys)[:3]
    turned = [x.flatten(1).T.contiguous().T.view(x.shape) for x in tensors]
    assert turned[0].stride(2) > 1
    cu = {"cu_seqlens": (0, 38), "cu_seqlens_k": (0, len(tensors[1]))}
    ours, straight, exact = (
        attention(*some, causal=True, **cu) for some in (turned, tensors, [x.double() for x in tensors])
    )
    assert error(ours, exact) <= 2 * error(straight, exact)


@pytest.mark.parametrize("lengths", (EQUAL, BLOCK, LOOP))
@pytest.mark.parametrize("causal", (True, False))
def test_no_sequence_sees_another(lengths, causal):
    """What the others hold, infinities and NaN included, does not move a bit of a sequence's result or gradients."""
    q, k, v, dy = inputs(lengths)
    start, end = boundaries(lengths)[1:3]
    outside = torch.ones(len(q), dtype=torch.bool)
    outside[start:end] = False

    def run(q, k, v):
        return [x[start:end] for x in gradients(lambda *t: attention(*t, boundaries(lengths), causal), q, k, v, dy)]

    before = run(q, k, v)
    q, k, v = q.clone(), k.clone(), v.clone()
    q[outside], k[outside], v[outside] = float("nan"), float("inf"), float("nan")
    for a, b in zip(run(q, k, v), before):
        assert torch.equal(a, b)


def test_similar_lengths_share_a_block(monkeypatch):
    seen, sdpa = [], blocks.by_sdpa
    monkeypatch.setattr(
        blocks, "by_sdpa", lambda block, *rest: seen.append((block.rows, block.T)) or sdpa(block, *rest)
    )
    for lengths, causal, expected in (
        (EQUAL, True, [(3, 5)]),
        (EQUAL, False, [(3, 5)]),
        (BLOCK, True, [(3, 5)]),
        (BLOCK, False, [(2, 5), (1, 4)]),  # without causality padded keys would be seen
        (LOOP, True, [(1, 9), (1, 2), (1, 1)]),
    ):
        cu = boundaries(lengths)
        blocks.attention(*inputs(lengths)[:3], cu, cu, causal, 0, 0.3)
        assert seen == expected
        seen.clear()


def test_short_rows_train_through_the_formula(monkeypatch):
    """It holds all scores, so it stays with short rows; groups are not repeated either. CPUs that do not multiply bf16
    compute it in float32."""
    calls, formula_ = [], blocks.formula
    monkeypatch.setattr(blocks, "formula", lambda *a: calls.append(1) or formula_(*a))
    for in_bf16, lengths, dtype, G, expected in (
        (True, (SHORT[2], 3), torch.bfloat16, 4, 2),  # a block each
        (True, (SHORT[2] + 1,), torch.bfloat16, 4, 0),
        (False, (SHORT[2], 3), torch.bfloat16, 4, 0),
        (False, (SHORT[4], 3), torch.bfloat16, 4, 2),
        (True, (SHORT[4] + 1,), torch.float32, 4, 0),
        (True, (5,), torch.bfloat16, 2, 0),
    ):
        monkeypatch.setattr(blocks.cpu, "multiplies_bf16", lambda told=in_bf16: told)
        *tensors, dy = inputs(lengths, G=G, dtype=dtype)
        gradients(lambda *t, n=lengths: attention(*t, boundaries(n), True), *tensors, dy)
        assert len(calls) == expected
        calls.clear()
    attention(*inputs((5,))[:3], (0, 5))
    assert not calls


@pytest.mark.parametrize("lengths", (EQUAL, LOOP))
def test_gradcheck_and_opcheck(lengths):
    *tensors, dy = (t.requires_grad_() for t in inputs(lengths, K=4, H=2, G=1))
    cu = boundaries(lengths)
    assert torch.autograd.gradcheck(lambda *t: attention(*t, cu, True), tensors)
    op = torch.ops.minillava.attention.default
    torch.library.opcheck(op, (*tensors, cu, cu, True, 0, 0.5))
    detached = [t.detach() for t in tensors]
    saved = op(*detached, cu, cu, True, 0, 0.5)
    torch.library.opcheck(
        torch.ops.minillava.attention_backward.default, (dy.detach(), *detached, *saved, cu, cu, True, 0, 0.5)
    )


@pytest.mark.parametrize("lengths", (EQUAL, BLOCK, LOOP, (4, 0, 6)))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("G", (4, 2))
def test_blocks_equal_the_operation(lengths, causal, G):
    """What CPUs run, and the reference, which devices without a kernel run: results and gradients."""
    *tensors, dy = inputs(lengths, G=G)
    cu = boundaries(lengths)
    ours = gradients(lambda *t: blocks.attention(*t, cu, cu, causal, 0, 0.3), *tensors, dy)
    plain = gradients(lambda *t: torch.ops.minillava.attention(*t, cu, cu, causal, 0, 0.3)[0], *tensors, dy)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


@needs_compiler
def test_compiles_in_one_graph():
    *tensors, dy = inputs((5, 3), G=2, dtype=torch.float32)
    compiled = torch.compile(lambda *t: attention(*t, (0, 5, 8), True), fullgraph=True)
    plain = gradients(lambda *t: attention(*t, (0, 5, 8), True), *tensors, dy)
    for a, b in zip(gradients(compiled, *tensors, dy), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointing_changes_nothing():
    *tensors, dy = inputs((5, 3), G=2)
    plain = gradients(lambda *t: attention(*t, (0, 5, 8), True), *tensors, dy)
    again = gradients(lambda *t: checkpoint(attention, *t, (0, 5, 8), True, use_reentrant=False), *tensors, dy)
    for a, b in zip(again, plain, strict=True):
        assert torch.equal(a, b)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(12, 3 * 12)

    def forward(self, x_TD):
        return attention(*self.qkv(x_TD).unflatten(1, (3, 2, 6)).unbind(1), (0, 70, 80), True)


def test_under_fsdp2(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    layer, x_TD = Layer(), torch.randn(80, 12)

    layer(x_TD).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with one_rank(tmp_path) as mesh:
        fully_shard(layer, mesh=mesh)
        layer(x_TD).square().sum().backward()
        for p, b in zip(layer.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), b)


@pytest.mark.parametrize("cu_seqlens", ((), (0,), (0, 9), (1, 10), (0, 4, 11), (0, 6, 4, 10)))
def test_boundaries_that_do_not_cover_the_tokens_are_refused(cu_seqlens):
    with pytest.raises(ValueError, match="cover 10 tokens"):
        attention(*inputs((10,))[:3], cu_seqlens, True)


def test_what_does_not_fit_is_refused():
    q, k, v, _ = inputs((10,), G=2)
    for args, options, message in (
        ((q[:, :3], k, v), {}, r"q \[10, 3, 8\], k \[10, 2, 8\]"),
        ((q, k, v[..., :4]), {}, r"v \[10, 2, 4\]"),
        ((q.float(), k, v), {}, "one dtype"),
        ((q, k, v), {"window": 2}, "window"),
        ((q, k, v), {"causal": True, "window": 0}, "window"),
        ((q, k, v), {"cu_seqlens_k": (0, 5, 10)}, "1 sequences of queries, 2 of keys"),
        ((q, k[:9], v[:9]), {"cu_seqlens_k": (0, 9), "causal": True}, "10 queries and 9 keys"),
        ((q, k[:0], v[:0]), {"cu_seqlens_k": (0, 0)}, "10 queries and 0 keys"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*args, (0, 10), **options)
