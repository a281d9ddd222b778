"""haotian-liu/LLaVA's config.json in and out, and that of LLaVA-NeXT's repository.

It decides more by fields than transformers does; where its code of April 2024 and of today differ (the place of the
pooling), `mm_resampler_type` tells which made a checkpoint. Tower and language model may stand in folders of their own.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillava.chat.token_files import TokenizerFiles
from minillava.checkpoints.chat_files import guess_template, overridden, read_special_ids
from minillava.checkpoints.config_parts import read_decoder, read_image, read_vision, write_decoder
from minillava.checkpoints.hf_llava import read_grids, read_max_tiles
from minillava.config import ChatConfig, LayoutConfig, ModelConfig, ProjectorConfig, VisionConfig
from minillava.errors import UserError
from minillava.schema import Fields, from_dict, optional_json, read_json

TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
Find = Callable[[str, Path, str], Path]  # (folder or hub id, the checkpoint that names it, what it is) -> folder


def is_original(raw: dict[str, Any]) -> bool:
    """Whether a config.json is of the original layout: it names its tower, and holds no vision_config."""
    return "mm_vision_tower" in raw and "vision_config" not in raw


def tower_folder(raw: dict[str, Any], folder: Path, find: Find) -> Path:
    """The folder of the vision tower that an original config.json names."""
    name = raw["mm_vision_tower"]
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder / 'config.json'}: mm_vision_tower is {name!r}, expected a folder or a hub id")
    return find(name, folder, "the vision tower (mm_vision_tower)")


def read(raw: dict[str, Any], folder: Path, vocabulary: Path, find: Find) -> ModelConfig:
    """The ModelConfig of a folder whose config.json holds `raw`, and of its tokenizer's folder."""
    where = str(folder / "config.json")
    top = Fields(raw, where)
    model_type = TYPES[top.one_of("model_type", None, TYPES)]
    top.only(s2=False)
    vision, tower = _read_tower(top, folder, find)
    wiped = {"rope_scaling": None} if model_type == "qwen2" else {}  # by the original's LlavaQwen
    decoder = read_decoder({**raw, **wiped, "model_type": model_type}, where)
    kind = str(raw.get("mm_projector_type") or "linear")
    linears = re.fullmatch(r"linear|mlp([1-8])x_gelu", kind)
    if linears is None:
        raise UserError(f"{where}: mm_projector_type '{kind}' is not supported (supported: linear, mlp2x_gelu)")
    projector = ProjectorConfig(layers=int(linears[1] or 1))
    path = tower / "preprocessor_config.json"
    processor = "CLIPImageProcessor" if vision.class_token else "SiglipImageProcessor"
    image = read_image({"image_processor_type": processor} | optional_json(path), str(path), vision)
    layout, fit = _read_layout(top, vision.image_size, image.fit)
    image = dataclasses.replace(image, fit=fit)
    files = TokenizerFiles(vocabulary)
    ids = read_special_ids(folder, files, raw, raw, decoder)
    if (ids["bos_id"], ids["eos_ids"]) == (0, (1,)):  # of an early converter; LLaMA's vocabulary has 1 and 2
        ids = {"bos_id": 1, "eos_ids": (2,), "pad_id": None}
    chat = ChatConfig(
        template=guess_template(files, model_type, projector.layers),
        image_start_end=top.one_of("mm_use_im_start_end", False, [False, True]),
        **ids,
    )
    return ModelConfig(vision, projector, decoder, image, layout, overridden(chat, raw, folder))


def _read_tower(top: Fields, folder: Path, find: Find) -> tuple[VisionConfig, Path]:
    select = top.one_of("mm_vision_select_feature", "patch", ["patch", "cls_patch"])
    tower = tower_folder(top.values, folder, find)
    path, layer = tower / "config.json", top.values.get("mm_vision_select_layer", -2)
    vision = read_vision(read_json(path), str(path), layer, select == "cls_patch")
    if not vision.class_token:  # the original takes SigLIP's last block off and then reads the last, whatever layer
        vision = dataclasses.replace(vision, num_layers=vision.num_layers - 1, select_layers=(-1,))
    return vision, tower


def _read_layout(f: Fields, side: int, own: str) -> tuple[LayoutConfig, str]:
    """The layout, and the fit of the pictures; `own` is that of the tower's image processor.

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
        max_tiles=read_max_tiles(aspect, "image_aspect_ratio", f.where) if bounded and merge == "unpad" else 0,
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


def write(config: ModelConfig, tower: str, language_model: str) -> dict[str, Any] | None:
    """config.json for a model like LLaVA-1.5, which loads its tower and language model by name.

    None where it has no such name or no such model (tiles, SigLIP, other decoders).
    """
    v, d, p = config.vision, config.decoder, config.projector
    tower = tower or ("openai/clip-vit-large-patch14-336" if v == VisionConfig() else "")
    alike = v.class_token and len(v.select_layers) == 1 and d.model_type == "llama" and not config.layout.grids
    if not tower or not alike or p.merge > 1 or p.activation != "gelu" or not p.bias:
        return None
    return write_decoder(config, "bfloat16") | dict(
        model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"], _name_or_path=language_model,
        mm_vision_tower=tower, mm_hidden_size=v.hidden_size, mm_vision_select_layer=v.select_layers[0],
        mm_vision_select_feature="cls_patch" if v.keep_class_token else "patch", use_mm_proj=True,
        mm_projector_type=f"mlp{p.layers}x_gelu" if p.layers > 1 else "linear", mm_use_im_patch_token=False,
        mm_use_im_start_end=config.chat.image_start_end, tokenizer_padding_side="right",
        image_aspect_ratio="pad" if config.image.fit == "pad" else "square",
        tokenizer_model_max_length=min(2048, d.max_positions),
    )  # fmt: skip
