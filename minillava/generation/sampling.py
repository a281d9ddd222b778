"""The next token: greedy, or drawn with temperature, top-k, top-p (arXiv 1904.09751) and min-p (arXiv 2407.01082).

A row's random numbers are drawn from its own seed before the first step, so its answer does not depend on the batch it
is computed in, and a step needs no generator: everything in it happens on the device, in tensors that stay in place.
Letters: B rows, V vocabulary, N tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

from minillava.errors import UserError

TINY = 1e-30  # a temperature below makes of logits what float32 cannot hold; here sampling is greedy already


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability
    top_k: int = 0  # and from no more than this many; 0: no bound
    seed: int = 0  # of this answer's random numbers
    min_p: float = 0.0  # and only those that are at least so many times as likely as the likeliest
    repetition_penalty: float | None = None  # of tokens of prompt and answer (arXiv 1909.05858); None: the checkpoint's

    def check(self) -> None:
        """Raises UserError for a value out of its range."""
        penalty = 1 if self.repetition_penalty is None else self.repetition_penalty
        for name, fits, use in (
            ("temperature", 0 <= self.temperature <= 1 / TINY, f"0 (greedy) to {1 / TINY:g}"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_k", 0 <= self.top_k < 2**63, "0 (no bound) or more, in 64 bits"),
            ("min_p", 0 <= self.min_p <= 1, "0 (no bound) to 1"),
            ("repetition_penalty", TINY <= penalty <= 1 / TINY, f"1 (none), or {TINY:g} to {1 / TINY:g}"),
            ("seed", -(2**63) <= self.seed < 2**64, "a number that fits 64 bits"),  # what torch.Generator takes
        ):
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)}; use {use}")


GREEDY = Sampling()
ARGMAX, WHOLE, CUT = range(3)  # the likeliest; drawn from the whole distribution; from its top-k, top-p, min-p part


class Sampler:
    """Chooses one token for each slot of a batch, `steps` times at most; its state lives on the device."""

    def __init__(self, rows: int, steps: int, device: torch.device):
        self.draws_BN = torch.zeros(rows, steps, device=device)
        self.used_B = torch.zeros(rows, device=device, dtype=torch.int64)  # of each row's random numbers
        self.kind_B = torch.zeros(rows, device=device, dtype=torch.int64)
        self.temperature_B = torch.ones(rows, device=device)
        self.top_p_B = torch.ones(rows, device=device)
        self.top_k_B = torch.ones(rows, device=device, dtype=torch.int64)
        self.min_p_B = torch.zeros(rows, device=device)
        cuts = (self.top_p_B, self.top_k_B, self.min_p_B)
        self.state = (self.draws_BN, self.used_B, self.kind_B, self.temperature_B, *cuts)

    def enter(self, slot: int, sampling: Sampling, steps: int) -> int:
        """A new answer of at most `steps` tokens starts in `slot`; returns which of ARGMAX, WHOLE and CUT it is."""
        kind = CUT if sampling.top_p < 1 or sampling.top_k or sampling.min_p else WHOLE
        kind = kind if sampling.temperature else ARGMAX
        if kind != ARGMAX:  # drawn on the CPU: the same numbers on every device
            generator = torch.Generator().manual_seed(sampling.seed)
            self.draws_BN[slot, :steps] = torch.empty(steps).uniform_(generator=generator).to(self.draws_BN.device)
        cuts = (sampling.top_p, sampling.top_k or 2**31, sampling.min_p)
        values = (0, kind, max(sampling.temperature or 1.0, TINY), *cuts)
        for state_B, value in zip(self.state[1:], values):
            state_B[slot] = value
        return kind

    def __call__(self, logits_BV: Tensor, rows: slice, kinds: Set[int], live_B: Tensor | int = 1) -> Tensor:
        """Tokens [B] for the slots `rows`, among which no other kinds than these are; every call is the next step of
        those that are live."""
        tokens_B = logits_BV.argmax(-1)
        if not kinds - {ARGMAX}:
            return tokens_B
        kind_B, used_B = self.kind_B[rows], self.used_B[rows]
        p_BV = (logits_BV.float() / self.temperature_B[rows, None]).softmax(-1)
        draw_B1 = self.draws_BN[rows].gather(1, used_B[:, None])
        if WHOLE in kinds:
            tokens_B = torch.where(kind_B == WHOLE, _invert(p_BV, draw_B1), tokens_B)
        if CUT in kinds:
            p_BV, order_BV = p_BV.sort(dim=-1, descending=True)
            rank_V = torch.arange(p_BV.shape[1], device=p_BV.device)
            p_BV = p_BV.masked_fill(rank_V >= self.top_k_B[rows, None], 0.0)
            p_BV = p_BV / p_BV.sum(-1, keepdim=True)
            before_BV = p_BV.cumsum(-1) - p_BV  # a token stays while those before it have less than top_p
            p_BV = p_BV.masked_fill((before_BV >= self.top_p_B[rows, None]) & (rank_V > 0), 0.0)
            p_BV = p_BV.masked_fill(p_BV < self.min_p_B[rows, None] * p_BV[:, :1], 0.0)
            drawn_B = order_BV.gather(1, _invert(p_BV, draw_B1)[:, None]).squeeze(1)
            tokens_B = torch.where(kind_B == CUT, drawn_B, tokens_B)
        used_B += live_B
        return tokens_B

    def move(self, to: int, slot: int) -> None:
        for state_B in self.state:
            state_B[to] = state_B[slot]


def penalised(logits_BV: Tensor, seen_BV: Tensor, penalty_B: Tensor) -> Tensor:
    """The logits of the tokens that were seen, divided by the penalty where they are positive, else multiplied."""
    penalty_B1 = penalty_B[:, None].to(logits_BV.dtype)
    lower_BV = torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return torch.where(seen_BV, lower_BV, logits_BV)


def _invert(p_BV: Tensor, draw_B1: Tensor) -> Tensor:
    """Where the cumulative distribution passes the draw, a number in [0, 1): [B]."""
    cumulative_BV = p_BV.cumsum(-1)
    passed_B = (cumulative_BV <= draw_B1 * cumulative_BV[:, -1:]).sum(-1)
    return passed_B.clamp(max=p_BV.shape[1] - 1)
