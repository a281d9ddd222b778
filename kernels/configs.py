"""Which configuration a launch uses: read from tuned/<kernel>.json, never searched for at run time.

A file holds, for each part of a kernel ("forward", "backward") and each card (its full name, else its architecture), a
list of buckets; the first one whose bounds on `rows`, `width` and `outputs` (rows x width) hold is taken.
`python -m minillava.kernels.tools.tune` writes the entries of the card that it runs on.
"""

import functools
import json
from pathlib import Path
from typing import Any

from minillava.kernels.frame import Card

FOLDER = Path(__file__).parent / "tuned"


@functools.cache
def table(kernel: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """All shipped configurations of `kernel`: part -> card -> buckets."""
    return json.loads((FOLDER / f"{kernel}.json").read_text())


def entry(cards: dict[str, Any], card: Card) -> str:
    """The key in `cards` for this card: its name, its architecture, or the nearest older relative's."""
    if card.name in cards or card.arch in cards:
        return card.name if card.name in cards else card.arch
    if card.arch.startswith("gfx"):
        return "gfx942"
    if card.has_descriptors:
        return "sm_100"
    return "sm_80" if card.shared_bytes >= 160_000 else "sm_89"


def choose(kernel: str, part: str, card: Card, rows: int, width: int) -> dict[str, Any]:
    """The configuration of the first bucket that holds results of `rows` rows and `width` columns."""
    cards = table(kernel)[part]
    size = {"rows": rows, "width": width, "outputs": rows * width}
    for bucket in cards[entry(cards, card)]:
        if all(value <= bucket.get(name, value) for name, value in size.items()):
            return bucket["config"]
    raise LookupError(f"tuned/{kernel}.json: no bucket of {part} on {card.arch} holds {rows} rows of {width}")
