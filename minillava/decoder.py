"""The decoder: LLaMA (arXiv 2302.13971, 2307.09288) and what Mistral, Qwen2 and Qwen3 changed, and its cache.

It works on packed rows: the tokens of all sequences lie end to end in one [T, D] matrix, `cu_seqlens` holds the
boundaries, positions restart at each, and attention never crosses one. There is no padding and no mask.

Letters: T tokens, B sequences (cache rows), D width, H heads, G key/value heads, K head size, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.config import DecoderConfig
from minillava.kernels.attention import attention
from minillava.kernels.rms_norm import rms_norm
from minillava.kernels.swiglu import swiglu


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
    angles_TK = torch.outer(positions_T.float(), frequencies(config, positions_T.device)).repeat(1, 2)
    return angles_TK.cos().to(dtype)[:, None], angles_TK.sin().to(dtype)[:, None]


def rotate(x_THK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention: pairs are (i, i + K/2)."""
    a, b = x_THK.chunk(2, dim=-1)
    return x_THK * cos_T1K + torch.cat((-b, a), dim=-1) * sin_T1K


class KVCache:
    """Keys and values of `rows` sequences with room for `capacity` tokens each, allocated once.

    `lengths[b]` is how many tokens row b holds; it lives on the host, so no step has to ask the device. A pass over
    the decoder is `begin`, then `attend` once a layer, then `advance`.
    """

    def __init__(self, config: DecoderConfig, rows: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_layers, rows, config.num_kv_heads, capacity, config.head_dim)
        self.k_LBGSK = torch.zeros(shape, device=device, dtype=dtype)  # zeros: what a mask hides must still be finite
        self.v_LBGSK = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * rows

    @property
    def capacity(self) -> int:
        return self.k_LBGSK.shape[3]

    def begin(self, cu_seqlens: Sequence[int]) -> Tensor:
        """Positions [T] of the new tokens. What all layers share, where to write and what to hide, is settled here."""
        new = [end - start for start, end in pairwise(cu_seqlens)]
        longest = max(at + n for at, n in zip(self.lengths, new))
        if len(new) != len(self.lengths) or longest > self.capacity:
            raise ValueError(f"{new} new tokens do not fit rows that hold {self.lengths} of {self.capacity}")
        device = self.k_LBGSK.device
        self._decoding = set(new) == {1} and any(self.lengths)
        if not self._decoding:
            return torch.cat([torch.arange(at, at + n) for at, n in zip(self.lengths, new)]).to(device)
        positions_B = torch.tensor(self.lengths, device=device)
        self._at = self.lengths[0] if min(self.lengths) == max(self.lengths) else None
        if self._at is None:
            self._rows_B = torch.arange(len(new), device=device)
            self._positions_B = positions_B
            hidden_BS = torch.arange(longest, device=device) > positions_B[:, None]
            mask_BS = torch.zeros_like(hidden_BS, dtype=self.k_LBGSK.dtype).masked_fill(hidden_BS, float("-inf"))
            self._mask_B11S = mask_BS[:, None, None]
        return positions_B

    def attend(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
        """Append the new keys and values to their rows; attention of each query over all that its row now holds."""
        if self._decoding:
            return self._attend_one(layer, q_THK, k_TGK, v_TGK)
        for row, (start, end) in enumerate(pairwise(cu_seqlens)):
            at, n = self.lengths[row], end - start
            self.k_LBGSK[layer, row, :, at : at + n] = k_TGK[start:end].transpose(0, 1)
            self.v_LBGSK[layer, row, :, at : at + n] = v_TGK[start:end].transpose(0, 1)
        if not any(self.lengths):
            return attention(q_THK, k_TGK, v_TGK, cu_seqlens, causal=True)
        out = []
        for row, (start, end) in enumerate(pairwise(cu_seqlens)):
            before, n = self.lengths[row], end - start
            q = q_THK[start:end].transpose(0, 1)[None]
            k, v = (x[layer, row, :, : before + n][None] for x in (self.k_LBGSK, self.v_LBGSK))
            # Query i sees the `before` old tokens and the new ones up to itself.
            mask = torch.ones(n, before + n, dtype=torch.bool, device=q.device).tril(before)
            grouped = q.shape[1] != k.shape[1]
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)[0].transpose(0, 1))
        return torch.cat(out)

    def _attend_one(self, layer: int, q_BHK: Tensor, k_BGK: Tensor, v_BGK: Tensor) -> Tensor:
        """One new token a row. The query heads that share a key/value head go through as queries of that head, so no
        key is repeated; on a CPU that is 2.4 times as fast as SDPA's own grouping (8 heads a group, 700 tokens)."""
        k_BGSK, v_BGSK = self.k_LBGSK[layer], self.v_LBGSK[layer]
        if self._at is None:
            k_BGSK[self._rows_B, :, self._positions_B] = k_BGK
            v_BGSK[self._rows_B, :, self._positions_B] = v_BGK
            mask, end = self._mask_B11S, self._mask_B11S.shape[-1]
        else:
            k_BGSK[:, :, self._at] = k_BGK
            v_BGSK[:, :, self._at] = v_BGK
            mask, end = None, self._at + 1
        q_BGRK = q_BHK.unflatten(1, (k_BGK.shape[1], -1))  # R = H / G query heads a group
        o_BGRK = F.scaled_dot_product_attention(q_BGRK, k_BGSK[:, :, :end], v_BGSK[:, :, :end], attn_mask=mask)
        return o_BGRK.flatten(1, 2)

    def advance(self, cu_seqlens: Sequence[int]) -> None:
        for row, (start, end) in enumerate(pairwise(cu_seqlens)):
            self.lengths[row] += end - start

    def drop(self, done: list[bool]) -> list[int]:
        """Drop the rows that are done; returns which row each of those left was. Rows from the end move into the gaps,
        so that the rest stays one block and little is copied."""
        left = done.count(False)
        movers = [row for row in range(left, len(done)) if not done[row]]
        order = [movers.pop() if done[row] else row for row in range(left)]
        for to, row in enumerate(order):
            if to != row:
                n = self.lengths[row]
                self.k_LBGSK[:, to, :, :n] = self.k_LBGSK[:, row, :, :n]
                self.v_LBGSK[:, to, :, :n] = self.v_LBGSK[:, row, :, :n]
        self.lengths = [self.lengths[row] for row in order]
        self.k_LBGSK, self.v_LBGSK = self.k_LBGSK[:, :left], self.v_LBGSK[:, :left]
        return order

    def resized(self, capacity: int, length: int) -> KVCache:
        """A new cache of one row with another capacity that holds the first `length` tokens of this one's first row."""
        cache = copy.copy(self)
        cache.k_LBGSK = F.pad(self.k_LBGSK[:, :1, :, :length], (0, 0, 0, capacity - length))
        cache.v_LBGSK = F.pad(self.v_LBGSK[:, :1, :, :length], (0, 0, 0, capacity - length))
        cache.lengths = [length]
        return cache


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        D, K, bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.q = nn.Linear(D, config.num_heads * K, bias=bias)
        self.k = nn.Linear(D, config.num_kv_heads * K, bias=bias)
        self.v = nn.Linear(D, config.num_kv_heads * K, bias=bias)
        self.out = nn.Linear(config.num_heads * K, D, bias=False)
        self.q_norm = RMSNorm(K, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(K, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], cu_seqlens: Sequence[int], cache: KVCache | None, layer: int
    ) -> Tensor:
        """What each token saw, [T, H * K], before the output product."""
        q, k, v = (proj(x_TD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q, self.k, self.v))
        q, k = rotate(self.q_norm(q), *rotary), rotate(self.k_norm(k), *rotary)
        if cache is None:
            o_THK = attention(q, k, v, cu_seqlens, causal=True)
        else:
            o_THK = cache.attend(layer, q, k, v, cu_seqlens)
        return o_THK.flatten(1)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(swiglu(self.gate(x_TD), self.up(x_TD)))


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
        seen_TD = self.attn(self.attn_norm(x_TD), *context)
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

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; the embedding matrix itself where the two are tied."""
        return self.embed.weight if self.config.tie_embeddings else self.head.weight

    def forward(
        self, x_TD: Tensor, cu_seqlens: Sequence[int], cache: KVCache | None = None, keep_S: Tensor | None = None
    ) -> Tensor:
        """Embeddings [T, D] of B packed sequences -> hidden states [T, D] after the last norm.

        With a cache, sequence b continues row b of it: its positions start at `cache.lengths[b]`. With `keep_S` only
        those positions come out, [S, D], and the last block works on no other behind its attention.
        """
        if cache is None:
            spans = pairwise(cu_seqlens)
            positions_T = torch.cat([torch.arange(end - start) for start, end in spans]).to(x_TD.device)
        else:
            positions_T = cache.begin(cu_seqlens)
        rotary = rotary_tables(positions_T, self.config, x_TD.dtype)
        for layer, block in enumerate(self.blocks):
            last = layer == len(self.blocks) - 1
            x_TD = block(x_TD, keep_S if last else None, rotary, cu_seqlens, cache, layer)
        if cache is not None:
            cache.advance(cu_seqlens)
        return self.norm(x_TD)

    def logits(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.head_weight)
