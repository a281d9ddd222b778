"""Bad inputs to every command, as tables: what is typed, in which files, and what the one line about it must name.

    python tests/bad_inputs.py [WORD ...]    # all of them, or those whose name has these words; status 1 if any fails

Each must end within 30 s, with exit status 2 and one line that names the thing and the remedy, and without a traceback.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bad import checkpoints, flags, others, shown, training
from bad.contents import PICTURES, Case, write

from minillava.cli import main

LIMIT_S = 30
LONGEST = 700  # characters of a line that someone will read
REMEDY = re.compile(r"; |did you mean|\(known: |\(supported: |expected|not in [\[(]")
SHAPELESS = re.compile(r"^error: [\s:;,]|: :|::|Traceback|<class|object at 0x|\\x1b|[A-Za-z0-9+/]{200}")
PYTHON = re.compile(
    r"\b(NoneType|None|tuple|dict|bool|ndarray|codec|Errno \d+|\w+Error|expected (int|str|float|list)|got [a-z]+ \|)\b"
)


class TooLongError(Exception):
    """LIMIT_S are over."""


def _too_long(*_: Any) -> None:
    raise TooLongError


def run(case: Case) -> str:
    """What is wrong with how this input is refused, or nothing."""
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    # Some libraries catch what is raised in them; it comes again.
    signal.signal(signal.SIGALRM, _too_long)
    with tempfile.TemporaryDirectory() as folder:
        for path, content in case.files.items():
            write(Path(folder, path), content)
        os.chdir(folder)
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S, 5)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main(case.words)
        except TooLongError:
            return f"still at work after {LIMIT_S} s"
        except (Exception, SystemExit) as error:  # noqa: BLE001 - which is what is looked for
            at = error.__traceback__
            while at is not None and at.tb_next is not None:
                at = at.tb_next
            where = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}" if at else ""
            return f"{type(error).__name__}: {error} ({where})"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.chdir(before)
    if status != 2:
        return f"exit status {status}: {err.getvalue()[-200:]!r} {out.getvalue()[-100:]!r}"
    lines = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
    return judge(lines[-1], case.names) if len(lines) == 1 else f"{len(lines)} lines: {err.getvalue()!r:.300}"


def run_rows() -> dict[str, str]:
    """What is wrong with how each row of `shown.ASKED` is refused, by name: nothing, where nothing is."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for name in ("text.jpg", "cut.png"):
            write(Path(folder, name), PICTURES[name])
        rows, out = Path(folder, "rows.jsonl"), Path(folder, "out.jsonl")
        write(rows, "".join(json.dumps(row) + "\n" for row in shown.ASKED.values()))
        with contextlib.redirect_stderr(io.StringIO()):
            status = main(["jobs", str(rows), str(out), "--images", folder, "--slots", "2", "--max-new-tokens", "2"])
        errors = [json.loads(line).get("error") for line in out.read_text().splitlines()]
    assert status == 1 and len(errors) == len(shown.ASKED), status
    texts = [error["message"] if isinstance(error, dict) else error for error in errors]
    return {
        f"row asked: {name}": judge(f"error: {text}", ()) if text else "answered"
        for name, text in zip(shown.ASKED, texts)
    }


def judge(line: str, names: Iterable[str]) -> str:
    """What the line about a bad input lacks, or nothing."""
    wrong = [f"does not name {name!r}" for name in names if not re.search(name, line)]
    wrong += [] if REMEDY.search(line) else ["no remedy"]
    wrong += [f"holds {found[0]!r}" for found in (SHAPELESS.search(line), PYTHON.search(line)) if found]
    wrong += [f"{len(line)} characters"] if len(line) > LONGEST else []
    return f"{', '.join(wrong)}: {line[:600]}" if wrong else ""


GROUPS = (flags.flags, shown.shown, checkpoints.checkpoints, training.recipes, training.data, others.others)


def cases() -> list[Case]:
    return [case for group in GROUPS for case in group()]


def script(*words: str) -> int:
    """Run those whose name has these words; prints what is wrong, and counts."""
    chosen = [case for case in cases() if all(word in case.name for word in words)]
    begun, wrong, slow = time.monotonic(), 0, collections.Counter[str]()
    for case in chosen:
        began = time.monotonic()
        message = run(case)
        slow[case.name] = int(1000 * (time.monotonic() - began))
        if message:
            wrong += 1
            print(f"{case.name}\n    {message}", flush=True)
    rows = {name: message for name, message in run_rows().items() if all(word in name for word in words)}
    for name, message in rows.items():
        if message:
            wrong += 1
            print(f"{name}\n    {message}", flush=True)
    print(
        f"{len(chosen) + len(rows)} bad inputs, {wrong} not refused as they should be, {time.monotonic() - begun:.0f} s"
    )
    print("slowest:", ", ".join(f"{name} {ms} ms" for name, ms in slow.most_common(5)))
    return 1 if wrong or not (chosen or rows) else 0


if __name__ == "__main__":
    sys.exit(script(*sys.argv[1:]))
