"""What flags take: said where they are declared, checked before anything is loaded."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path


def whole(least: int = 0, most: int = 2**63 - 1) -> Callable[[str], int]:
    """The type of a flag that takes a whole number from `least` to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # also Python's refusal of thousands of digits
            raise ArgumentTypeError(f"is {text[:40]!r}; use a whole number") from None
        if not least <= value <= most:
            bound = f"{least} or more" if value < least else f"{most} or less"
            raise ArgumentTypeError(f"is {text[:40]}; use {bound}")
        return value

    return read


def amount(zero: bool = True, most: float = math.inf) -> Callable[[str], float]:
    """The type of a flag that takes a number from 0 (which counts where `zero`) to `most`, and never infinity."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ArgumentTypeError(
                f"is {text[:40]!r}; use a number, with a point in it where it is no whole one"
            ) from None
        if not (0 <= value <= most and (value or zero) and value < math.inf):
            bounds = ("0 or more" if zero else "more than 0") + (f" and at most {most:g}" if most < math.inf else "")
            raise ArgumentTypeError(f"is {text[:40]}; use {bounds}")
        return value

    return read


def some_path(text: str) -> Path:
    """The type of a flag that takes a path: none is no path, and not the working folder."""
    if not text:
        raise ArgumentTypeError("is empty; give a path, or leave it out")
    return Path(text)
