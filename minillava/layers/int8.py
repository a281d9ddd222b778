"""What layers in few bits have in common, and those in eight: a scale for each output, in memory and on disk as
bitsandbytes has them (arXiv 2208.07339).

What differs: inputs stay what they are, outliers among them too; only a CPU rounds them, by a scale for each 32 or 64
of a row (kernels/cpu). Letters: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.kernels.cpu import product as cpu

ROWS = 1 << 22  # weights that are quantised at a time


class FewBits(nn.Module):
    """A linear layer [N, K] whose frozen weight was quantised from `dtype`; takes inputs of any floating type. Its
    scales stay fp32 whatever the module is cast to."""

    weight: Tensor
    absmax: Tensor

    def __init__(self, shape: Sequence[int], bias: Tensor | None, dtype: torch.dtype, **buffers: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype = dtype
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> FewBits:
        kept = {name: b for name, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class Linear8bit(FewBits):
    """A weight in int8; 127 is worth `absmax` [N]."""

    def __init__(self, weight: Tensor, absmax: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16):
        super().__init__(weight.shape, bias, dtype, weight=weight, absmax=absmax)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None) -> Linear8bit:
        """Round a weight [N, K] to 127 steps of each row's largest magnitude. ValueError if a value is not finite."""
        bytes_, absmax = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.float32)
        step = max(1, ROWS // weight.shape[1])
        for n in range(0, len(weight), step):
            rows = weight[n : n + step].detach().float()
            absmax[n : n + step] = largest = rows.abs().amax(1)
            bytes_[n : n + step] = (rows * (127 / largest.clamp(min=1e-36))[:, None]).round_()
        if not absmax.isfinite().all():
            raise ValueError("holds values that are not finite")
        return cls(bytes_, absmax, bias, weight.dtype)

    @classmethod
    def from_stored(cls, weight: Tensor, companions: Mapping[str, Tensor]) -> Linear8bit:
        """From what bitsandbytes wrote as X.weight and X.SCB, the largest magnitude of each row."""
        largest = companions["SCB"].float()
        if weight.dtype != torch.int8 or largest.shape != weight.shape[:1] or not largest.isfinite().all():
            what = f"{weight.dtype} of shape {[*weight.shape]} with {largest.numel()} scales (SCB)"
            raise ValueError(f"is {what}, expected int8 and a finite scale for each row")
        return cls(weight.contiguous(), largest)

    def stored(self) -> dict[str, Tensor]:
        """What bitsandbytes writes beside a weight, by companion's name; "" is the weight itself."""
        return {"": self.weight, "SCB": self.absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    def for_cpu(self) -> cpu.Weight:
        """The weight as C code takes it."""
        return cpu.Weight((self.out_features, self.in_features), self.weight, self.absmax)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = cpu.multiply(x, self.for_cpu(), bias)
        return F.linear(x, self.dequantize(x.dtype), bias) if y is None else y

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] in `dtype` (None: the one that it was quantised from)."""
        return (self.weight * (self.absmax / 127)[:, None]).to(dtype or self.dtype)

    @classmethod
    def joined(cls, layers: Sequence[Linear8bit]) -> Linear8bit:
        """One layer that gives the outputs of `layers` end to end."""
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        weight, absmax = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "absmax"))
        return cls(weight, absmax, torch.cat(biases) if biases else None, layers[0].dtype)

    def rows(self, start: int, stop: int) -> Linear8bit:
        """The layer of outputs start to stop, of the same memory."""
        bias = None if self.bias is None else self.bias[start:stop]
        return Linear8bit(self.weight[start:stop], self.absmax[start:stop], bias, self.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, int8, bias={self.bias is not None}"
