"""Rows that teach nothing: they give all ranks the same work, and a CPU lengths that it has met before."""

from __future__ import annotations

import dataclasses

import torch
from PIL import Image

from minillava.config import IGNORE, ModelConfig
from minillava.data.batch import Batch, pack
from minillava.media.visual import Media
from minillava.processor import Example


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
