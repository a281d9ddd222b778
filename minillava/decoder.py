"""The decoder: LLaMA (arXiv 2302.13971, 2307.09288) and what Mistral, Qwen2 and Qwen3 changed.

It works on packed rows: the tokens of all sequences lie end to end in one [T, D] matrix, `cu_seqlens` holds the
boundaries, positions restart at each, and attention never crosses one. There is no padding and no mask.

Letters: T tokens, B sequences (cache rows), D width, H heads, G key/value heads, K head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from minillava.config import DecoderConfig
from minillava.kernels.attention import attention
from minillava.kernels.cpu.product import linear
from minillava.kernels.rms_norm import rms_norm
from minillava.kernels.swiglu import swiglu
from minillava.layers.cache import KVCache
from minillava.layers.linear import Fused, Linear, dense_weight, grouped_linear
from minillava.layers.rotary import angles, cos_sin, rotate
from minillava.layers.stack import Stack

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [T, H, K], k and v [T, G, K] -> [T, H, K]


class RMSNorm(nn.Module):
    """x / rms(x) in float32, back to x's dtype, and only then times the weight (the order matters in bf16)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; each key/value head serves H / G queries (arXiv 2305.13245)."""

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

    def forward(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """What each token saw, [T, H * K], before the output product."""
        return attend(*self.before(x_TD, rotary)).flatten(1)

    def before(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, K], keys and values [T, G, K]; training compiles it, and `after`, by name."""
        qkv = self.qkv(x_TD) if self.qkv else (self.q(x_TD), self.k(x_TD), self.v(x_TD))
        q_THK, k_TGK, v_TGK = (x.unflatten(-1, (-1, self.head_dim)) for x in qkv)
        return rotate(self.q_norm(q_THK), *rotary), rotate(self.k_norm(k_TGK), *rotary), v_TGK


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
        self.router = Linear(D, E, bias=False)
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
        gate_SI, up_SI = (grouped_linear(x_SD, weight_EID, ends_E) for weight_EID in (self.gate, self.up))
        y_SD = grouped_linear(swiglu(gate_SI, up_SI), self.down, ends_E)
        y_TRD = y_SD[order_S.argsort()].unflatten(0, expert_TR.shape)
        return (y_TRD * share_TR.to(x_TD.dtype)[:, :, None]).sum(1)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = Experts(config) if config.num_experts else MLP(config)

    def forward(
        self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, keep_S: Tensor | None = None
    ) -> Tensor:
        """[T, D] -> [T, D], or [S, D] at positions `keep_S`."""
        return self.after(x_TD, self.attn(self.attn_norm(x_TD), rotary, attend), keep_S)

    def after(self, x_TD: Tensor, seen_TD: Tensor, keep_S: Tensor | None) -> Tensor:
        """The block behind its attention."""
        if keep_S is not None:
            x_TD, seen_TD = x_TD.index_select(0, keep_S), seen_TD.index_select(0, keep_S)
        x_TD = x_TD + self.attn.out(seen_TD)
        return x_TD + self.mlp(self.mlp_norm(x_TD))


class Decoder(nn.Module):
    """Embedding, blocks, norm and head; `forward` is what lies between embedding and head."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = Stack(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tie_embeddings:
            self.head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; the embedding matrix itself where the two are tied."""
        return self.embed.weight if self.config.tie_embeddings else dense_weight(self.head)

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
        if cache is None:
            assert cu_seqlens is not None
            lengths = [end - start for start, end in pairwise(cu_seqlens)]
            positions_T = torch.cat([torch.arange(length) for length in lengths]).to(x_TD.device)
        else:
            positions_T = cache.begin(len(x_TD), cu_seqlens, slots)
        rotary = cos_sin(angles(positions_T, self.config), x_TD.dtype)

        # A decode step reads weights and little else; some devices go through all blocks in one call, once fused.
        if self.blocks.fused and cache is not None and cu_seqlens is None:
            hidden_TD = self.blocks.step(x_TD, rotary, cache, self.norm)
            if hidden_TD is not None:
                cache.advance()
                return hidden_TD

        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            if cache is None:
                attend: Attend = partial(attention, cu_seqlens=cu_seqlens, causal=True)
            else:
                attend = partial(cache.attend, layer, cu_seqlens=cu_seqlens)
            x_TD = block(x_TD, rotary, attend, keep_S if layer == last else None)
        if cache is not None:
            cache.advance()
        return self.norm(x_TD)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Hidden states [T, D] -> [T, V]."""
        return linear(x_TD, self.embed.weight) if self.config.tie_embeddings else self.head(x_TD)

    def fuse(self) -> None:
        """Join products of one input, for inference, once the weights are there."""
        self.blocks.fuse()
