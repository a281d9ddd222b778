"""LoRA (Hu et al. 2021, arXiv 2106.09685): a linear layer y = W x learns y = W x + alpha / r * B (A x).

A and B are parameters of the very layer they adapt (lora_A [r, in], lora_B [out, r]) and a forward hook adds their
product; so whatever has in_features and out_features can be adapted, 4-bit layers included (QLoRA, arXiv 2305.14314),
and the names of the base's weights do not change. Weights may be sharded: then every rank makes the same calls.
"""

import contextlib
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.config import LoRAConfig
from minillava.errors import UserError
from minillava.layers.sharded import assign, whole


def attach(part: nn.Module, name: str, config: LoRAConfig) -> dict[str, Tensor]:
    """Adapters on the linear layers of a part, all or those of `config.targets`; by name, not yet filled.

    A head has none: the loss takes its weight as it is, past what is called. Raises UserError for an unknown target.
    """

    def adapted(layer: Any, args: tuple[Tensor], y: Tensor) -> Tensor:
        if layer.lora_off:
            return y
        x = F.dropout(args[0], config.dropout, layer.training)
        return y + F.linear(F.linear(x, layer.lora_A), layer.lora_B * config.scale)

    layers = {path: m for path, m in part.named_modules() if hasattr(m, "in_features") and hasattr(m, "out_features")}
    known = {path.rsplit(".", 1)[-1] for path in layers} - {"head"}
    if missing := set(config.targets) - known:
        raise UserError(f"lora.{name}: no layer '{min(missing)}'; there are {', '.join(sorted(known))}")
    adapters: dict[str, Tensor] = {}
    for path, layer in layers.items():
        last = path.rsplit(".", 1)[-1]
        if last in known and (not config.targets or last in config.targets):
            shapes = {"lora_A": (config.rank, layer.in_features), "lora_B": (layer.out_features, config.rank)}
            for key, shape in shapes.items():
                layer.register_parameter(key, nn.Parameter(torch.empty(shape, device=layer.weight.device)))
                adapters[f"{name}.{path}.{key}"] = getattr(layer, key)
            layer.lora, layer.lora_scale = layer.register_forward_hook(adapted), config.scale
            layer.lora_off = False
    return adapters


def initialise(adapters: dict[str, Tensor], seed: int) -> None:
    """A as PEFT starts it (uniform, Kaiming with a = sqrt(5)), by seed and name; B is zero, so nothing changes yet."""
    for name, parameter in adapters.items():
        if name.endswith("lora_A"):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
            bound = 1 / math.sqrt(parameter.shape[1])
            assign(parameter, torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        else:
            with torch.no_grad():
                parameter.zero_()


@contextlib.contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """As long as this lasts the model is what it was without its adapters."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_scale")]
    for layer in layers:
        layer.lora_off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.lora_off = False


def detach(model: nn.Module) -> dict[str, Tensor]:
    """Take all adapters off; returns them by name."""
    adapters: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_scale"):
            adapters |= {f"{name}.{key}": getattr(module, key).detach() for key in ("lora_A", "lora_B")}
            module.lora.remove()
            del module.lora_A, module.lora_B, module.lora, module.lora_scale, module.lora_off
    return adapters


def merge(named: Mapping[str, Tensor], adapters: dict[str, Tensor], configs: dict[str, LoRAConfig]) -> None:
    """Add adapters (by name, whole; configs by part) to the weights that they adapt. Raises UserError for 4 bits."""
    for layer in adapted_layers(adapters):
        weight = named.get(f"{layer}.weight")
        if weight is None:
            raise UserError(f"{layer}: is in 4 bits, an adapter cannot become part of it; start from the export")
        A, B = (adapters[f"{layer}.{key}"].to(weight.device, torch.float32) for key in ("lora_A", "lora_B"))
        scale = configs[layer.split(".")[0]].scale
        assign(weight, whole(weight.detach()).float() + scale * (B @ A))


def adapted_layers(names: Iterable[str]) -> list[str]:
    """The layers that adapters of these names are of."""
    return [name.removesuffix(".lora_A") for name in names if name.endswith(".lora_A")]


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model by name, whole, with its adapter merged in (in float32) and out of its 4 bits."""
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
