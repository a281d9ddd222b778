"""`python -m minillava.weights inspect PATH`: what a folder is, its parts, and what of it would not be used."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minillava.adapters import read_adapters
from minillava.config import ModelConfig, UserError
from minillava.hf_config import ONEVISION_15, is_original
from minillava.hf_parts import TEXT_DEFAULTS, optional_json
from minillava.hub import resolve
from minillava.names import EXTRAS, LAYOUTS, TOWER_EXTRAS, collapse, rename
from minillava.tensor_files import Stored, inspect, inspect_folder
from minillava.weights import check_folder, read_config

PARTS = ("vision", "projector", "decoder")


def describe(folder: Path) -> Iterator[str]:
    """Lines of text about a folder, '<what>  <finding>'. Raises UserError if it holds nothing that is known here."""
    raw = optional_json(folder / "config.json")
    tensors, projector = inspect_folder(folder), folder / "mm_projector.bin"
    adapters = read_adapters(folder) if (folder / "adapter_config.json").is_file() else None
    if not (tensors or projector.is_file() or adapters):
        raise UserError(f"{folder}: no weights here (model.safetensors, pytorch_model.bin, mm_projector.bin, adapters)")
    yield _line("is", _kind(raw, tensors, adapters is not None))
    if adapters is not None:
        yield _line("adapters", f"on {len(adapters.pairs)} weights of {adapters.base or 'a base that is not named'}")
        tensors = adapters.whole
    elif not tensors:
        tensors = inspect(projector)
    layout = max(LAYOUTS, key=lambda name: sum(rename(t, name, to_ours=True) is not None for t in tensors))
    names = {name: rename(name, layout, to_ours=True) for name in tensors}
    for part in PARTS:
        of_part = [tensors[name] for name, ours in names.items() if ours and ours.startswith(part)]
        if of_part:
            yield _line(part, _size(of_part))
    if len(raw) and ("vision_config" in raw or is_original(raw)):
        try:
            yield from _config(read_config(folder))
            check_folder(folder)
            yield _line("loads", "yes")
        except UserError as error:
            yield _line("loads", f"no: {error}")
    yield _line("tokenizer", ", ".join(sorted(p.name for p in folder.glob("tokenizer*.*"))) or "none")
    left = [name for name, ours in names.items() if ours is None]
    known = re.compile(TOWER_EXTRAS if layout == "tower" else EXTRAS)
    for what, some in (
        ("ignored", [name for name in left if known.fullmatch(name)]),
        ("unknown", [name for name in left if not known.fullmatch(name)]),
    ):
        if some:
            yield _line(what, f"{len(some)} tensors: {collapse(some)}")


def _kind(raw: dict[str, Any], tensors: dict[str, Stored], adapters: bool) -> str:
    model_type = raw.get("model_type")
    said = f" (model_type {model_type})"
    if adapters:
        return "LoRA adapters of a LLaVA" + said
    if is_original(raw):
        return ("a LLaVA in the original layout" if tensors else "a projector of a LLaVA in the original layout") + said
    if str(model_type).startswith(ONEVISION_15):
        return "a LLaVA-OneVision-1.5" + said
    if "vision_config" in raw and "text_config" in raw and "logit_scale" not in tensors:
        return "a LLaVA in Hugging Face's layout" + said
    if model_type in TEXT_DEFAULTS:
        return "a language model: a recipe's decoder_from" + said
    if any(rename(name, "tower", to_ours=True) for name in tensors):
        return "a vision tower: a recipe's vision_from" + said
    return "tensors without a config.json" if not raw else "no model that is known here" + said


def _config(config: ModelConfig) -> Iterator[str]:
    v, d, chat = config.vision, config.decoder, config.chat
    size = "any size" if v.rotary else f"{v.image_size} pixels"
    yield _line("tower", f"{v.num_layers} layers of {v.hidden_size}, {size}, patches of {v.patch_size}")
    experts = f", {d.experts_per_token} of {d.num_experts} experts" if d.num_experts else ""
    yield _line("language", f"{d.model_type}, {d.num_layers} layers of {d.hidden_size}{experts}")
    yield _line("context", f"{d.max_positions} tokens")
    grids = f", {len(config.layout.grids)} grids of tiles" if config.layout.grids else ""
    yield _line("pictures", f"{config.image.fit}{grids}")
    yield _line(
        "prompt", f"{chat.template}, {' and '.join(chat.markers)}, stops at {', '.join(map(str, chat.eos_ids))}"
    )


def _size(tensors: Iterable[Stored]) -> str:
    """Parameters, bytes and dtypes of tensors, and the files they are in."""
    tensors = list(tensors)
    numbers, nbytes = sum(math.prod(t.shape) for t in tensors), sum(t.nbytes for t in tensors)
    dtypes = ", ".join(sorted({stored.dtype.removeprefix("torch.") for stored in tensors}))
    files = sorted({stored.path.name for stored in tensors})
    shown = files[0] if len(files) == 1 else f"{len(files)} files"
    return f"{numbers:,} numbers, {nbytes / 2**20:,.1f} MiB, {dtypes}, in {shown}"


def _line(what: str, found: str) -> str:
    return f"{what:10} {found}"


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2 or argv[0] != "inspect":
        print("usage: python -m minillava.weights inspect PATH", file=sys.stderr)
        return 2
    try:
        for line in describe(resolve(argv[1])):
            print(line)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
