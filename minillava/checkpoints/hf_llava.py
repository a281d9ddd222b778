"""transformers' LLaVA classes: config.json and its companions in and out.

What a class does without a field in config.json stands in HF_CLASSES.
"""

import ast
import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillava.checkpoints import config_parts
from minillava.checkpoints.chat_files import guess_template, own_chat, own_values, read_chat
from minillava.checkpoints.config_keys import ANY, FLAG, Key, Kind, choice, fields_of, read_keys, write_keys
from minillava.config import ImageConfig, LayoutConfig, ModelConfig, ProjectorConfig, VisionConfig
from minillava.errors import UserError
from minillava.schema import Fields, from_dict, optional_json, to_dict

MOST_TILES = 144  # of one picture; the largest grid of a released model has 36


def read_grids(value: Any, side: int, where: str, width_first: bool) -> tuple[tuple[int, int], ...]:
    """image_grid_pinpoints -> (columns, rows) of tiles of `side` pixels, in the order of the file.

    The original writes pairs of (width, height) and transformers reads the same as (height, width). They may also be a
    text that holds the list, or "(1x1),...,(6x6)": every grid from the first to the last, in tiles.
    """
    grids = []
    for pair in _pinpoints(value, side):
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


def _pinpoints(value: Any, side: int) -> Any:
    """The pairs of a list, or of a text that stands for one; none where it is neither."""
    if isinstance(value, str):
        corners = [(int(a), int(b)) for a, b in re.findall(r"\((\d{1,3})x(\d{1,3})\)", value)]
        if corners:
            (left, top), (right, bottom) = corners[0], corners[-1]
            return [(side * i, side * j) for i in range(left, right + 1) for j in range(top, bottom + 1)]
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return ()
    return value if isinstance(value, list | tuple) else ()


def read_max_tiles(aspect: Any, key: str, where: str) -> int:
    """9 of anyres_max_9."""
    match = re.fullmatch(r"anyres_max_(\d{1,3})", str(aspect))
    if match is None or match[1].strip("0") == "":
        raise UserError(f"{where}: {key} {aspect!r} is not supported (supported: anyres_max_9)")
    return int(match[1])


# ---- keys of config.json ----

