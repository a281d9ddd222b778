"""The blocks of a decoder as one unit: joined products, a decode step in one call on a CPU and in few kernels on a GPU.

Letters: B rows of a decode step, D width, K head size.
"""

import contextlib
import mmap
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minillava.kernels.cpu import library as cpu
from minillava.kernels.cpu.step import Layer, Product, Step
from minillava.kernels.decode_attention import decode_step_attention
from minillava.kernels.decode_linear import ROWS, decode_linear, nf4_decode_linear
from minillava.layers.cache import KVCache
from minillava.layers.int8 import FewBits
from minillava.layers.linear import Linear, fuse
from minillava.layers.quantize import Linear4bit

FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}  # attribute of a module: what it joins


class Stack(nn.ModuleList):
    """Blocks that run one after another."""

    fused = False  # for inference: weights stay what they are, and `step` may be asked
    _step: Step | Literal[False] | None = None  # all of them in C; False: not possible, None: not looked into

    def fuse(self) -> None:
        """Make ready for inference, once the weights are there: products joined, what is read in large pages."""
        on_cpu = next(self.parameters()).is_cpu
        few_bits = any(isinstance(module, FewBits) for module in self.modules())
        if not (on_cpu and few_bits):  # joining gains nothing there and scatters the memory that it frees: 2 GB at 7B
            self.join()
        if on_cpu:
            to_huge_pages(self)
        self.fused, self._step = True, None

    def join(self) -> None:
        """One product for q, k and v and one for gate and up."""
        for module in list(self.modules()):
            for name in FUSED.keys() & vars(module).keys():
                fuse(module, name, FUSED[name])

    def step(self, x_BD: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache, norm: nn.Module) -> Tensor | None:
        """One token for each of the first B slots through all blocks and the norm behind them; None: block by block."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if x_BD.is_cuda:
            return norm(gpu_step(self, x_BD, rotary, cache)) if gpu_step_takes(self, x_BD, cache) else None
        few = x_BD.is_cpu and len(x_BD) <= cpu.FEW and x_BD.dtype == cache.k_LBSGK.dtype == torch.bfloat16
        if not few:
            return None
        if self._step is None:
            self._step = _step_of(self, norm)
        if not self._step:
            return None
        return self._step(x_BD.clone(), *rotary, cache.k_LBSGK, cache.v_LBSGK, cache.lengths_B[: len(x_BD)])

    def _apply(self, fn, recurse=True):
        self._step = None  # the tensors may become others
        return super()._apply(fn, recurse)


def _step_of(blocks: Stack, norm: Any) -> Step | Literal[False]:
    layers = [layer for block in blocks if (layer := _layer(block)) is not None]
    attn: Any = blocks[0].attn
    if len(layers) < len(blocks) or not Step.takes(layers, norm.weight, attn.head_dim):
        return False
    heads = [product.weight.shape[0] // attn.head_dim for product in (layers[0].q, layers[0].k)]
    return Step(layers, norm.weight, heads[0], heads[1], attn.head_dim, norm.eps)


def _layer(block: Any) -> Layer | None:
    """A block as `minillava.kernels.cpu.step` takes it; None if it is none."""
    attn, mlp = block.attn, block.mlp
    if not hasattr(mlp, "gate_up"):  # experts
        return None
    norms = [getattr(norm, "weight", None) for norm in (block.attn_norm, attn.q_norm, attn.k_norm, block.mlp_norm)]
    parts = [
        dict(fused.parts()) if fused else vars(module)["_modules"]
        for module, fused in ((attn, attn.qkv), (mlp, mlp.gate_up))
    ]
    linears = [parts[0][name] for name in "qkv"], [attn.out], [parts[1][name] for name in ("gate", "up")], [mlp.down]
    ours: list[Any] = [linear for some in linears for linear in some if isinstance(linear, Linear | FewBits)]
    return Layer(*norms, *(Product(linear.for_cpu(), linear.bias) for linear in ours)) if len(ours) == 7 else None


def to_huge_pages(module: nn.Module) -> None:
    """Move what `module` holds end to end into memory of large pages, where the system has them (Linux): reading
    gigabytes then waits less for addresses to be translated (bench/LOG.md). One tensor at a time is held twice."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    owners = [(m, name) for m in module.modules() for name in (*m._parameters, *m._buffers)]
    found = [(m, name) for m, name in owners if getattr(m, name) is not None]
    room, page = sum(-(-getattr(*owner).nbytes // 64) * 64 for owner in found), 1 << 21
    memory = mmap.mmap(-1, room + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    at = -whole.data_ptr() % page
    for m, name in found:
        tensor = getattr(m, name).detach()
        copy = whole[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        at += -(-tensor.nbytes // 64) * 64
        if name in m._buffers:
            m._buffers[name] = copy
        else:
            getattr(m, name).data = copy


# ---- a decode step on a GPU ----


def gpu_step_takes(blocks: nn.ModuleList, x_BD: Tensor, cache: KVCache) -> bool:
    """Whether `gpu_step` runs these: few rows; joined products, plain or in four bits, no experts, no adapters."""
    first: Any = blocks[0]
    same = x_BD.dtype == cache.k_LBSGK.dtype == first.attn_norm.weight.dtype
    return same and len(x_BD) <= ROWS and all(map(_joined, blocks))


def gpu_step(blocks: nn.ModuleList, x_BD: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache) -> Tensor:
    """One token for each of the first B slots through all blocks, by five kernels a block: what is around a product
    rides along with it (kernels.decode_linear), rotary embedding and the write to the cache with attention
    (kernels.decode_attention), which may take a second kernel. Nothing asks the host, so it is one CUDA graph."""
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
