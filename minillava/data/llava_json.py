"""Conversations about pictures and videos, each checked before anything is trained.

Reads the format of LLaVA (docs/Finetune_Custom_Data.md of haotian-liu/LLaVA) and all layouts that `layouts` knows; no
picture, one, or several, and videos; wherever `pictures` finds them.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from minillava.chat.messages import Message, check_roles, marker_of, split_at_markers
from minillava.chat.prompt import render
from minillava.chat.templates import TEMPLATES
from minillava.chat.tokenizer import Tokenizer
from minillava.config import ChatConfig
from minillava.data.layouts import MARKER, VIDEO_MARKER, Content, Counted, preference, read_row
from minillava.data.pictures import Places
from minillava.errors import UserError
from minillava.files import in_words
from minillava.media.visual import Media
from minillava.processor import markers_in


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation, with MARKER and VIDEO_MARKER for its pictures and videos, which are in their order."""

    id: str
    media: tuple[Media, ...]
    messages: tuple[Message, ...]
    source: str = ""  # the file that it came from
    rejected: str | None = None  # of a preference: the worse last answer; `messages` ends with the better one

    @property
    def name(self) -> str:
        """How errors call it."""
        return f"{self.source}: sample {self.id!r}" if self.source else f"sample {self.id!r}"

    @property
    def images(self) -> list[Media]:
        return [medium for medium in self.media if not medium.video]

    @property
    def videos(self) -> list[Media]:
        return [medium for medium in self.media if medium.video]

    @property
    def worse(self) -> Sample:
        """Of a preference, the conversation that ends with the worse answer."""
        assert self.rejected is not None
        messages = (*self.messages[:-1], Message("assistant", self.rejected))
        return replace(self, messages=messages, rejected=None)

    def written_for(self, chat: ChatConfig) -> list[Message]:
        """Its messages with a checkpoint's own markers."""
        theirs = {MARKER: marker_of(chat, False), VIDEO_MARKER: marker_of(chat, True)}
        pattern = markers(any(medium.video for medium in self.media))
        return [Message(m.role, pattern.sub(lambda found: theirs[found[0]], m.text)) for m in self.messages]


def markers(videos: bool) -> re.Pattern[str]:
    """What stands for pictures and videos in a sample; without videos <video> is a word."""
    return re.compile(f"{MARKER}|{VIDEO_MARKER}" if videos else MARKER)


# What a report counts. LLaVA drops the first turn of a conversation that the model opens.
COUNTED = ["samples", "text only", "images", "several images", "videos", "turns", "dropped first turns"]
COUNTED += ["with pictures put in front", "missing images", "marker mismatches", "role errors"]


@dataclass
class Report:
    """What reading a file found. `problems` has one line for each sample that cannot be used."""

    path: str
    counts: Counter[str] = field(default_factory=Counter)  # by the names in COUNTED
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        shown = ", ".join(f"{self.counts[name]:,} {name}" for name in COUNTED if self.counts[name])
        return f"{self.path}: {shown or 'nothing'}" + (f"; {len(self.problems):,} unusable" if self.problems else "")


Check = Callable[[Sample], None]  # raises UserError for a sample that cannot be trained


def parse(raw: Any, number: int, path: str, places: Places, report: Report, check: Check | None = None) -> Sample:
    """The checked sample of row `number` of the file at `path`, counted in `report`. Raises UserError that names it."""
    identity = raw.get("id") if isinstance(raw, dict) else None
    identity = number if identity is None else identity
    where = f"{path}: sample {str(identity)!r} (number {number})"
    if isinstance(raw, UserError):
        raise UserError(f"{where}: {raw}")
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected an object with 'conversations', got {in_words(raw)}; check the file")
    try:
        both = preference(raw)
        found, messages = conversation(both[0] if both else raw, report)
        rejected = worse_answer(conversation(both[1], Report(""))[1], messages, found) if both else None
        check_markers(found, messages)
        media = media_of(found, messages, places, str(identity))
        sample = Sample(str(identity), media, messages, report.path, rejected)
        if check is not None:
            check(sample)
        return sample
    except UserError as error:
        if isinstance(error, Counted):
            report.counts[error.counted] += 1
        raise UserError(f"{where}: {error}") from None


def conversation(raw: dict[str, Any], report: Report) -> tuple[Content, tuple[Message, ...]]:
    """What a row says, and its turns with a marker for each picture and video. Raises UserError."""
    found = read_row(raw)
    return found, mark_videos(in_front(found, in_turns(found, report), report), found)


def worse_answer(worse: tuple[Message, ...], better: tuple[Message, ...], found: Content) -> str:
    """The rejected answer. Raises UserError unless it differs from the chosen one, and in nothing but the answer."""
    if worse[:-1] != better[:-1]:
        raise UserError("chosen and rejected answer different conversations; give both the same prompt")
    if worse[-1] == better[-1]:
        raise UserError("chosen and rejected are the same, from which nothing is learned; remove the sample")
    if marker := markers(bool(found.media[VIDEO_MARKER])).search(worse[-1].text):
        raise UserError(f"{marker[0]} in the rejected answer; an answer has no picture, remove it")
    return worse[-1].text


