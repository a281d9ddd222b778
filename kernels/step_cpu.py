"""A decode step on CPUs: all layers for a few rows in one call of step_cpu.c, which has no Python between products.

Letters: B rows (one new token each), D width, H heads, G key/value heads, K head size, N outputs, I inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillava.kernels import cpu

_pointer, _long = ctypes.c_void_p, ctypes.c_long


@dataclass(frozen=True)
class Product:
    """A linear layer [N, I]: its weight in bf16, or `codes` as `minillava.kernels.nf4_matmul` has them: packed, absmax,
    nested, dynamic, the 16 values, block size."""

    shape: tuple[int, int]
    bias: Tensor | None = None
    weight: Tensor | None = None
    codes: tuple | None = None


@dataclass(frozen=True)
class Layer:
    """What a decoder's layer holds: norms in bf16, those of heads or none, and its four products."""

    attn_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    mlp_norm: Tensor
    qkv: Product
    out: Product
    gate_up: Product
    down: Product


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("attn_norm", "q_norm", "k_norm", "mlp_norm")),
        *((name, cpu.Matrix) for name in ("qkv", "out", "gate_up", "down")),
    ]


class _Decoder(ctypes.Structure):
    _fields_ = [
        *((name, _long) for name in "LDHGK"),
        ("eps", ctypes.c_float),
        ("norm", _pointer),
        ("layers", ctypes.POINTER(_Layer)),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [("k", _pointer), ("v", _pointer), ("slots", _long), ("capacity", _long)]


def _address(part: Tensor | Product | None) -> cpu.Matrix | int | None:
    if not isinstance(part, Product):
        return None if part is None else part.data_ptr()
    return cpu.Matrix.of(part.shape, part.bias, part.weight, part.codes)


class Step:
    """The layers of a decoder and the norm [D] behind them, for `__call__`."""

    def __init__(self, layers: Sequence[Layer], norm: Tensor, heads: int, kv_heads: int, head_dim: int, eps: float):
        self.tensors = layers, norm  # they live as long as their addresses are used
        table = (_Layer * len(layers))(*(_Layer(*map(_address, vars(layer).values())) for layer in layers))
        sizes = len(layers), len(norm), heads, kv_heads, head_dim
        self.decoder = _Decoder(*sizes, eps, norm.data_ptr(), table)

    @staticmethod
    def takes(layers: Sequence[Layer], norm: Tensor, head_dim: int) -> bool:
        """Whether this CPU and these layers can be computed so: bf16 (or 4-bit) weights and sizes in whole 32s."""
        code = cpu.library()
        if code is None or not code.can & cpu.PRODUCTS or head_dim % 32:
            return False
        parts = [part for layer in layers for part in vars(layer).values() if part is not None]
        products = [part for part in parts if isinstance(part, Product)]
        halves = [part for part in parts if isinstance(part, Tensor)] + [norm]
        halves += [t for p in products for t in (p.bias, p.weight) if t is not None]
        codes = [t for p in products for t in (p.codes or ())[:-1] if t is not None]
        return (
            all(t.dtype == torch.bfloat16 for t in halves)
            and all(t.is_cpu and t.is_contiguous() for t in halves + codes)
            and not any(size % 32 for p in products for size in p.shape)
            and not any(p.codes and p.shape[1] % min(p.codes[-1], 128) for p in products)
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
        cpu.library().decoder_step(  # type: ignore[union-attr]
            ctypes.addressof(self.decoder), ctypes.addressof(cache), x_BD.data_ptr(), cos_BK.data_ptr(),
            sin_BK.data_ptr(), lengths_B.data_ptr(), len(x_BD), torch.get_num_threads(),
        )  # fmt: skip
        return x_BD
