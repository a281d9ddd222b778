"""Which samples a stage trains on and which it is evaluated on."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from minillava.data.llava_json import Check, Report
from minillava.data.survey import spread
from minillava.data.table import PLACE, Table, scan
from minillava.errors import UserError
from minillava.recipe import DataConfig, StageConfig

MAX_MORE = 0.1  # share of the samples that are left out beside those held out; more have a name that says nothing


def read_data(files: Sequence[DataConfig], seed: int = 0, check: Check | None = None) -> Table:
    """The samples of several files, with a line for each file.

    Raises a UserError about the first that is unusable, or once more than `max_bad` of a file are that skips them.
    """
    table = Table([], np.empty(0, PLACE))
    for file in files:
        found, report = scan(file.path, file.images or None, check, file.fetch, file.stream, seed)
        print(f"  {report}")
        refuse(file, report)
        chosen = choose(len(found), file.take, f"{seed} {file.path} {file.take}")
        if len(chosen) < len(found):
            print(f"    {len(chosen):,} of them are taken ({file.take})")
        place_N = found.place_N[np.array(chosen, dtype=np.int64)]
        place_N["source"] += len(table.sources)
        table = Table([*table.sources, *found.sources], np.concatenate([table.place_N, place_N]))
    return table


def refuse(file: DataConfig, report: Report) -> None:
    """Raises UserError where more samples cannot be used than the recipe allows; says how many are skipped."""
    bad = len(report.problems)
    if not bad:
        return
    total, more = bad + report.counts["samples"], f" ({bad - 1:,} more of {file.path} are wrong too)" if bad > 1 else ""
    if file.bad == "stop":
        raise UserError(report.problems[0] + more)
    if bad > file.max_bad * total:
        raise UserError(
            f"{report.problems[0]}{more}: {bad:,} of {total:,} cannot be used, more than max_bad {file.max_bad:g}"
        )
    print(f"    {bad:,} of {total:,} ({bad / total:.2%}) are skipped, the first: {report.problems[0]}")


def choose(count: int, which: str, seed: str) -> Sequence[int]:
    """all, first:N, end:N or random:N of so many, N a number or a percentage (rounded up); in their order."""
    kind, _, amount = which.partition(":")
    if kind == "all":
        return range(count)
    share = round(count * float(amount[:-1]) / 100, 6) if amount.endswith("%") else float(amount)
    number = min(math.ceil(share), count)
    if kind == "random":
        return sorted(random.Random(seed).sample(range(count), number))
    return range(number) if kind == "first" else range(count - number, count)


def split_data(stage: StageConfig, seed: int, check: Check | None = None) -> tuple[Table, Table]:
    """Samples to train on and samples to evaluate on. Raises UserError if any of them cannot be used.

    `eval_samples` are chosen by the names of their pictures: all stages over the same pictures hold out the same ones.
    """
    samples, held_out = read_data(stage.data, seed, check), read_data(stage.eval_data, seed, check)
    if stage.eval_samples and not len(held_out):
        if stage.eval_samples >= len(samples):
            raise UserError(
                f"stage '{stage.name}': eval_samples leaves nothing of {len(samples)} samples to train on; set fewer"
            )
        samples = samples[np.argsort(samples.place_N["order"], kind="stable")]
        order, cut = samples.place_N["order"], stage.eval_samples
        more = int(np.searchsorted(order, order[cut - 1], "right")) - cut  # with the name of the last that is held out
        if more > MAX_MORE * len(samples):
            print(f"    {more:,} samples about a picture of the same name as the last that is held out are trained on")
        elif more:
            print(f"    {more:,} more samples about the last pictures that are held out are left out of training")
            cut += more
        samples, held_out = samples[cut:], samples[:cut]
    # What is held out is chosen before turns are split: no picture is on both sides.
    if stage.split_turns:
        samples = samples.split_turns()
    if stage.eval_samples:
        held_out = held_out[np.array(spread(len(held_out), stage.eval_samples), dtype=np.int64)]  # of every file
    return samples, held_out
