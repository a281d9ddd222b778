"""What every kernel file shares: registration with torch, Triton (where it is installed), and one way to launch.

An operation is registered once with a plain PyTorch implementation (CPU, Apple GPUs), a CUDA implementation (Triton and
library products), a fake one (shapes only) and a backward formula. Which one runs is torch's dispatch by device; a missing
Triton or a dtype that a kernel does not take is a decision made from facts in sight (`has_triton`, dtype), never an exception caught.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("minillava", "DEF")
HAS_TRITON = importlib.util.find_spec("triton") is not None


def register(
    schema: str,
    *,
    plain: Callable,
    cuda: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> Any:
    """Register `schema` as torch.ops.minillava.<name> and return the operation.

    Library.define and impl rather than custom_op or triton_op: a third of custom_op's cost per call, and triton_op breaks
    torch.compile on CPU tensors (measured in torch 2.13).
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    for key in ("CPU", "MPS"):
        LIBRARY.impl(name, plain, key)
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"minillava::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"minillava::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return getattr(torch.ops.minillava, name).default


def shapes(**tensors: Tensor | None) -> str:
    """ "x [2, 3], w [4, 5]" for the message of a refused call."""
    return ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items() if t is not None)
