"""Matrices in the PTX machine: between registers and shared memory, and through tensor cores.

Where an operand's numbers lie is written down here a second time, from the tables of the PTX ISA: with shuffled chunks
as a table of chunks for each swizzle mode, without as atoms in the order of their strides.
"""

import numpy as np
import pytest
import torch
from snippets import run

LANE, COLUMN = np.arange(32) // 4, 2 * (np.arange(32) % 4)
START = "mov.u32 %r0, %tid.x;\nmov.b32 %r8, global_smem;\nmul.lo.s32 %r9, %r0, 16;\nadd.s32 %r9, %r8, %r9;\n"
# Shared memory is filled from the first array, 16 bytes a thread at a time.
FILL = "mad.wide.u32 %rd8, %r0, 16, %rd0;\nmov.b32 %r7, {times};\n$L_fill:\n" \
       "ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd8];\nst.shared.v4.b32 [%r9], {{%r1, %r2, %r3, %r4}};\n" \
       "add.s32 %r9, %r9, {step};\nadd.s64 %rd8, %rd8, {step};\nadd.s32 %r7, %r7, -1;\n" \
       "setp.gt.s32 %p1, %r7, 0;\n@%p1 bra $L_fill;\nfence.proxy.async.shared::cta;\nbar.sync 0;\n"  # fmt: skip


def vector(first, count):
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def rows_out(parameter, first, count):
    """Registers of each thread, one after the other."""
    lines = f"mad.wide.u32 %rd9, %r0, {4 * count}, %rd{parameter};\n"
    return lines + "".join(f"st.global.b32 [%rd9+{4 * i}], %r{first + i};\n" for i in range(count))


def rows_in(parameter, first, count):
    lines = f"mad.wide.u32 %rd9, %r0, {4 * count}, %rd{parameter};\n"
    return lines + "".join(f"ld.global.b32 %r{first + i}, [%rd9+{4 * i}];\n" for i in range(count))


PROGRAMS = {}
for count in (1, 2, 4):
    for turned in ("", ".trans"):
        # Row i of matrix j is 16 bytes at 128 j + 16 (7 - i): upside down.
        place = f"and.b32 %r5, %r0, 7;\nxor.b32 %r5, %r5, 7;\nshr.u32 %r6, %r0, 3;\nand.b32 %r6, %r6, {count - 1};\n" \
                "mul.lo.s32 %r6, %r6, 128;\nmad.lo.s32 %r6, %r5, 16, %r6;\nadd.s32 %r6, %r6, %r8;\n"  # fmt: skip
        name = f"matrix.sync.aligned.m8n8.x{count}{turned}.shared.b16"
        PROGRAMS["ld" + name] = START + FILL.format(times=1, step=512) + place
        PROGRAMS["ld" + name] += f"ld{name} {vector(20, count)}, [%r6];\n" + rows_out(1, 20, count)
        PROGRAMS["st" + name] = START + place + rows_in(0, 20, count) + f"st{name} [%r6], {vector(20, count)};\n"
        PROGRAMS["st" + name] += "bar.sync 0;\nld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9];\n" + rows_out(1, 1, 4)
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
PROGRAMS["mma"] = START + rows_in(0, 20, 4) + rows_in(1, 24, 2) + rows_in(2, 26, 4)
PROGRAMS["mma"] += f"{MMA} {vector(30, 4)}, {vector(20, 4)}, {vector(24, 2)}, {vector(26, 4)};\n" + rows_out(3, 30, 4)

WIDTHS = (8, 16, 32, 64, 128, 256)
HERE = "wgmma.mma_async.sync.aligned.m64n{}k16.f32.bf16.bf16 "


