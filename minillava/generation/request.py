"""What is asked, `Request`, and what becomes of it on its way through the engine, `Row`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from minillava.chat.messages import Message
from minillava.generation.answer import AnswerText, TokenLogprob
from minillava.generation.sampling import GREEDY, Sampling
from minillava.media.visual import Media, Visual


class Grammar(Protocol):
    """What an answer may be, token by token."""

    def allowed(self) -> Tensor:
        """Which ids may come next, [V] of bool on the CPU."""

    def advance(self, id: int) -> None:
        """The next id has come."""


@dataclass(frozen=True)
class Request:
    """One prompt: messages for the model's own template, or a finished one: text (`raw`) or ids, pictures expanded."""

    messages: Sequence[Message] = ()
    media: Sequence[Media] = ()  # pictures and clips, in the order that `Processor` says
    raw: str | None = None
    prompt_ids: Sequence[int] | None = None
    max_new_tokens: int = 512
    sampling: Sampling = GREEDY
    name: str = ""  # how an error calls it
    stop: Sequence[str] = ()  # texts that end the answer, besides the checkpoint's
    logprobs: int | None = None  # log-probabilities of each token, and of so many likeliest ones in its place
    grammar: Grammar | None = None  # used up by one answer


@dataclass(eq=False)  # two are never the same, whatever they ask
class Row:
    """A request on its way through the engine."""

    index: int
    ids: list[int]
    pictures: list[Visual]  # and clips, in the order of their placeholders
    limit: int  # new tokens at most, the context's bound included
    sampling: Sampling
    text: AnswerText
    logprobs: int | None = None
    grammar: Grammar | None = None
    token_ids: list[int] = field(default_factory=list)
    token_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""
    cached: int = 0  # tokens of the prompt that are in its slot already
    reused: int = 0  # of them, those that were computed for other requests
    picture_keys: list[tuple[bytes, int]] = field(default_factory=list)  # and visual tokens, where a Memory keeps them
    block_keys: list[bytes] = field(default_factory=list)  # of the whole blocks of the prompt
    vision_s: float = 0.0
    prefill_s: float = 0.0
    times: list[float] = field(default_factory=list)  # when each token came

    def accept(self, id: int, eos_ids: frozenset[int]) -> str:
        """Take one more token; returns the text that it settles. Sets `finish_reason` if the answer ends with it."""
        self.token_ids.append(id)
        self.times.append(time.perf_counter())
        piece = "" if id in eos_ids else self.text.push(id)
        if id in eos_ids or self.text.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.limit:
            self.finish_reason = "length"
        return piece + self.text.push(None) if self.finish_reason else piece

    def record(self, id: int, logits_V: Tensor, most: int) -> None:
        """Keep the log-probability of the token that came, and of the `most` likeliest ones."""
        logprobs_V = logits_V.float().log_softmax(-1)
        values, ids = logprobs_V.topk(min(most, len(logprobs_V)))
        likeliest = tuple(zip(ids.tolist(), values.tolist()))
        self.token_logprobs.append(TokenLogprob(id, float(logprobs_V[id]), likeliest))
