"""Every part of every kernel that has configurations, as a function of a configuration: aot compiles it, tune times it.

Shapes are those of 7B models at the upper end of a bucket of tuned/<kernel>.json, numbers random and bf16. Where real
numbers of rows need not be multiples of 16 they are none here: compilers take advantage of such.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minillava.kernels import (
    decode_attention,
    flash,
    flash_backward,
    fused_mlp,
    linear_cross_entropy,
    nf4_dequantize,
    nf4_matmul,
    rms_norm,
    swiglu,
)

Run = Callable[[dict[str, Any]], Any]

MLP = 1024, 4096, 4096  # K, H, O of LLaVA-1.5 7B's projector
MLP_ROWS = {64: 64, 3_000_000: 576, 20_000_000: 4608}  # a bucket's bound -> rows
TOKENS = 4616  # eight pictures of 577


def numbers(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def mlp(part: str, bucket: dict[str, Any], device: str, activation: str = "gelu") -> Run:
    """The kernel's product and little else: the library's has few outputs, of the gradients only b1's is asked for."""
    rows = MLP_ROWS.get(bucket.get("rows", bucket.get("outputs", 0)), 9216)
    K, H, O = MLP if part == "backward" else (*MLP[:2], 16)
    sizes = (rows, K), (H, K), (H,), (O, H), (rows, H), (rows, O)
    x, w1, b1, w2, pre, dy = (numbers(device, *size) for size in sizes)
    if part == "forward":
        return lambda config: fused_mlp.triton_forward(x, w1, b1, w2, None, activation, True, config)
    needs = [False, False, True, False, False]
    return lambda config: fused_mlp.triton_backward(dy, x, w1, w2, pre, activation, needs, config)


def loss(part: str, bucket: dict[str, Any], device: str) -> Run:
    V = bucket.get("width", 32000)
    logits, targets = numbers(device, 4096, V), torch.randint(0, V, (4096,), device=device)
    return lambda config: linear_cross_entropy.triton_loss(logits, targets, -100, True, config)


def gated(part: str, bucket: dict[str, Any], device: str) -> Run:
    dy, gate, up = (numbers(device, TOKENS, 11008) for _ in range(3))
    if part == "forward":
        return lambda config: swiglu.triton_forward(gate, up, config)
    return lambda config: swiglu.triton_backward(dy, gate, up, config)


def norm(part: str, bucket: dict[str, Any], device: str) -> Run:
    D = bucket.get("width", rms_norm.WIDEST)
    x, dy, weight, rstd = (numbers(device, *size) for size in ((TOKENS, D), (TOKENS, D), (D,), (TOKENS, 1)))
    if part == "forward":
        return lambda config: rms_norm.triton_forward(x, weight, 1e-5, config)
    return lambda config: rms_norm.triton_backward(dy, x, weight, rstd.float(), config)


def attention(part: str, bucket: dict[str, Any], device: str, causal: bool = True, mass: bool = False) -> Run:
    """Two sequences of 4096 tokens, four query heads a key/value head; one new query a row for "decode"."""
    K, T, H, G = bucket.get("width", 256), 8192, 32, 8
    q, k, v, do = (numbers(device, T, heads, K) for heads in (H, G, G, H))
    rest: tuple = ((0, T // 2, T), (0, T // 2, T), (), causal, 0, K**-0.5)
    if part == "decode":
        caches, lengths = (x.view(2, T // 2, G, K) for x in (k, v)), torch.full((2,), T // 2, device=device)
        args = (q[:2], *caches, lengths, K**-0.5, 0, mass)
        return lambda config: decode_attention.triton_decode(*args, config)
    if part == "forward":
        return lambda config: flash.forward(q, k, v, *rest, config)
    o, lse = torch.zeros_like(q), torch.zeros(H, T, device=device)  # time does not depend on them
    return lambda config: flash_backward.backward(do, q, k, v, o, lse, *rest, {part: config})


def nf4(part: str, bucket: dict[str, Any], device: str, K: int = 0, nested: bool = False) -> Run:
    """Down projection where a bucket is for few outputs, else gate and up as one; blocks of 64."""
    rows, N = min(bucket.get("rows", 4096), 4096), 4096 if "width" in bucket else 22016
    K = K or (11008 if N == 4096 else 4096)
    packed, blocks = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device=device), N * K // 64
    weight: tuple = packed, torch.rand(blocks, device=device), None, None
    if nested:
        bytes_ = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
        weight = packed, bytes_, torch.rand(2, blocks // 256, device=device), torch.rand(256, device=device)
    if part == "dequantize":
        return lambda c: nf4_dequantize.triton_dequantize(*weight, N, K, "nf4", 64, torch.bfloat16, c)
    x = numbers(device, rows, K)
    return lambda config: nf4_matmul.triton_forward(x, *weight, None, N, "nf4", 64, config)


CASES: dict[str, Callable[..., Run]] = {
    "fused_mlp": mlp,
    "linear_cross_entropy": loss,
    "swiglu": gated,
    "rms_norm": norm,
    "flash": attention,
    "nf4_matmul": nf4,
}
