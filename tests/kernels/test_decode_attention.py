"""One query a row over a cache against the last row of full attention and against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import apart, error, needs_gpu, needs_triton

from minillava.kernels import decode_attention as module
from minillava.kernels.attention import attention
from minillava.kernels.decode_attention import (
    decode_attention,
    decode_step_attention,
    plain,
    reference,
    shares,
    step_reference,
    triton_decode,
    triton_step,
)


def inputs(lengths, H=4, G=2, K=16, room=0, dtype=torch.float64, device="cpu"):
    """q, the cache as a view of [B, G, S, K] storage, lengths."""
    torch.manual_seed(len(lengths) + max(lengths))
    S = max(lengths) + room
    q = torch.randn(len(lengths), H, K, device=device).to(dtype)
    k, v = (torch.randn(len(lengths), G, S, K, device=device).to(dtype).transpose(1, 2) for _ in range(2))
    return q, k, v, torch.tensor(lengths, device=device)


def last_rows(q, k, v, lengths, **options):
    """Each row alone, through full attention."""
    out = [
        attention(q[b : b + 1], k[b, :n], v[b, :n], (0, 1), True, cu_seqlens_k=(0, n), **options)[0] if n else 0 * q[b]
        for b, n in enumerate(lengths.tolist())
    ]
    return torch.stack(out)


@pytest.mark.parametrize("window", (None, 3))
@pytest.mark.parametrize("G", (4, 2, 1))
@pytest.mark.parametrize("in_vain", (0, 10**9))
@pytest.mark.parametrize("lengths", ((1,), (9, 9), (1, 7, 30, 2), (0, 5), (0, 0), (40,)))
def test_equals_the_last_row_of_full_attention(lengths, in_vain, G, window, monkeypatch):
    """With one call for all rows and with a call a row."""
    monkeypatch.setattr(module, "READ_IN_VAIN", in_vain)
    args = inputs(lengths, G=G, room=5)
    expected = last_rows(*args, window=window)
    torch.testing.assert_close(decode_attention(*args, window=window), expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("B", "longest"), ((1, 1), (1, 32768), (64, 300), (3, 2049)))
def test_error(B, longest, dtype):
    assert_error_is_small(B, longest, 8, 2, 64, dtype, "cpu")


@needs_triton
@pytest.mark.parametrize("window", (0, 20))
@pytest.mark.parametrize(
    ("lengths", "H", "G", "K", "room", "splits", "dtype"),
    (
        ((1, 0, 70), 3, 1, 64, 58, 2, torch.float16),  # fewer blocks than shares, and a row without keys
        ((128, 100), 2, 2, 72, 0, 2, torch.float32),
        ((33,), 2, 1, 16, 0, 1, torch.float16),
        ((45, 61), 6, 2, 40, 9, 1, torch.bfloat16),
    ),
)
def test_triton_kernels_in_the_interpreter(lengths, H, G, K, room, splits, dtype, window):
    q, k, v, lengths_B = inputs(lengths, H, G, K, room, dtype)
    config = {"block_n": 16, "warps": 4, "stages": 1, "programs": 1}
    assert shares(len(lengths) * G, k.shape[1], config, 108) == splits
    exact = reference(q.double(), k.double(), v.double(), lengths_B, 0.3, window)
    peer = plain(q, k, v, lengths_B, 0.3, window)
    for b, length in enumerate(lengths):  # nothing behind a row's end is read
        k[b, length:], v[b, length:] = float("nan"), float("nan")
    ours = triton_decode(q, k, v, lengths_B, 0.3, window, config)
    assert ours.dtype == dtype and error(ours, exact) <= 2 * error(peer, exact)


def step_inputs(lengths, H, G, K, dtype, normed, device="cpu"):
    """The joined product, tables, weights of norms, a cache with room, positions."""
    torch.manual_seed(H + K)
    B, S = len(lengths), max(lengths) + 60
    qkv = torch.randn(B, (H + 2 * G) * K, device=device).to(dtype)
    k, v = (torch.randn(B, S, G, K, device=device).to(dtype) for _ in range(2))
    positions = torch.tensor(lengths, device=device)
    angles = positions[:, None].cpu() / 100 ** (torch.arange(K // 2) / K)
    cos, sin = torch.cat((angles.cos(), angles.cos()), 1), torch.cat((-angles.sin(), angles.sin()), 1)
    norms = [torch.rand(K, device=device).to(dtype) + 0.5 if normed else None for _ in range(2)]
    return qkv, cos.to(device, dtype), sin.to(device, dtype), *norms, 1e-6, k, v, positions


def check_step(run, args):
    """Attention and what is in the cache afterwards, against float64."""
    wide, plain_, ours = (
        [x.to(torch.float64 if i == 0 and x.is_floating_point() else x.dtype).clone() if torch.is_tensor(x) else x
         for x in args] for i in range(3)
    )  # fmt: skip
    exact, peer, o = step_reference(*wide, 0.3), step_reference(*plain_, 0.3), run(*ours, 0.3)
    assert o.dtype == args[0].dtype and o.shape == exact.shape
    assert error(o, exact) <= 2 * error(peer, exact)
    for at in (6, 7):
        assert error(ours[at], wide[at]) <= 2 * error(plain_[at], wide[at]) + 1e-7
        changed = (ours[at] != args[at]).any(-1).any(-1)
        assert torch.equal(changed.nonzero()[:, 1].cpu(), args[8].cpu())


STEPS = [
    ((70, 0, 33), 4, 2, 64, False, 2),
    ((5, 40), 2, 1, 72, True, 1),  # a head of two parts
    ((100,), 3, 3, 16, True, 2),
]


@needs_triton
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize(("lengths", "H", "G", "K", "normed", "splits"), STEPS)
def test_step_in_the_interpreter(lengths, H, G, K, normed, splits, dtype):
    config = {"block_n": 16, "warps": 4, "stages": 1, "programs": 1}
    args = step_inputs(lengths, H, G, K, dtype, normed)
    assert shares(len(lengths) * G, args[6].shape[1], config, 108) == splits
    check_step(lambda *a: triton_step(*a, config), args)
    caches = args[6].clone(), args[7].clone()
    strided = [apart(x) if torch.is_tensor(x) else x for x in args[:6]]
    y = triton_step(*strided, *caches, apart(args[8]), 0.3, config)
    assert torch.equal(y, triton_step(*args, 0.3, config)) and torch.equal(caches[0], args[6])


@needs_triton
@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
def test_step_compiled(monkeypatch, arch):
    import ptx

    monkeypatch.setattr(module, "launch", ptx.launch(arch))
    config = {"block_n": 16, "warps": 4, "stages": 2, "programs": 1}
    for *sizes, normed, _ in STEPS[:2]:
        check_step(lambda *a: triton_step(*a, config), step_inputs(*sizes, torch.bfloat16, normed))


@needs_gpu
@pytest.mark.parametrize(("H", "G", "K", "normed"), ((32, 32, 128, False), (28, 4, 128, False), (16, 8, 64, True)))
def test_step_on_gpu(H, G, K, normed):
    for lengths in ((4000,), (1, 700, 64, 128, 4000, 0, 63, 65)):
        check_step(triton_step, step_inputs(lengths, H, G, K, torch.bfloat16, normed, "cuda"))


def test_step_is_the_steps_one_by_one_and_opcheck():
    args = step_inputs((5, 9), 4, 2, 16, torch.float64, True)
    torch.library.opcheck(torch.ops.minillava.decode_step_attention.default, (*args, 0.3))
    qkv, cos, sin, q_norm, k_norm, eps, k, v, positions = args
    again = k.clone(), v.clone()
    o = decode_step_attention(qkv, (cos, sin), k, v, positions, q_norm, k_norm, eps, 0.3)
    assert torch.equal(o, step_reference(qkv, cos, sin, q_norm, k_norm, eps, *again, positions, 0.3))
    with pytest.raises(ValueError, match="decode_step_attention: want qkv"):
        decode_step_attention(qkv[:1], (cos, sin), k, v, positions)


def test_shares_follow_the_work():
    """Enough programs for the card whatever the batch; none with fewer than four blocks; powers of two."""
    config = {"block_n": 64, "programs": 4}
    for rows, S, expected in (
        (32, 4096, 16),
        (32, 300, 1),
        (2, 32768, 128),
        (32 * 64, 4096, 1),
        (4, 32768, 128),
        (64, 65536, 8),
    ):
        assert shares(rows, S, config, 132) == expected


@needs_gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize(("H", "G", "K"), ((32, 32, 128), (14, 2, 64), (28, 4, 128), (8, 1, 80)))
def test_error_on_gpu(H, G, K, dtype):
    for B, longest in ((1, 1), (1, 4096), (1, 32768), (8, 4096), (64, 700), (64, 4096)):
        assert_error_is_small(B, longest, H, G, K, dtype, "cuda")


def assert_error_is_small(B, longest, H, G, K, dtype, device):
    lengths = torch.linspace(1, longest, B).int().tolist() if B > 1 else [longest]
    q, k, v, lengths_B = inputs(lengths, H, G, K, 7, dtype, device)
    exact = reference(q.double(), k.double(), v.double(), lengths_B, K**-0.5, 0)
    hidden = torch.arange(k.shape[1], device=device) >= lengths_B[:, None]
    mask = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, float("-inf"))[:, None, None]
    heads = (x.transpose(1, 2).repeat_interleave(H // G, 1) for x in (k, v))
    peer = F.scaled_dot_product_attention(q[:, :, None], *heads, attn_mask=mask)[:, :, 0]
    ours = decode_attention(q, k, v, lengths_B)
    assert ours.dtype == dtype and error(ours, exact) <= 2 * error(peer, exact)


def test_cache_of_any_strides_and_opcheck():
    q, k, v, lengths = inputs((3, 8), room=2)
    expected = decode_attention(q, k, v, lengths)
    torch.testing.assert_close(decode_attention(q, k.contiguous(), v.contiguous(), lengths), expected)
    torch.library.opcheck(torch.ops.minillava.decode_attention.default, (q, k, v, lengths, 0.3, 0))
    assert plain(q, k, v, lengths, 0.3, 0).is_contiguous()


def test_no_rows_at_all():
    q, k, v, lengths = (x[:0] for x in inputs((3, 8)))
    assert decode_attention(q, k, v, lengths).shape == q.shape
    tables = q.new_empty(0, 1, 16), q.new_empty(0, 1, 16)
    assert decode_step_attention(q.new_empty(0, 8 * 16), tables, k, v, lengths).shape == (0, 4 * 16)


def test_what_does_not_fit_is_refused():
    q, k, v, lengths = inputs((3, 8))
    for args in (
        (q[:, :3], k, v, lengths),
        (q, k, v[:, :4], lengths),
        (q, k, v, lengths[:1]),
        (q.float(), k, v, lengths),
        (q, k, v.float(), lengths),
    ):
        with pytest.raises(ValueError, match="decode_attention: want q"):
            decode_attention(*args)
