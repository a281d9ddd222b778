"""LLaVA's JSON in, packed batches out.

Reads the format of LLaVA (docs/Finetune_Custom_Data.md of haotian-liu/LLaVA) and its relatives: a JSON list or JSON
lines; from/value or role/content turns; no image, one, or several, and videos; in a folder or in a zip read in place.
Differs: every sample is checked before anything is trained (`scan`), and rows are packed end to end without padding.
Shape letters: T tokens of all rows end to end, N views of images and videos, C channels, H height, W width.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minillava import chat
from minillava.chat import IGNORE, Message
from minillava.config import ChatConfig, ModelConfig, UserError
from minillava.image import prepare_clip, prepare_views
from minillava.layout import Span, image_tokens
from minillava.store import ImageRef, ImageStore, open_store
from minillava.tokenizer import Tokenizer
from minillava.video import Clip

MARKER = "<image>"  # stands for a picture in the JSON, whatever the checkpoint's own placeholder is
VIDEO_MARKER = "<video>"  # stands for a video; LLaVA-Video's JSON has <image> there as well
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class SampleError(UserError):
    """One sample cannot be used: training skips it and counts it (`minillava.loader`); elsewhere it is a UserError."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation; its pictures in the order of their markers, its videos in the order of theirs."""

    id: str
    images: tuple[ImageRef, ...]
    messages: tuple[Message, ...]
    source: str = ""  # the file that it came from
    videos: tuple[ImageRef, ...] = ()

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.source}: sample {self.id!r}" if self.source else f"sample {self.id!r}"


@dataclass
class Report:
    """What reading a file found. `problems` has one line for each sample that cannot be used."""

    path: str
    samples: int = 0  # read and usable
    text_only: int = 0
    images: int = 0
    several_images: int = 0  # samples with more than one
    videos: int = 0
    turns: int = 0
    dropped_first_turns: int = 0  # conversations that opened with the model's turn, which was dropped as LLaVA does
    missing_images: int = 0
    marker_mismatches: int = 0
    role_errors: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type == "int"}
        shown = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items() if value)
        return f"{self.path}: {shown or 'nothing'}" + (f"; {len(self.problems):,} unusable" if self.problems else "")


def scan(path: Path, image_root: Path | None) -> tuple[list[Sample], Report]:
    """The usable samples of a json or jsonl file, and a report with one line for each sample that is not; images are
    sought under `image_root`, a folder or a zip.

    Raises UserError if the file or the image root as a whole cannot be read.
    """
    store = open_store(Path(image_root)) if image_root is not None else None
    report = Report(str(path))
    samples = []
    for number, raw in enumerate(_read_json(Path(path))):
        try:
            sample = _parse(raw, number, store, report)
        except UserError as error:
            report.problems.append(str(error))
            continue
        samples.append(sample)
        report.samples += 1
        report.text_only += not sample.images and not sample.videos
        report.images += len(sample.images)
        report.videos += len(sample.videos)
        report.several_images += len(sample.images) > 1
        report.turns += len(sample.messages)
    if not samples and not report.problems:
        raise UserError(f"{path}: no samples in it; expected a list of conversations")
    return samples, report


def _read_json(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8 JSON") from None
    one_list = path.suffix != ".jsonl" and text.lstrip()[:1] == "["
    line, samples = 0, []
    try:
        if one_list:
            return json.loads(text)
        for line, row in enumerate(text.split("\n"), 1):  # noqa: B007 told in the error
            if row.strip():
                samples.append(json.loads(row))
        return samples
    except ValueError as error:  # a JSONDecodeError, or Python's refusal of a number of thousands of digits
        at, why = (error.lineno, error.msg) if isinstance(error, json.JSONDecodeError) else (1, str(error))
        raise UserError(
            f"{path}: not JSON at line {at if one_list else line} ({why}); expected a list of samples, or one a line"
        ) from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be a list of samples; check the file") from None


def _parse(raw: Any, number: int, store: ImageStore | None, report: Report) -> Sample:
    """One checked sample, or a UserError that names it."""
    identity = raw.get("id", number) if isinstance(raw, dict) else number
    where = f"{report.path}: sample {str(identity)!r} (number {number})"
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected an object with 'conversations', got {_kind(raw)}; check the file")
    images, videos = (_names(raw, key, where) for key in ("image", "video"))
    messages = _parse_turns(raw.get("conversations", raw.get("messages")), where, report)
    count = {marker: sum(message.text.count(marker) for message in messages) for marker in (MARKER, VIDEO_MARKER)}
    if videos and not count[VIDEO_MARKER] and count[MARKER] == len(images) + len(videos):
        messages = _mark_videos(messages, len(images))
        count = {MARKER: len(images), VIDEO_MARKER: len(videos)}
    for marker, names, kind in ((MARKER, images, "image"), (VIDEO_MARKER, videos, "video")):
        if count[marker] != len(names) and (names or marker == MARKER):  # without videos <video> is a word
            report.marker_mismatches += 1
            add, many = f"add a {marker} for each {kind}", f"add the {kind}s or remove markers"
            raise UserError(
                f"{where}: {count[marker]} {marker} in the text but {len(names)} {kind}s; "
                f"{many if count[marker] > len(names) else add}"
            )
        if names and store is None:
            raise UserError(f"{where}: has an {kind} but no image folder was given; set one")
        for name in names:
            if store is not None and not store.has(name):
                report.missing_images += 1
                raise UserError(f"{where}: {kind} {name} is missing; add it or remove the sample")
    refs = [tuple(ImageRef(name, store) for name in names) if store is not None else () for names in (images, videos)]
    return Sample(str(identity), refs[0], messages, report.path, refs[1])


def _names(raw: dict[str, Any], key: str, where: str) -> list[str]:
    """The paths under a sample's `image` or `images`."""
    names = raw.get(key, raw.get(f"{key}s")) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where}: '{key}' must be a path or a list of paths; correct it")
    return names


