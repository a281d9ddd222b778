"""The turns of a conversation and the order that they have to be in; as OpenAI and Hugging Face write them: dicts whose
content is a text, or texts, pictures and clips."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minillava.config import ChatConfig
from minillava.errors import UserError
from minillava.files import shown

Source = tuple[bool, Any]  # whether it is a clip; a file, a URL, a picture, ..., None: what comes beside the messages


@dataclass(frozen=True)
class Message:
    """One turn. `text` holds ChatConfig.image_token wherever a picture goes, and video_token for a clip."""

    role: str  # user, assistant or system (first only, in place of the template's own)
    text: str


def split_at_markers(chat: ChatConfig, text: str) -> list[str]:
    """text, marker, text, marker, ..., text."""
    return re.split("(" + "|".join(map(re.escape, chat.markers)) + ")", text)


def marker_of(chat: ChatConfig, video: bool) -> str:
    """What stands for a picture or clip in a text; it may be the same for both."""
    return (chat.video_token if video else "") or chat.image_token


def check_roles(messages: Sequence[Message], generate: bool) -> None:
    """Raises UserError unless it is [system], user, assistant, user, ..., up to where the model writes or wrote."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            at = number + 1 + len(messages) - len(turns)
            raise UserError(
                f"message {at} is from '{message.role}', but it is the turn of '{expected}'; put them in order"
            )
    last = "user" if generate else "assistant"
    if not turns or turns[-1].role != last:
        found = f"ends with '{turns[-1].role}'" if turns else "is empty"
        raise UserError(f"the conversation {found}, but its last message has to be from '{last}'; correct it")


# ---- as others write them ----


def read_messages(chat: ChatConfig, given: Sequence[Message | Mapping[str, Any]]) -> tuple[list[Message], list[Source]]:
    """The messages, and pictures and clips in their order. A part stands where it is among the texts; if a text says
    itself where they go, by markers, it is believed. A Message stays. Raises UserError that names the message.
    """
    messages, sources = [], []
    for number, entry in enumerate(given, 1):
        try:
            message, found = _message(chat, entry)
        except UserError as error:
            raise UserError(f"message {number}: {error}") from None
        messages.append(message)
        sources += found
    return messages, sources


def _message(chat: ChatConfig, entry: Any) -> tuple[Message, list[Source]]:
    if isinstance(entry, Message):
        return entry, []
    if not isinstance(entry, Mapping) or not isinstance(role := entry.get("role"), str):
        raise UserError("expected an object with 'role' and 'content'")
    role = "system" if role == "developer" else role  # OpenAI's newer name
    if role not in ("system", "user", "assistant"):
        raise UserError(f"role '{role}' is unknown (known: system, user, assistant)")
    content = entry.get("content")
    if isinstance(content, str):
        return Message(role, content), []
    if not isinstance(content, Sequence) or not content:
        raise UserError("'content': expected a text or a list of parts")
    parts = [_part(part) for part in content]
    sources = [part for part in parts if not isinstance(part, str)]
    texts = [part for part in parts if isinstance(part, str)]
    if sources and role != "user":
        raise UserError(f"pictures are a user's, but the role is '{role}'; leave them out")
    if len(split_at_markers(chat, "".join(texts))) > 1:
        return Message(role, "".join(texts)), sources
    written = "".join(part if isinstance(part, str) else f"{marker_of(chat, part[0])}\n" for part in parts)
    return Message(role, written if isinstance(parts[-1], str) else written.removesuffix("\n")), sources


def _part(part: Any) -> str | Source:
    """A text, or where a picture or clip comes from."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text") and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("image_url", "input_image", "video_url"):
        url = part.get(kind) if kind != "input_image" else part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if isinstance(url, str):
            return kind == "video_url", url
    if kind in ("image", "video"):
        for key in (kind, "url", "path"):
            if (source := part.get(key)) is not None:
                return kind == "video", source
        if not any(value is not None for key, value in part.items() if key != "type"):  # they come beside the messages
            return kind == "video", None
    raise UserError(
        f"a part of type {shown(kind)} is unknown or lacks its content (known: text, image_url, image, video)"
    )
