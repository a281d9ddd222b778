"""What a run shows: one line that moves, a JSON line a step, and the curves as a picture at the end."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minillava.errors import UserError
from minillava.files import named, write_whole
from minillava.training import parallel


class TensorBoard:
    """Curves for TensorBoard, each stage a run; what a stage wrote behind the step it starts again from is purged."""

    def __init__(self, folder: Path):
        self.folder = folder / "tensorboard"
        self.writers: dict[str, Any] = {}

    def write(self, stage: str, step: int, numbers: dict[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if stage not in self.writers:
            self.writers[stage] = SummaryWriter(str(self.folder / stage), purge_step=step)
        for name, value in numbers.items():
            self.writers[stage].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class WandB:
    """Curves for Weights & Biases; a run that is resumed goes on in the same one."""

    def __init__(self, folder: Path):
        import wandb

        known = folder / "wandb-id"
        if not known.exists():
            known.write_text(uuid.uuid4().hex)
        settings = {"name": folder.name, "id": known.read_text(), "dir": str(folder), "resume": "allow"}
        self.run: Any = wandb.init(project="minillava", **settings)
        self.stages: set[str] = set()

    def write(self, stage: str, step: int, numbers: dict[str, float]) -> None:
        if stage not in self.stages:
            self.stages.add(stage)
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in numbers.items()}})

    def close(self) -> None:
        self.run.finish()


SINKS = {"tensorboard": TensorBoard, "wandb": WandB}


class Log:
    """log.jsonl of a run: a line for every step and every evaluation, each with its stage and step.

    `sinks` (names of SINKS) get the same. Raises UserError where the package of one is missing.
    """

    def __init__(self, path: Path, sinks: Sequence[str] = ()):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file = path.open("a", encoding="utf-8", buffering=1)
        for name in sinks:
            if importlib.util.find_spec(name) is None:
                raise UserError(f"sinks: {name} is not installed; pip install {name}, or leave it out")
        self.sinks: list[Any] = [SINKS[name](path.parent) for name in sinks]

    def write(self, stage: str, step: int, **values: Any) -> None:
        """A line of the log, and its numbers for the sinks."""
        with named(self.path):
            self.file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        numbers = dict(_numbers("", values)) if self.sinks else {}
        for sink in self.sinks:
            sink.write(stage, step, numbers)

    def sync(self) -> None:
        """Have the disk take every line, before a checkpoint says that its steps are done."""
        os.fsync(self.file.fileno())

    def rewind(self, stage: str, step: int, last: int) -> None:
        """Forget what a run will write again: all behind its last checkpoint, and the evaluation after `last`."""

        def again(row: dict[str, Any]) -> bool:
            return row["stage"] == stage and (row["step"] > step or (row["step"] == last and "eval" in row))

        kept = [row for row in read_log(self.path) if not again(row)]
        self.file.close()
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = self.path.open("a", encoding="utf-8", buffering=1)

    def close(self) -> None:
        with named(self.path):
            self.file.close()
        for sink in self.sinks:
            sink.close()


def _numbers(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """All numbers of a line by path: lr/projector."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(f"{prefix}{name}/", value)
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; the last one may have been cut off by a kill and is then left out."""
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line else None
            if row is not None:
                rows.append(row | {"stage": str(row["stage"]), "step": int(row["step"])})
        except (ValueError, RecursionError, TypeError, LookupError):
            if number < len(lines):
                raise UserError(f"{path}: line {number} is no row of a log; remove the line") from None
    return rows


class Bar:
    """The moving line: loss, supervised tokens a second, share of time spent waiting for data, time left."""

    def __init__(self, stage: str, start: int, steps: int):
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            desc=stage, initial=start, total=steps, unit="step", dynamic_ncols=True,
            mininterval=0.2 if terminal else 30, file=sys.stderr, smoothing=0.05, disable=not parallel.is_main(),
        )  # fmt: skip
        self.recent: deque[tuple[float, int, float, float]] = deque(maxlen=50)  # steps that the shown means are of

    def step(self, loss: float, tokens: int, data_s: float, step_s: float, skipped: int) -> None:
        """One step is done: `tokens` are the supervised ones."""
        self.recent.append((loss, tokens, data_s, step_s))
        losses, counts, waits, times = zip(*self.recent)
        rate, waiting = sum(counts) / sum(times), sum(waits) / sum(times)
        text = f"loss {sum(losses) / len(losses):.4f}, {rate:,.0f} supervised tok/s, data {waiting:.0%}"
        self.bar.set_postfix_str(text + (f", {skipped} skipped" if skipped else ""), refresh=False)
        self.bar.update()

    def note(self, text: str) -> None:
        if not self.bar.disable:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def plot(log: Path, picture: Path) -> str:
    """Draw the loss of every stage, and what its evaluations measured, into one PNG; returns a line that says where."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"no {picture.name}, which needs matplotlib: pip install 'minillava[plots]'"

    rows = read_log(log)
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    if not stages:
        return f"no {picture.name}, as nothing was logged"
    width = 5 * len(stages)
    figure = Figure(figsize=(width, 3.6))
    # A layout that is found by drawing takes seconds.
    figure.subplots_adjust(0.6 / width, 0.14, 1 - 0.6 / width, 0.9, wspace=0.3)
    FigureCanvasAgg(figure)
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages):
        steps = [row for row in rows if row["stage"] == stage and "loss" in row]
        losses = [math.nan if row["loss"] is None else row["loss"] for row in steps]  # null where not finite
        axes.plot([row["step"] for row in steps], losses, color="0.8", linewidth=0.8)
        axes.plot([row["step"] for row in steps], _smooth(losses), color="C0", linewidth=1.5, label="loss")
        evaluations = [row for row in rows if row["stage"] == stage and "eval" in row]
        names = list(dict.fromkeys(name for row in evaluations for name in row["eval"]))
        right = axes.twinx() if any("loss" not in name for name in names) else axes  # shares have a scale of their own
        for number, name in enumerate(names[:9], 1):
            points = [(row["step"], row["eval"][name]) for row in evaluations if name in row["eval"]]
            side = axes if "loss" in name else right
            axes.plot([], [], marker="o", markersize=3, linewidth=1, color=f"C{number}", label=name)
            side.plot(*zip(*points), marker="o", markersize=3, linewidth=1, color=f"C{number}")
        if right is not axes:
            right.set_ylim(bottom=0)
        axes.set(title=stage, xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    with named(picture):
        figure.savefig(picture, dpi=120)
    return f"curves: {picture}"


def _smooth(values: list[float]) -> list[float]:
    """Exponential mean over a twentieth of the steps, at most 20, corrected for its start; non-finite ones left out."""
    weight = 1 - 1 / max(1, min(20, len(values) / 20))
    mean, total, result = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        result.append(mean / total if total else math.nan)
    return result
