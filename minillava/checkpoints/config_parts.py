"""A decoder, a vision tower and an image processor: out of their JSON, checked by fields, and back into it.

What would change an answer and is not supported is refused by name.
"""

import re
from pathlib import Path
from typing import Any

from minillava.checkpoints.config_keys import fields_of, read_keys, write_keys
from minillava.checkpoints.families import DECODERS, EXPERT_KEYS, NATIVE_TOWERS, TOWERS, Family, tower_type
from minillava.config import DecoderConfig, ImageConfig, ModelConfig, ProjectorConfig, VisionConfig
from minillava.errors import UserError
from minillava.files import shown
from minillava.schema import Fields, from_dict, optional_json, read_json

TILED = ("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")  # a view is squashed; their do_pad pads batches
PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor", "SiglipImageProcessor", *TILED)


def _typed(values: Any, families: dict[str, Family], default_type: str, where: str) -> tuple[str, Fields]:
    """The model_type of a sub-config and its values over the defaults of that type."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object, got {values!r}")
    model_type = Fields(values, where).one_of("model_type", default_type, families)
    return model_type, Fields(families[model_type].defaults | values, where)


# ---- decoder ----


def read_decoder(values: dict[str, Any], where: str, default_type: str = "llama") -> DecoderConfig:
    """A text_config (or the top level of an original config) -> DecoderConfig."""
    model_type, f = _typed(values, DECODERS, default_type, where)
    f.only(hidden_act="silu", attention_bias=False, mlp_bias=False, partial_rotary_factor=1.0)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters is {rope!r}, expected an object")
    f.values |= {"rope_parameters": rope, "rope_theta": rope.get("rope_theta", f.values["rope_theta"])}
    family = DECODERS[model_type]
    found = fields_of("decoder", read_keys(family.keys, f))
    heads, kv_heads, hidden = found["num_heads"], found["num_kv_heads"], found["hidden_size"]
    if heads % kv_heads or found["head_dim"] % 2 or (f.values.get("head_dim") is None and hidden % heads):
        raise UserError(f"{where}: {heads} heads, {kv_heads} key/value heads and width {hidden} do not divide evenly")
    if "num_experts" in found:
        f.only(decoder_sparse_step=1)  # every block has them
        if without := f.values.get("mlp_only_layers"):
            raise UserError(f"{where}: mlp_only_layers {without} is not supported (supported: none)")
        f.integer("num_experts_per_tok", most=found["num_experts"])
    found["max_positions"] = _context(model_type, f, found)
    return DecoderConfig(**found, **family.decides, model_type=model_type)


def _context(model_type: str, f: Fields, found: dict[str, Any]) -> int:
    """Positions that the decoder takes."""
    positions, scaling = found["max_positions"], found["rope_scaling"]
    if scaling is not None and scaling.kind == "linear":  # files keep the number from before; llama3's is that after
        positions = round(positions * scaling.factor)
    window = f.values.get("sliding_window")
    if window is not None and (model_type == "mistral" or f.values.get("use_sliding_window")):
        positions = min(positions, f.integer("sliding_window"))  # within its window attention is full
    return positions


def write_decoder(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """A text_config. Raises UserError for a decoder that is of no family."""
    d, family = config.decoder, DECODERS.get(config.decoder.model_type)
    experts = family is not None and set(EXPERT_KEYS) <= set(family.keys)
    decided = family is not None and all(getattr(d, name) == value for name, value in family.decides.items())
    if family is None or not decided or experts != (d.num_experts > 0):
        raise UserError(
            f"a decoder of type {d.model_type} with qkv_bias {d.qkv_bias}, qk_norm {d.qk_norm} has no foreign name"
        )
    own = dict(model_type=d.model_type, sliding_window=None, dtype=dtype, **special_ids(config))
    return own | write_keys(family.keys, config) | family.written


def special_ids(config: ModelConfig) -> dict[str, Any]:
    """bos, eos and pad as text_config and generation_config.json spell them."""
    chat = config.chat
    eos: Any = list(chat.eos_ids) if len(chat.eos_ids) > 1 else next(iter(chat.eos_ids), None)
    return {"bos_token_id": chat.bos_id, "eos_token_id": eos, "pad_token_id": chat.pad_id}


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """generation_config.json."""
    penalty = config.chat.repetition_penalty
    ids = {key: value for key, value in special_ids(config).items() if value is not None}
    return ids | ({"repetition_penalty": penalty} if penalty != 1 else {})


# ---- vision tower ----


def read_vision(values: dict[str, Any], where: str, select_layers: Any, keep_class_token: bool) -> VisionConfig:
    """A vision_config, or the config.json of a tower on its own -> VisionConfig."""
    if isinstance(values, dict) and values.get("model_type") in ("clip", "siglip"):  # two towers, of which we need one
        values = {"model_type": f"{values['model_type']}_vision_model"} | (values.get("vision_config") or {})
    families = {name: family for name, family in TOWERS.items() if family.whole == "llava"}
    model_type, f = _typed(values, families, "clip_vision_model", where)
    family, layers = families[model_type], select_layers if isinstance(select_layers, list) else [select_layers]
    found = fields_of("vision", read_keys(family.keys, f))
    depth, hidden, heads = found["num_layers"], found["hidden_size"], found["num_heads"]
    if not layers or not all(isinstance(i, int) and -depth - 1 <= i <= depth for i in layers):
        raise UserError(
            f"{where}: vision_feature_layer (mm_vision_select_layer) is {shown(select_layers)}, expected one of a "
            f"tower of {depth} layers"
        )
    image, patch = found["image_size"], found["patch_size"]
    if hidden % heads or image < patch:
        raise UserError(
            f"{where}: width {hidden} with {heads} heads, or image {image} with patch {patch}, does not fit"
        )
    keep = keep_class_token and family.decides["class_token"]
    return VisionConfig(**found, **family.decides, select_layers=tuple(layers), keep_class_token=keep)


def write_vision(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """A vision_config of transformers."""
    model_type = tower_type(config.vision)
    family = TOWERS[model_type]
    return {"model_type": model_type} | write_keys(family.keys, config) | {"dtype": dtype} | family.written


def read_native_tower(
    values: dict[str, Any], where: str, own: dict[str, Any] | None = None
) -> tuple[VisionConfig, ProjectorConfig]:
    """A vision_config, or the config.json of a tower on its own, of a family that takes pictures at their own size; its
    merger is the projector. `own` is what a config.json says to this package alone."""
    model_type = values["model_type"]
    family, stated = NATIVE_TOWERS[model_type], {key: value for key, value in values.items() if value is not None}
    found = read_keys(family.keys, Fields(family.defaults | stated, where))
    sizes, merger = fields_of("vision", found), fields_of("projector", found)
    hidden, heads, merge = sizes["hidden_size"], sizes["num_heads"], merger.get("merge", 2)
    shares = family.decides.get("rotary_shares", VisionConfig.rotary_shares)
    if hidden % heads or hidden // heads % (2 * sum(shares)) or merge < 2:
        raise UserError(f"{where}: width {hidden} with {heads} heads, or a merge of {merge}, does not fit")
    slip = Fields(own or {}, f"{where}: minillava").one_of("strip_slip", False, [False, True])
    one = {"image_size": sizes["patch_size"], "select_layers": (-1,), "strip_slip": slip}  # a view is one patch
    return VisionConfig(**sizes, **one, **family.decides), ProjectorConfig(2, **{"merge": merge} | merger)


# ---- image processor ----


def image_processor(folder: Path) -> tuple[dict[str, Any], str]:
    """The image processor's values and the file that has them: since transformers 5 one with those of the processor."""
    path = folder / "processor_config.json"
    values = optional_json(path).get("image_processor")
    if isinstance(values, dict):
        return values, str(path)
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no preprocessor_config.json, and no image_processor in a processor_config.json; copy it"
        )
    return read_json(path), str(path)


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
            f"{where}: size {size} and crop_size {crop_size} differ from the tower's {vision.image_size} pixels; "
            "use the files of one checkpoint"
        )
    squash = tiled or (isinstance(size, dict) and "height" in size)
    if not (pad or crop or squash):
        raise UserError(
            f"{where}: pictures are neither padded, cropped nor resized to a square; the tower needs a square"
        )
    fit = "pad" if pad else "squash" if squash else "crop"
    return _image(values, where, is_siglip, size=vision.image_size, fit=fit)


