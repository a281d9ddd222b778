"""Write a model for llama.cpp (llama-server, Ollama, LM Studio): its decoder as one GGUF file, its tower as another.

Without --model: the one that ships. What llama.cpp does otherwise than minillava is printed first."""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

from minillava.cli.model import add_model, find_model
from minillava.errors import UserError

FORMS = ("F16", "Q8_0", "Q4_0")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Which model, where to, and in how many bits."""
    add_model(p)
    p.add_argument("--gguf", required=True, metavar="DIR", help="folder for the two files")
    p.add_argument("--name", metavar="NAME", help="of the files (default: the last part of --model)")
    p.add_argument(
        "--type", default="F16", choices=FORMS,
        help="of the decoder's matrices (default: F16); the first and last stay Q8_0 with Q4_0, the tower F16",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Say what is different there, write, and name the files."""
    if find_spec("gguf") is None:
        raise UserError("GGUF files need the package gguf; pip install minillava[gguf]")
    source = find_model(args)
    from minillava.checkpoints import gguf
    from minillava.checkpoints.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(source, args.base)
    gguf.check(checkpoint.config)
    tokenizer = checkpoint.tokenizer()
    for line in gguf.differences(checkpoint.config, tokenizer):
        print(f"llama.cpp: {line}", flush=True)
    name = args.name or Path(os.path.abspath(args.model)).name
    files = gguf.export(checkpoint.load(), tokenizer, Path(args.gguf), name, args.type)
    print(f"llama-server --jinja -m {files[0]} --mmproj {files[1]}")
