"""A conversation: pictures are seen once, and of each new prompt only what is new is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from minillava.chat.messages import Message
from minillava.generation.answer import Answer
from minillava.generation.engine import Engine, Request
from minillava.generation.sampling import GREEDY, Sampling
from minillava.generation.slots import Slots
from minillava.media.visual import Media, Visual
from minillava.processor import user_message


class Conversation:
    """Turns about pictures that stay: they are seen once, and of each new prompt only what is new is computed."""

    def __init__(self, engine: Engine, media: Sequence[Media] = ()):
        self.engine, self.media, self.new = engine, list(media), list(media)  # new: what the next question shows
        self.opened: dict[object, Visual] = {}
        self.messages: list[Message] = []
        self.slots: Slots | None = None
        self.cached_ids: list[int] = []  # that the slot holds
        self.prefilled_tokens = 0  # computed, not taken from the cache, for the last prompt

    def show(self, media: Media) -> None:
        """A picture or clip for the next question, which stays from then on."""
        self.media.append(media)
        self.new.append(media)

    def ask(
        self,
        question: str,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 512,
        on_text: Callable[[int, str], None] | None = None,
        stop: Sequence[str] = (),
    ) -> Answer:
        """The answer to one more question. If it is interrupted, the conversation is as it was before."""
        engine = self.engine
        messages = [*self.messages, user_message(engine.config.chat, question, self.new)]
        request = Request(messages, self.media, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)
        row = engine.row(0, request, self.opened)
        same = 0  # the answer's ids are made from its text again, and may differ from those that were sampled
        while same < min(len(self.cached_ids), len(row.ids) - 1) and self.cached_ids[same] == row.ids[same]:
            same += 1
        row.cached, self.cached_ids = same, self.cached_ids[:same]  # what is interrupted is not lost beyond this
        self.prefilled_tokens = len(row.ids) - same
        for _, piece in engine.stream([row], self._room(len(row.ids) + row.limit)):
            if on_text is not None:
                on_text(0, piece)
        answer = engine.answer(row)
        self.cached_ids = [*row.ids, *answer.token_ids[:-1]]
        self.messages, self.new = [*messages, Message("assistant", answer.text)], []
        return answer

    @torch.inference_mode()
    def _room(self, capacity: int) -> Slots:
        """Slots for so many tokens, the old ones while they last: at least twice as large, so that few are made."""
        old = self.slots
        if old is None or old.capacity < capacity:
            context = self.engine.config.decoder.max_positions
            self.slots = self.engine.new_slots(1, max(capacity, min(2 * capacity, context)))
            if old is not None:
                n = len(self.cached_ids)
                self.slots.cache.k_LBSGK[:, :, :n] = old.cache.k_LBSGK[:, :, :n]
                self.slots.cache.v_LBSGK[:, :, :n] = old.cache.v_LBSGK[:, :, :n]
        assert self.slots is not None
        return self.slots
