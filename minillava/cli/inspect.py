"""What a checkpoint is: its parts, its settings, whether it loads, and tensors that would not be used."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One checkpoint."""
    parser.add_argument("model", metavar="DIR|HUB_ID", help="a checkpoint, a part of one, or adapters")


def run(args: argparse.Namespace) -> None:
    """Print what is found, a line each."""
    from minillava.checkpoints.hub import resolve

    folder = resolve(args.model)
    from minillava.checkpoints.checkpoint import Checkpoint  # behind the look for the folder: it imports torch

    for line in Checkpoint(folder).describe():
        print(line)
