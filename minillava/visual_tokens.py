"""Geometry without pixels: how many visual tokens a picture of W x H, or a clip of T frames, becomes. THE count.

The data pipeline, the prompt, the memory planner and the model all ask here; nothing else counts patches. What the
systems added to one another: one square view (LLaVA v1, arXiv 2304.08485, and 1.5), AnyRes tiles behind a squashed
base view with a newline behind each row (1.5-HD, arXiv 2310.03744, and NeXT), pooled frames (NeXT-Video), and maps
shrunk to a bound, several pictures as one padded view each (OneVision, arXiv 2408.03326).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minillava.config import LayoutConfig, ModelConfig
from minillava.errors import UserError

TEXT_ROOM = 1024  # tokens of the context that a clip leaves to question and answer; a quarter of a short one
TAG_TOKENS = 12  # of "<1234.5 seconds>" and the two tokens around a frame, at most


@dataclass(frozen=True)
class Span:
    """A picture or clip as the tower and the prompt see it. Maps are in patches; the default is one square view."""

    tokens: int  # in the prompt
    views: int = 1  # squares of the tower's size; a tiled picture's first is the whole picture
    clip: bool = False  # the views are frames
    rows: int = 0  # tiles behind the base view
    columns: int = 0
    top: int = 0  # padding above, and below, in the map of all tiles
    left: int = 0
    height: int = 0  # of the map after unpadding and shrinking; native: of a frame
    width: int = 0
    native: bool = False  # the views are single patches, of all frames
    window: int = 1  # native: frames that see each other
    times: tuple[int, ...] = ()  # native: which frame of its source each is; (): 0, 1, 2, ...
    places_P3: Tensor | None = field(default=None, compare=False)  # native: where patches come from that were packed

    @property
    def frames(self) -> tuple[int, int, int]:
        """Native: how many, and rows and columns of the patches of one."""
        return self.views // (self.height * self.width), self.height, self.width

    @property
    def windows(self) -> list[int]:
        """Native: patches of each group of frames that see each other; the last may be smaller."""
        whole = self.window * self.height * self.width
        return [min(whole, self.views - at) for at in range(0, self.views, whole)]


def patch_positions(span: Span, merge: int) -> Tensor:
    """Frame, row and column [P, 3] of the patches of a native picture or clip, block by block: those of one token."""
    if span.places_P3 is not None:
        return span.places_P3
    count, height, width = span.frames
    at_P = torch.arange(height * width).view(height // merge, merge, width // merge, merge).transpose(1, 2).flatten()
    times_P = torch.tensor(span.times or range(count)).repeat_interleave(height * width)
    return torch.stack([times_P, (at_P // width).repeat(count), (at_P % width).repeat(count)], dim=1)


def view_span(config: ModelConfig) -> Span:
    """A picture of one view: its patches, the class token where it is handed to the projector, and a newline where
    there is one, as behind the original's lists."""
    vision = config.vision
    return Span(
        vision.num_patches + (vision.keep_class_token and vision.class_token) + (config.layout.merge == "unpad")
    )


