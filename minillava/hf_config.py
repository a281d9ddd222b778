"""config.json and its companions, in and out: Hugging Face's layout and the original LLaVA's become one ModelConfig.

Everything is read by fields, nothing by a path or a model's name; `minillava.hf_parts` reads the parts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillava.config import (
    ChatConfig,
    DecoderConfig,
    LayoutConfig,
    ModelConfig,
    ProjectorConfig,
    UserError,
    VisionConfig,
    from_dict,
    to_dict,
)
from minillava.hf_layout import HF_CLASSES, hf_layout, original_layout, read_grids
from minillava.hf_parts import (
    ACTIVATIONS,
    TEXT_DEFAULTS,
    TILED,
    Fields,
    optional_json,
    read_decoder,
    read_image,
    read_json,
    read_native,
    read_vision,
)

ONEVISION_15 = "llavaonevision1_5"  # and what begins so; transformers has no class of its own for it
HF_TYPES = (*HF_CLASSES, "minillava")  # minillava: our own, where transformers has no class (see `to_hf`)
ORIGINAL_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
Find = Callable[[str, Path, str], Path]  # (folder or hub id, the checkpoint that names it, what it is) -> folder


def _read_hf(raw: dict[str, Any], folder: Path) -> ModelConfig:
    where, kind = str(folder / "config.json"), raw["model_type"]
    known = HF_CLASSES.get(kind, HF_CLASSES["llava"])
    said = {key.replace("token_id", "token_index"): value for key, value in raw.items() if value is not None}
    top = Fields(known.defaults | said, where)
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
        layers=Fields(ours, f"{where}: minillava").integer("projector_layers", 2, most=8),
        activation=ACTIVATIONS[top.one_of("projector_hidden_act", "gelu", ["gelu", "gelu_pytorch_tanh"])],
        bias=top.one_of("multimodal_projector_bias", True, [False, True]),
    )
    processor = optional_json(folder / "processor_config.json")
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
    f = Fields(tower, f"{where}: vision_config")
    f.only(model_type="rice_vit", in_channels=3, temporal_patch_size=1, layer_norm_eps=1e-5)
    hidden, heads = f.integer("embed_dim", f.integer("hidden_size", 1024)), f.integer("num_heads", 16)
    depth, patch = f.integer("depth", 24, 1024), f.integer("patch_size", 14)
    merge = f.integer("spatial_merge_size", 2, 8)
    if hidden % heads or hidden // heads % 4 or merge < 2:
        raise UserError(f"{f.where}: width {hidden} with {heads} heads, or a merge of {merge}, does not fit")
    vision = VisionConfig(
        hidden, f.integer("intermediate_size", 4096), depth, heads, patch, patch,
        activation=ACTIVATIONS[f.one_of("hidden_act", "gelu", ACTIVATIONS)], select_layers=(-1,), rotary=True,
        strip_slip=Fields(ours, f"{where}: minillava").one_of("strip_slip", False, [False, True]),
    )  # fmt: skip
    processor = optional_json(folder / "processor_config.json")
    path = folder / "preprocessor_config.json"
    values = processor.get("image_processor") or read_json(path)
    image = read_native(values, str(path), patch, merge)
    chat = ChatConfig(
        template="jinja" if (jinja := _jinja(folder, processor)) else "onevision_1_5",
        jinja=jinja,
        split_at_image=False,
        image_token="<|image_pad|>",
        image_token_id=Fields(raw, where).integer("image_token_id", 151655),
        video_token="<|video_pad|>",
        video_token_id=Fields(raw, where).integer("video_token_id", 151656),
        **_special_ids(raw, text, decoder, folder),
    )
    projector = ProjectorConfig(2, merge=merge)
    return ModelConfig(vision, projector, decoder, image, chat=_overridden(chat, ours, where))


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
    files = (optional_json(folder / "chat_template.json"), processor, optional_json(folder / "tokenizer_config.json"))
    found = next((f["chat_template"] for f in files if f.get("chat_template")), "")
    if isinstance(found, list):  # several, by name
        found = next((t["template"] for t in found if t.get("name") == "default"), "")
    return found


def _special_ids(raw: dict[str, Any], text: dict[str, Any], decoder: DecoderConfig, folder: Path) -> dict[str, Any]:
    """bos, eos and pad ids: of generation_config.json, else of the decoder's config, else of the tokenizer."""
    generation, defaults = optional_json(folder / "generation_config.json"), TEXT_DEFAULTS[decoder.model_type]
    tokenizer = optional_json(folder / "tokenizer_config.json")

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
    added |= optional_json(folder / "added_tokens.json")
    if content is not None and content not in added:
        added |= {t["content"]: t["id"] for t in optional_json(folder / "tokenizer.json").get("added_tokens", [])}
    return added.get(content)


def _read_original(raw: dict[str, Any], folder: Path, find: Find) -> ModelConfig:
    where = str(folder / "config.json")
    top = Fields(raw, where)
    model_type = ORIGINAL_TYPES[top.one_of("model_type", None, ORIGINAL_TYPES)]
    top.only(s2=False)
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
    image = read_image({"image_processor_type": kind} | optional_json(path), str(path), vision)
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
    tokenizer = optional_json(folder / "tokenizer_config.json")
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