def _mark_videos(messages: tuple[Message, ...], images: int) -> tuple[Message, ...]:
    """Messages in which every <image> but the first few stands for a video."""
    marked = []
    for message in messages:
        mine = min(images, message.text.count(MARKER))
        images -= mine
        parts = message.text.split(MARKER)
        text = MARKER.join(parts[: mine + 1]) + "".join(VIDEO_MARKER + part for part in parts[mine + 1 :])
        marked.append(Message(message.role, text))
    return tuple(marked)


def _parse_turns(turns: Any, where: str, report: Report) -> tuple[Message, ...]:
    """Turns as messages that alternate user, assistant, ..., behind an optional system message."""
    if not isinstance(turns, list):
        raise UserError(f"{where}: 'conversations' must be a list of turns, got {_kind(turns)}; correct it")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise UserError(f"{where}: a turn must be an object with 'from' and 'value', got {_kind(turn)}; correct it")
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in ROLES:
            report.role_errors += 1
            raise UserError(f"{where}: unknown role {role!r}; use human and gpt, or user and assistant")
        if not isinstance(text, str):
            raise UserError(f"{where}: the text of a turn must be a string, got {_kind(text)}; correct it")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: half a surrogate pair in the text, which is no character; remove it") from None
        messages.append(Message(ROLES[role], text))
    first = 1 if messages and messages[0].role == "system" else 0
    if len(messages) > first and messages[first].role == "assistant":
        del messages[first]
        report.dropped_first_turns += 1
    if len(messages) == first:
        raise UserError(f"{where}: the conversation is empty; remove the sample")
    try:
        chat.check_roles(messages, generate=False)
    except UserError as error:
        report.role_errors += 1
        raise UserError(f"{where}: wrong role order: {error}") from None
    return tuple(messages)


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


@dataclass(slots=True)
class Example:
    """A sample as numbers. `labels[t]` is the id at t or IGNORE: the shift by one is the loss's business."""

    ids: list[int]
    labels: list[int]
    pixels_NCHW: torch.Tensor | None
    cut: int = 0  # tokens left out because the sample was longer than allowed
    spans: tuple[Span, ...] = ()  # which of the views make one picture or clip; none: each is a picture


def encode_sample(sample: Sample, config: ModelConfig, tokenizer: Tokenizer, max_tokens: int) -> Example:
    """Ids and labels of at most max_tokens, and pixels_NCHW of the images whose every token is among them.

    Raises SampleError if an image cannot be read or no supervised token is left.
    """
    try:
        seen = [
            prepare_views(ref.open(sample.name), config, len(sample.images) > 1, f"{sample.name}: {ref.name}")
            for ref in sample.images
        ]
        clips = [ref.open_clip(sample.name, config) for ref in sample.videos]
        filmed = [prepare_clip(clip.frames, config, sample.name) for clip in clips]
    except UserError as error:
        raise SampleError(str(error)) from None
    tokens = [span.tokens for _, span in seen], [span.tokens for _, span in filmed]
    ids, labels = _encode_text(sample, config, tokenizer, tokens, clips)
    visuals = [(seen + filmed)[i] for i in chat.in_order(config.chat, ids, *tokens)]
    length = len(ids)
    if length > max_tokens:
        end, kept = _cut(ids, [span.tokens for _, span in visuals], config, max_tokens)
        ids, labels, visuals = ids[:end], labels[:end], visuals[:kept]
    if ids:
        labels[0] = IGNORE  # nothing predicts the first token
    if labels.count(IGNORE) == len(labels):
        why = f"cut from {length} to {max_tokens} tokens it " if length > max_tokens else ""
        raise SampleError(f"{sample.name}: {why}has no token to learn; raise max_tokens or remove the sample")
    views = [views_NCHW for views_NCHW, _ in visuals]
    pixels = torch.cat(views) if len(views) > 1 else views[0] if views else None
    return Example(ids, labels, pixels, length - len(ids), tuple(span for _, span in visuals))


