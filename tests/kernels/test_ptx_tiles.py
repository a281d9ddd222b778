"""Hopper's copies of tiles in the PTX machine: tensor maps, barriers in shared memory, loads, stores and sums.

Which chunk lies where is written down here a second time, from the tables of the PTX ISA.
"""

import numpy as np
import ptx
import pytest
from snippets import run

BF16, FP32 = 0xA, 0x7  # elemtype
SPANS = {0: 16, 1: 32, 2: 64, 3: 128}
# For a swizzle mode: what the number of a chunk of 16 bytes is combined with in row r of a tile as wide as the span.
SHUFFLED = {0: lambda r: 0, 1: lambda r: r // 4 % 2, 2: lambda r: r // 2 % 4, 3: lambda r: r % 8}
START = "mov.u32 %r0, %tid.x;\nmov.b32 %r8, global_smem;\nsetp.eq.s32 %p1, %r0, 0;\nsetp.lt.u32 %p2, %r0, 32;\n"
TILE = 1024  # where the tile lies in shared memory; the map at 0, a barrier at 256


def field(name, value, index="", bits=32):
    register, index = {32: "%r1", 64: "%rd10"}[bits], f"{index}, " if index else ""
    name = f"tensormap.replace.tile.{name}.shared::cta.b1024.b{bits}"
    return f"mov.b{bits} {register}, {value};\n@%p1 {name} [ %rd8 + 0 ], {index}{register};\n"


def tensor_map(rows, columns, box, swizzle, kind, size, tensor="%rd0", acquire=True):
    """Make a map of [rows, columns] at `tensor`, and publish it where %rd1 points."""
    body = START + "cvt.u64.u32 %rd8, %r8;\nmad.lo.u32 %r9, %r0, 4, %r8;\nmov.b32 %r1, 0;\n"
    body += "@%p2 st.shared::cta.b32 [ %r9 + 0 ], %r1;\nbar.warp.sync -1;\n"
    body += field("global_address", tensor, bits=64) + field("global_stride", columns * size, "0x0", 64)
    for i, (whole, part) in enumerate(((columns, box[1]), (rows, box[0]))):
        body += field("box_dim", part, hex(i)) + field("global_dim", whole, hex(i)) + field("element_stride", 1, hex(i))
    for name, value in (("rank", 1), ("elemtype", kind), ("swizzle_mode", swizzle), ("interleave_layout", 0),
                        ("fill_mode", 0)):  # fmt: skip
        body += f"@%p1 tensormap.replace.tile.{name}.shared::cta.b1024.b32 [ %rd8 + 0 ], {value:#x};\n"
    body += "@%p2 tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned " \
            "[ %rd1 + 0 ], [ %rd8 + 0 ], 0x80;\n"  # fmt: skip
    body += "cvta.global.u64 %rd11, %rd1;\n"
    return body + ("@%p2 fence.proxy.tensormap::generic.acquire.gpu [ %rd11 + 0 ], 0x80;\n" if acquire else "")


WAIT = "{{\n.reg .pred done;\nwaitLoop:\nmbarrier.try_wait.parity{}.b64 done, [{}], {};\n@!done bra.uni waitLoop;\n}}\n"
COPY_OUT = "mad.lo.u32 %r9, %r0, 4, %r8;\nmad.wide.u32 %rd9, %r0, 4, %rd2;\nmov.b32 %r7, {words};\n$L_out:\n" \
           "ld.shared.b32 %r1, [%r9+{tile}];\nst.global.b32 [%rd9], %r1;\nadd.s32 %r9, %r9, 256;\n" \
           "add.s64 %rd9, %rd9, 256;\nadd.s32 %r7, %r7, -64;\nsetp.gt.s32 %p3, %r7, 0;\n@%p3 bra $L_out;\n"  # fmt: skip
COPY_IN = COPY_OUT.replace("ld.shared.b32 %r1, [%r9+{tile}];\nst.global.b32 [%rd9], %r1;",
                           "ld.global.b32 %r1, [%rd9];\nst.shared.b32 [%r9+{tile}], %r1;")  # fmt: skip


def load(rows, columns, box, at, swizzle, kind=BF16, size=2, space="shared::cta", acquire=True):
    """Two warps: one thread asks for the tile, all wait, and all of shared memory's part goes to the third array."""
    bytes_ = box[0] * box[1] * size
    body = tensor_map(rows, columns, box, swizzle, kind, size, acquire=acquire)
    body += f"add.s32 %r10, %r8, 256;\nadd.s32 %r11, %r8, {TILE};\nmov.b32 %r12, {at[0]};\nmov.b32 %r13, {at[1]};\n"
    body += f"@%p1 mbarrier.init.{space.replace('cluster', 'cta')}.b64 [%r10], 1;\nbar.sync 0;\n"
    body += f"@%p1 mbarrier.arrive.expect_tx.{'shared' if 'cluster' in space else space}.b64 _, [%r10], {bytes_};\n"
    body += f"@%p1 cp.async.bulk.tensor.2d.{space}.global.mbarrier::complete_tx::bytes [%r11], [%rd11, {{%r13, %r12}}],"
    body += " [%r10];\nmov.b32 %r14, 0;\n" + WAIT.format(".shared" + "::cta" * ("cta" in space), "%r10", "%r14")
    body += "bar.sync 0;\n@%p1 mbarrier.inval.shared::cta.b64 [%r10];\n"
    return body + COPY_OUT.format(words=bytes_ // 4, tile=TILE)


def store(rows, columns, box, at, swizzle, kind=BF16, size=2, adds=False, fence=True, waits="0"):
    """The third array becomes a tile in shared memory, which one thread sends to the tensor."""
    body = tensor_map(rows, columns, box, swizzle, kind, size)
    body += COPY_IN.format(words=box[0] * box[1] * size // 4, tile=TILE)
    body += ("fence.proxy.async.shared::cta;\n" if fence else "") + "bar.sync 0;\n"
    body += f"add.s32 %r11, %r8, {TILE};\nmov.b32 %r12, {at[0]};\nmov.b32 %r13, {at[1]};\n"
    name = "cp.reduce.async" if adds else "cp.async"
    body += (
        f"@%p1 {name}.bulk.tensor.2d.global.shared::cta{'.add' * adds}.bulk_group [%rd11, {{%r13, %r12}}], [%r11];\n"
    )
    body += f"cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read {waits};\n"
    body += "bar.sync 0;\n@%p1 st.shared.b32 [%r11], %r0;\n"  # free again
    return body + "fence.proxy.async.shared::cta;\ncp.async.bulk.wait_group 0;\n"


PROGRAMS = {
    "load": load(40, 64, (8, 64), (0, 0), 3),
    "load as 3.6 writes it": load(40, 64, (8, 64), (0, 0), 3, space="shared::cluster"),
    "store": store(40, 64, (8, 64), (0, 0), 3),
    "sum": store(40, 32, (8, 32), (0, 0), 3, FP32, 4, adds=True),
    # Warp 1 arrives twice, a count of two each time; warp 0 waits for both phases.
    "phases": START + "add.s32 %r10, %r8, 256;\n@%p1 mbarrier.init.shared::cta.b64 [%r10], 2;\nbar.sync 0;\n"
    "setp.eq.s32 %p3, %r0, 32;\n@%p3 st.shared.b32 [%r8], 11;\n@%p3 mbarrier.arrive.shared::cta.b64 _, [%r10], 2;\n"
    "@!%p2 bra $L_end;\nmov.b32 %r14, 0;\n" + WAIT.format(".shared::cta", "%r10", "%r14")
    + "ld.shared.b32 %r1, [%r8];\nbar.warp.sync -1;\n@%p1 mbarrier.arrive.shared::cta.b64 _, [%r10];\n"
    "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r10];\nmov.b32 %r14, 1;\n" + WAIT.format(".shared::cta", "%r10", "%r14")
    + "mad.wide.u32 %rd9, %r0, 4, %rd0;\nst.global.b32 [%rd9], %r1;\n$L_end:\n",
}  # fmt: skip


def shuffled(tile, swizzle, back=False):
    """The bytes of a tile as they lie in shared memory."""
    lines = np.ascontiguousarray(tile).view("u1").reshape(len(tile), -1, 16)
    found = np.empty_like(lines)
    for r in range(len(lines)):
        for c in range(lines.shape[1]):
            found[r, c ^ SHUFFLED[swizzle](r)] = lines[r, c]
    return found.reshape(-1)


def tensor(rows, columns, kind):
    return np.random.default_rng(0).integers(1, 1000, (rows, columns)).astype(kind)


def cut(whole, at, box):
    """A tile with zeros where the tensor is not."""
    tile = np.zeros(box, whole.dtype)
    for r in range(box[0]):
        for c in range(box[1]):
            if 0 <= at[0] + r < len(whole) and 0 <= at[1] + c < whole.shape[1]:
                tile[r, c] = whole[at[0] + r, at[1] + c]
    return tile


@pytest.mark.parametrize("swizzle", SPANS)
@pytest.mark.parametrize("kind, size, dtype", ((BF16, 2, "u2"), (FP32, 4, "f4")))
@pytest.mark.parametrize("at, seed", (((0, 0), None), ((35, 8), None), ((-3, -2), 1)))
def test_tiles_arrive(swizzle, kind, size, dtype, at, seed):
    """Shuffled, and with zeros outside of the tensor."""
    box = (16, SPANS[swizzle] // size)
    whole, home = tensor(40, 64, dtype), np.zeros(128, "u1")
    got = np.full(16 * SPANS[swizzle], 7, "u1")
    run(load(40, 64, box, at, swizzle, kind, size), whole, home, got, threads=64, seed=seed)
    assert (got == shuffled(cut(whole, at, box), swizzle)).all() and got.any()


@pytest.mark.parametrize("name", ("load", "load as 3.6 writes it"))
def test_a_tile_is_named_in_two_ways(name):
    whole, got = tensor(40, 64, "u2"), np.zeros(1024, "u1")
    run(PROGRAMS[name], whole, np.zeros(128, "u1"), got, threads=64)
    assert (got == shuffled(whole[:8], 3)).all()


@pytest.mark.parametrize("swizzle", SPANS)
@pytest.mark.parametrize("adds", (False, True))
@pytest.mark.parametrize("at, seed", (((0, 0), None), ((30, 8), 2)))
def test_tiles_are_stored_and_added(swizzle, adds, at, seed):
    """What lies outside of the tensor is dropped; sums are of fp32."""
    size, dtype, kind = (4, "f4", FP32) if adds else (2, "u2", BF16)
    box = (16, SPANS[swizzle] // size)
    before, tile = tensor(40, 64, dtype), tensor(*box, dtype)[::-1] + 1
    whole = before.copy()
    run(store(40, 64, box, at, swizzle, kind, size, adds), whole, np.zeros(128, "u1"), shuffled(tile, swizzle),
        threads=64, seed=seed)  # fmt: skip
    wanted = before.copy()
    rows, columns = min(box[0], 40 - at[0]), min(box[1], 64 - at[1])
    place = (slice(at[0], at[0] + rows), slice(at[1], at[1] + columns))
    wanted[place] = tile[:rows, :columns] + (before[place] if adds else 0)
    assert (whole == wanted).all() and (whole != before).any()


def test_a_tile_that_is_read_late_is_not_what_was_stored():
    """Nobody waits before shared memory is used again."""
    whole, tile = np.zeros((40, 64), "u2"), tensor(8, 64, "u2")
    run(store(40, 64, (8, 64), (0, 0), 3, waits="1"), whole, np.zeros(128, "u1"), shuffled(tile, 3), threads=64)
    assert (whole[:8] != tile).sum() in (1, 2)


def test_fences_are_not_forgotten():
    whole, home, got = tensor(40, 64, "u2"), np.zeros(128, "u1"), np.zeros(1024, "u1")
    with pytest.raises(AssertionError, match="written and not acquired"):
        run(load(40, 64, (8, 64), (0, 0), 3, acquire=False), whole, home, got, threads=64)
    with pytest.raises(AssertionError, match=r"before a fence\.proxy\.async"):
        run(store(40, 64, (8, 64), (0, 0), 3, fence=False), whole, home, got, threads=64)


@pytest.mark.parametrize("seed", (None, *range(4)))
def test_phases_of_a_barrier(seed):
    got = np.zeros(64, "u4")
    run(PROGRAMS["phases"], got, threads=64, seed=seed)
    assert (got[:32] == 11).all() and not got[32:].any()


@pytest.mark.parametrize("old, new, error", (
    ("mov.b32 %r14, 1", "mov.b32 %r14, 0", "32 threads at mbarrier.try_wait"),
    ("[%r10], 2;\n@!%p2", "[%r10], 3;\n@!%p2", "more arrivals"),
    ("[%r10], 2;\nbar", "[%r10], 3;\nbar", "32 threads at mbarrier.try_wait"),
    ("@%p1 mbarrier.init.shared::cta.b64 [%r10], 2;\n", "", "no barrier"),
))  # fmt: skip
def test_barriers_that_are_used_wrong(old, new, error):
    assert old in PROGRAMS["phases"]
    with pytest.raises(AssertionError, match=error):
        run(PROGRAMS["phases"].replace(old, new, 1), np.zeros(64, "u4"), threads=64)
    with pytest.raises(ptx.Deadlock, match="64 threads at mbarrier"):
        wrong = PROGRAMS["load"].replace("_, [%r10], 1024;", "_, [%r10], 1040;")
        run(wrong, tensor(40, 64, "u2"), np.zeros(128, "u1"), np.zeros(1024, "u1"), threads=64)


# A loader and a reader with two tiles in shared memory between them, five tiles one after the other: the reader copies
# the first line of each to its row of the third array. The loader waits until a place is free, the reader until full.
ROLES = tensor_map(40, 64, (8, 64), 3, BF16, 2) + (
    "add.s32 %r20, %r8, 256;\n@%p1 mbarrier.init.shared::cta.b64 [%r20], 1;\n"
    "@%p1 mbarrier.init.shared::cta.b64 [%r20+8], 1;\n@%p1 mbarrier.init.shared::cta.b64 [%r20+16], 32;\n"
    "@%p1 mbarrier.init.shared::cta.b64 [%r20+24], 32;\nbar.sync 0;\nmov.b32 %r21, 0;\n@!%p2 bra $L_reader;\n"
    "$L_loader:\nand.b32 %r22, %r21, 1;\nmad.lo.u32 %r23, %r22, 8, %r20;\nadd.s32 %r24, %r23, 16;\n"
    "shr.u32 %r25, %r21, 1;\nand.b32 %r25, %r25, 1;\nxor.b32 %r25, %r25, 1;\n"
    + WAIT.format(".shared::cta", "%r24", "%r25")
    + f"mad.lo.u32 %r26, %r22, 1024, %r8;\nadd.s32 %r26, %r26, {TILE};\nmul.lo.s32 %r27, %r21, 8;\nmov.b32 %r28, 0;\n"
    "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r23], 1024;\n"
    "@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r26], [%rd11, {%r28, %r27}],"
    " [%r23];\n"
    "add.s32 %r21, %r21, 1;\nsetp.lt.s32 %p4, %r21, 5;\n@%p4 bra $L_loader;\nbra $L_end;\n"
    "$L_reader:\nand.b32 %r22, %r21, 1;\nmad.lo.u32 %r23, %r22, 8, %r20;\nadd.s32 %r24, %r23, 16;\n"
    "shr.u32 %r25, %r21, 1;\nand.b32 %r25, %r25, 1;\n"
    + WAIT.format(".shared::cta", "%r23", "%r25")
    + f"mad.lo.u32 %r26, %r22, 1024, %r8;\nand.b32 %r29, %r0, 31;\nmad.lo.u32 %r26, %r29, 4, %r26;\n"
    f"ld.shared.b32 %r1, [%r26+{TILE}];\nmad.lo.u32 %r2, %r21, 32, %r29;\nmad.wide.u32 %rd9, %r2, 4, %rd2;\n"
    "st.global.b32 [%rd9], %r1;\nmbarrier.arrive.shared::cta.b64 _, [%r24];\n"
    "add.s32 %r21, %r21, 1;\nsetp.lt.s32 %p4, %r21, 5;\n@%p4 bra $L_reader;\n$L_end:\n"
)


def roles(body, seed):
    whole, got = tensor(40, 64, "u2"), np.zeros((5, 64), "u2")
    run(body, whole, np.zeros(128, "u1"), got, threads=64, seed=seed)
    return (got == whole[::8]).all()


@pytest.mark.parametrize("seed", (None, *range(6)))
def test_a_loader_and_a_reader(seed):
    assert roles(ROLES, seed)


def test_a_reader_that_does_not_wait_shows():
    broken = ROLES.replace(WAIT.format(".shared::cta", "%r23", "%r25"), "")
    assert broken != ROLES
    with pytest.raises(AssertionError):
        assert roles(broken, None)


def test_a_loader_that_does_not_wait_shows():
    """In some order, with loads that arrive at once: a tile that nobody read yet is gone, or a barrier is overrun."""
    broken = ROLES.replace("xor.b32 %r25, %r25, 1;\n" + WAIT.format(".shared::cta", "%r24", "%r25"), "")
    assert broken != ROLES
    with pytest.raises(AssertionError):
        assert all(roles(broken, seed) for seed in range(12))
