"""Checkpoints in and out: folders in every layout of `minillava.names` become a model, and a model a folder.

The model is built without memory (meta device) and filled a few megabytes at a time, so loading peaks at about one
copy of the weights. `python -m minillava.weights inspect PATH` says what a folder is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillava.adapters import Adapters, read_adapters
from minillava.config import ModelConfig, UserError
from minillava.decoder import Fused, Unallocated
from minillava.hf_config import is_original, model_config, tower_folder
from minillava.hf_export import add_image_token, jinja_of, to_hf, write_tokenizer_json
from minillava.hf_parts import optional_json, read_json
from minillava.hub import find, resolve
from minillava.llava import LLaVA
from minillava.names import EXPERT, OPTIONAL, Plan, rename, to_files, unstack
from minillava.quantize import Linear4bit, Scheme, cat_rows, quantization_config
from minillava.tensor_files import SHARD, Stored, inspect, inspect_folder, read, read_named, write

if TYPE_CHECKING:
    from minillava.tokenizer import Tokenizer


# ---- which tensor goes where ----


def _plan(folder: Path, raw: dict[str, Any], base: Path | None, adapters: Adapters | None) -> tuple[Plan, Plan | None]:
    """Match the tensors of a folder (and of tower, projector file and base) with parameters; a delta's base apart."""
    tensors = inspect_folder(folder) if adapters is None else _decoder_of(base or base_of(folder))
    projector = folder / "mm_projector.bin"
    if not tensors and not (is_original(raw) and projector.is_file()):
        raise UserError(f"{folder}: no weights (model.safetensors or pytorch_model.bin, or their .index.json)")

    def known(layout: str) -> int:
        return sum(rename(name, layout, to_ours=True) is not None for name in tensors)

    layout = "original" if is_original(raw) else max(("hf", "hf_new", "onevision_1_5", "onevision_1_5_tree"), key=known)
    plan, delta = Plan(), None
    plan.add(tensors, layout)
    if not is_original(raw):
        if base is not None:
            raise UserError(f"{folder}: is complete in itself; a base is for deltas and projectors of original LLaVA")
        return plan, None
    if adapters is not None:
        plan.add(adapters.whole, adapters.layout, override=True)
        base = None
    elif not plan.has("projector.") and projector.is_file():  # beside a full model lies the one of stage 1: superseded
        if not plan.has("decoder."):
            name = raw.get("_name_or_path")
            if base is None and not name:
                raise UserError(f"{folder}: holds a projector only; say which language model it belongs to (base)")
            plan.add(_decoder_of(base or find(str(name), folder, "the base (_name_or_path)")), "original")
            base = None
        plan.add(inspect(projector), "original", override=True)  # may carry embeddings trained with it
    if base is not None:
        delta = Plan()
        delta.add(_decoder_of(base), "original")
    if not plan.has("vision."):
        tower = tower_folder(raw, folder, find)
        found = inspect_folder(tower)
        if not found:
            raise UserError(f"{tower}: no weights of the vision tower (model.safetensors or pytorch_model.bin)")
        plan.add(found, "tower")
    return plan, delta


def base_of(folder: Path) -> Path:
    """The language model that a folder belongs to: itself, unless it holds adapters."""
    if not (folder / "adapter_config.json").is_file():
        return folder
    name = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not name:
        raise UserError(f"{folder}: adapters, and adapter_config.json names no base; say which it is (base)")
    return find(str(name), folder, "the base (base_model_name_or_path)")


def _decoder_of(base: Path) -> dict[str, Stored]:
    tensors = inspect_folder(base)
    if not tensors:
        raise UserError(f"{base}: no weights of the base (model.safetensors or pytorch_model.bin)")
    return tensors


# ---- loading ----


