"""The C code for CPUs, step_cpu.c and what it includes: compiled where it first runs, by the compiler that is there.

What was compiled is kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import math
import mmap
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent
# step_cpu.c includes the others.
PARTS = ("nf4_cpu.c", "pointwise_cpu.c", "attention_cpu.c", "product_cpu.c")
SOURCES = [FOLDER / name for name in ("step_cpu.c", *PARTS)]
FLAGS = {"AVX512": ("-mavx512f", "-mfma"), "AVX2": ("-mavx2", "-mfma")}  # by torch's name of what a CPU can do
FEW = 4  # rows of one product
PRODUCTS, TILES = 1, 2  # what `can` says: bf16 products, AMX tiles
_memory = threading.local()


class Weight(ctypes.Structure):
    """A weight in four bits: tensors that are contiguous and outlive it."""

    pointers = ("codes", "absmax", "nested", "dynamic", "values")
    _fields_ = [*((name, ctypes.c_void_p) for name in pointers), ("groups", ctypes.c_long), ("shift", ctypes.c_int)]

    @classmethod
    def of(
        cls,
        packed: Tensor,
        absmax: Tensor,
        nested: Tensor | None,
        dynamic: Tensor | None,
        values: Tensor,
        blocksize: int,
    ) -> Weight:
        pointers = (None if t is None else t.data_ptr() for t in (packed, absmax, nested, dynamic, values))
        return cls(*pointers, 0 if nested is None else nested.stride(0), blocksize.bit_length() - 1)


class Matrix(ctypes.Structure):
    """A linear layer [N, K]: its weight in bf16, or in four bits; a bias in bf16."""

    long, pointer = ctypes.c_long, ctypes.c_void_p
    _fields_ = [("N", long), ("K", long), ("bias", pointer), ("values", pointer), ("codes", Weight)]

    @classmethod
    def of(cls, shape: tuple[int, int], bias: Tensor | None, weight: Tensor | None, codes: tuple | None) -> Matrix:
        """`codes`: packed, absmax, nested, dynamic, the 16 values, block size."""
        pointers = (None if t is None else t.data_ptr() for t in (bias, weight))
        return cls(*shape, *pointers, Weight.of(*codes) if codes else Weight())


def library() -> ctypes.CDLL | None:
    """The code for this CPU; None where there is none. If there could be some, a line is logged then, once."""
    return built_for(torch.backends.cpu.get_cpu_capability())


@functools.cache
def built_for(capability: str) -> ctypes.CDLL | None:
    """The code for CPUs that can do `capability`.

    OpenMP's functions stay undefined: they are found in the process, where torch has loaded them. A second OpenMP
    would start a second team of threads, and both would wait for the same cores.
    """
    if capability not in FLAGS:
        return None  # another kind of CPU
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "cc"))), None)
    if compiler is None:
        reason = "there is no C compiler (gcc)"
    else:
        options = ["-O3", "-ffp-contract=off", "-fPIC", *FLAGS[capability]]
        text = b"".join(path.read_bytes() for path in SOURCES) + " ".join([compiler, *options]).encode()
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillava"
            built = folder / f"{SOURCES[0].stem}-{hashlib.sha256(text).hexdigest()[:16]}.so"
            if not built.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=folder) as temporary:
                    compiled, linked = f"{temporary}/compiled.o", f"{temporary}/linked.so"
                    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
                    run([compiler, *options, "-fopenmp", "-c", str(SOURCES[0]), "-o", compiled])
                    run([compiler, "-shared", compiled, "-o", linked, "-lm"])
                    os.replace(linked, built)  # several processes may build it at once
            found = ctypes.CDLL(str(built))
            pointer, long, int_ = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
            found.nf4_product.argtypes = pointer, Weight, pointer, long, long, long, int_
            found.nf4_values.argtypes = Weight, pointer, long, int_, int_
            if hasattr(found, "decoder_step"):  # compiled with bf16
                found.nf4_tiles.argtypes = pointer, Weight, pointer, long, long, long, int_
                found.few_rows.argtypes = pointer, pointer, pointer, long, int_
                found.decoder_step.argtypes = *[pointer] * 6, long, int_
                found.rms_norm.argtypes = pointer, pointer, pointer, long, long, ctypes.c_float, int_
                found.swiglu.argtypes = pointer, pointer, pointer, long, long, long, int_
                found.quick_gelu.argtypes = pointer, pointer, long, int_
                found.attention_tiles.argtypes = pointer, int_
                found.attention_room.argtypes, found.attention_room.restype = (pointer, long, long, long), long
            found.can = found.cpu_can()  # type: ignore[attr-defined]
            return found
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().partition("\n")[0]
            reason = f"{compiler} failed on {SOURCES[0].name}: {lines}"
        except (OSError, RuntimeError) as error:  # no home folder, no space, a process without OpenMP
            reason = str(error)
    logging.getLogger("minillava").warning("this CPU computes slower than it could: %s", reason)
    return None


def few_rows(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor | None:
    """x weight^T + bias, all in bf16, for up to FEW rows; None where this CPU has no code for it."""
    (M, K), code = x_MK.shape, library()
    if code is None or M > FEW or K % 32 or not int(code.can) & PRODUCTS:
        return None
    if not all(t.dtype == torch.bfloat16 and t.is_contiguous() for t in (weight_NK, bias_N) if t is not None):
        return None
    return matrix_rows(x_MK, Matrix.of((len(weight_NK), K), bias_N, weight_NK, None))


def matrix_rows(x_MK: Tensor, matrix: Matrix) -> Tensor:
    """x [M, K] through a layer whose tensors are alive, FEW rows at a time; all in bf16."""
    x_MK, y_MN = x_MK.contiguous(), x_MK.new_empty(len(x_MK), matrix.N)
    for m in range(0, len(x_MK), FEW):
        some = min(FEW, len(x_MK) - m)
        pointers = x_MK[m:].data_ptr(), ctypes.byref(matrix), y_MN[m:].data_ptr()
        library().few_rows(*pointers, some, torch.get_num_threads())  # type: ignore[union-attr]
    return y_MN


def workspace(purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """This thread's memory for a purpose, which the next call hands out again: the first use of a page costs more than
    what is written to it."""
    held, size = vars(_memory), math.prod(shape) * dtype.itemsize
    if purpose not in held or held[purpose].nbytes < size:
        held.pop(purpose, None)
        held[purpose] = torch.empty(size, dtype=torch.uint8)
    return held[purpose][:size].view(dtype).view(shape)


def to_huge_pages(module: nn.Module) -> None:
    """Move what `module` holds end to end into memory of large pages, where the system has them (Linux): reading
    gigabytes then waits less for addresses to be translated (bench/LOG.md). One tensor at a time is held twice."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    owners = [(m, name) for m in module.modules() for name in (*m._parameters, *m._buffers)]
    found = [(m, name) for m, name in owners if getattr(m, name) is not None]
    room, page = sum(-(-getattr(*owner).nbytes // 64) * 64 for owner in found), 1 << 21
    memory = mmap.mmap(-1, room + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    at = -whole.data_ptr() % page
    for m, name in found:
        tensor = getattr(m, name).detach()
        copy = whole[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        at += -(-tensor.nbytes // 64) * 64
        if name in m._buffers:
            m._buffers[name] = copy
        else:
            getattr(m, name).data = copy
