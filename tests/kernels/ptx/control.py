"""Branches, barriers, votes, and registers that roles hand to each other."""

import numpy as np

from .block import Block, Part, instruction


@instruction(r"bra(?:\.uni)?", ends=True)
def _branch(block, operands):
    (target,) = operands

    def run(on):
        block.pc[on] = target

    return run


@instruction(r"ret", ends=True)
def _return(block, operands):
    def run(on):
        block.done |= on

    return run


@instruction(r"(?:bar|barrier)\.sync", needs=32, ends=True)
def _barrier(block, operands):
    """Wait until as many threads as named (all of the block, if none are) have come to the barrier of that number."""
    number = int(operands[0])
    wanted = int(operands[1]) if len(operands) > 1 else block.threads
    assert 0 <= number < 16 and wanted % 32 == 0

    def run(on):
        there = block.barriers.setdefault(number, np.zeros(block.threads, bool))
        there |= on
        block.waiting |= on
        assert there.sum() <= wanted, f"{there.sum()} threads at barrier {number}, which is for {wanted}"
        if there.sum() == wanted:
            block.waiting &= ~there
            del block.barriers[number]

    return run


@instruction(r"bar\.warp\.sync", needs=32)
def _warp_barrier(block, operands):
    assert operands == ("-1",)
    return lambda on: None


@instruction(r"griddepcontrol\.(?:wait|launch_dependents)")
def _other_grids(block, operands):
    """A grid starts here when the one before has ended."""
    return lambda on: None


@instruction(r"elect\.sync", needs=32)
def _elect(block, operands):
    """The lowest lane, and who it is."""
    names, members = operands
    assert members in ("-1", "0xffffffff")
    lane, chosen = names.split("|")
    lane, chosen = block.write(lane, "u32"), block.write(chosen, "pred")

    def run(on):
        lane(np.uint32(0), on)
        chosen(block.lane == 0, on)

    return run


class Registers(Part):
    """How many registers a thread of each warp has, of what the block got at its start."""

    def reset(self) -> None:
        warps = self.block.threads // 32
        self.each = np.full(warps, self.block.program.most_registers)
        self.free = 0
        self.wanting = np.zeros(self.block.threads, bool)


@instruction(r"setmaxnreg\.(dec|inc)\.sync\.aligned\.u32", needs=128)
def _set_registers(block: Block, operands, way):
    """Give registers back, or wait until others gave enough."""
    wanted = int(operands[0])
    assert wanted % 8 == 0 and 24 <= wanted <= 256
    registers = block.part(Registers)

    def run(on):
        stay = np.zeros(block.threads, bool)
        for first in np.flatnonzero(on)[::128]:
            warps = slice(first // 32, first // 32 + 4)
            more = wanted - registers.each[warps]
            assert (more <= 0).all() if way == "dec" else (more >= 0).all(), f"setmaxnreg.{way} to {wanted}"
            if more.sum() > registers.free:
                stay[first : first + 128] = True
                continue
            registers.free -= more.sum()
            registers.each[warps] = wanted
        block.waiting |= stay
        registers.wanting |= stay
        if way == "dec":
            block.waiting &= ~registers.wanting
            registers.wanting[:] = False
        return stay

    return run
