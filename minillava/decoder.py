"""The decoder: LLaMA (arXiv 2302.13971, 2307.09288) and what Mistral, Qwen2 and Qwen3 changed.

It works on packed rows: the tokens of all sequences lie end to end in one [T, D] matrix, `cu_seqlens` holds the
boundaries, positions restart at each, and attention never crosses one. There is no padding and no mask.

Letters: T tokens, B sequences (cache rows), D width, H heads, G key/value heads, K head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minillava.cache import KVCache
from minillava.config import DecoderConfig
from minillava.kernels import cpu, step_cpu
from minillava.kernels.attention import attention
from minillava.kernels.nf4_dequantize import code
from minillava.kernels.rms_norm import rms_norm
from minillava.kernels.swiglu import swiglu
from minillava.quantize import Linear4bit, cat_rows


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


class RMSNorm(nn.Module):
    """x / rms(x) in float32, back to x's dtype, and only then times the weight (the order matters in bf16)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def frequencies(config: DecoderConfig, device: torch.device) -> Tensor:
    """Radians a position [K/2] of the rotary embedding, in float32 (arXiv 2104.09864), stretched by `rope_scaling`.

    Linear (arXiv 2306.15595) divides all by `factor`. Llama 3.1 leaves those that turn more often than
    `high_freq_factor` in the old context, divides those below `low_freq_factor`, and blends what is between.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    radians, scaling = 1 / config.rope_theta**exponents, config.rope_scaling
    if scaling is None:
        return radians
    if scaling.kind == "linear":
        return radians / scaling.factor
    turns = scaling.original_positions * radians / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * radians / scaling.factor + keep * radians


def rotary_tables(positions_T: Tensor, config: DecoderConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, K] of the rotary embedding, angles computed in float32."""
    return cos_sin(torch.outer(positions_T.float(), frequencies(config, positions_T.device)), dtype)


