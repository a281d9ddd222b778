"""LoRA (Hu et al. 2021, arXiv 2106.09685): a linear layer y = W x learns y = W x + alpha / r * B (A x).

A and B are parameters of the very layer they adapt (lora_A [r, in], lora_B [out, r]) and a forward hook adds their
product; so whatever has in_features and out_features can be adapted, 4-bit layers included (QLoRA, arXiv 2305.14314),
and the names of the base's weights do not change.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from minillava.adapters import PREFIX, read_adapters
from minillava.config import UserError
from minillava.names import rename
from minillava.parallel import fill, whole
from minillava.recipe import LoRAConfig
from minillava.tensor_files import read


def attach(part: nn.Module, name: str, config: LoRAConfig) -> dict[str, Tensor]:
    """Adapters on the linear layers of a part, all but its head or those of `config.targets`; by name, not yet filled.

    Raises UserError where a target is not there.
    """

    def adapted(layer: Any, args: tuple[Tensor], y: Tensor) -> Tensor:
        x = F.dropout(args[0], config.dropout, layer.training)
        return y + F.linear(F.linear(x, layer.lora_A), layer.lora_B * config.scale)

    layers = {
        layer_name: layer
        for layer_name, layer in part.named_modules()
        if hasattr(layer, "in_features") and hasattr(layer, "out_features")
    }
    known = {layer_name.rsplit(".", 1)[-1] for layer_name in layers}
    if missing := set(config.targets) - known:
        raise UserError(f"lora.{name}: no layer '{min(missing)}'; there are {', '.join(sorted(known))}")
    adapters: dict[str, Tensor] = {}
    for layer_name, layer in layers.items():
        last = layer_name.rsplit(".", 1)[-1]
        if last in config.targets if config.targets else last != "head":
            device = layer.weight.device
            shapes = {"lora_A": (config.rank, layer.in_features), "lora_B": (layer.out_features, config.rank)}
            for key, shape in shapes.items():
                layer.register_parameter(key, nn.Parameter(torch.empty(shape, device=device)))
                adapters[f"{name}.{layer_name}.{key}"] = getattr(layer, key)
            layer.lora, layer.lora_scale = layer.register_forward_hook(adapted), config.scale
    return adapters


def initialise(adapters: dict[str, Tensor], seed: int) -> None:
    """A as PEFT starts it (uniform, Kaiming with a = sqrt(5)), by seed and name; B is zero, so nothing changes yet."""
    for name, parameter in adapters.items():
        if name.endswith("lora_A"):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
            bound = 1 / math.sqrt(parameter.shape[1])
            fill(parameter, torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        else:
            with torch.no_grad():
                parameter.zero_()


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model by name, whole, with its adapter merged in (in float32) and out of its 4 bits.

    Where the model is sharded every rank must go through all of it.
    """
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_scale") or hasattr(m, "dequantize")}
    for name, value in model.state_dict().items():
        prefix, _, key = name.rpartition(".")
        layer = layers.get(prefix)
        if layer is None or key == "bias":
            yield name, whole(value)
        elif key == "weight":
            value = layer.dequantize(torch.float32) if hasattr(layer, "dequantize") else whole(value).float()
            if hasattr(layer, "lora_scale"):
                A, B = (whole(t.detach()).float() for t in (layer.lora_A, layer.lora_B))
                value = value + layer.lora_scale * (B @ A)
            yield name, value


def count(module: nn.Module) -> int:
    """Weights, adapters apart; those in 4 bits too."""
    layers = [m for m in module.modules() if hasattr(m, "dequantize")]
    plain = sum(p.numel() for name, p in module.named_parameters() if "lora_" not in name)
    return plain + sum(layer.in_features * layer.out_features for layer in layers)  # type: ignore[operator, misc]


def add(named: Mapping[str, Tensor], adapters: dict[str, Tensor], scales: dict[str, float]) -> None:
    """Merge adapters (by name, whole) into the weights that they adapt, which may be sharded; scales by layer."""
    for name, A in adapters.items():
        if name.endswith(".lora_A"):
            layer = name.removesuffix(".lora_A")
            weight = named.get(f"{layer}.weight")
            if weight is None:
                raise UserError(f"{layer}: is in 4 bits, an adapter cannot become part of it; start from the export")
            A, B = (t.to(weight.device, torch.float32) for t in (A, adapters[f"{layer}.lora_B"]))
            fill(weight, whole(weight.detach()).float() + scales[layer] * (B @ A))


def scales_of(adapters: Iterable[str], configs: dict[str, LoRAConfig]) -> dict[str, float]:
    """The scale of every adapted layer."""
    return {name.rpartition(".")[0]: configs[name.split(".")[0]].scale for name in adapters}


def detach(model: nn.Module) -> dict[str, Tensor]:
    """Take all adapters off; returns them by name."""
    adapters: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_scale"):
            adapters |= {f"{name}.{key}": getattr(module, key).detach() for key in ("lora_A", "lora_B")}
            module.lora.remove()
            del module.lora_A, module.lora_B, module.lora, module.lora_scale
    return adapters


# ---- PEFT's files ----


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

    layers = [name.removesuffix(".lora_A") for name in trained if name.endswith(".lora_A")]
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
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def merge_peft(model: nn.Module, folder: Path) -> None:
    """Put what PEFT's files hold into a model that has neither adapters nor 4-bit weights there. Raises UserError."""
    found, named = read_adapters(folder), dict(model.named_parameters())
    ours = {name: rename(name, found.layout, to_ours=True) or name for name in found.whole}
    shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
    if wrong := [name for name, stored in found.whole.items() if shapes.get(ours[name]) != stored.shape]:
        raise UserError(f"{folder}: does not fit this model: {', '.join(sorted(wrong)[:3])} ({len(wrong)} in all)")
    for name, change in found.changes(named):
        fill(named[name], whole(named[name].detach()).float() + change)
    for name, tensor in zip(ours.values(), read(found.whole.values())):
        fill(named[name], tensor)
