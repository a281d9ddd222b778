"""y = x W^T + b with W in four bits, in the format of nf4_dequantize.py; the gradient of x for QLoRA.

One row is a product by shuffles, a few rows go to the tensor cores with the codes as the operand that is in registers
and the scale after the product; beyond, and for sizes that are no whole blocks of 64, W is dequantised for the library.
Letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels import configs, nf4_cpu
from minillava.kernels.frame import aligned, card_of, jit, launch, register, shapes, tl
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
    if not nf4_cpu.takes(x_MK.dtype, packed, absmax, x_MK.shape[1]) or not len(x_MK):
        return plain_forward(x_MK, packed, absmax, nested, dynamic, bias_N, N, quant_type, blocksize)
    weight = packed, absmax, nested, dynamic, code(quant_type, packed.device), blocksize
    return nf4_cpu.forward(x_MK, bias_N, N, *weight)


def cpu_backward(dy_MN, packed, absmax, nested, dynamic, K: int, quant_type: str, blocksize: int) -> Tensor:
    if not nf4_cpu.takes(dy_MN.dtype, packed, absmax, K):
        return plain_backward(dy_MN, packed, absmax, nested, dynamic, K, quant_type, blocksize)
    weight = packed, absmax, nested, dynamic, code(quant_type, packed.device), blocksize
    return dy_MN @ nf4_cpu.values(dy_MN.shape[1], K, dy_MN.dtype, *weight)


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
    x_ptr, words_ptr, absmax_ptr, nested_ptr, dynamic_ptr, table_ptr, bias_ptr, y_ptr, N, blocks, groups,
    SHARED: tl.constexpr, EVEN: tl.constexpr, SHUFFLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y = x W^T + bias, one row of x [M, 64 blocks] for each program_id(1): BLOCK_N outputs a program, BLOCKS blocks
    of 64 weights at a time. x is read as int64.

    Moves N K / 2 bytes, the scales and, from the L2 cache, x; about 4 instructions a weight, which is what bounds it.
    fp16, bf16, fp32; SHARED blocks of 64 have one scale; STAGES loads are under way at a time.
    """
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    FOUR: tl.constexpr = TYPE.primitive_bitwidth // 16  # int64s that four numbers take
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block, word = tl.arange(0, BLOCKS), tl.arange(0, 8 * BLOCKS)
    words_ptr += rows[:, None].to(tl.int64) * (blocks * 8) + word[None, :]
    first = rows[:, None, None] * blocks + block[None, :, None]
    x_ptr += tl.program_id(1).to(tl.int64) * (blocks * 16 * FOUR) + word * (2 * FOUR)
    table = table_of(table_ptr, SHUFFLE)
    acc = tl.zeros((BLOCK_N, 8 * BLOCKS), tl.float32)
    for at in tl.range(0, blocks, BLOCKS, num_stages=STAGES):
        in_x = None if EVEN else at + word // 8 < blocks
        keep = None if EVEN else (rows < N)[:, None] & (at + word // 8 < blocks)[None, :]
        keep_block = None if EVEN else (rows < N)[:, None, None] & (at + block < blocks)[None, :, None]
        words = tl.load(words_ptr + at * 8, mask=keep, other=None if EVEN else 0)
        scale = block_scales(absmax_ptr, nested_ptr, dynamic_ptr, (first + at) // SHARED, groups, keep_block)
        scale = scale.broadcast_to(BLOCK_N, BLOCKS, 8).reshape(BLOCK_N, 8 * BLOCKS)
        c0, c1, c2, c3, c4, c5, c6, c7 = codes(words, table, SHUFFLE)
        x0, x1, x2, x3 = _four(x_ptr + at * (16 * FOUR), in_x, TYPE)
        x4, x5, x6, x7 = _four(x_ptr + at * (16 * FOUR) + FOUR, in_x, TYPE)
        w = c0 * x0[None] + c1 * x1[None] + c2 * x2[None] + c3 * x3[None]
        acc += (w + c4 * x4[None] + c5 * x5[None] + c6 * x6[None] + c7 * x7[None]) * scale
    y = tl.sum(acc, 1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + tl.program_id(1).to(tl.int64) * N + rows, y.to(TYPE), mask=rows < N)


@jit
def _product(
    x_ptr, words_ptr, absmax_ptr, nested_ptr, dynamic_ptr, table_ptr, bias_ptr, y_ptr, partial_ptr,
    M, N, blocks, groups, SHARED: tl.constexpr, SHUFFLE: tl.constexpr, LATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """y^T = W x^T on tensor cores, a block of 64 inputs a step: the codes are the first operand, out of registers.

    LATE multiplies by the scales after the product (few rows: exact scales, one multiplication a result), else before
    it. 2MNK FLOPs; fp16 and bf16. With SPLIT_K > 1 shares go to partial [SPLIT_K, M, N], fp32, and `_add` adds them in
    order.
    """
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    word, depth = tl.arange(0, 8), tl.arange(0, 64)
    share = tl.cdiv(blocks, SPLIT_K)
    start = tl.program_id(2) * share
    words_ptr += rows[:, None].to(tl.int64) * (blocks * 8) + word[None, :]
    x_ptr += columns[None, :] * (blocks * 64) + depth[:, None]
    table = table_of(table_ptr, SHUFFLE)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(start, tl.minimum(start + share, blocks)):
        words = tl.load(words_ptr + block * 8, mask=(rows < N)[:, None], other=0)
        x = tl.load(x_ptr + block * 64, mask=(columns < M)[None, :], other=0.0)
        scale = block_scales(absmax_ptr, nested_ptr, dynamic_ptr, (rows * blocks + block) // SHARED, groups, rows < N)
        c0, c1, c2, c3, c4, c5, c6, c7 = codes(words, table, SHUFFLE)
        w = in_order(c0, c1, c2, c3, c4, c5, c6, c7).reshape(BLOCK_N, 64)
        if LATE:
            acc += tl.dot(w.to(TYPE), x) * scale[:, None]
        else:
            acc = tl.dot((w * scale[:, None]).to(TYPE), x, acc)
    inside = (rows < N)[:, None] & (columns < M)[None, :]
    at = columns[None, :] * N + rows[:, None]
    if SPLIT_K > 1:
        tl.store(partial_ptr + tl.program_id(2).to(tl.int64) * M * N + at, acc, mask=inside)
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptr + at, acc.to(TYPE), mask=inside)


@jit
def _add(partial_ptr, bias_ptr, y_ptr, total, N, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """The shares of `_product` [SPLIT_K, total], added in their order, and the bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for share in tl.static_range(SPLIT_K):
        acc += tl.load(partial_ptr + share * total + at, mask=at < total, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + at % N, mask=at < total, other=0.0).to(tl.float32)
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
    (M, K), card, weight = x_MK.shape, card_of(x_MK), (packed, absmax, nested, dynamic)
    config = config or configs.choose("nf4_matmul", "forward", card, M, N)
    takes = M > 0 and K % 64 == 0 and blocksize >= 64 and N * K < 2**31
    if not takes or x_MK.dtype not in TYPES.get(config["variant"], ()):
        return F.linear(x_MK, dequantize(*weight, N, K, quant_type, blocksize, x_MK.dtype), bias_N)
    x_MK, y_MN, blocks = aligned(x_MK), x_MK.new_empty(M, N), K // 64
    parts, groups, shuffle = arguments(*weight, quant_type)
    tiles, constants = -(-N // config["block_n"]), {"SHARED": blocksize // 64, "SHUFFLE": shuffle}
    if config["variant"] == "gemv":
        even = blocks % config["blocks"] == N % config["block_n"] == 0
        args = x_MK.view(torch.int64), *parts, bias_N, y_MN, N, blocks, groups
        launch(_gemv, (tiles, M), *args, config=config, EVEN=even, **constants)
        return y_MN
    shares, grid = config["split_k"], (tiles, -(-M // config["block_m"]), config["split_k"])
    partial = x_MK.new_empty(shares, M, N, dtype=torch.float32) if shares > 1 else None
    args = x_MK, *parts, bias_N, y_MN, partial, M, N, blocks, groups
    launch(_product, grid, *args, config=config, **constants)
    if partial is not None:
        launch(_add, (-(-M * N // 1024),), partial, bias_N, y_MN, M * N, N, SPLIT_K=shares, BLOCK=1024)
    return y_MN


def _fake(x_MK, packed, absmax, nested, dynamic, bias_N, N: int, quant_type: str, blocksize: int) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], N)


def _fake_backward(dy_MN, packed, absmax, nested, dynamic, K: int, quant_type: str, blocksize: int) -> Tensor:
    return dy_MN.new_empty(dy_MN.shape[0], K)


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
    fake=_fake_backward,
)
_forward = register(
    f"nf4_matmul(Tensor x, {WEIGHT}, Tensor? bias, int N, str quant_type, int blocksize) -> Tensor",
    plain=plain_forward,
    cpu=cpu_forward,
    cuda=triton_forward,
    fake=_fake,
    backward=_autograd,
    setup_context=_setup_context,
)
