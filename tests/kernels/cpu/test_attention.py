"""Attention in C: no further from float64 than SDPA in bf16, for packed sequences of any lengths."""

from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F

from minillava.kernels.attention import attention
from minillava.kernels.cpu import attention as attention_cpu

pytestmark = pytest.mark.usefixtures("c_code")


def by_sdpa(q, k, v, starts, causal, scale):
    """Sequence by sequence."""
    out = []
    for start, end in pairwise(starts):
        rows = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        out.append(
            F.scaled_dot_product_attention(*rows, is_causal=causal, scale=scale, enable_gqa=True)[0].transpose(0, 1)
        )
    return torch.cat(out)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(
    ("H", "G", "K", "lengths"),
    (
        (2, 2, 64, (577,)),
        (6, 2, 64, (1, 31, 32, 33, 100)),
        (3, 1, 72, (17, 0, 64)),  # SigLIP's heads
        (4, 4, 128, (130,)),
        (1, 1, 18, (40, 7)),
    ),
)
def test_attention(H, G, K, lengths, causal):
    torch.manual_seed(0)
    starts = [0, *accumulate(lengths)]
    q, k, v = (3 * torch.randn(starts[-1], H + 2 * G, K)).bfloat16().split((H, G, G), 1)  # views of one tensor
    got = attention_cpu.attention(q, k, v, starts, causal, 0.1)
    exact = by_sdpa(q.double(), k.double(), v.double(), starts, causal, 0.1)
    off, allowed = ((y.double() - exact).norm() for y in (got, by_sdpa(q, k, v, starts, causal, 0.1)))
    assert got.dtype == torch.bfloat16 and off <= 1.05 * allowed
    assert torch.equal(attention(q, k, v, starts, causal, 0.1), got)


def test_scores_far_apart():
    """The largest score of a query, not another's, is what it is measured by."""
    q = torch.tensor([[[30.0, 0]], [[-30.0, 0]], [[0.01, 0]]]).bfloat16()
    k, v = torch.tensor([[[30.0, 0]], [[-30.0, 0]], [[1.0, 0]]]).bfloat16(), torch.eye(3, 2).bfloat16()[:, None]
    got = attention_cpu.attention(q, k, v, [0, 3], False, 1.0)
    exact = by_sdpa(q.double(), k.double(), v.double(), [0, 3], False, 1.0)
    torch.testing.assert_close(got.double(), exact, atol=4e-3, rtol=0)


def test_what_it_does_not_take():
    x = torch.randn(4, 2, 64).bfloat16()
    assert attention_cpu.attention(x, x, x, [0, 4], False, 1.0) is not None
    for other in (x.float(), torch.randn(4, 2, 160).bfloat16(), x.transpose(0, 1), torch.randn(4, 2, 63).bfloat16()):
        assert attention_cpu.attention(other, other, other, [0, len(other)], False, 1.0) is None
