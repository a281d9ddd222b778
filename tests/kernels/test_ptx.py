"""Instructions of the PTX machine that each thread takes for itself, against numpy, torch and Python's integers."""

import json
from pathlib import Path

import numpy as np
import ptx
import pytest
import snippets
import torch
from snippets import each_thread, kernel, opcodes, run

TABLE = Path(__file__).parents[2] / "bench" / "results" / "compile.json"
THREADS = 128
NUMPY = {"s16": "i2", "s32": "i4", "s64": "i8", "u16": "u2", "u32": "u4", "u64": "u8", "b16": "u2", "b32": "u4"}
NUMPY |= {"f16": "f2", "f32x2": "u8", "b64": "u8", "f32": "f4", "bf16": "u2", "bf16x2": "u4", "pred": "u4"}


def bf16(bits):
    """Numbers of bf16 as torch has them, in fp32."""
    return torch.from_numpy(np.ascontiguousarray(bits, np.uint16)).view(torch.bfloat16).float()


def bits(numbers):
    """What torch rounds fp32 to; PTX writes every NaN as 0x7fff."""
    rounded = numbers.bfloat16().view(torch.uint16).numpy()
    return np.where(np.isnan(numbers.numpy()), np.uint16(0x7FFF), rounded)


def halves(function):
    """Of the lower and the upper half of 32 bits."""

    def both(*inputs):
        low, high = (function(*(bf16((x >> s & 0xFFFF).astype("u2")) for x in inputs)) for s in (0, 16))
        return bits(low).astype("u4") | bits(high).astype("u4") << np.uint32(16)

    return both


def two(function):
    """Of the lower and the upper fp32 of 64 bits."""

    def both(*inputs):
        parts = [x.view("f4").reshape(-1, 2) for x in inputs]
        return np.ascontiguousarray(np.stack([function(*(p[:, i] for p in parts)) for i in (0, 1)], 1)).view("u8")[:, 0]

    return both


def python(function, kind):
    """Element by element on Python's integers, cut to a type."""
    size = 8 * np.dtype(NUMPY[kind]).itemsize

    def all_of(*inputs):
        cut = [function(*map(int, numbers)) & ((1 << size) - 1) for numbers in zip(*inputs)]
        return np.array(cut, f"u{size // 8}").view(NUMPY[kind])

    return all_of


def tiny(x):
    """fp32 below the smallest normal number counts as zero."""
    return np.where(np.abs(x) < np.finfo("f4").tiny, np.copysign(np.float32(0), x), x).astype("f4")


def towards_zero(a, b):
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if b else -1


def extract(a, first, length, size=32):
    """`length` bits from `first` on, the sign of a negative number going on forever."""
    first, length = first & 0xFF, min(length & 0xFF, 32)
    return (a >> first) & ((1 << length) - 1)


def extract_signed(a, first, length):
    found, length = extract(a, first, length), min(length & 0xFF, 32)
    top = a >> min((first & 0xFF) + length - 1, 31) & 1 if length else 0
    return found - (1 << length) if top else found


FUSED = lambda a, b, c: torch.from_numpy((a.astype("f8") * b + c).astype("f4")).numpy()  # noqa: E731
# Instruction -> kinds of its inputs, of its output, and what it should be.
EACH: dict[str, tuple] = {}
for kind in ("s32", "s64", "u32", "u64"):
    EACH |= {
        f"add.{kind}": (f"{kind} {kind}", kind, python(lambda a, b: a + b, kind)),
        f"sub.{kind}": (f"{kind} {kind}", kind, python(lambda a, b: a - b, kind)),
        f"mul.lo.{kind}": (f"{kind} {kind}", kind, python(lambda a, b: a * b, kind)),
        f"min.{kind}": (f"{kind} {kind}", kind, np.minimum),
        f"max.{kind}": (f"{kind} {kind}", kind, np.maximum),
        f"mad.lo.{kind}": (f"{kind} {kind} {kind}", kind, python(lambda a, b, c: a * b + c, kind)),
        f"shr.{kind}": (f"{kind} u32", kind, python(lambda a, n: a >> n, kind)),
    }
