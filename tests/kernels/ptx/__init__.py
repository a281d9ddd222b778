"""Run compiled kernels on the CPU: the PTX that Triton makes for Ampere and Hopper, thread by thread.

An interpreter of Triton's language shows what a kernel says; this shows what the compiler made of it: which lane holds
what, what specialised warps wait for, when a copy may arrive. Instructions as in the PTX ISA 8.x and 9.x. What it does
not show: the order in which threads see each other's writes, and warps whose lanes are not in step.

    ptx.card(monkeypatch, "sm_90", flash)
    flash.forward(q, k, v, ...)  # of tensors on the CPU, as an H200 would
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import torch

from minillava.kernels import frame

from . import arithmetic, bulk, control, matrices  # noqa: F401 (they enter what they know)
from .block import Block, Deadlock, Schedule, known
from .memory import Memory, shared
from .text import parse

__all__ = ["Deadlock", "card", "known", "launch", "run"]


def card(monkeypatch, arch: str, *files, seed: int | None = None, multiprocessors: int | None = None) -> None:
    """Kernels of these files run as on that card: compiled for it, with its configurations."""
    found = frame.CARDS[arch]
    if multiprocessors:
        found = dataclasses.replace(found, multiprocessors=multiprocessors)
    for file in files:
        monkeypatch.setattr(file, "launch", launch(arch, seed), raising=False)
        monkeypatch.setattr(file, "card_of", lambda x: found, raising=False)


def launch(arch: str, seed: int | None = None) -> Callable:
    """A stand-in for frame.launch: compiles for that card what is to be launched, and runs it on tensors of the CPU."""
    from minillava.kernels.tools import aot

    def run_compiled(kernel, grid, *args, config=None, **constants):
        meta = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args]
        constants |= {"SHUFFLE": True} if "SHUFFLE" in constants else {}
        with aot.compiling(arch):
            frame.on_compiled = lambda kernel, compiled, options, constants: compiled
            compiled = frame.launch(kernel, grid, *meta, config=config, **constants)
        # None and 1 are part of the compiled code
        given = [a for a in args if not (a is None or (isinstance(a, int) and a == 1))]
        scratch = getattr(compiled.metadata, "global_scratch_size", 0) or 0
        run(compiled.asm["ptx"], grid, given, compiled.metadata.shared, scratch, seed)

    return run_compiled


def run(ptx: str, grid, args, shared_bytes: int = 1 << 16, scratch: int = 0, seed: int | None = None) -> None:
    """Run a kernel over `grid`; `args` are its arguments, tensors (which it may change) and numbers."""
    program, grid = parse(ptx), (*grid, 1, 1)[:3]
    storages = {arg.untyped_storage().data_ptr(): arg for arg in args if isinstance(arg, torch.Tensor)}
    raw = {at: _bytes(tensor) for at, tensor in storages.items()}
    starts, end = {}, 256
    for at, bytes_ in raw.items():
        starts[at], end = end, -(-(end + len(bytes_) + 128) // 256) * 256
    memory = Memory(end + scratch * int(np.prod(grid)) + 256, "global")
    for at, bytes_ in raw.items():
        memory.bytes[starts[at] : starts[at] + len(bytes_)] = bytes_
        memory.valid[starts[at] : starts[at] + len(bytes_)] = True
    memory.valid[end : end + scratch * int(np.prod(grid))] = True
    block = Block(program, memory, shared(shared_bytes), Schedule(seed))
    block.params = _parameters(program.params, args, starts, end)
    places = list(itertools.product(*map(range, grid[::-1])))
    if block.schedule.random:
        block.schedule.random.shuffle(places)
    with np.errstate(all="ignore"):
        for place in places:
            block.run(place[::-1], grid)
    for at, bytes_ in raw.items():
        bytes_[:] = memory.bytes[starts[at] : starts[at] + len(bytes_)]


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """All of the memory that a tensor is a part of."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def _parameters(kinds, args, starts, scratch: int) -> np.ndarray:
    """Addresses and numbers as 64 bits each; where scratch memory starts, and another such address, come last."""
    values = np.zeros(len(kinds), np.uint64)
    for i, (kind, arg) in enumerate(zip(kinds, [*args, scratch, 0])):
        if isinstance(arg, torch.Tensor):
            arg = starts[arg.untyped_storage().data_ptr()] + arg.storage_offset() * arg.itemsize
        elif kind == "f32":
            arg = int(np.float32(arg).view(np.uint32))
        values[i] = int(arg) & 0xFFFFFFFFFFFFFFFF
    assert len(args) + 2 >= len(kinds) >= len(args), f"{len(kinds)} parameters, {len(args)} arguments"
    return values
