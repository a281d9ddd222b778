"""Prompts, pictures and clips in the forms that people have them in, as requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minillava.chat.messages import Message, read_messages
from minillava.config import ChatConfig
from minillava.errors import UserError
from minillava.generation.request import Request
from minillava.media.sources import OwnSources, one_or_more
from minillava.media.visual import Media
from minillava.processor import user_message

Prompt = str | Sequence[Message | Mapping[str, Any]]


def is_batch(prompt: Any) -> bool:
    """Whether these are several prompts: texts, or conversations."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and not isinstance(next(iter(prompt), Message), type | Message | Mapping)
    )


def requests_of(
    chat: ChatConfig, prompt: Any, images: Any, videos: Any, sources: OwnSources, how: Request
) -> list[Request]:
    """A request for each prompt, which samples with the next seed. Of several `images` and `videos` have an entry for
    each prompt (one, several, or None), or are one that all are about. Raises UserError that says which prompt."""
    if not is_batch(prompt):
        return [request_of(chat, prompt, images, videos, sources, how)]
    found = []
    shown = zip(_for_each(prompt, images, "images"), _for_each(prompt, videos, "videos"))
    for number, (one, (some, clips)) in enumerate(zip(prompt, shown)):
        name, sampling = f"prompt {number + 1}", replace(how.sampling, seed=how.sampling.seed + number)
        try:
            request = request_of(chat, one, some, clips, sources, replace(how, sampling=sampling, name=name))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        found.append(request)
    return found


def _for_each(prompts: Sequence[Prompt], given: Any, what: str) -> Sequence[Any]:
    if not isinstance(given, list | tuple):
        return [given] * len(prompts)
    if given and len(given) != len(prompts):
        raise UserError(f"there are {len(prompts)} prompts, but {len(given)} {what}; give an entry for each prompt")
    return given or [None] * len(prompts)


def request_of(
    chat: ChatConfig, prompt: Prompt, images: Any, videos: Any, sources: OwnSources, how: Request
) -> Request:
    """`how` with this prompt: a text (the whole prompt where how.raw is not None) or messages. Pictures stand where it
    says, or else in front of the first message of a user."""
    pictures = [sources.open(source, False, n) for n, source in enumerate(one_or_more(images), 1)]
    clips = [sources.open(source, True, n) for n, source in enumerate(one_or_more(videos), 1)]
    given: list[Media] = [*pictures, *clips]
    if isinstance(prompt, str):
        if how.raw is not None:
            return replace(how, raw=prompt, media=given)
        return replace(how, messages=[user_message(chat, prompt, given)], media=given)
    if how.raw is not None:
        raise UserError("a raw prompt is one text; leave raw out for messages")
    messages, parts = read_messages(chat, [prompt] if isinstance(prompt, Message | Mapping) else prompt)
    media, left = _in_order(parts, pictures, clips, sources)
    first = next((n for n, message in enumerate(messages) if message.role == "user"), None)
    if left and first is not None and not any(marker in m.text for m in messages for marker in chat.markers):
        messages[first] = user_message(chat, messages[first].text, left)
    return replace(how, messages=messages, media=[*media, *left])


def _in_order(
    parts: Sequence[tuple[bool, Any]], pictures: list[Media], clips: list[Media], sources: OwnSources
) -> tuple[list[Media], list[Media]]:
    """What the parts of messages show, those without a source of their own from what came beside; and what is left."""
    waiting, media = {False: [*pictures], True: [*clips]}, []
    for number, (video, source) in enumerate(parts, 1):
        if source is None and not waiting[video]:
            raise UserError(
                f"there are more {'videos' if video else 'pictures'} in the messages than were given; give them"
            )
        media.append(waiting[video].pop(0) if source is None else sources.open(source, video, number))
    return media, [*waiting[False], *waiting[True]]
