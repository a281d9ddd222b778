"""Preferences: one prompt with a better and a worse answer, in the layouts that data sets have them in.

prompt, chosen and rejected are strings (LLaVA-NeXT's train_dpo.py), or lists of messages (TRL), where the prompt may
also stand in front of both answers; or `conversations` with chosen and rejected turns beside them (LLaMA-Factory).
"""

from __future__ import annotations

from typing import Any

from minillava.data.layouts import present
from minillava.errors import UserError


def as_conversations(raw: dict[str, Any], marker: str, media: int) -> tuple[Any, list[Any] | None]:
    """The turns of a sample and, if it is a preference, those that end with the worse answer.

    A prompt that is a string without markers gets `marker` for each of its `media` in front, a line each.
    """
    turns = present(raw, "conversations", "messages")
    if raw.get("chosen") is None and raw.get("rejected") is None:
        return turns, None
    prompt = present(raw, "prompt", "question") if turns is None else turns
    if isinstance(prompt, str):
        front = f"{marker}\n" * media if marker not in prompt else ""
        prompt = [{"role": "user", "content": front + prompt}]
    better, worse = (_answer(raw.get(key), key) for key in ("chosen", "rejected"))
    if prompt is not None and not isinstance(prompt, list):
        raise UserError("'prompt' must be a string or a list of messages; correct it")
    return [*(prompt or []), *better], [*(prompt or []), *worse]


def _answer(value: Any, key: str) -> list[Any]:
    """An answer, or the messages that end with it, as turns."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns:
        raise UserError(f"'{key}' must be an answer or messages that end with one; correct it")
    return turns
