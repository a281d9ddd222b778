"""A decode step on a GPU, five kernels a layer: what is around a product rides along with it (kernels.decode_linear),
rotary embedding and the write to the cache with attention (kernels.decode_attention), which may take a second kernel.

Nothing asks the host, so the step is one CUDA graph. Letters: B rows, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from minillava.kernels.decode_attention import decode_step_attention
from minillava.kernels.decode_linear import ROWS, decode_linear, nf4_decode_linear
from minillava.layers.cache import KVCache
from minillava.layers.linear import Linear
from minillava.layers.quantize import Linear4bit


def takes(blocks: nn.ModuleList, x_BD: Tensor, cache: KVCache) -> bool:
    """Whether `step` runs these: few rows; joined products, plain or in four bits, no experts, no adapters."""
    first: Any = blocks[0]
    same = x_BD.dtype == cache.k_LBSGK.dtype == first.attn_norm.weight.dtype
    return same and len(x_BD) <= ROWS and all(map(_joined, blocks))


def step(blocks: nn.ModuleList, x_BD: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache) -> Tensor:
    """One token for each of the first B slots through all blocks."""
    rows = slice(0, len(x_BD))
    block: Any
    for layer, block in enumerate(blocks):
        qkv, out, gate_up, down = _products(block)
        q_norm, k_norm = (getattr(norm, "weight", None) for norm in (block.attn.q_norm, block.attn.k_norm))
        qkv_BN = _multiply(qkv, x_BD, block.attn_norm)
        caches = cache.k_LBSGK[layer, rows], cache.v_LBSGK[layer, rows], cache.lengths_B[rows]
        seen_BD = decode_step_attention(qkv_BN, rotary, *caches, q_norm, k_norm, block.attn_norm.eps)
        x_BD = _multiply(out, seen_BD, residual=x_BD)
        x_BD = _multiply(down, _multiply(gate_up, x_BD, block.mlp_norm, gated=True), residual=x_BD)
    return x_BD


def _joined(block: Any) -> bool:
    """Whether the block has four linear layers, each of a kind that has a kernel."""
    joined = block.attn.qkv is not None and getattr(block.mlp, "gate_up", None) is not None
    return joined and all(type(layer) in (Linear, Linear4bit) for layer in _products(block))


def _products(block: Any) -> tuple[Any, Any, Any, Any]:
    return block.attn.qkv.product, block.attn.out, block.mlp.gate_up.product, block.mlp.down


def _multiply(layer: Any, x_BD: Tensor, norm: Any = None, gated: bool = False, residual: Tensor | None = None):
    """A linear layer with what is around it."""
    around = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    bias = None if layer.bias is None else layer.bias.to(x_BD.dtype)
    if isinstance(layer, Linear):
        return decode_linear(x_BD, layer.weight, bias, *around, gated, residual)
    weight = layer.weight, layer.absmax, layer.nested, layer.dynamic
    kind = layer.out_features, layer.quant_type, layer.blocksize
    return nf4_decode_linear(x_BD, *weight, bias, *kind, *around, gated, residual)
