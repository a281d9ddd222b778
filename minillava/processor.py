"""Messages, pictures and clips -> ids, labels and pixels in prompt order: one function, for asking and for training.

Every picture or clip is opened, which says how many visual tokens it has; the template writes the messages as text;
each marker in it takes the next picture or clip of its kind; and the text becomes ids, a marker as many placeholders as
there are visual tokens. A training sample begins with the very ids of the prompt that asks for its answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minillava.chat.messages import Message, marker_of, split_at_markers
from minillava.chat.prompt import Piece, encode, render
from minillava.chat.templates import TEMPLATES
from minillava.chat.tokenizer import Tokenizer
from minillava.config import IGNORE, ChatConfig, ModelConfig
from minillava.errors import UserError
from minillava.media.visual import Media, Visual
from minillava.visual_tokens import Span


class MediaError(UserError):
    """A picture or clip cannot be read."""


@dataclass(slots=True)
class Example:
    """A conversation as numbers. `labels[t]` is the id at t or IGNORE: the shift by one is the loss's business."""

    ids: list[int]
    labels: list[int]
    visuals: list[Visual] = field(default_factory=list)  # in the order of their placeholders
    cut: int = 0  # tokens left out because there were more than allowed

    @property
    def pixels_NCHW(self) -> Tensor | None:
        """The views of all pictures and clips."""
        return torch.cat([visual.pixels_NCHW for visual in self.visuals]) if self.visuals else None

    @property
    def spans(self) -> tuple[Span, ...]:
        return tuple(visual.span for visual in self.visuals)


class Processor:
    """What one checkpoint makes of conversations. `media` are in the order of their markers, or of those of their kind
    where pictures and clips have different markers. `opened` keeps what was opened, for other calls to share.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.placeholders = frozenset(config.chat.markers.values())  # ids that stand for visual tokens

    def __call__(
        self,
        messages: Sequence[Message] | str,
        media: Sequence[Media] = (),
        generate: bool = False,
        max_tokens: int | None = None,
        opened: dict[object, Visual] | None = None,
        measure: bool = False,
    ) -> Example:
        """The conversation in the checkpoint's template: with `generate` up to where the model answers, else as a
        sample to learn from, cut to `max_tokens`, with those pictures and clips whose every token is left. A text is a
        finished prompt, with BOS in front unless it is spelled out there. With `measure` nothing is decoded but clips:
        the ids are the same, and there are no pixels.

        Raises MediaError for a picture or clip that cannot be read, and UserError for a conversation that the template
        cannot hold and for markers that are more or fewer than the media.
        """
        chat, visuals = self.config.chat, self.open(media, opened, measure)
        if isinstance(messages, str):
            pieces = [(messages, False)]
        else:
            if any(visual.times for visual in visuals):
                messages = with_times(chat, messages, visuals)
            pieces = render(chat, self.tokenizer, messages, generate)
        visuals = in_prompt_order(chat, [text for text, _ in pieces], visuals)
        if chat.video_token and any(visual.tags for visual in visuals):
            pieces = with_tags(chat, pieces, visuals)
        counts = [count for visual in visuals for count in visual.counts]
        example = Example(*encode(chat, self.tokenizer, pieces, counts), visuals)
        if not generate:
            example.labels[0] = IGNORE  # nothing predicts the first token
        return example if max_tokens is None else self._shorten(example, max_tokens)

    def given(
        self, ids: Sequence[int], media: Sequence[Media] = (), opened: dict[object, Visual] | None = None
    ) -> Example:
        """A prompt's ids, placeholders expanded. Raises UserError where these are not as many as the visual tokens."""
        visuals = self.open(media, opened)
        found, expected = self.visual_tokens(ids), sum(visual.span.tokens for visual in visuals)
        if found != expected:
            raise UserError(f"the ids hold {found} image placeholders, the pictures make {expected} visual tokens")
        return Example(list(ids), [IGNORE] * len(ids), visuals)

    def visual_tokens(self, ids: Sequence[int]) -> int:
        """How many of the ids stand for visual tokens."""
        return sum(map(list(ids).count, self.placeholders))

    def open(
        self, media: Sequence[Media], opened: dict[object, Visual] | None = None, measure: bool = False
    ) -> list[Visual]:
        """What becomes of each; with `measure` without the pixels."""
        several = sum(not medium.video for medium in media) > 1
        opened = {} if opened is None else opened
        visuals = []
        for medium in media:
            source = str(medium.source) if isinstance(medium.source, str | Path) else id(medium.source)
            key = source, medium.video, medium.name, several and not medium.video  # what is opened only once
            if key not in opened:
                try:
                    make = medium.measure if measure else medium.open
                    opened[key] = make(self.config, several)
                except UserError as error:
                    raise MediaError(str(error)) from None
            visuals.append(opened[key])
        return visuals

    def _shorten(self, example: Example, max_tokens: int) -> Example:
        """The first max_tokens, or what is in front of the picture or clip that would be cut through."""
        ids, end, kept = example.ids, max_tokens, len(example.visuals)
        if len(ids) <= max_tokens:
            return example
        behind = 0  # the last picture
        for number, visual in enumerate(example.visuals):
            start = next(at for at in range(behind, len(ids)) if ids[at] in self.placeholders)
            for count in visual.counts:
                behind = next(at for at in range(behind, len(ids)) if ids[at] in self.placeholders) + count
            if behind > max_tokens:
                before = start - 1 if self.config.chat.image_start_end else start  # no <im_start> without its image
                end, kept = min(before, max_tokens), number
                break
        return Example(ids[:end], example.labels[:end], example.visuals[:kept], len(ids) - len(ids[:end]))


