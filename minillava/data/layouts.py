"""What a row of a data set says, whatever its layout: turns as text with markers, and their pictures and videos.

By content alone: `conversations` or `messages` of from/value or role/content turns, whose content is a text or a list
of parts (LLaVA, ShareGPT, TRL, LLaMA-Factory, OpenAI); `texts` of user/assistant pairs (FineVision, the Cauldron);
`prompt` and `completion` (TRL); `instruction` and `output` behind `history` (Alpaca, LLaMA-Factory); a caption beside
pictures. Null is absent. Preferences have one prompt with a better and a worse answer, `chosen` and `rejected`: strings
(LLaVA-NeXT's train_dpo.py), or lists of messages (TRL), where the prompt may also stand in front of both; or
`conversations` or an `instruction` with chosen and rejected turns beside them (LLaMA-Factory).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from minillava.errors import UserError
from minillava.files import in_words, shown

MARKER = "<image>"  # stands for a picture, whatever the checkpoint's own placeholder is
VIDEO_MARKER = "<video>"  # stands for a video; LLaVA-Video's JSON has <image> there as well
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
Turn = tuple[str, str]  # role, text


@dataclass
class Content:
    """What a row says. Markers may be missing where `front` is set: pictures then go in front of the first question."""

    given: dict[str, deque[Any]]  # pictures and videos by marker: those of the columns that are not taken yet
    turns: list[Turn] = field(default_factory=list)
    media: dict[str, list[Any]] = field(default_factory=lambda: {MARKER: [], VIDEO_MARKER: []})  # in their order
    front: bool = True


def present(raw: dict[str, Any], *keys: str) -> Any:
    """The value of the first of these keys that is there and not null."""
    return next((raw[key] for key in keys if raw.get(key) is not None), None)


def read_row(raw: dict[str, Any]) -> Content:
    """The turns of a row and what stands in its columns of pictures and videos. Raises UserError."""
    if raw.get("kto_tag") is False or (raw.get("label") is False and raw.get("completion") is not None):
        raise UserError(
            "an answer that was judged to be bad (TRL's and LLaMA-Factory's KTO) would be learned; remove it"
        )
    found = Content({MARKER: deque(media_in(raw, "image")), VIDEO_MARKER: deque(media_in(raw, "video"))})
    turns = present(raw, "conversations", "messages", "conversation")
    if turns is not None:
        if not isinstance(turns, list):
            raise UserError(f"'conversations' must be a list of turns, got {in_words(turns)}; correct it")
        found.front = any(isinstance(turn, dict) and turn.get("content") is not None for turn in turns)
        found.turns = [read_turn(turn, found) for turn in turns]
    elif isinstance(raw.get("texts"), list):
        found.turns = [turn for pair in raw["texts"] for turn in read_pair(pair, found)]
    elif raw.get("prompt") is not None and raw.get("completion") is not None:
        found.turns = read_completion(raw["prompt"], raw["completion"], found)
    else:
        found.turns = read_flat(raw, found)
    system = raw.get("system")
    if isinstance(system, str) and system and found.turns[:1] and found.turns[0][0] != "system":
        found.turns.insert(0, ("system", system))
    for marker, rest in found.given.items():
        found.media[marker] += rest
    return found


def media_in(raw: dict[str, Any], key: str) -> list[Any]:
    """The values under `image` or `images`. Raises UserError where both say something else."""
    one, several = raw.get(key), raw.get(f"{key}s")
    if one and several and several != [one] and one != several:
        raise UserError(f"has both '{key}' and '{key}s'; leave one of them out")
    values = one if one or several is None else several
    values = [] if values is None else values if isinstance(values, list) else [values]
    if any(value is None or value == "" for value in values):
        raise UserError(f"'{key}' must be a path or a list of paths; correct it")
    return values


def read_turn(turn: Any, found: Content) -> Turn:
    """A from/value or role/content turn."""
    if not isinstance(turn, dict):
        raise UserError(f"a turn must be an object with 'from' and 'value', got {in_words(turn)}; correct it")
    role = present(turn, "from", "role")
    if not isinstance(role, str) or role not in ROLES:
        raise Counted("role errors", f"unknown role {shown(role)}; use human and gpt, or user and assistant")
    return ROLES[role], read_text(present(turn, "value", "content"), found)


class Counted(UserError):
    """A mistake of a kind that reports count, by its name in `llava_json.COUNTED`."""

    def __init__(self, counted: str, message: str):
        super().__init__(message)
        self.counted = counted


def read_pair(pair: Any, found: Content) -> list[Turn]:
    """A question and its answer as FineVision has them."""
    if not isinstance(pair, dict) or not {"user", "assistant"} <= pair.keys():
        raise UserError(
            f"'texts' must be a list of objects with 'user' and 'assistant', got {in_words(pair)}; correct it"
        )
    return [(role, read_text(pair[role], found)) for role in ("user", "assistant")]


def read_completion(prompt: Any, completion: Any, found: Content) -> list[Turn]:
    """TRL's prompt and completion: texts, or messages. Only the completion is trained, so the prompt has no answers."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return [("user", read_text(prompt, found)), ("assistant", read_text(completion, found))]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise UserError("'prompt' and 'completion' must both be texts or both be messages; correct it")
    turns = [read_turn(turn, found) for turn in prompt]
    if any(role == "assistant" for role, _ in turns):
        raise UserError("'prompt' has an answer in it, which would be trained; give 'messages' to train all answers")
    return turns + [read_turn(turn, found) for turn in completion]


