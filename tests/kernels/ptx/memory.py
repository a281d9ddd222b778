"""Loads, stores, sums in memory, asynchronous copies by threads, and 8 x 8 matrices between registers and memory."""

import re

import numpy as np

from .block import DTYPES, SHARED, Part, instruction


class Memory:
    """Bytes, of which some may be touched."""

    def __init__(self, size: int, name: str) -> None:
        self.bytes, self.valid, self.name = np.zeros(size, np.uint8), np.zeros(size, bool), name
        self.unfenced = np.zeros(1, bool)  # written by threads since the last fence for the asynchronous proxy

    def view(self, kind: str) -> np.ndarray:
        """All of it as numbers of a type."""
        return self.bytes.view(DTYPES[kind])

    def check(self, at: np.ndarray, size: int, what: str) -> None:
        """Addresses are multiples of the size and their bytes belong to somebody."""
        if len(at):
            assert not (at % size).any(), f"{what}: misaligned in {self.name} memory"
            inside = at.min() >= 0 and at.max() + size <= len(self.bytes)
            assert inside and self.valid[at].all() and self.valid[at + size - 1].all(), (
                f"{what}: outside of what {self.name} memory holds"
            )


def shared(size: int) -> Memory:
    """A block's memory, with room for what never may be touched."""
    memory = Memory(SHARED + -(-max(size, 16) // 16) * 16, "shared")
    memory.valid[SHARED:] = True
    memory.unfenced = np.zeros(len(memory.bytes) // 16, bool)
    return memory


@instruction(r"ld\.param\.([bsu](?:16|32|64)|f32)")
def _parameter(block, operands, kind):
    out, name = operands
    number = int(re.fullmatch(r"\[\s*\w+_param_(\d+)\s*\]", name)[1])
    put, of = block.write(out, kind), DTYPES[kind]
    return lambda on: put(block.params[number : number + 1].view(of)[:1], on)


@instruction(r"(ld)\.(global|shared)(?:::cta)?(?:\.nc)?(?:\.v([24]))?\.(b8|b16|b32|b64)")
@instruction(r"(st)\.(global|shared)(?:::cta)?(?:\.v([24]))?\.(b8|b16|b32|b64)")
def _move(block, operands, name, space, count, kind):
    memory = block.memory if space == "global" else block.shared
    where, data = operands[:: 1 if name == "st" else -1]
    names, address = re.findall(r"[^\s,{}]+", data), block.address(where)
    numbers, size = memory.view(kind), DTYPES[kind].itemsize
    assert len(names) == int(count or 1)
    rows = [(block.write if name == "ld" else block.read)(register, kind) for register in names]
    what = f"{name}.{space} {where}"

    def load(on):
        at = address()
        memory.check(at[on], size * len(names), what)
        at = np.where(on, at // size, 0)
        for i, put in enumerate(rows):
            put(numbers[at + i], on)

    def store(on):
        at = address()[on]
        memory.check(at, size * len(names), what)
        for i, row in enumerate(rows):
            numbers[at // size + i] = np.broadcast_to(row, block.threads)[on]
        if space == "shared":
            memory.unfenced[at // 16] = True

    return load if name == "ld" else store


@instruction(r"(red|atom)\.global\.gpu\.relaxed\.add(?:\.v([24]))?\.f32")
def _add(block, operands, name, count):
    """Sums in memory; `atom` gives what was there as well."""
    *old, where, data = operands
    names, address = re.findall(r"[^\s,{}]+", data), block.address(where)
    assert len(names) == int(count or 1) and bool(old) == (name == "atom")
    rows = [block.read(register, "f32") for register in names]
    puts = [block.write(register, "f32") for register in re.findall(r"[^\s,{}]+", old[0])] if old else []

    def run(on):
        at, numbers = address(), block.memory.view("f32")
        block.memory.check(at[on], 4 * len(names), name)
        for i, put in enumerate(puts):
            put(numbers[np.where(on, at // 4, 0) + i], on)
        for i, row in enumerate(rows):
            np.add.at(numbers, at[on] // 4 + i, row[on])

    return run


# -- asynchronous copies by threads ------------------------------------------------------------------------------------


class Copies(Part):
    """Copies on their way, of which each thread knows in which of its groups they are."""

    def reset(self) -> None:
        self.closed = np.zeros(self.block.threads, np.int64)  # groups that a thread has closed
        self.todo: list[tuple] = []  # threads, their group, and what to do for some of them

    def add(self, on, copy) -> None:
        """`copy(mask)` copies what these threads asked for."""
        if self.block.schedule.at_once():
            copy(on)
        else:
            self.todo.append((on.copy(), self.closed.copy(), copy))

    def wait(self, on, pending: int) -> None:
        """All but the last `pending` groups of these threads arrive."""
        left = []
        for threads, group, copy in self.todo:
            due = threads & on & (group < self.closed - pending)
            if due.any():
                copy(due)
            if (threads & ~due).any():
                left.append((threads & ~due, group, copy))
        self.todo = left


@instruction(r"cp\.async\.(ca|cg)\.shared\.global")
def _copy(block, operands, cache):
    """4, 8 or 16 bytes a thread, the last of which may be zeros instead; .cg takes 16 only."""
    to, of, size, *length = operands
    to, of, size = block.address(to), block.address(of), int(size, 0)
    length = block.read(length[0], "u32") if length else np.uint32(size)
    assert size == 16 or (cache == "ca" and size in (4, 8))
    copies = block.part(Copies)

    def run(on):
        places, sources, lengths = to().copy(), of().copy(), np.broadcast_to(length, block.threads).copy()

        def copy(mask):
            at, source, part = places[mask], sources[mask], np.arange(size) < lengths[mask][:, None]
            block.shared.check(at, size, "cp.async to")
            block.memory.check(source[lengths[mask] > 0], size, "cp.async of")
            bytes_ = block.memory.bytes[np.where(part, source[:, None] + np.arange(size), 0)]
            block.shared.bytes[at[:, None] + np.arange(size)] = np.where(part, bytes_, 0)

        copies.add(on, copy)

    return run


@instruction(r"cp\.async\.commit_group")
def _close_group(block, operands):
    copies = block.part(Copies)

    def run(on):
        copies.closed[on] += 1

    return run


@instruction(r"cp\.async\.wait_group")
def _wait_for_groups(block, operands):
    copies, pending = block.part(Copies), int(operands[0], 0)
    return lambda on: copies.wait(on, pending)


# -- 8 x 8 matrices ----------------------------------------------------------------------------------------------------


@instruction(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", needs=32)
def _matrices(block, operands, name, count, transposed):
    """Lane 8 j + i has the address of row i of matrix j; a lane holds two numbers of row lane // 4 of each."""
    where, data = operands[:: 1 if name == "st" else -1]
    names, address, count = re.findall(r"[^\s,{}]+", data), block.address(where), int(count)
    assert len(names) == count
    rows = [block.registers[register].reshape(-1, 32) for register in names]
    row, column = np.arange(32) // 4, 2 * (np.arange(32) % 4)

    def places(on):
        warps = np.flatnonzero(on[::32])
        assert on.sum() == 32 * len(warps), f"{name}matrix by a part of a warp"
        at = address().reshape(-1, 4, 8)[warps, :count]
        block.shared.check(at.reshape(-1), 16, f"{name}matrix")
        return warps, at[..., None] // 2 + np.arange(8)  # [warp, matrix, row, column]

    def load(on):
        warps, at = places(on)
        found = block.shared.view("u16")[at]
        found = (found.swapaxes(-1, -2) if transposed else found).astype(np.uint32)
        for j, register in enumerate(rows):
            register[warps] = found[:, j, row, column] | found[:, j, row, column + 1] << 16

    def store(on):
        warps, at = places(on)
        for j, register in enumerate(rows):
            matrix, bits = np.empty((len(warps), 8, 8), np.uint16), register[warps]
            matrix[:, row, column], matrix[:, row, column + 1] = bits & 0xFFFF, bits >> 16
            block.shared.view("u16")[at[:, j]] = matrix.swapaxes(-1, -2) if transposed else matrix
        block.shared.unfenced[at // 8] = True

    return load if name == "ld" else store
