"""The next token: greedy, or drawn with temperature, top-k and top-p (nucleus sampling, arXiv 1904.09751).

A row's random numbers are drawn from its own seed before the first step, so its answer does not depend on the batch it
is computed in, and a step needs no generator: everything in it happens on the device.
Letters: B rows, V vocabulary, N tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillava.config import UserError


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability
    top_k: int = 0  # and from no more than this many; 0: no bound
    seed: int = 0  # of this answer's random numbers

    def check(self) -> None:
        """Raises UserError for a value out of its range."""
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; use 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; use more than 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; use 0 (no bound) or more")
        if not -(2**63) <= self.seed < 2**64:  # what torch.Generator takes
            raise UserError(f"seed is {self.seed}; use a number that fits 64 bits")


GREEDY = Sampling()


class Sampler:
    """Chooses one token for each row of a batch, `steps` times at most."""

    def __init__(self, rows: Sequence[Sampling], steps: int, device: torch.device):
        self.step = 0
        self.sampled = [row.temperature > 0 for row in rows]
        if not any(self.sampled):
            return
        draws_BN = torch.zeros(len(rows), steps)
        for row, sampling in zip(draws_BN, rows):
            if sampling.temperature > 0:  # drawn on the CPU: the same numbers on every device
                row.uniform_(generator=torch.Generator().manual_seed(sampling.seed))
        self.draws_BN = draws_BN.to(device)
        self.greedy_B = torch.tensor([not sampled for sampled in self.sampled], device=device)
        self.temperature_B1 = torch.tensor([[row.temperature or 1.0] for row in rows], device=device)
        self.top_p_B1 = torch.tensor([[row.top_p] for row in rows], device=device)
        self.top_k_B1 = torch.tensor([[row.top_k or 2**31] for row in rows], device=device)

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """Tokens [B]; every call is the next step."""
        tokens_B = logits_BV.argmax(-1)
        if any(self.sampled):
            tokens_B = torch.where(self.greedy_B, tokens_B, self._draw(logits_BV.float()))
        self.step += 1
        return tokens_B

    def _draw(self, logits_BV: Tensor) -> Tensor:
        """Invert the cumulative distribution over the tokens in falling order, cut off by top-k and top-p."""
        sorted_BV, tokens_BV = logits_BV.sort(dim=-1, descending=True)
        rank_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
        p_BV = (sorted_BV / self.temperature_B1).masked_fill(rank_V >= self.top_k_B1, float("-inf")).softmax(-1)
        before_BV = p_BV.cumsum(-1) - p_BV  # a token stays while those before it have less than top_p
        p_BV = p_BV.masked_fill((before_BV >= self.top_p_B1) & (rank_V > 0), 0.0)
        cumulative_BV = p_BV.cumsum(-1)
        target_B1 = self.draws_BN[:, self.step, None] * cumulative_BV[:, -1:]
        last_B1 = (p_BV > 0).sum(-1, keepdim=True) - 1  # rounding must not lead past the tokens that stay
        chosen_B1 = torch.minimum((cumulative_BV <= target_B1).sum(-1, keepdim=True), last_B1)
        return tokens_BV.gather(1, chosen_B1).squeeze(1)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        self.sampled = [self.sampled[row] for row in rows]
        if any(self.sampled):
            index_B = torch.tensor(rows, device=self.draws_BN.device)
            for name in ("draws_BN", "greedy_B", "temperature_B1", "top_p_B1", "top_k_B1"):
                setattr(self, name, getattr(self, name)[index_B])
