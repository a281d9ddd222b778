"""A data set: samples become examples when they are asked for, and one that cannot be used is replaced by another."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minillava.chat.tokenizer import Tokenizer
from minillava.config import IGNORE, ModelConfig
from minillava.data.batch import Batch, pack
from minillava.data.llava_json import Sample
from minillava.data.table import with_media
from minillava.errors import UserError
from minillava.media.visual import Visual
from minillava.processor import Example, MediaError, Processor

MAX_TRIES = 10  # replacements for one sample; so many bad ones in a row mean that the disk is gone


class SampleError(UserError):
    """One sample cannot be used: training replaces it and counts it (`Dataset.draw`); elsewhere it is a UserError."""


class Dataset:
    """Samples as examples. One that cannot be used is replaced by another of its kind, chosen by seed."""

    def __init__(
        self, samples: Sequence[Sample], config: ModelConfig, tokenizer: Tokenizer, max_tokens: int, seed: int = 0
    ):
        self.samples, self.config, self.tokenizer = samples, config, tokenizer
        self.processor = Processor(config, tokenizer)
        self.max_tokens, self.seed = max_tokens, seed
        self.lengths: np.ndarray | None = None  # of all samples in tokens, where `measure` has been called
        self._peers: dict[bool, np.ndarray] = {}  # samples with media, and those of text alone

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        """The sample itself; raises SampleError where it cannot be used."""
        return encode_sample(self.sample(index), self.processor, self.max_tokens)

    def sample(self, index: int) -> Sample:
        """Read from where it is: what cannot be read any more costs this sample only."""
        try:
            return self.samples[index]
        except UserError as error:
            raise SampleError(str(error)) from None

    def draw(self, index: int, epoch: int) -> tuple[Example, list[tuple[int, str]]]:
        """The sample, or one in its place, and (index, why) of those that could not be used.

        Raises UserError after MAX_TRIES unusable samples in a row.
        """
        lost: list[tuple[int, str]] = []
        rng = random.Random(f"{self.seed} {epoch} {index}")
        for _ in range(MAX_TRIES):
            try:
                return self[index], lost
            except SampleError as error:
                lost.append((index, str(error)))
            index = self._replacement(index, rng)
        raise UserError(f"{MAX_TRIES} unusable samples in a row, the last: {lost[-1][1]}")

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        """The samples, or those in their places (by `epoch`), as packed rows. Raises as `draw` does."""
        examples, lost = [], []
        for index in indices:
            example, failures = self.draw(index, epoch)
            examples.append(example)
            lost += failures
        batch = self.pack(examples)
        batch.lost = tuple(lost)
        return batch

    def pack(self, examples: Sequence[Any]) -> Batch:
        """What `self[index]` gave, as one batch."""
        return pack(examples)

    def _replacement(self, index: int, rng: random.Random) -> int:
        """Another sample with media, or without; in a packed row none that is longer, if there is one."""
        mask = with_media(self.samples)
        has_media = bool(mask[index])
        if has_media not in self._peers:
            self._peers[has_media] = np.flatnonzero(mask == has_media)
        peers = self._peers[has_media]
        if self.lengths is not None:
            others = peers[self.usable[peers] & (peers != index)]
            if len(others):
                limit = max(self.lengths[index], self.lengths[others].min())
                peers = others[self.lengths[others] <= limit]
        return int(rng.choice(peers))

    def length(self, index: int) -> int:
        """Tokens of a sample after the cut, without its pixels; 0 if it cannot be used."""
        try:
            return self.count(self.sample(index))
        except SampleError:
            return 0

    def count(self, sample: Sample) -> int:
        """Tokens of any sample after the cut. Raises SampleError."""
        with _named(sample):
            measured = self.processor(sample.written_for(self.config.chat), sample.media, measure=True)
            return min(len(measured.ids), self.max_tokens)

    def _lengths(self, indices: Sequence[int]) -> list[int]:
        return [self.length(index) for index in indices]

    def measure(self, workers: int, cache: Path) -> np.ndarray:
        """All samples' lengths, from `cache` if it has them, else counted by so many processes and written there."""
        lengths = np.load(cache) if cache.is_file() else np.empty(0)
        if len(lengths) != len(self):
            numbers: Any = range(len(self))
            chunks = torch.utils.data.DataLoader(
                numbers, 1000, num_workers=workers, collate_fn=self._lengths, worker_init_fn=ignore_interrupts
            )
            lengths = np.array([length for chunk in chunks for length in chunk])
            cache.parent.mkdir(parents=True, exist_ok=True)
            partial = cache.with_name(f".{os.getpid()}.{cache.name}")
            np.save(partial, lengths)
            partial.rename(cache)
        self.usable = lengths > 0
        self.lengths = lengths.copy()
        has_media = with_media(self.samples)
        for kind in (has_media, ~has_media):  # an unusable sample keeps room for the one in its place
            typical = np.median(lengths[kind & self.usable]) if (kind & self.usable).any() else 1
            self.lengths[kind & ~self.usable] = int(typical)
        return self.lengths


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C is for the main process, which then stops the workers: what each of them calls first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def encode_sample(
    sample: Sample, processor: Processor, max_tokens: int, opened: dict[object, Visual] | None = None
) -> Example:
    """The sample as numbers, cut to max_tokens; `opened` keeps its pictures, for another sample to share.

    Raises SampleError if a picture or clip cannot be read or no supervised token is left.
    """
    with _named(sample):
        messages = sample.written_for(processor.config.chat)
        example = processor(messages, sample.media, generate=False, max_tokens=max_tokens, opened=opened)
    if example.labels.count(IGNORE) == len(example.labels):
        why = f"cut from {len(example.ids) + example.cut} to {max_tokens} tokens it " if example.cut else ""
        raise SampleError(f"{sample.name}: {why}has no token to learn; raise max_tokens or remove the sample")
    return example


@contextlib.contextmanager
def _named(sample: Sample) -> Iterator[None]:
    """Errors that name the sample; an unreadable picture or clip costs this sample only."""
    try:
        yield
    except MediaError as error:
        raise SampleError(f"{sample.name}: {error}") from None
    except UserError as error:
        raise UserError(f"{sample.name}: {error}") from None
