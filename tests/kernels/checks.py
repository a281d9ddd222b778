"""What the kernels' tests share: the tolerance, and what some of them need."""

import contextlib
import os
import shutil

import pytest
import torch

from minillava.kernels.frame import HAS_TRITON

CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not CUDA, reason="no GPU here; real sizes of the Triton kernels wait for one")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))),
    reason="torch.compile needs a C++ compiler on a CPU, and there is none",
)


def error(got, exact):
    """Relative, of all numbers together."""
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def apart(t):
    """The same numbers, each two places from the next; None stays None."""
    return None if t is None else torch.stack((t, t), -1)[..., 0]


def errors(names, ours, plain, exact):
    """By name, how far each tensor is from float64, and how far it may be: twice as far as plain PyTorch."""
    found = {}
    for name, a, b, c in zip(names, ours, plain, exact, strict=True):
        assert a.shape == c.shape and a.dtype == b.dtype, name
        found[name] = error(a, c), 2 * error(b, c)
    return found


def assert_no_worse(names, ours, plain, exact):
    """Never more than twice as far from float64 as plain PyTorch in the same dtype, tensor by tensor."""
    for name, (off, bound) in errors(names, ours, plain, exact).items():
        assert off <= bound, f"{name}: {off:.2e}, more than {bound:.2e}"


@contextlib.contextmanager
def one_rank(folder):
    """The mesh of a process group that this process has for itself."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield torch.distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()