def markers_in(chat: ChatConfig, texts: Iterable[str]) -> list[str]:
    """The markers in the texts, in order."""
    return [marker for text in texts for marker in split_at_markers(chat, text)[1::2]]


def in_prompt_order(chat: ChatConfig, texts: Sequence[str], visuals: Sequence[Visual]) -> list[Visual]:
    """Which picture or clip each marker stands for: the next one of its kind. Raises UserError if any are left over."""
    found = markers_in(chat, texts)
    waiting: dict[str, list[Visual]] = {marker: [] for marker in chat.markers}
    for visual in visuals:
        waiting[marker_of(chat, visual.span.clip)].append(visual)
    for marker, some in waiting.items():
        if found.count(marker) != len(some):
            kind = "video" if marker == chat.video_token else "picture"
            raise UserError(
                f"{found.count(marker)} '{marker}' in the text, but {len(some)} {kind}s; give one {kind} for each"
            )
    following = {marker: iter(some) for marker, some in waiting.items()}
    return [next(following[marker]) for marker in found]


def with_times(chat: ChatConfig, messages: Sequence[Message], visuals: Sequence[Visual]) -> list[Message]:
    """Behind the marker of each clip what the model is told of its times, on a line of its own (LLaVA-Video)."""
    marker = marker_of(chat, video=True)
    times = iter([visual.times for visual in visuals if marker_of(chat, visual.span.clip) == marker])
    changed = []
    for message in messages:
        head, *tails = message.text.split(marker)
        for tail in tails:
            text = next(times, "")
            head += marker + (f"\n{text}\n{tail.removeprefix(chr(10))}" if text else tail)
        changed.append(Message(message.role, head))
    return changed


def with_tags(chat: ChatConfig, pieces: Sequence[Piece], visuals: Sequence[Visual]) -> list[Piece]:
    """A clip whose frames are told apart by their times as so many pictures, each behind "<1.5 seconds>" (OneVision-2).

    Canvases, unlike frames, end each with a line break, and take the one behind the clip.
    """
    clips = iter([visual for visual in visuals if visual.tags])
    start, end = TEMPLATES["onevision_1_5"].around
    marker = f"(?:{re.escape(start)}\\s*)?{re.escape(chat.video_token)}(?:\\s*{re.escape(end)})?(\n?)"

    def put(match: re.Match[str]) -> str:
        clip = next(clips)
        line = "\n" if clip.span.places_P3 is not None else ""
        blocks = [f"{tag}{start}{chat.image_token}{end}{line}" for tag, _ in clip.tags]
        return "".join(blocks) + ("" if line else match[1])

    return [(re.sub(marker, put, text), supervised) for text, supervised in pieces]


def user_message(chat: ChatConfig, text: str, media: Sequence[Media]) -> Message:
    """A question about pictures and clips: each marker stays where the user put it; without any, they come first."""
    markers = [marker_of(chat, medium.video) for medium in media]
    return Message("user", "".join(f"{marker}\n" for marker in markers if marker not in text) + text)
