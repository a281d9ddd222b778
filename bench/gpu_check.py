"""python bench/gpu_check.py: every test and bench of this machine in one command, results into bench/results/<device>/.

On a GPU: the report, all tests (their GPU rows included), the benches; in under nine minutes, as a step that would run
past the budget is cut and named. Without one it is the rehearsal: kernel tests and tiny sizes. With --training it is
training at 7B shapes instead, which fills a budget of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(command: list[str], seconds: float) -> str:
    """Run a step from the repository's root; "ok", "failed" or "cut"."""
    print(f"--- {' '.join(command[1:])}", flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return "cut"
    return "failed" if done.returncode else "ok"


def main(arguments: list[str] | None = None) -> int:
    sys.path.insert(0, str(ROOT))
    import torch

    from bench import machine

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=Path, default=machine.folder(device))
    parser.add_argument("--seconds", type=float, default=540.0, help="budget for everything")
    parser.add_argument("--tests", default="tests" if device == "cuda" else "tests/kernels", help="which tests")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--training", action="store_true", help="only bench.train_7b")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    if device == "cpu":
        print("no GPU: a rehearsal at tiny sizes", flush=True)
    python, started = sys.executable, time.perf_counter()
    # The report first: it is what a leased card is for, and the tests of the kernels follow it directly.
    report = [python, "-m", "bench.report", "--out", str(chosen.out), "--seconds", str(chosen.seconds * 0.4)]
    steps = {"report": report if device == "cuda" else [*report, "--no-compile", "--rounds", "3"]}
    bench = [python, "-m", "pytest", "bench", f"--benchmark-json={chosen.out}/pytest-benchmark.json", "-q"]
    if not chosen.skip_tests:
        steps["kernel tests"] = [python, "-m", "pytest", "-q", "tests/kernels"]
        if chosen.tests != "tests/kernels":
            steps["tests"] = [python, "-m", "pytest", "-q", chosen.tests, "--ignore=tests/kernels"]
    steps["benches"] = bench
    if chosen.training:
        budget = str(chosen.seconds - 30)
        steps = {"training": [python, "-m", "bench.train_7b", "--out", str(chosen.out), "--seconds", budget]}
    outcome = {}
    for name, command in steps.items():
        outcome[name] = run(command, chosen.seconds - (time.perf_counter() - started))
    took = time.perf_counter() - started
    lines = [f"{name}: {result}" for name, result in outcome.items()] + [f"{took:.0f} s of {chosen.seconds:.0f} s"]
    name = "gpu-check-training.txt" if chosen.training else "gpu-check.txt"
    (chosen.out / name).write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")
    return 0 if set(outcome.values()) == {"ok"} else 1


if __name__ == "__main__":
    raise SystemExit(main())
