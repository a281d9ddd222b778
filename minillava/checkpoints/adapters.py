"""LoRA folders, as PEFT and original LLaVA write them: adapters, and beside them weights that were trained whole.

adapter_model holds A [r, in] and B [out, r] of linear layers; their weights become W + scale * B A, scale = alpha / r
(arXiv 2106.09685), or with DoRA that with rows of a learned length (arXiv 2402.09353). modules_to_save stand in the
same file, original LLaVA's in non_lora_trainables.bin. As for checkpoints, every tensor and option is used or refused.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillava.checkpoints.names import kinds, rename, shares_of
from minillava.checkpoints.tensor_files import Stored, finite, inspect, read, save
from minillava.config import LoRAConfig
from minillava.errors import UserError
from minillava.layers.lora import adapted_layers
from minillava.layers.sharded import assign, whole
from minillava.schema import read_json

PREFIX = "base_model.model."  # PEFT's wrappers in front of every name
FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Of the models that PEFT wraps.
LAYOUTS = kinds("hf_new", "hf", "original", "onevision_1_5_tree", "onevision_1_5_native", "onevision_2")
# adapter_config.json, by LoraConfig of PEFT 0.21: what is read here, and what the tensors say themselves or only
# training asks. Any other option that is set changes what a model computes, and is refused.
READ = (
    "peft_type", "base_model_name_or_path", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora",
    "init_lora_weights", "trainable_token_indices", "ensure_weight_tying", "bias", "lora_bias",
)  # fmt: skip
SILENT = (
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "r", "rank_pattern",
    "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "modules_to_save", "layers_to_transform",
    "layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config",
)  # fmt: skip
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave the base as it is
# What a name says of a tensor of an adapter; what stands before .weight or at the end is a name that its user chose.
LORA = re.compile(
    r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.(?!weight$|bias$)[^.]+)?(\.bias|\.weight)?"
)
ROWS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(\.[^.]+)?")
WRAPPED = re.compile(r"\.modules_to_save(\.(?!weight$|bias$|linear_\d)[^.]+)?|\.base_layer(?=\.)")


@dataclass(frozen=True)
class LowRank:
    """What is added to a weight [out, in]: scale * B A; with a magnitude [out] its rows then get that length."""

    A: Stored  # [r, in]; of an embedding [r, vocabulary]
    B: Stored  # [out, r]; of an embedding [width, r]
    scale: float
    embedding: bool = False
    magnitude: Stored | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, what a row holds (kernels of a convolution too), and 0 if A and B belong together."""
        rows, columns = self.B.shape[0], math.prod(self.A.shape[1:])
        apart = self.A.shape[0] - math.prod(self.B.shape[1:])
        return (columns, rows, apart) if self.embedding else (rows, columns, apart)

    def add_to(self, weight: Tensor) -> Tensor:
        """The weight with its adapter, in float32 and where the weight is."""
        stored = [self.A, self.B] + ([self.magnitude] if self.magnitude else [])
        wide = (t.to(weight.device, torch.float32, copy=True) for t in read(stored))
        A, B, *length = (t.flatten(1) if t.ndim > 1 else t[None] for t in wide)
        change = self.scale * (B @ A)
        added = weight.float() + (change.T if self.embedding else change).view(weight.shape)
        if length:
            rows = added.flatten(1)
            added = (rows * (length[0].view(-1, 1) / rows.norm(dim=1, keepdim=True))).view(weight.shape)
        return added


