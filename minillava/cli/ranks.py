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
    """The model of `--dtype`, `--device`, `--quantize` and `--base`, or this process's part of it, on a GPU of its own
    where there are some."""
    import torch

    from minillava import LLaVA

    if world() == 1:
        return LLaVA.from_pretrained(source, args.dtype, args.device, args.quantize, args.base)
    from minillava.layers import tensor_parallel

    device = args.device
    if device in (None, "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        device = f"cuda:{torch.cuda.current_device()}"
    model = LLaVA.from_pretrained(source, args.dtype, device, args.quantize, args.base, (rank(), world()))
    tensor_parallel.join(model.device)
    return model


def mute() -> None:
    """Only the first one writes."""
    if rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
