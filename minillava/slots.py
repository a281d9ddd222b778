"""The decode step as one unit: every tensor it reads or writes is allocated once, and nothing in it asks the host.

A batch is a row of slots. A step takes the last token of each live slot through all layers, the head and the sampler,
and decides on the device which slots go on. On a GPU it is captured once per batch size as a CUDA graph and replayed;
elsewhere the same function runs plainly. Letters: B slots, D width, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from minillava.cache import KVCache
from minillava.llava import LLaVA
from minillava.sampling import Sampler, Sampling, kind_of


def _no_wait() -> None:
    return None


class Slots:
    """Room for `rows` sequences of `capacity` tokens, prompt and answer together, each in a slot of its own."""

    def __init__(self, model: LLaVA, rows: int, capacity: int, dtype: torch.dtype, eos_ids: frozenset[int]):
        self.model, self.rows, self.capacity = model, rows, capacity
        self.device = device = model.decoder.embed.weight.device
        self.key = (device, dtype, eos_ids)  # what a batch must agree with to use them again
        self.cache = KVCache(model.config.decoder, rows, capacity, device, dtype)
        self.cache.live_B.zero_()
        self.sampler = Sampler(rows, capacity, device)
        self.kinds = [0] * rows  # of sampling, on the host: what the step has to be able to do
        self.tokens_B = torch.zeros(rows, device=device, dtype=torch.int64)  # the last ones, not yet in the cache
        self.left_B = torch.zeros(rows, device=device, dtype=torch.int64)  # tokens that may still come
        self.eos_E = torch.tensor([*eos_ids, -1], device=device)  # never empty; no token is -1
        # Experts in other types than bf16 ask the host where their tokens end (decoder.py).
        asks = model.config.decoder.num_experts > 0 and dtype != torch.bfloat16
        self.captured = device.type == "cuda" and not asks
        # The host reads the tokens of a step while a GPU works on the next one.
        self.lag = 1 if device.type == "cuda" else 0
        self.flight: deque[tuple[Tensor, Callable[[], object]]] = deque()  # tokens on their way, and the wait for them
        self.graphs: dict[tuple[int, frozenset[int]], torch.cuda.CUDAGraph] = {}

    # ---- rows come and go ----

    def enter(self, slot: int, sampling: Sampling, steps: int, held: int = 0) -> None:
        """An answer of at most `steps` tokens starts in `slot`, of whose content the first `held` tokens stay."""
        self.cache.keep(slot, held)
        self.sampler.enter(slot, sampling, steps)
        self.kinds[slot] = kind_of(sampling)
        self.left_B[slot] = steps

    def move(self, to: int, slot: int, held: int) -> None:
        """The sequence in `slot`, with `held` tokens in the cache, goes on in slot `to`."""
        self.cache.move(to, slot, held)
        self.sampler.move(to, slot)
        self.kinds[to] = self.kinds[slot]
        for state_B in (self.tokens_B, self.left_B):
            state_B[to] = state_B[slot]

    def leave(self, slot: int) -> None:
        self.cache.live_B[slot] = False

    def first(self, hidden_BD: Tensor, start: int) -> list[int]:
        """The first tokens of the sequences in slots `start` and on, from the last hidden states of their prompts."""
        rows = slice(start, start + len(hidden_BD))
        self.cache.live_B[rows] = True
        self._choose(hidden_BD, rows, frozenset(self.kinds[rows]))
        return self.tokens_B[rows].tolist()

    def _choose(self, hidden_BD: Tensor, rows: slice, kinds: frozenset[int]) -> None:
        """The next token of these slots, and whether they go on after it."""
        live_B, left_B, tokens_B = self.cache.live_B[rows], self.left_B[rows], self.tokens_B[rows]
        new_B = self.sampler(self.model.decoder.logits(hidden_BD), rows, kinds)
        tokens_B.copy_(torch.where(live_B, new_B, tokens_B))
        left_B -= live_B.to(left_B.dtype)
        live_B &= (left_B > 0) & ~(tokens_B[:, None] == self.eos_E).any(1)

    # ---- one token for each ----

    def step(self, n: int, kinds: frozenset[int]) -> None:
        """One more token for each live slot of the first n."""
        x_BD = self.model.decoder.embed(self.tokens_B[:n])
        self._choose(self.model.decoder(x_BD, None, self.cache), slice(0, n), kinds)

    def launch(self, n: int) -> None:
        """Start a step of the first n slots; `take` hands over its tokens."""
        kinds = frozenset(self.kinds[:n])
        if self.captured:
            size = min(1 << (n - 1).bit_length(), self.rows)  # slots from n on are not live: nothing comes of them
            (self.graphs.get((size, kinds)) or self._capture(size, kinds)).replay()
        else:
            self.step(n, kinds)
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            tokens_B = torch.empty(n, dtype=torch.int64, pin_memory=True).copy_(self.tokens_B[:n], non_blocking=True)
            event.record()
            done = event.synchronize
        else:
            tokens_B, done = self.tokens_B[:n].clone(), _no_wait
        self.flight.append((tokens_B, done))

    def take(self) -> list[int]:
        """The tokens of the oldest step that was not taken yet."""
        tokens_B, done = self.flight.popleft()
        done()
        return tokens_B.tolist()

    def rehearse(self, n: int, kinds: frozenset[int]) -> None:
        """Run the step twice, so that what first use compiles or allocates is there, and put its state back. What it
        wrote to the cache lies behind the lengths, where the next step writes."""
        state = (self.tokens_B, self.left_B, self.cache.lengths_B, self.cache.live_B, self.sampler.used_B)
        before = [tensor.clone() for tensor in state]
        for _ in range(2):
            self.step(n, kinds)
            for tensor, value in zip(state, before):
                tensor.copy_(value)

    def _capture(self, n: int, kinds: frozenset[int]) -> torch.cuda.CUDAGraph:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.rehearse(n, kinds)
        torch.cuda.current_stream().wait_stream(stream)
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            self.step(n, kinds)
        self.graphs[n, kinds] = graph
        return graph
