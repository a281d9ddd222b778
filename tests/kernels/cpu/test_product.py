"""Products with weights in 16, 8 and 4 bits against float64, by the code of every class of CPU."""

import pytest
import torch
import torch.nn.functional as F

from minillava.kernels.cpu import library as cpu
from minillava.kernels.cpu import product
from minillava.kernels.cpu.product import Weight
from minillava.kernels.nf4_dequantize import code, plain_dequantize
from minillava.layers.quantize import quantize

SIZES = (  # M, N, K, block size, nested scales
    (1, 40, 4096, 64, True),
    (7, 301, 4320, 64, False),  # a row ends in half a block; outputs that are no whole tiles
    (3, 67, 160, 4096, False),  # several rows in a block
    (2, 1030, 32, 32, True),
    (5, 37, 320, 64, True),  # a row ends in half a group of 128 inputs
    (16, 48, 256, 128, False),
    (8, 53, 192, 64, True),
    (2, 37, 320, 128, False),  # every other row begins in the middle of a block
    (9, 37, 192, 128, True),
    (11, 70, 576, 64, False),
    (33, 1104, 1024, 128, True),
    (70, 40, 96, 64, False),
)


def weights(N, K, blocksize, nested):
    """Weights of all kinds beside what they are in float64; rows differ by orders of magnitude."""
    w = torch.randn(N, K) * torch.logspace(-1, 1, N)[:, None]
    scales = w.abs().amax(1)
    in_bytes = (w / scales[:, None] * 127).round().to(torch.int8)
    parts = quantize(w, "nf4", blocksize, nested)
    codes = (*parts, code("nf4", w.device), blocksize)
    exact = plain_dequantize(*parts, N, K, "nf4", blocksize, torch.float64)
    yield "halves", Weight((N, K), w.bfloat16()), w.bfloat16().double()
    yield "bytes", Weight((N, K), in_bytes, scales), in_bytes.double() * scales.double()[:, None] / 127
    yield "codes", Weight((N, K), codes=codes), exact
    yield "rounded", Weight((N, K), codes=codes, rounded=True), exact


def rms_error(y, exact, unit):
    return ((y.double() - exact) / unit).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize(("M", "N", "K", "blocksize", "nested"), SIZES)
def test_error(c_code, M, N, K, blocksize, nested, dtype):
    """At most twice PyTorch's; where inputs are rounded to bytes, what that rounding is: 1 % of |x| |w| / sqrt(K)."""
    torch.manual_seed(0)
    x, bias = (torch.randn(M, K) * torch.logspace(-1, 1, M)[:, None]).to(dtype), torch.randn(N).to(dtype)
    for kind, weight, exact in weights(N, K, blocksize, nested):
        if kind == "halves" and dtype == torch.float32:
            continue
        want, unit = x.double() @ exact.T + bias.double(), x.double().norm(dim=1)[:, None] * exact.norm(dim=1)
        allowed = 2 * rms_error(F.linear(x, exact.to(dtype), bias), want, unit)
        if kind in ("bytes", "rounded") and dtype == torch.bfloat16:
            allowed += 0.01 / K**0.5
        takes = M <= cpu.FEW or dtype == torch.bfloat16
        for function in (product.multiply, *[product.by_rows] * takes):
            y = function(torch.stack((x, x), -1)[..., 0], weight, bias)
            assert y.dtype == dtype and rms_error(y, want, unit) <= allowed, (kind, function)


@pytest.mark.parametrize("M", (2, 8, 16, 40))
def test_bytes_are_what_they_are_said_to_be(c_code, M):
    """Inputs that are whole numbers of a step up to 127 in every span lose nothing."""
    torch.manual_seed(0)
    N, K = 50, 320
    x = torch.randint(-127, 128, (M, K)).float()
    x[:, ::16] = 127
    x = (x * (2.0 ** torch.arange(3)).repeat_interleave(128)[:K]).bfloat16()  # exact: seven bits
    in_bytes, scales = torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N) + 0.5
    exact = x.double() @ (in_bytes.double() * scales.double()[:, None] / 127).T
    y = product.by_rows(x, Weight((N, K), in_bytes, scales), None)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=exact.abs().max().item() * 1e-6)


def test_rows_do_not_change_each_other(c_code):
    """To the bit among 4, 8 or 16; else sums in fp32 are added in another order, of inputs rounded the same way."""
    torch.manual_seed(0)
    x = torch.randn(16, 256).bfloat16()
    for kind, weight, exact in weights(70, 256, 64, False):
        together = {most: product.by_rows(x[:most], weight, None) for most in (4, 8, 16)}
        for rows in (1, 2, 3, 5, 7, 9, 13):
            most = next(most for most in together if most >= rows)
            y = product.by_rows(x[:rows], weight, None)
            assert torch.equal(y, together[most][:rows]), (kind, rows)
        for most in (4, 8):
            off = (together[most].double() - together[16][:most].double()).abs()
            unit = x[:most].double().norm(dim=1)[:, None] * exact.norm(dim=1)
            assert (off <= 2**-7 * together[most].double().abs() + 1e-6 * unit).all(), (kind, most)
            assert (off == 0).double().mean() > 0.98, (kind, most)


def test_what_is_no_number_comes_out(c_code):
    for rows in (3, 7, 16, 20):
        x = torch.randn(rows, 128).bfloat16()
        x[1, 5] = float("nan")
        for kind, weight, _ in weights(30, 128, 64, False):
            y = product.by_rows(x, weight, None)
            assert y.isnan().any(1).tolist() == [row == 1 for row in range(rows)], (kind, rows)


def test_linear_takes_tensors_of_one_type(c_code):
    with torch.no_grad():
        for rows, K in ((1, 64), (2, 64), (16, 64), (65, 64), (2, 60), (70, 60), (577, 64)):  # whole 32s or not
            x, weight, bias = torch.randn(rows, K).bfloat16(), torch.randn(8, K).bfloat16(), torch.randn(8).bfloat16()
            y = product.linear(x, weight, bias)
            torch.testing.assert_close(y.double(), x.double() @ weight.double().T + bias.double(), atol=0.1, rtol=0.01)
        assert product.linear(x[:0], weight, bias).shape == (0, 8)
        with pytest.raises(RuntimeError, match="dtype"):
            product.linear(x.float(), weight, bias)
    assert product.linear(x, weight.requires_grad_(), bias).grad_fn is not None


def test_a_class_that_is_not_there_is_named(monkeypatch, caplog):
    monkeypatch.setenv("MINILLAVA_CPU", "z80")
    cpu.chosen_class.__wrapped__()
    assert "MINILLAVA_CPU=z80 is ignored" in caplog.text