def best_grid(config: ModelConfig, width: int, height: int) -> tuple[int, int]:
    """(columns, rows) of the tiles that keep most of the picture's pixels, and among these waste least.

    As select_best_resolution of the original. Of equals the first in the list wins, and here original and transformers
    differ: the one's list holds (width, height), the other reads the same pairs as (height, width).
    """
    side = config.vision.image_size

    def quality(grid: tuple[int, int]) -> tuple[int, int]:
        area_width, area_height = grid[0] * side, grid[1] * side
        scale = min(area_width / width, area_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -area_width * area_height

    return max(config.layout.grids, key=quality)


def unpadding(layout: LayoutConfig, width: int, height: int, rows: int, columns: int) -> tuple[int, int]:
    """Patches of padding (above and below, left and right) in a map of rows x columns that shows width x height pixels.

    The kept part is truncated, and an odd rest stays with it; transformers rounds off what floats leave first.
    """

    def kept(patches: float) -> int:
        return int(round(patches, 7) if layout.round_unpad else patches)

    if width / height > columns / rows:
        return (rows - kept(height * (columns / width))) // 2, 0
    return 0, (columns - kept(width * (rows / height))) // 2


def native_span(config: ModelConfig, width: int, height: int, times: Sequence[int] = (0,), clip: bool = False) -> Span:
    """A picture or clip (`times`: its frames) at the size nearest to its own that is whole in blocks of patches.

    As smart_resize of transformers' Qwen2-VL: rounded half to even, then scaled into [min_pixels, max_pixels].
    Raises UserError if a side is more than 200 times the other.
    """
    block, image = config.vision.patch_size * config.projector.merge, config.image
    if max(width, height) > 200 * min(width, height):
        raise UserError(f"{width} x {height} pixels: one side is over 200 times the other; crop it")
    h, w = round(height / block), round(width / block)  # in blocks; thinner than half of one is none
    if h * w * block**2 > image.max_pixels:
        scale = math.sqrt(height * width / image.max_pixels) * block
        h, w = max(1, math.floor(height / scale)), max(1, math.floor(width / scale))
    elif h * w * block**2 < image.min_pixels:
        scale = math.sqrt(image.min_pixels / (height * width)) / block
        h, w = math.ceil(height * scale), math.ceil(width * scale)
    map_height, map_width = (side * config.projector.merge for side in (h, w))
    views, window = len(times) * map_height * map_width, frames_together(config, len(times))
    return Span(
        len(times) * h * w, views, clip, height=map_height, width=map_width, native=True, window=window,
        times=tuple(times),
    )  # fmt: skip


def packed_span(config: ModelConfig, width: int, height: int, places_FP3: Tensor) -> Span:
    """Canvases packed with patches of many frames: `places_FP3` has frame, row and column of each, row by row.

    They are one row of frames, at the size that they have. Raises UserError if they are not whole in blocks of patches
    of one frame each.
    """
    side, merge = config.vision.patch_size, config.projector.merge
    (rows, beside), (columns, below) = divmod(height, side), divmod(width, side)
    if beside or below or rows % merge or columns % merge or places_FP3.shape[1:] != (rows * columns, 3):
        raise UserError(
            f"canvases of {width} x {height} pixels with {places_FP3.shape[1]} positions are not whole in blocks of "
            f"{merge} x {merge} patches of {side} pixels; pack them for this model"
        )
    blocks = places_FP3.unflatten(1, (rows // merge, merge, columns // merge, merge)).transpose(2, 3)
    places_P3 = blocks.reshape(-1, 3)
    times_TM = places_P3[:, 0].view(-1, merge**2)
    if (times_TM != times_TM[:, :1]).any():
        raise UserError("a block of patches that become one token is of several frames; pack whole blocks")
    views, window = len(places_P3), frames_together(config, len(places_FP3), one_row=True)
    return Span(
        views // merge**2, views, True, height=rows, width=columns, native=True, window=window, places_P3=places_P3
    )


def frames_together(config: ModelConfig, frames: int, one_row: bool = False) -> int:
    """How many frames of a clip see each other."""
    return (config.vision.window or frames) if one_row or config.layout.one_row else 1


def time_runs(span: Span, merge: int) -> list[tuple[int, int]]:
    """Of a native clip: (frame of its source, visual tokens) for each run of tokens of one frame, in their order."""
    if span.places_P3 is None:
        return [(time, span.tokens // len(span.times)) for time in span.times]
    times, counts = torch.unique_consecutive(span.places_P3[:, 0], return_counts=True)
    return [(time, count // merge**2) for time, count in zip(times.tolist(), counts.tolist())]


def image_span(config: ModelConfig, width: int, height: int, several: bool = False) -> Span:
    """What a picture of width x height pixels becomes; `several`: it is not the only one in its prompt.

    Raises UserError if the picture has no area or the prepared pixels would not be what the tower sees.
    """
    vision, layout, P = config.vision, config.layout, config.vision.patches_per_side
    if width < 1 or height < 1:
        raise UserError(f"an image of {width} x {height} pixels has no area; leave it out")
    if config.image.size != vision.image_size:
        raise UserError(
            f"config: images are prepared at {config.image.size} pixels a side but the vision tower sees "
            f"{vision.image_size}; make image.size and vision.image_size equal"
        )
    if config.image.fit == "native":
        return native_span(config, width, height)
    unpad = layout.merge == "unpad"
    if not layout.grids or (several and layout.several == "pad"):
        return view_span(config)
    columns, rows = best_grid(config, width, height)
    views = 1 + columns * rows
    top, left = unpadding(layout, width, height, rows * P, columns * P) if unpad else (0, 0)
    h, w = rows * P - 2 * top, columns * P - 2 * left
    if layout.max_tiles:
        ratio = math.sqrt(h * w / (layout.max_tiles * P**2))
        if ratio > 1.1:
            h, w = int(h // ratio), int(w // ratio)
    return Span(P * P + h * (w + unpad), views, False, rows, columns, top, left, h, w)


def clip_span(
    config: ModelConfig,
    frames: int,
    width: int = 0,
    height: int = 0,
    times: Sequence[int] = (),
    places_FP3: Tensor | None = None,
) -> Span:
    """What a clip becomes of which `frames` frames are looked at. Raises UserError if there are none.

    At native resolution only matter the size of a frame in pixels (without one it is the largest that there is),
    `times`, which frame of its source each is, and `places_FP3` of canvases.
    """
    layout, P = config.layout, config.vision.patches_per_side
    if frames < 1:
        raise UserError("a video without frames; leave it out")
    if places_FP3 is not None and not config.vision.rotary_shares[0]:
        raise UserError("canvases are for models that see when a patch is (OneVision-2); give the video itself")
    if config.image.fit == "native":
        if places_FP3 is not None:
            return packed_span(config, width, height, places_FP3)
        side = math.isqrt(config.image.max_pixels)
        return native_span(config, width or side, height or side, times or range(frames), clip=True)
    side = -(-P // layout.video_stride) if layout.video_pool == "bilinear" else P // layout.video_stride
    newlines = {"no_token": 0, "one_token": 1, "frame": frames, "grid": frames * side}[layout.video_newline]
    return Span(frames * side * side + newlines, frames, True, height=side, width=side)


def frame_limit(config: ModelConfig, width: int = 0, height: int = 0) -> int:
    """Frames of a clip to look at, at most: layout.max_frames, fewer where the context is too short for them."""
    tokens = clip_span(config, 1, width, height).tokens + (TAG_TOKENS if config.layout.time_tags else 0)
    context = config.decoder.max_positions
    room = (context - min(TEXT_ROOM, context // 4)) // max(1, tokens)
    return max(1, min(config.layout.max_frames, room))
