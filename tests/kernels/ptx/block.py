"""A block of threads as it runs: registers, which threads go on next, what the others wait for.

Threads at the same instruction take it together, as numpy arrays over all threads and a mask. A step that a warp or a
group of four warps takes as one waits until all its threads are there. Steps are bound to the arrays that they read and
write before anything runs, so that an instruction that is not known is an error even where nobody would reach it.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .text import Program

SHARED = 1024  # the address where shared memory starts; Hopper keeps what is below for itself
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
DTYPES = {f"{kind}{bits}": np.dtype(f"{to}{bits // 8}") for bits in UNSIGNED for kind, to in ("uu", "bu", "si")}
DTYPES |= {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "bf16x2": np.dtype(np.uint32),
}


class Deadlock(AssertionError):
    """Nobody can go on, and no copy is on its way that could change that."""


@dataclass
class Known:
    """An instruction of the machine: `bind(block, operands, *groups of the pattern)` gives what a step does."""

    pattern: re.Pattern
    bind: Callable
    needs: int  # threads that take it as one: 1, a warp, a group of warps
    ends: bool  # threads may go different ways, or wait, after it


KNOWN: list[Known] = []


def instruction(pattern: str, needs: int = 1, ends: bool = False) -> Callable:
    """Enter a binder for all opcodes that match the pattern as a whole."""

    def enter(bind: Callable) -> Callable:
        KNOWN.append(Known(re.compile(pattern), bind, needs, ends))
        return bind

    return enter


def known(opcode: str) -> tuple[Known, tuple[str, ...]]:
    """The entry of an opcode, and what its pattern's groups are there."""
    for entry in KNOWN:
        if found := entry.pattern.fullmatch(opcode):
            return entry, found.groups()
    raise NotImplementedError(f"this machine does not know {opcode}")


class Schedule:
    """Who goes first, and when asynchronous work is done.

    Without a seed all threads go together, and copies arrive when nobody can go on without them. With one, groups of
    four warps go in random order, now and then a warp by itself, and each copy happens at once or as late as allowed.
    Products are always as late as allowed.
    """

    ALONE = 8  # one time in as many

    def __init__(self, seed: int | None = None) -> None:
        self.random = None if seed is None else random.Random(seed)

    def groups(self, threads: int) -> list[slice]:
        """Threads in the order in which they are asked whether they can go on."""
        if self.random is None:
            return [slice(0, threads)]
        unit = 128 if threads > 128 and self.random.randrange(self.ALONE) else 32
        groups = [slice(first, min(first + unit, threads)) for first in range(0, threads, unit)]
        self.random.shuffle(groups)
        return groups

    def at_once(self) -> bool:
        """Whether a copy that was asked for happens now."""
        return self.random is not None and self.random.random() < 0.5

    def choose(self, count: int) -> int:
        """Which of several things that may happen next does."""
        return 0 if self.random is None else self.random.randrange(count)


@dataclass
class Step:
    """An instruction bound to a block."""

    run: Callable  # (mask) -> None, or the mask of those who have to try again
    guard: np.ndarray | None
    negated: bool
    needs: int
    ends: bool


