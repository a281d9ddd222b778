"""Weights in four bits, in memory and on disk as bitsandbytes has them (QLoRA, arXiv 2305.14314, section 3).

Eight bits are in `layers.int8`. Values are quantised in blocks of their own largest magnitude to the nearest of 16
codes; "double" quantises those magnitudes to 8 bits in turn. Codes and scales equal bitsandbytes' to the bit. What
differs: every 256 scales have an offset of their own, so that layers can be joined along their outputs as they are.
Letters: N outputs, K inputs.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillava.errors import UserError
from minillava.kernels import nf4_dequantize as kernel
from minillava.kernels.cpu import product as cpu
from minillava.kernels.nf4_dequantize import BLOCKSIZES, CODES, NESTED, scales
from minillava.kernels.nf4_matmul import nf4_matmul
from minillava.layers.int8 import FewBits, Linear8bit
from minillava.layers.scheme import PARTS, Scheme

# What bitsandbytes writes beside `X.weight`; the last of four bits' is JSON.
COMPANION = re.compile(
    r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(?:nf4|fp4)|SCB|weight_format)"
)
SMALLEST = 1e-38  # bitsandbytes' guard against division by zero


def chosen_layers(model: nn.Module, scheme: Scheme) -> set[str]:
    """The names of the linear layers of `model` that are to be quantised; UserError if a part has none."""
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found: dict[str, set[str]] = {p: {n for n in linear if n.startswith(PARTS[p])} for p in scheme.parts}
    stacked = any(p.ndim == 3 and name.startswith(PARTS["decoder"]) for name, p in model.named_parameters())
    if stacked and "decoder" in scheme.parts:
        raise UserError("quantize: this decoder's routed experts share one tensor; leave 'decoder' out of it")
    for part in [p for p, names in found.items() if not names]:
        raise UserError(f"quantize: this model's {part} has no linear layer of its own; leave '{part}' out")
    return set().union(*found.values())


# ---- values to codes ----


def quantize(
    weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, double: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """packed, absmax, nested and dynamic, as `minillava.kernels.nf4_dequantize` takes them, of a weight in any shape.

    Works on a few values at a time, where the weight is. Raises ValueError if a value is not finite.
    """
    flat = weight.detach().reshape(-1)
    code = torch.tensor(CODES[quant_type])
    order = code.argsort().to(torch.uint8).to(flat.device)
    ascending = code.sort().values
    between = (ascending[:-1] + ascending[1:]) / 2
    bounds = between.tolist()
    packed = torch.empty((len(flat) + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-len(flat) // blocksize), device=flat.device)
    chunk = 1 << 18 if flat.is_cpu else 1 << 24  # on a CPU what stays in the cache
    done = cpu.codes(flat, between, order, absmax, packed, blocksize)
    for start in range(done, len(flat), chunk):
        values = flat[start : start + chunk].to(torch.float32, copy=True)
        whole = len(values) // blocksize * blocksize
        blocks, rest, scale = values[:whole].view(-1, blocksize), values[whole:], absmax[start // blocksize :]
        torch.amax(blocks.abs(), 1, out=scale[: len(blocks)])
        blocks *= (1 / scale[: len(blocks)].clamp(min=SMALLEST))[:, None]
        if len(rest):
            scale[len(blocks)] = rest.abs().max().clamp(min=SMALLEST)
            rest /= scale[len(blocks)]
        values.clamp_(-1, 1)
        nibbles = (values > bounds[0]).view(torch.uint8)
        for bound in bounds[1:]:  # faster than a binary search a value (bench/LOG.md); a tie goes to the lower code
            nibbles += (values > bound).view(torch.uint8)
        if quant_type == "fp4":
            nibbles = order[nibbles.int()]
        if len(nibbles) % 2:  # the free nibble is what zero is coded as
            nibbles = F.pad(nibbles, (0, 1), value=int(order[sum(bound < 0 for bound in bounds)]))
        packed[start // 2 : (start + chunk) // 2] = nibbles[::2] << 4 | nibbles[1::2]
    if not absmax.isfinite().all():
        raise ValueError("holds values that are not finite")
    if not double:
        return packed, absmax, None, None
    offset = absmax.mean()
    bytes_, largest = _quantize_scales(absmax - offset)
    return packed, bytes_, torch.stack((largest, offset.expand_as(largest))), dynamic_map().to(absmax.device, copy=True)


@functools.cache
def dynamic_map() -> Tensor:
    """bitsandbytes' 256 values for scales [256], ascending: 7 decades, each halved as often as bits are left
    (arXiv 1511.04561)."""
    values = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        values.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6))
    positive = torch.cat(values)
    return torch.cat((positive, -positive, torch.tensor((0.0, 1.0)))).sort().values


def _quantize_scales(values: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes, and the largest magnitude of every 256. The nearest of `dynamic_map` is looked up on a grid of 2^16 steps,
    as bitsandbytes does: next to a boundary that is not always the nearest."""
    blocks = F.pad(values, (0, -len(values) % NESTED)).view(-1, NESTED)
    largest = blocks.abs().amax(1)
    grid = torch.arange(1 << 16, device=values.device).double() / 32767.5 - 1
    map_ = dynamic_map().to(values.device)
    nearest_of = torch.bucketize(grid.float(), (map_[1:] + map_[:-1]) / 2).to(torch.uint8)
    steps = ((blocks * (1 / largest)[:, None]).nan_to_num(0.0).clamp(-1, 1) + 1) * 32767.5 + 0.5
    bytes_ = nearest_of[steps.int()].masked_fill_((largest == 0)[:, None], 0)
    return bytes_.flatten()[: len(values)], largest


