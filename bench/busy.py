"""python -m bench.busy: a step of recipe nano's last stage alone, and beside one and two busy processes, in turn.

Threads wait as `minillava train` has them wait, or as the environment says. JSON and a table go to
bench/results/<device>, as busy.json and busy.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

from minillava.cli import threads

BUSY = (0, 1, 2)


@contextlib.contextmanager
def beside(processes: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure(rounds: int, steps: int) -> dict[int, list[float]]:
    """Seconds of steps by the number of busy processes; the first step of each turn is dropped."""
    from bench.train import ours

    seconds: dict[int, list[float]] = {processes: [] for processes in BUSY}
    with tempfile.TemporaryDirectory() as scratch:
        _, turn = ours([f"stage.*.steps={rounds * steps * len(BUSY)}"], Path(scratch))
        for _ in range(rounds):
            for processes, found in seconds.items():
                with beside(processes):
                    found += [b - a for a, b in pairwise(turn(steps))]
    return seconds


def markdown(report: dict[str, Any]) -> str:
    from bench import machine

    waits = ", ".join(f"{name}={value}" for name, value in report["waits"].items()) or "as OpenMP waits"
    lines = [
        f"# A training step beside busy processes on {report['facts']['device']}, {report['facts']['threads']} threads",
        "",
        f"{machine.made_of(report['facts'])}; {waits}.",
        "",
        "| busy processes | ms a step (quartiles) | times the quiet step |",
        "|---|---|---|",
    ]
    quiet = report["steps"]["0"][1]
    for processes, (low, median, high) in report["steps"].items():
        ms = f"{1e3 * median:.0f} ({1e3 * low:.0f}-{1e3 * high:.0f})"
        lines.append(f"| {processes} | {ms} | {median / quiet:.2f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    threads.prepare(threads.TRAINING)
    from bench import machine

    parser = argparse.ArgumentParser(prog="python -m bench.busy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn, the first of which is dropped")
    machine.add_out(parser)
    chosen = parser.parse_args(arguments)
    steps = {str(processes): quantiles(found, n=4) for processes, found in measure(chosen.rounds, chosen.steps).items()}
    waits = {name: os.environ[name] for name in threads.WAITS if name in os.environ}
    report = {"facts": machine.facts("cpu"), "waits": waits, "steps": steps}
    out = machine.out(chosen, "cpu")
    (out / "busy.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "busy.md").write_text(markdown(report))
    print(markdown(report), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
