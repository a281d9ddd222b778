"""Generation: prompts and pictures in, answers out.

An engine checks requests, makes their ids, and hands them as rows to a `generation.scheduler`, all at once and with
slots of their size; a server has one scheduler for all its requests. An answer does not depend on the batch it was
computed in, up to rounding.
Letters: N views of a picture or clip, C channels, T tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from minillava.chat.prompt import stop_ids
from minillava.chat.templates import TEMPLATES
from minillava.chat.tokenizer import Tokenizer
from minillava.errors import UserError
from minillava.generation.answer import Answer, AnswerText
from minillava.generation.request import Request, Row
from minillava.generation.scheduler import Scheduler
from minillava.generation.slots import Slots
from minillava.llava import LLaVAModel, passes
from minillava.media.visual import Visual
from minillava.processor import Processor

TOWER_BATCH = 16  # views in one pass of the tower: CLIP-L/336 takes about 30 MB of float32 activations for each
MAX_ROWS = 64  # requests computed together
PREFILL_TOKENS = 1 << 14  # prompt tokens of one pass: the MLP of a 7B holds 22 kB of bf16 for each
CACHE_BYTES = 4 << 30  # keys and values of all slots; a single request may take more


class Engine:
    """Answers requests with one model and its tokenizer."""

    def __init__(self, model: LLaVAModel, tokenizer: Tokenizer):
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.processor = Processor(model.config, tokenizer)
        chat, template = model.config.chat, TEMPLATES.get(model.config.chat.template)
        self.eos_ids = stop_ids(chat, tokenizer)
        self.stops = (*chat.stop_strings, *(template.stop_strings if template else ()))
        self.pictures_seen = 0  # that went through the tower since the start
        self._idle: Slots | None = None  # of the last batch, for the next one: on a GPU its graphs are worth keeping

    @property
    def device(self) -> torch.device:
        return self.model.decoder.embed.weight.device

    def generate(self, requests: Sequence[Request], on_text: Callable[[int, str], None] | None = None) -> list[Answer]:
        """One answer for each request, in order; `on_text(index, piece)` gets the text as it comes.

        Raises UserError for a picture that cannot be read, a mismatch of placeholders and pictures, and a prompt that
        leaves no room in the context; nothing is computed then.
        """
        opened: dict[object, Visual] = {}
        rows = [self.row(index, request, opened) for index, request in enumerate(requests)]
        del opened  # from here on a picture lives as long as rows need it
        for row, piece in self.stream(rows) if rows else ():
            if on_text is not None:
                on_text(row.index, piece)
        return [self.answer(row) for row in rows]

    def stream(self, rows: Sequence[Row], own: Slots | None = None) -> Iterator[tuple[Row, str]]:
        """Yields (row, text) as text comes, until all rows have ended.

        own: slots that the caller keeps; ValueError if a row does not fit one. None: those of the last batch where they
        do, else new ones.
        """
        slots = own
        if slots is None:
            capacity = max(len(row.ids) + row.limit for row in rows)
            count = min(len(rows), MAX_ROWS, max(1, CACHE_BYTES // (capacity * self.cache_bytes())))
            slots, self._idle = self._idle, None
            key = (self.device, self._cache_dtype(), self.eos_ids)
            if slots is None or slots.key != key or slots.rows < count or slots.capacity < capacity:
                slots = None  # before the new ones, which have some room to spare for the next batch
                slots = self.new_slots(count, min(-(-capacity // 256) * 256, self.config.decoder.max_positions))
        elif any(len(row.ids) + row.limit > slots.capacity for row in rows):
            raise ValueError(f"a row does not fit a slot of {slots.capacity} tokens")
        slots.pending.clear()  # of a run that was interrupted
        scheduler = Scheduler(self, slots, PREFILL_TOKENS)
        scheduler.waiting.extend(rows)
        try:
            while scheduler.busy:
                yield from ((row, piece) for row, piece in scheduler.step() if piece)
        finally:
            if own is None:
                self._idle = slots

    def row(self, index: int, request: Request, opened: dict[object, Visual], capacity: int | None = None) -> Row:
        """Check a request and make its ids. `opened` holds the pictures opened so far; new ones are put there.

        Prompt and answer together get at most `capacity` tokens (None: the model's context).
        """
        sampling = request.sampling
        if sampling.repetition_penalty is None:
            sampling = replace(sampling, repetition_penalty=self.config.chat.repetition_penalty)
        try:
            sampling.check()
            if request.max_new_tokens < 1:
                raise UserError(f"max_new_tokens is {request.max_new_tokens}; use 1 or more")
            if request.prompt_ids is not None:
                prompt = self.processor.given(request.prompt_ids, request.media, opened)
            else:
                asked = request.messages if request.raw is None else request.raw
                prompt = self.processor(asked, request.media, generate=True, opened=opened)
            if not prompt.ids:
                raise UserError("the prompt is empty; write one")
            ids, words = prompt.ids, self.config.decoder.vocab_size
            if max(ids) >= words and (strange := set(ids) - {*range(words), *self.processor.placeholders}):
                raise UserError(
                    f"the prompt has the id {max(strange)}, but the embedding {words} rows; the tokenizer is not this "
                    "model's, or the text writes a special token that the model lacks"
                )
            context = min(self.config.decoder.max_positions, capacity or self.config.decoder.max_positions)
            if len(ids) >= context:
                visual = sum(picture.span.tokens for picture in prompt.visuals)
                raise UserError(
                    f"the prompt is {len(ids)} tokens ({visual} of them visual), but prompt and answer together have "
                    f"to fit the context of {context}; shorten it"
                )
        except UserError as error:
            raise UserError(f"{request.name}: {error}" if request.name else str(error)) from None
        text = AnswerText(self.tokenizer, (*self.stops, *request.stop), strip=bool(request.messages))
        limit = min(request.max_new_tokens, context - len(ids))
        return Row(index, ids, prompt.visuals, limit, sampling, text, request.logprobs, request.grammar)

    # ---- the model ----

    def new_slots(self, rows: int, capacity: int) -> Slots:
        return Slots(self.model, rows, capacity, self._cache_dtype(), self.eos_ids)

    def step_bytes(self, tokens: int) -> int:
        """Bytes that a decode step has to read: the weights, and keys and values of `tokens` tokens."""
        decoder, config = self.model.decoder, self.config.decoder
        weights = (*decoder.parameters(), *decoder.buffers())
        read = sum(t.nbytes for t in weights if t.ndim < 3)
        if config.num_experts:  # stacked in three dimensions; a token goes through some of them
            read += sum(t.nbytes for t in weights if t.ndim == 3) * config.experts_per_token // config.num_experts
        read -= 0 if config.tie_embeddings else decoder.embed.weight.nbytes  # a row a token is read of it
        return read + tokens * self.cache_bytes()

    def cache_bytes(self) -> int:
        """Of the keys and values of one token."""
        decoder = self.config.decoder
        return 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * self._cache_dtype().itemsize

    def _cache_dtype(self) -> torch.dtype:
        weight = self.model.decoder.embed.weight
        kind = weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

    def see(self, pictures: Sequence[Visual]) -> list[Tensor]:
        """The visual tokens [T, D] of each picture, which keeps them."""
        unseen = list({id(picture): picture for picture in pictures if picture.visual_TD is None}.values())
        for part in passes([picture.span.views for picture in unseen], TOWER_BATCH) if unseen else ():
            some = unseen[part]
            pixels_NCHW = torch.cat([picture.pixels_NCHW for picture in some]).to(self.device)
            for picture, visual_TD in zip(some, self.model.see(pixels_NCHW, [p.span for p in some], TOWER_BATCH)):
                picture.visual_TD = visual_TD
            self.pictures_seen += len(some)
        return [picture.visual_TD for picture in pictures if picture.visual_TD is not None]

    def answer(self, row: Row) -> Answer:
        """What a row that has ended, or was cancelled, says."""
        return Answer(
            row.text.text,
            row.token_ids,
            prompt_tokens=len(row.ids),
            image_tokens=self.processor.visual_tokens(row.ids),
            finish_reason=row.finish_reason,
            vision_s=row.vision_s,
            prefill_s=row.prefill_s,
            decode_s=row.times[-1] - row.times[0] if row.times else 0.0,
            token_s=median(b - a for a, b in pairwise(row.times)) if len(row.times) > 1 else None,
            reused_tokens=row.reused,
            logprobs=row.token_logprobs,
        )

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
