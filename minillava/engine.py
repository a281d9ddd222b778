"""Generation: prompts and pictures in, answers out.

One step function for everything: a packed pass over new tokens of a batch of rows, only the last position of each
through the head. Prefill is its first call, with prompts of any lengths; decoding is every later one, with one token a
row. Rows that have stopped leave the batch. An answer does not depend on the batch it was computed in, up to rounding.
Letters: B rows, T tokens of all rows together, N images, P visual tokens of one, C channels, D width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minillava import chat
from minillava.answer import Answer, AnswerText, stop_strings
from minillava.chat import Message
from minillava.config import UserError
from minillava.decoder import KVCache
from minillava.image import open_image, prepare
from minillava.layout import image_tokens
from minillava.llava import LLaVA
from minillava.sampling import GREEDY, Sampler, Sampling
from minillava.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL import Image

    ImageSource = str | Path | bytes | Image.Image | Tensor  # a tensor holds prepared pixels_CHW

TOWER_BATCH = 16  # pictures in one pass of the tower: CLIP-L/336 takes about 30 MB of float32 activations for each
MAX_ROWS = 64  # requests computed together
PREFILL_TOKENS = 1 << 14  # prompt tokens of one batch: the MLP of a 7B holds 22 kB of bf16 for each
CACHE_BYTES = 4 << 30  # keys and values of one batch; a single request may take more


@dataclass(frozen=True)
class Request:
    """One prompt: messages for the model's own template, or a finished one: text (`raw`) or ids, pictures expanded."""

    messages: Sequence[Message] = ()
    images: Sequence[ImageSource] = ()
    raw: str | None = None
    prompt_ids: Sequence[int] | None = None
    max_new_tokens: int = 512
    sampling: Sampling = GREEDY
    name: str = ""  # how an error calls it


def user_message(text: str, images: int, image_token: str) -> Message:
    """A question about pictures: each marker stays where the user put it; without any, the pictures come first."""
    if image_token not in text:
        text = f"{image_token}\n" * images + text
    return Message("user", text)


@dataclass
class Picture:
    """A picture that rows may share: prepared pixels, and what the tower and projector made of them."""

    pixels_CHW: Tensor
    tokens: int
    visual_PD: Tensor | None = None


@dataclass
class Row:
    """A request on its way through the engine."""

    index: int
    ids: list[int]
    pictures: list[Picture]  # in the order of their placeholders
    limit: int  # new tokens at most, the context's bound included
    sampling: Sampling
    text: AnswerText
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    decode_s: float = 0.0

    def accept(self, id: int, eos_ids: frozenset[int]) -> str:
        """Take one more token; returns the text that it settles. Sets `finish_reason` if the answer ends with it."""
        self.token_ids.append(id)
        piece = "" if id in eos_ids else self.text.push(id)
        if id in eos_ids or self.text.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.limit:
            self.finish_reason = "length"
        return piece + self.text.flush() if self.finish_reason else piece


