"""Writing a model as a folder that transformers loads, whole or not at all."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillava.chat.tokenizer import Tokenizer
from minillava.checkpoints.chat_files import jinja_of
from minillava.checkpoints.config_json import Format, format_for
from minillava.checkpoints.families import tower_type
from minillava.checkpoints.loading import Quantized
from minillava.checkpoints.names import joins_qkv, rename, to_files, with_tower
from minillava.checkpoints.tensor_files import SHARD, write
from minillava.checkpoints.tokenizer_files import add_placeholders, write_tokenizer_json
from minillava.errors import UserError
from minillava.files import named
from minillava.layers.linear import Fused
from minillava.layers.quantize import name_of, quantization_config
from minillava.llava import LLaVAModel
from minillava.schema import optional_json


def save_model(
    model: LLaVAModel, folder: Path | str, tokenizer: Tokenizer | None = None, shard_bytes: int = SHARD, form: str = ""
) -> None:
    """Write a folder that transformers or vLLM loads, in the dtype that the model has; `form` names another of
    `config_json.FORMATS` than its family's own.

    Written beside and renamed, so that `folder` never holds half a checkpoint. It must not exist, be empty, or hold an
    earlier save, which is replaced as a whole; UserError otherwise.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose a folder to save to")
    if folder.is_dir() and any(folder.iterdir()) and "minillava" not in optional_json(folder / "config.json"):
        raise UserError(f"{folder}: holds something else than an earlier save; choose another folder")
    real = folder.resolve()  # a link stays, and what it leads to is replaced
    temporary = real.with_name(f".{real.name}-{secrets.token_hex(4)}")
    try:
        with named(folder):
            temporary.mkdir(parents=True)
            _write_files(model, temporary, tokenizer, shard_bytes, str(folder), form)
            old = temporary.with_name(temporary.name + "-old")
            if real.is_dir():
                os.rename(real, old)
            os.rename(temporary, real)
            if old.exists():
                shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(
    model: LLaVAModel, folder: Path, tokenizer: Tokenizer | None, shard_bytes: int, where: str, into: str
) -> None:
    """All files of a save; `where` names it for errors."""
    layers = dict(_quantized_layers(model))
    inside = {f"{name}.{buffer}" for name, layer in layers.items() for buffer, _ in layer.named_buffers()}
    config, state = model.config, {name: t.detach() for name, t in model.state_dict().items() if name not in inside}
    if tokenizer is not None:
        tokenizer.save(folder)
        config = add_placeholders(config, state, tokenizer, folder)
        if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
            write_tokenizer_json(folder)
    dtype, form = str(state["decoder.embed.weight"].dtype).removeprefix("torch."), format_for(config, into)
    files = form.write(config, dtype)
    if layers:
        try:
            how = quantization_config(layers.values(), _plain(model, form), dtype)
        except ValueError as error:
            raise UserError(f"{where}: the model {error}") from None
        files["config.json"]["quantization_config"] = how
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(jinja_of(config.chat), encoding="utf-8")
    layout = with_tower(form.tensors, tower_type(config.vision))
    foreign = to_files(state, layout)
    for name, layer in _as_files_have(layers, layout).items():
        weight = rename(f"{name}.weight", layout, to_ours=False)
        if weight is None:
            raise UserError(
                f"{where}: {name} is in few bits, but files have q, k and v as one; keep 'vision' in 16 bits"
            )
        foreign |= {name_of(part, weight): t for part, t in layer.stored().items()}
    write(foreign, folder, shard_bytes)


def _quantized_layers(model: LLaVAModel) -> Iterator[tuple[str, Quantized]]:
    """Layers in few bits by our names, those inside a fused one too."""
    for name, module in model.named_modules():
        if isinstance(module, Fused):
            outer = name.rpartition(".")[0]
            yield from ((f"{outer}.{part}", m) for part, m in module.parts() if isinstance(m, Quantized))
        elif isinstance(module, Quantized) and not name.endswith(".product"):
            yield name, module


def _as_files_have(layers: dict[str, Quantized], layout: str) -> dict[str, Quantized]:
    """q, k and v of RICE's tower joined; as they are where they cannot be."""
    found = dict(layers)
    for name in [n for n in layers if joins_qkv(layout) and n.startswith("vision.") and n.endswith(".attn.q")]:
        names = [name[:-1] + part for part in "qkv"]
        with contextlib.suppress(KeyError, ValueError):  # k or v in 16 bits; ends that are no ends of blocks
            parts: Any = [found[part] for part in names]
            joined = type(parts[0]).joined(parts)
            found = {key: layer for key, layer in found.items() if key not in names} | {f"{name}kv": joined}
    return found


def _plain(model: LLaVAModel, form: Format) -> list[str]:
    """What transformers is to leave alone: the parts none of whose linear layers are quantised."""
    head = getattr(model.decoder, "head", model.decoder.norm)
    modules = (model.vision, model.projector, model.decoder.blocks, head)
    parts = dict(zip((*form.modules, "language_model", "lm_head"), modules))
    plain = [name for name, part in parts.items() if not any(isinstance(m, Quantized) for m in part.modules())]
    return plain + [f"model.{name}" for name in plain]  # the module tree before and after transformers 4.52
