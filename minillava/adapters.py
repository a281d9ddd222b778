"""LoRA folders, as original LLaVA and PEFT write them: adapters, and beside them weights that were trained whole.

adapter_model holds A [r, in] and B [out, r] of linear layers; their weights become W + scale * B A, scale = alpha / r
(arXiv 2106.09685). non_lora_trainables.bin holds the projector, and may hold embeddings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillava.config import UserError
from minillava.hf_parts import read_json
from minillava.names import rename
from minillava.tensor_files import Stored, inspect, read


@dataclass(frozen=True)
class Adapters:
    """What a LoRA folder changes."""

    base: str  # the language model that it belongs to, as adapter_config.json names it
    pairs: dict[str, tuple[Stored, Stored, float]]  # by our name of the weight: A, B, scale
    whole: dict[str, Stored]  # by the name in the original layout

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add each product, in float32, to its weight."""
        for name, (*factors, scale) in self.pairs.items():
            A, B = (t.to(state[name].device, torch.float32, copy=True) for t in read(factors))
            if (B.shape[0], A.shape[1]) != state[name].shape or A.shape[0] != B.shape[1]:
                shapes = f"{[*A.shape]} and {[*B.shape]} do not fit {name} {[*state[name].shape]}"
                raise UserError(f"{factors[0].path}: adapters {shapes}; is it the right base?")
            state[name] = (state[name].float() + scale * (B @ A)).to(state[name].dtype)


def read_adapters(folder: Path) -> Adapters:
    """Raises UserError for what is not plain LoRA, and for tensors that belong to nothing."""
    config, path = read_json(folder / "adapter_config.json"), folder / "adapter_config.json"
    odd = [key for key in ("use_dora", "fan_in_fan_out", "lora_bias") if config.get(key)]
    if config.get("peft_type", "LORA") != "LORA" or config.get("bias", "none") != "none" or odd:
        raise UserError(
            f"{path}: is not plain LoRA ({', '.join(odd) or 'peft_type or bias'}); merge it with PEFT first"
        )
    files = [f for f in ("adapter_model.safetensors", "adapter_model.bin") if (folder / f).is_file()][:1]
    if not files:
        raise UserError(f"{folder}: adapter_config.json, but no adapter_model.safetensors or adapter_model.bin")
    files += [f for f in ("non_lora_trainables.bin",) if (folder / f).is_file()]
    tensors = {name.removeprefix("base_model."): s for file in files for name, s in inspect(folder / file).items()}
    if any(name.startswith("model.model.") for name in tensors):  # PEFT's wrapper and the model's own
        tensors = {name.removeprefix("model."): s for name, s in tensors.items()}
    halves: dict[str, dict[str, Stored]] = {}
    whole: dict[str, Stored] = {}
    for name, stored in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match:
            halves.setdefault(match[1], {})[match[2]] = stored
        else:
            whole[name.replace(".modules_to_save.default", "")] = stored
    pairs = {}
    for module, half in halves.items():
        ours = rename(f"{module}.weight", "original", to_ours=True)
        if ours is None or half.keys() != {"A", "B"}:
            raise UserError(f"{folder}: the adapter of {module} has no partner, or belongs to no part of a LLaVA")
        rank, alpha = half["A"].shape[0], _of(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        pairs[ours] = (half["A"], half["B"], alpha / (rank**0.5 if config.get("use_rslora") else rank))
    return Adapters(str(config.get("base_model_name_or_path") or ""), pairs, whole)


def _of(patterns: dict[str, Any] | None, module: str, default: float) -> float:
    """PEFT's rule: a pattern is the end of a module's path."""
    return next((v for key, v in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)
