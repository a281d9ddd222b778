"""Cards, and how long a step takes on one: an estimate. Without torch, so that a wrong name costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minillava.errors import UserError

if TYPE_CHECKING:
    from minillava.training.plan import Plan

MFU = 0.4  # share of the peak that training reaches: 0.35 to 0.5 is what tuned runs of 7B report; an assumption
READING = 0.7  # share of the bandwidth that a decode step reaches; an assumption
CONTEXT, FRAGMENTS = 0.8, 0.06  # GiB of CUDA's context and libraries; share lost to fragments; assumptions


@dataclass(frozen=True)
class Card:
    """From the makers' data sheets: memory, bytes a second, and dense bf16 FLOP/s with float32 sums."""

    name: str
    memory_gb: float
    bandwidth: float
    peak: float

    @property
    def usable(self) -> float:
        """Bytes that PyTorch's tensors may take."""
        return (self.memory_gb * 1e9) * (1 - FRAGMENTS) - CONTEXT * 2**30

    def step_s(self, plan: Plan) -> float:
        return plan.flops / (self.peak * MFU)

    def token_s(self, plan: Plan) -> float:
        return plan.token_bytes / (self.bandwidth * READING)


CARDS = {
    card.name.lower(): card
    for card in (
        Card("RTX-4060Ti-16GB", 16, 288e9, 44e12),
        Card("L4", 24, 300e9, 121e12),
        Card("RTX-3090", 24, 936e9, 71e12),
        Card("RTX-4090", 24, 1008e9, 165e12),
        Card("A100-40GB", 40, 1555e9, 312e12),
        Card("L40S", 48, 864e9, 362e12),
        Card("A100-80GB", 80, 2039e9, 312e12),
        Card("H100", 80, 3350e9, 989e12),
        Card("H200", 141, 4800e9, 989e12),
    )
}


def card_of(name: str) -> Card:
    """The card of that name. Raises UserError with all names."""
    if name.lower() not in CARDS:
        raise UserError(f"card '{name}' is unknown (known: {', '.join(card.name for card in CARDS.values())})")
    return CARDS[name.lower()]
