"""Train a LLaVA: python train.py [RECIPE.toml]. With no arguments, recipe nano on the built-in world, in minutes.

A recipe (recipes/*.toml) holds the model and its stages; minillava/recipe.py explains every key.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from minillava.config import UserError

NANO = Path(__file__).resolve().parent / "recipes" / "nano.toml"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", type=Path, default=NANO, help="a TOML file (default: recipes/nano.toml)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="change one value of the recipe, as often as needed: --set seed=1\n"
        "--set stage.finetune.lr.projector=1e-3 --set 'stage.*.steps=100'",
    )  # fmt: skip
    parser.add_argument("--stage", metavar="NAME", help="train this stage only, on what the earlier ones left in --out")
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on where the run in --out stopped")
    parser.add_argument(
        "--inspect", type=int, metavar="N", help="show N samples of each stage as they would be trained"
    )
    parser.add_argument(
        "--export", action="store_true",
        help="write the model of the newest checkpoint of the run in --out (or of --stage), also while it goes on",
    )  # fmt: skip
    args = parser.parse_args()

    from minillava.recipe import read_recipe

    try:
        recipe = read_recipe(args.recipe, args.set, args.out)
        # torch and all: seconds, so not before the recipe is known to be good
        from minillava import parallel
        from minillava.pipeline import export_newest, inspect_recipe, run_recipe

        if args.export:
            print(export_newest(recipe.folder, args.stage))
        elif args.inspect is not None:
            inspect_recipe(recipe, args.inspect, args.stage)
        else:
            run_recipe(recipe, args.resume, args.stage)
            parallel.leave()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; --resume continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
