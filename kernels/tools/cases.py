"""Every part of every kernel that has configurations, as a function of a configuration: aot compiles it, tune times it;
without a configuration PyTorch does the same, for tune to compare with.

Shapes are those of 7B models at the upper end of a bucket of tuned/<kernel>.json, numbers random and bf16. Where real
numbers of rows need not be multiples of 16 they are none here: compilers take advantage of such.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minillava.kernels import attention as attention_
from minillava.kernels import (
    decode_attention,
    decode_linear,
    flash,
    flash_backward,
    fused_mlp,
    linear_cross_entropy,
    nf4_dequantize,
    nf4_matmul,
    rms_norm,
    swiglu,
)

Run = Callable[[dict[str, Any] | None], Any]

MLP = 1024, 4096, 4096  # K, H, O of LLaVA-1.5 7B's projector
MLP_ROWS = {64: 64, 3_000_000: 576, 20_000_000: 4608}  # a bucket's bound -> rows
TOKENS = 4616  # eight pictures of 577


def numbers(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def either(kernel: Callable, plain: Callable, *args: Any) -> Run:
    """The kernel with a configuration, the plain code without one."""
    return lambda config: plain(*args) if config is None else kernel(*args, config)


def mlp(part: str, bucket: dict[str, Any], device: str, activation: str = "gelu") -> Run:
    """The kernel's product and little else: the library's has few outputs, of the gradients only b1's is asked for."""
    rows = MLP_ROWS.get(bucket.get("rows", bucket.get("outputs", 0)), 9216)
    K, H, O = MLP if part == "backward" else (*MLP[:2], 16)
    sizes = (rows, K), (H, K), (H,), (O, H), (rows, H), (rows, O)
    x, w1, b1, w2, pre, dy = (numbers(device, *size) for size in sizes)
    if part == "forward":
        args: tuple = x, w1, b1, w2, None, activation, True
        return either(fused_mlp.triton_forward, fused_mlp.plain_forward, *args)
    args = dy, x, w1, w2, pre, activation, [False, False, True, False, False]
    return either(fused_mlp.triton_backward, fused_mlp.plain_backward, *args)


def loss(part: str, bucket: dict[str, Any], device: str) -> Run:
    V = bucket.get("width", 32000)
    logits, targets = numbers(device, 4096, V), torch.randint(0, V, (4096,), device=device)

    def run(config: dict[str, Any] | None) -> tuple[Tensor, Tensor]:
        """The loss and, in the logits' place, its gradient: the first run sees what the plain code saw."""
        if config is not None:
            return linear_cross_entropy.triton_loss(logits, targets, -100, True, config), logits
        kept = logits.clone()
        return linear_cross_entropy.plain_loss(kept, targets, -100, True), kept

    return run


def gated(part: str, bucket: dict[str, Any], device: str) -> Run:
    dy, gate, up = (numbers(device, TOKENS, 11008) for _ in range(3))
    if part == "forward":
        return either(swiglu.triton_forward, swiglu.plain_forward, gate, up)
    return either(swiglu.triton_backward, swiglu.plain_backward, dy, gate, up)


def norm(part: str, bucket: dict[str, Any], device: str) -> Run:
    D = bucket.get("width", rms_norm.WIDEST)
    x, dy, weight, rstd = (numbers(device, *size) for size in ((TOKENS, D), (TOKENS, D), (D,), (TOKENS, 1)))
    if part == "forward":
        return either(rms_norm.triton_forward, rms_norm.plain_forward, x, weight, 1e-5)
    return either(rms_norm.triton_backward, rms_norm.plain_backward, dy, x, weight, rstd.float())


def attention(part: str, bucket: dict[str, Any], device: str, causal: bool = True) -> Run:
    """Two sequences of 4096 tokens, four query heads a key/value head; one new query a row for "decode"."""
    K, T, H, G = bucket.get("width", 256), 8192, 32, 8
    q, k, v, do = (numbers(device, T, heads, K) for heads in (H, G, G, H))
    rest: tuple = ((0, T // 2, T), (0, T // 2, T), causal, 0, K**-0.5)
    if part == "decode":
        caches, lengths = (x.view(2, T // 2, G, K) for x in (k, v)), torch.full((2,), T // 2, device=device)
        args = (q[:2], *caches, lengths, K**-0.5, 0)
        return either(decode_attention.triton_decode, decode_attention.reference, *args)
    if part == "forward":
        return either(flash.forward, attention_.reference, q, k, v, *rest)
    o, lse = attention_.reference(q, k, v, *rest)
    args = do, q, k, v, o, lse, *rest
    mine = {"backward_keys": slice(1, 3), "backward_queries": slice(0, 1)}.get(part, slice(0, 3))
    kernel = lambda *args: flash_backward.backward(*args[:-1], {part: args[-1]})[mine]  # noqa: E731
    return either(kernel, lambda *args: attention_.reference_backward(*args)[mine], *args)


def _weight4(N: int, K: int, nested: bool, device: str) -> tuple:
    packed, blocks = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device=device), N * K // 64
    if not nested:
        return packed, torch.rand(blocks, device=device), None, None
    bytes_ = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
    return packed, bytes_, torch.rand(2, blocks // 256, device=device), torch.rand(256, device=device)


def nf4(part: str, bucket: dict[str, Any], device: str, K: int = 0, nested: bool = False) -> Run:
    """Down projection where a bucket is for few outputs, else gate and up as one; blocks of 64."""
    rows, N = min(bucket.get("rows", 4096), 4096), 4096 if "width" in bucket else 22016
    K = K or (11008 if N == 4096 else 4096)
    weight = _weight4(N, K, nested, device)
    if part == "dequantize":
        args: tuple = *weight, N, K, "nf4", 64, torch.bfloat16
        return either(nf4_dequantize.triton_dequantize, nf4_dequantize.plain_dequantize, *args)
    args = numbers(device, rows, K), *weight, None, N, "nf4", 64
    return either(nf4_matmul.triton_forward, nf4_matmul.plain_forward, *args)


def decode(part: str, bucket: dict[str, Any], device: str, K: int = 4096, nested: bool = False) -> Run:
    """Down projection with its residual where a bucket is for few outputs, else norm, gate and up as one, SwiGLU."""
    rows, few = min(bucket.get("rows", decode_linear.ROWS), decode_linear.ROWS), "width" in bucket
    N, K = (4096, 11008) if few else (22016, K)
    x, eps = numbers(device, rows, K), 1e-5
    norm, residual = (None, numbers(device, rows, N)) if few else (numbers(device, K), None)
    rest = None, norm, eps, not few, residual
    if part == "dense":
        return either(decode_linear.triton_dense, decode_linear.reference, x, numbers(device, N, K), *rest)
    args = x, *_weight4(N, K, nested, device), *rest, N, "nf4", 64
    return either(decode_linear.triton_nf4, decode_linear.nf4_reference, *args)


CASES: dict[str, Callable[..., Run]] = {
    "fused_mlp": mlp,
    "linear_cross_entropy": loss,
    "swiglu": gated,
    "rms_norm": norm,
    "flash": attention,
    "nf4_matmul": nf4,
    "decode_linear": decode,
}