# ---- the layer ----


class Linear4bit(FewBits):
    """A weight in four bits: uint8, two weights a byte."""

    nested: Tensor | None
    dynamic: Tensor | None

    def __init__(
        self,
        parts: Sequence[Tensor | None],
        shape: tuple[int, int],
        quant_type: str = "nf4",
        blocksize: int = 64,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        exact: bool = False,
    ):
        kernel.check(*parts, *shape, quant_type, blocksize)
        super().__init__(shape, bias, dtype, **dict(zip(("weight", "absmax", "nested", "dynamic"), parts)))
        self.quant_type, self.blocksize, self.exact = quant_type, blocksize, exact

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None, scheme: Scheme | None = None) -> Linear4bit:
        """Quantise a weight [N, K]."""
        s = scheme or Scheme()
        parts = quantize(weight, s.quant_type, s.blocksize, s.double)
        shape = weight.shape[0], weight.shape[1]
        return cls(parts, shape, s.quant_type, s.blocksize, bias, weight.dtype, s.exact)

    @classmethod
    def from_stored(cls, weight: Tensor, companions: Mapping[str, Tensor]) -> Linear4bit:
        """From what bitsandbytes wrote as X.weight and X.weight.<companion>."""
        state = quant_state(companions)
        absmax, nested, dynamic = companions["absmax"].flatten(), None, None
        if "nested_offset" in state:
            largest, dynamic = companions["nested_absmax"].flatten(), companions["nested_quant_map"]
            nested = torch.stack((largest, torch.full_like(largest, state["nested_offset"])))
        parts = weight.contiguous().view(torch.uint8).flatten(), absmax, nested, dynamic
        N, K = state["shape"]
        return cls(parts, (N, K), state["quant_type"], state["blocksize"], None, getattr(torch, state["dtype"]))

    def stored(self) -> dict[str, Tensor]:
        """What bitsandbytes writes, by companion's name; "" is the weight itself."""
        state: dict[str, Any] = {"quant_type": self.quant_type, "blocksize": self.blocksize}
        state |= {"dtype": str(self.dtype).removeprefix("torch."), "shape": [self.out_features, self.in_features]}
        tensors = {"": self.weight[:, None], "absmax": self.absmax, "quant_map": torch.tensor(CODES[self.quant_type])}
        if self.nested is not None and self.dynamic is not None:
            if bool((self.nested[1] == self.nested[1, 0]).all()):
                tensors |= {"nested_absmax": self.nested[0].contiguous(), "nested_quant_map": self.dynamic.clone()}
                offset = self.nested[1, 0].item()
                state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
            else:  # joined layers with offsets of their own: a file holds one
                tensors["absmax"] = scales(self.absmax, self.nested, self.dynamic)
        text = json.dumps(state).encode()
        tensors[f"quant_state.bitsandbytes__{self.quant_type}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return tensors

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if x.is_cpu and x.dtype == torch.bfloat16 and (y := cpu.multiply(x, self.for_cpu(), bias)) is not None:
            return y
        parts = self.weight, self.absmax, self.nested, self.dynamic
        return nf4_matmul(x, *parts, bias, self.out_features, self.quant_type, self.blocksize)

    def for_cpu(self) -> cpu.Weight:
        """The weight as C code takes it; unless `exact`, inputs in bf16 are rounded to bytes there."""
        table = kernel.code(self.quant_type, self.weight.device)
        codes = self.weight, self.absmax, self.nested, self.dynamic, table, self.blocksize
        return cpu.Weight((self.out_features, self.in_features), codes=codes, rounded=not self.exact)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] in `dtype` (None: the one that it was quantised from)."""
        parts, shape = (self.weight, self.absmax, self.nested, self.dynamic), (self.out_features, self.in_features)
        return kernel.dequantize(*parts, *shape, self.quant_type, self.blocksize, dtype or self.dtype)

    @classmethod
    def joined(cls, layers: Sequence[Linear4bit]) -> Linear4bit:
        """One layer that gives the outputs of `layers` end to end (fused q, k, v): same codes, same values.

        Nested scales stay nested where every layer but the last has a multiple of 256 blocks. ValueError for layers
        that are not alike, or do not end with a block.
        """
        first = layers[0]
        kinds = {(m.in_features, m.quant_type, m.blocksize, m.bias is None) for m in layers}
        if len(kinds) > 1 or any(m.out_features * m.in_features % (2 * m.blocksize) for m in layers[:-1]):
            raise ValueError(f"layers cannot be joined: {', '.join(m.extra_repr() for m in layers)}")
        maps = [m.dynamic for m in layers if m.nested is not None and m.dynamic is not None]
        nested = len(maps) == len(layers) and all(torch.equal(maps[0], m) for m in maps)
        if nested and not any(len(m.absmax) % NESTED for m in layers[:-1]):
            nests = torch.cat([m.nested for m in layers if m.nested is not None], 1)
            parts: tuple[Tensor | None, ...] = torch.cat([m.absmax for m in layers]), nests, maps[0]
        else:
            parts = torch.cat([scales(m.absmax, m.nested, m.dynamic) for m in layers]), None, None
        packed = torch.cat([m.weight for m in layers])
        bias = None if first.bias is None else torch.cat([m.bias for m in layers if m.bias is not None])
        shape = sum(m.out_features for m in layers), first.in_features
        return cls((packed, *parts), shape, first.quant_type, first.blocksize, bias, first.dtype, first.exact)

    def rows(self, start: int, stop: int) -> Linear4bit:
        """The layer of outputs start to stop, which must begin with a block."""
        K, size = self.in_features, self.blocksize
        if start * K % (2 * size) or (stop < self.out_features and stop * K % (2 * size)):
            raise ValueError(f"rows {start} to {stop} of {K} inputs do not begin and end with blocks of {size}")
        first, last = start * K // size, -(-stop * K // size)
        absmax, nested, dynamic = self.absmax[first:last], self.nested, self.dynamic
        if nested is not None and first % NESTED == 0:
            nested = nested[:, first // NESTED : -(-last // NESTED)].contiguous()  # as C code takes it
        elif nested is not None:
            absmax, nested, dynamic = scales(self.absmax, nested, dynamic)[first:last], None, None
        parts = self.weight[start * K // 2 : (stop * K + 1) // 2], absmax, nested, dynamic
        bias = None if self.bias is None else self.bias[start:stop]
        return Linear4bit(parts, (stop - start, K), self.quant_type, size, bias, self.dtype, self.exact)

    def extra_repr(self) -> str:
        double = "-double" if self.nested is not None else ""
        kind = f"{self.quant_type}{double}, blocksize={self.blocksize}"
        return f"{self.in_features}, {self.out_features}, {kind}, bias={self.bias is not None}"


def quantized_layer(weight: Tensor, scheme: Scheme, name: str) -> Linear4bit | Linear8bit:
    """A weight of ours by name, quantised as the scheme says. ValueError if it cannot be."""
    kind = scheme.type_of(name)
    if kind == "int8":
        return Linear8bit.from_weight(weight)
    return Linear4bit.from_weight(weight, scheme=replace(scheme, quant_type=kind))


# ---- files ----


def companion_of(name: str) -> tuple[str, str] | None:
    """The weight that a stored tensor belongs to, and as what: of X.weight in four bits X.weight.absmax and more, in
    eight X.SCB and X.weight_format."""
    found = COMPANION.fullmatch(name)
    if found is None:
        return None
    return (f"{found[1]}.weight" if found[2] in ("SCB", "weight_format") else found[1]), found[2]


def name_of(companion: str, weight: str) -> str:
    """What `companion_of` takes apart; of a weight itself the companion is ""."""
    stem = weight.removesuffix(".weight") if companion in ("SCB", "weight_format") else weight
    return f"{stem}.{companion}" if companion else weight


def quant_state(companions: Mapping[str, Tensor]) -> dict[str, Any]:
    """The JSON among a stored weight's companions, checked; ValueError says what is wrong with it."""
    name = next((n for n in companions if n.startswith("quant_state.")), None)
    if name is None:
        raise ValueError("has no quant_state")
    try:
        state = json.loads(bytes(companions[name].tolist()))
        kind, size = state["quant_type"], state["blocksize"]
        known = kind in CODES and size in BLOCKSIZES and isinstance(getattr(torch, state["dtype"], None), torch.dtype)
        known &= len(state["shape"]) == 2 and state.get("nested_blocksize", NESTED) == NESTED
        known &= all(type(side) is int and 0 < side < 1 << 31 for side in (size, *state["shape"]))
        known &= math.isfinite(state.get("nested_offset", 0))
    except (ValueError, RecursionError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"has a damaged quant_state ({error})") from None
    if not known:
        raise ValueError(f"is quantised in a way that is not known here: {state}")
    wanted = {"absmax", "quant_map"} | ({"nested_absmax", "nested_quant_map"} if "nested_offset" in state else set())
    if absent := wanted - companions.keys():
        raise ValueError(f"has no {', '.join(sorted(absent))}")
    if not torch.equal(companions["quant_map"].cpu(), torch.tensor(CODES[kind])):
        raise ValueError(f"has a quant_map that is not {kind}'s")
    if broken := [part for part in sorted(wanted) if not companions[part].isfinite().all()]:
        raise ValueError(f"has values that are not finite as {broken[0]}")
    return state


def quantization_config(layers: Iterable[Linear4bit | Linear8bit], skipped: list[str], dtype: str) -> dict[str, Any]:
    """config.json's entry, as transformers writes and reads it; `skipped` are the modules that are not quantised.
    ValueError for layers in four bits and in eight."""
    layers = [*layers]
    first = layers[0]
    if any(type(layer) is not type(first) for layer in layers):
        raise ValueError("holds layers in 4 bits and in 8, which no file can; quantise all parts to one type")
    if isinstance(first, Linear8bit):
        how = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "_load_in_8bit": True}
        return how | {"llm_int8_threshold": 6.0, "llm_int8_skip_modules": skipped}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": first.quant_type,
        "bnb_4bit_use_double_quant": first.nested is not None,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }
