"""A public data set as conversations: VQAv2, OK-VQA, A-OKVQA, GQA, OCR-VQA, TextCaps, RefCOCO, VG, ShareGPT."""

from __future__ import annotations

import argparse
from pathlib import Path

from minillava.cli.values import whole


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Which files, and where the conversations go."""
    add = p.add_argument
    add("files", nargs="+", metavar="FILE", help="all files of one data set: questions and annotations")
    add("--out", required=True, metavar="FILE", help="JSON lines of LLaVA's format")
    add("--append", action="store_true", help="put them behind what is in --out: several sets, one file")
    add("--images", default="", metavar="PREFIX", help="in front of picture names: coco/train2017/")
    add("--turns", type=whole(1), default=10, help="at most so many questions about one picture (default: 10)")
    add("--seed", type=int, default=0, help="of what is by chance: boxes asked for, or given")


def run(args: argparse.Namespace) -> None:
    """Write, and print what was written, by source."""
    from minillava.data.convert import write_set

    counts = write_set(
        [Path(file) for file in args.files], Path(args.out), args.images, args.turns, args.seed, args.append
    )
    print(f"{args.out}: {', '.join(f'{count:,} {name}' for name, count in counts.items()) or 'nothing'}")
