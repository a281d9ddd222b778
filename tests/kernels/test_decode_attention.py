"""One query a row over a cache against the last row of full attention and against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import error, needs_gpu, needs_triton

from minillava.kernels import decode_attention as module
from minillava.kernels.attention import attention
from minillava.kernels.decode_attention import decode_attention, plain, reference, shares, triton_decode


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
        attention(q[b : b + 1], k[b, :n], v[b, :n], (0, 1), True, cu_seqlens_k=(0, n), **options)[0]
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
    o, mass = decode_attention(*args, window=window, mass=True)
    torch.testing.assert_close(o, expected)
    seen = (args[3] if window is None else args[3].clamp(max=window)).float()
    assert torch.equal((mass > 0).sum(1).float(), seen)
    torch.testing.assert_close(mass.sum(1), (seen > 0).float())


def test_mass_is_the_mean_over_heads():
    q, k, v, lengths = inputs((6,), H=2, G=1)
    one_hot = torch.eye(6, 16, dtype=q.dtype)[None, :, None]
    expected = decode_attention(q, k, one_hot, lengths, 0.7)[0, :, :6].mean(0)
    torch.testing.assert_close(decode_attention(q, k, v, lengths, 0.7, mass=True)[1][0], expected.float())


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
    exact, mass = reference(q.double(), k.double(), v.double(), lengths_B, 0.3, window)
    peer = plain(q, k, v, lengths_B, 0.3, window, False)[0]
    for b, length in enumerate(lengths):  # nothing behind a row's end is read
        k[b, length:], v[b, length:] = float("nan"), float("nan")
    ours, mass_BS = triton_decode(q, k, v, lengths_B, 0.3, window, True, config)
    assert ours.dtype == dtype and error(ours, exact) <= 2 * error(peer, exact)
    torch.testing.assert_close(mass_BS, mass, rtol=5e-3, atol=1e-5)
    assert triton_decode(q, k, v, lengths_B, 0.3, window, False, config)[0].equal(ours)


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
    exact, mass = reference(q.double(), k.double(), v.double(), lengths_B, K**-0.5, 0)
    hidden = torch.arange(k.shape[1], device=device) >= lengths_B[:, None]
    mask = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, float("-inf"))[:, None, None]
    heads = (x.transpose(1, 2).repeat_interleave(H // G, 1) for x in (k, v))
    peer = F.scaled_dot_product_attention(q[:, :, None], *heads, attn_mask=mask)[:, :, 0]
    ours = decode_attention(q, k, v, lengths_B)
    assert ours.dtype == dtype and error(ours, exact) <= 2 * error(peer, exact)
    assert error(decode_attention(q, k, v, lengths_B, mass=True)[1], mass) < 0.02


def test_cache_of_any_strides_and_opcheck():
    q, k, v, lengths = inputs((3, 8), room=2)
    expected = decode_attention(q, k, v, lengths)
    torch.testing.assert_close(decode_attention(q, k.contiguous(), v.contiguous(), lengths), expected)
    for mass in (False, True):
        torch.library.opcheck(torch.ops.minillava.decode_attention.default, (q, k, v, lengths, 0.3, 0, mass))
    assert plain(q, k, v, lengths, 0.3, 0, False)[0].is_contiguous()


def test_what_does_not_fit_is_refused():
    q, k, v, lengths = inputs((3, 8))
    for args in (
        (q[:, :3], k, v, lengths),
        (q, k, v[:, :4], lengths),
        (q, k, v, lengths[:1]),
        (q.float(), k, v, lengths),
    ):
        with pytest.raises(ValueError, match="decode_attention: want q"):
            decode_attention(*args)
