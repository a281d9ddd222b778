"""The decode step as one unit: every tensor it reads or writes is allocated once, and nothing in it asks the host.

A batch takes the first slots. A step takes the last token of each live slot through all layers, the head and the
sampler, and decides on the device which slots go on. On a GPU it is captured once per batch size as a CUDA graph and
replayed; elsewhere the same function runs plainly. Letters: B slots, D width, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minillava.generation.sampling import Sampler, Sampling, penalised
from minillava.layers.cache import KVCache
from minillava.llava import LLaVAModel

Graph = tuple[torch.cuda.CUDAGraph, Tensor | None]  # a captured step, and where it leaves its logits


class Slots:
    """Room for `rows` sequences of `capacity` tokens, prompt and answer together, each in a slot of its own."""

    def __init__(self, model: LLaVAModel, rows: int, capacity: int, dtype: torch.dtype, eos_ids: frozenset[int]):
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
        # Experts in other types than bf16 ask the host where their tokens end (layers.linear).
        asks = model.config.decoder.num_experts > 0 and dtype != torch.bfloat16
        self.captured = device.type == "cuda" and not asks
        # The host reads the tokens of a step while a GPU works on the next one.
        self.lag = 1 if device.type == "cuda" else 0
        self.pending: deque[tuple[Tensor, Callable[[], object] | None]] = deque()  # tokens on their way; how to wait
        self.graphs: dict[tuple[int, frozenset[int]], Graph] = {}  # by the number of slots and their kinds
        self.logits_BV: Tensor | None = None  # of the last step or prompts, until the next
        self.allowed_BV: Tensor | None = None  # which tokens may come next, once a grammar says so
        self.seen_BV: Tensor | None = None  # tokens of prompt and answer, once a row has a penalty on them
        self.penalty_B = torch.ones(rows, device=device)

    # ---- rows come and go ----

    def enter(self, slot: int, sampling: Sampling, steps: int, cached: int = 0) -> None:
        """An answer of at most `steps` tokens starts in `slot`, which keeps its first `cached` tokens."""
        self.cache.keep(slot, cached)
        self.kinds[slot] = self.sampler.enter(slot, sampling, steps)
        self.left_B[slot] = steps
        if self.allowed_BV is not None:
            self.allowed_BV[slot] = True
        self.penalty_B[slot] = 1.0

    def allow(self, slot: int, allowed_V: Tensor) -> None:
        """Only these tokens may come next in `slot`, and none behind the last that `allowed_V` tells of; it may tell of
        more than the model has."""
        size = self.model.config.decoder.vocab_size
        if self.allowed_BV is None:
            self.allowed_BV = torch.ones(self.rows, size, dtype=torch.bool, device=self.device)
            self.graphs.clear()  # captured without a mask
        self.allowed_BV[slot] = False
        self.allowed_BV[slot, : len(allowed_V)] = allowed_V[:size].to(self.device)

    def penalise(self, slot: int, ids: Sequence[int], penalty: float) -> None:
        """Tokens of the prompt `ids`, and those that come in `slot`, are made less likely."""
        size = self.model.config.decoder.vocab_size
        if self.seen_BV is None:
            self.seen_BV = torch.zeros(self.rows, size, dtype=torch.bool, device=self.device)
            self.graphs.clear()  # captured without a penalty
        self.penalty_B[slot] = penalty
        self.seen_BV[slot] = False
        self.seen_BV[slot, [id for id in {*ids} if 0 <= id < size]] = True  # placeholders may lie outside

    def move(self, to: int, slot: int, cached: int) -> None:
        """The sequence in `slot`, with `cached` tokens in the cache, goes on in slot `to`."""
        self.cache.move(to, slot, cached)
        self.sampler.move(to, slot)
        self.kinds[to] = self.kinds[slot]
        for state_B in (self.tokens_B, self.left_B, self.penalty_B, self.allowed_BV, self.seen_BV):
            if state_B is not None:
                state_B[to] = state_B[slot]

    def first(self, logits_BV: Tensor, start: int) -> list[int]:
        """The first tokens of the sequences in slots `start` and on, from the last logits of their prompts."""
        rows = slice(start, start + len(logits_BV))
        self.cache.live_B[rows] = True
        self._choose(logits_BV, rows, frozenset(self.kinds[rows]))
        return self.tokens_B[rows].tolist()

    def _choose(self, logits_BV: Tensor, rows: slice, kinds: frozenset[int]) -> None:
        """The next token of these slots, and whether they go on after it."""
        live_B, left_B, tokens_B = self.cache.live_B[rows], self.left_B[rows], self.tokens_B[rows]
        self.logits_BV = logits_BV
        if self.seen_BV is not None:
            logits_BV = penalised(logits_BV, self.seen_BV[rows], self.penalty_B[rows])
        if self.allowed_BV is not None:
            logits_BV = logits_BV.masked_fill(~self.allowed_BV[rows], float("-inf"))
        new_B = self.sampler(logits_BV, rows, kinds, live_B)
        tokens_B.copy_(torch.where(live_B, new_B, tokens_B))
        if self.seen_BV is not None:
            seen_BV, where_B1 = self.seen_BV[rows], tokens_B[:, None]
            seen_BV.scatter_(1, where_B1, seen_BV.gather(1, where_B1) | live_B[:, None])
        left_B -= live_B.to(left_B.dtype)
        live_B &= (left_B > 0) & ~(tokens_B[:, None] == self.eos_E).any(1)

    # ---- one token for each ----

    def step(self, n: int, kinds: frozenset[int]) -> None:
        """One more token for each live slot of the first n."""
        self._choose(self.model(self.tokens_B[:n, None], cache=self.cache), slice(0, n), kinds)

    def launch(self, n: int) -> None:
        """Start a step of the first n slots; `take` hands over its tokens."""
        kinds = frozenset(self.kinds[:n])
        if self.captured:
            size = min(1 << (n - 1).bit_length(), self.rows)  # slots from n on are not live: nothing comes of them
            graph, self.logits_BV = self.graphs.get((size, kinds)) or self._capture(size, kinds)
            graph.replay()
        else:
            self.step(n, kinds)
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            tokens_B = torch.empty(n, dtype=torch.int64, pin_memory=True).copy_(self.tokens_B[:n], non_blocking=True)
            event.record()
            self.pending.append((tokens_B, event.synchronize))
        else:
            self.pending.append((self.tokens_B[:n].clone(), None))

    def take(self) -> list[int]:
        """The tokens of the oldest step that was not taken yet."""
        tokens_B, done = self.pending.popleft()
        if done:
            done()
        return tokens_B.tolist()

    def rehearse(self, n: int, kinds: frozenset[int]) -> None:
        """Run the step twice, so that what first use compiles or allocates is there, and put its state back. What it
        wrote to the cache lies behind the lengths, where the next step writes."""
        state = [self.tokens_B, self.left_B, self.cache.lengths_B, self.cache.live_B, self.sampler.used_B]
        state += [] if self.seen_BV is None else [self.seen_BV]
        before = [tensor.clone() for tensor in state]
        for _ in range(2):
            self.step(n, kinds)
            for tensor, value in zip(state, before):
                tensor.copy_(value)

    def _capture(self, n: int, kinds: frozenset[int]) -> Graph:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.rehearse(n, kinds)
        torch.cuda.current_stream().wait_stream(stream)
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            self.step(n, kinds)
        self.graphs[n, kinds] = graph, self.logits_BV
        return self.graphs[n, kinds]
