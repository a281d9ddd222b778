"""Weights in four bits in bitsandbytes' format (QLoRA, arXiv 2305.14314), and the operation that gives their values.

Element e of the flattened [N, K] weight is code[nibble] * absmax[e // blocksize], an fp32 product, rounded once.
Byte i holds element 2i in its high nibble and 2i + 1 in its low one. Nested, absmax[b] is
dynamic[byte b] * nested[0, b // 256] + nested[1, b // 256]. Letters: N outputs, K inputs.
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minillava.kernels import configs
from minillava.kernels.cpu import product as cpu
from minillava.kernels.frame import HAS_TRITON, aligned, card_of, contiguous, jit, launch, register, shapes, tl

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


def pieces(
    packed: Tensor, absmax: Tensor, nested: Tensor | None, dynamic: Tensor | None,
    N: int, K: int, quant_type: str, blocksize: int,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """W by rows, as many at a time as fit the cache: which rows, and their values [rows, K] in fp32."""
    scale, pairs = scales(absmax, nested, dynamic), _pairs(quant_type, packed.device)
    anew = blocksize // math.gcd(K, blocksize) * (1 + K % 2)  # rows after which a block, and a byte, begin anew
    step = max(anew, CHUNK // K // anew * anew)
    for row in range(0, N, step):
        rows = slice(row, min(row + step, N))
        first, last = rows.start * K, rows.stop * K
        values = torch.embedding(pairs, packed[first // 2 : (last + 1) // 2].int()).flatten()[: last - first]
        of, blocks = scale[first // blocksize :], len(values) // blocksize
        values[: blocks * blocksize].view(-1, blocksize).mul_(of[:blocks, None])
        values[blocks * blocksize :] *= of[blocks : blocks + 1]
        yield rows, values.view(-1, K)


def plain_dequantize(packed, absmax, nested, dynamic, N: int, K: int, quant_type: str, blocksize: int, dtype) -> Tensor:
    """W [N, K] in `dtype`, equal to bitsandbytes' to the bit."""
    W = torch.empty(N, K, dtype=dtype, device=packed.device)
    for rows, values in pieces(packed, absmax, nested, dynamic, N, K, quant_type, blocksize):
        W[rows] = values
    return W


def cpu_dequantize(packed, absmax, nested, dynamic, N: int, K: int, quant_type: str, blocksize: int, dtype) -> Tensor:
    weight = cpu.Weight((N, K), codes=(packed, absmax, nested, dynamic, code(quant_type, packed.device), blocksize))
    if dtype not in cpu.TYPES or not weight.fits():
        return plain_dequantize(packed, absmax, nested, dynamic, N, K, quant_type, blocksize, dtype)
    return cpu.values(weight, torch.empty(N, K, dtype=dtype))


# -- Triton ------------------------------------------------------------------------------------------------------------

