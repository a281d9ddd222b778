"""LoRA (Hu et al. 2021, arXiv 2106.09685): a linear layer y = W x learns y = W x + alpha / r * B (A x).

A and B are parameters of the very layer they adapt (lora_A [r, in], lora_B [out, r]) and a forward hook adds their
product; so whatever has in_features and out_features can be adapted, 4-bit layers included (QLoRA, arXiv 2305.14314),
and the names of the base's weights do not change.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from minillava.config import UserError
from minillava.hf_parts import read_json
from minillava.names import rename
from minillava.parallel import fill, whole
from minillava.recipe import LoRAConfig
from minillava.tensor_files import inspect, read


class _Adapt:
    """The hook: what the adapter of a layer adds to the layer's output."""

    def __init__(self, config: LoRAConfig):
        self.scale, self.dropout = config.alpha / config.rank, config.dropout

    def __call__(self, layer: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        x, A, B = F.dropout(args[0], self.dropout, layer.training), layer.lora_A, layer.lora_B
        return y + F.linear(F.linear(x, A), B * self.scale)  # type: ignore[arg-type, operator]


def attach(part: nn.Module, name: str, config: LoRAConfig) -> dict[str, Tensor]:
    """Adapters on the linear layers of a part, all but its head or those of `config.targets`; by name, not yet filled.

    Raises UserError where a target is not there.
    """
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
            for key, shape in (
                ("lora_A", (config.rank, layer.in_features)),
                ("lora_B", (layer.out_features, config.rank)),
            ):
                layer.register_parameter(key, nn.Parameter(torch.empty(shape, device=device)))
                adapters[f"{name}.{layer_name}.{key}"] = getattr(layer, key)
            layer.lora = layer.register_forward_hook(_Adapt(config))
            layer.lora_scale = config.alpha / config.rank
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
    layers = {name.rpartition(".")[0] for name in adapters}
    return {n: configs[n.split(".")[0]].alpha / configs[n.split(".")[0]].rank for n in layers}


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

PREFIX = "base_model.model."  # PEFT's wrappers in front of every name
ADAPTER = re.compile(r"(.+)\.(lora_[AB])(?:\.default)?\.weight")


def save_peft(
    folder: Path, trained: dict[str, Tensor], configs: dict[str, LoRAConfig], base: str, layout: str = "hf_new"
) -> None:
    """What was trained as PEFT reads it over the exported transformers model: adapters, and whole parts beside them as
    modules_to_save. In layout "original" those are haotian-liu/LLaVA's non_lora_trainables.bin."""

    def foreign(name: str) -> str:
        found = rename(name, layout, to_ours=False) or name
        if layout == "hf_new":  # as modules are called; files still say vision_tower.vision_model
            found = found.replace("vision_tower.vision_model.", "vision_tower.")
        return found

    layers = [name.removesuffix(".lora_A") for name in trained if name.endswith(".lora_A")]
    modules = {name: foreign(f"{name}.weight").removesuffix(".weight") for name in layers}
    tensors, others = {}, {}
    for name, tensor in trained.items():
        layer, _, key = name.rpartition(".")
        if key.startswith("lora_"):
            tensors[f"{PREFIX}{modules[layer]}.{key}.weight"] = tensor.contiguous()
        else:
            others[f"{PREFIX}{foreign(name)}"] = tensor.contiguous()
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
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "original":
        torch.save(others, folder / "non_lora_trainables.bin")
    else:
        tensors |= others
        wholes = {".".join(name.removeprefix(PREFIX).split(".")[:2]) for name in others}
        config["modules_to_save"] = sorted(wholes) or None
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_peft(folder: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Adapters and whole weights by our names, and each adapted layer's scale, from PEFT's files in any known layout.

    Raises UserError for what is not plain LoRA and for tensors that no layout knows.
    """
    config = read_json(folder / "adapter_config.json")
    odd = [key for key in ("use_dora", "modules_to_save_bias") if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or odd:
        raise UserError(f"{folder}: is {config.get('peft_type')} {' '.join(odd)}, not plain LoRA; merge it with PEFT")
    files = ("adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")
    stored = {name: s for file in files if (folder / file).is_file() for name, s in inspect(folder / file).items()}
    tensors: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    unknown = []
    for name, tensor in zip(stored, read(stored.values())):
        plain = name.removeprefix(PREFIX).removeprefix(PREFIX).replace(".modules_to_save.default", "")
        adapter = ADAPTER.fullmatch(plain)
        plain = f"{adapter[1]}.weight" if adapter else plain
        found = (rename(plain, layout, to_ours=True) for layout in ("hf_new", "hf", "original", "onevision_1_5_tree"))
        ours = next((n for n in found if n), None)
        if ours is None:
            unknown.append(name)
        elif adapter is None:
            tensors[ours] = tensor.clone()
        else:
            layer = ours.removesuffix(".weight")
            tensors[f"{layer}.{adapter[2]}"] = tensor.clone()
            rank = tensor.shape[adapter[2] == "lora_B"]
            alpha = _pattern(config.get("alpha_pattern"), adapter[1], config["lora_alpha"])
            scales[layer] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    lone = [n for n in tensors if n.endswith(".lora_A") and n[:-1] + "B" not in tensors]
    if unknown or lone or not tensors:
        raise UserError(
            f"{folder}: the tensors are no adapter of a LLaVA: {', '.join([*unknown, *lone][:3]) or 'none'}"
        )
    return tensors, scales


def _pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: a pattern is the end of a module's path."""
    return next((v for key, v in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)


def merge_peft(model: nn.Module, folder: Path) -> None:
    """Put what PEFT's files hold into a model that has neither adapters nor 4-bit weights there."""
    tensors, scales = load_peft(folder)
    named = dict(model.named_parameters())
    wrong = [n for n in tensors if n.rsplit(".lora_", 1)[0] + ".weight" * ("lora_" in n) not in named]
    if wrong:
        raise UserError(f"{folder}: does not fit this model: {', '.join(sorted(wrong)[:3])} ({len(wrong)} in all)")
    add(named, tensors, scales)
    for name, tensor in tensors.items():
        if "lora_" not in name:
            fill(named[name], tensor)
