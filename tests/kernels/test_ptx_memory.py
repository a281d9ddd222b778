"""Instructions of the PTX machine that move numbers, and those by which threads wait for each other."""

import numpy as np
import ptx
import pytest
import torch
from snippets import kernel, run

LANE = "mov.u32 %r0, %tid.x;\n"  # %r0 = the thread
STORE = "mad.wide.u32 %rd9, %r0, 4, %rd{0};\nst.global.b32 [%rd9], {1};\n"  # [parameter, thread] = a register


def into(parameter, register):
    return STORE.format(parameter, register)


PROGRAMS = {
    f"{kind} x {count}": LANE + f"mad.wide.u32 %rd8, %r0, {size * count}, %rd0;\n"
    f"mad.wide.u32 %rd9, %r0, {size * count}, %rd1;\nmov.b32 %r8, global_smem;\n"
    f"mad.lo.u32 %r9, %r0, {size * count}, %r8;\n"
    f"ld.global{vector}.{kind} {names}, [%rd8];\nst.shared{vector}.{kind} [%r9+{16 * size}], {names};\n"
    f"ld.shared{vector}.{kind} {other}, [%r9+{16 * size}];\nst.shared::cta{vector}.{kind} [ %r9 + 0 ], {other};\n"
    f"ld.shared{vector}.{kind} {names}, [ %r9 + 0 ];\nst.global{vector}.{kind} [ %rd9 + 0 ], {names};\n"
    for size, kind, register in ((1, "b8", "%rs"), (2, "b16", "%rs"), (4, "b32", "%r"), (8, "b64", "%rd"))
    for count in (1, 2, 4)
    if size * count <= 16
    for vector in ("" if count == 1 else f".v{count}",)
    for names, other in (["{" + ", ".join(f"{register}{first + i}" for i in range(count)) + "}" for first in (20, 30)],)
}
PROGRAMS |= {
    "parameters": "ld.param.b32 %r1, [snippet_param_1];\nld.param.s32 %rd2, [snippet_param_1];\n"
    "shr.u64 %rd3, %rd2, 32;\ncvt.u32.u64 %r3, %rd3;\n" + LANE + into(0, "%r1")
    + "add.s64 %rd0, %rd0, 128;\n" + into(0, "%r3"),
    "constants of a warp": LANE + "mad.wide.u32 %rd8, %r0, 4, %rd0;\nld.global.nc.b32 %r1, [%rd8];\n" + into(1, "%r1"),
    "sums": LANE + "and.b32 %r1, %r0, 3;\nmad.wide.u32 %rd8, %r1, 4, %rd0;\nmov.b32 %r2, 0f3F800000;\n"
    "red.global.gpu.relaxed.add.f32 [%rd8], %r2;\natom.global.gpu.relaxed.add.f32 %r3, [%rd8], %r2;\n" + into(1, "%r3"),
    "sums of four": LANE + "and.b32 %r1, %r0, 1;\nmad.wide.u32 %rd8, %r1, 16, %rd0;\nmov.b32 %r2, 0f3F800000;\n"
    "mov.b32 %r3, 0f40000000;\nred.global.gpu.relaxed.add.v4.f32 [ %rd8 + 0 ], {%r2, %r3, %r2, %r3};\n"
    "atom.global.gpu.relaxed.add.v4.f32 {%r4, %r5, %r6, %r7}, [ %rd8 + 0 ], {%r2, %r3, %r2, %r3};\n" + into(1, "%r7"),
    "exchange": LANE + "mad.wide.u32 %rd8, %r0, 4, %rd0;\nld.global.b32 %r1, [%rd8];\n"
    "shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;\n" + into(1, "%r2") + "and.b32 %r3, %r0, 7;\n"
    "shfl.sync.idx.b32 %r2, %r1, %r3, 0x181f, 0xffffffff;\n" + into(2, "%r2"),
    "vote": LANE + "mov.b32 %r2, 0;\nelect.sync %r1|%p1, -1;\n@%p1 mov.b32 %r2, 1;\n" + into(0, "%r2") + into(1, "%r1"),
    # Two warps hand numbers to each other through shared memory.
    "barrier": LANE + "xor.b32 %r2, %r0, 32;\nmov.b32 %r8, global_smem;\nmad.lo.u32 %r9, %r0, 4, %r8;\n"
    "mad.lo.u32 %r10, %r2, 4, %r8;\nst.shared.b32 [%r9], %r0;\nbar.sync 0;\nbar.warp.sync -1;\n"
    "ld.shared.b32 %r3, [%r10];\n" + into(0, "%r3"),
    # The lower warp leaves a number behind, the upper fetches it: both at barrier 1, twice.
    "named barrier": LANE + "setp.lt.u32 %p1, %r0, 32;\nmov.b32 %r3, 7;\n@!%p1 bra $L_fetch;\n"
    "st.shared.b32 [global_smem+8], %r0;\nbarrier.sync 1, 64;\nbar.sync 1, 64;\nbra $L_out;\n$L_fetch:\n"
    "barrier.sync 1, 64;\nld.shared.b32 %r3, [global_smem+8];\nbar.sync 1, 64;\n$L_out:\n" + into(0, "%r3"),
    "registers": LANE + "setp.lt.u32 %p1, %r0, 128;\n@!%p1 bra $L_giving;\nsetmaxnreg.inc.sync.aligned.u32 240;\n"
    "bra $L_out;\n$L_giving:\nst.shared.b32 [global_smem], %r0;\nsetmaxnreg.dec.sync.aligned.u32 {least};\n$L_out:\n",
    # Group 0: number 1, group 1: number 2 after the first have been waited for.
    "copies": LANE + "mov.b32 %r8, global_smem;\nmad.lo.u32 %r9, %r0, 16, %r8;\nmad.wide.u32 %rd8, %r0, 16, %rd0;\n"
    "cp.async.cg.shared.global [ %r9 + 0 ], [ %rd8 + 0 ], 0x10, 16;\ncp.async.commit_group;\n"
    "and.b32 %r10, %r0, 7;\nadd.s32 %r11, %r9, 4096;\n"
    "cp.async.ca.shared.global [ %r11 + 0 ], [ %rd8 + 8 ], 0x8, %r10;\ncp.async.commit_group;\n"
    "cp.async.wait_group {first};\nbar.sync 0;\nld.shared.b32 %r1, [%r9+4];\n" + into(1, "%r1")
    + "cp.async.wait_group 0;\nld.shared.v2.b32 {{%r2, %r3}}, [%r11];\n" + into(2, "%r2") + into(3, "%r3"),
}  # fmt: skip
for name in ("registers", "copies"):
    PROGRAMS[name] = PROGRAMS[name].format(least=96, first=1)


