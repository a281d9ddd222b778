"""Generation: prompts and pictures in, answers out.

Prompts of any lengths are prefilled as one packed pass; then every step of `minillava.slots` gives each sequence one
more token. Sequences that have stopped leave, waiting ones take their slots. An answer does not depend on the batch it
was computed in, up to rounding.
Letters: B rows, T tokens of all rows together, N views of a picture or clip, C channels, D width, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minillava import chat
from minillava.answer import Answer, AnswerText, stop_strings
from minillava.chat import Message
from minillava.config import UserError
from minillava.image import open_image, prepare_clip, prepare_views
from minillava.layout import Span, view_span
from minillava.llava import LLaVA
from minillava.sampling import GREEDY, Sampling
from minillava.slots import Slots
from minillava.tokenizer import Tokenizer
from minillava.video import Clip, VideoSource, open_clip

if TYPE_CHECKING:
    from PIL import Image

    ImageSource = str | Path | bytes | Image.Image | Tensor  # a tensor holds prepared pixels_CHW

TOWER_BATCH = 16  # views in one pass of the tower: CLIP-L/336 takes about 30 MB of float32 activations for each
MAX_ROWS = 64  # requests computed together
PREFILL_TOKENS = 1 << 14  # prompt tokens of one pass: the MLP of a 7B holds 22 kB of bf16 for each
CACHE_BYTES = 4 << 30  # keys and values of all slots; a single request may take more


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
    videos: Sequence[VideoSource] = ()  # files, folders of frames, or lists of pictures; see `minillava.video`


def user_message(text: str, images: int, image_token: str, videos: int = 0, video_token: str = "") -> Message:
    """A question about pictures and clips: each marker stays where the user put it; without any, they come first."""
    wanted = {image_token: images}
    wanted[video_token or image_token] = wanted.get(video_token or image_token, 0) + videos
    front = "".join(f"{marker}\n" * count for marker, count in wanted.items() if marker not in text)
    return Message("user", front + text)


@dataclass
class Picture:
    """A picture or clip that rows may share: its prepared views, and what the tower and projector made of them."""

    pixels_NCHW: Tensor
    span: Span
    visual_TD: Tensor | None = None
    told: str = ""  # of a clip: when its frames are

    @property
    def tokens(self) -> int:
        return self.span.tokens


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
    held: int = 0  # tokens of the prompt that the slot holds already
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
        return piece + self.text.flush() if self.finish_reason else piece


class Engine:
    """Answers requests with one model and its tokenizer."""

    def __init__(self, model: LLaVA, tokenizer: Tokenizer):
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.eos_ids = chat.stop_ids(model.config.chat, tokenizer)
        self.stops = stop_strings(model.config.chat)
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
        return drain(self.stream(requests), on_text)

    def stream(self, requests: Sequence[Request]) -> Generator[tuple[int, str], None, list[Answer]]:
        """Yields (index of the request, text) as text comes; returns the answers."""
        opened: dict[object, Picture] = {}
        rows = [self.row(index, request, opened) for index, request in enumerate(requests)]
        del opened  # from here on a picture lives as long as rows need it
        if not rows:
            return []
        capacity = max(len(row.ids) + row.limit for row in rows)
        slots = self._slots(min(len(rows), MAX_ROWS, max(1, CACHE_BYTES // (capacity * self._cache_bytes()))), capacity)
        try:
            return (yield from self.run(rows, slots))
        finally:
            self._idle = slots

    def row(self, index: int, request: Request, opened: dict[object, Picture]) -> Row:
        """Check a request and make its ids. `opened` holds the pictures opened so far; new ones are put there."""
        try:
            request.sampling.check()
            if request.max_new_tokens < 1:
                raise UserError(f"max_new_tokens is {request.max_new_tokens}; use 1 or more")
            several = len(request.images) > 1
            pictures = [self._open(source, several, opened) for source in request.images]
            clips = [self._open_clip(source, opened) for source in request.videos]
            counts = [picture.tokens for picture in pictures], [clip.tokens for clip in clips]
            ids = self._ids(request, *counts, [clip.told for clip in clips])
            pictures = [(pictures + clips)[i] for i in chat.in_order(self.config.chat, ids, *counts)]
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

    def _open(self, source: ImageSource, several: bool, opened: dict[object, Picture]) -> Picture:
        key = (several, str(source) if isinstance(source, str | Path) else id(source))
        if key not in opened:
            if isinstance(source, Tensor):
                opened[key] = Picture(source[None], view_span(self.config))
            else:
                opened[key] = Picture(*prepare_views(open_image(source), self.config, several))
        return opened[key]

    def _open_clip(self, source: VideoSource, opened: dict[object, Picture]) -> Picture:
        key = ("video", str(source) if isinstance(source, str | Path) else id(source))
        if key not in opened:
            clip: Clip = open_clip(source, self.config)
            told = clip.instruction() if self.config.layout.time_instruction else ""
            opened[key] = Picture(*prepare_clip(clip.frames, self.config), told=told)
        return opened[key]

    def _ids(self, request: Request, images: list[int], videos: list[int], told: list[str]) -> list[int]:
        config = self.config.chat
        if request.prompt_ids is not None:
            ids, expected = list(request.prompt_ids), sum(images) + sum(videos)
            if (found := self._visual(ids)) != expected:
                raise UserError(f"the ids hold {found} image placeholders, the pictures make {expected} visual tokens")
        elif request.raw is not None:
            ids = chat.encode_raw(config, self.tokenizer, request.raw, images, videos)
        else:
            messages = chat.tell_times(config, request.messages, len(images), told) if any(told) else request.messages
            ids, _ = chat.encode(config, self.tokenizer, messages, images, True, videos)
        if not ids:
            raise UserError("the prompt is empty; write one")
        return ids

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
        return read + tokens * self._cache_bytes()

    def _slots(self, rows: int, capacity: int) -> Slots:
        """The idle ones if they do, else new ones, with some room to spare for the next batch."""
        idle, self._idle = self._idle, None
        key = (self.device, self._cache_dtype(), self.eos_ids)
        if idle is not None and idle.key == key and idle.rows >= rows and idle.capacity >= capacity:
            return idle
        del idle
        return self.new_slots(rows, min(-(-capacity // 256) * 256, self.config.decoder.max_positions))

    def _cache_bytes(self) -> int:
        """Of the keys and values of one token."""
        decoder = self.config.decoder
        return 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * self._cache_dtype().itemsize

    def _cache_dtype(self) -> torch.dtype:
        kind = self.device.type
        return (
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.model.decoder.embed.weight.dtype
        )

    def see(self, pictures: Sequence[Picture]) -> None:
        """Give each picture its visual tokens, unless it has them."""
        unseen = list({id(picture): picture for picture in pictures if picture.visual_TD is None}.values())
        while unseen:
            some: list[Picture] = []
            views = 0
            while unseen and (not some or views + unseen[0].span.views <= TOWER_BATCH):
                views += unseen[0].span.views
                some.append(unseen.pop(0))
            pixels_NCHW = torch.cat([picture.pixels_NCHW for picture in some]).to(self.device)
            for picture, visual_TD in zip(some, self.model.see(pixels_NCHW, [p.span for p in some], TOWER_BATCH)):
                picture.visual_TD = visual_TD
            self.pictures_seen += len(some)

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], slots: Slots) -> Generator[tuple[int, str], None, list[Answer]]:
        """Rows enter as slots come free, get their tokens together, and leave when they have stopped."""
        waiting, live = deque(rows), list[Row]()  # live[i] is in slot i
        slots.flight.clear()  # of a run that was interrupted
        while waiting or live:
            entering = [waiting.popleft() for _ in range(min(len(waiting), slots.rows - len(live)))]
            if entering:
                ids = self._enter(entering, slots, len(live))
                live += entering
                yield from self._accept(entering, ids)
            while live and not any(row.finish_reason for row in live):
                slots.launch(len(live))
                if len(slots.flight) > slots.lag:
                    yield from self._accept(live, slots.take())
            while slots.flight:
                yield from self._accept(live, slots.take())
            for slot in reversed(range(len(live))):  # the last one moves into the gap
                if live[slot].finish_reason:
                    last = live.pop()
                    slots.leave(slot)
                    if slot < len(live):
                        slots.move(slot, len(live), len(last.ids) + len(last.token_ids) - 1)
                        slots.leave(len(live))
                        live[slot] = last
        return [self._answer(row) for row in rows]

    def _accept(self, live: Sequence[Row], ids: Sequence[int]) -> Generator[tuple[int, str], None, None]:
        for row, id in zip(live, ids):
            if not row.finish_reason and (piece := row.accept(id, self.eos_ids)):
                yield row.index, piece

    def _enter(self, rows: Sequence[Row], slots: Slots, start: int) -> list[int]:
        """Prefill what slots `start` and on lack of each prompt; returns the first tokens."""
        started = self._now()
        self.see([picture for row in rows for picture in row.pictures])
        seen = self._now()
        for slot, row in enumerate(rows, start):
            slots.enter(slot, row.sampling, row.limit, row.held)
        ids = slots.first(self._prefill(rows, slots, start), start)
        prefilled = self._now()
        for row in rows:
            row.pictures = []
            row.vision_s, row.prefill_s = seen - started, prefilled - seen
        return ids

    def _prefill(self, rows: Sequence[Row], slots: Slots, start: int) -> Tensor:
        """The last hidden states [B, D] of the prompts, in packed passes of at most PREFILL_TOKENS new tokens."""
        passes: list[list[tuple[int, int, int]]] = [[]]  # (row, first token, end)
        room = PREFILL_TOKENS
        for b, row in enumerate(rows):
            at = row.held
            while at < len(row.ids):
                end = min(len(row.ids), at + room)
                passes[-1].append((b, at, end))
                room, at = room - (end - at), end
                if room == 0:
                    passes.append([])
                    room = PREFILL_TOKENS
        return torch.cat([self._pass(rows, slots, start, spans) for spans in passes if spans])

    def _pass(self, rows: Sequence[Row], slots: Slots, start: int, spans: Sequence[tuple[int, int, int]]) -> Tensor:
        """One packed pass over parts of prompts -> hidden states [B, D] where a prompt ends."""
        ids_T = torch.tensor([id for b, at, end in spans for id in rows[b].ids[at:end]], device=self.device)
        cu_seqlens = list(accumulate((end - at for _, at, end in spans), initial=0))
        x_TD, visual = self.model.embed(ids_T), []
        for b, at, end in spans:
            parts = [picture.visual_TD for picture in rows[b].pictures if picture.visual_TD is not None]
            before, new = self._visual(rows[b].ids[:at]), self._visual(rows[b].ids[at:end])
            if new:
                visual.append(torch.cat(parts)[before : before + new])
        if visual:
            x_TD = self.model.splice(x_TD, ids_T, visual)
        ends = [last - 1 for (b, _, end), last in zip(spans, cu_seqlens[1:]) if end == len(rows[b].ids)]
        keep_S = torch.tensor(ends, device=self.device, dtype=torch.int64)
        return self.model.decoder(x_TD, cu_seqlens, slots.cache, keep_S, [start + b for b, _, _ in spans])

    def _visual(self, ids: list[int]) -> int:
        """Placeholders among ids."""
        return sum(map(ids.count, set(self.config.chat.markers.values())))

    def _answer(self, row: Row) -> Answer:
        visual, decode_s = self._visual(row.ids), row.times[-1] - row.times[0]
        token_s = median(b - a for a, b in pairwise(row.times)) if len(row.times) > 1 else None
        common = (row.text.text, row.token_ids, len(row.ids), visual, row.finish_reason)
        read = self.step_bytes(len(row.ids) + len(row.token_ids) // 2)
        return Answer(*common, row.vision_s, row.prefill_s, decode_s, token_s, read)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


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
