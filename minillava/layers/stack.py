"""The blocks of a decoder as one unit: joined products for inference, a decode step in one call where a CPU can and in
few kernels on a GPU.

Letters: B rows of a decode step, D width, K head size.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minillava.kernels.cpu import library as cpu
from minillava.kernels.cpu.step import Layer, Product, Step
from minillava.layers import decode
from minillava.layers.cache import KVCache
from minillava.layers.int8 import FewBits
from minillava.layers.linear import Linear, fuse

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
            return norm(decode.step(self, x_BD, rotary, cache)) if decode.takes(self, x_BD, cache) else None
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
