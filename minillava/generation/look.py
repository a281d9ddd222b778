"""Where a word of an answer attends to in the pictures: the decoder's attention weights, laid over each picture.

It is attention, not an explanation: what a head reads is not what the answer depends on (Jain and Wallace 2019, arXiv
1902.10186). The weights are those of the positions that chose the word's tokens, softmax over everything before them.
Letters: L layers, H heads, G key/value heads, R = H / G, Q queries, S keys, K head size, T visual tokens of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minillava.chat.messages import Message
from minillava.chat.tokenizer import StreamDecoder
from minillava.config import ModelConfig
from minillava.errors import UserError
from minillava.generation.engine import Engine
from minillava.layers.cache import KVCache
from minillava.layers.tensor_parallel import is_shared
from minillava.media.visual import Media, Visual
from minillava.processor import Example

Heads = Literal["mean", "max"]
Box = tuple[float, float, float, float]  # left, top, right, bottom, where the picture is 0 to 1
WHOLE: Box = 0.0, 0.0, 1.0, 1.0
DARK, GLOW = 0.6, np.array((235, 138, 37), np.float32)  # what is left of the picture, and what lies over it: the page's


@dataclass(frozen=True)
class Look:
    """One picture's share of the attention. What a map covers may reach beyond the picture, where it was padded."""

    weights_T: Tensor
    maps: list[tuple[Tensor, Box]]  # weights [rows, columns] of the whole picture's view, and of its tiles
    picture: Image.Image


class WatchingCache(KVCache):
    """Keeps the weights [S] of each layer in a pass over one sequence: the mean of its last `queries` positions and of
    all heads, or of the strongest. One by one they would be gigabytes for a long answer."""

    def __init__(self, config: ModelConfig, capacity: int, queries: int, heads: Heads, like: Tensor):
        super().__init__(config.decoder, 1, capacity, like.device, like.dtype)
        self.queries, self.heads, self.weights = queries, heads, list[Tensor]()

    def attend(
        self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Sequence[int] | None
    ) -> Tensor:
        out_THK = super().attend(layer, q_THK, k_TGK, v_TGK, cu_seqlens)
        k_SGK = self.k_LBSGK[layer, 0, : self.lengths[0] + len(q_THK)].float()
        q_QGRK = q_THK[-self.queries :].float().unflatten(1, (k_SGK.shape[1], -1))
        scores = torch.einsum("qgrk,sgk->grqs", q_QGRK, k_SGK) * q_THK.shape[2] ** -0.5
        Q, S = scores.shape[2:]
        ahead_QS = torch.arange(S, device=scores.device) > torch.arange(S - Q, S, device=scores.device)[:, None]
        weights_HQS = scores.masked_fill(ahead_QS, float("-inf")).softmax(-1).flatten(0, 1)
        over_heads_QS = weights_HQS.mean(0) if self.heads == "mean" else weights_HQS.amax(0)
        self.weights.append(over_heads_QS.mean(0))
        return out_THK


@torch.inference_mode()
def attention_over_pictures(
    engine: Engine,
    messages: Sequence[Message],
    media: Sequence[Media],
    word: tuple[int, int],
    layer: int | None = None,
    heads: Heads = "mean",
) -> list[Look]:
    """Attention from characters `word` of the last message, the model's answer, to each picture in prompt order.

    layer: one of them (negative: from the end), or the mean of all. heads: their mean, or the strongest. The mean over
    the word's tokens. Raises UserError where there is no such word, layer or picture.
    """
    if is_shared(engine.model.decoder):
        raise UserError("a look is at the heads of one process; leave out torchrun")
    if not messages or messages[-1].role != "assistant":
        raise UserError("the last message has to be the model's answer")
    layers = engine.config.decoder.num_layers
    if layer is not None and not -layers <= layer < layers:
        raise UserError(f"layer {layer} is not there; the decoder has {layers}")
    opened: dict[object, Visual] = {}
    example = engine.processor(messages, media, opened=opened)
    if not example.visuals:
        raise UserError("there is no picture to attend to")
    if any(visual.span.clip for visual in example.visuals):
        raise UserError("attention is laid over pictures, not over clips")
    begin = len(engine.processor(messages[:-1], media, generate=True, opened=opened).ids)
    first, last = _tokens_of(engine, example.ids[begin:], messages[-1].text, word)
    weights_S = _weights(engine, example, begin + first, begin + last, layer, heads)
    placeholders = torch.tensor([*engine.processor.placeholders])
    where_T = torch.isin(torch.tensor(example.ids[: len(weights_S)]), placeholders)
    parts = weights_S[where_T].split([visual.span.tokens for visual in example.visuals])
    pictures = [medium.image() for medium in media]
    return [
        Look(part_T, _maps(part_T, visual, engine.config, picture.size, len(media) > 1), picture)
        for part_T, visual, picture in zip(parts, example.visuals, pictures)
    ]


