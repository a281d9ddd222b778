"""A checkpoint's own chat template, in Jinja: rendered as transformers would, and cut into prompts and answers.

Jinja's sandbox keeps a template from files, not from loops without end or from all memory, and only a process can be
stopped in the middle of those. So one renders, which takes 0.1 s to start and then 0.5 ms more a prompt.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from minillava.chat.messages import Message, split_at_markers
from minillava.config import ChatConfig
from minillava.errors import UserError

RENDER_S = 10.0  # for a prompt; they take a millisecond
MAX_CHARS = 1 << 24  # of a prompt
MEMORY = 1 << 30  # bytes of the process that renders


def render_jinja(
    chat: ChatConfig, messages: Sequence[Message], generate: bool, special_tokens: Mapping[str, str]
) -> list[tuple[str, bool]]:
    """What `prompt.render` returns: an answer is what a turn adds behind its generation prompt.

    Blanks behind an answer belong to the next piece: a model does not learn to write them in place of its stop.
    Where a template writes an earlier answer otherwise than after its generation prompt (Qwen3 drops thoughts) there
    are no such pieces: the model answers, with the whole prompt as one piece, but cannot be trained.
    """
    names = {**special_tokens, "tools": None, "documents": None}
    lists = _takes_lists(chat.jinja, tuple(names.items()))

    def render(count: int, prompt: bool) -> str:
        content = (_content(m.text, chat) if lists else m.text for m in messages[:count])
        turns = [{"role": m.role, "content": c} for m, c in zip(messages, content)]
        answer = _renderer(os.getpid()).ask(chat.jinja, **names, messages=turns, add_generation_prompt=prompt)
        if "error" in answer:
            raise UserError(f"the checkpoint's chat template {answer['error']}; train or ask with a built-in template")
        return answer["text"]

    pieces: list[tuple[str, bool]] = []
    done = ""
    whole = render(len(messages), generate)
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        # What stands in front of the answer, and all up to its end: both have to be how the whole prompt begins.
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
    chunks = split_at_markers(chat, text)
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
def _takes_lists(template: str, names: tuple[tuple[str, Any], ...]) -> bool:
    """Whether a template reads content as a list of parts: tried on a message, for templates do not say."""
    probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
    answer = _renderer(os.getpid()).ask(template, **dict(names), messages=probe, add_generation_prompt=False)
    text = answer.get("text", "")
    return "probe" in text and "'type'" not in text and '"type"' not in text


class Renderer:
    """The process that renders, as it is seen from here: started when it is needed, and again where it was stopped."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: Any = None

    def ask(self, template: str, **names: Any) -> dict[str, str]:
        """The "text" or the "error" of a template with these names. Raises UserError where it takes too much."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:  # the system may have stopped it
                self._start()
            late = threading.Timer(RENDER_S, self.process.kill)
            late.start()
            answer = b""
            try:
                with contextlib.suppress(BrokenPipeError):
                    self.process.stdin.write(json.dumps([template, names]).encode() + b"\n")
                    self.process.stdin.flush()
                answer = self.process.stdout.readline()
            finally:
                late.cancel()
                if not answer.endswith(b"\n"):  # also after Ctrl-C: the next one must not get this one's answer
                    self.end()
        if not answer.endswith(b"\n"):
            raise UserError(
                f"the checkpoint's chat template takes more than {RENDER_S:g} s, or too much memory; "
                "train or ask with a built-in template"
            )
        return json.loads(answer)

    def _start(self) -> None:
        limits = f"{MAX_CHARS}, {MEMORY}"
        code = f"import sys; sys.path[:] = {sys.path!r}; from minillava.chat import jinja; jinja.serve({limits})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C, which stops an answer, does not stop it
        )  # fmt: skip
        self.process.stdout.readline()  # it is ready

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.process = None


@functools.cache
def _renderer(process: int) -> Renderer:
    """That of a process: workers have their own."""
    return Renderer()


# ---- in the process that renders ----


def serve(most_chars: int, memory: int) -> None:
    """Answer requests, a line of JSON each, until stdin ends."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows, macOS
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print(flush=True)
    for line in sys.stdin:
        template, names = json.loads(line)
        print(json.dumps(_rendered(template, names, most_chars)), flush=True)


def _rendered(template: str, names: Mapping[str, Any], most_chars: int) -> dict[str, str]:
    """The text, or what is wrong with the template, in words."""
    import jinja2

    what, pieces, length = "cannot be read", [], 0
    try:
        compiled = _compiled(template)
        what = "fails"
        for piece in compiled.generate(**names):
            pieces.append(piece)
            length += len(piece)
            if length > most_chars:
                raise jinja2.TemplateError(f"it writes more than {most_chars:,} characters")
    except Exception as error:  # noqa: BLE001 a template may raise anything
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        return {"error": f"{what}: {kind}{' '.join(str(error).split())[:300]}"}
    return {"text": "".join(pieces)}


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

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return environment.from_string(template)
