"""How transformers' classes and the original code lay out pictures and clips, read from their config files.

What a class does without a field in config.json stands in HF_CLASSES. The original decides more by fields; where its
code of April 2024 and of today differ (the place of the pooling), `mm_resampler_type` tells which made a checkpoint.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minillava.config import LayoutConfig, ModelConfig, UserError, from_dict

if TYPE_CHECKING:
    from minillava.hf_parts import Fields

MOST_TILES = 144  # of one picture; the largest grid of a released model has 36

CLIP_L_336: dict[str, Any] = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
    patch_size=14, model_type="clip_vision_model",
)  # fmt: skip
SIGLIP_SO400M_384: dict[str, Any] = dict(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=384,
    patch_size=14, model_type="siglip_vision_model",
)  # fmt: skip


@dataclass(frozen=True)
class HFClass:
    """One of transformers' LLaVA classes (5.23): its name, what its config.json leaves out, what it does."""

    name: str  # before ForConditionalGeneration and Processor
    defaults: dict[str, Any]
    layout: dict[str, Any] = field(default_factory=dict)
    text: str = "llama"


_NEXT_DEFAULTS: dict[str, Any] = dict(
    vision_config=CLIP_L_336, vision_feature_layer=-2, vision_feature_select_strategy="default",
    image_token_index=32000,
    image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
)  # fmt: skip
_NEXT_LAYOUT: dict[str, Any] = dict(merge="unpad", round_unpad=True, video_fit="crop")
HF_CLASSES: dict[str, HFClass] = {
    "llava": HFClass("Llava", {k: v for k, v in _NEXT_DEFAULTS.items() if k != "image_grid_pinpoints"}),
    "llava_next": HFClass("LlavaNext", _NEXT_DEFAULTS, _NEXT_LAYOUT),
    "llava_next_video": HFClass(
        "LlavaNextVideo",
        _NEXT_DEFAULTS | dict(image_token_index=32001, video_token_index=32000),
        _NEXT_LAYOUT | dict(pool_first=True),
    ),
    "llava_onevision": HFClass(
        "LlavaOnevision",
        dict(
            vision_config=SIGLIP_SO400M_384, vision_feature_layer=-1, vision_feature_select_strategy="full",
            image_token_index=151646, video_token_index=151647, vision_aspect_ratio="anyres_max_9",
            image_grid_pinpoints=[[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
        ),
        dict(merge="unpad", round_unpad=True, several="pad", video_pool="bilinear", video_newline="one_token"),
        "qwen2",
    ),
}  # fmt: skip
WITH_VIDEO = tuple(kind for kind, known in HF_CLASSES.items() if "video_token_index" in known.defaults)


def read_grids(value: Any, side: int, where: str, width_first: bool) -> tuple[tuple[int, int], ...]:
    """image_grid_pinpoints -> (columns, rows) of tiles of `side` pixels, in the order of the file.

    The original writes pairs of (width, height) and transformers reads the same as (height, width). They may also be a
    text that holds the list, or "(1x1),...,(6x6)": every grid from the first to the last, in tiles.
    """
    pairs = value
    if isinstance(value, str):
        corners = [(int(a), int(b)) for a, b in re.findall(r"\((\d{1,3})x(\d{1,3})\)", value)]
        if corners:
            (left, top), (right, bottom) = corners[0], corners[-1]
            pairs = [(side * i, side * j) for i in range(left, right + 1) for j in range(top, bottom + 1)]
        else:
            try:
                pairs = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                pairs = None
    grids = []
    for pair in pairs if isinstance(pairs, list | tuple) else ():
        numbers = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(pixels) is int for pixels in pair)
        if not numbers or min(pair) < 1 or pair[0] % side or pair[1] % side:
            raise UserError(f"{where}: image_grid_pinpoints has {pair!r}, expected two multiples of {side} pixels")
        if pair[0] * pair[1] > MOST_TILES * side * side:
            raise UserError(
                f"{where}: image_grid_pinpoints has {pair!r}, more than {MOST_TILES} tiles of {side} pixels"
            )
        width, height = pair if width_first else pair[::-1]
        grids.append((width // side, height // side))
    if not grids:
        raise UserError(f"{where}: image_grid_pinpoints is {value!r}, expected a list of [width, height] in pixels")
    return tuple(grids)


def hf_layout(kind: str, f: Fields, side: int) -> LayoutConfig:
    """The layout of one of transformers' classes; `f` has its config.json over the defaults of the class."""
    layout = dict(HF_CLASSES[kind].layout)
    if kind != "llava":
        layout["grids"] = read_grids(f.values["image_grid_pinpoints"], side, f.where, width_first=False)
    if kind == "llava_onevision":
        layout["max_tiles"] = _max_tiles(f.values["vision_aspect_ratio"], "vision_aspect_ratio", f.where)
    if kind == "llava_next_video":
        layout["video_pool"] = f.one_of("spatial_pool_mode", "average", ["average", "max"])
        layout["video_stride"] = f.integer("spatial_pool_stride", 2, side)
    return from_dict(LayoutConfig, layout, f.where)


def hf_class(config: ModelConfig) -> str:
    """The class of transformers that computes the same as this config; "minillava" where there is none.

    Two things it may do otherwise: the last row or column of some 1 in 60,000 pictures (`round_unpad`), and clips,
    which LlavaForConditionalGeneration and LlavaNextForConditionalGeneration do not know.
    """
    layout = config.layout
    video = (layout.video_pool, layout.video_stride, layout.video_newline, layout.pool_first)
    if config.projector.layers != 2:
        return "minillava"
    if layout.merge == "flat" and not layout.grids:
        return "llava"
    if layout.merge == "unpad" and layout.grids and not config.vision.keep_class_token:
        if layout.max_tiles and layout.several == "pad" and video == ("bilinear", 2, "one_token", False):
            return "llava_onevision"
        if not layout.max_tiles and layout.several == "tiles":
            pooled = layout.pool_first and layout.video_newline == "no_token" and layout.video_pool != "bilinear"
            return "llava_next_video" if pooled else "llava_next"
    return "minillava"


def original_layout(f: Fields, side: int, own: str) -> tuple[LayoutConfig, str]:
    """The layout of an original config.json, and the fit of its pictures; `own` is that of the tower's image processor.

    mm_patch_merge_type "flat" leaves out every newline, those of clips included.
    """
    aspect = f.values.get("image_aspect_ratio") or "square"
    if not isinstance(aspect, str) or not re.fullmatch(r"square|pad|anyres|anyres_max_\d+", aspect):
        raise UserError(
            f"{f.where}: image_aspect_ratio {aspect!r} is not supported (supported: square, pad, anyres, anyres_max_9)"
        )
    merge = f.one_of("mm_patch_merge_type", "flat", ["flat", "spatial", "spatial_unpad"])
    merge = "unpad" if merge == "spatial_unpad" else merge
    f.only(add_faster_video=False)
    resampler = f.values.get("mm_resampler_type")
    if resampler not in (None, "spatial_pool"):
        raise UserError(f"{f.where}: mm_resampler_type {resampler!r} is not supported (supported: spatial_pool)")
    tiled, pool_first = aspect.startswith("anyres"), resampler == "spatial_pool"
    bounded = aspect.startswith("anyres_max")
    newline = f.values.get("mm_newline_position") or ("no_token" if pool_first else "one_token")
    layout = dict(
        grids=read_grids(f.values.get("image_grid_pinpoints"), side, f.where, width_first=True) if tiled else (),
        merge=merge,
        max_tiles=_max_tiles(aspect, "image_aspect_ratio", f.where) if bounded and merge == "unpad" else 0,
        several="pad" if bounded else "tiles",
        video_fit=own,
        video_pool=f.one_of("mm_spatial_pool_mode", "average", ["average", "max", "bilinear"]),
        video_stride=f.integer("mm_spatial_pool_stride", 2, side) if pool_first else 2,  # today's code fixes it
        video_newline=newline if merge == "unpad" else "no_token",
        pool_first=pool_first,
        video_fps=0.0 if bounded or f.values.get("force_sample") else 1.0,
        time_instruction=f.one_of("add_time_instruction", False, [False, True]),
    )
    return from_dict(LayoutConfig, layout, f.where), "squash" if tiled else "pad" if aspect == "pad" else own


def _max_tiles(aspect: Any, key: str, where: str) -> int:
    match = re.fullmatch(r"anyres_max_(\d{1,3})", str(aspect))
    if match is None or match[1].strip("0") == "":
        raise UserError(f"{where}: {key} {aspect!r} is not supported (supported: anyres_max_9)")
    return int(match[1])