class Block:
    """One program of a grid at a time."""

    def __init__(self, program: Program, memory, shared, schedule: Schedule) -> None:
        self.program, self.memory, self.shared, self.schedule = program, memory, shared, schedule
        self.threads, self.leaders = program.threads, program.leaders
        self.lane = np.arange(self.threads) % 32
        self.rows = {bits: self._rows(bits) for bits in (1, 16, 32, 64)}
        self.registers: dict[str, np.ndarray] = {}
        self.number: dict[str, int] = {}  # of a register among the rows of its size
        for bits, rows in self.rows.items():
            names = [name for name, size in program.registers.items() if size == bits]
            self.registers |= dict(zip(names, rows))
            self.number |= {name: i for i, name in enumerate(names)}
        for name in ("%tid.x", "%laneid", *(f"%{kind}.{axis}" for kind in ("ctaid", "nctaid") for axis in "xyz")):
            self.registers[name] = np.zeros(self.threads, np.uint32)
        self.params: list[int] = []
        self.parts: dict[type, object] = {}
        self._reset()
        self.steps = [self._bind(instruction) for instruction in program.code]

    def _rows(self, bits: int) -> np.ndarray:
        count = sum(size == bits for size in self.program.registers.values())
        return np.empty((count, self.threads), UNSIGNED.get(bits, np.bool_))

    def _bind(self, instruction) -> Step:
        entry, groups = known(instruction.opcode)
        operands = (instruction.target,) if instruction.target >= 0 else instruction.operands
        guard = self.registers[instruction.guard] if instruction.guard else None
        return Step(entry.bind(self, operands, *groups), guard, instruction.negated, entry.needs, entry.ends)

    def _reset(self) -> None:
        """Before a program starts: registers and shared memory hold NaNs, so that nobody gets away with zeros."""
        for rows in self.rows.values():
            rows.fill(0 if rows.dtype == np.bool_ else np.iinfo(rows.dtype).max)
        self.shared.bytes[SHARED:], self.shared.unfenced[:] = 0xFF, False
        self.registers["%tid.x"][:] = np.arange(self.threads)
        self.registers["%laneid"][:] = self.lane
        self.pc, self.last = (
            np.zeros(self.threads, np.int64),
            np.zeros(self.threads, np.int64),
        )  # next; where they stopped
        self.done, self.waiting = np.zeros(self.threads, bool), np.zeros(self.threads, bool)
        self.barriers: dict[int, np.ndarray] = {}
        for part in self.parts.values():
            part.reset()

    def part(self, kind: type):
        """What a file of instructions keeps about this block: queues, barriers."""
        if kind not in self.parts:
            self.parts[kind] = kind(self)
        return self.parts[kind]

    # -- operands ------------------------------------------------------------------------------------------------------

    def read(self, text: str, kind: str) -> np.ndarray:
        """A register, always up to date, or a constant, as numbers of a type; the lower part of a longer register."""
        if text in self.registers:
            row = self.registers[text]
            if kind == "pred":
                return row
            ratio = row.itemsize // DTYPES[kind].itemsize
            assert ratio, f"{text} is shorter than {kind}"
            return row.view(DTYPES[kind])[::ratio]
        if kind == "pred":
            return np.bool_(int(text, 0))
        bits = SHARED if text == "global_smem" else int(text[2:], 16) if text[:2] == "0f" else int(text.rstrip("U"), 0)
        size = 8 * DTYPES[kind].itemsize
        return np.array(bits & ((1 << size) - 1), UNSIGNED[size]).view(DTYPES[kind])[()]

    def write(self, name: str, kind: str) -> Callable:
        """A function (numbers, mask) that puts numbers of a type into a register, sign or zeros in front."""
        if name == "_":
            return lambda numbers, on: None
        row = self.registers[name]
        if kind != "pred" and row.itemsize != DTYPES[kind].itemsize:
            row = row.view(DTYPES[f"{'s' if kind[0] == 's' else 'u'}{8 * row.itemsize}"])
        elif kind != "pred":
            row = row.view(DTYPES[kind])
        return lambda numbers, on: np.copyto(row, numbers, where=on, casting="unsafe")

    def address(self, text: str) -> Callable[[], np.ndarray]:
        """A function that gives [register + constant], an address for every thread."""
        base, _, more = text.strip("[] ").partition("+")
        register = self.read(base.strip(), f"u{8 * self.registers.get(base.strip(), np.zeros(1, np.uint32)).itemsize}")
        return lambda: np.broadcast_to(register.astype(np.int64) + int(more or 0), self.threads)

    # -- who goes on ---------------------------------------------------------------------------------------------------

    def run(self, place: tuple[int, ...], grid: tuple[int, ...]) -> None:
        """One program from start to end."""
        self._reset()
        for axis, at, of in zip("xyz", place, grid):
            self.registers[f"%ctaid.{axis}"][:], self.registers[f"%nctaid.{axis}"][:] = at, of
        while not self.done.all():
            if chosen := self._choose():
                self._advance(*chosen)
            elif not any(part.hurry() for part in self.parts.values()):
                raise Deadlock(self._report())
        for part in self.parts.values():
            part.finish()

    def _choose(self) -> tuple[int, np.ndarray] | None:
        ready = ~(self.done | self.waiting)
        for group in self.schedule.groups(self.threads):
            for pc in sorted(set(self.pc[group][ready[group]].tolist())):
                on, needs = ready & (self.pc == pc), self.steps[pc].needs
                if group.stop - group.start < self.threads:
                    size = max(needs, group.stop - group.start)
                    near = np.zeros(self.threads, bool)
                    near[group.start // size * size : group.start // size * size + size] = True
                    on &= near
                if needs > 1:
                    on &= np.repeat(on.reshape(-1, needs).all(1), needs)
                if on.any():
                    return pc, on
        return None

    def _advance(self, pc: int, on: np.ndarray) -> None:
        """Let threads at the same place go on until their ways may part."""
        alone = (on | self.done).all()
        whole = self._whole(on)
        while True:
            step = self.steps[pc]
            if step.needs > whole:
                self.pc[on] = self.last[on] = pc
                return
            active = on if step.guard is None else on & (step.guard != step.negated)
            if step.ends:
                self.pc[on], self.last[on] = pc + 1, pc
                step.run(active)
                return
            stay = step.run(active) if step.guard is None or active.any() else None
            if stay is not None and stay.any():
                self.pc[stay] = self.last[stay] = pc
                on, alone = on & ~stay, False
                if not on.any():
                    return
                whole = self._whole(on)
            pc += 1
            if pc in self.leaders and not alone:
                self.pc[on] = pc
                return

    def _whole(self, on: np.ndarray) -> int:
        """The largest unit of which only whole ones are in the mask."""
        for unit in (128, 32):
            if not self.threads % unit:
                count = on.reshape(-1, unit).sum(1)
                if ((count == 0) | (count == unit)).all():
                    return unit
        return 1

    def _report(self) -> str:
        stuck = [(pc, int(((self.last == pc) & ~self.done).sum())) for pc in np.unique(self.last[~self.done])]
        return "; ".join(f"{count} threads at {str(self.program.code[pc])[:100]}" for pc, count in stuck)


class Part:
    """What a file of instructions keeps about a block."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.reset()

    def reset(self) -> None:
        """Before a program starts."""

    def hurry(self) -> bool:
        """Nobody can go on: do something that may be late, if there is anything."""
        return False

    def finish(self) -> None:
        """All threads have left."""
