"""How likely given answers are: log-probabilities of choices behind one prompt, which is computed once.

Letters: B choices, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from minillava.chat.messages import Message
from minillava.chat.tokenizer import StreamDecoder
from minillava.errors import UserError
from minillava.generation.engine import Engine
from minillava.generation.request import Request
from minillava.layers.cache import KVCache
from minillava.llava import passes

PASS_TOKENS = 512  # of choices computed together: each has logits of the whole vocabulary
PASS_CHOICES = 32  # each has a copy of the prompt's keys and values


@dataclass(frozen=True)
class Choice:
    """An answer that was given, and the log-probability of each of its tokens; what would end the answer is not one."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def logprob(self) -> float:
        """Of the whole text."""
        return sum(self.logprobs)


@torch.inference_mode()
def score(engine: Engine, request: Request, choices: Sequence[str]) -> list[Choice]:
    """Log-probabilities of each choice as the answer to `request`, in order; how it samples and ends is not asked.

    Behind messages a choice is written as the template writes an answer; behind a raw prompt it is continued as it is.
    Raises UserError for no choices, one that is empty or does not fit the context, and as `Engine.row` does.
    """
    if not choices:
        raise UserError("there are no choices to score; give one or more")
    opened: dict[object, Any] = {}
    row = engine.row(0, replace(request, max_new_tokens=1), opened)
    ids = [_answer_ids(engine, request, text, row.ids, opened) for text in choices]
    longest, context = max(map(len, ids)), engine.config.decoder.max_positions
    if len(row.ids) + longest > context:
        raise UserError(f"the prompt of {len(row.ids)} tokens and a choice of {longest} do not fit {context}; shorten")
    visual = engine.see(row.pictures)
    like = engine.model.decoder.embed.weight
    rows, at = min(len(choices), PASS_CHOICES), len(row.ids) - 1  # the prompt's last token goes with each choice
    cache = KVCache(engine.config.decoder, rows, at + longest, like.device, like.dtype)
    found: list[Choice] = []
    if at:
        engine.model(torch.tensor(row.ids[:-1], device=like.device), visual=visual, cache=cache, last_only=True)
        for slot in range(1, rows):
            cache.move(slot, 0, at)
    for part in passes(list(map(len, ids)), PASS_TOKENS, rows):
        for slot in range(len(ids[part])):
            cache.keep(slot, at)
        logprobs = _logprobs(engine, cache, [[row.ids[-1], *answer] for answer in ids[part]])
        found += [Choice(*choice) for choice in zip(choices[part], map(tuple, ids[part]), logprobs)]
    return found


def _logprobs(engine: Engine, cache: KVCache, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
    """Of every token but the first of each sequence, which continues a slot of its own."""
    device = cache.k_LBSGK.device
    bounds = list(accumulate((len(ids) - 1 for ids in sequences), initial=0))
    before_T, after_T = (
        torch.tensor([id for ids in sequences for id in ids[part]], device=device)
        for part in (slice(0, -1), slice(1, None))
    )
    logits_TV = engine.model(before_T, cache=cache, cu_seqlens=bounds, slots=range(len(sequences)))
    logprobs_T = logits_TV.float().log_softmax(-1).gather(1, after_T[:, None]).squeeze(1)
    return [tuple(part_T.tolist()) for part_T in logprobs_T.split([len(ids) - 1 for ids in sequences])]


def _answer_ids(engine: Engine, request: Request, text: str, prompt: list[int], opened: dict) -> list[int]:
    """The tokens of this choice behind the prompt, up to the last that has a part of the text."""
    if not text.strip():
        raise UserError("a choice is empty; give its text")
    if request.raw is not None:
        return engine.tokenizer.encode(text, False)
    if request.prompt_ids is not None:
        raise UserError("choices are scored behind messages or a raw prompt, not behind ids")
    messages = [*request.messages, Message("assistant", text)]
    ids = engine.processor(messages, request.media, opened=opened).ids
    if ids[: len(prompt)] != prompt:
        raise UserError("the chat template writes answers otherwise than it asks for them; score a raw prompt")
    stream, found = StreamDecoder(engine.tokenizer), ""
    for end in range(len(prompt), len(ids)):
        found += stream.push(ids[end])
        if text.strip() in found:
            return ids[len(prompt) : end + 1]
    raise UserError(f"the choice {text!r:.60} is written in other characters by the tokenizer")
