"""Batches for training: in a fixed order, prepared ahead, with unreadable samples replaced and counted.

What batch number k holds depends on the seed and on k alone, not on workers or on where a run was resumed, so the
state of the data is the number of the next step and the `Tally`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minillava.config import ModelConfig, UserError
from minillava.data import IGNORE, Batch, Example, Sample, SampleError, count_tokens, encode_sample, pack
from minillava.packing import Order
from minillava.tokenizer import Tokenizer

MAX_LOST = 0.01  # share of the samples that may be unusable
EARLY_LOST, EARLY_COUNT = 0.02, 20  # share of the draws that stops a run sooner, once so many samples are lost: at a
# true 1 % that is 3.7 standard deviations away, while a disk that fails is found after a few batches
MAX_TRIES = 10  # replacements for one sample; so many bad ones in a row mean that the disk is gone


class Dataset:
    """Samples as examples. One that cannot be used is replaced by another of its modality, chosen by seed."""

    def __init__(
        self, samples: Sequence[Sample], config: ModelConfig, tokenizer: Tokenizer, max_tokens: int, seed: int = 0
    ):
        self.samples, self.config, self.tokenizer = samples, config, tokenizer
        self.max_tokens, self.seed = max_tokens, seed
        self.lengths: np.ndarray | None = None  # of all samples in tokens, where `measure` has been called
        self._modalities: dict[bool, list[int]] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        """The sample itself; raises SampleError where it cannot be used."""
        return encode_sample(self.samples[index], self.config, self.tokenizer, self.max_tokens)

    def draw(self, index: int, epoch: int) -> tuple[Example, list[tuple[int, str]]]:
        """The sample or its stand-in, and (index, why) of those that could not be used.

        Raises UserError after MAX_TRIES unusable samples in a row.
        """
        lost: list[tuple[int, str]] = []
        dice: random.Random | None = None
        for _ in range(MAX_TRIES):
            try:
                return self[index], lost
            except SampleError as error:
                lost.append((index, str(error)))
            dice = dice or random.Random(f"{self.seed} {epoch} {index}")
            index = self._stand_in(index, dice)
        raise UserError(f"{MAX_TRIES} unusable samples in a row, the last: {lost[-1][1]}")

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        """The samples or their stand-ins as packed rows; `epoch` is part of the dice. Raises as `draw` does."""
        examples, lost = [], []
        for index in indices:
            example, failures = self.draw(index, epoch)
            examples.append(example)
            lost += failures
        batch = pack(examples)
        batch.lost, batch.epoch = tuple(lost), epoch
        return batch

    def _stand_in(self, index: int, dice: random.Random) -> int:
        """Another sample of its modality; in a packed row none that is longer, if there is one."""
        has_images = _seen(self.samples[index])
        if has_images not in self._modalities:
            self._modalities[has_images] = [i for i, s in enumerate(self.samples) if _seen(s) == has_images]
        peers = self._modalities[has_images]
        if self.lengths is not None:
            others = np.array([i for i in peers if self.usable[i] and i != index], dtype=int)
            if len(others):
                limit = max(self.lengths[index], self.lengths[others].min())
                peers = others[self.lengths[others] <= limit].tolist()
        return dice.choice(peers)

    def length(self, index: int) -> int:
        """Tokens of a sample after the cut, without its pixels; 0 if it cannot be used."""
        try:
            return min(count_tokens(self.samples[index], self.config, self.tokenizer), self.max_tokens)
        except SampleError:
            return 0

    def measure(self, workers: int, cache: Path) -> np.ndarray:
        """All samples' lengths, from `cache` if it has them, else counted by so many processes and written there."""
        lengths = np.load(cache) if cache.is_file() else np.empty(0)
        if len(lengths) != len(self):
            many = torch.utils.data.DataLoader
            chunks: Any = many(_Lengths(self), 1000, num_workers=workers, collate_fn=list, worker_init_fn=_quiet)  # type: ignore[arg-type]
            lengths = np.array([length for chunk in chunks for length in chunk])
            cache.parent.mkdir(parents=True, exist_ok=True)
            partial = cache.with_name(f".{os.getpid()}.{cache.name}")
            np.save(partial, lengths)
            partial.rename(cache)
        self.usable = lengths > 0
        self.lengths = lengths.copy()
        has_images = np.array([_seen(sample) for sample in self.samples])
        for kind in (has_images, ~has_images):  # an unusable sample keeps a place for its stand-in
            typical = np.median(lengths[kind & self.usable]) if (kind & self.usable).any() else 1
            self.lengths[kind & ~self.usable] = int(typical)
        return self.lengths


