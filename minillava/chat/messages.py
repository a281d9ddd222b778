"""The turns of a conversation, and the order that they have to be in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from minillava.config import ChatConfig
from minillava.errors import UserError


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
