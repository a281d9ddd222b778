"""LoRA folders, as PEFT and original LLaVA write them: adapters, and beside them weights that were trained whole.

adapter_model holds A [r, in] and B [out, r] of linear layers; their weights become W + scale * B A, scale = alpha / r
(arXiv 2106.09685). modules_to_save stand in the same file, original LLaVA's in non_lora_trainables.bin.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minillava.config import UserError
from minillava.hf_parts import read_json
from minillava.names import rename
from minillava.tensor_files import Stored, inspect, read

PREFIX = "base_model.model."  # PEFT's wrappers in front of every name
FILES = ("adapter_model.safetensors", "adapter_model.bin")
LAYOUTS = ("hf_new", "hf", "original", "onevision_1_5_tree")  # of the models that PEFT wraps


@dataclass(frozen=True)
class Adapters:
    """What a LoRA folder changes."""

    folder: Path
    base: str  # the language model that it belongs to, as adapter_config.json names it
    layout: str
    pairs: dict[str, tuple[Stored, Stored, float]]  # by our name of the weight: A, B, scale
    whole: dict[str, Stored]  # by the name in the layout

    def changes(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What is to be added to each adapted weight, in float32 and where that weight is. Raises UserError."""
        for name, (*factors, scale) in self.pairs.items():
            if name not in weights:
                raise UserError(f"{self.folder}: adapts {name}, which this model does not have, or has in 4 bits only")
            A, B = (t.to(weights[name].device, torch.float32, copy=True) for t in read(factors))
            if (B.shape[0], A.shape[1]) != weights[name].shape or A.shape[0] != B.shape[1]:
                shapes = f"{[*A.shape]} and {[*B.shape]} do not fit {name} {[*weights[name].shape]}"
                raise UserError(f"{factors[0].path}: adapters {shapes}; is it the right base?")
            yield name, scale * (B @ A)


def read_adapters(folder: Path) -> Adapters:
    """Raises UserError for what is not plain LoRA, and for adapters of nothing that is known here."""
    config, path = read_json(folder / "adapter_config.json"), folder / "adapter_config.json"
    odd = [key for key in ("use_dora", "fan_in_fan_out", "lora_bias") if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or odd:
        raise UserError(
            f"{path}: is not plain LoRA ({', '.join(odd) or 'peft_type or bias'}); merge it with PEFT first"
        )
    files = [file for file in FILES if (folder / file).is_file()][:1]
    if not files:
        raise UserError(f"{folder}: adapter_config.json, but no {' or '.join(FILES)}")
    files += [f for f in ("non_lora_trainables.bin",) if (folder / f).is_file()]
    halves: dict[str, dict[str, Stored]] = {}
    whole: dict[str, Stored] = {}
    for name, stored in ((n, s) for file in files for n, s in inspect(folder / file).items()):
        name = name.removeprefix(PREFIX).removeprefix(PREFIX).replace(".modules_to_save.default", "")
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match:
            halves.setdefault(match[1], {})[match[2]] = stored
        else:
            whole[name] = stored
    known = {
        layout: {module: ours for module in halves if (ours := rename(f"{module}.weight", layout, to_ours=True))}
        for layout in LAYOUTS
    }
    layout = max(LAYOUTS, key=lambda at: len(known[at]) + sum(rename(n, at, to_ours=True) is not None for n in whole))
    patterns = (config.get("alpha_pattern") or {}).items()
    pairs = {}
    for module, half in halves.items():
        if module not in known[layout] or half.keys() != {"A", "B"}:
            raise UserError(f"{folder}: the adapter of {module} has no partner, or belongs to no part of a LLaVA")
        found = (value for key, value in patterns if re.fullmatch(rf"(.*\.)?({key})", module))  # the end of the path
        rank, alpha = half["A"].shape[0], next(found, config.get("lora_alpha", 8))
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        pairs[known[layout][module]] = (half["A"], half["B"], scale)
    return Adapters(folder, str(config.get("base_model_name_or_path") or ""), layout, pairs, whole)
