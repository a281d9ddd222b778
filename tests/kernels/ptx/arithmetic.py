"""What each thread computes for itself, and shuffles within a warp. Rounding is to nearest, ties to even."""

import re

import numpy as np

from .block import DTYPES, instruction

COMPARE = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal}
COMPARE |= {"ne": np.not_equal}
INTEGER = {"add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum}
FLOAT = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax, "div.full": np.divide}
FLOAT["div.approx"] = np.divide  # two units in the last place, as div.full
BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
UNARY = {"neg": np.negative, "abs": np.abs, "not": np.invert, "mov": np.positive, "sqrt.rn": np.sqrt}
SMALLEST = np.float32(2.0**-126)  # .ftz makes what is smaller 0


def widen(bits):
    """bf16 -> fp32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(numbers):
    """fp32 -> bf16, the NaN as PTX writes it."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), rounded)


def flush(numbers):
    return np.where(np.abs(numbers) < SMALLEST, np.copysign(np.float32(0), numbers), numbers)


def _numbers(block, operands, kind):
    """A function that gives all inputs in the type they are computed in."""
    views = [block.read(text, kind) for text in operands]
    return (lambda: [widen(view) for view in views]) if kind == "bf16" else lambda: views


def _direct(function, block, operands, kind):
    """A function of numpy's, straight from registers to a register."""
    out, *inputs = operands
    row, views = block.read(out, kind), [block.read(text, kind) for text in inputs]

    def run(on):
        function(*views, out=row, where=on)

    return run


def _computed(function, block, operands, kind, result=None):
    """Any function of the inputs as arrays."""
    out, *inputs = operands
    put, get = block.write(out, result or kind), _numbers(block, inputs, kind)
    rounded = narrow if (result or kind) == "bf16" else lambda numbers: numbers
    return lambda on: put(rounded(function(*get())), on)


@instruction(r"(add|sub|mul\.lo|min|max)\.([su](?:32|64))")
def _integer(block, operands, name, kind):
    return _direct(INTEGER[name], block, operands, kind)


@instruction(r"(add|sub|mul|min|max|div\.full|div\.approx)\.(f32)")
def _float(block, operands, name, kind):
    return _direct(FLOAT[name], block, operands, kind)


@instruction(r"(and|or|xor)\.(b16|b32|b64|pred)")
def _bitwise(block, operands, name, kind):
    return _direct(BITWISE[name], block, operands, kind)


@instruction(r"(not)\.(b16|b32|b64|pred)")
@instruction(r"(neg)\.(s32|s64|f32)")
@instruction(r"(abs)\.(s32|f32)")
@instruction(r"(sqrt\.rn)\.(f32)")
def _unary(block, operands, name, kind):
    return _direct(UNARY[name], block, operands, kind)


@instruction(r"fma\.rn\.bf16x2")
def _fused_halves(block, operands):
    """Exact in float64, but for sums of numbers 2^30 apart, where rounding twice could be seen."""

    def fused(*abc):
        low, high = (
            narrow(np.float32(a * b + c))
            for a, b, c in ([widen(x >> s & 0xFFFF).astype(np.float64) for x in abc] for s in (0, 16))
        )
        return high.astype(np.uint32) << 16 | low

    return _computed(fused, block, operands, "u32")


@instruction(r"mul\.bf16(x2)?")
def _product_of_halves(block, operands, two):
    if not two:
        return _computed(np.multiply, block, operands, "bf16")

    def product(a, b):
        low, high = (narrow(widen(a >> s & 0xFFFF) * widen(b >> s & 0xFFFF)) for s in (0, 16))
        return high.astype(np.uint32) << 16 | low

    return _computed(product, block, operands, "u32")


def _quotient(a, b):
    """Towards zero; all ones for a division by zero."""
    exact = np.trunc(a.astype(np.float64) / np.where(b == 0, 1, b))
    return np.where(b == 0, -1, exact.astype(np.int64)).astype(a.dtype)


@instruction(r"div\.([su]32)")
def _divide(block, operands, kind):
    return _computed(_quotient, block, operands, kind)