EACH["shr.u16"] = ("u16 u32", "u16", python(lambda a, n: a >> n, "u16"))
for of, to in (("s32", "s64"), ("u32", "u64"), ("u16", "u32"), ("s16", "s32")):
    EACH[f"mul.wide.{of}"] = (f"{of} {of}", to, python(lambda a, b: a * b, to))
    EACH[f"mad.wide.{of}"] = (f"{of} {of} {to}", to, python(lambda a, b, c: a * b + c, to))
for kind in ("b16", "b32", "b64"):
    EACH |= {
        f"and.{kind}": (f"{kind} {kind}", kind, np.bitwise_and),
        f"or.{kind}": (f"{kind} {kind}", kind, np.bitwise_or),
        f"xor.{kind}": (f"{kind} {kind}", kind, np.bitwise_xor),
        f"not.{kind}": (kind, kind, np.invert),
        f"shl.{kind}": (f"{kind} u32", kind, python(lambda a, n: a << n, kind)),
        f"selp.{kind}": (f"{kind} {kind} pred", kind, lambda a, b, c: np.where(c != 0, a, b)),
    }
for kind in ("b16", "b32", "b64", "u16", "u32", "u64"):
    EACH[f"mov.{kind}"] = (kind, kind, lambda a: a)
for name, function in (("lt", np.less), ("le", np.less_equal), ("gt", np.greater), ("ge", np.greater_equal)):
    for kind in ("s16", "s32", "s64", "u16", "u32", "u64", "f32"):
        EACH[f"setp.{name}.{kind}"] = (f"{kind} {kind}", "pred", function)
    EACH[f"setp.{name}.bf16"] = ("bf16 bf16", "pred", lambda a, b, f=function: f(bf16(a).numpy(), bf16(b).numpy()))
for kind in ("b16", "b32", "b64", "f32", "s32"):
    EACH[f"setp.eq.{kind}"] = (f"{kind} {kind}", "pred", np.equal)
    if kind != "f32":
        EACH[f"setp.ne.{kind}"] = (f"{kind} {kind}", "pred", np.not_equal)
