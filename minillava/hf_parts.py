"""Parts of config.json: a decoder, a vision tower, an image processor, read by fields and checked as they are read.

Files on the hub leave out what equalled the class default of their day, so the defaults stand here (transformers 5.23).
What would change an answer and is not supported is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from minillava.config import DecoderConfig, ImageConfig, RopeScaling, UserError, VisionConfig, from_dict

_LLAMA: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096),
    "qwen2": _LLAMA
    | dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768,
           bos_token_id=None, eos_token_id=None),
    "qwen3": _LLAMA
    | dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768,
           bos_token_id=None, eos_token_id=None, head_dim=128),
    "qwen3_moe": _LLAMA
    | dict(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_key_value_heads=4,
           max_position_embeddings=32768, bos_token_id=None, eos_token_id=None, num_experts=128, num_experts_per_tok=8,
           moe_intermediate_size=768, norm_topk_prob=False),
}  # fmt: skip
_TOWER: dict[str, Any] = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224
)
VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": _TOWER | dict(patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5),
    "siglip_vision_model": _TOWER | dict(patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
}
# Our integers of a decoder and of a tower, and what transformers calls them: read and written by these.
SIZES = dict(hidden_size="hidden_size", intermediate_size="intermediate_size", num_layers="num_hidden_layers",
             num_heads="num_attention_heads")  # fmt: skip
DECODER_SIZES = SIZES | dict(vocab_size="vocab_size")
VISION_SIZES = SIZES | dict(image_size="image_size", patch_size="patch_size")
ACTIVATIONS: dict[str, Any] = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
TILED = ("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")  # a view is squashed; their do_pad pads batches
PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor", "SiglipImageProcessor", *TILED)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if the file is absent or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; this is no checkpoint folder, or it is incomplete") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}, expected an object")
    return values


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no such file."""
    return read_json(path) if path.is_file() else {}