def cos_sin(angles_TF: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `rotate` takes, [T, 1, K] for K/2 angles a token. The first half of sin is negated."""
    cos, sin = angles_TF[:, None].cos(), angles_TF[:, None].sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x_THK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention: pairs are (i, i + K/2)."""
    return torch.addcmul(x_THK * cos_T1K, x_THK.roll(x_THK.shape[-1] // 2, -1), sin_T1K)


FEW = 64  # rows up to which a CPU reads bf16 weights fastest as weight @ x^T (bench/LOG.md)


def linear(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x weight^T + bias. For few bf16 rows on a CPU the weights are read once, by the product that reads them fastest:
    our own up to four rows, else torch.mv for one, weight @ x^T for several (31, 27 and 29 GB/s where F.linear reaches
    22 on two cores)."""
    bf16 = not torch.is_grad_enabled() and x_TD.is_cpu and x_TD.dtype == weight_OD.dtype == torch.bfloat16
    if not (bf16 and x_TD.ndim == 2 and 0 < len(x_TD) <= FEW):
        return F.linear(x_TD, weight_OD, bias_O)
    if not torch.compiler.is_compiling() and (y_TO := cpu.few_rows(x_TD, weight_OD, bias_O)) is not None:
        return y_TO
    y_TO = torch.mv(weight_OD, x_TD[0])[None] if len(x_TD) == 1 else torch.mm(weight_OD, x_TD.T).T
    return y_TO if bias_O is None else y_TO + bias_O


class Linear(nn.Linear):
    def forward(self, x_TD: Tensor) -> Tensor:
        return linear(x_TD, self.weight, self.bias)

    @classmethod
    def holding(cls, weight_OD: Tensor, bias_O: Tensor | None) -> Linear:
        """A layer around tensors that are there."""
        with Unallocated():
            layer = cls(1, 1, bias_O is not None)
        layer.out_features, layer.in_features = weight_OD.shape
        layer.weight = nn.Parameter(weight_OD.detach())
        layer.register_parameter("bias", None if bias_O is None else nn.Parameter(bias_O.detach()))
        return layer

    def rows(self, start: int, stop: int) -> Linear:
        """The layer of outputs start to stop, of the same memory."""
        return Linear.holding(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])


class Fused(nn.Module):
    """Linear layers of one input as one product, for inference. The state dict still shows them one by one."""

    def __init__(self, names: Sequence[str], parts: Sequence[Any]):
        super().__init__()
        self.names, self.sizes = names, [part.out_features for part in parts]
        if all(isinstance(part, Linear4bit) for part in parts):
            self.product: Linear | Linear4bit = cat_rows(parts)
            return
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        weight_OD = torch.cat([part.weight.detach() for part in parts])
        self.product = Linear.holding(weight_OD, torch.cat(biases) if biases else None)

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


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        D, K, bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.q = Linear(D, config.num_heads * K, bias=bias)
        self.k = Linear(D, config.num_kv_heads * K, bias=bias)
        self.v = Linear(D, config.num_kv_heads * K, bias=bias)
        self.qkv: Fused | None = None  # the three as one, after Decoder.fuse
        self.out = Linear(config.num_heads * K, D, bias=False)
        self.q_norm = RMSNorm(K, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(K, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x_TD: Tensor,
        rotary: tuple[Tensor, Tensor],
        cu_seqlens: Sequence[int] | None,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        """What each token saw, [T, H * K], before the output product."""
        q, k, v = self.before(x_TD, rotary)
        if cache is not None:
            o_THK = cache.attend(layer, q, k, v, cu_seqlens)
        else:
            assert cu_seqlens is not None
            o_THK = attention(q, k, v, cu_seqlens, causal=True)
        return o_THK.flatten(1)

    def before(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, K], keys and values [T, G, K]."""
        qkv = self.qkv(x_TD) if self.qkv else (self.q(x_TD), self.k(x_TD), self.v(x_TD))
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in qkv)
        return rotate(self.q_norm(q), *rotary), rotate(self.k_norm(k), *rotary), v


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.gate_up: Fused | None = None
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_up = self.gate_up(x_TD) if self.gate_up else (self.gate(x_TD), self.up(x_TD))
        return self.down(swiglu(*gate_up))


class Experts(nn.Module):
    """Many small MLPs, of which each token takes the likeliest R, weighted (Qwen3-MoE, arXiv 2505.09388).

    The weights of E experts lie in one matrix each, so that on a GPU one grouped product serves all of them.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.per_token, self.normalise = config.experts_per_token, config.norm_expert_weights
        E, I, D = config.num_experts, config.expert_size, config.hidden_size
        self.router = nn.Linear(D, E, bias=False)
        self.gate = nn.Parameter(torch.empty(E, I, D))
        self.up = nn.Parameter(torch.empty(E, I, D))
        self.down = nn.Parameter(torch.empty(E, D, I))

    def forward(self, x_TD: Tensor) -> Tensor:
        share_TR, expert_TR = self.router(x_TD).softmax(-1, dtype=torch.float32).topk(self.per_token)
        if self.normalise:
            share_TR = share_TR / share_TR.sum(-1, keepdim=True)
        # S = T * R turns of a token at an expert, sorted by expert: those of expert e end at ends_E[e].
        expert_S, order_S = expert_TR.flatten().sort()
        number_E = torch.arange(len(self.gate), device=x_TD.device)
        ends_E = torch.searchsorted(expert_S, number_E, right=True, out_int32=True)
        x_SD = x_TD[order_S // self.per_token]
        y_SD = _grouped(swiglu(_grouped(x_SD, self.gate, ends_E), _grouped(x_SD, self.up, ends_E)), self.down, ends_E)
        y_TRD = y_SD[order_S.argsort()].unflatten(0, expert_TR.shape)
        return (y_TRD * share_TR.to(x_TD.dtype)[:, :, None]).sum(1)


def _grouped(x_SD: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> Tensor:
    """Rows up to ends_E[0] through the first matrix, those up to ends_E[1] through the second, ...: [S, O]."""
    if x_SD.is_cuda and x_SD.dtype == torch.bfloat16:  # asks nothing of the host
        return F.grouped_mm(x_SD, weight_EOD.transpose(1, 2), offs=ends_E)
    parts = x_SD.tensor_split(ends_E[:-1].tolist())
    return torch.cat([F.linear(part, weight_OD) for part, weight_OD in zip(parts, weight_EOD)])


class Block(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = Experts(config) if config.num_experts else MLP(config)

    def forward(self, x_TD: Tensor, keep_S: Tensor | None, *context) -> Tensor:
        return self.after(x_TD, self.attn(self.attn_norm(x_TD), *context), keep_S)

    def after(self, x_TD: Tensor, seen_TD: Tensor, keep_S: Tensor | None) -> Tensor:
        """The block behind its attention, at positions `keep_S` or at all."""
        if keep_S is not None:
            x_TD, seen_TD = x_TD.index_select(0, keep_S), seen_TD.index_select(0, keep_S)
        x_TD = x_TD + self.attn.out(seen_TD)
        return x_TD + self.mlp(self.mlp_norm(x_TD))


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._step: step_cpu.Step | Literal[False] | None = None  # None: not looked into

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; the embedding matrix itself where the two are tied."""
        if self.config.tie_embeddings:
            return self.embed.weight
        return self.head.dequantize() if isinstance(self.head, Linear4bit) else self.head.weight

    def forward(
        self,
        x_TD: Tensor,
        cu_seqlens: Sequence[int] | None,
        cache: KVCache | None = None,
        keep_S: Tensor | None = None,
        slots: Sequence[int] | None = None,
    ) -> Tensor:
        """Embeddings [T, D] of B packed sequences -> hidden states [T, D] after the last norm.

        With a cache, sequence b continues slot `slots[b]` of it (b if None); `cu_seqlens` None is a decode step: one
        token for each of the first T slots. With `keep_S` only those positions come out, [S, D], and the last block
        works on no other behind its attention.
        """
        if cache is not None:
            positions_T = cache.begin(len(x_TD), cu_seqlens, slots)
        else:
            assert cu_seqlens is not None
            spans = pairwise(cu_seqlens)
            positions_T = torch.cat([torch.arange(end - start) for start, end in spans]).to(x_TD.device)
        rotary = rotary_tables(positions_T, self.config, x_TD.dtype)
        if cache is not None and cu_seqlens is None and (step := self._step_for(x_TD, cache)):
            x_TD = step(x_TD.clone(), *rotary, cache.k_LBSGK, cache.v_LBSGK, positions_T)
            cache.advance()
            return x_TD
        for layer, block in enumerate(self.blocks):
            last = layer == len(self.blocks) - 1
            x_TD = block(x_TD, keep_S if last else None, rotary, cu_seqlens, cache, layer)
        if cache is not None:
            cache.advance()
        return self.norm(x_TD)

    def logits(self, x_TD: Tensor) -> Tensor:
        quantized = not self.config.tie_embeddings and isinstance(self.head, Linear4bit)
        return self.head(x_TD) if quantized else linear(x_TD, self.head_weight)

    def _step_for(self, x_BD: Tensor, cache: KVCache) -> step_cpu.Step | Literal[False]:
        """All layers as one call, where this CPU, these weights and so many rows allow it."""
        few = x_BD.is_cpu and len(x_BD) <= cpu.FEW and x_BD.dtype == cache.k_LBSGK.dtype == torch.bfloat16
        if not few or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if self._step is None:
            layers = [_layer(block) for block in self.blocks]
            whole = [layer for layer in layers if layer is not None]
            c, norm, self._step = self.config, self.norm.weight, False
            if len(whole) == len(layers) and step_cpu.Step.takes(whole, norm, c.head_dim):
                self._step = step_cpu.Step(whole, norm, c.num_heads, c.num_kv_heads, c.head_dim, c.norm_eps)
        return self._step

    def _apply(self, fn, recurse=True):
        self._step = None  # the tensors may become others
        return super()._apply(fn, recurse)

    def fuse(self) -> None:
        """One product for q, k and v and one for gate and up: for inference, once the weights are there."""
        for module in list(self.modules()):
            if isinstance(module, Attention):
                fuse(module, "qkv", ("q", "k", "v"))
            elif isinstance(module, MLP):
                fuse(module, "gate_up", ("gate", "up"))
        if self.embed.weight.is_cpu:
            cpu.to_huge_pages(self.blocks)
        self._step = None


def _layer(block: Any) -> step_cpu.Layer | None:
    """A fused block as `minillava.kernels.step_cpu` takes it; None if it is none."""
    attn, mlp = block.attn, block.mlp
    if not isinstance(mlp, MLP) or attn.qkv is None or mlp.gate_up is None:
        return None
    norms = [getattr(norm, "weight", None) for norm in (block.attn_norm, attn.q_norm, attn.k_norm, block.mlp_norm)]
    products = [_product(linear) for linear in (attn.qkv.product, attn.out, mlp.gate_up.product, mlp.down)]
    return step_cpu.Layer(*norms, *products) if all(products) else None


def _product(linear: Any) -> step_cpu.Product | None:
    if type(linear) not in (Linear, Linear4bit):
        return None
    shape = linear.out_features, linear.in_features
    if isinstance(linear, Linear):
        return step_cpu.Product(shape, linear.bias, linear.weight)
    codes = linear.weight, linear.absmax, linear.nested, linear.dynamic, code(linear.quant_type, linear.weight.device)
    return step_cpu.Product(shape, linear.bias, codes=(*codes, linear.blocksize))