@dataclass(frozen=True)
class Adapters:
    """What a LoRA folder changes."""

    folder: Path
    base: str  # the model that it belongs to, as adapter_config.json names it
    layout: str
    pairs: dict[str, LowRank]  # by our name of the weight
    whole: dict[str, Stored]  # by the name in the layout
    biases: dict[str, tuple[Stored, float]] = field(default_factory=dict)  # added, by our name: values and scale
    rows: dict[str, tuple[list[int], Stored]] = field(default_factory=dict)  # put in place: which rows of which weight
    tied: bool = False  # whether what becomes of the embedding becomes of the head too

    def check(self, shapes: Mapping[str, tuple[int, ...]], tie_embeddings: bool) -> None:
        """Raise UserError unless all belongs to a model of these weights (by our names, without those in few bits)."""
        ours = {rename(name, self.layout, to_ours=True) or name for name in self.whole}
        if missing := [name for name in (*self.pairs, *self.biases, *self.rows) if name not in shapes]:
            odd = ", or has it in few bits only" if any(n.startswith("decoder.blocks.") for n in missing) else ""
            if tie_embeddings and "decoder.head.weight" in missing:
                odd = ", or has the embedding in its place (tie_word_embeddings)"
            raise UserError(f"{self.folder}: adapts {missing[0]}, which this model does not have{odd}")
        both = {"decoder.embed.weight", "decoder.head.weight"} & (self.pairs.keys() | ours)
        if tie_embeddings and both and (self.pairs.keys() & both or not (self.tied or len(both & ours) == 2)):
            raise UserError(
                f"{self.folder}: trains {min(both)} apart from the head or embedding that is one with it in this model "
                "(tie_word_embeddings); merge it with PEFT into an untied model first"
            )
        for name, pair in self.pairs.items():
            wanted = (shapes[name][0], math.prod(shapes[name][1:]), 0)
            length = math.prod(pair.magnitude.shape) if pair.magnitude else wanted[0]
            if pair.shape != wanted or length != wanted[0]:
                sizes = f"{[*pair.A.shape]} and {[*pair.B.shape]} do not fit {name} {[*shapes[name]]}"
                raise UserError(f"{pair.A.path}: adapters {sizes}; is it the right base?")
        for name, (bias, _) in self.biases.items():
            if bias.shape != shapes[name]:
                raise UserError(f"{bias.path}: {bias.name} {[*bias.shape]} does not fit {name} {[*shapes[name]]}")
        for name, (rows, values) in self.rows.items():
            if values.shape != (len(rows), shapes[name][1]) or not all(0 <= row < shapes[name][0] for row in rows):
                raise UserError(f"{values.path}: {values.name} does not fit the rows of {name} {[*shapes[name]]}")

    def changed(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every weight that is not replaced as a whole, as it becomes, in float32. `check` comes before."""
        for name, pair in self.pairs.items():
            added = pair.add_to(whole(weights[name].detach()))
            if not finite(added):
                raise UserError(f"{pair.A.path}: the adapter of {name} has values that are not finite; use another one")
            yield name, added
        for name, (bias, scale) in self.biases.items():
            old = whole(weights[name].detach()).float()
            yield name, old + scale * next(read([bias])).to(old.device, torch.float32)
        for name, (rows, values) in self.rows.items():
            new = whole(weights[name].detach()).float().clone()
            new[rows] = next(read([values])).to(new.device, torch.float32)
            yield name, new


def read_adapters(folder: Path) -> Adapters:
    """Raises UserError for what is not LoRA or DoRA, and for adapters of nothing that is known here."""
    path = folder / "adapter_config.json"
    config = read_json(path)
    _check_options(config, path)
    files = [file for file in FILES if (folder / file).is_file()][:1]
    if not files:
        raise UserError(f"{folder}: adapter_config.json, but no {' or '.join(FILES)}; fetch it again, whole")
    files += [f for f in ("non_lora_trainables.bin",) if (folder / f).is_file()]
    halves, tokens, whole = _sort(folder, ((n, s) for file in files for n, s in inspect(folder / file).items()))
    modules = [*halves, *tokens]
    known = {at: {m: ours for m in modules if (ours := rename(f"{m}.weight", at, to_ours=True))} for at in LAYOUTS}
    layout = max(LAYOUTS, key=lambda at: len(known[at]) + sum(rename(n, at, to_ours=True) is not None for n in whole))
    tied, base = bool(config.get("ensure_weight_tying")), str(config.get("base_model_name_or_path") or "")
    found = Adapters(folder, base, layout, {}, whole, tied=tied)
    for module, half in halves.items():
        pair = half.keys() & {"A", "B", "embedding_A", "embedding_B"}
        if module not in known[layout] or pair not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            raise UserError(f"{folder}: the adapter of {module} has no partner, or belongs to no part of a LLaVA")
        _add_pair(found, known[layout][module], half, _scale(config, module, half, path))
        if config.get("use_dora") and "magnitude_vector" not in half:
            raise UserError(f"{folder}: the adapter of {module} is DoRA's, but has no lora_magnitude_vector")
    indices = config.get("trainable_token_indices")
    for module, stored in tokens.items():
        rows = indices if isinstance(indices, list) else _of_module(indices or {}, module)
        if module not in known[layout] or not isinstance(rows, list) or not all(type(row) is int for row in rows):
            raise UserError(f"{path}: trainable_token_indices do not say which rows of {module} were trained")
        found.rows[known[layout][module]] = (rows, stored)
    return found


def _check_options(config: dict[str, Any], path: Path) -> None:
    """Raise UserError for a kind of adapter, or an option, that changes more than the tensors say."""
    merge = "merge it with PEFT (merge_and_unload) first"
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {config.get('peft_type')!r}, only LORA is supported; {merge}")
    start = config.get("init_lora_weights")
    if not any(start is known or (isinstance(start, str) and start == known) for known in STARTS):
        raise UserError(
            f"{path}: is not plain LoRA: init_lora_weights {start!r} changed the base that it belongs to; save it with "
            f"PEFT's path_initial_model_for_weight_conversion, or {merge}"
        )
    odd = [key for key, value in config.items() if key not in (*READ, *SILENT) and value not in (None, False, [], {})]
    if odd:
        raise UserError(f"{path}: is not plain LoRA: {', '.join(sorted(odd))} is not supported; {merge}")


def _sort(
    folder: Path, tensors: Iterator[tuple[str, Stored]]
) -> tuple[dict[str, dict[str, Stored]], dict[str, Stored], dict[str, Stored]]:
    """The tensors of a folder: halves of adapters by module, rows of tokens by module, and whole ones by name."""
    halves: dict[str, dict[str, Stored]] = {}
    tokens: dict[str, Stored] = {}
    others: dict[str, Stored] = {}
    users: set[str] = set()  # names of adapters
    for full, stored in tensors:
        name = full.removeprefix(PREFIX).removeprefix(PREFIX)
        if match := LORA.fullmatch(name):
            users |= {match[3]} - {None}
            place, key = halves.setdefault(match[1], {}), match[2] + (".bias" if match[4] == ".bias" else "")
        elif match := ROWS.fullmatch(name):
            users |= {match[2]} - {None}
            place, key = tokens, match[1]
        else:
            wrapped = WRAPPED.search(name)
            users |= {wrapped[1]} - {None} if wrapped else set()
            place, key = others, WRAPPED.sub("", name)
        if key in place or len(users) > 1:
            why = f"the adapters {' and '.join(sorted(u[1:] for u in users))}" if len(users) > 1 else f"{key} twice"
            raise UserError(f"{folder}: holds {why}; keep one adapter in a folder")
        place[key] = stored
    return halves, tokens, others


def _scale(config: dict[str, Any], module: str, half: Mapping[str, Stored], path: Path) -> float:
    """What B A is multiplied by."""
    alpha = _of_module(config.get("alpha_pattern") or {}, module)
    alpha = config.get("lora_alpha", 8) if alpha is None else alpha
    rank = next((half[key].shape or (0,))[0] for key in ("A", "embedding_A") if key in half)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or not rank:
        raise UserError(
            f"{path}: {module} has alpha {alpha!r} and rank {rank}; both must be numbers, and a rank positive"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(patterns: Any, module: str) -> Any:
    """The value whose key is the end of a module's path, a regular expression as in PEFT; None if there is none."""
    items = patterns.items() if isinstance(patterns, dict) else ()
    return next((value for key, value in items if re.fullmatch(rf"(.*\.)?({key})", module)), None)


def _add_pair(found: Adapters, ours: str, half: Mapping[str, Stored], scale: float) -> None:
    """One module's adapter, or one for each of q, k and v where a file has them as one."""
    at = "embedding_" if "embedding_A" in half else ""
    names = shares_of(ours)
    for i, name in enumerate(names):
        own = {key: stored.part(i, len(names)) for key, stored in half.items()}
        found.pairs[name] = LowRank(half[f"{at}A"], own[f"{at}B"], scale, bool(at), own.get("magnitude_vector"))
        if "B.bias" in own:
            found.biases[name.removesuffix("weight") + "bias"] = (own["B.bias"], scale)


# ---- out, and into a model ----


def save_peft(
    folder: Path, trained: dict[str, Tensor], configs: dict[str, LoRAConfig], base: str,
    original: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """What was trained as PEFT reads it over the exported transformers model: adapters, and whole parts beside them as
    modules_to_save. With `original`, a config.json of haotian-liu/LLaVA, also in folder/original as that repository has
    it: adapters of the language model, and non_lora_trainables.bin.
    """
    adapters, wholes, config = _as_peft(trained, configs, base, "hf_new")
    names = {".".join(name.removeprefix(PREFIX).split(".")[:2]) for name in wholes}
    _write(folder, adapters | wholes, {"adapter_config.json": config | {"modules_to_save": sorted(names) or None}})
    if original and configs.keys() == {"decoder"}:
        base = base or original["_name_or_path"]
        adapters, wholes, config = _as_peft(trained, configs, base, "original")
        files = {"adapter_config.json": config | {"task_type": "CAUSAL_LM"}, "config.json": original}
        _write(folder / "original", adapters, files)
        torch.save(wholes, folder / "original" / "non_lora_trainables.bin")


def _as_peft(
    trained: dict[str, Tensor], configs: dict[str, LoRAConfig], base: str, layout: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Adapters and whole tensors by PEFT's names over a model of that layout, and adapter_config.json."""

    def foreign(name: str) -> str:
        found = rename(name, layout, to_ours=False) or name
        # as modules are called in transformers; its files still say vision_tower.vision_model
        return found.replace("vision_tower.vision_model.", "vision_tower.") if layout == "hf_new" else found

    layers = adapted_layers(trained)
    modules = {name: foreign(f"{name}.weight").removesuffix(".weight") for name in layers}
    adapters, wholes = {}, {}
    for name, tensor in trained.items():
        layer, _, key = name.rpartition(".")
        if key.startswith("lora_"):
            adapters[f"{PREFIX}{modules[layer]}.{key}.weight"] = tensor.contiguous()
        else:
            wholes[f"{PREFIX}{foreign(name)}"] = tensor.contiguous()
    first = next(iter(configs.values()))
    differing = {modules[name]: configs[name.split(".")[0]] for name in layers if configs[name.split(".")[0]] != first}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "rank_pattern": {name: c.rank for name, c in differing.items()},
        "alpha_pattern": {name: c.alpha for name, c in differing.items()},
        "target_modules": sorted(modules.values()),
    }
    return adapters, wholes, config


def _write(folder: Path, tensors: dict[str, Tensor], files: dict[str, dict[str, Any]]) -> None:
    if broken := [name for name, tensor in tensors.items() if not finite(tensor)]:
        raise UserError(f"{folder}: not written, {broken[0]} has values that are not finite: the training diverged")
    folder.mkdir(parents=True, exist_ok=True)
    save(tensors, folder / "adapter_model.safetensors")
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def merge_peft(model: nn.Module, folder: Path) -> None:
    """Put what PEFT's files hold into a model that has neither adapters nor 4-bit weights there. Raises UserError."""
    found, named = read_adapters(folder), dict(model.named_parameters())
    ours = {name: rename(name, found.layout, to_ours=True) or name for name in found.whole}
    shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
    if wrong := [name for name, stored in found.whole.items() if shapes.get(ours[name]) != stored.shape]:
        raise UserError(f"{folder}: does not fit this model: {', '.join(sorted(wrong)[:3])} ({len(wrong)} in all)")
    found.check(shapes, not any(name == "decoder.head.weight" for name in named))
    for name, tensor in zip(ours.values(), read(found.whole.values())):
        assign(named[name], tensor)
    for name, values in found.changed(named):
        assign(named[name], values)