def _upper(a, b):
    """The upper 64 of 128 bits."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    return a1 * b1 + (middle >> half) + ((middle & low) + a0 * b1 >> half)


@instruction(r"mul\.hi\.u64")
def _upper_product(block, operands):
    return _computed(_upper, block, operands, "u64")


@instruction(r"(mul|mad)\.wide\.([su])(16|32)")
def _wide(block, operands, name, sign, bits):
    """Products of twice the bits, and a third number of as many."""
    out, a, b, *c = operands
    wide = f"{sign}{2 * int(bits)}"
    put, a, b = block.write(out, wide), block.read(a, sign + bits), block.read(b, sign + bits)
    c = block.read(c[0], wide) if c else DTYPES[wide].type(0)
    return lambda on: put(a.astype(DTYPES[wide]) * b.astype(DTYPES[wide]) + c, on)


@instruction(r"mad\.lo\.([su](?:32|64))")
def _multiply_add(block, operands, kind):
    return _computed(lambda a, b, c: a * b + c, block, operands, kind)


@instruction(r"fma\.rn(\.ftz)?\.(f32|bf16)")
def _fused(block, operands, ftz, kind):
    """Through float64, which holds the product; its sum is rounded twice, a chance in 2^29 to be off by one bit."""
    zero = flush if ftz else lambda numbers: numbers

    def fused(a, b, c):
        return zero(_multiply_and_add(zero(a), zero(b), zero(c)))

    return _computed(fused, block, operands, kind)


@instruction(r"ex2\.approx(\.ftz)?\.f32")
def _power(block, operands, ftz):
    return _computed((lambda a: flush(np.exp2(flush(a)))) if ftz else np.exp2, block, operands, "f32")


@instruction(r"(shl|shr)\.([bsu](?:16|32|64))")
def _shift(block, operands, way, kind):
    """By as many bits as a register has or more: all are out, but for the sign's."""
    out, a, by = operands
    put, a, by = block.write(out, kind), block.read(a, kind), block.read(by, "u32")
    size, of = 8 * DTYPES[kind].itemsize, DTYPES[kind]

    def run(on):
        few = np.minimum(by, size - 1).astype(of)
        moved = a << few if way == "shl" else a >> few
        put(moved if way == "shr" and kind[0] == "s" else np.where(by < size, moved, of.type(0)), on)

    return run


@instruction(r"bfe\.([su])32")
def _bits(block, operands, sign):
    """`length` bits from `first` on, with its highest bit in front of them if they are signed."""
    out, a, first, length = operands
    put, a = block.write(out, f"{sign}32"), block.read(a, f"{sign}32")
    first, length = block.read(first, "u32"), block.read(length, "u32")

    def run(on):
        start, count = (first & 0xFF).astype(np.int64), np.minimum(length & 0xFF, 32).astype(np.int64)
        long = a.astype(np.int64)
        found = (long >> start) & ((np.int64(1) << count) - 1)
        if sign == "s":
            top = (long >> np.minimum(start + count - 1, 31)) & 1
            found = np.where((count > 0) & (top > 0), found | (np.int64(-1) << count), found)
        put(found, on)

    return run


@instruction(r"setp\.(lt|le|gt|ge|eq|ne)\.([bsu](?:16|32|64)|f32|bf16)")
def _compare(block, operands, name, kind):
    """False where a number is NaN, for `ne` too."""
    a = (lambda x, y: (x < y) | (x > y)) if name == "ne" and kind in ("f32", "bf16") else COMPARE[name]
    return _computed(a, block, operands, kind, "pred")


@instruction(r"setp\.(lt|le|gt|ge|eq)\.bf16x2")
def _compare_halves(block, operands, name):
    outs, *inputs = operands
    puts = [block.write(out, "pred") for out in outs.split("|")]
    a, b = (block.read(text, "u32") for text in inputs)

    def run(on):
        found = [COMPARE[name](widen(a >> s & 0xFFFF), widen(b >> s & 0xFFFF)) for s in (0, 16)]
        for put, numbers in zip(puts, found):
            put(numbers, on)

    return run


