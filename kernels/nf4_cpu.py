"""nf4_cpu.c: compiled where it first runs, by the compiler that is there, and kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE = Path(__file__).with_name("nf4_cpu.c")
FLAGS = {"AVX512": ("-mavx512f", "-mfma"), "AVX2": ("-mavx2", "-mfma")}  # by torch's name of what a CPU can do


FEW = 8  # rows up to which the product by codes is faster than what comes next (bench/LOG.md)
FEW_FOR_TILES = 4  # the same where the CPU has AMX tiles, which then take up to TILED rows of bf16
TILED = 64
CACHED = 1 << 21  # weights whose values are held at a time (bench/LOG.md)


class Weight(ctypes.Structure):
    """What the C code calls a weight."""

    pointers = ("codes", "absmax", "nested", "dynamic", "values")
    _fields_ = [*((name, ctypes.c_void_p) for name in pointers), ("groups", ctypes.c_long), ("shift", ctypes.c_int)]


def library() -> ctypes.CDLL | None:
    """The code for this CPU; None where there is none, and then a line is logged, once."""
    return built_for(torch.backends.cpu.get_cpu_capability())


@functools.cache
def built_for(capability: str) -> ctypes.CDLL | None:
    """The code for CPUs that can do `capability`.

    OpenMP's functions stay undefined: they are found in the process, where torch has loaded them. A second OpenMP
    would start a second team of threads, and both would wait for the same cores.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "cc"))), None)
    if compiler is None or capability not in FLAGS:
        reason = "there is no C compiler (gcc)" if capability in FLAGS else f"{SOURCE.name} has no {capability} code"
    else:
        options = ["-O3", "-ffp-contract=off", "-fPIC", *FLAGS[capability]]
        key = hashlib.sha256(SOURCE.read_bytes() + " ".join([compiler, *options]).encode()).hexdigest()[:16]
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillava"
            built = folder / f"{SOURCE.stem}-{key}.so"
            if not built.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=folder) as temporary:
                    compiled, linked = f"{temporary}/compiled.o", f"{temporary}/linked.so"
                    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
                    run([compiler, *options, "-fopenmp", "-c", str(SOURCE), "-o", compiled])
                    run([compiler, "-shared", compiled, "-o", linked])
                    os.replace(linked, built)  # several processes may build it at once
            found = ctypes.CDLL(str(built))
            pointer, long, int_ = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
            found.nf4_product.argtypes = pointer, Weight, pointer, long, long, long, int_
            found.nf4_values.argtypes = Weight, pointer, long, long, int_, int_
            found.nf4_tiles.argtypes = pointer, Weight, pointer, long, long, long, int_
            return found
        except subprocess.CalledProcessError as error:
            reason = f"{compiler} failed on {SOURCE.name}: {error.stderr.strip().partition(chr(10))[0]}"
        except (OSError, RuntimeError) as error:  # no home folder, no space, a process without OpenMP
            reason = str(error)
    logging.getLogger("minillava").warning("4-bit weights are slower than they could be on this CPU: %s", reason)
    return None


def takes(dtype: torch.dtype, packed: Tensor, absmax: Tensor, K: int) -> bool:
    """Whether the C code is there and takes these weights of K inputs."""
    fits = K % 32 == 0 and packed.is_contiguous() and absmax.is_contiguous()
    return fits and dtype in (torch.float32, torch.bfloat16) and library() is not None


def _weight(packed: Tensor, absmax, nested, dynamic, values: Tensor, blocksize: int) -> Weight:
    """Pointers: the tensors are contiguous and stay alive while it is used."""
    pointers = (None if t is None else t.data_ptr() for t in (packed, absmax, nested, dynamic, values))
    return Weight(*pointers, 0 if nested is None else nested.stride(0), blocksize.bit_length() - 1)


def fill(out: Tensor, start: int, *weight: Any) -> Tensor:
    """`out`, bf16 or fp32 and contiguous, becomes the values of the weight from `start` on, counted along its rows."""
    half, threads = int(out.dtype == torch.bfloat16), torch.get_num_threads()
    library().nf4_values(_weight(*weight), out.data_ptr(), start, out.numel(), half, threads)  # type: ignore[union-attr]
    return out


def forward(x_MK: Tensor, bias_N: Tensor | None, N: int, *weight: Any) -> Tensor:
    """x W^T + bias: a few rows by codes, in fp32; more with the weight's values in x's type, of which AMX tiles hold
    some at a time, or else a buffer that fits the cache."""
    (M, K), code, threads = x_MK.shape, library(), torch.get_num_threads()
    assert code is not None
    tiles = M <= TILED and N % 16 == 0 and x_MK.dtype == torch.bfloat16 and code.nf4_has_tiles()
    if M <= FEW_FOR_TILES or (M <= FEW and not tiles):
        x = torch.empty(2, M, K // 2).copy_(x_MK.reshape(M, K // 2, 2).permute(2, 0, 1))
        y_MN = torch.empty(M, N)
        code.nf4_product(x.data_ptr(), _weight(*weight), y_MN.data_ptr(), M, N, K, threads)
        return (y_MN if bias_N is None else y_MN.add_(bias_N)).to(x_MK.dtype)
    if tiles:
        blocks = -(-M // 16)
        x = F.pad(x_MK.contiguous(), (0, 0, 0, 16 * blocks - M))
        x = x.view(torch.int32).T.contiguous()  # pairs of inputs, of all rows
        y_NM = torch.empty(N, 16 * blocks)
        code.nf4_tiles(x.data_ptr(), _weight(*weight), y_NM.data_ptr(), blocks, N, K, threads)
        y_MN = y_NM[:, :M].T
        return (y_MN if bias_N is None else y_MN + bias_N).to(x_MK.dtype, memory_format=torch.contiguous_format)
    step = max(1, CACHED // K)
    y_NM, buffer_SK = x_MK.new_empty(N, M), x_MK.new_empty(min(step, N), K)
    for row in range(0, N, step):
        torch.mm(fill(buffer_SK[: N - row], row * K, *weight), x_MK.T, out=y_NM[row : row + step])
    return (y_NM if bias_N is None else y_NM.add_(bias_N[:, None])).T.contiguous()
