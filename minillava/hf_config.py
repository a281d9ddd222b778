"""config.json and its companions, in and out: Hugging Face's layout and the original LLaVA's become one ModelConfig.

Everything is read by fields, nothing by a path or a model's name. Files on the hub leave out what equalled the class
default of their day, so the defaults stand here (transformers 5.23). What would change an answer and is not
supported is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillava.config import (
    ChatConfig,
    DecoderConfig,
    ImageConfig,
    LayoutConfig,
    ModelConfig,
    ProjectorConfig,
    RopeScaling,
    UserError,
    VisionConfig,
    from_dict,
    to_dict,
)
from minillava.hf_layout import HF_CLASSES, hf_layout, original_layout, read_grids

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
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
MEAN_STD: dict[str, dict[str, Any]] = {  # what a tower's own image processor uses where its file does not say
    "clip_vision_model": dict(image_mean=list(ImageConfig().mean), image_std=list(ImageConfig().std)),
    "siglip_vision_model": dict(image_mean=[0.5] * 3, image_std=[0.5] * 3),
}
ONEVISION_15 = "llavaonevision1_5"  # and what begins so; transformers has no class of its own for it
HF_TYPES = (*HF_CLASSES, "minillava")  # minillava: our own, where transformers has no class (see `to_hf`)
# model_type -> the decoder's. "llava" is both: the original has mm_vision_tower, the other vision_config.
ORIGINAL_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
TILED = ("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")  # a view is squashed; their do_pad pads batches
PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor", "SiglipImageProcessor", *TILED)

Find = Callable[[str, Path, str], Path]  # (folder or hub id, the checkpoint that names it, what it is) -> folder


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


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


@dataclasses.dataclass
class _Fields:
    """Values of a (nested) config with the defaults of its class, checked as they are read."""

    values: dict[str, Any]
    where: str

    def integer(self, key: str, default: int | None = None, most: int = 1 << 24) -> int:
        value = self.values.get(key, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise UserError(f"{self.where}: {key} is {value!r}, expected an integer from 1 to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise UserError(f"{self.where}: {key} is {value!r}, expected a positive number")
        return float(value)

    def one_of(self, key: str, default: Any, allowed: Any) -> Any:
        value = self.values.get(key, default)
        value = default if value is None else value
        if not isinstance(value, str | bool | int | float) or value not in allowed:
            raise UserError(
                f"{self.where}: {key} {value!r} is not supported (supported: {', '.join(map(str, allowed))})"
            )
        return value


def _typed(values: Any, defaults: dict[str, dict[str, Any]], default_type: str, where: str) -> tuple[str, _Fields]:
    """The model_type of a sub-config and its values over the defaults of that type."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object, got {values!r}")
    model_type = _Fields(values, where).one_of("model_type", default_type, defaults)
    return model_type, _Fields(defaults[model_type] | values, where)


def read_decoder(values: dict[str, Any], where: str, default_type: str = "llama", tied: bool = False) -> DecoderConfig:
    """A text_config (or the top level of an original config) -> DecoderConfig."""
    model_type, f = _typed(values, TEXT_DEFAULTS, default_type, where)
    f.one_of("hidden_act", "silu", ["silu"])
    f.one_of("attention_bias", False, [False])
    f.one_of("mlp_bias", False, [False])
    f.one_of("partial_rotary_factor", 1.0, [1.0])
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters is {rope!r}, expected an object")
    scaling = _read_rope(_Fields(rope, f"{where}: rope scaling"))
    heads, hidden = f.integer("num_attention_heads"), f.integer("hidden_size")
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
        vocab_size=f.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=f.integer("intermediate_size"),
        num_layers=f.integer("num_hidden_layers", most=1024),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=_Fields({"rope_theta": rope.get("rope_theta", f.values["rope_theta"])}, where).number("rope_theta"),
        rope_scaling=scaling,
        norm_eps=f.number("rms_norm_eps"),
        max_positions=max_positions,
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type.startswith("qwen3"),
        **(_read_experts(f, where) if model_type == "qwen3_moe" else {}),
        tie_embeddings=f.one_of("tie_word_embeddings", tied, [False, True]),
        model_type=model_type,
    )


def _read_rope(f: _Fields) -> RopeScaling | None:
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