def column(dtype="u4", threads=32):
    return np.zeros(threads, dtype)


@pytest.mark.parametrize("name", [name for name in PROGRAMS if " x " in name])
def test_loads_and_stores(name):
    """Through global and shared memory and back, one, two or four numbers at once."""
    source = np.random.default_rng(0).integers(0, 256, 32 * 64, dtype=np.uint8)
    target = np.zeros_like(source)
    run(PROGRAMS[name], source, target)
    count = 32 * {"b8": 1, "b16": 2, "b32": 4, "b64": 8}[name.split()[0]] * int(name.split()[2])
    assert (target[:count] == source[:count]).all() and not target[count:].any()


def test_constants_and_parameters():
    a, got = np.arange(32, dtype="u4"), column()
    run(PROGRAMS["constants of a warp"], a, got)
    assert (got == a).all()
    both = torch.zeros(64, dtype=torch.int32)
    ptx.run(kernel(PROGRAMS["parameters"], 2), (1,), [both, -5])
    assert (both[:32] == -5).all() and (both[32:] == -1).all()  # its sign goes on in a longer register


def test_sums_in_memory():
    totals, before = np.zeros(4, "f4"), column("f4")
    run(PROGRAMS["sums"], totals, before)
    assert (totals == 16).all() and set(before) <= {*range(8, 16)}
    totals = np.zeros(8, "f4")
    run(PROGRAMS["sums of four"], totals, before)
    assert (totals == [32, 64] * 4).all() and before.max() >= 32


