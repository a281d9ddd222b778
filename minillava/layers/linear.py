"""What a linear layer of the decoder may be: plain, several joined into one product, one of each expert.

Layers in four bits are in `layers.quantize`. Letters: T tokens, S turns of a token at an expert, D inputs, O outputs,
E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minillava.kernels.cpu import product as cpu
from minillava.layers.int8 import Linear8bit
from minillava.layers.quantize import Linear4bit


class Unallocated(TorchFunctionMode):
    """Modules made in here have their parameters on the meta device, and none is initialised: torch's own way there
    imports its compiler, three quarters of a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.meta = torch.device("meta")
        self.meta.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.meta.__exit__(*error)


class Linear(nn.Linear):
    """nn.Linear that reads its weight as fast as a CPU can."""

    def forward(self, x_TD: Tensor) -> Tensor:
        return cpu.linear(x_TD, self.weight, self.bias)

    @classmethod
    def around(cls, weight_OD: Tensor, bias_O: Tensor | None) -> Linear:
        """A layer of tensors that are there."""
        with Unallocated():
            layer = cls(1, 1, bias_O is not None)
        layer.out_features, layer.in_features = weight_OD.shape
        layer.weight = nn.Parameter(weight_OD.detach())
        layer.register_parameter("bias", None if bias_O is None else nn.Parameter(bias_O.detach()))
        return layer

    def for_cpu(self) -> cpu.Weight:
        """The weight as C code takes it."""
        return cpu.Weight((self.out_features, self.in_features), self.weight)

    @classmethod
    def joined(cls, layers: Sequence[Linear]) -> Linear:
        """One layer that gives the outputs of `layers` end to end."""
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        weight_OD = torch.cat([layer.weight.detach() for layer in layers])
        return cls.around(weight_OD, torch.cat(biases) if biases else None)

    def rows(self, start: int, stop: int) -> Linear:
        """The layer of outputs start to stop, of the same memory."""
        return Linear.around(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])


class Fused(nn.Module):
    """Linear layers of one input as one product, for inference. The state dict still shows them one by one."""

    def __init__(self, names: Sequence[str], parts: Sequence[Any]):
        super().__init__()
        self.names, self.sizes = names, [part.out_features for part in parts]
        self.product: Linear | Linear4bit = type(parts[0]).joined(parts)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        return self.product(x_TD).split(self.sizes, dim=-1)

    def parts(self) -> Iterator[tuple[str, Linear | Linear4bit]]:
        """The layers one by one, by name, of the same memory."""
        ends = list(accumulate(self.sizes, initial=0))
        for name, start, end in zip(self.names, ends, ends[1:]):
            yield name, self.product.rows(start, end)

    def state_dict(self, *args, prefix: str = "", **more):
        outer = prefix.removesuffix(".").rpartition(".")[0]
        for name, layer in self.parts():
            state = layer.state_dict(*args, prefix=f"{outer}.{name}.", **more)
        return state


def fuse(module: nn.Module, name: str, names: Sequence[str]) -> None:
    """Replace the linear layers `names` of `module` by one, `name`; plain ones and those in four bits, not adapters."""
    parts = [getattr(module, part) for part in names]
    if {type(part) for part in parts} in ({Linear}, {Linear4bit}):
        for part in names:
            delattr(module, part)
        setattr(module, name, Fused(names, parts))


def dense_weight(layer: nn.Linear | Linear4bit | Linear8bit) -> Tensor:
    """The weight [O, D], out of its few bits."""
    return layer.weight if isinstance(layer, nn.Linear) else layer.dequantize()


def grouped_linear(x_SD: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> Tensor:
    """Rows up to ends_E[0] through the first matrix, those up to ends_E[1] through the second, ...: [S, O]."""
    if x_SD.is_cuda and x_SD.dtype == torch.bfloat16:  # asks nothing of the host
        return F.grouped_mm(x_SD, weight_EOD.transpose(1, 2), offs=ends_E)
    parts = x_SD.tensor_split(ends_E[:-1].tolist())
    return torch.cat([cpu.linear(part, weight_OD) for part, weight_OD in zip(parts, weight_EOD)])