@dataclasses.dataclass
class Fields:
    """Values of a (nested) config with the defaults of its class, checked as they are read."""

    values: dict[str, Any]
    where: str

    def integer(self, key: str, default: int | None = None, most: int = 1 << 24) -> int:
        """An integer from 1 to `most`; UserError for anything else, as in what follows."""
        value = self.values.get(key, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise UserError(f"{self.where}: {key} is {value!r}, expected an integer from 1 to {most}")
        return value

    def integers(self, names: dict[str, str]) -> dict[str, Any]:
        """Those of a table such as DECODER_SIZES, by our names."""
        return {
            ours: self.integer(theirs, most=1024 if ours == "num_layers" else 1 << 24) for ours, theirs in names.items()
        }

    def only(self, **values: Any) -> None:
        """Raises UserError for a key that is there with another value than this."""
        for key, value in values.items():
            self.one_of(key, value, [value])

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise UserError(f"{self.where}: {key} is {value!r}, expected a positive number")
        return float(value)

    def one_of(self, key: str, default: Any, allowed: Any) -> Any:
        """A value that is among those that are supported."""
        value = self.values.get(key, default)
        value = default if value is None else value
        if not isinstance(value, str | bool | int | float) or value not in allowed:
            raise UserError(
                f"{self.where}: {key} {value!r} is not supported (supported: {', '.join(map(str, allowed))})"
            )
        return value


def _typed(values: Any, defaults: dict[str, dict[str, Any]], default_type: str, where: str) -> tuple[str, Fields]:
    """The model_type of a sub-config and its values over the defaults of that type."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object, got {values!r}")
    model_type = Fields(values, where).one_of("model_type", default_type, defaults)
    return model_type, Fields(defaults[model_type] | values, where)


def read_decoder(values: dict[str, Any], where: str, default_type: str = "llama") -> DecoderConfig:
    """A text_config (or the top level of an original config) -> DecoderConfig."""
    model_type, f = _typed(values, TEXT_DEFAULTS, default_type, where)
    f.only(hidden_act="silu", attention_bias=False, mlp_bias=False, partial_rotary_factor=1.0)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters is {rope!r}, expected an object")
    scaling = _read_rope(Fields(rope, f"{where}: rope scaling"))
    sizes = f.integers(DECODER_SIZES)
    heads, hidden = sizes["num_heads"], sizes["hidden_size"]
    kv_heads, head_dim = f.integer("num_key_value_heads", heads), f.integer("head_dim", max(1, hidden // heads))
    if heads % kv_heads or head_dim % 2 or (f.values.get("head_dim") is None and hidden % heads):
        raise UserError(f"{where}: {heads} heads, {kv_heads} key/value heads and width {hidden} do not divide evenly")
    max_positions = f.integer("max_position_embeddings", most=1 << 30)
    if scaling is not None and scaling.kind == "linear":  # files keep the number from before; llama3's is that after
        max_positions = round(max_positions * scaling.factor)
    window = f.values.get("sliding_window")
    if window is not None and (model_type == "mistral" or f.values.get("use_sliding_window")):
        max_positions = min(max_positions, f.integer("sliding_window"))  # within its window attention is full
    return DecoderConfig(
        **sizes,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=Fields({"rope_theta": rope.get("rope_theta", f.values["rope_theta"])}, where).number("rope_theta"),
        rope_scaling=scaling,
        norm_eps=f.number("rms_norm_eps"),
        max_positions=max_positions,
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type.startswith("qwen3"),
        **(_read_experts(f, where) if model_type == "qwen3_moe" else {}),
        tie_embeddings=f.one_of("tie_word_embeddings", False, [False, True]),
        model_type=model_type,
    )


def _read_rope(f: Fields) -> RopeScaling | None:
    """rope_parameters, or rope_scaling as it was called before transformers 5."""
    kind = f.one_of("rope_type", f.values.get("type", "default"), ["default", "linear", "llama3"])
    if kind == "default" or (kind == "linear" and f.number("factor") == 1):
        return None
    if kind == "linear":
        return RopeScaling(factor=f.number("factor"))
    low, high = f.number("low_freq_factor"), f.number("high_freq_factor")
    if low >= high:
        raise UserError(f"{f.where}: low_freq_factor {low} is not below high_freq_factor {high}")
    return RopeScaling("llama3", f.number("factor"), low, high, f.integer("original_max_position_embeddings"))


def _read_experts(f: Fields, where: str) -> dict[str, Any]:
    """The routed experts of Qwen3-MoE; every block has them."""
    f.only(decoder_sparse_step=1)
    if f.values.get("mlp_only_layers"):
        raise UserError(f"{where}: mlp_only_layers {f.values['mlp_only_layers']} is not supported (supported: none)")
    experts = f.integer("num_local_experts", f.integer("num_experts"))  # the newer spelling first
    return dict(
        num_experts=experts,
        experts_per_token=f.integer("num_experts_per_tok", most=experts),
        expert_size=f.integer("moe_intermediate_size"),
        norm_expert_weights=f.one_of("norm_topk_prob", False, [False, True]),
    )


def read_vision(values: dict[str, Any], where: str, select_layers: Any, keep_class_token: bool) -> VisionConfig:
    """A vision_config, or the config.json of a tower on its own -> VisionConfig."""
    if isinstance(values, dict) and values.get("model_type") in ("clip", "siglip"):  # two towers, of which we need one
        values = {"model_type": f"{values['model_type']}_vision_model"} | (values.get("vision_config") or {})
    model_type, f = _typed(values, VISION_DEFAULTS, "clip_vision_model", where)
    f.only(num_channels=3)
    layers = select_layers if isinstance(select_layers, list) else [select_layers]
    sizes = f.integers(VISION_SIZES)
    depth, hidden, heads = sizes["num_layers"], sizes["hidden_size"], sizes["num_heads"]
    if not layers or not all(isinstance(i, int) and -depth - 1 <= i <= depth for i in layers):
        raise UserError(f"{where}: feature layer {select_layers!r} does not exist in a tower of {depth} layers")
    image, patch = sizes["image_size"], sizes["patch_size"]
    if hidden % heads or image < patch:
        raise UserError(
            f"{where}: width {hidden} with {heads} heads, or image {image} with patch {patch}, does not fit"
        )
    is_clip = model_type == "clip_vision_model"
    return VisionConfig(
        **sizes,
        activation=ACTIVATIONS[f.one_of("hidden_act", None, ACTIVATIONS)],
        norm_eps=f.number("layer_norm_eps"),
        class_token=is_clip,
        pre_norm=is_clip,
        patch_bias=not is_clip,
        select_layers=tuple(layers),
        keep_class_token=keep_class_token and is_clip,
    )


def _check_pixels(f: Fields) -> None:
    """What every image processor here has in common."""
    f.only(do_resize=True, do_normalize=True, do_rescale=True, resample=3)  # 3: bicubic
    if abs(f.number("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise UserError(f"{f.where}: rescale_factor {f.values['rescale_factor']} is not supported (supported: 1/255)")


def read_image(values: dict[str, Any], where: str, vision: VisionConfig) -> ImageConfig:
    """An image processor's values -> ImageConfig: do_pad is 'pad', do_center_crop is 'crop', neither is 'squash'."""
    f = Fields(values, where)
    kind = str(values.get("image_processor_type", values.get("feature_extractor_type", "CLIPImageProcessor")))
    if re.sub("(Fast|Pil)$", "", kind) not in PROCESSORS:
        raise UserError(f"{where}: image processor '{kind}' is not supported (supported: {', '.join(PROCESSORS)})")
    _check_pixels(f)
    is_siglip, tiled = kind.startswith("Siglip"), kind.startswith(TILED)
    square = is_siglip or kind.startswith("LlavaOnevision")
    size = values.get("size", {"height" if square else "shortest_edge": vision.image_size})
    pad = f.one_of("do_pad", False, [False, True]) and not tiled
    crop = f.one_of("do_center_crop", not square, [False, True])
    crop_size = values.get("crop_size", vision.image_size) if crop else vision.image_size
    sides = [side for s in (size, crop_size) for side in (s.values() if isinstance(s, dict) else [s])]
    if all(side is None for side in sides) or any(side not in (None, vision.image_size) for side in sides):
        raise UserError(
            f"{where}: size {size} and crop_size {crop_size} differ from the tower's {vision.image_size} pixels"
        )
    squash = tiled or (isinstance(size, dict) and "height" in size)
    if not (pad or crop or squash):
        raise UserError(
            f"{where}: pictures are neither padded, cropped nor resized to a square; the tower needs a square"
        )
    fit = "pad" if pad else "squash" if squash else "crop"
    stated = {"size": vision.image_size, "fit": fit} | _mean_std(values, is_siglip)
    return from_dict(ImageConfig, stated, where)


def _mean_std(values: dict[str, Any], is_siglip: bool = False) -> dict[str, Any]:
    """Of the pixels: as stated, or what the tower's own image processor uses where its file does not say."""
    own = ImageConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)) if is_siglip else ImageConfig()
    return {"mean": values.get("image_mean") or own.mean, "std": values.get("image_std") or own.std}


