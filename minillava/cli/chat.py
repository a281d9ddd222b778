"""A conversation about pictures and videos, one question a line; Ctrl-C stops an answer, Ctrl-D ends."""

from __future__ import annotations

import argparse

from minillava.cli import ask
from minillava.cli.ask import run as run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `ask`."""
    ask.add_arguments(parser)
    parser.set_defaults(chat=True)