SIDE = "vision_config.image_size"  # where the reader leaves the tower's size for the rows that need it
STRATEGY = Kind(
    lambda f, key, default: f.one_of(key, None, ["default", "full"]) == "full",
    lambda keep, config: "full" if keep or not config.vision.class_token else "default",
)
SELECTED = Kind(ANY.read, lambda layers, config: list(layers) if len(layers) > 1 else layers[0])
TOP_KEYS = (
    Key("vision_feature_layer", "vision.select_layers", SELECTED),
    Key("vision_feature_select_strategy", "vision.keep_class_token", STRATEGY),
    Key("projector_hidden_act", "projector.activation", choice({"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}),
        default=lambda _: "gelu"),
    Key("multimodal_projector_bias", "projector.bias", FLAG, default=lambda _: True),
    Key("image_token_index", "chat.image_token_id", ANY),
    Key("image_seq_length", "vision.num_patches", Kind(None, lambda n, config: n + config.vision.keep_class_token)),
    Key("tie_word_embeddings", "decoder.tie_embeddings", FLAG),
)  # fmt: skip
GRIDS = Key(  # pairs of (height, width)
    "image_grid_pinpoints", "layout.grids",
    Kind(lambda f, key, default: read_grids(f.values[key], f.values[SIDE], f.where, width_first=False),
         lambda grids, config: [[rows * config.image.size, columns * config.image.size] for columns, rows in grids]),
)  # fmt: skip
MAX_TILES = Key(
    "vision_aspect_ratio", "layout.max_tiles",
    Kind(lambda f, key, default: read_max_tiles(f.values[key], key, f.where), lambda k, config: f"anyres_max_{k}"),
)  # fmt: skip
VIDEO_TOKEN = Key("video_token_index", "chat.video_token_id", ANY, default=lambda _: -200)
POOLING = (
    Key("spatial_pool_mode", "layout.video_pool", choice({"average": "average", "max": "max"}),
        default=lambda _: "average"),
    Key("spatial_pool_stride", "layout.video_stride",
        Kind(lambda f, key, default: f.integer(key, default, f.values[SIDE])), default=lambda _: 2),
)  # fmt: skip

# ---- the classes ----

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
    keys: tuple[Key, ...] = ()  # beside TOP_KEYS
    text: str = "llama"


_LLAVA: dict[str, Any] = dict(
    vision_config=CLIP_L_336, vision_feature_layer=-2, vision_feature_select_strategy="default",
    image_token_index=32000,
)  # fmt: skip
_NEXT = _LLAVA | dict(image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]])
_NEXT_LAYOUT: dict[str, Any] = dict(merge="unpad", round_unpad=True, video_fit="crop")
HF_CLASSES: dict[str, HFClass] = {
    "llava": HFClass("Llava", _LLAVA),
    "llava_next": HFClass("LlavaNext", _NEXT, _NEXT_LAYOUT, (GRIDS,)),
    "llava_next_video": HFClass(
        "LlavaNextVideo", _NEXT | dict(image_token_index=32001, video_token_index=32000),
        _NEXT_LAYOUT | dict(pool_first=True), (GRIDS, *POOLING),
    ),
    "llava_onevision": HFClass(
        "LlavaOnevision",
        dict(
            vision_config=SIGLIP_SO400M_384, vision_feature_layer=-1, vision_feature_select_strategy="full",
            image_token_index=151646, video_token_index=151647, vision_aspect_ratio="anyres_max_9",
            image_grid_pinpoints=[[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
        ),
        dict(merge="unpad", round_unpad=True, several="pad", video_pool="bilinear", video_newline="one_token"),
        (GRIDS, MAX_TILES),
        "qwen2",
    ),
}  # fmt: skip
WITH_VIDEO = tuple(kind for kind, known in HF_CLASSES.items() if "video_token_index" in known.defaults)
OWN = "minillava"  # our model_type where transformers has no class


def hf_class(config: ModelConfig) -> str:
    """The class of transformers that computes the same as this config; OWN where there is none.

    Two things it may do otherwise: the last row or column of some 1 in 60,000 pictures (`round_unpad`), and clips,
    which LlavaForConditionalGeneration and LlavaNextForConditionalGeneration do not know.
    """
    layout = config.layout
    video = (layout.video_pool, layout.video_stride, layout.video_newline, layout.pool_first)
    if config.projector.layers != 2:
        return OWN
    if layout.merge == "flat" and not layout.grids:
        return "llava"
    if layout.merge == "unpad" and layout.grids and not config.vision.keep_class_token:
        if layout.max_tiles and layout.several == "pad" and video == ("bilinear", 2, "one_token", False):
            return "llava_onevision"
        if not layout.max_tiles and layout.several == "tiles":
            pooled = layout.pool_first and layout.video_newline == "no_token" and layout.video_pool != "bilinear"
            return "llava_next_video" if pooled else "llava_next"
    return OWN


# ---- in ----


def read(raw: dict[str, Any], folder: Path) -> ModelConfig:
    """The ModelConfig of a folder whose config.json holds `raw`."""
    where, kind, ours = str(folder / "config.json"), raw["model_type"], own_values(raw, folder)
    known = HF_CLASSES.get(kind, HF_CLASSES["llava"])
    stated = {key.replace("token_id", "token_index"): value for key, value in raw.items() if value is not None}
    top = Fields(known.defaults | stated, where)
    found = read_keys((*TOP_KEYS, VIDEO_TOKEN), top)

    tower, text = top.values["vision_config"], Fields(raw, where).table("text_config").values
    if isinstance(tower, dict):
        tower = {"model_type": known.defaults["vision_config"]["model_type"]} | tower
    layers, keep = found["vision.select_layers"], found["vision.keep_class_token"]
    vision = config_parts.read_vision(tower, f"{where}: vision_config", layers, keep)
    decoder = config_parts.read_decoder(text, f"{where}: text_config", known.text)
    tied = found["decoder.tie_embeddings"] or decoder.tie_embeddings
    decoder = dataclasses.replace(decoder, tie_embeddings=tied)
    linears = Fields(ours, f"{where}: minillava").integer("projector_layers", 2, most=8)
    projector = ProjectorConfig(layers=linears, **fields_of("projector", found))

    top.values[SIDE] = vision.image_size
    values = known.layout | fields_of("layout", read_keys(known.keys, top)) if kind in HF_CLASSES else {}
    layout = from_dict(LayoutConfig, values, where)
    image = _read_pixels(folder, kind, vision, layout)
    layout = from_dict(LayoutConfig, to_dict(layout) | ours.get("layout", {}), f"{where}: minillava.layout")

    processor = optional_json(folder / "processor_config.json")
    chat = read_chat(
        folder, raw, text, decoder, lambda files: guess_template(files, decoder.model_type, linears),
        image_token=processor.get("image_token") or "<image>",
        video_token=(processor.get("video_token") or "<video>") if kind in WITH_VIDEO else "",
        **fields_of("chat", found),
    )  # fmt: skip
    return ModelConfig(vision, projector, decoder, image, layout, chat)


def _read_pixels(folder: Path, kind: str, vision: VisionConfig, layout: LayoutConfig) -> ImageConfig:
    """The image processor of the folder, which must cut pictures as config.json says."""
    pixels, path = config_parts.image_processor(folder)
    image = config_parts.read_image(pixels, path, vision)
    if not layout.grids and str(pixels.get("image_processor_type")).startswith(config_parts.TILED):
        raise UserError(f"{path}: {pixels['image_processor_type']} cuts pictures into tiles; not supported for {kind}")
    cut = pixels.get("image_grid_pinpoints") if layout.grids else None
    if cut is not None and set(read_grids(cut, image.size, path, False)) != set(layout.grids):
        raise UserError(f"{path}: image_grid_pinpoints differs from config.json's; make the two equal")
    if layout.grids and vision.keep_class_token:
        raise UserError(
            f"{folder / 'config.json'}: vision_feature_select_strategy 'full' keeps a class token, which fits no map "
            "of tiles"
        )
    return image


# ---- out ----


def write(config: ModelConfig, dtype: str) -> dict[str, dict[str, Any]]:
    """The JSON files of a folder, by name.

    What no class of transformers computes (`hf_class`), such as a projector of one layer, gets the model_type OWN,
    which it refuses instead of loading with a second layer of random numbers; `read` reads it back.
    """
    kind = hf_class(config)
    name = HF_CLASSES[kind].name if kind in HF_CLASSES else "Llava"
    belongs, pixels = {"processor_class": f"{name}Processor"}, _write_pixels(config, kind, name)
    grids = write_keys((GRIDS,), config) if config.layout.grids else {}
    files = {
        "config.json": _write_config(config, kind, name, dtype),
        "preprocessor_config.json": pixels | belongs | grids,
        "processor_config.json": _write_processor(config, kind, belongs),
        "generation_config.json": config_parts.generation_config(config),
    }
    if kind in WITH_VIDEO:
        frames = {key: value for key, value in pixels.items() if key not in ("image_processor_type", "do_pad")}
        files["video_preprocessor_config.json"] = (
            frames | dict(video_processor_type=f"{name}VideoProcessor", do_sample_frames=False) | belongs
        )
    return files


def _write_config(config: ModelConfig, kind: str, name: str, dtype: str) -> dict[str, Any]:
    known = HF_CLASSES.get(kind)
    ours = {"projector_layers": config.projector.layers, "chat": own_chat(config), "layout": to_dict(config.layout)}
    tower = config_parts.write_vision(config, dtype)
    top = dict(
        architectures=[f"{name}ForConditionalGeneration" if known else "MinillavaLLaVA"], model_type=kind,
        text_config=config_parts.write_decoder(config, dtype), vision_config=tower, **write_keys(TOP_KEYS, config),
        dtype=dtype, torch_dtype=dtype, pad_token_id=config.chat.pad_id, minillava=ours,
    )  # fmt: skip
    keys = known.keys if known else (GRIDS,) * bool(config.layout.grids)
    return top | write_keys((*keys, *(VIDEO_TOKEN,) * bool(config.chat.video_token)), config)


def _write_pixels(config: ModelConfig, kind: str, name: str) -> dict[str, Any]:
    image, grids, S = config.image, config.layout.grids, config.image.size
    square = image.fit == "squash" and kind not in ("llava_next", "llava_next_video")
    if grids:
        processor = f"{name.removesuffix('Video') if kind in HF_CLASSES else 'LlavaNext'}ImageProcessor"
    else:
        processor = "LlavaImageProcessor" if image.fit == "pad" else "CLIPImageProcessor"
    return dict(
        image_processor_type=processor, do_convert_rgb=True, do_resize=True,
        size={"height": S, "width": S} if square else {"shortest_edge": S},
        resample=3, do_center_crop=not square, crop_size={"height": S, "width": S}, do_rescale=True,
        rescale_factor=1 / 255, do_normalize=True, image_mean=list(image.mean), image_std=list(image.std),
        do_pad=image.fit == "pad" or bool(grids),
    )  # fmt: skip


def _write_processor(config: ModelConfig, kind: str, belongs: dict[str, str]) -> dict[str, Any]:
    v, chat = config.vision, config.chat
    strategy = STRATEGY.write(v.keep_class_token, config)
    values: dict[str, Any] = belongs | dict(vision_feature_select_strategy=strategy, image_token=chat.image_token)
    if kind == "llava_onevision":
        values |= dict(num_image_tokens=v.num_patches + v.class_token) | write_keys((MAX_TILES,), config)
    else:
        values |= dict(patch_size=v.patch_size, num_additional_image_tokens=int(v.class_token))
    return values | ({"video_token": chat.video_token} if kind in WITH_VIDEO else {})
