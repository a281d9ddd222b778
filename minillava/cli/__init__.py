"""The command line: `minillava COMMAND`, and the scripts at the top of the tree.

A command is a module of this folder with `add_arguments(parser)` and `run(args)`, and a line in COMMANDS. It imports
torch, which takes seconds, only in `run` and after everything that can be refused without it: --help and mistakes are
answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from minillava import __version__
from minillava.cli import threads
from minillava.errors import UserError, nearest
from minillava.files import check_null, refused

COMMANDS = {  # module of this folder -> what it does
    "ask": "answer a question about pictures and videos; with no arguments, about a drawn scene",
    "chat": "a conversation about pictures and videos, one question a line",
    "serve": "OpenAI's API and a page over HTTP, many clients at once",
    "jobs": "answer a file of questions, one JSON a line",
    "train": "train by a recipe, in stages; with no arguments, recipe nano in minutes",
    "convert": "VQAv2, GQA, RefCOCO and other public data sets as conversations to train on",
    "instruct": "make instruction data from captions and boxes, or preferences between answers",
    "export": "for llama.cpp, as GGUF files",
    "evaluate": "score answers by a benchmark's own rules, beside published numbers",
    "inspect": "what a checkpoint is, and whether it loads",
    "plan": "memory by part and time of a recipe's step or of an answer, before anything is loaded",
    "verify": "whether it computes what it should here, stage by stage",
}


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): is ", r"\1 is ", message)  # of cli.values
        raise UserError(f"{message}; see --help")

    def parse_args(self, *given: Any, **more: Any) -> Any:
        """Refuses empty texts too, which a shell makes of a variable that is not set, and bytes that end a path."""
        found = super().parse_args(*given, **more)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            name = action.option_strings[0] if action.option_strings else action.metavar or action.dest
            for text in map(str, value if isinstance(value, list) else [value]):
                if not text and action.default != value:
                    raise UserError(f"{name} is empty; give a value, or leave it out")
                check_null(text, name)
        return found

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file, flush=True)  # argparse hides that a pipe is closed


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of `minillava COMMAND ...`."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    return run_command(name, rest) if name in COMMANDS else _status(lambda: _overview(name))


def _overview(name: str) -> None:
    if name in ("-h", "--help"):
        print("usage: minillava COMMAND ...\n\nLLaVA from the command line.\n")
        print("\n".join(f"  {name:9} {does}" for name, does in COMMANDS.items()))
        print("\n`minillava COMMAND --help` lists the options of one.")
    elif name == "--version":
        print(f"minillava {__version__}")
    else:
        raise UserError(f"minillava has no command '{name}'{nearest(name, COMMANDS)}; see --help")


def run_command(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Exit status of one command."""
    command = import_module(f"minillava.cli.{name}")
    parser = Parser(
        prog=prog or f"minillava {name}", description=command.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    command.add_arguments(parser)

    def work() -> int | None:
        arguments = parser.parse_args(argv)
        threads.prepare(threads.TRAINING if name == "train" else threads.SPINS)
        return command.run(arguments)

    return _status(work, getattr(command, "INTERRUPTED", "interrupted"))


def _status(work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """What `work` returns; after bad input, or what the system refuses, 2 and a line on stderr; 130 after Ctrl-C."""
    _prepare_streams()
    try:
        status = work()
        sys.stdout.flush()  # here, where a closed pipe is caught
    except UserError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # whoever read the answers has gone, as `head` does
        _to_nowhere()
        return 141  # as a shell reports SIGPIPE
    except OSError as error:
        if error.filename is None:
            _to_nowhere()
        return _refuse(refused(error))
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130  # as a shell reports SIGINT
    return status or 0


def _refuse(line: str) -> int:
    with contextlib.suppress(OSError):  # stderr may be full too
        print(f"error: {' '.join(line.split())}", file=sys.stderr)
    return 2


def _prepare_streams() -> None:
    """Streams that the caller has closed lead nowhere; what cannot be decoded or shown does not end the program."""
    for name, mode, errors in (
        ("stdin", "r", "surrogateescape"), ("stdout", "w", "backslashreplace"), ("stderr", "w", "backslashreplace")
    ):  # fmt: skip
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _to_nowhere() -> None:
    """Drop what cannot be written, which the interpreter would try again at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
