"""Which samples a stage trains on and which it is evaluated on."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Sequence
from pathlib import Path

from minillava.chat import Message
from minillava.config import UserError
from minillava.data import MARKER, Sample, scan
from minillava.loader import spread
from minillava.recipe import DataConfig, StageConfig


def read_data(files: Sequence[DataConfig], seed: int = 0) -> list[Sample]:
    """The samples of several files, with a line for each file. Raises a UserError about the first that is unusable."""
    samples: list[Sample] = []
    for file in files:
        found, report = scan(Path(file.path), Path(file.images) if file.images else None)
        print(f"  {report}")
        if report.problems:
            more = len(report.problems) - 1
            raise UserError(report.problems[0] + (f" ({more:,} more of {file.path} are wrong too)" if more else ""))
        taken = take(found, file.take, f"{seed} {file.path} {file.take}")
        if len(taken) < len(found):
            print(f"    {len(taken):,} of them are taken ({file.take})")
        samples += taken
    return samples


def take(samples: list[Sample], which: str, seed: str) -> list[Sample]:
    """all, first:N, end:N or random:N of the samples, N a number or a percentage (rounded up); in their order."""
    kind, _, amount = which.partition(":")
    if kind == "all":
        return samples
    share = round(len(samples) * float(amount[:-1]) / 100, 6) if amount.endswith("%") else float(amount)
    number = min(math.ceil(share), len(samples))
    if kind == "random":
        return [samples[i] for i in sorted(random.Random(seed).sample(range(len(samples)), number))]
    return samples[:number] if kind == "first" else samples[len(samples) - number :]


def split_data(stage: StageConfig, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on and samples to evaluate on. Raises UserError if any of them cannot be used.

    What `eval_samples` holds out is chosen by the names of a sample's pictures, so that all stages over the same
    pictures hold out the same ones.
    """
    samples, held_out = read_data(stage.data, seed), read_data(stage.eval_data, seed)
    if stage.eval_samples and not held_out:
        if stage.eval_samples >= len(samples):
            raise UserError(f"stage '{stage.name}': eval_samples leaves nothing of {len(samples)} samples to train on")

        def lot(sample: Sample) -> bytes:
            names = " ".join(ref.name for ref in sample.images) or sample.id
            return hashlib.sha256(f"{seed} {names}".encode()).digest()

        samples.sort(key=lot)
        samples, held_out = samples[stage.eval_samples :], samples[: stage.eval_samples]
    if stage.split_turns:
        samples = [turn for sample in samples for turn in turns_of(sample)]
    if stage.eval_samples:
        held_out = [held_out[i] for i in spread(len(held_out), stage.eval_samples)]  # of every file
    return samples, held_out


def turns_of(sample: Sample) -> list[Sample]:
    """Each turn of a conversation whose pictures stand in its first question as a sample of its own."""
    system = [m for m in sample.messages if m.role == "system"]
    turns = sample.messages[len(system) :]
    first = turns[0].text
    if sum(m.text.count(MARKER) for m in turns[1:]) or not sample.images:
        return [sample]
    head = "\n".join([MARKER] * first.count(MARKER))
    split = []
    for at in range(0, len(turns), 2):
        asked = turns[at] if at == 0 else Message("user", f"{head}\n{turns[at].text}")
        split.append(dataclasses.replace(sample, messages=(*system, asked, turns[at + 1])))
    return split
