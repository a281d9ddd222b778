"""An answer, and how its ids become text while they come: piece by piece, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minillava.chat.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-probability, and the likeliest (id, log-probability) in its place."""

    id: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass
class Answer:
    text: str
    token_ids: list[int]  # new ones only, the one that ended the answer included
    prompt_tokens: int  # visual tokens included
    image_tokens: int
    finish_reason: str  # "stop": an eos token or a stop string; "length": max_new_tokens or the end of the context
    vision_s: float = 0.0  # through tower and projector: the pictures of all requests that entered together
    prefill_s: float = 0.0  # their prompts, up to the first token
    decode_s: float = 0.0  # from the first token to this answer's last
    token_s: float | None = None  # median time of one token after the first; None if there is none
    reused_tokens: int = 0  # of the prompt, that were computed for an earlier request
    logprobs: Sequence[TokenLogprob] = ()  # where they were asked for

    @property
    def decode_tok_per_s(self) -> float | None:
        """None for an answer of one token: nothing was decoded."""
        return (len(self.token_ids) - 1) / self.decode_s if len(self.token_ids) > 1 else None

    def __str__(self) -> str:
        return self.text


class AnswerText:
    """Ids in, text out, up to the first stop string. Text that may yet turn out to be one is held back."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], strip: bool):
        self.stream = StreamDecoder(tokenizer)
        self.stops = [stop for stop in stops if stop]
        self.strip = strip  # leave out blanks around the answer, as LLaVA's own scripts do
        self.text = ""
        self.waiting = ""
        self.stopped = False

    def push(self, id: int | None) -> str:
        """The text that is settled with this id; None is the end of the ids, which settles what was held back."""
        if self.stopped:
            return ""
        self.waiting += self.stream.push(id)
        found = [at for stop in self.stops if (at := self.waiting.find(stop)) >= 0]
        self.stopped = bool(found)
        end = id is None or self.stopped
        text = self.waiting[: min(found)] if found else self.waiting
        size = len(text)
        if not end:  # what can be shown whatever comes next
            for stop in self.stops:
                places = range(max(0, len(text) - len(stop) + 1), len(text))
                size = min(size, next((at for at in places if stop.startswith(text[at:])), size))
            size = len(text[:size].rstrip()) if self.strip else size
        self.waiting, text = text[size:], text[:size]
        if self.strip:
            text = text if self.text else text.lstrip()
            text = text.rstrip() if end else text
        self.text += text
        return text
