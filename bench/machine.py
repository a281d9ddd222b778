"""What a number is measured on and against: the device, its copy bandwidth, its matmul peak, and interleaved timing."""

from __future__ import annotations

import argparse
import contextlib
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from minillava.device import multiplies_bf16
from minillava.kernels.cpu.library import chosen_class

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "liger-kernel", "transformers", "peft", "numpy", "bitsandbytes", "torchao", "gemlite")
PACKAGES += ("openvino-genai", "onnxruntime-genai", "ctranslate2", "llama_cpp_python")


def device_name(device: str) -> str:
    """The card, or the CPU and the class whose instructions our code is compiled for."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        return f"{found[1] if found else platform.machine()}, class {chosen_class()}"
    return platform.processor() or platform.machine()


def folder(device: str, keep: bool = True) -> Path:
    """bench/results/<device> ("nvidia-h200", "cpu"), which the repository keeps, or runs/bench/<device>."""
    name = device_name(device).lower().replace(" ", "-") if device == "cuda" else "cpu"
    return (ROOT / "bench" / "results" if keep else Path("runs") / "bench") / name


def add_out(parser: argparse.ArgumentParser) -> None:
    """Where results go: a folder that git ignores, until somebody wants them kept."""
    parser.add_argument("--out", type=Path, help="folder for the results (default: runs/bench/<device>)")
    parser.add_argument("--keep", action="store_true", help="results go to bench/results/<device>, to be committed")


def out(chosen: argparse.Namespace, device: str) -> Path:
    """The folder that `add_out`'s options name, which is there."""
    found = chosen.out or folder(device, chosen.keep)
    found.mkdir(parents=True, exist_ok=True)
    return found


def need(*packages: str) -> None:
    """Ends with a line where the peers of a bench are not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        print(f"error: this bench needs {', '.join(missing)}; pip install {' '.join(missing)}", file=sys.stderr)
        raise SystemExit(2)


def facts(device: str) -> dict[str, Any]:
    """Device, versions of what matters (None where not installed) and the commit."""
    versions = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"] in PACKAGES}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: versions.get(name) for name in PACKAGES},
        "commit": commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")
        if commit.stdout
        else None,
    }


def made_of(facts: dict[str, Any]) -> str:
    """Versions and commit, as the tables begin."""
    versions = [f"{name} {version}" for name, version in facts["versions"].items() if version]
    return f"{', '.join(versions)}; commit {facts['commit']}"


def time_s(function: Callable, device: str, flush: torch.Tensor | None = None) -> float:
    """Seconds of one call; on a GPU by events, after overwriting `flush` so that nothing is left in the L2 cache."""
    if device != "cuda":
        began = time.perf_counter()
        function()
        return time.perf_counter() - began
    if flush is not None:
        flush.zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def interleaved(functions: dict[str, Callable], device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Median and quartiles in seconds of every function, one call of each in turn, so that all meet the same clocks."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device == "cuda" else None
    for function in functions.values():
        for _ in range(2):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(time_s(function, device, flush))
    return {name: dict(zip(("low_s", "median_s", "high_s"), quantiles(times, n=4))) for name, times in seconds.items()}


def limits(device: str, dtype: torch.dtype, tiny: bool) -> dict[str, float]:
    """Measured copy bandwidth (read + write) in bytes/s and matmul peak in FLOP/s, on random data; in float32 where
    the dtype is bfloat16 and would be emulated."""
    if dtype == torch.bfloat16 and not multiplies_bf16(torch.device(device)):
        dtype = torch.float32
    size, side = (1 << 22, 256) if tiny else ((1 << 30, 8192) if device == "cuda" else (1 << 27, 1024))
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timed = interleaved({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, device, 5 if tiny else 20)
    copy, matmul = timed["copy"]["median_s"], timed["matmul"]["median_s"]
    return {"copy_bytes_per_s": 2 * size / copy, "matmul_flop_per_s": 2 * side**3 / matmul}
