"""The processes of torchrun: each has its part of a decoder, and the first one speaks."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minillava import LLaVA


def world() -> int:
    """How many there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which one this is."""
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def load(source: Path, args: argparse.Namespace) -> LLaVA:
    """The model of `--dtype`, `--device`, `--quantize` and `--base`, or this process's part of it."""
    from minillava import LLaVA

    device = _own_device(args.device) if world() > 1 else args.device
    share = (rank(), world()) if world() > 1 else None
    model = LLaVA.from_pretrained(source, args.dtype, device, args.quantize, args.base, share)
    if share is not None:
        from minillava.layers import tensor_parallel

        tensor_parallel.join(model.device)
    return model


def mute() -> None:
    """Only the first one writes."""
    if rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process


def _own_device(device: str | None) -> str | None:
    """A GPU of its own for each process of this machine."""
    import torch

    if device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return f"cuda:{torch.cuda.current_device()}"
