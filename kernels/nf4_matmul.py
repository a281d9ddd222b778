"""y = x W^T + b with W in four bits, in the format of nf4_dequantize.py; the gradient of x for QLoRA.

One row is a product by shuffles, a few rows go to the tensor cores with the codes as the operand that is in registers
and the scale after the product; beyond, and for sizes that are no whole blocks of 64, W is dequantised for the library.
Letters: M rows, N outputs, K inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels import configs
from minillava.kernels.cpu import library
from minillava.kernels.cpu import product as cpu
from minillava.kernels.decode_tile import Around, outputs, put, wait
from minillava.kernels.frame import aligned, card_of, contiguous, jit, launch, register, shapes, tl
from minillava.kernels.nf4_dequantize import (
    WEIGHT,
    arguments,
    block_scales,
    check,
    code,
    codes,
    dequantize,
    in_order,
    pieces,
    table_of,
)

# What the kernels take of a configuration's variants. In fp32 one row is worth a kernel; products are the library's.
TYPES = {"gemv": (torch.float16, torch.bfloat16, torch.float32), "product": (torch.float16, torch.bfloat16)}

# -- reference ---------------------------------------------------------------------------------------------------------


def plain_forward(x_MK, packed, absmax, nested, dynamic, bias_N, N: int, quant_type: str, blocksize: int) -> Tensor:
    """Dequantise some rows of W that fit the cache, multiply, go on."""
    M, K = x_MK.shape
    y_MN = x_MK.new_empty(M, N)
    for rows, values in pieces(packed, absmax, nested, dynamic, N, K, quant_type, blocksize):
        y_MN[:, rows] = F.linear(x_MK, values.to(x_MK.dtype), None if bias_N is None else bias_N[rows])
    return y_MN


def plain_backward(dy_MN, packed, absmax, nested, dynamic, K: int, quant_type: str, blocksize: int) -> Tensor:
    """dx = dy W."""
    N = dy_MN.shape[1]
    return dy_MN @ dequantize(packed, absmax, nested, dynamic, N, K, quant_type, blocksize, dy_MN.dtype)


def cpu_forward(x_MK, packed, absmax, nested, dynamic, bias_N, N: int, quant_type: str, blocksize: int) -> Tensor:
    codes = packed, absmax, nested, dynamic, code(quant_type, packed.device), blocksize
    y_MN = cpu.multiply(x_MK, cpu.Weight((N, x_MK.shape[1]), codes=codes), bias_N)
    if y_MN is None:
        return plain_forward(x_MK, packed, absmax, nested, dynamic, bias_N, N, quant_type, blocksize)
    return y_MN


def cpu_backward(dy_MN, packed, absmax, nested, dynamic, K: int, quant_type: str, blocksize: int) -> Tensor:
    shape = dy_MN.shape[1], K
    weight = cpu.Weight(shape, codes=(packed, absmax, nested, dynamic, code(quant_type, packed.device), blocksize))
    if dy_MN.dtype not in cpu.TYPES or not weight.fits():
        return plain_backward(dy_MN, packed, absmax, nested, dynamic, K, quant_type, blocksize)
    dtype = dy_MN.dtype if library.multiplies_bf16() else torch.float32  # elsewhere bf16 is emulated (bench/LOG.md)
    return (dy_MN.to(dtype) @ cpu.values(weight, library.workspace("values", shape, dtype))).to(dy_MN.dtype)


# -- Triton ------------------------------------------------------------------------------------------------------------


@jit
def _four(x_ptr, keep, TYPE: tl.constexpr):
    """Four numbers in fp32, read as one int64; as two where they have 32 bits."""
    none = None if keep is None else 0
    x = tl.load(x_ptr, mask=keep, other=none)
    low, high = x.to(tl.int32), (x >> 32).to(tl.int32)
    if TYPE.primitive_bitwidth == 32:
        y = tl.load(x_ptr + 1, mask=keep, other=none)
        return (
            low.to(TYPE, bitcast=True), high.to(TYPE, bitcast=True),
            y.to(tl.int32).to(TYPE, bitcast=True), (y >> 32).to(tl.int32).to(TYPE, bitcast=True),
        )  # fmt: skip
    else:
        return (
            low.to(tl.int16).to(TYPE, bitcast=True).to(tl.float32),
            (low >> 16).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32),
            high.to(tl.int16).to(TYPE, bitcast=True).to(tl.float32),
            (high >> 16).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32),
        )


@jit
def _gemv(
    x_ptr, norm_ptr, words_ptr, absmax_ptr, nested_ptr, dynamic_ptr, table_ptr, bias_ptr, residual_ptr, y_ptr,
    M, N, groups, seven, eps, WIDTH: tl.constexpr, SHARED: tl.constexpr, EVEN: tl.constexpr, GATED: tl.constexpr,
    SHUFFLE: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """y = x W^T and what is around it, one row of x [M, 64 WIDTH] for each program_id(1): BLOCK_N outputs a program,
    BLOCKS blocks of 64 weights at a time. x is read as int64.

    Moves N K / 2 bytes, the scales and, from the L2 cache, x; under 4 instructions a weight, which is what bounds it:
    a thread holds a word of each row, so that x needs no exchange, and WIDTH is a constant, so that addresses of rows
    are. fp16, bf16, fp32; SHARED blocks of 64 have one scale.
    """
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    FOUR: tl.constexpr = TYPE.primitive_bitwidth // 16  # int64s that four numbers take
    first, place = outputs(N, BLOCK_N, GATED, EVEN)
    word = tl.arange(0, 8 * BLOCKS)[None, :]
    words_ptr += first * (WIDTH * 8) + (
        seven - 7
    )  # so that nobody knows of an alignment: a thread gets one word, not four
    words_ptr += place[:, None].to(tl.int64) * (WIDTH * 8) + word
    table = table_of(table_ptr, SHUFFLE)
    wait(PDL)
    x_ptr += tl.program_id(1).to(tl.int64) * (WIDTH * 16 * FOUR)
    acc = tl.zeros((BLOCK_N, 8 * BLOCKS), tl.float32)
    squares = tl.zeros((1, 8 * BLOCKS), tl.float32)
    WHOLE: tl.constexpr = WIDTH // BLOCKS * BLOCKS
    for at in tl.range(0, WHOLE, BLOCKS):
        acc, squares = _gemv_step(
            acc, squares, x_ptr, norm_ptr, words_ptr, absmax_ptr, nested_ptr, dynamic_ptr, table, first, place, at,
            groups, WIDTH, SHARED, SHUFFLE, TYPE, BLOCK_N, BLOCKS, False,
        )  # fmt: skip
    if WHOLE < WIDTH:
        acc, squares = _gemv_step(
            acc, squares, x_ptr, norm_ptr, words_ptr, absmax_ptr, nested_ptr, dynamic_ptr, table, first, place, WHOLE,
            groups, WIDTH, SHARED, SHUFFLE, TYPE, BLOCK_N, BLOCKS, True,
        )  # fmt: skip
    y = tl.sum(acc, 1)[:, None]
    if norm_ptr is not None:
        y *= 1.0 / tl.sqrt_rn(tl.sum(squares) / (WIDTH * 64) + eps)
    put(y, y_ptr, bias_ptr, residual_ptr, first, place, M, N, BLOCK_N, 1, GATED)


@jit
def _gemv_step(
    acc, squares, x_ptr, norm_ptr, words_ptr, absmax_ptr, nested_ptr, dynamic_ptr, table, first, place, at, groups,
    WIDTH: tl.constexpr, SHARED: tl.constexpr, SHUFFLE: tl.constexpr, TYPE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of each row from block `at` on, with TAIL as far as there are any."""
    FOUR: tl.constexpr = TYPE.primitive_bitwidth // 16
    word, block = tl.arange(0, 8 * BLOCKS)[None, :], tl.arange(0, BLOCKS)[None, :, None]
    keep = at + word // 8 < WIDTH if TAIL else None
    words = tl.load(words_ptr + at * 8, mask=keep, other=0 if TAIL else None)
    if nested_ptr is None and SHARED == 1:  # read where it is needed
        absmax_ptr += first * WIDTH + at
        scale = tl.load(absmax_ptr + (place[:, None] * WIDTH + word // 8), mask=keep, other=0.0 if TAIL else None)
    else:  # a scale a thread, then exchanged
        of = (first * WIDTH + at + place[:, None, None] * WIDTH + block) // SHARED
        keep_block = at + block < WIDTH if TAIL else None
        scale = block_scales(absmax_ptr, nested_ptr, dynamic_ptr, of, groups, keep_block)
        scale = scale.broadcast_to(BLOCK_N, BLOCKS, 8).reshape(BLOCK_N, 8 * BLOCKS)
    c0, c1, c2, c3, c4, c5, c6, c7 = codes(words, table, SHUFFLE)
    x_ptr += at * (16 * FOUR) + word * (2 * FOUR)
    x0, x1, x2, x3 = _four(x_ptr, keep, TYPE)
    x4, x5, x6, x7 = _four(x_ptr + FOUR, keep, TYPE)
    if norm_ptr is not None:
        squares += x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3 + x4 * x4 + x5 * x5 + x6 * x6 + x7 * x7
        norm_ptr += at * (16 * FOUR) + word * (2 * FOUR)
        w0, w1, w2, w3 = _four(norm_ptr, keep, TYPE)
        w4, w5, w6, w7 = _four(norm_ptr + FOUR, keep, TYPE)
        x0, x1, x2, x3, x4, x5, x6, x7 = x0 * w0, x1 * w1, x2 * w2, x3 * w3, x4 * w4, x5 * w5, x6 * w6, x7 * w7
    w = c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
    return acc + (w + c4 * x4 + c5 * x5 + c6 * x6 + c7 * x7) * scale, squares


@jit
def _product(
    x_ptr, norm_ptr, words_ptr, absmax_ptr, nested_ptr, dynamic_ptr, table_ptr, bias_ptr, residual_ptr, y_ptr,
    partial_ptr, M, N, blocks, groups, eps, SHARED: tl.constexpr, EVEN: tl.constexpr, GATED: tl.constexpr,
    SHUFFLE: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """y^T = W x^T and what is around it on tensor cores, a block of 64 inputs a step: the codes are the first operand,
    out of registers.

    Scales are exact and multiply the product: before it, ptxas could not overlap products on Hopper. 2MNK FLOPs; fp16
    and bf16. With SPLIT_K > 1 shares go to partial [SPLIT_K, M, N], fp32, and `_add` adds them in order (no norm, not
    gated).
    """
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    first, place = outputs(N, BLOCK_N, GATED, EVEN)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    word, depth = tl.arange(0, 8), tl.arange(0, 64)
    share = tl.cdiv(blocks, SPLIT_K)
    start = tl.program_id(2) * share
    rows = first + place
    words_ptr += rows[:, None] * (blocks * 8) + word[None, :]
    x_ptr += columns[None, :] * (blocks * 64) + depth[:, None]
    table = table_of(table_ptr, SHUFFLE)
    wait(PDL)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((64, BLOCK_M), tl.float32)
    for block in range(start, tl.minimum(start + share, blocks)):
        words = tl.load(words_ptr + block * 8)
        x = tl.load(x_ptr + block * 64, mask=(columns < M)[None, :], other=0.0)
        if norm_ptr is not None:
            wide = x.to(tl.float32)
            squares += wide * wide
            x = (wide * tl.load(norm_ptr + block * 64 + depth).to(tl.float32)[:, None]).to(TYPE)
        scale = block_scales(absmax_ptr, nested_ptr, dynamic_ptr, (rows * blocks + block) // SHARED, groups, None)
        c0, c1, c2, c3, c4, c5, c6, c7 = codes(words, table, SHUFFLE)
        w = in_order(c0, c1, c2, c3, c4, c5, c6, c7).reshape(BLOCK_N, 64)
        acc += tl.dot(w.to(TYPE), x) * scale[:, None]
    if norm_ptr is not None:
        acc *= 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / (blocks * 64) + eps)[None, :]
    if SPLIT_K > 1:
        column = first + tl.arange(0, BLOCK_N)
        inside = (column < N)[:, None] & (columns < M)[None, :]
        partial_ptr += tl.program_id(2).to(tl.int64) * M * N
        tl.store(partial_ptr + columns[None, :] * N + column[:, None], acc, mask=inside)
    else:
        put(acc, y_ptr, bias_ptr, residual_ptr, first, place, M, N, BLOCK_N, BLOCK_M, GATED)


@jit
def _add(
    partial_ptr, bias_ptr, residual_ptr, y_ptr, total, N, SPLIT_K: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr
):
    """The shares of `_product` [SPLIT_K, total], added in their order, bias and residual."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    wait(PDL)
    for share in tl.static_range(SPLIT_K):
        acc += tl.load(partial_ptr + share * total + at, mask=at < total, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + at % N, mask=at < total, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=at < total, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=at < total)


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


def triton_forward(
    x_MK, packed, absmax, nested, dynamic, bias_N, N: int, quant_type: str, blocksize: int, config: dict | None = None
) -> Tensor:
    """By the kernel that the configuration of so many rows and outputs names, or the library; the caching allocator
    hands every layer the same buffer for that."""
    weight = packed, absmax, nested, dynamic
    config = config or configs.choose("nf4_matmul", "forward", card_of(x_MK), x_MK.shape[0], N)
    if not takes(x_MK, blocksize, config):
        return F.linear(x_MK, dequantize(*weight, N, x_MK.shape[1], quant_type, blocksize, x_MK.dtype), bias_N)
    return multiply(x_MK, weight, bias_N, N, quant_type, blocksize, Around(), config)


def takes(x_MK: Tensor, blocksize: int, config: dict) -> bool:
    """Whether the configuration names a kernel, and that one takes these sizes."""
    fits = x_MK.shape[0] > 0 and x_MK.shape[1] % 64 == 0 and blocksize >= 64
    return fits and x_MK.dtype in TYPES.get(config["variant"], ())


def multiply(
    x_MK: Tensor, weight: tuple, bias_N: Tensor | None, N: int, quant_type: str, blocksize: int, around: Around,
    config: dict,
) -> Tensor:  # fmt: skip
    """The product and what is around it by the kernel that `config` names."""
    M, K = x_MK.shape
    norm, eps, gated, residual = around
    norm, residual, bias_N = map(contiguous, (norm, residual, bias_N))
    x_MK, y_MN, blocks = aligned(x_MK), x_MK.new_empty(M, N // 2 if gated else N), K // 64
    parts, groups, shuffle = arguments(*weight, quant_type)
    tiles, even = -(-N // config["block_n"]), N % config["block_n"] == 0
    constants = {"SHARED": blocksize // 64, "SHUFFLE": shuffle, "EVEN": even, "GATED": gated}
    if config["variant"] == "gemv":
        norm = None if norm is None else aligned(norm).view(torch.int64)
        args = x_MK.view(torch.int64), norm, *parts, bias_N, residual, y_MN, M, N, groups, 7, eps
        launch(_gemv, (tiles, M), *args, config=config, WIDTH=blocks, **constants)
        return y_MN
    shares, grid = config["split_k"], (tiles, -(-M // config["block_m"]), config["split_k"])
    partial = x_MK.new_empty(shares, M, N, dtype=torch.float32) if shares > 1 else None
    args = x_MK, norm, *parts, bias_N, residual, y_MN, partial, M, N, blocks, groups, eps
    launch(_product, grid, *args, config=config, **constants)
    if partial is not None:
        launch(_add, (-(-M * N // 1024),), partial, bias_N, residual, y_MN, M * N, N, SPLIT_K=shares, BLOCK=1024)
    return y_MN


def _setup_context(ctx, inputs, output) -> None:
    x_MK, *weight, _, _, ctx.quant_type, ctx.blocksize = inputs
    ctx.save_for_backward(*weight)
    ctx.K = x_MK.shape[1]


def _autograd(ctx, dy_MN: Tensor) -> tuple[Tensor | None, ...]:
    dx_MK = dbias_N = None
    if ctx.needs_input_grad[0]:
        dx_MK = _backward(dy_MN, *ctx.saved_tensors, ctx.K, ctx.quant_type, ctx.blocksize)
    if ctx.needs_input_grad[5]:
        dbias_N = dy_MN.sum(0)
    return dx_MK, None, None, None, None, dbias_N, None, None, None


_backward = register(
    f"nf4_matmul_backward(Tensor dy, {WEIGHT}, int K, str quant_type, int blocksize) -> Tensor",
    plain=plain_backward,
    cpu=cpu_backward,
    cuda=plain_backward,
    fake=lambda dy, packed, absmax, nested, dynamic, K, *_: dy.new_empty(dy.shape[0], K),
)
_forward = register(
    f"nf4_matmul(Tensor x, {WEIGHT}, Tensor? bias, int N, str quant_type, int blocksize) -> Tensor",
    plain=plain_forward,
    cpu=cpu_forward,
    cuda=triton_forward,
    fake=lambda x, packed, absmax, nested, dynamic, bias, N, *_: x.new_empty(x.shape[0], N),
    backward=_autograd,
    setup_context=_setup_context,
)