EACH |= {
    "and.pred": ("pred pred", "pred", lambda a, b: (a != 0) & (b != 0)),
    "or.pred": ("pred pred", "pred", lambda a, b: (a != 0) | (b != 0)),
    "xor.pred": ("pred pred", "pred", lambda a, b: (a != 0) ^ (b != 0)),
    "not.pred": ("pred", "pred", lambda a: a == 0),
    "mov.pred": ("pred", "pred", lambda a: a != 0),
    "add.f32": ("f32 f32", "f32", np.add),
    "sub.f32": ("f32 f32", "f32", np.subtract),
    "mul.f32": ("f32 f32", "f32", np.multiply),
    "min.f32": ("f32 f32", "f32", lambda a, b: np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.minimum(a, b)))),
    "max.f32": ("f32 f32", "f32", lambda a, b: np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.maximum(a, b)))),
    "div.full.f32": ("f32 f32", "f32", lambda a, b: a / b),
    "div.approx.f32": ("f32 f32", "f32", lambda a, b: a / b),
    "selp.f32": ("f32 f32 pred", "f32", lambda a, b, c: np.where(c != 0, a, b)),
    "neg.f32": ("f32", "f32", lambda a: (a.view("u4") ^ np.uint32(1 << 31)).view("f4")),
    "abs.f32": ("f32", "f32", lambda a: (a.view("u4") & np.uint32(0x7FFFFFFF)).view("f4")),
    "neg.s32": ("s32", "s32", python(lambda a: -a, "s32")),
    "neg.s64": ("s64", "s64", python(lambda a: -a, "s64")),
    "abs.s32": ("s32", "s32", python(abs, "s32")),
    "sqrt.rn.f32": ("f32", "f32", lambda a: np.sqrt(a.astype("f8")).astype("f4")),
    "fma.rn.f32": ("f32 f32 f32", "f32", FUSED),
    "fma.rn.ftz.f32": ("f32 f32 f32", "f32", lambda a, b, c: tiny(FUSED(tiny(a), tiny(b), tiny(c)))),
    "fma.rn.bf16": ("bf16 bf16 bf16", "bf16", lambda *x: bits(torch.addcmul(*(bf16(x[i]) for i in (2, 0, 1))))),
    "fma.rn.bf16x2": ("bf16x2 bf16x2 bf16x2", "bf16x2", halves(lambda a, b, c: torch.addcmul(c, a, b))),
    "mul.bf16": ("bf16 bf16", "bf16", lambda a, b: bits(bf16(a) * bf16(b))),
    "mul.bf16x2": ("bf16x2 bf16x2", "bf16x2", halves(lambda a, b: a * b)),
    "ex2.approx.f32": ("f32", "f32", lambda a: np.exp2(a.astype("f8")).astype("f4")),
    "ex2.approx.ftz.f32": ("f32", "f32", lambda a: tiny(np.exp2(tiny(a).astype("f8")).astype("f4"))),
    "div.s32": ("s32 s32", "s32", python(towards_zero, "s32")),
    "div.u32": ("u32 u32", "u32", python(towards_zero, "u32")),
    "mul.hi.u64": ("u64 u64", "u64", python(lambda a, b: a * b >> 64, "u64")),
    "bfe.u32": ("u32 u32 u32", "u32", python(extract, "u32")),
    "bfe.s32": ("s32 u32 u32", "s32", python(extract_signed, "s32")),
    "cvt.f32.bf16": ("bf16", "f32", lambda a: bf16(a).numpy()),
    "cvt.rn.bf16.f32": ("f32", "bf16", lambda a: bits(torch.from_numpy(a))),
    "cvt.rn.bf16x2.f32": ("f32 f32", "b32", lambda a, b: bits(torch.from_numpy(a)).astype("u4") << np.uint32(16)
                          | bits(torch.from_numpy(b))),
    "cvt.f32.f16": ("f16", "f32", lambda a: a.astype("f4")),
    "cvt.rn.f16.f32": ("f32", "f16", lambda a: torch.from_numpy(a).half().numpy()),
    "cvt.rn.f16x2.f32": ("f32 f32", "b32", lambda a, b: np.stack([b, a], 1).astype("f2").view("u4")[:, 0]),
    "add.rn.f32.bf16": ("bf16 f32", "f32", lambda a, b: bf16(a).numpy() + b),
    "add.rn.f32.f16": ("f16 f32", "f32", lambda a, b: a.astype("f4") + b),
    "add.f32x2": ("f32x2 f32x2", "f32x2", two(np.add)),
    "mul.f32x2": ("f32x2 f32x2", "f32x2", two(np.multiply)),
    "fma.rn.f32x2": ("f32x2 f32x2 f32x2", "f32x2", two(FUSED)),
    "cvt.rn.f32.s32": ("s32", "f32", lambda a: a.astype("f8").astype("f4")),
    "cvta.global.u64": ("u64", "u64", lambda a: a),
}  # fmt: skip
for of in ("s16", "u16", "s32", "u32", "s64", "u64"):
    for to in ("s16", "u16", "s32", "u32", "s64", "u64"):
        EACH[f"cvt.{to}.{of}"] = (of, to, python(lambda a: a, to))


