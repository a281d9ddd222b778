"""config.json and its companions: which format a folder is of, and the ModelConfig in it; a ModelConfig as files.

Everything is decided by fields, nothing by a path or a model's name.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from minillava.checkpoints import hf_llava, onevision, original_llava
from minillava.checkpoints.families import TOWERS, tower_type
from minillava.checkpoints.original_llava import Find, is_original
from minillava.config import ModelConfig
from minillava.errors import UserError, nearest
from minillava.files import shown
from minillava.schema import Fields


class Format(NamedTuple):
    """A layout of whole models that is read and written."""

    title: str
    is_it: Callable[[str], bool]  # by config.json's model_type
    read: Callable[[dict[str, Any], Path], ModelConfig]
    write: Callable[[ModelConfig, str], dict[str, dict[str, Any]]]
    tensors: str  # what is written: a kind of `names.LAYOUTS`
    modules: tuple[str, str]  # tower and projector in its module tree


def _onevision(title: str, name: str, tower: str = "visual.blocks", tensors: str = "") -> Format:
    return Format(
        title, lambda kind: onevision.release_of(kind) == name, onevision.read,
        functools.partial(onevision.write, name=name), tensors or name, (tower, "visual.merger"),
    )  # fmt: skip


FORMATS: dict[str, Format] = {
    "llava": Format(
        "a LLaVA in Hugging Face's layout", {*hf_llava.HF_CLASSES, hf_llava.OWN}.__contains__, hf_llava.read,
        hf_llava.write, "hf", ("vision_tower", "multi_modal_projector"),
    ),
    "onevision_1_5": _onevision("a LLaVA-OneVision-1.5", "onevision_1_5"),
    "onevision_1_5_native": _onevision("a LLaVA-OneVision-1.5 as transformers names it", "onevision_1_5_native"),
    "onevision_2": _onevision("a LLaVA-OneVision-2", "onevision_2", "visual.encoder"),
    "mage_vl": _onevision("a Mage-VL", "mage_vl", "visual.encoder", "onevision_2"),
}  # fmt: skip


def format_of(raw: dict[str, Any]) -> Format | None:
    """The format of a config.json; None for the original's, and for what is no LLaVA."""
    kind = str(raw.get("model_type"))
    return None if is_original(raw) else next((f for f in FORMATS.values() if f.is_it(kind)), None)


def format_for(config: ModelConfig, name: str = "") -> Format:
    """The format that a model is written in: the one of this name, else its family's own."""
    if name and name not in FORMATS:
        raise UserError(f"no format '{name}' of checkpoints{nearest(name, list(FORMATS))}")
    return FORMATS[name or TOWERS[tower_type(config.vision)].whole]


def read_config(raw: dict[str, Any], folder: Path, vocabulary: Path, find: Find) -> ModelConfig:
    """The ModelConfig of a checkpoint folder whose config.json holds `raw`, and of its tokenizer's folder; UserError
    for what is unsupported."""
    quantization = Fields(raw, str(folder / "config.json")).table("quantization_config").values
    if quantization and not (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        kind = quantization.get("quant_method")
        raise UserError(
            f"{folder / 'config.json'}: quantization_config: weights quantised by {shown(kind)} are not "
            "supported (bitsandbytes in 4 and 8 bits is); use the unquantised checkpoint"
        )
    if is_original(raw):
        return original_llava.read(raw, folder, vocabulary, find)
    found = format_of(raw)
    if found is None:
        raise UserError(
            f"{folder / 'config.json'}: model_type {shown(raw.get('model_type'))} is not supported (supported: "
            f"{', '.join(hf_llava.HF_CLASSES)}, {', '.join(r.model_type for r in onevision.RELEASES.values())}; "
            "original LLaVA, with mm_vision_tower: "
            f"{', '.join(original_llava.TYPES)})"
        )
    return found.read(raw, folder)


def write_config(config: ModelConfig, dtype: str) -> dict[str, dict[str, Any]]:
    """The JSON files of a folder, by name."""
    return format_for(config).write(config, dtype)
