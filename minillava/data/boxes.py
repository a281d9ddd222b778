"""Boxes between a picture and the square that it is padded to: LLaVA-1.5's data has them on the square, from 0 to 1.

The square is that of `media.image`: as wide as the longer side, the picture in its middle, half a pixel to the left or
top where that does not come out even.
"""

from __future__ import annotations

import re

Box = tuple[float, float, float, float]  # left, top, right, bottom


def to_square(box: Box, width: int, height: int) -> Box:
    """A box in pixels of a picture of this size as shares of the square's side."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    x1, y1, x2, y2 = box
    return (x1 + left) / side, (y1 + top) / side, (x2 + left) / side, (y2 + top) / side


def from_square(box: Box, width: int, height: int) -> Box:
    """A box on the square in pixels of the picture, cut off at its edges."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    x1, y1, x2, y2 = (share * side for share in box)
    across, down = ([min(max(v - first, 0.0), last) for v in pair] for pair, first, last in
                    (((x1, x2), left, float(width)), ((y1, y2), top, float(height))))  # fmt: skip
    return across[0], down[0], across[1], down[1]


def written(box: Box) -> str:
    """A box as LLaVA's data has it: [0.12, 0.30, 0.56, 0.98]."""
    return f"[{', '.join(f'{share:.2f}' for share in box)}]"


def read_boxes(text: str) -> list[Box]:
    """The boxes in a text, such as a model's answer."""
    number = r"\s*(-?\d*\.?\d+)\s*"
    found = re.findall(rf"\[{','.join([number] * 4)}\]", text)
    return [(float(a), float(b), float(c), float(d)) for a, b, c, d in found]