def numbers(kind, at, small):
    """128 numbers of a type with all that is extreme; `small` for those that say by how many bits."""
    random = np.random.default_rng(at)
    if kind == "f32":
        extreme = [0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38, -3.4e38, 1, 1.1754944e-38, 65504]
        found = (random.standard_normal(THREADS) * 10.0 ** random.integers(-3, 4, THREADS)).astype("f4")
        found[: len(extreme)] = np.roll(np.array(extreme, "f4"), at)
        return found
    if kind == "f16":
        return numbers("f32", at, False).clip(-65504, 65504).astype("f2")
    if kind == "f32x2":  # without NaNs, whose bits differ
        return np.nan_to_num(random.standard_normal(2 * THREADS).astype("f4")).view("u8")
    if kind == "pred":
        return random.integers(0, 2, THREADS).astype("u4")
    if kind in ("bf16", "bf16x2"):
        found = np.concatenate([numbers("f32", at + i, False).view("u4") >> 16 for i in range(2)]).astype("u2")
        return found[:THREADS] if kind == "bf16" else found.view("u4")[:THREADS]
    kind = np.dtype(NUMPY[kind])
    if small:
        return random.integers(0, 70, THREADS).astype(kind)
    least, most = np.iinfo(kind).min, np.iinfo(kind).max
    found = random.integers(least, most, THREADS, dtype=kind, endpoint=True)
    found[:4], found[4:12] = [0, 1, least, most], random.integers(1, 100, 8)
    return np.roll(found, at)


def program(opcode):
    inputs, output, _ = EACH[opcode]
    places = ", ".join(f"{{{i}}}" for i in range(len(inputs.split())))
    return each_thread(f"{opcode} {{d}}, {places};", inputs, output, THREADS)


@pytest.mark.parametrize("opcode", EACH)
def test_one_instruction(opcode):
    """The same bits as numpy's for every kind of number; quotients and powers, of which PTX promises two units, too."""
    inputs, output, wanted = EACH[opcode]
    shifts = opcode[:3] in ("shl", "shr", "bfe")
    arrays = [numbers(kind, i, shifts and i > 0) for i, kind in enumerate(inputs.split())]
    with np.errstate(all="ignore"):
        exact = np.asarray(wanted(*arrays))
    got = np.zeros(THREADS, NUMPY[output])
    run(program(opcode), *arrays, got, threads=THREADS)
    exact = np.asarray(exact).astype(NUMPY[output])
    if opcode.startswith(("ex2", "div.full", "div.approx")):
        np.testing.assert_array_max_ulp(got[np.isfinite(exact)], exact[np.isfinite(exact)], 2)
        got, exact = (np.where(np.isfinite(exact), 0, x).astype("f4") for x in (got, exact))
    assert not len(snippets.wrong(got, exact)), (
        got[snippets.wrong(got, exact)][:4],
        exact[snippets.wrong(got, exact)][:4],
    )


OTHERS = {
    "not a number is not unequal": each_thread("setp.eq.f32 {d}, {0}, {0};", "f32", "pred", 32),
    "both halves": each_thread("setp.ge.bf16x2 %p1|%p2, {0}, {1};\nselp.b32 %r1, 1, 0, %p1;\nselp.b32 %r2, 2, 0, %p2;\n"
                               "or.b32 {d}, %r1, %r2;", "bf16x2 bf16x2", "b32", 32),
    "parts": each_thread("mov.b32 {{%rs1, %rs2}}, {0};\nmov.b32 %r1, {{%rs2, %rs1}};\nmov.b64 %rd9, {{%r1, {0}}};\n"
                         "mov.b64 {{_, %r2}}, %rd9;\nxor.b32 {d}, %r1, %r2;", "b32", "b32", 32),
    "constants": each_thread("add.s32 %r1, {0}, -5;\nand.b32 %r1, %r1, 0xffff;\nmov.b32 %r2, 0f3FC00000;\n"
                             "add.s32 {d}, %r1, %r2;", "s32", "s32", 32),
    "grids": each_thread("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;\nmov.b32 {d}, {0};",
                         "s32", "s32", 32),
    "guards": each_thread("setp.lt.s32 %p1, {0}, 10;\nmov.b32 {d}, 1;\n@%p1 mov.b32 {d}, 2;\n"
                          "@!%p1 add.s32 {d}, {d}, 5;", "s32", "s32", 32),
    "branches": each_thread("mov.b32 {d}, 0;\n$L_again:\nadd.s32 {d}, {d}, 3;\nadd.s32 {0}, {0}, -1;\n"
                            "setp.gt.s32 %p1, {0}, 0;\n@%p1 bra $L_again;\n{{\n.reg .pred done;\nagain:\n"
                            "setp.le.s32 done, {0}, -2;\nadd.s32 {0}, {0}, -1;\n@!done bra.uni again;\n}}\n"
                            "add.s32 {d}, {d}, {0};", "s32", "s32", 32),
}  # fmt: skip


