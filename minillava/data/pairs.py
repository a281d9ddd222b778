"""Preferences as pairs of sequences: one prompt with its better and its worse answer, and its pictures once.

Letters: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minillava.config import IGNORE
from minillava.data.batch import Batch, pack
from minillava.data.dataset import Dataset, SampleError, encode_sample
from minillava.data.llava_json import Sample
from minillava.errors import UserError
from minillava.processor import Example, Processor


@dataclass(slots=True)
class Pair(Example):
    """The chosen conversation, and beside it the rejected one; only last answers are supervised."""

    rejected: Example | None = None
    start: tuple[float, float] | None = None  # what both answers' log-probabilities were before training, where known


@dataclass
class PairBatch(Batch):
    """Pairs packed end to end, each as two sequences, chosen and rejected; pixels are there once."""

    shown: tuple[int, ...] = ()  # which picture each run of placeholders shows
    pairs: int = 0  # sequences behind them teach nothing
    start_P2: Tensor | None = None  # what the answers' log-probabilities were before training, where known

    @property
    def samples(self) -> int:
        return self.pairs


class PairDataset(Dataset):
    """Preferences. A pair of which an answer is cut off cannot be used."""

    start_N2: np.ndarray | None = None  # log-probabilities before training, of all samples, chosen and rejected

    def __getitem__(self, index: int) -> Pair:
        sample = self.sample(index)
        pair = encode_pair(sample, self.processor, self.max_tokens)
        if self.start_N2 is not None:
            chosen, rejected = self.start_N2[index].tolist()
            if math.isnan(chosen + rejected):  # a disk that failed then, and now does not
                raise SampleError(f"{sample.name}: could not be used when the start's log-probabilities were cached")
            pair.start = (chosen, rejected)
        return pair

    def count(self, sample: Sample) -> int:
        return super().count(sample) + super().count(sample.worse)

    def pack(self, examples: Sequence[Pair]) -> PairBatch:
        rows: list[Example] = []
        shown: list[int] = []
        seen = 0
        for pair in examples:
            assert pair.rejected is not None
            rows += [pair, pair.rejected]
            shown += [*range(seen, seen + len(pair.visuals))] * 2
            seen += len(pair.visuals)
        starts = [pair.start for pair in examples if pair.start is not None]
        start_P2 = torch.tensor(starts, dtype=torch.float32) if starts else None
        return PairBatch(**vars(pack(rows)), shown=tuple(shown), pairs=len(examples), start_P2=start_P2)


def encode_pair(sample: Sample, processor: Processor, max_tokens: int) -> Pair:
    """Both conversations as numbers, each cut to max_tokens, with the pictures opened once.

    Raises SampleError where a picture cannot be read, or of an answer no token is left.
    """
    if sample.rejected is None:
        raise UserError(f"{sample.name}: has no chosen and rejected answer, which task dpo learns from; give both")
    opened: dict = {}
    both = [encode_sample(each, processor, max_tokens, opened) for each in (sample, sample.worse)]
    if sum(message.role == "assistant" for message in sample.messages) > 1:  # what came before is no answer
        asked = sample.written_for(processor.config.chat)[:-1]
        front = len(processor(asked, sample.media, generate=True, opened=opened).ids)
        for example in both:
            example.labels[:front] = [IGNORE] * min(front, len(example.labels))
            if all(label == IGNORE for label in example.labels):
                raise SampleError(f"{sample.name}: cut to {max_tokens} tokens an answer is gone; raise max_tokens")
    chosen, rejected = both
    cut = chosen.cut + rejected.cut
    return Pair(chosen.ids, chosen.labels, chosen.visuals, cut, Example(rejected.ids, rejected.labels))