def test_exchange_between_lanes():
    a, other, eighth = np.arange(100, 132, dtype="u4"), column(), column()
    run(PROGRAMS["exchange"], a, other, eighth)
    assert (other == a[np.arange(32) ^ 5]).all()
    assert (eighth == a[np.arange(32) // 8 * 8 + np.arange(32) % 8]).all()


def test_one_lane_of_each_warp_is_elected():
    chosen, lane = column(threads=64), column(threads=64)
    run(PROGRAMS["vote"], chosen, lane, threads=64)
    assert chosen.reshape(2, 32).sum(1).tolist() == [1, 1] and (lane == np.flatnonzero(chosen)[0]).all()


@pytest.mark.parametrize("seed", (None, *range(5)))
def test_barriers(seed):
    got = column(threads=64)
    run(PROGRAMS["barrier"], got, threads=64, seed=seed)
    assert (got == np.arange(64) ^ 32).all()
    run(PROGRAMS["named barrier"], got, threads=64, seed=seed)
    assert (got[:32] == 7).all() and (got[32:] == 31).all()


def test_a_missing_barrier_shows_in_some_order():
    broken = PROGRAMS["barrier"].replace("bar.sync 0;\n", "")
    shown = []
    for seed in range(8):
        got = column(threads=64)
        run(broken, got, threads=64, seed=seed)
        shown.append((got != np.arange(64) ^ 32).any())
    assert any(shown)


def test_deadlocks_are_found():
    got = column(threads=64)
    with pytest.raises(ptx.Deadlock, match=r"32 threads at bar\.sync 2, 64"):
        run(PROGRAMS["named barrier"].replace("bar.sync 1, 64", "bar.sync 2, 64", 1), got, threads=64)
    with pytest.raises(AssertionError, match="64 threads at barrier 1, which is for 32"):
        run("bar.sync 1, 32;\n", got, threads=64)


@pytest.mark.parametrize("seed", (None, *range(3)))
def test_registers_change_hands(seed):
    """Those who want more wait for those who give; 256 threads start with 168 each."""
    module = PROGRAMS["registers"]
    run(module, column(), threads=256, seed=seed, registers=168)
    with pytest.raises(ptx.Deadlock, match=r"128 threads at setmaxnreg\.inc"):
        run(module.replace("u32 96", "u32 104"), column(), threads=256, seed=seed, registers=168)


@pytest.mark.parametrize("seed", (None, *range(4)))
def test_copies_arrive_when_they_are_waited_for(seed):
    """With zeros behind what is asked for; one that nobody waits for has not arrived."""
    source = np.arange(128, dtype="u4")
    one, two, three = column(), column(), column()
    run(PROGRAMS["copies"], source, one, two, three, seed=seed)
    wanted = source.reshape(32, 4)[:, 2:].copy().view("u1")
    wanted[np.arange(8) >= (np.arange(32) & 7)[:, None]] = 0
    assert (one == source[1::4]).all() and (np.stack([two, three], 1) == wanted.view("u4")).all()


def test_copies_that_are_not_waited_for_are_late():
    source = np.arange(128, dtype="u4")
    one, two, three = column(), column(), column()
    run(PROGRAMS["copies"].replace("wait_group 1", "wait_group 2"), source, one, two, three)
    assert (one == 0xFFFFFFFF).all() and (two[4:8] == source[18:34:4]).all()


@pytest.mark.parametrize("line, message", (
    ("ld.global.b32 %r1, [%rd0+128];", "outside"),
    ("ld.global.b32 %r1, [%rd0+-4];", "outside"),
    ("ld.global.b32 %r1, [%rd0+2];", "misaligned"),
    ("st.global.v4.b32 [%rd0+8], {%r1, %r1, %r1, %r1};", "misaligned"),
    ("ld.shared.b32 %r1, [global_smem+65536];", "outside"),
    ("mov.b32 %r2, 0;\nst.shared.b32 [%r2], %r1;", "outside"),
    ("mov.b32 %r2, global_smem;\ncp.async.cg.shared.global [%r2], [%rd0+120], 0x10;\ncp.async.commit_group;\n"
     "cp.async.wait_group 0;", "misaligned|outside"),
    ("red.global.gpu.relaxed.add.f32 [%rd0+128], %r1;", "outside"),
))  # fmt: skip
def test_what_belongs_to_nobody_is_not_touched(line, message):
    with pytest.raises(AssertionError, match=message):
        run(line + "\n", column())