def one(name, *arrays, kind="u4"):
    got = np.zeros(len(arrays[0]), kind)
    run(OTHERS[name], *arrays, got, threads=len(got))
    return got


def test_a_comparison_of_two_halves():
    a, b = numbers("bf16x2", 0, False)[:32], numbers("bf16x2", 1, False)[:32]
    low, high = ((bf16((a >> s).astype("u2")) >= bf16((b >> s).astype("u2"))).numpy() for s in (0, 16))
    assert (one("both halves", a, b) == low + 2 * high).all() and low.any() and not high.all()
    nan = np.array([np.nan, 1] * 16, "f4")
    assert (one("not a number is not unequal", nan) == [0, 1] * 16).all()


def test_parts_of_a_register():
    a = numbers("b32", 3, False)[:32]
    assert (one("parts", a) == ((a >> 16 | a << 16) ^ a)).all()


def test_constants():
    a = np.arange(-16, 16, dtype="i4")
    assert (one("constants", a, kind="i4") == ((a - 5) & 0xFFFF) + 0x3FC00000).all()


def test_grids_that_follow_each_other():
    a = np.arange(0, 32, dtype="i4")
    assert (one("grids", a, kind="i4") == a).all()


def test_guards():
    a = np.arange(0, 32, dtype="i4")
    assert (one("guards", a, kind="i4") == np.where(a < 10, 2, 6)).all()


@pytest.mark.parametrize("seed", (None, 1))
def test_threads_that_part_ways_meet_again(seed):
    """A loop that each thread takes a different number of times, and a label in a scope of its own."""
    a, got = np.arange(1, 33, dtype="i4"), np.zeros(32, "i4")
    run(OTHERS["branches"], a, got, seed=seed)
    assert (got == 3 * a - 3).all()


def test_registers_start_as_nans_and_shared_memory_too():
    got = np.zeros(32, "f4")
    run("mov.u32 %r0, %tid.x;\nmad.wide.u32 %rd9, %r0, 4, %rd0;\nst.global.b32 [%rd9], %r77;", got)
    assert np.isnan(got).all()
    run("mov.u32 %r0, %tid.x;\nld.shared.b32 %r1, [global_smem];\nmad.wide.u32 %rd9, %r0, 4, %rd0;\n"
        "st.global.b32 [%rd9], %r1;", got)  # fmt: skip
    assert np.isnan(got).all()


def test_an_unknown_instruction_is_an_error_where_nobody_gets_to_it():
    for line in ("add.rz.f32 %r1, %r2, %r3;", "sin.approx.f32 %r1, %r2;", "mma.sync.aligned.m16n8k8.row.col.f32.tf32;"):
        with pytest.raises(NotImplementedError, match=line.split()[0].rstrip(";").replace(".", r"\.")):
            run("bra $L_end;\n" + line + "\n$L_end:\n", np.zeros(4, "u4"))


def test_every_instruction_of_the_compile_table_has_a_test():
    """And is known to the machine. Those of several threads are in the other files' programs."""
    import test_ptx_matrices
    import test_ptx_memory
    import test_ptx_tiles

    programs = [program(opcode) for opcode in EACH] + [*OTHERS.values()]
    for file in (test_ptx_memory, test_ptx_matrices, test_ptx_tiles):
        programs += file.PROGRAMS.values()
    tested = set.union(*(opcodes(kernel(body, 4, 128)) for body in programs))
    listed = json.loads(TABLE.read_text())["opcodes"]
    for arch in ("sm_80", "sm_90"):
        assert len(listed[arch]) > 80
        assert not set(listed[arch]) - tested, arch
    for opcode in tested:
        ptx.known(opcode)