def _read_experts(f: _Fields, where: str) -> dict[str, Any]:
    """The routed experts of Qwen3-MoE; every block has them."""
    f.one_of("decoder_sparse_step", 1, [1])
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
    if isinstance(values, dict) and values.get("model_type") in (
        "clip",
        "siglip",
    ):  # the two-tower model; its vision half has all that we need
        values = {"model_type": f"{values['model_type']}_vision_model"} | (values.get("vision_config") or {})
    model_type, f = _typed(values, VISION_DEFAULTS, "clip_vision_model", where)
    f.one_of("num_channels", 3, [3])
    layers = select_layers if isinstance(select_layers, list) else [select_layers]
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    depth = f.integer("num_hidden_layers", most=1024)
    if not layers or not all(isinstance(i, int) and -depth - 1 <= i <= depth for i in layers):
        raise UserError(f"{where}: feature layer {select_layers!r} does not exist in a tower of {depth} layers")
    image, patch = f.integer("image_size"), f.integer("patch_size")
    if hidden % heads or image < patch:
        raise UserError(
            f"{where}: width {hidden} with {heads} heads, or image {image} with patch {patch}, does not fit"
        )
    is_clip = model_type == "clip_vision_model"
    return VisionConfig(
        hidden_size=hidden,
        intermediate_size=f.integer("intermediate_size"),
        num_layers=depth,
        num_heads=heads,
        image_size=image,
        patch_size=patch,
        activation=ACTIVATIONS[f.one_of("hidden_act", None, ACTIVATIONS)],
        norm_eps=f.number("layer_norm_eps"),
        class_token=is_clip,
        pre_norm=is_clip,
        patch_bias=not is_clip,
        select_layers=tuple(layers),
        keep_class_token=keep_class_token and is_clip,
    )


