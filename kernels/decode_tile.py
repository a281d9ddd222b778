"""What the products of a decode step share: which outputs a program makes, and what becomes of them before the store.

A decode step reads every weight once for a few rows of x, so norm, bias, SwiGLU and residual ride along: the norm's
weight on x and 1 / rms on the result, as both are linear. Where the card has programmatic dependent launch (Hopper and
later), a kernel starts while the one in front of it still runs, and waits before it reads what that one writes.
"""

from typing import NamedTuple

from torch import Tensor

from minillava.kernels.frame import HAS_TRITON, jit, tl

if HAS_TRITON:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


class Around(NamedTuple):
    """What is done around a product: RMSNorm of its input; of its outputs silu(first half) * second; a sum."""

    norm: Tensor | None = None  # [K]
    eps: float = 0.0
    gated: bool = False
    residual: Tensor | None = None  # [M, N], or half as wide with `gated`


@jit
def wait(PDL: tl.constexpr):
    """From here on the kernels in front are done, and the next one may start to wait."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@jit
def outputs(N, BLOCK_N: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr):
    """Rows of W for this program, [BLOCK_N] from the row in front: with GATED half a tile of gates and the ups that
    belong to them. Behind the last row it is repeated, so that loads need no mask."""
    if GATED:
        HALF: tl.constexpr = BLOCK_N // 2
        place = tl.arange(0, BLOCK_N) % HALF
        if not EVEN:
            place = tl.minimum(place, N // 2 - 1 - tl.program_id(0) * HALF)
        return tl.program_id(0).to(tl.int64) * HALF, place + (tl.arange(0, BLOCK_N) // HALF) * (N // 2)
    else:
        place = tl.arange(0, BLOCK_N)
        if not EVEN:
            place = tl.minimum(place, N - 1 - tl.program_id(0) * BLOCK_N)
        return tl.program_id(0).to(tl.int64) * BLOCK_N, place


@jit
def put(y, y_ptr, bias_ptr, residual_ptr, first, place, M, N, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
        GATED: tl.constexpr):  # fmt: skip
    """Store results [BLOCK_N, BLOCK_M] of rows `first` + `place` of W, in fp32, with all that comes after them."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + first + place).to(tl.float32)[:, None]
    width = N
    column = first + tl.arange(0, BLOCK_N)
    if GATED:
        gate, up = y.reshape(2, BLOCK_N // 2, BLOCK_M).permute(1, 2, 0).split()
        y = gate / (1.0 + tl.exp(-gate)) * up
        width = N // 2
        column = first + tl.arange(0, BLOCK_N // 2)
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = row[None, :] * width + column[:, None]
    inside = (row < M)[None, :] & (column < width)[:, None]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