def _tokens_of(engine: Engine, ids: Sequence[int], text: str, word: tuple[int, int]) -> tuple[int, int]:
    """The first of the answer's tokens that has a part of these characters, and the one behind the last."""
    stream, ends, found = StreamDecoder(engine.tokenizer), list[int](), ""
    for id in ids:
        found += stream.push(id)
        ends.append(len(found))
    shift = max(0, found.find(text.strip())) - (len(text) - len(text.lstrip()))  # the template's blank in front
    start, stop = word[0] + shift, word[1] + shift
    inside = [n for n, end in enumerate(ends) if start < end and (ends[n - 1] if n else 0) < stop]
    if not 0 <= word[0] < word[1] <= len(text) or not inside:
        raise UserError(f"the answer has no characters {word[0]} to {word[1]}")
    return inside[0], inside[-1] + 1


def _weights(engine: Engine, example: Example, first: int, last: int, layer: int | None, heads: Heads) -> Tensor:
    """Weights [S] on every token, of the positions in front of tokens first to last."""
    ids = example.ids[: last - 1]  # the last token itself is not asked
    like = engine.model.decoder.embed.weight
    cache = WatchingCache(engine.config, len(ids), last - first, heads, like)
    visual = engine.see(example.visuals)
    engine.model(torch.tensor(ids, device=like.device), visual=visual, cache=cache, last_only=True)
    chosen = cache.weights if layer is None else [cache.weights[layer]]
    return torch.stack(chosen).mean(0).cpu()


# ---- over the picture ----


def _maps(
    weights_T: Tensor, visual: Visual, config: ModelConfig, size: tuple[int, int], several: bool
) -> list[tuple[Tensor, Box]]:
    """The weights as maps; a class token's and newlines' are left out."""
    span, (width, height) = visual.span, size
    if span.native:
        merge = config.projector.merge
        return [(weights_T.unflatten(0, (span.height // merge, span.width // merge)), WHOLE)]
    side = math.isqrt(config.vision.num_patches)
    skipped = int(config.vision.keep_class_token and config.vision.class_token)
    base_HW = weights_T[skipped : skipped + side * side].unflatten(0, (side, side))
    if not span.rows:
        fit = "pad" if config.layout.grids and several else config.image.fit
        edge = max(size) if fit == "pad" else min(size)
        return [(base_HW, WHOLE if fit == "squash" else _around(edge / width, edge / height))]
    rest_T, squashed = weights_T[skipped + side * side :], (base_HW, WHOLE)
    if config.layout.merge == "unpad":  # a newline ends each row
        return [squashed, (rest_T.unflatten(0, (span.height, span.width + 1))[:, :-1], WHOLE)]
    if config.layout.merge == "flat":  # tile after tile
        tiles = rest_T.unflatten(0, (span.rows, span.columns, skipped + side * side))[:, :, skipped:]
        map_HW = tiles.unflatten(2, (side, side)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    else:
        map_HW = rest_T.unflatten(0, (span.height, span.width))
    scale = min(span.columns / width, span.rows / height)
    return [squashed, (map_HW, _around(span.columns / (width * scale), span.rows / (height * scale)))]


def _around(across: float, down: float) -> Box:
    """A box so many pictures wide and high, centred on the picture."""
    return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2


def draw(looks: Sequence[Look]) -> list[Image.Image]:
    """Each picture, darker, with the attention over it in orange; the brightest spot of all has the most attention.

    A patch's light is its weight by the size of what it shows, as tiles have smaller patches than the whole picture;
    the square root makes room for what is not the peak.
    """
    peak = max(float(map_HW.max()) * _patches(map_HW, box) for look in looks for map_HW, box in look.maps) or 1.0
    return [_drawn(look, peak) for look in looks]


def _drawn(look: Look, peak: float) -> Image.Image:
    width, height = look.picture.size
    canvas_HWC = np.asarray(look.picture, np.float32) * DARK
    for map_HW, box in look.maps:
        light = Image.fromarray((map_HW.float() * _patches(map_HW, box) / peak).sqrt().numpy())
        left, top, right, bottom = box
        across, down = light.width / (right - left), light.height / (bottom - top)  # patches a picture
        extent = (-left * across, -top * down, (1 - left) * across, (1 - top) * down)
        over = light.transform((width, height), Image.Transform.EXTENT, extent, Image.Resampling.BILINEAR)
        canvas_HWC = canvas_HWC + np.asarray(over)[..., None] * GLOW
    return Image.fromarray(canvas_HWC.clip(0, 255).astype(np.uint8))


def _patches(map_HW: Tensor, box: Box) -> float:
    """Patches of such a map that would cover the picture."""
    return map_HW.numel() / ((box[2] - box[0]) * (box[3] - box[1]))
