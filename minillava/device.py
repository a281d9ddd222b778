"""The machine that computes: which device and dtype, how fast it multiplies and copies, how much memory was taken."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch

from minillava.errors import UserError, nearest
from minillava.kernels.cpu import library as cpu


def pick_device(name: torch.device | str = "auto", auto: Sequence[str] = ("cuda",)) -> torch.device:
    """The device of that name; "auto" is the first of these kinds that is there, else the CPU.

    Raises UserError for one that is unknown or not there.
    """
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        return torch.device(next((kind for kind in auto if there[kind]), "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device '{name}' is unknown{nearest(str(name), there)}") from None
    if (device.index or 0) >= there.get(device.type, 0):
        have = ", ".join(f"{count} {kind}" for kind, count in there.items() if count)
        raise UserError(f"device '{name}' is not there (this machine has {have}); leave it out, or use cpu")
    return device


def describe_device(device: torch.device) -> str:
    """The device and torch's version in a few words; of a CPU its class, threads and how these wait."""
    waits = [f"{name}={os.environ[name]}" for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ]
    kind = [cpu.chosen_class() or ""] if device.type == "cpu" else []
    threads = f"{device.type} ({', '.join(filter(None, (*kind, f'{torch.get_num_threads()} threads', *waits)))})"
    return f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else threads}, torch {torch.__version__}"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16: elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and cpu.multiplies_bf16()


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; 'auto' is bfloat16 where the hardware multiplies it, else float32."""
    return getattr(torch, ("float32", "bfloat16")[multiplies_bf16(device)] if name == "auto" else name)


@cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few large products on this device; of smaller ones in a dtype that it emulates."""
    best = 0.0
    for side in (8192,) if device.type == "cuda" else (256, 1024):
        multiply = partial(torch.mm, *(torch.randn(side, side, device=device).to(dtype) for _ in range(2)))
        best = max(best, 2 * side**3 / min(_seconds(multiply, device, 8)))
        if best < 4e9:  # the next would take seconds (bf16 on a CPU without: 1 GFLOP/s)
            break
    return best


@cache
def copy_bytes_per_s(device: torch.device) -> float:
    """How fast this machine copies memory, read and written bytes: what decoding is measured against."""
    source = torch.ones(1 << (29 if device.type == "cuda" else 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / sorted(_seconds(lambda: target.copy_(source), device, 5))[2]


def _seconds(work: Callable[[], torch.Tensor], device: torch.device, times: int) -> list[float]:
    """How long each of so many calls takes."""
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    synchronize()
    taken = []
    for _ in range(times):
        began_s = time.perf_counter()
        work()
        synchronize()
        taken.append(time.perf_counter() - began_s)
    return taken


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: of the GPU by PyTorch's tensors, else of the process (0 on Windows, which has no such
    call in Python)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
