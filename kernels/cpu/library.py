"""The C code for CPUs, step.c and what it includes: compiled where it first runs, kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import math
import os
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / "step.c", *sorted({*FOLDER.glob("*.[ch]")} - {FOLDER / "step.c"})]  # the first includes the others
OPTIONS = ("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-ffp-contract=off", "-fPIC")
# Classes of CPUs, the best first: what the compiler may use, as /proc/cpuinfo calls it.
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma")
CLASSES = {
    "amx": (*_AVX512, "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16"),
    "avx512_bf16": (*_AVX512, "avx512_vnni", "avx512_bf16"),
    "avx512_vnni": (*_AVX512, "avx512_vnni"),
    "avx512": _AVX512,
    "avx_vnni": ("avx2", "fma", "avx_vnni"),
    "avx2": ("avx2", "fma"),
}
COMPILING = "compiling-"  # how folders of compilers at work begin
FEW = 16  # rows that read each weight once
_memory = threading.local()
_pointer, _long, _int = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
ARGUMENTS = {
    "weight_values": (_pointer, _pointer, _int, _int),
    "nf4_codes": (_pointer, _int, *[_pointer] * 4, _long, _long, _int),
    "few_rows": (_pointer, _pointer, _pointer, _long, _int, _int),
    "many_rows": (_pointer, _pointer, _pointer, _pointer, _long, _int),
    "decoder_step": (*[_pointer] * 6, _long, _int),
    "rms_norm": (_pointer, _pointer, _pointer, _long, _long, ctypes.c_float, _int),
    "swiglu": (_pointer, _pointer, _pointer, _long, _long, _long, _int),
    "quick_gelu": (_pointer, _pointer, _long, _int),
    "packed_attention": (_pointer, _int),
}


def classes() -> list[str]:
    """The classes whose instructions this CPU has, the best first."""
    path = Path("/proc/cpuinfo")  # of Linux
    text = path.read_text() if path.exists() else ""
    has = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    return [name for name, needs in CLASSES.items() if has.issuperset(needs)]


@functools.cache
def chosen_class() -> str | None:
    """The best class of this CPU, or the one that MINILLAVA_CPU names; None for another kind of CPU."""
    able, wanted = classes(), os.environ.get("MINILLAVA_CPU")
    if wanted in able:
        return wanted
    if wanted is not None:
        _log(f"MINILLAVA_CPU={wanted} is ignored: this CPU is one of {', '.join(able) or 'no class that is known'}")
    return able[0] if able else None


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16: elsewhere PyTorch emulates them, slower than float32."""
    return chosen_class() in ("amx", "avx512_bf16")


@functools.cache
def library() -> Any:
    """The code for this CPU; None where there is none. If there could be some, a line is logged then, once."""
    name = chosen_class()
    return None if name is None else built_for(name)


def inference(*tensors: Tensor, types: Sequence[torch.dtype] = (torch.bfloat16,)) -> Any:
    """The code for this CPU if it may take these tensors: of these types, not empty, and no gradients are wanted."""
    graded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    fit = tensors[0].numel() and all(t.is_cpu and t.dtype in types for t in tensors)
    return library() if fit and not graded and not torch.compiler.is_compiling() else None


@functools.cache
def built_for(name: str) -> Any:
    """The code for CPUs of a class. Its attributes `tiles` and `bf16` tell what it multiplies by."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "cc"))), None)
    if compiler is None:
        return _log("this CPU computes slower than it could: there is no C compiler (gcc)")
    try:
        found = opened(built(compiler, name), name)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().partition("\n")[0]
        return _log(f"this CPU computes slower than it could: {compiler} failed on {SOURCES[0].name}: {lines}")
    except (OSError, RuntimeError) as error:  # no home folder, no space, a process without OpenMP
        return _log(f"this CPU computes slower than it could: {error}")
    return built_for("avx512_bf16") if found.tiles and not found.tiles_allowed() else found


def _log(line: str) -> None:
    logging.getLogger("minillava").warning(line)


def opened(path: Path, name: str) -> Any:
    """The compiled code of a class, its functions' arguments declared."""
    found: Any = ctypes.CDLL(str(path))
    for function, arguments in ARGUMENTS.items():
        if hasattr(found, function):  # some need tiles
            getattr(found, function).argtypes = arguments
    found.tiles, found.bf16 = name == "amx", name in ("amx", "avx512_bf16")
    return found


def flags_of(name: str) -> list[str]:
    """What gcc calls the instructions of a class."""
    return ["-m" + flag.replace("amx_", "amx-").replace("_", "") for flag in CLASSES[name]]


def built(compiler: str, name: str, more: Sequence[str] = ()) -> Path:
    """The file of the code compiled for a class, made unless it is there, whole and this user's own.

    A library that was cut off or changed would end every process that loads it by a signal: the file ends in the
    SHA-256 of what is before it, which loaders do not read.
    OpenMP's functions stay undefined: they are found in the process, where torch has loaded them. A second OpenMP
    would start a second team of threads, and both would wait for the same cores.
    """
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    options = [*OPTIONS, *flags_of(name), *more]
    words = [compiler, run([compiler, "--version"]).stdout, *options]
    text = b"".join(path.read_bytes() for path in SOURCES) + " ".join(words).encode()
    folder = cache_folder()
    path = folder / f"cpu-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not is_whole(path):
        with tempfile.TemporaryDirectory(dir=folder, prefix=COMPILING) as temporary:
            compiled, linked = f"{temporary}/compiled.o", f"{temporary}/linked.so"
            run([compiler, *options, "-fopenmp", "-c", str(SOURCES[0]), "-o", compiled])
            run([compiler, "-shared", compiled, "-o", linked, "-lm"])
            with open(linked, "r+b") as file:
                file.write(hashlib.sha256(file.read()).digest())
                file.flush()
                os.fsync(file.fileno())
            os.chmod(linked, 0o700)  # whatever the umask
            os.replace(linked, path)  # several processes may build it at once
    return path


def cache_folder() -> Path:
    """The user's folder for compiled code, closed to others and without what killed compilers left.

    Raises RuntimeError where it is another user's: whoever can write there would run code in this process.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillava"
    folder.mkdir(parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise RuntimeError(f"{folder} is another user's; set XDG_CACHE_HOME to a folder of yours")
    if found.st_mode & 0o022:
        folder.chmod(0o700)
    for left in folder.glob(f"{COMPILING}*"):
        with contextlib.suppress(OSError):  # another process may sweep too
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left)
    return folder


def is_whole(path: Path) -> bool:
    """Whether a file of compiled code is what `built` wrote, and can have been written by this user or root only."""
    try:
        found, text = path.lstat(), path.read_bytes()
    except OSError:
        return False
    private = stat.S_ISREG(found.st_mode) and found.st_uid in (os.geteuid(), 0) and not found.st_mode & 0o022
    return private and hashlib.sha256(text[:-32]).digest() == text[-32:]


def workspace(purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """This thread's memory for a purpose, which the next call hands out again: the first use of a page costs more than
    what is written to it."""
    held, size = vars(_memory), math.prod(shape) * dtype.itemsize
    if purpose not in held or held[purpose].nbytes < size:
        held.pop(purpose, None)
        held[purpose] = torch.empty(size, dtype=torch.uint8)
    return held[purpose][:size].view(dtype).view(shape)