def _check_pixels(f: _Fields) -> None:
    """What every image processor here has in common."""
    for key in ("do_resize", "do_normalize", "do_rescale"):
        f.one_of(key, True, [True])
    f.one_of("resample", 3, [3])  # bicubic
    if abs(f.number("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise UserError(f"{f.where}: rescale_factor {f.values['rescale_factor']} is not supported (supported: 1/255)")


def read_image(values: dict[str, Any], where: str, vision: VisionConfig) -> ImageConfig:
    """An image processor's values -> ImageConfig: do_pad is 'pad', do_center_crop is 'crop', neither is 'squash'."""
    f = _Fields(values, where)
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
    sides = [
        side for s in (size, crop_size) for side in (s.values() if isinstance(s, dict) else [s]) if side is not None
    ]
    if not sides or any(side != vision.image_size for side in sides):
        raise UserError(
            f"{where}: size {size} and crop_size {crop_size} differ from the tower's {vision.image_size} pixels"
        )
    squash = tiled or (isinstance(size, dict) and "height" in size)
    if not (pad or crop or squash):
        raise UserError(
            f"{where}: pictures are neither padded, cropped nor resized to a square; the tower needs a square"
        )
    fit = "pad" if pad else "squash" if squash else "crop"
    defaults = MEAN_STD["siglip_vision_model" if is_siglip else "clip_vision_model"]
    stated = {k: values.get(k) or defaults[k] for k in ("image_mean", "image_std")}
    return from_dict(
        ImageConfig,
        {"size": vision.image_size, "fit": fit, "mean": stated["image_mean"], "std": stated["image_std"]},
        where,
    )


def _read_hf(raw: dict[str, Any], folder: Path) -> ModelConfig:
    where, kind = str(folder / "config.json"), raw["model_type"]
    known = HF_CLASSES.get(kind, HF_CLASSES["llava"])
    said = {key.replace("token_id", "token_index"): value for key, value in raw.items() if value is not None}
    top = _Fields(known.defaults | said, where)
    strategy = top.one_of("vision_feature_select_strategy", None, ["default", "full"])
    tower, text = top.values["vision_config"], raw.get("text_config") or {}
    if isinstance(tower, dict):
        tower = {"model_type": known.defaults["vision_config"]["model_type"]} | tower
    vision = read_vision(tower, f"{where}: vision_config", top.values["vision_feature_layer"], strategy == "full")
    tied = top.one_of("tie_word_embeddings", False, [False, True])
    decoder = read_decoder(text, f"{where}: text_config", known.text)
    decoder = dataclasses.replace(decoder, tie_embeddings=tied or decoder.tie_embeddings)
    ours = _ours(raw, where)
    projector = ProjectorConfig(
        layers=_Fields(ours, f"{where}: minillava").integer("projector_layers", 2, most=8),
        activation=ACTIVATIONS[top.one_of("projector_hidden_act", "gelu", ["gelu", "gelu_pytorch_tanh"])],
        bias=top.one_of("multimodal_projector_bias", True, [False, True]),
    )
    processor = _optional_json(folder / "processor_config.json")
    if isinstance(processor.get("image_processor"), dict):
        pixels, path = processor["image_processor"], folder / "processor_config.json"
    elif (folder / "preprocessor_config.json").is_file():
        path = folder / "preprocessor_config.json"
        pixels = read_json(path)
    else:
        raise UserError(
            f"{folder}: no preprocessor_config.json, and no image_processor in a processor_config.json; copy it"
        )
    image = read_image(pixels, str(path), vision)
    layout = hf_layout(kind, top, vision.image_size) if kind in HF_CLASSES else LayoutConfig()
    if not layout.grids and str(pixels.get("image_processor_type")).startswith(TILED):
        raise UserError(f"{path}: {pixels['image_processor_type']} cuts pictures into tiles; not supported for {kind}")
    cut = pixels.get("image_grid_pinpoints") if layout.grids else None
    if cut is not None and set(read_grids(cut, image.size, str(path), False)) != set(layout.grids):
        raise UserError(f"{path}: image_grid_pinpoints differs from config.json's; make the two equal")
    if layout.grids and vision.keep_class_token:
        raise UserError(
            f"{where}: vision_feature_select_strategy 'full' keeps a class token, which fits no map of tiles"
        )
    jinja = _jinja(folder, processor)
    chat = ChatConfig(
        template="jinja" if jinja else _template(folder, decoder.model_type, projector.layers),
        jinja=jinja,
        split_at_image=False,
        image_token=processor.get("image_token") or "<image>",
        image_token_id=top.values["image_token_index"],
        video_token=(processor.get("video_token") or "<video>") if "video_token_index" in known.defaults else "",
        video_token_id=top.values.get("video_token_index", -200),
        **_special_ids(raw, text, decoder, folder),
    )
    layout = from_dict(LayoutConfig, to_dict(layout) | ours.get("layout", {}), f"{where}: minillava.layout")
    return ModelConfig(vision, projector, decoder, image, layout, _overridden(chat, ours, where))


def _read_onevision_15(raw: dict[str, Any], folder: Path) -> ModelConfig:
    """LLaVA-OneVision-1.5: RICE, a merger, Qwen3 or Qwen3-MoE (its fields tell which)."""
    where = str(folder / "config.json")
    text, tower, ours = raw.get("text_config") or {}, raw.get("vision_config") or {}, _ours(raw, where)
    if not isinstance(text, dict) or not isinstance(tower, dict):
        raise UserError(f"{where}: text_config and vision_config have to be objects")
    routed = text.get("num_experts") or text.get("num_local_experts")
    decoder = read_decoder(text | {"model_type": "qwen3_moe" if routed else "qwen3"}, f"{where}: text_config")
    f = _Fields(tower, f"{where}: vision_config")
    f.one_of("model_type", "rice_vit", ["rice_vit"])
    for key, only in (("in_channels", 3), ("temporal_patch_size", 1), ("layer_norm_eps", 1e-5)):
        f.one_of(key, only, [only])
    hidden, heads = f.integer("embed_dim", f.integer("hidden_size", 1024)), f.integer("num_heads", 16)
    depth, patch, merge = (
        f.integer("depth", 24, 1024),
        f.integer("patch_size", 14),
        f.integer("spatial_merge_size", 2, 8),
    )
    if hidden % heads or hidden // heads % 4 or merge < 2:
        raise UserError(f"{f.where}: width {hidden} with {heads} heads, or a merge of {merge}, does not fit")
    vision = VisionConfig(
        hidden, f.integer("intermediate_size", 4096), depth, heads, patch, patch,
        activation=ACTIVATIONS[f.one_of("hidden_act", "gelu", ACTIVATIONS)], select_layers=(-1,), rotary=True,
        strip_slip=_Fields(ours, f"{where}: minillava").one_of("strip_slip", False, [False, True]),
    )  # fmt: skip
    processor = _optional_json(folder / "processor_config.json")
    path = folder / "preprocessor_config.json"
    values = processor.get("image_processor") or read_json(path)
    image = _read_native(values, str(path), patch, merge)
    chat = ChatConfig(
        template="jinja" if (jinja := _jinja(folder, processor)) else "onevision_1_5",
        jinja=jinja,
        split_at_image=False,
        image_token="<|image_pad|>",
        image_token_id=_Fields(raw, where).integer("image_token_id", 151655),
        video_token="<|video_pad|>",
        video_token_id=_Fields(raw, where).integer("video_token_id", 151656),
        **_special_ids(raw, text, decoder, folder),
    )
    projector = ProjectorConfig(2, merge=merge)
    return ModelConfig(vision, projector, decoder, image, chat=_overridden(chat, ours, where))


def _read_native(values: dict[str, Any], where: str, patch: int, merge: int) -> ImageConfig:
    """Qwen2VLImageProcessor: pictures keep their shape; min_pixels and max_pixels win over size."""
    f = _Fields(values, where)
    kind = re.sub("(Fast|Pil)$", "", str(values.get("image_processor_type", "Qwen2VLImageProcessor")))
    if kind not in ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor"):
        raise UserError(f"{where}: image processor '{kind}' is not supported (supported: Qwen2VLImageProcessor)")
    _check_pixels(f)
    for key, only in (("patch_size", patch), ("merge_size", merge), ("temporal_patch_size", 1)):
        f.one_of(key, 2 if key == "temporal_patch_size" else only, [only])
    size = _Fields(values.get("size") or {}, f"{where}: size")
    least = f.integer("min_pixels", size.integer("shortest_edge", 56 * 56, 1 << 40), 1 << 40)
    most = f.integer("max_pixels", size.integer("longest_edge", 28 * 28 * 1280, 1 << 40), 1 << 40)
    if least > most:
        raise UserError(f"{where}: min_pixels {least} is more than max_pixels {most}")
    mean_std = {k: values.get(k) or d for k, d in MEAN_STD["clip_vision_model"].items()}
    stated = {"mean": mean_std["image_mean"], "std": mean_std["image_std"]}
    return from_dict(
        ImageConfig, {"size": patch, "fit": "native", "min_pixels": least, "max_pixels": most, **stated}, where
    )


def _ours(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """What we add to a config.json, and transformers passes over: projector_layers, and objects chat and layout."""
    ours = raw.get("minillava", {})
    if not isinstance(ours, dict) or not all(isinstance(ours.get(key, {}), dict) for key in ("chat", "layout")):
        raise UserError(f"{where}: minillava is {ours!r}, expected an object, and objects as its 'chat' and 'layout'")
    return ours


def _overridden(chat: ChatConfig, ours: dict[str, Any], where: str) -> ChatConfig:
    """`chat` with the values of config.json's "minillava": {"chat": {...}}: our saves have all but the jinja."""
    chat = from_dict(ChatConfig, to_dict(chat) | ours.get("chat", {}), f"{where}: minillava.chat")
    return chat if chat.template == "jinja" else dataclasses.replace(chat, jinja="")


def _jinja(folder: Path, processor: dict[str, Any]) -> str:
    """The chat template in the four places where it has lived, newest first; '' if there is none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    files = (_optional_json(folder / "chat_template.json"), processor, _optional_json(folder / "tokenizer_config.json"))
    found = next((f["chat_template"] for f in files if f.get("chat_template")), "")
    if isinstance(found, list):  # several, by name
        found = next((t["template"] for t in found if t.get("name") == "default"), "")
    return found


def _special_ids(raw: dict[str, Any], text: dict[str, Any], decoder: DecoderConfig, folder: Path) -> dict[str, Any]:
    """bos, eos and pad ids: of generation_config.json, else of the decoder's config, else of the tokenizer."""
    generation, defaults = _optional_json(folder / "generation_config.json"), TEXT_DEFAULTS[decoder.model_type]
    tokenizer = _optional_json(folder / "tokenizer_config.json")

    def find(key: str) -> Any:
        for values in (generation, text, raw):
            if values.get(f"{key}_token_id") is not None:
                return values[f"{key}_token_id"]
        from_class = defaults.get(f"{key}_token_id")
        return _token_id(folder, tokenizer, tokenizer.get(f"{key}_token")) if from_class is None else from_class

    eos = find("eos")
    eos_ids = [] if eos is None else list(eos) if isinstance(eos, list) else [eos]
    written = _token_id(folder, tokenizer, tokenizer.get("eos_token"))  # Qwen's config.json may name another than this
    eos_ids += [] if written is None or written in eos_ids else [written]
    return {"bos_id": find("bos"), "eos_ids": tuple(eos_ids), "pad_id": find("pad")}


def _token_id(folder: Path, tokenizer: dict[str, Any], token: Any) -> int | None:
    """The id of a special token, from the files that list added tokens."""
    content = token.get("content") if isinstance(token, dict) else token
    added = {t.get("content"): int(i) for i, t in tokenizer.get("added_tokens_decoder", {}).items()}
    added |= _optional_json(folder / "added_tokens.json")
    if content is not None and content not in added:
        added |= {t["content"]: t["id"] for t in _optional_json(folder / "tokenizer.json").get("added_tokens", [])}
    return added.get(content)


def _read_original(raw: dict[str, Any], folder: Path, find: Find) -> ModelConfig:
    where = str(folder / "config.json")
    top = _Fields(raw, where)
    model_type = ORIGINAL_TYPES[top.one_of("model_type", None, ORIGINAL_TYPES)]
    top.one_of("s2", False, [False])
    select = top.one_of("mm_vision_select_feature", "patch", ["patch", "cls_patch"])
    tower = tower_folder(raw, folder, find)
    where_tower, layer = str(tower / "config.json"), raw.get("mm_vision_select_layer", -2)
    vision = read_vision(read_json(tower / "config.json"), where_tower, layer, select == "cls_patch")
    if not vision.class_token:  # the original takes SigLIP's last block off and then reads the last, whatever layer
        vision = dataclasses.replace(vision, num_layers=vision.num_layers - 1, select_layers=(-1,))
    wiped = {"rope_scaling": None} if model_type == "qwen2" else {}  # by the original's LlavaQwen
    decoder = read_decoder({**raw, **wiped, "model_type": model_type}, where)
    kind = str(raw.get("mm_projector_type") or "linear")
    match = re.fullmatch(r"linear|mlp([1-8])x_gelu", kind)
    if match is None:
        raise UserError(f"{where}: mm_projector_type '{kind}' is not supported (supported: linear, mlp2x_gelu)")
    projector = ProjectorConfig(layers=int(match[1] or 1))
    path = tower / "preprocessor_config.json"
    kind = "CLIPImageProcessor" if vision.class_token else "SiglipImageProcessor"
    image = read_image({"image_processor_type": kind} | _optional_json(path), str(path), vision)
    layout, fit = original_layout(top, vision.image_size, image.fit)
    image = dataclasses.replace(image, fit=fit)
    ids = _special_ids(raw, raw, decoder, folder)
    if (ids["bos_id"], ids["eos_ids"]) == (0, (1,)):  # of an early converter; LLaMA's vocabulary has 1 and 2
        ids = {"bos_id": 1, "eos_ids": (2,), "pad_id": None}
    chat = ChatConfig(
        template=_template(folder, model_type, projector.layers),
        image_start_end=top.one_of("mm_use_im_start_end", False, [False, True]),
        **ids,
    )
    return ModelConfig(vision, projector, decoder, image, layout, _overridden(chat, _ours(raw, where), where))


def _template(folder: Path, decoder: str, layers: int) -> str:
    """The prompt where the files bring none: there by the model's name, here by what its tokenizer marks turns with."""
    tokenizer = _optional_json(folder / "tokenizer_config.json")
    if _token_id(folder, tokenizer, "<|start_header_id|>") is not None:
        return "llama_3"
    if _token_id(folder, tokenizer, "<|im_start|>") is not None:
        return "qwen_1_5" if decoder.startswith("qwen") else "chatml_direct"
    return "mistral_instruct" if decoder == "mistral" else "vicuna_v1" if layers > 1 else "llava_v1"


def is_original(raw: dict[str, Any]) -> bool:
    """Whether a config.json is of the original layout: it names its tower, and holds no vision_config."""
    return "mm_vision_tower" in raw and "vision_config" not in raw


def tower_folder(raw: dict[str, Any], folder: Path, find: Find) -> Path:
    """The folder of the vision tower that an original config.json names."""
    name = raw["mm_vision_tower"]
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder / 'config.json'}: mm_vision_tower is {name!r}, expected a folder or a hub id")
    return find(name, folder, "the vision tower (mm_vision_tower)")


def model_config(raw: dict[str, Any], folder: Path, find: Find) -> ModelConfig:
    """The ModelConfig of a checkpoint folder whose config.json holds `raw`; UserError for what is unsupported."""
    quantization = raw.get("quantization_config") or {}
    if quantization and not (quantization.get("quant_method") == "bitsandbytes" and quantization.get("load_in_4bit")):
        kind = quantization.get("quant_method")
        raise UserError(
            f"{folder / 'config.json'}: weights quantised by {kind!r} are not supported (bitsandbytes in 4 bits is); "
            "use the unquantised checkpoint"
        )
    if is_original(raw):
        return _read_original(raw, folder, find)
    if str(raw.get("model_type")).startswith(ONEVISION_15):
        return _read_onevision_15(raw, folder)
    if raw.get("model_type") not in HF_TYPES:
        raise UserError(
            f"{folder / 'config.json'}: model_type {raw.get('model_type')!r} is not supported (supported: "
            f"{', '.join(HF_CLASSES)}; original LLaVA, with mm_vision_tower: {', '.join(ORIGINAL_TYPES)})"
        )
    return _read_hf(raw, folder)
