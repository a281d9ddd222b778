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

from minillava.kernels import configs, nf4_cpu
from minillava.kernels.frame import HAS_TRITON, card_of, jit, launch, register, shapes, tl

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


def cpu_forward(x_MK, packed, absmax, nested, dynamic, bias_N, N: int, quant_type: str, blocksize: int) -> Tensor:
    if not nf4_cpu.takes(x_MK.dtype, packed, absmax, x_MK.shape[1]) or not len(x_MK):
        return plain_forward(x_MK, packed, absmax, nested, dynamic, bias_N, N, quant_type, blocksize)
    weight = packed, absmax, nested, dynamic, code(quant_type, packed.device), blocksize
    return nf4_cpu.forward(x_MK, bias_N, N, *weight)


def cpu_dequantize(packed, absmax, nested, dynamic, N: int, K: int, quant_type: str, blocksize: int, dtype) -> Tensor:
    if not nf4_cpu.takes(dtype, packed, absmax, K):
        return plain_dequantize(packed, absmax, nested, dynamic, N, K, quant_type, blocksize, dtype)
    weight = packed, absmax, nested, dynamic, code(quant_type, packed.device), blocksize
    return nf4_cpu.fill(torch.empty(N, K, dtype=dtype), 0, *weight)


# -- Triton ------------------------------------------------------------------------------------------------------------

# The eight codes of a word, in order: byte i holds element 2i in its high nibble. Lanes 0 to 15 and 16 to 31 of a warp
# each hold the table, and a shuffle by the low four bits of the index looks a code up: two instructions a weight.
_LOOK_UP = (
    "{ .reg .b32 s;\n"
    + "".join(
        f"shr.u32 s, $8, {8 * (i // 2) + 4 * (1 - i % 2)}; shfl.sync.idx.b32 ${i}, $9, s, 0x101f, 0xffffffff;\n"
        for i in range(8)
    )
    + "}"
)
if HAS_TRITON:
    _LOOK_UP, _GROUP = tl.constexpr(_LOOK_UP), tl.constexpr(NESTED)


@jit
def _codes(words, table_ptr, lane, SHUFFLE: tl.constexpr):
    """Words of eight nibbles -> eight tensors of fp32 codes. `lane` counts along the words; without SHUFFLE (other
    vendors, the interpreter) each code is read from memory."""
    if SHUFFLE:
        table = tl.load(table_ptr + lane % 16)
        return tl.inline_asm_elementwise(
            _LOOK_UP, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words, table], (tl.float32,) * 8, is_pure=False, pack=1
        )
    return (
        tl.load(table_ptr + ((words >> 4) & 15)), tl.load(table_ptr + (words & 15)),
        tl.load(table_ptr + ((words >> 12) & 15)), tl.load(table_ptr + ((words >> 8) & 15)),
        tl.load(table_ptr + ((words >> 20) & 15)), tl.load(table_ptr + ((words >> 16) & 15)),
        tl.load(table_ptr + ((words >> 28) & 15)), tl.load(table_ptr + ((words >> 24) & 15)),
    )  # fmt: skip


@jit
def _scale(absmax_ptr, nested_ptr, dynamic_ptr, block, groups, keep):
    """Scales of blocks `block`; nested ones come with a factor and an offset for each of `groups` of 256."""
    absmax = tl.load(absmax_ptr + block, mask=keep, other=None if keep is None else 0)
    if nested_ptr is not None:
        nested_ptr += block // _GROUP
        factor = tl.load(nested_ptr, mask=keep, other=None if keep is None else 0.0)
        offset = tl.load(nested_ptr + groups, mask=keep, other=None if keep is None else 0.0)
        absmax = tl.load(dynamic_ptr + absmax.to(tl.int32)) * factor + offset
    return absmax


@jit
def _in_order(c0, c1, c2, c3, c4, c5, c6, c7):
    """[..., W] eight times -> [..., W, 2, 2, 2], the codes of a word in their order."""
    return tl.join(tl.join(tl.join(c0, c4), tl.join(c2, c6)), tl.join(tl.join(c1, c5), tl.join(c3, c7)))


@jit
def _four(x_ptr, keep, TYPE: tl.constexpr):
    """Four 16-bit numbers read as one, in fp32."""
    x = tl.load(x_ptr, mask=keep, other=None if keep is None else 0)
    low, high = x.to(tl.int32), (x >> 32).to(tl.int32)
    return (
        low.to(tl.int16).to(TYPE, bitcast=True).to(tl.float32),
        (low >> 16).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32),
        high.to(tl.int16).to(TYPE, bitcast=True).to(tl.float32),
        (high >> 16).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32),
    )


