"""Tensor cores: products of bf16 matrices that are added up in fp32, of a warp (Ampere) or of four (Hopper).

Hopper's read shared memory by descriptors, and happen when somebody waits for them: until then their results, and the
shared memory and registers that they read, belong to them.
"""

import re

import numpy as np

from .arithmetic import widen
from .block import Part, instruction

ROW, COLUMN = np.arange(32) // 4, 2 * (np.arange(32) % 4)  # of a lane's first number in an 8 x 8 matrix
NAMES = re.compile(r"[^\s,{}]+")
# Bits 62 and 63 of a descriptor -> bytes of a row that chunks of 16 bytes are shuffled in
SPANS = {0: 16, 1: 128, 2: 64, 3: 32}


def pairs(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper number of a register."""
    return (bits << 16).view(np.float32), (bits & np.uint32(0xFFFF0000)).view(np.float32)


def fragment(registers: list[np.ndarray]) -> np.ndarray:
    """Four registers [warps, 32] of a 16 x 16 matrix: upper left, lower left, upper right, lower right."""
    whole = np.empty((len(registers[0]), 16, 16), np.float32)
    for register, (down, right) in zip(registers, ((0, 0), (8, 0), (0, 8), (8, 8)), strict=True):
        low, high = pairs(np.ascontiguousarray(register))
        whole[:, ROW + down, COLUMN + right], whole[:, ROW + down, COLUMN + right + 1] = low, high
    return whole


@instruction(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32", needs=32)
def _product(block, operands):
    """d [16, 8] = a [16, 16] b [16, 8] + c."""
    d, a, b, c = ([block.read(name, "u32").reshape(-1, 32) if name[0] == "%" else None for name in NAMES.findall(x)]
                  for x in operands)  # fmt: skip
    c = [np.zeros_like(to) if of is None else of for of, to in zip(c, d, strict=True)]

    def run(on):
        warps = np.flatnonzero(on[::32])
        b_matrix = np.empty((len(warps), 16, 8), np.float32)
        for i, register in enumerate(b):
            b_matrix[:, COLUMN + 8 * i, ROW], b_matrix[:, COLUMN + 8 * i + 1, ROW] = pairs(register[warps])
        product = fragment([register[warps] for register in a]) @ b_matrix
        added = [product[:, ROW + i // 2 * 8, COLUMN + i % 2] + c[i].view(np.float32)[warps] for i in range(4)]
        for register, numbers in zip(d, added, strict=True):
            register.view(np.float32)[warps] = numbers

    return run


# -- Hopper ------------------------------------------------------------------------------------------------------------


def operand_places(descriptor: int, rows: int, transposed: bool) -> np.ndarray:
    """Addresses [rows, 16] of an operand's numbers in shared memory, PTX ISA "matrix descriptor".

    Atoms of 8 rows of `span` bytes, 16 of which lie at (chunk xor row). As it is: a row is along the depth, atoms of
    rows `stride` apart, and `leading` is between chunks where they are not shuffled. Transposed: a row of bytes is
    along the operand's rows; then `leading` is between atoms along the rows and `stride` along the depth, and the other
    way round without shuffling.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    span = SPANS[descriptor >> 62]
    assert not descriptor >> 49 & 7, "descriptors with a base offset are not known"
    row, depth = np.arange(rows)[:, None], np.arange(16)[None, :]
    if not transposed:
        chunk = depth // 8 * (leading if span == 16 else 16)
        at = row // 8 * stride + row % 8 * span + chunk + depth % 8 * 2
    else:
        wide = span // 2
        along, across = (stride, leading) if span == 16 else (leading, stride)
        at = row // wide * along + depth // 8 * across + depth % 8 * span + row % wide * 2
    at = at + start
    return at ^ (at >> 7 & (span // 16 - 1)) << 4


class Products(Part):
    """Products on their way, for each group of four warps."""

    def reset(self) -> None:
        self.groups: dict[int, list[list]] = {first: [[]] for first in range(0, self.block.threads, 128)}

    def wait(self, first: int, pending: int) -> None:
        """All but the last `pending` closed groups of products happen."""
        groups = self.groups[first]
        while len(groups) - 1 > pending:
            for product in groups.pop(0):
                product()


@instruction(r"wgmma\.fence\.sync\.aligned", needs=128)
def _products_fence(block, operands):
    return lambda on: None


@instruction(r"wgmma\.commit_group\.sync\.aligned", needs=128)
def _close_group(block, operands):
    products = block.part(Products)

    def run(on):
        for first in np.flatnonzero(on)[::128]:
            products.groups[first].append([])

    return run


@instruction(r"wgmma\.wait_group\.sync\.aligned", needs=128)
def _wait_for_groups(block, operands):
    products, pending = block.part(Products), int(operands[0])

    def run(on):
        for first in np.flatnonzero(on)[::128]:
            products.wait(first, pending)

    return run


@instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.bf16\.bf16", needs=128)
def _asynchronous_product(block, operands, width):
    """d [64, N] = a [64, 16] b [16, N] + d, or without d if `keep` is false; a in registers or in shared memory."""
    N = int(width)
    d, a, b, keep, *rest = operands
    in_registers = "{" in a
    assert rest[:2] == ["1", "1"] and len(rest) == (3 if in_registers else 4), "scaled operands are not known"
    a_turned, b_turned = (0, int(rest[2])) if in_registers else (int(rest[2]), int(rest[3]))
    numbers = np.array([block.number[name] for name in NAMES.findall(d)])
    assert len(numbers) == N // 2
    a = [block.read(name, "u32") for name in NAMES.findall(a)] if in_registers else block.read(a, "u64")
    b, keep, products = block.read(b, "u64"), block.read(keep, "pred"), block.part(Products)
    j, thread = np.arange(N // 2)[:, None], np.arange(128)[None, :]
    row = thread // 32 * 16 + thread % 32 // 4 + j // 2 % 2 * 8
    column = j // 4 * 8 + thread % 4 * 2 + j % 2

    def operand(descriptor, rows, transposed):
        at = operand_places(descriptor, rows, transposed)
        block.shared.check(at.reshape(-1), 2, "wgmma")
        assert not block.shared.unfenced[at // 16].any(), "wgmma reads what threads wrote before a fence.proxy.async"
        return widen(block.shared.view("u16")[at // 2])

    def run(on):
        for first in np.flatnonzero(on)[::128]:
            kept = bool(np.broadcast_to(keep, block.threads)[first])
            a_at = None if in_registers else int(a[first])
            products.groups[first][-1].append(
                lambda first=first, b=int(b[first]), a=a_at, k=kept: happen(first, a, b, k)
            )

    def happen(first, a_at, b_at, kept):
        threads = slice(first, first + 128)
        left = fragment([x[threads].reshape(4, 32) for x in a]) if in_registers else operand(a_at, 64, a_turned)
        product = left.reshape(64, 16) @ operand(b_at, N, b_turned).T
        accumulator = block.rows[32].view(np.float32)
        if kept:
            accumulator[numbers, threads] += product[row, column]
        else:
            accumulator[numbers, threads] = product[row, column]

    return run
