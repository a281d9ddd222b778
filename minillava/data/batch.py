"""Samples packed end to end: what a step of training works on.

Shape letters: T tokens of all samples, N views of pictures and clips, C channels, H height, W width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch
from PIL import Image

from minillava.config import IGNORE, ModelConfig
from minillava.media.visual import Media
from minillava.processor import Example
from minillava.visual_tokens import Span


@dataclass
class Batch:
    """Samples packed end to end: sample i is [cu_seqlens[i], cu_seqlens[i + 1])."""

    ids_T: torch.Tensor  # int64
    labels_T: torch.Tensor  # int64, the id at each supervised position, else IGNORE
    cu_seqlens: tuple[int, ...]
    pixels_NCHW: torch.Tensor | None  # float32 views, in the order of their placeholders
    supervised: int  # positions with a label: what the loss is divided by
    cut_rows: int = 0  # samples that were longer than allowed
    cut_tokens: int = 0  # what they lost
    lost: tuple[tuple[int, str], ...] = ()  # (index, why) of samples that could not be used and were replaced
    spans: tuple[Span, ...] = ()  # which of the views make one picture or clip
    rows: int = 0  # of a token budget, that the samples were packed into (minillava.data.packing)

    @property
    def samples(self) -> int:
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        pixels = None if self.pixels_NCHW is None else change(self.pixels_NCHW)
        return dataclasses.replace(self, ids_T=change(self.ids_T), labels_T=change(self.labels_T), pixels_NCHW=pixels)


def pack(examples: Sequence[Example]) -> Batch:
    """Samples end to end, without padding."""
    # Twice as fast as torch.tensor on a list.
    ids_T = np.array([*chain.from_iterable(example.ids for example in examples)], dtype=np.int64)
    labels_T = np.array([*chain.from_iterable(example.labels for example in examples)], dtype=np.int64)
    visuals = [visual for example in examples for visual in example.visuals]
    return Batch(
        ids_T=torch.from_numpy(ids_T),
        labels_T=torch.from_numpy(labels_T),
        cu_seqlens=(0, *accumulate(len(example.ids) for example in examples)),
        pixels_NCHW=torch.cat([visual.pixels_NCHW for visual in visuals]) if visuals else None,
        supervised=int(np.count_nonzero(labels_T != IGNORE)),
        cut_rows=sum(example.cut > 0 for example in examples),
        cut_tokens=sum(example.cut for example in examples),
        spans=tuple(visual.span for visual in visuals),
    )


# ---- rows that teach nothing: they give all ranks the same work, and a CPU lengths that it has met before ----


def blank_example(config: ModelConfig) -> Example:
    """One small grey picture and nothing else; nothing in it is learned."""
    image = Image.new("RGB", (config.image.size, config.image.size), "grey")
    visual = Media(image).open(config, several=True)
    return Example([config.chat.image_token_id] * visual.span.tokens, [IGNORE] * visual.span.tokens, [visual])


def with_row(batch: Batch, example: Example) -> Batch:
    """The batch with a last row that teaches nothing; only one that has no pictures takes one with a picture."""
    row = pack([example])
    ids_T, labels_T = torch.cat([batch.ids_T, row.ids_T]), torch.cat([batch.labels_T, row.labels_T])
    pixels_NCHW = batch.pixels_NCHW if row.pixels_NCHW is None else row.pixels_NCHW
    return dataclasses.replace(
        batch, ids_T=ids_T, labels_T=labels_T, cu_seqlens=(*batch.cu_seqlens, len(ids_T)), pixels_NCHW=pixels_NCHW,
        spans=batch.spans + row.spans,
    )  # fmt: skip


def rounded_up(batch: Batch, image_token_id: int) -> Batch:
    """The batch with a last row that teaches nothing, so that its length is a multiple of 64.

    On a CPU oneDNN compiles every product for its very sizes: some 11 a step, 1 to 2 ms and about 1 MB each, for each
    length that it has not met. Of multiples of 64 it soon has met them all.
    """
    more, filler = -len(batch.ids_T) % 64, 1 if image_token_id == 0 else 0
    return with_row(batch, Example([filler] * more, [IGNORE] * more)) if more else batch