@instruction(r"selp\.(b16|b32|b64|f32)")
def _select(block, operands, kind):
    out, a, b, which = operands
    put, a, b, which = block.write(out, kind), block.read(a, kind), block.read(b, kind), block.read(which, "pred")
    return lambda on: put(np.where(which, a, b), on)


@instruction(r"mov\.([bu](?:16|32|64)|pred)")
def _move(block, operands, kind):
    """A copy; or parts in braces, the lowest first, into a register, or a register into parts."""
    out, of = operands
    if "{" not in out + of:
        put, of = block.write(out, kind), block.read(of, kind)
        return lambda on: put(of, on)
    names = re.findall(r"[^\s,{}]+", of if "{" in of else out)
    bits = int(kind[1:]) // len(names)
    if "{" in of:
        put, parts = block.write(out, kind), [block.read(name, f"u{bits}") for name in names]
        whole = DTYPES[kind]
        return lambda on: put(sum(part.astype(whole) << whole.type(i * bits) for i, part in enumerate(parts)), on)
    of, puts = block.read(of, kind), [block.write(name, f"u{bits}") for name in names]

    def run(on):
        for i, put in enumerate(puts):
            put((of >> of.dtype.type(i * bits)).astype(DTYPES[f"u{bits}"]), on)

    return run


@instruction(r"cvta\.global\.u64")
def _address(block, operands):
    return _move(block, operands, "u64")


@instruction(r"cvt\.([su](?:16|32|64))\.([su](?:16|32|64))")
@instruction(r"cvt\.rn\.(f32)\.(s32)")
@instruction(r"cvt\.(f32)\.(bf16|f16)")
@instruction(r"cvt\.rn\.(bf16|f16)\.(f32)")
def _convert(block, operands, to, of):
    """Integers lose upper bits or get signs or zeros in front."""
    return _computed(lambda a: a.astype(DTYPES[to]) if of != "bf16" and to != "bf16" else a, block, operands, of, to)


@instruction(r"cvt\.rn\.(bf16|f16)x2\.f32")
def _convert_two(block, operands, kind):
    """The first number becomes the upper half."""
    half = narrow if kind == "bf16" else lambda a: np.asarray(a, np.float16).view(np.uint16)
    return _computed(lambda a, b: half(a).astype(np.uint32) << 16 | half(b), block, operands, "f32", "u32")


@instruction(r"add\.rn\.f32\.(bf16|f16)")
def _add_half(block, operands, kind):
    """A 16-bit number and one of 32."""
    out, a, b = operands
    put, half, b = block.write(out, "f32"), _numbers(block, [a], kind), block.read(b, "f32")
    return lambda on: put(half()[0].astype(np.float32) + b, on)


def _multiply_and_add(a, b, c):
    return (a.astype(np.float64) * b + c).astype(np.float32)


@instruction(r"(add|mul|fma\.rn)\.f32x2")
def _of_two(block, operands, name):
    """The same of the lower and the upper half of 64 bits."""
    out, *inputs = operands
    function = _multiply_and_add if name == "fma.rn" else FLOAT[name]
    views = [[block.registers[text].view(np.float32)[half::2] for text in (out, *inputs)] for half in (0, 1)]

    def run(on):
        for row, *numbers in views:
            np.copyto(row, function(*numbers), where=on)

    return run


@instruction(r"shfl\.sync\.(idx|bfly)\.b32", needs=32)
def _shuffle(block, operands, mode):
    """Another lane's number; one's own where that lane is outside of the segment that `c` describes."""
    out, a, index, c, members = operands
    assert members in ("-1", "0xffffffff")
    put, a, index, c = block.write(out, "u32"), block.read(a, "u32"), block.read(index, "u32"), block.read(c, "u32")
    lane, warp = block.lane.astype(np.uint32), np.arange(block.threads) // 32 * 32

    def run(on):
        segment = c >> 8 & 31
        last = (lane & segment) | (c & 31 & ~segment)
        source = (lane & segment) | (index & 31 & ~segment) if mode == "idx" else lane ^ (index & 31)
        put(a[warp + np.where(source <= last, source, lane)], on)

    return run