def product(N, left, turned, keep=1, waits=0):
    """d = left b + d of [64, N]; shared memory, descriptors, a's registers and d's come from four arrays."""
    body = START + FILL.format(times=24, step=2048) + "ld.global.b64 %rd10, [%rd1];\nld.global.b64 %rd11, [%rd1+8];\n"
    body += rows_in(2, 10, 4) + rows_in(3, 100, N // 2)
    body += f"mov.b32 %r5, {keep};\nsetp.ne.b32 %p2, %r5, 0;\nwgmma.fence.sync.aligned;\n"
    a = vector(10, 4) if left == "registers" else "%rd10"
    turns = f"{turned[1]}" if left == "registers" else f"{turned[0]}, {turned[1]}"
    body += HERE.format(N) + f"{vector(100, N // 2)}, {a}, %rd11, %p2, 1, 1, {turns};\n"
    body += f"wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned {waits};\n"
    return body + rows_out(3, 100, N // 2)


PROGRAMS |= {f"wgmma {N} {left}": product(N, left, (0, 0)) for N in WIDTHS for left in ("memory", "registers")}


def shorts(shape, seed=0):
    """bf16 numbers, as bits and as fp32."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return numbers.view(torch.uint16).numpy(), numbers.float().numpy()


def lanes(matrix):
    """Of an 8 x 8 matrix, the register of each lane."""
    return matrix[LANE, COLUMN].astype("u4") | matrix[LANE, COLUMN + 1].astype("u4") << np.uint32(16)


@pytest.mark.parametrize("turned", (False, True))
@pytest.mark.parametrize("count", (1, 2, 4))
def test_matrices_of_a_warp(count, turned):
    name = f"matrix.sync.aligned.m8n8.x{count}{'.trans' * turned}.shared.b16"
    source, _ = shorts((4, 8, 8))
    got = np.zeros((32, count), "u4")
    run(PROGRAMS["ld" + name], source, got)
    wanted = np.stack([lanes(m.T if turned else m) for m in source[:count, ::-1]], 1)
    assert (got == wanted).all()
    written = np.full((32, 4), 5, "u4")
    run(PROGRAMS["st" + name], np.ascontiguousarray(wanted), written)
    assert (written.view("u2").reshape(-1)[: count * 64] == source[:count].reshape(-1)).all()
    assert (written.view("u2").reshape(-1)[count * 64 :] == 0xFFFF).all()


def a_registers(a):
    """[16, 16] -> [32 lanes, 4]."""
    return np.stack([lanes(a[i : i + 8, j : j + 8]) for j in (0, 8) for i in (0, 8)], 1)


def test_a_warp_multiplies():
    (a, a_f), (b, b_f) = shorts((16, 16)), shorts((16, 8), 1)
    c = np.random.default_rng(2).standard_normal((16, 8)).astype("f4")
    b_bits = np.stack([lanes(b.T[:, i : i + 8]) for i in (0, 8)], 1)
    spots = [(LANE + 8 * (i // 2), COLUMN + i % 2) for i in range(4)]
    got = np.zeros((32, 4), "f4")
    run(PROGRAMS["mma"], a_registers(a), b_bits, np.stack([c[s] for s in spots], 1), got)
    wanted = a_f.astype("f8") @ b_f + c
    np.testing.assert_allclose(got, np.stack([wanted[s] for s in spots], 1), rtol=1e-5, atol=1e-5)


# -- operands in shared memory -----------------------------------------------------------------------------------------

# For each swizzle mode of a descriptor: where chunk c of row r lies among the chunks of an atom of 8 rows.
SHUFFLED = {
    1: [[c ^ r for c in range(8)] for r in range(8)],
    2: [[c ^ r // 2 for c in range(4)] for r in range(8)],
    3: [[c ^ r // 4 for c in range(2)] for r in range(8)],
}
MODES = (0, 1, 2, 3)


def descriptor(start, leading, stride, mode):
    return (1024 + start) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def lay(memory, start, matrix, mode, turned):
    """Put [rows, 16] into shared memory; gives the descriptor's leading and stride."""
    rows = len(matrix)
    if (
        mode == 0
    ):  # atoms of 8 x 8, those along the rows one after the other; a row of bytes is along the rows if turned
        gap = 128 * (rows // 8)
        for r in range(rows):
            for k in range(16):
                inner = (k % 8) * 8 + r % 8 if turned else (r % 8) * 8 + k % 8
                memory[start // 2 + (r // 8) * 64 + (k // 8) * gap // 2 + inner] = matrix[r, k]
        return gap, 128
    wide = 8 * len(SHUFFLED[mode][0])  # numbers in a row of bytes
    for r in range(rows):
        for k in range(16):
            line, place, atom = (k % 8, r % wide, r // wide * 2 + k // 8) if turned else (r % 8, k, r // 8)
            chunk = SHUFFLED[mode][line][place // 8]
            memory[start // 2 + atom * 8 * wide + line * wide + chunk * 8 + place % 8] = matrix[r, k]
    atom = 16 * wide
    return (2 * atom, atom) if turned else (0, atom)


def d_registers(d):
    """[64, N] -> [128 threads, N / 2]."""
    found = [[d[16 * (t // 32) + t % 32 // 4 + 8 * (j // 2 % 2), 8 * (j // 4) + 2 * (t % 4) + j % 2]
              for j in range(d.shape[1] // 2)] for t in range(128)]  # fmt: skip
    return np.array(found, d.dtype)


def multiply(program, N, modes, turned):
    """Run a product, and give what a b is, what was there before, and what came of it."""
    (a, a_f), (b, b_f) = shorts((64, 16)), shorts((N, 16), 1)
    memory = np.zeros(24 * 1024, "u2")
    a_strides, b_strides = lay(memory, 0, a, modes[0], turned[0]), lay(memory, 8192, b, modes[1], turned[1])
    places = np.array([descriptor(0, *a_strides, modes[0]), descriptor(8192, *b_strides, modes[1])], "u8")
    before = np.random.default_rng(3).standard_normal((128, N // 2)).astype("f4")
    a_bits, got = np.concatenate([a_registers(a[16 * w : 16 * w + 16]) for w in range(4)]), before.copy()
    run(program, memory, places, a_bits, got, threads=128)
    return d_registers(a_f.astype("f8") @ b_f.T.astype("f8")), before, got


@pytest.mark.parametrize("N", WIDTHS)
@pytest.mark.parametrize("left", ("memory", "registers"))
def test_four_warps_multiply(N, left):
    wanted, before, got = multiply(PROGRAMS[f"wgmma {N} {left}"], N, (1, 1), (0, 0))
    np.testing.assert_allclose(got, wanted + before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("turned", ((0, 0), (1, 0), (0, 1), (1, 1)))
def test_operands_lie_as_their_descriptors_say(mode, turned):
    modes = (mode, MODES[mode - 1] if turned == (0, 1) else mode)
    wanted, before, got = multiply(product(64, "memory", turned), 64, modes, turned)
    np.testing.assert_allclose(got, wanted + before, rtol=1e-5, atol=1e-5)


def test_products_happen_when_they_are_waited_for():
    """And without what was there before, if the predicate says so."""
    wanted, before, got = multiply(product(16, "memory", (0, 0), waits=1), 16, (1, 1), (0, 0))
    assert (got == before).all()
    wanted, before, got = multiply(product(16, "registers", (0, 0), keep=0), 16, (1, 1), (0, 0))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_missing_fence_is_an_error():
    with pytest.raises(AssertionError, match=r"before a fence\.proxy\.async"):
        multiply(PROGRAMS["wgmma 16 memory"].replace("fence.proxy.async.shared::cta;\n", ""), 16, (1, 1), (0, 0))