@jit
def _gemv(
    x_ptr, words_ptr, absmax_ptr, nested_ptr, dynamic_ptr, table_ptr, bias_ptr, y_ptr, N, blocks, groups,
    SHARED: tl.constexpr, EVEN: tl.constexpr, SHUFFLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y = x W^T + bias, one row of x [M, 64 blocks] for each program_id(1): BLOCK_N outputs a program, BLOCK_B blocks
    of 64 weights at a time. x is read four numbers at once, as int64.

    Moves N K / 2 bytes, the scales and, from the L2 cache, x; about 4 instructions a weight, which is what bounds it.
    fp16 and bf16; SHARED blocks of 64 have one scale; STAGES loads are under way at a time.
    """
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block, word = tl.arange(0, BLOCK_B), tl.arange(0, 8)
    inside = block[None, :, None] * 8 + word[None, None, :]
    in_rows = (rows < N)[:, None, None]
    words_ptr += rows[:, None, None].to(tl.int64) * (blocks * 8) + inside
    first = rows[:, None, None] * blocks + block[None, :, None]
    x_ptr += tl.program_id(1).to(tl.int64) * (blocks * 16) + inside * 2
    acc = tl.zeros((BLOCK_N, BLOCK_B, 8), tl.float32)
    for at in tl.range(0, blocks, BLOCK_B, num_stages=STAGES):
        in_x = None if EVEN else (at + block < blocks)[None, :, None]
        keep = None if EVEN else in_rows & in_x
        words = tl.load(words_ptr + at * 8, mask=keep, other=None if EVEN else 0)
        scale = _scale(absmax_ptr, nested_ptr, dynamic_ptr, (first + at) // SHARED, groups, keep)
        c0, c1, c2, c3, c4, c5, c6, c7 = _codes(words, table_ptr, rows[:, None, None] * 0 + inside, SHUFFLE)
        x0, x1, x2, x3 = _four(x_ptr + at * 16, in_x, TYPE)
        x4, x5, x6, x7 = _four(x_ptr + at * 16 + 1, in_x, TYPE)
        acc += (c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3 + c4 * x4 + c5 * x5 + c6 * x6 + c7 * x7) * scale
    y = tl.sum(tl.sum(acc, 2), 1)
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
    it. 2MNK FLOPs. With SPLIT_K > 1 shares go to partial [SPLIT_K, M, N], fp32, and `_add` adds them in order.
    """
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    word, depth = tl.arange(0, 8), tl.arange(0, 64)
    share = tl.cdiv(blocks, SPLIT_K)
    start = tl.program_id(2) * share
    words_ptr += rows[:, None].to(tl.int64) * (blocks * 8) + word[None, :]
    x_ptr += columns[None, :] * (blocks * 64) + depth[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(start, tl.minimum(start + share, blocks)):
        words = tl.load(words_ptr + block * 8, mask=(rows < N)[:, None], other=0)
        x = tl.load(x_ptr + block * 64, mask=(columns < M)[None, :], other=0.0)
        scale = _scale(absmax_ptr, nested_ptr, dynamic_ptr, (rows * blocks + block) // SHARED, groups, rows < N)
        c0, c1, c2, c3, c4, c5, c6, c7 = _codes(words, table_ptr, rows[:, None] * 0 + word[None, :], SHUFFLE)
        w = _in_order(c0, c1, c2, c3, c4, c5, c6, c7).reshape(BLOCK_N, 64)
        if LATE:
            acc += tl.dot(w.to(TYPE), x, input_precision="ieee") * scale[:, None]
        else:
            acc = tl.dot((w * scale[:, None]).to(TYPE), x, acc, input_precision="ieee")
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


@jit
def _dequantize(
    words_ptr, absmax_ptr, nested_ptr, dynamic_ptr, table_ptr, w_ptr, words, groups,
    SIZE: tl.constexpr, SHUFFLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weight, BLOCK words of eight a program; moves half a byte in and two out a weight. All types."""
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    codes = tl.load(words_ptr + word, mask=word < words, other=0)
    scale = _scale(absmax_ptr, nested_ptr, dynamic_ptr, word * 8 // SIZE, groups, word < words)
    c0, c1, c2, c3, c4, c5, c6, c7 = _codes(codes, table_ptr, tl.arange(0, BLOCK), SHUFFLE)
    w = _in_order(c0 * scale, c1 * scale, c2 * scale, c3 * scale, c4 * scale, c5 * scale, c6 * scale, c7 * scale)
    at = tl.program_id(0).to(tl.int64) * (BLOCK * 8) + tl.arange(0, BLOCK * 8)
    tl.store(w_ptr + at, w.reshape(BLOCK * 8).to(w_ptr.dtype.element_ty), mask=at < words * 8)


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


def _weight(packed: Tensor, absmax: Tensor, nested: Tensor | None, dynamic: Tensor | None, quant_type: str) -> tuple:
    """The weight as the kernels take it, and whether to look codes up by shuffles."""
    card = card_of(packed)
    table = code(quant_type, packed.device)
    parts = packed.contiguous().view(torch.int32), absmax, nested, dynamic, table
    return parts, not packed.is_cpu and card.arch.startswith("sm_")


def _whole(packed: Tensor) -> bool:
    """Whether the codes are whole words on a 16-byte address, as loads want them."""
    return packed.numel() % 4 == 0 and (packed.is_meta or packed.data_ptr() % 16 == 0)


def triton_dequantize(
    packed, absmax, nested, dynamic, N: int, K: int, quant_type: str, blocksize: int, dtype, config: dict | None = None
) -> Tensor:
    if N * K % 8 or not _whole(packed) or dtype == torch.float64:
        return plain_dequantize(packed, absmax, nested, dynamic, N, K, quant_type, blocksize, dtype)
    W = torch.empty(N, K, dtype=dtype, device=packed.device)
    parts, shuffle = _weight(packed, absmax, nested, dynamic, quant_type)
    words, groups = N * K // 8, 0 if nested is None else nested.stride(0)
    config = config or configs.choose("nf4_matmul", "dequantize", card_of(packed), N, K)
    constants = {"SIZE": blocksize, "SHUFFLE": shuffle, "BLOCK": config["words"], "num_warps": config["warps"]}
    launch(_dequantize, (-(-words // config["words"]),), *parts, W, words, groups, **constants)
    return W


def triton_forward(
    x_MK, packed, absmax, nested, dynamic, bias_N, N: int, quant_type: str, blocksize: int, config: dict | None = None
) -> Tensor:
    """The kernel that the configuration of so many rows and outputs names: one row's, tensor cores', or, for many rows
    and sizes that are no whole blocks of 64, dequantised weights and the library's product. The caching allocator hands
    every layer the same buffer."""
    M, K = x_MK.shape
    card = card_of(x_MK)
    config = config or configs.choose("nf4_matmul", "forward", card, M, N)
    takes = x_MK.dtype in (torch.float16, torch.bfloat16)
    takes &= K % 64 == 0 and blocksize >= 64 and _whole(packed) and N * K < 2**31 and M > 0
    if not takes or config["variant"] == "library":
        return F.linear(
            x_MK, dequantize(packed, absmax, nested, dynamic, N, K, quant_type, blocksize, x_MK.dtype), bias_N
        )
    x_MK = x_MK.contiguous()
    x_MK = x_MK if x_MK.is_meta or x_MK.data_ptr() % 16 == 0 else x_MK.clone()
    parts, shuffle = _weight(packed, absmax, nested, dynamic, quant_type)
    y_MN = x_MK.new_empty(M, N)
    blocks, groups = K // 64, 0 if nested is None else nested.stride(0)
    constants = {"SHARED": blocksize // 64, "SHUFFLE": shuffle, "BLOCK_N": config["block_n"]}
    constants["num_warps"] = config["warps"]
    if config["variant"] == "gemv":
        constants |= {
            "BLOCK_B": config["blocks"],
            "EVEN": blocks % config["blocks"] == N % config["block_n"] == 0,
            "STAGES": config["stages"],
        }
        grid = -(-N // config["block_n"]), M
        launch(_gemv, grid, x_MK.view(torch.int64), *parts, bias_N, y_MN, N, blocks, groups, **constants)
        return y_MN
    shares, block_m = config["split_k"], config["block_m"]
    partial = torch.empty(shares, M, N, dtype=torch.float32, device=x_MK.device) if shares > 1 else None
    constants |= {"LATE": config["late"], "BLOCK_M": block_m, "SPLIT_K": shares, "num_stages": config["stages"]}
    grid3 = -(-N // config["block_n"]), -(-M // block_m), shares
    launch(_product, grid3, x_MK, *parts, bias_N, y_MN, partial, M, N, blocks, groups, **constants)
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
    dx_MK = (
        _backward(dy_MN, *ctx.saved_tensors, ctx.K, ctx.quant_type, ctx.blocksize) if ctx.needs_input_grad[0] else None
    )
    return dx_MK, None, None, None, None, dy_MN.sum(0) if ctx.needs_input_grad[5] else None, None, None, None


WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested, Tensor? dynamic"
dequantize = register(
    f"nf4_dequantize({WEIGHT}, int N, int K, str quant_type, int blocksize, ScalarType dtype) -> Tensor",
    plain=plain_dequantize,
    cpu=cpu_dequantize,
    cuda=triton_dequantize,
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
    cpu=cpu_forward,
    cuda=triton_forward,
    fake=_fake,
    backward=_autograd,
    setup_context=_setup_context,
)