def load_model(
    folder: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    base: Path | str | None = None,
    quantize: Scheme | None = None,
    sink: Callable[[str, Tensor], None] | None = None,
) -> LLaVA:
    """The model of a checkpoint folder or hub id, in `dtype` (None: that of its embeddings in the file).

    Weights that are stored in four bits stay as they are; `quantize` makes others so, one after another on `device`:
    the 16-bit model is never held. `base` completes original checkpoints that are not: a delta is added to it, a lone
    mm_projector.bin put on top, adapters are merged into it (by default into the one that their config names). With a
    `sink` every tensor goes there as it is read, and the model that is returned has
    none (it is on meta). Raises UserError for whatever is missing, left over, misshapen or unreadable.
    """
    folder = resolve(folder)
    model, plan, delta, adapters, head = _found(folder, None if base is None else resolve(base))
    empty = model.state_dict()
    wanted = {name: tuple(t.shape) for name, t in unstack(empty).items()}
    late = delta is not None or adapters is not None  # the weights are whole only when all files are read
    if late and sink is not None:
        raise UserError(f"{folder}: a delta or adapters; load it on one device and save the whole, then use that")
    if dtype is None:
        dtype = next(read([plan.source["decoder.embed.weight"]])).dtype
    small = {f"{layer}.weight" for layer in quantize.layers(model)} if quantize else set()
    layers = _take_quantized(plan, set() if late else small, quantize, device)
    state = take(plan, empty, None if delta else dtype, device, sink)
    if head is not None:
        _check_tied(head, plan.source["decoder.embed.weight"], state["decoder.embed.weight"].dtype)
    if delta is not None:
        _add_base(state, delta, wanted, str(base))
    if adapters is not None:
        for name, change in adapters.changes(state):
            state[name] = (state[name].float() + change).to(state[name].dtype)
    if late:
        for name in list(state):
            if quantize and name in small:
                layers[name] = _quantized(state.pop(name), quantize, name)
            else:
                state[name] = state[name].to(dtype)
    for name in (OPTIONAL.keys() & wanted.keys()) - state.keys():
        state[name] = torch.full(wanted[name], OPTIONAL[name], dtype=dtype, device=device)
        if sink is not None:
            sink(name, state[name])
    for name, layer in layers.items():
        path = name.removesuffix(".weight")
        bias = state.pop(f"{path}.bias", None)
        layer.bias, layer.dtype = None if bias is None else torch.nn.Parameter(bias, requires_grad=False), dtype
        model.set_submodule(path, layer)
        state |= {f"{path}.{key}": value for key, value in layer.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def _found(folder: Path, base: Path | None = None) -> tuple[LLaVA, Plan, Plan | None, Adapters | None, Stored | None]:
    """An empty model, where its weights are, a delta's base, adapters, and the head of a model that ties it.

    Raises UserError for all that can be known to be wrong without reading the weights.
    """
    raw = read_json(folder / "config.json")
    config = model_config(raw, folder, find)
    with Unallocated():
        model = LLaVA(config)
    adapters = read_adapters(folder) if (folder / "adapter_config.json").is_file() else None
    plan, delta = _plan(folder, raw, base, adapters)
    head = plan.source.pop("decoder.head.weight", None) if config.decoder.tie_embeddings else None
    if plan.layout.get("vision") == "tower" and not config.vision.class_token:
        spare = f"vision.blocks.{config.vision.num_layers}."  # a stock SigLIP has a block more than the original keeps
        plan.source = {name: stored for name, stored in plan.source.items() if not name.startswith(spare)}
    plan.check(str(folder), {name: tuple(t.shape) for name, t in unstack(model.state_dict()).items()})
    return model, plan, delta, adapters, head


def take(
    plan: Plan,
    empty: dict[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    sink: Callable[[str, Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """Read what a plan found, in the order of the files; `empty` holds the parameters (on meta, say) by our names.

    With a `sink` every tensor goes there once it is whole, and only its shape is kept.
    """
    state: dict[str, Tensor] = {}
    read_of: Counter[str] = Counter()
    for name, _, values in read_named(plan.source):
        tensor = values.to(device, dtype, copy=True)
        if expert := EXPERT.fullmatch(name):
            name = f"{expert[1]}.{expert[3]}"
            if name not in state:
                state[name] = tensor.new_empty(empty[name].shape)
            state[name][int(expert[2])] = tensor
            read_of[name] += 1
        else:
            state[name] = tensor
        if sink is not None and read_of[name] in (0, len(state[name])):
            sink(name, state[name])
            state[name] = state[name].to("meta")
    return state


def _take_quantized(
    plan: Plan, small: set[str], scheme: Scheme | None, device: torch.device | str
) -> dict[str, Linear4bit]:
    """Take out of the plan, and read, the weights that are stored in four bits and those in `small`, quantised."""
    layers = {}
    chosen = {name: plan.source.pop(name) for name in [*plan.source] if name in plan.companions or name in small}
    whole, entry = None, ""  # what the file has, of which q, k and v of RICE's tower are shares, and its name
    files = {n: dataclasses.replace(s, share=(0, 1)) if n in plan.companions else s for n, s in chosen.items()}
    for name, stored, tensor in read_named(files):
        if name in plan.companions:
            which, shares = chosen[name].share
            if whole is None or stored.name != entry:
                parts = {part: t.to(device) for part, t in plan.read_companions(name).items()}
                whole, entry = Linear4bit.from_stored(tensor.to(device, copy=True), parts), stored.name
            rows = whole.out_features // shares
            layers[name] = whole if shares == 1 else _rows(whole, which * rows, (which + 1) * rows, stored.name)
        else:
            layers[name] = _quantized(tensor.to(device), scheme, stored.name)
    return layers


def _rows(layer: Linear4bit, start: int, stop: int, name: str) -> Linear4bit:
    try:
        return layer.rows(start, stop)
    except ValueError as error:
        raise UserError(f"{name}: its q, k and v cannot be taken apart: {error}; keep the tower in 16 bits") from None


def _quantized(weight: Tensor, scheme: Scheme | None, name: str) -> Linear4bit:
    try:
        return Linear4bit.from_weight(weight, scheme=scheme)
    except ValueError as error:
        raise UserError(f"{name} {error}; it cannot be quantised") from None


def _check_tied(head: Stored, embed: Stored, dtype: torch.dtype) -> None:
    """A tied model may store its head; it must be the embedding then."""
    same = head.shape == embed.shape
    if same:
        (a, b) = (t.to(dtype, copy=True) for t in read([head, embed]))
        same = torch.equal(a, b)
    if not same:
        raise UserError(f"{head.path}: {head.name} differs from the embedding, but config.json ties the two")


def _add_base(state: dict[str, Tensor], delta: Plan, wanted: dict[str, tuple[int, ...]], where: str) -> None:
    """Delta weights: target = delta + base, in the delta's dtype; a base may have fewer rows of vocabulary."""
    decoder = {name: shape for name, shape in wanted.items() if name.startswith("decoder.")}
    for name in ("decoder.embed.weight", "decoder.head.weight"):
        stored = delta.source.get(name)
        if stored and name in decoder and stored.shape[0] <= decoder[name][0]:
            decoder[name] = (stored.shape[0], decoder[name][1])
    delta.check(where, decoder)
    for name, stored, tensor in read_named(delta.source):
        rows = state[name][: stored.shape[0]]
        rows += tensor.to(rows.device, rows.dtype)


def check_folder(folder: Path) -> None:
    """Raise the UserError that loading would end with, as far as can be known without reading the weights."""
    _found(folder)


def read_config(folder: Path | str) -> ModelConfig:
    """The ModelConfig of a checkpoint folder: config.json with the processor's, tokenizer's and tower's files."""
    folder = resolve(folder)
    return model_config(read_json(folder / "config.json"), folder, find)


# ---- saving ----


def save_model(model: LLaVA, folder: Path | str, tokenizer: Tokenizer | None = None, shard_bytes: int = SHARD) -> None:
    """Write a folder that transformers loads (Hugging Face layout), in the dtype that the model has.

    Written beside and renamed, so that `folder` never holds half a checkpoint. It must not exist, be empty, or hold an
    earlier save, which is replaced as a whole; UserError otherwise.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose a folder to save to")
    if folder.is_dir() and any(folder.iterdir()) and "minillava" not in optional_json(folder / "config.json"):
        raise UserError(f"{folder}: holds something else than an earlier save; choose another folder")
    layers = dict(_quantized_layers(model))
    hidden = {f"{name}.{buffer}" for name, layer in layers.items() for buffer, _ in layer.named_buffers()}
    config, state = model.config, {name: t.detach() for name, t in model.state_dict().items() if name not in hidden}
    temporary = folder.absolute().with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        if tokenizer is not None:
            tokenizer.save(temporary)
            config = add_image_token(config, state, tokenizer, temporary)
            if (temporary / "tokenizer.model").is_file() and not (temporary / "tokenizer.json").is_file():
                write_tokenizer_json(temporary)
        dtype = str(state["decoder.embed.weight"].dtype).removeprefix("torch.")
        files = to_hf(config, dtype)
        if layers:
            files["config.json"]["quantization_config"] = quantization_config(layers.values(), _skipped(model), dtype)
        for name, values in files.items():
            (temporary / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (temporary / "chat_template.jinja").write_text(jinja_of(config.chat), encoding="utf-8")
        layout = "onevision_1_5" if config.vision.rotary else "hf"
        foreign = to_files(state, layout)
        for name, layer in _as_files_have(layers, layout).items():
            weight = rename(f"{name}.weight", layout, to_ours=False)
            if weight is None:
                raise UserError(
                    f"{folder}: {name} is in 4 bits, but files have q, k and v as one; keep 'vision' in 16 bits"
                )
            foreign |= {".".join(filter(None, (weight, part))): t for part, t in layer.stored().items()}
        write(foreign, temporary, shard_bytes)
        if folder.is_dir():
            old = temporary.with_name(temporary.name + "-old")
            os.rename(folder, old)
            os.rename(temporary, folder)
            shutil.rmtree(old)
        else:
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _quantized_layers(model: LLaVA) -> Iterator[tuple[str, Linear4bit]]:
    for name, module in model.named_modules():
        if isinstance(module, Fused):
            outer = name.rpartition(".")[0]
            yield from ((f"{outer}.{part}", m) for part, m in module.parts() if isinstance(m, Linear4bit))
        elif isinstance(module, Linear4bit) and not name.endswith(".product"):
            yield name, module


def _as_files_have(layers: dict[str, Linear4bit], layout: str) -> dict[str, Linear4bit]:
    """q, k and v of RICE's tower joined; as they are where they cannot be."""
    found = dict(layers)
    for name in [n for n in layers if "onevision" in layout and n.startswith("vision.") and n.endswith(".attn.q")]:
        names = [name[:-1] + part for part in "qkv"]
        if found.keys() >= set(names) and layers[name].weight.numel() % layers[name].blocksize == 0:
            found[f"{name}kv"] = cat_rows([found.pop(part) for part in names])
    return found


def _skipped(model: LLaVA) -> list[str]:
    """What transformers is to leave alone: the parts none of whose linear layers are quantised."""
    trees = (
        ("visual.blocks", "visual.merger") if model.config.vision.rotary else ("vision_tower", "multi_modal_projector")
    )
    head = getattr(model.decoder, "head", model.decoder.norm)
    modules = (model.vision, model.projector, model.decoder.blocks, head)
    parts = dict(zip((*trees, "language_model", "lm_head"), modules))
    plain = [name for name, part in parts.items() if not any(isinstance(m, Linear4bit) for m in part.modules())]
    return plain + [f"model.{name}" for name in plain]  # the module tree before and after transformers 4.52


if __name__ == "__main__":
    from minillava.inspection import main

    sys.exit(main(sys.argv[1:]))