def read_flat(raw: dict[str, Any], found: Content) -> list[Turn]:
    """Instruction, input and output, question and answer, or a caption beside pictures."""
    asked, answer = asked_in(raw), present(raw, "output", "answer")
    if isinstance(asked, str) and isinstance(answer, str):
        return [read_turn(turn, found) for turn in [*history_in(raw), *pair_of(asked, answer)]]
    caption = present(raw, "caption", "text", "txt")
    if isinstance(caption, str) and found.given[MARKER]:
        return [("user", ""), ("assistant", read_text(caption, found))]
    raise UserError("'conversations' must be a list of turns, got nothing; correct it")


def asked_in(raw: dict[str, Any]) -> Any:
    """An instruction and its input, or a question."""
    asked, more = present(raw, "instruction", "question"), raw.get("input")
    return f"{asked}\n{more}" if isinstance(asked, str) and isinstance(more, str) and more else asked


def history_in(raw: dict[str, Any]) -> list[Any]:
    """LLaMA-Factory's earlier turns, a list of questions with their answers. Raises UserError."""
    pairs = raw.get("history") or []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise UserError(f"'history' must be a list of [question, answer], got {in_words(pair)} in it; correct it")
    return [turn for pair in pairs for turn in pair_of(*pair)]


def pair_of(asked: Any, answer: Any) -> list[Any]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def read_text(content: Any, found: Content) -> str:
    """A text with its markers, and what it takes of the columns or brings itself put behind what `found` has."""
    if isinstance(content, str):
        return take(content, found)
    if not isinstance(content, list):
        raise UserError(
            f"the text of a turn must be a string, got {in_words(content)}; correct it (datasets' map() writes mixed "
            "types as JSON, in which the text 007 becomes the number 7)"
        )
    text = ""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for number, part in enumerate(parts):
        if not isinstance(part, dict):
            raise UserError(f"a part of a turn must be an object with 'type', got {in_words(part)}; correct it")
        text += read_part(part, found, last=number == len(parts) - 1)
    return text


def read_part(part: dict[str, Any], found: Content, last: bool) -> str:
    """A text, or a marker for a picture or video that the part brings or the row has; on a line of its own."""
    name = part.get("type") or next((key for key in ("text", "image", "image_url", "video") if part.get(key)), None)
    if name in ("text", "input_text", "output_text"):
        if not isinstance(part.get("text"), str):
            raise UserError(
                f"the text of a part must be a string, got {in_words(part.get('text'))}; correct it (datasets' map() "
                "writes mixed types as JSON, in which the text 007 becomes the number 7)"
            )
        return take(part["text"], found)
    if name in ("image", "image_url", "input_image"):
        marker, value = MARKER, present(part, "image", "image_url", "url", "path", "base64", "bytes")
    elif name in ("video", "video_url"):
        marker, value = VIDEO_MARKER, present(part, "video", "video_url", "url", "path")
    else:
        raise UserError(f"a part of type {name!r}; use text, image, image_url or video")
    if value is None:
        take(marker, found)
    else:
        found.media[marker].append(value)
    return marker if last else f"{marker}\n"


def take(text: str, found: Content) -> str:
    """The text, once the columns' next pictures have been taken for its markers; missing ones are found out later."""
    for marker, values in found.media.items():
        for _ in range(min(text.count(marker), len(found.given[marker]))):
            values.append(found.given[marker].popleft())
    return text


# ---- preferences ----


def preference(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Of a preference, the row with the conversation that ends with the better answer, and with the worse one."""
    if raw.get("chosen") is None and raw.get("rejected") is None:
        return None
    answers = [_answer(raw.get(key), key) for key in ("chosen", "rejected")]
    turns = present(raw, "conversations", "messages")
    prompt = present(raw, "prompt") if turns is None else turns
    prompt = asked_in(raw) if prompt is None else prompt
    if prompt is not None and not isinstance(prompt, str | list):
        raise UserError("'prompt' must be a string or a list of messages; correct it")
    opening = _opening(prompt or [])
    if opening and all(_opening(answer)[-len(opening) :] == opening for answer in answers):
        prompt = None  # it stands in front of both (ultrafeedback_binarized has it there, and the better in messages)
    if isinstance(prompt, str):
        prompt = [*history_in(raw), {"role": "user", "content": prompt}]
    better, worse = (raw | {"conversations": [*(prompt or []), *answer]} for answer in answers)
    return better, worse


def _opening(turns: str | list[Any]) -> list[tuple[Any, Any]]:
    """Role and text of the turns up to the first question, as they are written; none where nothing is asked."""
    found: list[tuple[Any, Any]] = [("user", turns)] if isinstance(turns, str) else []
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict):
            found.append((ROLES.get(str(present(turn, "from", "role"))), present(turn, "value", "content")))
            if found[-1][0] == "user":
                return found
    return found if isinstance(turns, str) else []


def _answer(value: Any, key: str) -> list[Any]:
    """An answer, or the messages that end with it, as turns."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns:
        raise UserError(f"'{key}' must be an answer or messages that end with one; correct it")
    return turns
