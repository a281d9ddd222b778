"""config.json of LLaVA-OneVision-1.5 and 2 in and out: a native-size tower, a merger, Qwen3 or Qwen3-MoE.

OneVision-1.5 as its own files are, and as transformers' open pull request 48896 names it (September 2026); OneVision-2
as released, which is what vLLM reads; Mage-VL is its architecture under other names. The code that the released files
name for transformers is not in what we write: get it from the original.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillava.checkpoints import config_parts
from minillava.checkpoints.chat_files import own_chat, own_values, read_chat
from minillava.checkpoints.config_keys import FLAG, Key, fields_of, read_keys, write_keys
from minillava.checkpoints.families import NATIVE_RICE_KEYS, TOWERS, tower_type
from minillava.config import LayoutConfig, ModelConfig
from minillava.errors import UserError
from minillava.schema import Fields, from_dict, to_dict

TOP_KEYS = (
    Key("image_token_id", "chat.image_token_id", default=lambda _: 151655),
    Key("video_token_id", "chat.video_token_id", default=lambda _: 151656),
)
TIED = Key("tie_word_embeddings", "decoder.tie_embeddings", FLAG)  # at the top, whatever text_config says
# What OneVision-2's own processor does with clips.
LAYOUT_2 = dict(video_sampling="rounded", max_frames=384, time_tags=True)


@dataclass(frozen=True)
class Release:
    """What one release of the files calls things."""

    model_type: str
    tower: str  # a name of `families.TOWERS`, and by default what vision_config calls it
    architecture: str
    processor: str
    layout: dict[str, Any] = field(default_factory=dict)  # what is not LayoutConfig's default
    tower_type: str = ""
    text_type: str = ""  # "": that of transformers
    top_tie: bool = True  # the top level decides whether the head is tied
    routed: str = "_moe"  # behind model_type where the decoder has experts


RELEASES: dict[str, Release] = {
    "onevision_1_5": Release(
        "llavaonevision1_5", "rice_vit", "LLaVAOneVision1_5_ForConditionalGeneration", "Qwen2_5_VLProcessor",
        text_type="LLaVAOneVision1_5_text", top_tie=False, routed="",
    ),
    "onevision_1_5_native": Release(
        "llava_onevision1_5", "rice_vit", "LlavaOnevision1_5ForConditionalGeneration", "Qwen2_5_VLProcessor",
        tower_type="llava_onevision1_5_vision", routed="",
    ),
    "onevision_2": Release(
        "llava_onevision2", "onevision_encoder", "LlavaOnevision2ForConditionalGeneration", "LlavaOnevision2Processor",
        LAYOUT_2,
    ),
    "mage_vl": Release(
        "mage_vl", "onevision_encoder", "MageVLForConditionalGeneration", "MageVLProcessor", LAYOUT_2, "mage_vl_vision"
    ),
}  # fmt: skip


def release_of(model_type: str) -> str:
    """The name in RELEASES of files with this model_type; "" for all others."""
    for name, release in RELEASES.items():
        if model_type in (release.model_type, f"{release.model_type}{release.routed}"):
            return name
    return "onevision_1_5" if model_type.startswith(RELEASES["onevision_1_5"].model_type) else ""


def read(raw: dict[str, Any], folder: Path) -> ModelConfig:
    """The ModelConfig of a folder whose config.json holds `raw`; its text_config's fields tell which Qwen3 it is."""
    where, release = str(folder / "config.json"), RELEASES[release_of(raw["model_type"])]
    text, tower = raw.get("text_config") or {}, raw.get("vision_config") or {}
    if not isinstance(text, dict) or not isinstance(tower, dict):
        raise UserError(f"{where}: text_config and vision_config have to be objects")
    routed = text.get("num_experts") or text.get("num_local_experts")
    text = text | {"model_type": "qwen3_moe" if routed else "qwen3"}
    if release.top_tie:
        text["tie_word_embeddings"] = FLAG.read(Fields(raw, where), TIED.theirs, False)  # type: ignore[misc]
    decoder = config_parts.read_decoder(text, f"{where}: text_config")
    own = own_values(raw, folder)
    types = [release.tower_type or release.tower, release.tower]
    Fields(tower, f"{where}: vision_config").one_of("model_type", release.tower, types)
    vision, projector = config_parts.read_native_tower(
        tower | {"model_type": release.tower}, f"{where}: vision_config", own
    )
    image = config_parts.read_native(*config_parts.image_processor(folder), vision.patch_size, projector.merge)
    layout = from_dict(LayoutConfig, release.layout | own.get("layout", {}), f"{where}: minillava.layout")
    placeholders = fields_of("chat", read_keys(TOP_KEYS, Fields(raw, where)))
    chat = read_chat(
        folder, raw, text, decoder, lambda _: "onevision_1_5", image_token="<|image_pad|>", video_token="<|video_pad|>",
        **placeholders,
    )  # fmt: skip
    return ModelConfig(vision, projector, decoder, image, layout, chat)


def write(config: ModelConfig, dtype: str, name: str) -> dict[str, dict[str, Any]]:
    """The JSON files of a folder, by name, as a release has them. Raises UserError for another tower than its own."""
    release, own = RELEASES[name], {"strip_slip": config.vision.strip_slip, "chat": own_chat(config)}
    if tower_type(config.vision) != release.tower:
        raise UserError(f"{release.model_type} has a tower of type {release.tower}; save this model without naming it")
    if name == "onevision_1_5_native" and config.decoder.num_experts:
        raise UserError(f"{release.model_type} has no routed experts in transformers; save without naming it")
    if config.vision.norm_eps != config.projector.norm_eps:
        raise UserError("tower and merger have one epsilon in these files; make their norm_eps equal")
    text = config_parts.write_decoder(config, dtype)
    keys = NATIVE_RICE_KEYS if name == "onevision_1_5_native" else TOWERS[release.tower].keys
    top = dict(
        architectures=[release.architecture],
        model_type=release.model_type + (release.routed if config.decoder.num_experts else ""),
        text_config=text | ({"model_type": release.text_type} if release.text_type else {}),
        vision_config={"model_type": release.tower_type or release.tower} | write_keys(keys, config),
        torch_dtype=dtype, **write_keys(TOP_KEYS, config),
    )  # fmt: skip
    if release.top_tie:
        top |= write_keys((TIED,), config) | {"dtype": dtype} | config_parts.special_ids(config)
    if release.layout:
        own = {"chat": own_chat(config), "layout": to_dict(config.layout)}
    pixels = config_parts.write_native(config.image, config.vision.patch_size, config.projector.merge)
    return {
        "config.json": top | {"minillava": own},
        "preprocessor_config.json": pixels | {"processor_class": release.processor},
        "generation_config.json": config_parts.generation_config(config),
    }
