"""The cache of keys and values that decoding reads: allocated once, a slot for each sequence, its length on the device.

Letters: L layers, B slots, S tokens that a slot has room for, T new tokens, H heads, G key/value heads, K head size.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from minillava.config import DecoderConfig
from minillava.kernels.attention import attention
from minillava.kernels.decode_attention import decode_attention


class KVCache:
    """Keys and values of `rows` sequences with room for `capacity` tokens each.

    A pass over the decoder is `begin`, then `attend` once a layer, then `advance`. There are two kinds. A pass over
    packed sequences knows where they continue from `lengths`, on the host. A decode step (`cu_seqlens` None) takes one
    token for each of the first T slots and knows it from `lengths_B`, on the device: nothing in it asks the host, so it
    can be captured; it moves on the slots of `live_B`, and `lengths` is its caller's to keep.
    """

    def __init__(self, config: DecoderConfig, rows: int, capacity: int, device: torch.device, dtype: torch.dtype):
        self.rows, self.capacity = rows, capacity
        shape = (config.num_layers, rows, capacity, config.num_kv_heads, config.head_dim)
        self.k_LBSGK = torch.zeros(shape, device=device, dtype=dtype)  # zeros: what a mask hides must still be finite
        self.v_LBSGK = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * rows
        self.lengths_B = torch.zeros(rows, device=device, dtype=torch.int64)
        self.live_B = torch.ones(rows, device=device, dtype=torch.bool)
        self._first_B = torch.arange(rows, device=device) * capacity

    def begin(self, T: int, cu_seqlens: Sequence[int] | None, slots: Sequence[int] | None = None) -> Tensor:
        """Positions [T] of the new tokens; sequence b continues slot `slots[b]` (b if None)."""
        self._spans: list[tuple[int, int, int, int]] | None = None
        if cu_seqlens is None:
            positions_B = self.lengths_B[:T]
            self._at_T, self._seen_B = self._first_B[:T] + positions_B, positions_B + 1
            return positions_B
        slots = range(len(cu_seqlens) - 1) if slots is None else slots
        device, self._spans = self.lengths_B.device, []
        for slot, (start, end) in zip(slots, pairwise(cu_seqlens), strict=True):
            if not 0 <= slot < self.rows or self.lengths[slot] + end - start > self.capacity:
                full = self.lengths[slot] if 0 <= slot < self.rows else "nothing"
                raise ValueError(f"{end - start} new tokens do not fit slot {slot} with {full} of {self.capacity}")
            self._spans.append((slot, self.lengths[slot], start, end))
        positions_T = torch.cat([torch.arange(at, at + end - start) for _, at, start, end in self._spans])
        first_T = torch.cat([torch.full((end - start,), slot * self.capacity) for slot, _, start, end in self._spans])
        self._at_T = (first_T + positions_T).to(device)
        return positions_T.to(device)

    def attend(
        self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cu_seqlens: Sequence[int] | None
    ) -> Tensor:
        """Write the new keys and values; attention [T, H, K] of each query over all that its slot holds up to it."""
        k_BSGK, v_BSGK = self.k_LBSGK[layer], self.v_LBSGK[layer]
        k_BSGK.view(-1, *k_TGK.shape[1:]).index_copy_(0, self._at_T, k_TGK.to(k_BSGK.dtype))
        v_BSGK.view(-1, *v_TGK.shape[1:]).index_copy_(0, self._at_T, v_TGK.to(v_BSGK.dtype))
        if self._spans is None or cu_seqlens is None:
            T = len(q_THK)
            return decode_attention(q_THK, k_BSGK[:T], v_BSGK[:T], self._seen_B)
        if not any(before for _, before, _, _ in self._spans):
            return attention(q_THK, k_TGK, v_TGK, cu_seqlens, causal=True)
        out = []
        for slot, before, start, end in self._spans:
            k_SGK, v_SGK = k_BSGK[slot, : before + end - start], v_BSGK[slot, : before + end - start]
            boundaries = {"cu_seqlens": (0, end - start), "cu_seqlens_k": (0, len(k_SGK))}
            out.append(attention(q_THK[start:end], k_SGK, v_SGK, causal=True, **boundaries))
        return torch.cat(out)

    def advance(self) -> None:
        if self._spans is None:
            T = len(self._at_T)
            self.lengths_B[:T] += self.live_B[:T]
            return
        for slot, before, start, end in self._spans:
            self.keep(slot, before + end - start)

    def keep(self, slot: int, length: int) -> None:
        """From here on `slot` holds its first `length` tokens."""
        self.lengths[slot] = length
        self.lengths_B[slot] = length

    def move(self, to: int, slot: int, length: int) -> None:
        """Copy the first `length` tokens of `slot` to slot `to`."""
        self.k_LBSGK[:, to, :length] = self.k_LBSGK[:, slot, :length]
        self.v_LBSGK[:, to, :length] = self.v_LBSGK[:, slot, :length]
        self.keep(to, length)
        self.live_B[to] = self.live_B[slot]