def _image(values: dict[str, Any], where: str, is_siglip: bool = False, **read: Any) -> ImageConfig:
    """What was `read`, with mean and deviation as the file has them, else as the tower's own image processor has."""
    own = ImageConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)) if is_siglip else ImageConfig()
    read |= {"mean": values.get("image_mean") or own.mean, "std": values.get("image_std") or own.std}
    image = from_dict(ImageConfig, read, where)
    if not all(abs(mean) <= 255 and 1e-3 <= std <= 255 for mean, std in zip(image.mean, image.std)):
        raise UserError(f"{where}: mean {image.mean} and std {image.std} are no statistics of pixels from 0 to 1")
    return image


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
    return _image(values, where, size=patch, fit="native", min_pixels=least, max_pixels=most)


def write_native(image: ImageConfig, patch: int, merge: int) -> dict[str, Any]:
    """preprocessor_config.json of Qwen2VLImageProcessor."""
    return dict(
        image_processor_type="Qwen2VLImageProcessor", do_convert_rgb=True, do_resize=True, do_rescale=True,
        do_normalize=True, rescale_factor=1 / 255, resample=3, image_mean=list(image.mean), image_std=list(image.std),
        size={"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels}, min_pixels=image.min_pixels,
        max_pixels=image.max_pixels, patch_size=patch, merge_size=merge, temporal_patch_size=1,
    )  # fmt: skip
