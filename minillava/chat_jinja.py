"""A checkpoint's own chat template, in Jinja: rendered as transformers would, and cut into prompts and answers."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minillava.config import ChatConfig, UserError

if TYPE_CHECKING:
    from minillava.chat import Message


def checkpoint_segments(
    chat: ChatConfig, messages: Sequence[Message], generate: bool, special_tokens: Mapping[str, str]
) -> list[tuple[str, bool]]:
    """What `chat.segments` returns: an answer is what a turn adds behind its generation prompt.

    Blanks behind an answer belong to the next piece: a model is not taught to write them in place of its stop.
    A template that writes an earlier answer otherwise than it was prompted for (Qwen3 drops thoughts) has no such
    pieces: it can still be asked, with the whole prompt as one, but not trained.
    """
    import jinja2

    template, lists = _compiled(chat.jinja), _takes_lists(chat.jinja)
    names = {**special_tokens, "tools": None, "documents": None}

    def render(count: int, prompt: bool) -> str:
        content = (_content(m.text, chat) if lists else m.text for m in messages[:count])
        turns = [{"role": m.role, "content": c} for m, c in zip(messages, content)]
        try:
            return template.render(messages=turns, add_generation_prompt=prompt, **names)
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(
                f"the checkpoint's chat template fails: {error}; train or ask with a built-in template"
            ) from error

    pieces: list[tuple[str, bool]] = []
    done = ""
    whole = render(len(messages), generate)
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        opened, closed = render(number, True), render(number + 1, False)
        answer = closed[len(opened) :].rstrip()
        if not (opened.startswith(done) and closed.startswith(opened) and whole.startswith(opened + answer)):
            if generate:
                return [(whole, False)]
            raise UserError(
                f"the checkpoint's chat template renders message {number + 1} differently from its generation "
                "prompt, so a prompt would not be what was trained; use a built-in template"
            )
        pieces += [(opened[len(done) :], False), (answer, True)]
        done = opened + answer
    return [*pieces, (whole[len(done) :], False)] if generate else pieces


def _content(text: str, chat: ChatConfig) -> list[dict[str, str]]:
    """A message as multimodal checkpoints' templates expect it; the line break beside a picture is theirs to write."""
    parts: list[dict[str, str]] = []
    chunks = re.split("(" + "|".join(map(re.escape, chat.markers)) + ")", text)
    for number, chunk in enumerate(chunks):
        if number % 2:
            parts.append({"type": "image" if chunk == chat.image_token else "video"})
            continue
        chunk = chunk.removeprefix("\n") if number else chunk
        chunk = chunk.removesuffix("\n") if number < len(chunks) - 1 else chunk
        if chunk:
            parts.append({"type": "text", "text": chunk})
    return parts


@functools.lru_cache(maxsize=8)
def _takes_lists(template: str) -> bool:
    """Whether a template reads content as a list of parts: tried on a message, for templates do not say."""
    import jinja2

    probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
    try:
        text = _compiled(template).render(messages=probe, add_generation_prompt=False)
    except (jinja2.TemplateError, TypeError):
        return False
    return "probe" in text and "'type'" not in text and '"type"' not in text


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """The template in a sandbox that offers what transformers offers (its apply_chat_template)."""
    import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what the assistant wrote; here it is only rendered."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as it stands

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def strftime_now(layout: str) -> str:
        return datetime.datetime.now().strftime(layout)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"the checkpoint's chat template cannot be read: {error}") from error