def marked(sample: Sample, config: ChatConfig) -> list[Message]:
    """The sample's messages with a checkpoint's own markers."""
    theirs = config.image_token, config.video_token or config.image_token
    return [Message(m.role, _remark(m.text, theirs, bool(sample.videos))) for m in sample.messages]


def _remark(text: str, markers: tuple[str, str], clips: bool) -> str:
    """The JSON's markers as those of a checkpoint; without clips <video> is a word."""
    parts = re.split(f"({MARKER}|{VIDEO_MARKER})" if clips else f"({MARKER})", text)
    return "".join({MARKER: markers[0], VIDEO_MARKER: markers[1]}[p] if i % 2 else p for i, p in enumerate(parts))


def count_tokens(sample: Sample, config: ModelConfig, tokenizer: Tokenizer) -> int:
    """Tokens of the whole sample by layout: pictures are not decoded for it, but videos are.

    Raises SampleError if the size of one cannot be read.
    """
    try:
        several = len(sample.images) > 1
        images = [image_tokens(config, *ref.size(sample.name), several) for ref in sample.images]
        clips = [ref.open_clip(sample.name, config) for ref in sample.videos]
        filmed = [prepare_clip(clip.frames, config, sample.name)[1].tokens for clip in clips]
    except UserError as error:
        raise SampleError(str(error)) from None
    return len(_encode_text(sample, config, tokenizer, (images, filmed), clips)[0])


def _encode_text(
    sample: Sample,
    config: ModelConfig,
    tokenizer: Tokenizer,
    tokens: tuple[list[int], list[int]],
    clips: Sequence[Clip],
) -> tuple[list[int], list[int]]:
    """Ids and labels; `tokens` are those of each picture and of each clip."""
    messages = marked(sample, config.chat)
    if clips and config.layout.time_instruction:
        messages = chat.tell_times(config.chat, messages, len(tokens[0]), [clip.instruction() for clip in clips])
    try:
        return chat.encode(config.chat, tokenizer, messages, tokens[0], False, tokens[1])
    except UserError as error:
        raise UserError(f"{sample.name}: {error}") from None


def _cut(ids: Sequence[int], spans: Sequence[int], config: ModelConfig, max_tokens: int) -> tuple[int, int]:
    """Where to end and how many images stay: at max_tokens, or in front of the image that it would cut through."""
    placeholders = set(config.chat.markers.values())
    end = start = 0
    for number, span in enumerate(spans):
        start = next(at for at in range(end, len(ids)) if ids[at] in placeholders)
        end = start + span
        if end > max_tokens:
            before = start - 1 if config.chat.image_start_end else start  # no <im_start> without its image
            return min(before, max_tokens), number
    return max_tokens, len(spans)


@dataclass
class Batch:
    """Rows packed end to end: row i is [cu_seqlens[i], cu_seqlens[i + 1])."""

    ids_T: torch.Tensor  # int64
    labels_T: torch.Tensor  # int64, the id at each supervised position, else IGNORE
    cu_seqlens: tuple[int, ...]
    pixels_NCHW: torch.Tensor | None  # float32 views, in the order of their placeholders
    supervised: int  # positions with a label: what the loss is divided by
    cut_rows: int = 0  # rows that were longer than allowed
    cut_tokens: int = 0  # what they lost
    lost: tuple[tuple[int, str], ...] = ()  # (index, why) of samples that another one stands in for
    epoch: int = 0
    spans: tuple[Span, ...] = ()  # which of the views make one picture or clip; none: each is a picture
    rows: int = 0  # rows of a token budget that the samples fill (minillava.packing)

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        pixels = None if self.pixels_NCHW is None else change(self.pixels_NCHW)
        return dataclasses.replace(self, ids_T=change(self.ids_T), labels_T=change(self.labels_T), pixels_NCHW=pixels)


def pack(examples: Sequence[Example]) -> Batch:
    """Rows end to end, without padding."""
    ids: list[int] = []
    labels: list[int] = []
    cu_seqlens = [0]
    for example in examples:
        ids += example.ids
        labels += example.labels
        cu_seqlens.append(len(ids))
    labels_T = np.array(labels, dtype=np.int64)  # twice as fast as torch.tensor on a list
    pixels = [example.pixels_NCHW for example in examples if example.pixels_NCHW is not None]
    return Batch(
        ids_T=torch.from_numpy(np.array(ids, dtype=np.int64)),
        labels_T=torch.from_numpy(labels_T),
        cu_seqlens=tuple(cu_seqlens),
        pixels_NCHW=torch.cat(pixels) if pixels else None,
        supervised=int(np.count_nonzero(labels_T != IGNORE)),
        cut_rows=sum(example.cut > 0 for example in examples),
        cut_tokens=sum(example.cut for example in examples),
        spans=tuple(span for example in examples for span in example.spans),
    )