def _seen(sample: Sample) -> bool:
    """Whether there is something to look at in a sample."""
    return bool(sample.images or sample.videos)


@dataclass
class _Lengths:
    """The length of a sample at its index, for processes."""

    dataset: Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> int:
        return self.dataset.length(index)


@dataclass
class Tally:
    """What the data cost so far. Part of a run's checkpoint."""

    count: int  # samples in the data
    drawn: int = 0
    lost_draws: int = 0
    lost: dict[int, str] = field(default_factory=dict)  # index -> why, each sample once
    cut_rows: int = 0
    cut_tokens: int = 0

    def add(self, batch: Batch) -> None:
        """Raises UserError once over 1 % of the samples were lost (one always may be), or EARLY_LOST of the draws."""
        self.drawn += len(batch.cu_seqlens) - 1 + len(batch.lost)
        self.lost_draws += len(batch.lost)
        self.lost.update(batch.lost)
        self.cut_rows += batch.cut_rows
        self.cut_tokens += batch.cut_tokens
        of_data = len(self.lost) > max(1, MAX_LOST * self.count)
        of_draws = len(self.lost) >= EARLY_COUNT and self.lost_draws > EARLY_LOST * self.drawn
        if batch.lost and (of_data or of_draws):
            raise UserError(
                f"{batch.lost[-1][1]} (so far {len(self.lost)} of {self.count} samples could not be used, in "
                f"{self.lost_draws} of {self.drawn} draws: more than {MAX_LOST:.0%}, so the run stops)"
            )

    def __str__(self) -> str:
        return (
            f"{self.drawn:,} samples drawn, {len(self.lost):,} different ones unusable and replaced, "
            f"{self.cut_rows:,} cut (by {self.cut_tokens:,} tokens)"
        )

    def state(self) -> dict[str, Any]:
        """The counts as JSON, for a checkpoint."""
        return {**vars(self), "lost": {str(index): why for index, why in self.lost.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        vars(self).update(state)
        self.lost = {int(index): why for index, why in state["lost"].items()}


def background_thread() -> ThreadPoolExecutor:
    """One thread in which PyTorch starts no threads of its own.

    OpenMP counts those of all its teams; once they outnumber the cores, none waits awake for the next operation, and
    the small ones of the main thread take twice as long (Muon's step on two cores: 35 ms, with a second team 75).
    """

    def alone() -> None:
        torch.get_num_threads()  # the first question in a thread sets its number to that of the process
        torch.set_num_threads(1)

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=alone)
    pool.submit(int).result()
    torch.set_num_threads(threads)  # a count for each thread in OpenMP, but one for all in MKL
    return pool


class Loader:
    """Iterates over the batches of steps start to stop (exclusive), prepared ahead of their use.

    `workers` = 0 prepares them in one thread of this process: best on few cores and for small images, and nothing is
    copied. With more, that many processes do. With `ahead` = 0 each is made when it is asked for. The batches are the
    same.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        start: int,
        stop: int,
        workers: int = 0,
        ahead: int = 2,
        pin: bool = False,
        tally: Tally | None = None,
    ):
        self.dataset, self.order, self.start, self.stop = dataset, order, start, stop
        self.workers, self.ahead, self.pin = workers, ahead, pin
        self.tally = tally or Tally(len(dataset))

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Batch]:
        if self.workers:
            batches = self._from_processes()
        else:
            batches = self._from_thread() if self.ahead else (self[step] for step in range(self.start, self.stop))
        with contextlib.closing(batches):
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                self.tally.add(batch)
                yield batch

    def __getitem__(self, step: int) -> Batch | UserError:
        """Batch number `step`. An error is a value here: torch would wrap a raised one into a page of traceback."""
        try:
            rows = self.order.rows(step)
            batch = self.dataset.batch([index for row in rows for index in row], self.order.position(step)[0])
        except UserError as error:
            return error
        batch.rows = len(rows)
        return batch

    def _from_thread(self) -> Generator[Batch | UserError, None, None]:
        pool = background_thread()
        pending: deque[Future[Batch | UserError]] = deque()
        steps = iter(range(self.start, self.stop))
        try:
            while True:
                for step in itertools.islice(steps, 1 + self.ahead - len(pending)):
                    pending.append(pool.submit(self.__getitem__, step))
                if not pending:
                    return
                batch = pending.popleft().result()
                yield batch.pin_memory() if self.pin and isinstance(batch, Batch) else batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _from_processes(self) -> Generator[Batch | UserError, None, None]:
        loader: Any = torch.utils.data.DataLoader(
            self,  # type: ignore[arg-type]  # a map from steps to batches
            batch_size=None,
            sampler=range(self.start, self.stop),
            num_workers=self.workers,
            prefetch_factor=self.ahead,
            pin_memory=self.pin,
            worker_init_fn=_quiet,
        )
        yield from loader


def _quiet(worker: int) -> None:
    """Ctrl-C is for the main process, which then stops the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass
class Survey:
    """What was found in some samples, spread over the data."""

    failures: list[str] = field(default_factory=list)  # why a sample cannot be used, "nothing to learn" among it
    sources: dict[str, Counter[str]] = field(default_factory=dict)  # by file: samples, tokens, trained, cut, pictures
    learned: str = ""  # the trained text of one of them

    def total(self, what: str) -> int:
        """Of all files together."""
        return sum(counts[what] for counts in self.sources.values())


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices, or all, at equal distances."""
    return [i * count // min(count, wanted) for i in range(min(count, wanted))]


def survey(dataset: Dataset, wanted: int) -> Survey:
    """Encode `wanted` samples, spread over the data, and count what is in them by file."""
    found = Survey()
    for index in spread(len(dataset), wanted):
        sample = dataset.samples[index]
        try:
            example = dataset[index]
        except SampleError as error:
            found.failures.append(str(error))
            continue
        learned = [label for label in example.labels if label != IGNORE]
        counts = found.sources.setdefault(sample.source, Counter())
        counts.update(samples=1, tokens=len(example.ids), trained=len(learned), cut=bool(example.cut))
        counts.update(pictures=len(example.spans), visual=sum(span.tokens for span in example.spans))
        found.learned = found.learned or dataset.tokenizer.decode(learned, skip_special=False)
    return found


def check_supervision(dataset: Dataset, count: int = 200) -> str:
    """Encode up to `count` samples spread over the data before a run starts, and say what would be learned.

    Returns a line with the share of supervised tokens and the supervised text of one sample. Raises UserError if more
    than one in 200 has no supervised token, or if none can be used.
    """
    found = survey(dataset, count)
    good, failures = found.total("samples"), found.failures
    tried = good + len(failures)
    if len(failures) * 200 > tried:
        raise UserError(f"{len(failures)} of {tried} samples tried cannot be used, the first: {failures[0]}")
    cut = f", {found.total('cut')} are cut" if found.total("cut") else ""
    return (
        f"{found.total('trained'):,} of {found.total('tokens'):,} tokens of {tried} samples are supervised{cut}, "
        f"such as {found.learned!r}"
    )
