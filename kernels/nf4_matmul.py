"""y = x W^T + b with W in four bits, in bitsandbytes' format (QLoRA, arXiv 2305.14314): codes, absmax, nested absmax.

Element e of the flattened [N, K] weight is code[nibble] * absmax[e // blocksize], an fp32 product, rounded once.
Byte i holds element 2i in its high nibble and 2i + 1 in its low one. Nested, absmax[b] is
dynamic[byte b] * nested[0, b // 256] + nested[1, b // 256]. Letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels.frame import register, shapes

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256  # values of absmax that share a scale of their own
CODES = {
    "nf4": (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
            0.7229568362236023, 1.0),
    "fp4": tuple(sign * twelfths / 12 for sign in (1, -1) for twelfths in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}  # fmt: skip
CHUNK = 1 << 20  # weights that the plain code dequantises at a time: they stay in the cache

# -- reference ---------------------------------------------------------------------------------------------------------


@functools.cache
def code(quant_type: str, device: torch.device) -> Tensor:
    """The 16 values of a quantisation type, fp32."""
    return torch.tensor(CODES[quant_type], device=device)


@functools.cache
def _pairs(quant_type: str, device: torch.device) -> Tensor:
    """The two values of every byte, [256, 2]: one look-up for two weights."""
    byte, values = torch.arange(256, device=device), code(quant_type, device)
    return torch.stack((values[byte >> 4], values[byte & 15]), 1)


def scales(absmax: Tensor, nested: Tensor | None, dynamic: Tensor | None) -> Tensor:
    """The fp32 scale of every block: absmax itself, or decoded from its bytes."""
    if nested is None or dynamic is None:
        return absmax
    of = torch.arange(len(absmax), device=absmax.device) // NESTED
    return dynamic[absmax.int()].mul_(nested[0, of]).add_(nested[1, of])


def plain_dequantize(
    packed: Tensor, absmax: Tensor, nested: Tensor | None, dynamic: Tensor | None,
    N: int, K: int, quant_type: str, blocksize: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """W [N, K] in `dtype`, equal to bitsandbytes' to the bit."""
    W = torch.empty(N * K, dtype=dtype, device=packed.device)
    scale, pairs = scales(absmax, nested, dynamic), _pairs(quant_type, packed.device)
    for start in range(0, N * K, CHUNK):
        part = W[start : start + CHUNK]
        values = torch.embedding(pairs, packed[start // 2 : (start + CHUNK) // 2].int()).flatten()[: len(part)]
        whole = len(part) // blocksize * blocksize
        of = scale[start // blocksize :]
        values[:whole].view(-1, blocksize).mul_(of[: whole // blocksize, None])
        values[whole:] *= of[whole // blocksize : whole // blocksize + 1]
        part.copy_(values)
    return W.view(N, K)


def plain_forward(x_MK, packed, absmax, nested, dynamic, bias_N, N: int, quant_type: str, blocksize: int) -> Tensor:
    """Dequantise some rows of W that fit the cache, multiply, go on."""
    M, K = x_MK.shape
    aligned = blocksize // math.gcd(K, blocksize) * (1 + K % 2)  # rows after which a block, and a byte, begin anew
    step = max(aligned, CHUNK // K // aligned * aligned)
    scale = scales(absmax, nested, dynamic)
    y_MN = x_MK.new_empty(M, N)
    for row in range(0, N, step):
        rows, e = min(step, N - row), row * K
        part = packed[e // 2 : (e + rows * K + 1) // 2]
        W = plain_dequantize(part, scale[e // blocksize :], None, None, rows, K, quant_type, blocksize, x_MK.dtype)
        y_MN[:, row : row + rows] = F.linear(x_MK, W, None if bias_N is None else bias_N[row : row + rows])
    return y_MN


def plain_backward(dy_MN, packed, absmax, nested, dynamic, K: int, quant_type: str, blocksize: int) -> Tensor:
    """dx = dy W."""
    N = dy_MN.shape[1]
    return dy_MN @ dequantize(packed, absmax, nested, dynamic, N, K, quant_type, blocksize, dy_MN.dtype)


# -- wrapper -----------------------------------------------------------------------------------------------------------


def nf4_matmul(
    x: Tensor, packed: Tensor, absmax: Tensor, nested: Tensor | None, dynamic: Tensor | None, bias: Tensor | None,
    N: int, quant_type: str, blocksize: int,
) -> Tensor:  # fmt: skip
    """x W^T + bias over the last dimension; x [..., K] in any floating type, `packed` uint8 [ceil(N K / 2)], `absmax` a
    value a block (fp32, or bytes with `nested` [2, blocks / 256] and `dynamic` [256]), bias [N] in x's type.

    Differentiable in x and bias. Raises ValueError for what does not fit or is not known.
    """
    K = x.shape[-1] if x.dim() else 0
    check(packed, absmax, nested, dynamic, N, K, quant_type, blocksize)
    if bias is not None and (bias.shape != (N,) or bias.dtype != x.dtype):
        raise ValueError(f"nf4_matmul: want a bias [{N}] in {x.dtype}, got {shapes(bias=bias)} in {bias.dtype}")
    y = _forward(x.reshape(-1, K), packed, absmax, nested, dynamic, bias, N, quant_type, blocksize)
    return y.view(*x.shape[:-1], N)


def check(packed, absmax, nested, dynamic, N: int, K: int, quant_type: str, blocksize: int) -> None:
    """Raise ValueError where the parts of a quantised [N, K] weight do not fit each other."""
    if quant_type not in CODES or blocksize not in BLOCKSIZES:
        raise ValueError(
            f"nf4_matmul: no quantisation {quant_type!r} with blocks of {blocksize}; {[*CODES]}, {BLOCKSIZES}"
        )
    blocks = -(-N * K // blocksize)
    fits = packed.shape == ((N * K + 1) // 2,) and absmax.shape == (blocks,) and packed.dtype == torch.uint8
    if absmax.dtype == torch.uint8:
        fits &= nested is not None and nested.shape == (2, -(-blocks // NESTED))
        fits &= dynamic is not None and dynamic.shape == (256,)
    else:
        fits &= absmax.dtype == torch.float32 and nested is None
    if not fits:
        got = shapes(packed=packed, absmax=absmax, nested=nested, dynamic=dynamic)
        raise ValueError(f"nf4_matmul: the parts do not make a weight [{N}, {K}] in blocks of {blocksize}: {got}")


def _fake(x_MK, packed, absmax, nested, dynamic, bias_N, N: int, quant_type: str, blocksize: int) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], N)


def _fake_backward(dy_MN, packed, absmax, nested, dynamic, K: int, quant_type: str, blocksize: int) -> Tensor:
    return dy_MN.new_empty(dy_MN.shape[0], K)


def _setup_context(ctx, inputs, output) -> None:
    x_MK, *weight, _, _, ctx.quant_type, ctx.blocksize = inputs
    ctx.save_for_backward(*weight)
    ctx.K = x_MK.shape[1]


def _autograd(ctx, dy_MN: Tensor) -> tuple[Tensor | None, ...]:
    dx_MK = (
        _backward(dy_MN, *ctx.saved_tensors, ctx.K, ctx.quant_type, ctx.blocksize) if ctx.needs_input_grad[0] else None
    )
    return dx_MK, None, None, None, None, dy_MN.sum(0) if ctx.needs_input_grad[5] else None, None, None, None


WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested, Tensor? dynamic"
dequantize = register(
    f"nf4_dequantize({WEIGHT}, int N, int K, str quant_type, int blocksize, ScalarType dtype) -> Tensor",
    plain=plain_dequantize,
    cuda=plain_dequantize,
    fake=lambda packed, absmax, nested, dynamic, N, K, quant_type, blocksize, dtype: packed.new_empty(
        N, K, dtype=dtype
    ),
)
_backward = register(
    f"nf4_matmul_backward(Tensor dy, {WEIGHT}, int K, str quant_type, int blocksize) -> Tensor",
    plain=plain_backward,
    cuda=plain_backward,
    fake=_fake_backward,
)
_forward = register(
    f"nf4_matmul(Tensor x, {WEIGHT}, Tensor? bias, int N, str quant_type, int blocksize) -> Tensor",
    plain=plain_forward,
    cuda=plain_forward,
    fake=_fake,
    backward=_autograd,
    setup_context=_setup_context,
)