# Lanes 0 to 15 and 16 to 31 of a warp each hold the table of codes, and a shuffle by the low four bits of a word finds
# one: two instructions a weight. Which lane it is the hardware has to say: tl.arange counts numbers, of which a lane
# may hold several. The eight codes of a word, in order: byte i holds element 2i in its high nibble. Both are pure: the
# same words give the same codes, wherever all lanes are; Triton 3.8 refuses in pipelined loops what is not.
_OF_LANE = (
    "{ .reg .b32 l; .reg .b64 p; mov.u32 l, %laneid; and.b32 l, l, 15; mad.wide.u32 p, l, 4, $1;"
    " ld.global.nc.b32 $0, [p]; }"
)
_SHIFTS = [8 * (i // 2) + 4 * (1 - i % 2) for i in range(8)]
_LOOK_UP = "".join(
    f"shr.u32 s, $8, {shift}; shfl.sync.idx.b32 ${i}, $9, s, 0x101f, 0xffffffff;\n" for i, shift in enumerate(_SHIFTS)
)
_LOOK_UP = f"{{ .reg .b32 s;\n{_LOOK_UP}}}"
if HAS_TRITON:
    _OF_LANE, _LOOK_UP, _GROUP = tl.constexpr(_OF_LANE), tl.constexpr(_LOOK_UP), tl.constexpr(NESTED)


@jit
def table_of(table_ptr, SHUFFLE: tl.constexpr):
    """What `codes` looks up in: the lane's own code, a scalar as Triton sees it; without SHUFFLE the address."""
    if SHUFFLE:
        return tl.inline_asm_elementwise(_OF_LANE, "=r,l", [table_ptr.to(tl.int64)], tl.float32, is_pure=True, pack=1)
    else:
        return table_ptr


@jit
def codes(words, table, SHUFFLE: tl.constexpr):
    """Words of eight nibbles -> eight tensors of fp32 codes; without SHUFFLE (other vendors, the interpreter) each code
    is read from memory."""
    if SHUFFLE:
        return tl.inline_asm_elementwise(
            _LOOK_UP, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words, table], (tl.float32,) * 8, is_pure=True, pack=1
        )
    else:
        return (
            tl.load(table + ((words >> 4) & 15)), tl.load(table + (words & 15)),
            tl.load(table + ((words >> 12) & 15)), tl.load(table + ((words >> 8) & 15)),
            tl.load(table + ((words >> 20) & 15)), tl.load(table + ((words >> 16) & 15)),
            tl.load(table + ((words >> 28) & 15)), tl.load(table + ((words >> 24) & 15)),
        )  # fmt: skip


@jit
def block_scales(absmax_ptr, nested_ptr, dynamic_ptr, block, groups, keep):
    """Scales of blocks `block`; nested ones come with a factor and an offset for each of `groups` of 256. The product
    is rounded before the sum, as bitsandbytes does: an fma with zero is not fused with it."""
    absmax = tl.load(absmax_ptr + block, mask=keep, other=None if keep is None else 0)
    if nested_ptr is not None:
        nested_ptr += block // _GROUP
        factor = tl.load(nested_ptr, mask=keep, other=None if keep is None else 0.0)
        offset = tl.load(nested_ptr + groups, mask=keep, other=None if keep is None else 0.0)
        absmax = tl.fma(tl.load(dynamic_ptr + absmax.to(tl.int32)), factor, 0.0) + offset
    return absmax


@jit
def in_order(c0, c1, c2, c3, c4, c5, c6, c7):
    """[..., W] eight times -> [..., W, 2, 2, 2], the codes of a word in their order."""
    return tl.join(tl.join(tl.join(c0, c4), tl.join(c2, c6)), tl.join(tl.join(c1, c5), tl.join(c3, c7)))


@jit
def _dequantize(
    words_ptr, absmax_ptr, nested_ptr, dynamic_ptr, table_ptr, w_ptr, words, groups,
    SIZE: tl.constexpr, SHUFFLE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The weight, WORDS words of eight a program; moves half a byte in and two out a weight. All types."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    packed = tl.load(words_ptr + word, mask=word < words, other=0)
    scale = block_scales(absmax_ptr, nested_ptr, dynamic_ptr, word * 8 // SIZE, groups, word < words)
    c0, c1, c2, c3, c4, c5, c6, c7 = codes(packed, table_of(table_ptr, SHUFFLE), SHUFFLE)
    w = in_order(c0 * scale, c1 * scale, c2 * scale, c3 * scale, c4 * scale, c5 * scale, c6 * scale, c7 * scale)
    at = tl.program_id(0).to(tl.int64) * (WORDS * 8) + tl.arange(0, WORDS * 8)
    tl.store(w_ptr + at, w.reshape(WORDS * 8).to(w_ptr.dtype.element_ty), mask=at < words * 8)


# -- wrapper -----------------------------------------------------------------------------------------------------------


def check(packed, absmax, nested, dynamic, N: int, K: int, quant_type: str, blocksize: int) -> None:
    """Raise ValueError where the parts of a quantised [N, K] weight do not fit each other."""
    if quant_type not in CODES or blocksize not in BLOCKSIZES:
        raise ValueError(
            f"nf4_matmul: no quantisation {quant_type!r} with blocks of {blocksize}; {[*CODES]}, {BLOCKSIZES}"
        )
    blocks = -(-N * K // blocksize)
    fits = packed.shape == ((N * K + 1) // 2,) and absmax.shape == (blocks,) and packed.dtype == torch.uint8
    if absmax.dtype == torch.uint8:
        fits &= nested is not None and nested.shape == (2, -(-blocks // NESTED)) and nested.dtype == torch.float32
        fits &= dynamic is not None and dynamic.shape == (256,) and dynamic.dtype == torch.float32
    else:
        fits &= absmax.dtype == torch.float32 and nested is None
    if not fits:
        got = shapes(packed=packed, absmax=absmax, nested=nested, dynamic=dynamic)
        types = ", ".join(str(t.dtype) for t in (packed, absmax, nested, dynamic) if t is not None)
        what = f"a weight [{N}, {K}] in blocks of {blocksize}"
        raise ValueError(f"nf4_matmul: the parts do not make {what} with scales in float32: {got} in {types}")


def arguments(packed: Tensor, absmax: Tensor, nested: Tensor | None, dynamic: Tensor | None, quant_type: str) -> tuple:
    """The weight as kernels take it, the distance of factors and offsets, and whether to look codes up by shuffles."""
    rest = *map(contiguous, (absmax, nested, dynamic)), code(quant_type, packed.device)
    shuffle = not packed.is_cpu and card_of(packed).arch.startswith("sm_")
    return (aligned(packed).view(torch.int32), *rest), 0 if nested is None else nested.shape[1], shuffle


def triton_dequantize(
    packed, absmax, nested, dynamic, N: int, K: int, quant_type: str, blocksize: int, dtype, config: dict | None = None
) -> Tensor:
    if N * K % 8 or dtype == torch.float64:
        return plain_dequantize(packed, absmax, nested, dynamic, N, K, quant_type, blocksize, dtype)
    W, words = torch.empty(N, K, dtype=dtype, device=packed.device), N * K // 8
    parts, groups, shuffle = arguments(packed, absmax, nested, dynamic, quant_type)
    config = config or configs.choose("nf4_matmul", "dequantize", card_of(packed), N, K)
    grid, constants = (-(-words // config["words"]),), {"SIZE": blocksize, "SHUFFLE": shuffle}
    launch(_dequantize, grid, *parts, W, words, groups, config=config, **constants)
    return W


WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested, Tensor? dynamic"
dequantize = register(
    f"nf4_dequantize({WEIGHT}, int N, int K, str quant_type, int blocksize, ScalarType dtype) -> Tensor",
    plain=plain_dequantize,
    cpu=cpu_dequantize,
    cuda=triton_dequantize,
    fake=lambda packed, absmax, nested, dynamic, N, K, kind, size, dtype: packed.new_empty(N, K, dtype=dtype),
)