class Engine:
    """Answers requests with one model and its tokenizer."""

    def __init__(self, model: LLaVA, tokenizer: Tokenizer):
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.eos_ids = frozenset(model.config.chat.eos_ids)
        self.stops = stop_strings(model.config.chat)
        self.pictures_seen = 0  # that went through the tower since the start

    @property
    def device(self) -> torch.device:
        return self.model.decoder.embed.weight.device

    def generate(self, requests: Sequence[Request], on_text: Callable[[int, str], None] | None = None) -> list[Answer]:
        """One answer for each request, in order; `on_text(index, piece)` gets the text as it comes.

        Raises UserError for a picture that cannot be read, a mismatch of placeholders and pictures, and a prompt that
        leaves no room in the context; nothing is computed then.
        """
        return drain(self.stream(requests), on_text)

    def stream(self, requests: Sequence[Request]) -> Generator[tuple[int, str], None, list[Answer]]:
        """Yields (index of the request, text) as text comes; returns the answers."""
        opened: dict[object, Picture] = {}
        rows = [self.row(index, request, opened) for index, request in enumerate(requests)]
        del opened  # from here on a picture lives as long as rows need it
        answers: list[Answer] = []
        for batch in self._batches(rows):
            capacity = max(len(row.ids) + row.limit for row in batch)
            answers += yield from self.run(batch, self.new_cache(len(batch), capacity))
        return answers

    def row(self, index: int, request: Request, opened: dict[object, Picture]) -> Row:
        """Check a request and make its ids. `opened` holds the pictures opened so far; new ones are put there."""
        try:
            request.sampling.check()
            if request.max_new_tokens < 1:
                raise UserError(f"max_new_tokens is {request.max_new_tokens}; use 1 or more")
            pictures = [self._open(source, opened) for source in request.images]
            ids = self._ids(request, [picture.tokens for picture in pictures])
            context = self.config.decoder.max_positions
            if len(ids) >= context:
                visual = sum(picture.tokens for picture in pictures)
                raise UserError(
                    f"the prompt is {len(ids)} tokens ({visual} of them visual), but prompt and answer together have "
                    f"to fit the context of {context}; shorten it"
                )
        except UserError as error:
            raise UserError(f"{request.name}: {error}") from None if request.name else error
        text = AnswerText(self.tokenizer, self.stops, strip=bool(request.messages))
        return Row(index, ids, pictures, min(request.max_new_tokens, context - len(ids)), request.sampling, text)

    def _open(self, source: ImageSource, opened: dict[object, Picture]) -> Picture:
        key = str(source) if isinstance(source, str | Path) else id(source)
        if key not in opened:
            if isinstance(source, Tensor):
                pixels_CHW, size = source, (source.shape[2], source.shape[1])
            else:
                image = open_image(source)
                pixels_CHW, size = prepare(image, self.config.image), image.size
            opened[key] = Picture(pixels_CHW, image_tokens(self.config, *size))
        return opened[key]

    def _ids(self, request: Request, counts: Sequence[int]) -> list[int]:
        if request.prompt_ids is not None:
            ids, expected = list(request.prompt_ids), sum(counts)
            if (found := ids.count(self.config.chat.image_token_id)) != expected:
                raise UserError(f"the ids hold {found} image placeholders, the pictures make {expected} visual tokens")
        elif request.raw is not None:
            ids = chat.encode_raw(self.config.chat, self.tokenizer, request.raw, counts)
        else:
            ids, _ = chat.encode(self.config.chat, self.tokenizer, request.messages, counts, generate=True)
        if not ids:
            raise UserError("the prompt is empty; write one")
        return ids

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Neighbours that fit together."""
        decoder = self.config.decoder
        token_bytes = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * self._cache_dtype().itemsize
        batch: list[Row] = []
        capacity = prompt_tokens = 0
        for row in rows:
            capacity = max(capacity, len(row.ids) + row.limit)
            prompt_tokens += len(row.ids)
            too_big = (len(batch) + 1) * capacity * token_bytes > CACHE_BYTES or prompt_tokens > PREFILL_TOKENS
            if batch and (len(batch) == MAX_ROWS or too_big):
                yield batch
                batch, capacity, prompt_tokens = [], len(row.ids) + row.limit, len(row.ids)
            batch.append(row)
        if batch:
            yield batch

    # ---- the model ----

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        return KVCache(self.config.decoder, rows, capacity, self.device, self._cache_dtype())

    def _cache_dtype(self) -> torch.dtype:
        kind = self.device.type
        return (
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.model.decoder.embed.weight.dtype
        )

    def see(self, pictures: Sequence[Picture]) -> None:
        """Give each picture its visual tokens, unless it has them."""
        unseen = list({id(picture): picture for picture in pictures if picture.visual_PD is None}.values())
        for at in range(0, len(unseen), TOWER_BATCH):
            some = unseen[at : at + TOWER_BATCH]
            visual_NPD = self.model.see(torch.stack([picture.pixels_CHW for picture in some]).to(self.device))
            for picture, visual_PD in zip(some, visual_NPD):
                picture.visual_PD = visual_PD
        self.pictures_seen += len(unseen)

    def step(self, ids_T: Tensor, cu_seqlens: Sequence[int], cache: KVCache, visual_TD: Tensor | None = None) -> Tensor:
        """New tokens of all rows, packed, and visual tokens for their placeholders -> logits [B, V] of what follows."""
        x_TD = self.model.embed(ids_T)
        if visual_TD is not None:
            x_TD = self.model.splice(x_TD, ids_T, visual_TD[None])
        x_TD = self.model.decoder(x_TD, cu_seqlens, cache)
        if len(ids_T) > len(cu_seqlens) - 1:
            x_TD = x_TD[torch.tensor(cu_seqlens[1:], device=x_TD.device) - 1]
        return self.model.decoder.logits(x_TD)

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], cache: KVCache) -> Generator[tuple[int, str], None, list[Answer]]:
        """Prefill what the cache lacks of each row, then decode until all have stopped."""
        started = self._now()
        self.see([picture for row in rows for picture in row.pictures])
        seen = self._now()
        logits_BV = self._prefill(rows, cache)
        sampler = Sampler([row.sampling for row in rows], max(row.limit for row in rows), self.device)
        tokens_B = sampler(logits_BV)
        ids = tokens_B.tolist()
        prefilled = self._now()
        live = list(rows)
        while True:
            for row, id in zip(live, ids):
                if piece := row.accept(id, self.eos_ids):
                    yield row.index, piece
            done = [bool(row.finish_reason) for row in live]
            if any(done):
                now = time.perf_counter()
                for row in live:
                    row.decode_s = now - prefilled if row.finish_reason else 0.0
                if all(done):
                    break
                order = cache.drop(done)
                sampler.keep(order)
                live, tokens_B = [live[i] for i in order], tokens_B[torch.tensor(order, device=self.device)]
            tokens_B = sampler(self.step(tokens_B, range(len(live) + 1), cache))
            ids = tokens_B.tolist()
        return [self._answer(row, seen - started, prefilled - seen) for row in rows]

    def _prefill(self, rows: Sequence[Row], cache: KVCache) -> Tensor:
        placeholder = self.config.chat.image_token_id
        new = [row.ids[at:] for row, at in zip(rows, cache.lengths)]
        visual = []
        for row, at in zip(rows, cache.lengths):
            parts = [picture.visual_PD for picture in row.pictures if picture.visual_PD is not None]
            if parts:
                visual.append(torch.cat(parts)[row.ids[:at].count(placeholder) :])
            row.pictures = []
        ids_T = torch.tensor([id for ids in new for id in ids], device=self.device)
        cu_seqlens = list(accumulate(map(len, new), initial=0))
        return self.step(ids_T, cu_seqlens, cache, torch.cat(visual) if visual else None)

    def _answer(self, row: Row, vision_s: float, prefill_s: float) -> Answer:
        visual = row.ids.count(self.config.chat.image_token_id)
        tokens = len(row.ids)
        return Answer(
            row.text.text, row.token_ids, tokens, visual, row.finish_reason, vision_s, prefill_s, row.decode_s
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Conversation:
    """Turns about pictures that stay: they are seen once, and of each new prompt only what is new is computed."""

    def __init__(self, engine: Engine, images: Sequence[ImageSource] = ()):
        self.engine = engine
        self.images = list(images)  # also keeps the sources alive, whose identity names them in `opened`
        self.opened: dict[object, Picture] = {}
        self.messages: list[Message] = []
        self.cache: KVCache | None = None
        self.cached_ids: list[int] = []
        self.prefilled_tokens = 0  # computed, not taken from the cache, for the last prompt

    def ask(
        self,
        question: str,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 512,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Answer:
        """The answer to one more question. If it is interrupted, the conversation is as it was before."""
        engine, marker = self.engine, self.engine.config.chat.image_token
        messages = [*self.messages, user_message(question, 0 if self.messages else len(self.images), marker)]
        row = engine.row(0, Request(messages, self.images, None, None, max_new_tokens, sampling), self.opened)
        same = 0  # the answer's ids are made from its text again, and may differ from those that were sampled
        while same < min(len(self.cached_ids), len(row.ids) - 1) and self.cached_ids[same] == row.ids[same]:
            same += 1
        capacity = len(row.ids) + row.limit
        with torch.inference_mode():
            cache = self.cache.resized(capacity, same) if self.cache and same else engine.new_cache(1, capacity)
        self.prefilled_tokens = len(row.ids) - same
        (answer,) = drain(engine.run([row], cache), on_text)
        self.cache, self.cached_ids = cache, [*row.ids, *answer.token_ids[:-1]]
        self.messages = [*messages, Message("assistant", answer.text)]
        return answer


def drain(
    events: Generator[tuple[int, str], None, list[Answer]], on_text: Callable[[int, str], None] | None
) -> list[Answer]:
    """Hand the text on as it comes; the answers at the end."""
    while True:
        try:
            index, piece = next(events)
        except StopIteration as end:
            return end.value
        if on_text is not None:
            on_text(index, piece)
