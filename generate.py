"""Ask a LLaVA about pictures: `minillava ask`, from a checkout that need not be installed."""

import sys

from minillava.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("ask", prog="generate.py"))