def read_native(values: dict[str, Any], where: str, patch: int, merge: int) -> ImageConfig:
    """Qwen2VLImageProcessor: pictures keep their shape; min_pixels and max_pixels win over size."""
    f = Fields(values, where)
    kind = re.sub("(Fast|Pil)$", "", str(values.get("image_processor_type", "Qwen2VLImageProcessor")))
    if kind not in ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor"):
        raise UserError(f"{where}: image processor '{kind}' is not supported (supported: Qwen2VLImageProcessor)")
    _check_pixels(f)
    for key, only in (("patch_size", patch), ("merge_size", merge), ("temporal_patch_size", 1)):
        f.one_of(key, 2 if key == "temporal_patch_size" else only, [only])
    size = Fields(values.get("size") or {}, f"{where}: size")
    least = f.integer("min_pixels", size.integer("shortest_edge", 56 * 56, 1 << 40), 1 << 40)
    most = f.integer("max_pixels", size.integer("longest_edge", 28 * 28 * 1280, 1 << 40), 1 << 40)
    if least > most:
        raise UserError(f"{where}: min_pixels {least} is more than max_pixels {most}")
    stated = {"size": patch, "fit": "native", "min_pixels": least, "max_pixels": most} | _mean_std(values)
    return from_dict(ImageConfig, stated, where)
