"""Train a LLaVA: `minillava train`, from a checkout that need not be installed; under torchrun too."""

import sys

from minillava.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("train", prog="train.py"))