def in_turns(found: Content, report: Report) -> tuple[Message, ...]:
    """Turns as messages that alternate user, assistant, ..., behind an optional system message."""
    messages = [Message(role, text) for role, text in found.turns]
    for message in messages:
        try:
            message.text.encode()
        except UnicodeEncodeError:
            raise UserError("half a surrogate pair in the text, which is no character; remove it") from None
    first = 1 if messages and messages[0].role == "system" else 0
    if len(messages) > first and messages[first].role == "assistant":
        del messages[first]
        report.counts["dropped first turns"] += 1
    if len(messages) == first:
        raise UserError("the conversation is empty; remove the sample")
    try:
        check_roles(messages, generate=False)
    except UserError as error:
        raise Counted("role errors", f"wrong role order: {error}") from None
    return tuple(messages)


def in_front(found: Content, messages: tuple[Message, ...], report: Report) -> tuple[Message, ...]:
    """Markers in front of the first question, for layouts that have none (FineVision, TRL beside texts)."""
    pattern = markers(bool(found.media[VIDEO_MARKER]))
    marked = any(pattern.search(message.text) for message in messages)
    lines = [marker for marker, values in found.media.items() for _ in values]
    if marked or not found.front or not lines:
        return messages
    at = 1 if messages[0].role == "system" else 0
    text = "\n".join([*lines, messages[at].text] if messages[at].text else lines)
    report.counts["with pictures put in front"] += 1
    return (*messages[:at], Message("user", text), *messages[at + 1 :])


def check_markers(found: Content, messages: tuple[Message, ...]) -> None:
    """Raises UserError unless there is a marker for each picture and video."""
    for (marker, values), what in zip(found.media.items(), ("image", "video")):
        count = sum(message.text.count(marker) for message in messages)
        if count != len(values) and (values or marker == MARKER):  # without videos <video> is a word
            add, many = f"add a {marker} for each {what}", f"add the {what}s or remove markers"
            remedy = many if count > len(values) else add
            raise Counted("marker mismatches", f"{count} {marker} in the text but {len(values)} {what}s; {remedy}")


def media_of(found: Content, messages: tuple[Message, ...], places: Places, identity: str) -> tuple[Media, ...]:
    """The pictures and videos in the order of their markers."""
    following = {marker: iter(values) for marker, values in found.media.items()}
    pattern = markers(bool(found.media[VIDEO_MARKER]))
    order = [marker for message in messages for marker in pattern.findall(message.text)]
    return tuple(
        places.media(next(following[marker]), marker == VIDEO_MARKER, f"{identity}#{number}")
        for number, marker in enumerate(order)
    )


def mark_videos(messages: tuple[Message, ...], found: Content) -> tuple[Message, ...]:
    """Messages in which every <image> but those of pictures is a video's marker, where videos have no other."""
    images, videos = found.media.values()
    count = {marker: sum(m.text.count(marker) for m in messages) for marker in found.media}
    if not videos or count[VIDEO_MARKER] or count[MARKER] != len(images) + len(videos):
        return messages
    following = itertools.chain([MARKER] * len(images), itertools.repeat(VIDEO_MARKER))
    return tuple(Message(m.role, re.sub(MARKER, lambda _: next(following), m.text)) for m in messages)


# ---- its prompt: texts alone, no picture is opened for it ----


def prompt_check(chat: ChatConfig, tokenizer: Tokenizer) -> Check:
    """What raises UserError for a sample whose prompt would not be the conversation: the template fails on it or leaves
    a text out, a text spells out a special token or a marker, or nothing is left to learn."""
    specials = {tokenizer.decode([id], skip_special=False) for id in tokenizer.special_ids} | set(chat.markers)
    written = sorted(filter(str.strip, specials), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, written)) or "(?!)")
    template = TEMPLATES.get(chat.template)

    def check(sample: Sample) -> None:
        ours = markers(bool(sample.videos))
        for message in sample.messages:
            text = ours.sub("\0", message.text)
            if found := special.search(text):
                raise UserError(
                    f"a text holds {found[0]!r}, which is a special token here and no text; write it otherwise, or "
                    'leave such samples out with bad = "skip"'
                )
        messages = sample.written_for(chat)
        pieces = render(chat, tokenizer, messages, generate=False)
        prompt = "".join(text for text, _ in pieces)
        if len(markers_in(chat, [prompt])) != len(sample.media):
            raise UserError(f"the template leaves out pictures or videos of {len(sample.media)}; use a built-in one")
        for number, message in enumerate(messages, 1):
            if template is not None and template.one_turn and message.role == "user":
                continue  # LLaVA's captions are learned without their question
            for text in split_at_markers(chat, message.text)[::2]:
                if text.strip() not in prompt:
                    raise UserError(
                        f"the template leaves out text of message {number}, {text.strip()[:40]!r}; use a built-in one"
                    )
        if not any(text.strip() for text, supervised in pieces if supervised):
            raise UserError("has no token to learn; remove the sample")

    return check
