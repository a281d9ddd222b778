"""A decode step on CPUs: all layers for a few rows in one call of step.c, which has no Python between products.

Letters: B rows (one new token each), D width, H heads, G key/value heads, K head size, N outputs, I inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from minillava.kernels.cpu import library as cpu
from minillava.kernels.cpu.product import Matrix, Weight

_pointer, _long = ctypes.c_void_p, ctypes.c_long


class Product(NamedTuple):
    """A linear layer, its bias in bf16."""

    weight: Weight
    bias: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """What a decoder's layer holds: norms in bf16, those of heads or none, and its products."""

    attn_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    mlp_norm: Tensor
    q: Product
    k: Product
    v: Product
    out: Product
    gate: Product
    up: Product
    down: Product


class _Layer(ctypes.Structure):
    _fields_ = [(field.name, Matrix if field.type == "Product" else _pointer) for field in fields(Layer)]


class _Decoder(ctypes.Structure):
    _fields_ = [
        *((name, _long) for name in "LDHGK"),
        ("eps", ctypes.c_float),
        ("norm", _pointer),
        ("layers", ctypes.POINTER(_Layer)),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [("k", _pointer), ("v", _pointer), ("slots", _long), ("capacity", _long)]


def _address(part: Tensor | Product | None) -> Matrix | int | None:
    if isinstance(part, Product):
        return part.weight.matrix(part.bias)
    return None if part is None else part.data_ptr()


class Step:
    """The layers of a decoder and the norm [D] behind them, for `__call__`."""

    def __init__(self, layers: Sequence[Layer], norm: Tensor, heads: int, kv_heads: int, head_dim: int, eps: float):
        self.tensors = layers, norm  # they live as long as their addresses are used
        table = (_Layer * len(layers))(*(_Layer(*map(_address, vars(layer).values())) for layer in layers))
        sizes = len(layers), len(norm), heads, kv_heads, head_dim
        self.decoder = _Decoder(*sizes, eps, norm.data_ptr(), table)

    @staticmethod
    def takes(layers: Sequence[Layer], norm: Tensor, head_dim: int) -> bool:
        """Whether this CPU and these layers can be computed so: bf16 or fewer bits, sizes in whole 32s."""
        if cpu.library() is None or head_dim % 32:
            return False
        parts = [part for layer in layers for part in vars(layer).values() if part is not None]
        products = [part for part in parts if isinstance(part, Product)]
        halves = [norm, *(p for p in parts if isinstance(p, Tensor)), *(p.bias for p in products if p.bias is not None)]
        return all(t.dtype == torch.bfloat16 and t.is_cpu and t.is_contiguous() for t in halves) and all(
            p.weight.fits() and not any(size % 32 for size in p.weight.shape) for p in products
        )

    def __reduce__(self):
        return type(None), ()  # addresses are of one process and one model: a copy looks for its own

    def __call__(self, x_BD: Tensor, cos_BK: Tensor, sin_BK: Tensor, k: Tensor, v: Tensor, lengths_B: Tensor) -> Tensor:
        """What leaves the norm, in x_BD's place. `k` and `v` [layers, slots, capacity, G, K] hold `lengths_B`
        tokens of each row, which is a slot's, and get one more; cos and sin are those of its position."""
        if int(lengths_B.max()) >= k.shape[2]:
            raise IndexError(f"the cache has room for {k.shape[2]} tokens and holds {lengths_B.tolist()}")
        assert len(x_BD) <= cpu.FEW and x_BD.dtype == k.dtype == cos_BK.dtype == torch.bfloat16
        cache = _Cache(k.data_ptr(), v.data_ptr(), k.shape[1], k.shape[2])
        cpu.library().decoder_step(
            ctypes.addressof(self.decoder), ctypes.addressof(cache), x_BD.data_ptr(), cos_BK.data_ptr(),
            sin_BK.data_ptr(), lengths_B.data_ptr(), len(x_BD), torch.get_num_threads(),
        )  # fmt: skip
        return x_BD
