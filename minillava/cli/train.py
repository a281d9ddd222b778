"""Train a LLaVA. With no arguments: recipe nano on the built-in world, in minutes.

A recipe (a TOML file) holds the model and its stages; minillava/recipe.py explains every key."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from pathlib import Path

import minillava
from minillava.cli.model import check_device
from minillava.cli.values import whole
from minillava.errors import UserError, nearest
from minillava.recipe import Recipe, differences, read_recipe, stage_index
from minillava.training.tasks import check_words

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
INTERRUPTED = "stopped; --resume continues from the last checkpoint"


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What to train, what to change of it, where it goes."""
    add = p.add_argument
    add("recipe", nargs="?", help=f"a TOML file, or one that ships (default: nano):\n{', '.join(sorted(packaged()))}")
    add(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="change one value of the recipe, as often as needed: --set seed=1\n"
        "--set stage.finetune.lr.projector=1e-3 --set 'stage.*.steps=100'",
    )  # fmt: skip
    add("--stage", metavar="NAME", help="train this stage only, on what the earlier ones left in --out")
    add("--out", metavar="DIR", help="the run's folder (default: runs/NAME)")
    resume = "go on where the run in --out stopped, by its own recipe; --set changes steps, rates and what is logged"
    add("--resume", action="store_true", help=resume)
    add("--inspect", type=whole(1), metavar="N", help="show N samples of each stage as they would be trained")
    export = "write the model of the newest checkpoint of the run in --out (or of --stage), also while it goes on"
    add("--export", action="store_true", help=export)


def packaged() -> dict[str, Path]:
    """The recipes that ship, by name: recipes/*.toml of the checkout or of the installed package."""
    return {path.stem: path for place in minillava.__path__ for path in Path(place, "recipes").glob("*.toml")}


def find_recipe(name: str) -> Path:
    """A file, or the recipe of this name that ships. Raises UserError that suggests the nearest."""
    path, shipped = Path(name), packaged()
    if path.is_file() or path.suffix == ".toml":
        return path
    if name not in shipped:
        raise UserError(f"{name}: no such recipe; give a TOML file, or one that ships{nearest(name, shipped)}")
    return shipped[name]


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that is asked for; of a run that goes on its own, whatever RECIPE says by now, with --set on top."""

    def asked() -> Recipe:
        return read_recipe(find_recipe(args.recipe or "nano"), args.set, args.out)

    if not args.resume:
        return asked()
    folder = Path(args.out) if args.out else asked().folder
    saved = folder / "recipe.toml"
    if not saved.is_file():
        return asked()
    own = read_recipe(saved, args.set, str(folder))
    other = differences(own, asked()) if args.recipe else {}
    if other and int(os.environ.get("RANK", 0)) == 0:
        shown = "; ".join(f"{key}: {values}" for key, values in other.items())
        print(f"{saved}: goes on as it was begun, not by {args.recipe} ({shown}); --set changes a value")
    return own


def run(args: argparse.Namespace) -> None:
    """Train, or show samples, or export what a run has so far."""
    recipe = _recipe(args)
    check_words(recipe)
    if args.stage is not None:
        stage_index(recipe, args.stage)
    if recipe.device != "auto":
        check_device(recipe.device)
    from minillava.training import parallel
    from minillava.training.pipeline import export_newest, inspect_recipe, run_recipe

    if args.export:
        print(export_newest(recipe.folder, args.stage))
    elif args.inspect is not None:
        inspect_recipe(recipe, args.inspect, args.stage)
    else:
        keep_freed_memory()
        run_recipe(recipe, args.resume, args.stage)
        parallel.leave()


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, blocks of up to 32 MiB; what the environment says stays.

    Given back to the system it comes again page by page: on a CPU 14 % of a step of nano's clip, 7 % of finetune's
    (bench/LOG.md).
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
