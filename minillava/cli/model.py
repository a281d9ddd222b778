"""Flags that say which model and how it computes, and what of them can be refused before torch is imported."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from minillava.checkpoints.hub import NANO, resolve
from minillava.errors import UserError, nearest
from minillava.layers.scheme import Scheme

DTYPES = ("float32", "bfloat16", "float16", "fp32", "bf16", "fp16")
DEVICES = ("cpu", "cuda", "mps")
GPU_NODES = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")  # in /dev: NVIDIA's, Jetson's, AMD's, that of Windows' Linux
BASE = "what a delta, a lone projector or LoRA adapters belong to"


def add_model(p: argparse.ArgumentParser) -> None:
    """--model, --base."""
    add = p.add_argument
    add("--model", default=str(NANO), metavar="DIR|HUB_ID", help="checkpoint (default: the one that ships, nano)")
    add("--base", metavar="DIR|HUB_ID", help=BASE)


def add_numbers(p: argparse.ArgumentParser) -> None:
    """--dtype, --device, --quantize."""
    add = p.add_argument
    add("--dtype", metavar="D", help="float32, bfloat16 or float16 (default: what suits device and size)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, ... or mps (default: cuda if there, else cpu)")
    add(
        "--quantize",
        metavar="nf4",
        help="decoder in 4 or 8 bits: nf4, nf4-double, fp4, int8, ...; nf4:decoder,vision,head=int8 for more parts;\n"
        "nf4-exact: CPUs do not round inputs to 8 bits for faster products",
    )


def check_numbers(args: argparse.Namespace) -> None:
    """Raises UserError for a dtype, a quantisation or a device that is unknown or not there."""
    if args.dtype is not None and args.dtype not in DTYPES:
        raise UserError(f"dtype '{args.dtype}' is unknown{nearest(args.dtype, DTYPES)}")
    if args.quantize is not None:
        Scheme.parse(args.quantize)
    check_device(args.device or "cpu")


def check_device(name: str) -> None:
    """Raises UserError for a device that is unknown, or as far as can be seen from here not there."""
    kind, _, number = name.partition(":")
    if kind not in DEVICES or not re.fullmatch(r"[a-z]+(:\d+)?", name):
        raise UserError(f"device '{name}' is unknown{nearest(kind, DEVICES)}")
    if kind != "cuda" and int(number or 0):
        raise UserError(f"device '{name}' is not there (a machine has one {kind}); use {kind}")
    if kind == "cuda" and sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in GPU_NODES):
        raise UserError(f"device '{name}' is not there (this machine has no GPU driver); leave it out, or use cpu")


def find_model(args: argparse.Namespace) -> Path:
    """The folder of `--model`; `--base` becomes its folder. Raises UserError where there is none."""
    if args.base is not None:
        args.base = resolve(args.base)
    return resolve(args.model)
