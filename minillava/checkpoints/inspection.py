"""What a folder is, its parts, and what would not be used: `minillava inspect`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from minillava.checkpoints.config_json import format_of
from minillava.checkpoints.families import DECODERS
from minillava.checkpoints.names import EXTRAS, LAYOUTS, TOWER_EXTRAS, collapse, kinds, layout_of, rename
from minillava.checkpoints.original_llava import is_original
from minillava.checkpoints.tensor_files import Stored, inspect, inspect_folder
from minillava.config import ModelConfig
from minillava.errors import UserError

if TYPE_CHECKING:
    from minillava.checkpoints.checkpoint import Checkpoint

PARTS = ("vision", "projector", "decoder")


def describe(checkpoint: Checkpoint) -> Iterator[str]:
    """Lines of text about a checkpoint, '<what>  <finding>'. Raises UserError if it is nothing that is known here."""
    folder, adapters, base_is_gone = checkpoint.folder, checkpoint.adapters, None
    try:
        raw = checkpoint.raw
    except UserError as error:  # of adapters whose base is not here
        raw, base_is_gone = {}, error
    tensors, projector = inspect_folder(folder), folder / "mm_projector.bin"
    if not (tensors or projector.is_file() or adapters):
        raise UserError(
            f"{folder}: no weights here (model.safetensors, pytorch_model.bin, mm_projector.bin, adapters); give "
            "another folder"
        )
    yield _line("is", _kind(raw, adapters is not None, tensors))
    if adapters is not None:
        yield _line("adapters", f"on {len(adapters.pairs)} weights of {adapters.base or 'a base that is not named'}")
        tensors = adapters.whole
    elif not tensors:
        tensors = inspect(projector)
    layout = layout_of(tensors, LAYOUTS)
    names = {name: rename(name, layout, to_ours=True) for name in tensors}
    for part in PARTS:
        of_part = [tensors[name] for name, ours in names.items() if ours and ours.startswith(part)]
        if of_part:
            yield _line(part, _size(of_part))
    if "vision_config" in raw or is_original(raw):
        try:
            yield from _config(checkpoint.config)
            checkpoint.check()
            yield from (_line("answers", note) for note in checkpoint.notes)
            yield _line("loads", "yes")
        except UserError as error:
            yield _line("loads", f"no: {error}")
    if base_is_gone:
        yield _line("loads", f"no: {base_is_gone}")
    yield _line("tokenizer", ", ".join(sorted(p.name for p in folder.glob("tokenizer*.*"))) or "none")
    left = [name for name, ours in names.items() if ours is None]
    known = re.compile(TOWER_EXTRAS if layout in kinds("tower") else EXTRAS)
    for what, some in (
        ("ignored", [name for name in left if known.fullmatch(name)]),
        ("unknown", [name for name in left if not known.fullmatch(name)]),
    ):
        if some:
            yield _line(what, f"{len(some)} tensors: {collapse(some)}")


def _kind(raw: dict[str, Any], adapters: bool, tensors: dict[str, Stored]) -> str:
    whole, model_type = format_of(raw), raw.get("model_type")
    named = f" (model_type {model_type})"
    if adapters:
        return "LoRA adapters of a LLaVA" + (named if raw else "")
    if is_original(raw):
        return (
            "a LLaVA in the original layout" if tensors else "a projector of a LLaVA in the original layout"
        ) + named
    if whole is not None:
        return whole.title + named
    if model_type in DECODERS:
        return "a language model: a recipe's decoder_from" + named
    if any(rename(name, layout, to_ours=True) for name in tensors for layout in kinds("tower")):
        return "a vision tower: a recipe's vision_from" + named
    return "tensors without a config.json" if not raw else "no model that is known here" + named


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
