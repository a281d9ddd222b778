"""The loop of generation: requests come while others are being answered, and leave when they have stopped.

Rows wait in order of arrival. A step is one packed pass over the next prompts, up to `chunk` tokens of them, so that a
long one does not stall the others, and one more token for every row behind its prompt (continuous batching: Orca, OSDI
2022; chunked prefill: Sarathi, arXiv 2308.16369). With a Memory, pictures and prefixes are not computed twice.
Letters: B rows, T tokens of all rows together, D width, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from minillava.generation.memory import BLOCK, Memory
from minillava.generation.request import Request, Row
from minillava.generation.slots import Slots
from minillava.media.visual import Visual

if TYPE_CHECKING:
    from minillava.generation.engine import Engine

Event = tuple[Row, str]  # all text that came for a row in a step, possibly none
Span = tuple[Row, int, int]  # tokens from the first number to the second of a row's prompt


@dataclass(frozen=True)
class Limits:
    """What requests that come one after another get."""

    slots: int = 16  # answered at once
    context: int = 4096  # tokens of a request, prompt and answer, at most
    waiting: int = 240  # requests beyond those, before a server refuses more
    chunk: int = 512  # prompt tokens of a step: what others wait for between two tokens
    cache_bytes: int = 4 << 30  # keys and values in slots; as few slots as fit, but one
    prefix_bytes: int = 1 << 30  # keys and values of earlier prompts and answers
    picture_bytes: int = 256 << 20  # visual tokens of earlier pictures


class Scheduler:
    """Rows on their way through one model's slots. One thread calls it."""

    def __init__(self, engine: Engine, slots: Slots, chunk: int, memory: Memory | None = None):
        self.engine, self.slots, self.chunk, self.memory = engine, slots, chunk, memory
        self.waiting: deque[Row] = deque()
        self.live: list[Row] = []  # live[i] is in slot i
        self.entering: Row | None = None  # in the slot behind them, with part of its prompt
        self.prefilled_tokens = 0  # computed, of all prompts so far
        self._said: dict[int, Event] = {}  # in this step, by id of the row

    @classmethod
    @torch.inference_mode()
    def of(cls, engine: Engine, limits: Limits) -> Self:
        """One with slots and a memory of this size."""
        context = min(limits.context, engine.config.decoder.max_positions)
        rows = max(1, min(limits.slots, limits.cache_bytes // (context * engine.cache_bytes())))
        slots = engine.new_slots(rows, context)
        memory = Memory(engine.processor.placeholders, slots.cache, limits.prefix_bytes, limits.picture_bytes)
        return cls(engine, slots, limits.chunk, memory)

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.waiting or self.live or self.entering)

    def row(self, request: Request) -> Row:
        """Check a request and make its ids, and what the memory knows it by; on any thread. Raises as `Engine.row`."""
        row = self.engine.row(0, request, {}, self.slots.capacity)
        if self.memory is not None:
            self.memory.describe(row)
        return row

    def submit(self, row: Row) -> None:
        """The row waits for its turn. Raises ValueError if it can never have one."""
        if len(row.ids) + row.limit > self.slots.capacity:
            raise ValueError(f"{len(row.ids)} + {row.limit} tokens do not fit a slot of {self.slots.capacity}")
        self.waiting.append(row)

    def cancel(self, row: Row) -> None:
        """Nobody wants this answer any more; its slot is free from the next step on."""
        if row.finish_reason:
            return
        row.finish_reason = "cancelled"
        if row is self.entering:
            self.entering = None
        elif row in self.waiting:
            self.waiting.remove(row)

    def end(self) -> None:
        """There will be no more steps."""

    @torch.inference_mode()
    def abandon(self) -> None:
        """Forget all rows, after a step that failed."""
        self.waiting.clear()
        self.live.clear()
        self.entering = None
        self.slots.pending.clear()
        self.slots.cache.live_B.zero_()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """A part of the prompts, and one more token for each row behind its own."""
        self._said = {}
        if any(row.finish_reason for row in self.live):  # cancelled
            self._leave()
        if self.entering or (self.waiting and len(self.live) < self.slots.rows):
            self._leave()
            self._prefill()
        # On a GPU the host is a step behind: it reads the tokens of one while the next is computed, unless one of the
        # rows needs more than that before the next.
        if self.live and not any(row.finish_reason for row in self.live):
            self.slots.launch(len(self.live))
            watched = any(row.logprobs is not None or row.grammar is not None for row in self.live)
            lag = 0 if watched else self.slots.lag
            while len(self.slots.pending) > lag:
                self._accept(self.slots.take())
        if any(row.finish_reason for row in self.live):
            self._leave()
        return list(self._said.values())

    # ---- tokens ----

    def _accept(self, ids: Sequence[int], start: int = 0) -> None:
        """The next tokens of the rows in slots `start` and on."""
        logits_BV = self.slots.logits_BV
        for slot, token in enumerate(ids, start):
            row = self.live[slot]
            if row.finish_reason:
                continue
            if row.logprobs is not None and logits_BV is not None:
                row.record(token, logits_BV[slot - start], row.logprobs)
            _, text = self._said.get(id(row), (row, ""))
            self._said[id(row)] = row, text + row.accept(token, self.engine.eos_ids)
            if row.grammar is not None and not row.finish_reason:
                row.grammar.advance(token)
                self.slots.allow(slot, row.grammar.allowed())

    def _leave(self) -> None:
        """Rows that have ended leave; the last one moves into the gap, so that a step takes the first slots alone."""
        live, slots = self.live, self.slots
        while slots.pending:
            self._accept(slots.take())
        for slot in reversed(range(len(live))):
            if not live[slot].finish_reason:
                continue
            if self.memory is not None:
                gone = live[slot]
                self.memory.prefixes.put(slot, list(self.memory.keys(gone, [*gone.ids, *gone.token_ids[:-1]])))
            last = live.pop()
            if slot < len(live):
                slots.move(slot, len(live), len(last.ids) + len(last.token_ids) - 1)
                live[slot] = last
            slots.cache.live_B[len(live)] = False
            if self.entering:
                slots.move(len(live), len(live) + 1, self.entering.cached)

    # ---- prompts ----

    def _prefill(self) -> None:
        """One pass over parts of prompts; rows whose prompt ends with it get their first token."""
        engine, slots, start = self.engine, self.slots, len(self.live)
        spans = self._admit()
        if not spans:
            return
        began = engine.now()
        visual = self._see(spans)
        seen = engine.now()
        ids_T = torch.tensor([id for row, at, end in spans for id in row.ids[at:end]], device=engine.device)
        cu_seqlens = list(accumulate((end - at for _, at, end in spans), initial=0))
        where = {"cu_seqlens": cu_seqlens, "slots": range(start, start + len(spans))}
        logits_BV = engine.model(ids_T, visual=visual, cache=slots.cache, last_only=True, **where)
        complete = [row for row, _, end in spans if end == len(row.ids)]  # all but at most the last
        self.entering = spans[-1][0] if len(complete) < len(spans) else None
        ids: list[int] = []
        if complete:
            self.live += complete
            ids = slots.first(logits_BV[: len(complete)], start)
        done = engine.now()
        for slot, (row, at, end) in enumerate(spans, start):
            row.cached = end
            row.vision_s, row.prefill_s = row.vision_s + seen - began, row.prefill_s + done - seen
            self.prefilled_tokens += end - at
            if self.memory is not None:
                self.memory.prefixes.put(slot, row.block_keys[: end // BLOCK])
        for row in complete:
            row.pictures = []
        self._accept(ids, start)

    def _admit(self) -> list[Span]:
        """What the next pass computes: the rest of the row that is entering, and those that wait."""
        spans: list[Span] = []
        room, computing = self.chunk, set[bytes]()
        while room > 0:
            if self.entering is not None and not spans:
                row = self.entering
            elif self.waiting and len(self.live) + len(spans) < self.slots.rows:
                row, slot = self.waiting[0], len(self.live) + len(spans)
                known = 0  # blocks of the prompt that are in the memory; never all: its last token has to be computed
                if self.memory is not None:
                    known = self.memory.prefixes.known(row.block_keys[: (len(row.ids) - 1) // BLOCK])
                if row.block_keys[known : known + 1] and row.block_keys[known] in computing:
                    break  # another row is computing what this one can take over after this pass
                self.waiting.popleft()
                if self.memory is not None:
                    self.memory.prefixes.fill(slot, row.block_keys[:known])
                    row.cached = row.reused = known * BLOCK
                self.slots.enter(slot, row.sampling, row.limit, row.cached)
                if row.grammar is not None:
                    self.slots.allow(slot, row.grammar.allowed())
                if row.sampling.repetition_penalty not in (None, 1):
                    self.slots.penalise(slot, row.ids, row.sampling.repetition_penalty)
            else:
                break
            end = min(len(row.ids), row.cached + room)
            spans.append((row, row.cached, end))
            computing.update(row.block_keys[row.cached // BLOCK :])
            room -= end - row.cached
        return spans

    def _see(self, spans: Sequence[Span]) -> list[Tensor]:
        """The visual tokens [T, D] of these parts of prompts, from each picture that is in one."""
        needed = []  # (row, number of the picture, its first and last token in this part)
        for row, at, end in spans:
            first, last = (self.engine.processor.visual_tokens(row.ids[:stop]) for stop in (at, end))
            ends = list(accumulate(picture.span.tokens for picture in row.pictures))
            for number, (picture, stop) in enumerate(zip(row.pictures, ends)):
                start = stop - picture.span.tokens
                if start < last and stop > first:
                    needed.append((row, number, max(first, start) - start, min(last, stop) - start))
        if self.memory is not None:
            self._see_once([(row.picture_keys[number][0], row.pictures[number]) for row, number, _, _ in needed])
        seen = self.engine.see([row.pictures[number] for row, number, _, _ in needed])
        return [visual_TD[start:stop] for visual_TD, (_, _, start, stop) in zip(seen, needed)]

    def _see_once(self, pictures: Sequence[tuple[bytes, Visual]]) -> None:
        """From the memory what is there, and into it what is not."""
        assert self.memory is not None
        kept, first = self.memory.pictures, dict[bytes, Visual]()
        for key, picture in pictures:
            if picture.visual_TD is None:
                picture.visual_TD = kept.get(key)
            if picture.visual_TD is None:
                first.setdefault(key, picture)
        self.engine.see(list(first.values()))
        for key, picture in pictures:
            if key in first:
                picture.visual_TD = first[key].visual_TD
                assert picture.visual_TD is not None
                kept.put(key, picture.visual_TD)
