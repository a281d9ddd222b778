"""Compile kernels for a card that is not there, and read back what the compiler made of them.

A stand-in for Triton's driver answers which card there is, so that the very launch that a GPU would see (arguments,
specialisation, shipped configuration) is compiled; registers and spills are then read from the binary, shared memory
from Triton's own count, and instructions from the PTX.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from minillava.kernels import frame
from minillava.kernels.frame import Card

MARKERS = {
    "wgmma": "wgmma.mma_async",
    "tma": "cp.async.bulk.tensor",
    "setmaxnreg": "setmaxnreg",
    "mma.sync": "mma.sync",
    "cp.async": "cp.async.cg",
    "tcgen05": "tcgen05.mma",
    "mfma": "v_mfma",
}


@dataclass
class Compiled:
    """One compiled kernel: what it was compiled from and what it needs."""

    kernel: str
    arch: str
    settings: dict[str, Any]
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    instructions: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        return asdict(self)


class _Driver:
    """Triton's driver as far as compiling asks it; binders are kept by device, so each architecture is one."""

    def __init__(self, card: Card) -> None:
        digits = card.arch.removeprefix("sm_").removeprefix("gfx")
        hip = card.arch.startswith("gfx")
        self.card, self.device = card, int(digits, 16)
        self.target = GPUTarget("hip", card.arch, 64) if hip else GPUTarget("cuda", int(digits), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(arch: str) -> Iterator[list[Compiled]]:
    """Within, a launch on meta tensors compiles for `arch` and lands in the list."""
    card = frame.CARDS[arch]
    found: list[Compiled] = []
    previous = triton.runtime.driver._active

    def keep(kernel: Any, compiled: Any, options: dict, constants: dict) -> None:
        found.append(_read_back(kernel, compiled, card, {**constants, **options}))

    saved = frame.compiling_for, frame.on_compiled
    frame.compiling_for, frame.on_compiled = card, keep
    triton.runtime.driver.set_active(_Driver(card))
    try:
        yield found
    finally:
        triton.runtime.driver._active = previous
        frame.compiling_for, frame.on_compiled = saved


def _read_back(kernel: Any, compiled: Any, card: Card, settings: dict[str, Any]) -> Compiled:
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spill = _number(r"\.vgpr_count:\s+(\d+)", text), 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    else:
        text = compiled.asm["ptx"]
        registers, spill = _resources(compiled.asm["cubin"])
    return Compiled(
        kernel=kernel.__name__,
        arch=card.arch,
        settings={name: value for name, value in settings.items() if name != "enable_fp_fusion"},
        warps=compiled.metadata.num_warps,
        registers=registers,
        spill_bytes=spill,
        shared_bytes=compiled.metadata.shared,
        shared_limit=card.shared_bytes,
        instructions=[name for name, marker in MARKERS.items() if marker in text],
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack, which in these kernels is what registers spilled to."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)


def _number(pattern: str, text: str) -> int:
    return sum(int(n) for n in re.findall(pattern, text))
