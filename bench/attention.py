"""What is measured of attention: the decoder's and the towers' shapes, packed training rows, decoding over a cache.

Peers, where they take the shape: SDPA's own choice ("eager") and each of its backends, compiled FlexAttention at 4096
tokens and for 16 pictures, SDPA of the padded batch for packed rows, and on a CPU the attention function of
transformers, whose rows are the proof that tower and prefill lose nothing to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases import Case
from minillava.kernels.attention import attention
from minillava.kernels.decode_attention import decode_attention

FORWARD, BOTH = "forward", "forward+backward"
# label, rows, tokens, H, G, K, causal, direction: 16,384 tokens of a 7B decoder, pictures through CLIP and SigLIP
GPU = [
    ("decoder", 16384 // T, T, 32, 32, 128, causal, direction)
    for T in (2048, 4096, 8192, 16384)
    for causal in (True, False)
    for direction in (FORWARD, BOTH)
]
GPU += [("CLIP-L", B, 577, 16, 16, 64, False, FORWARD) for B in (1, 16, 64)]
GPU += [("SigLIP", B, 729, 16, 16, 72, False, FORWARD) for B in (1, 16, 64)]
GPU += [("Qwen2-7B", 4, 4096, 28, 4, 128, True, FORWARD)]
CPU = [("CLIP-L", 1, 577, 16, 16, 64, False, FORWARD), ("SigLIP", 1, 729, 16, 16, 72, False, FORWARD)]
CPU += [("Qwen2-0.5B", 1, 640, 14, 2, 64, True, FORWARD), ("TinyLlama", 1, 640, 32, 4, 64, True, FORWARD)]
# label, rows, tokens in the cache, H, G, K
GPU_DECODE = [("7B", B, S, 32, 32, 128) for B, S in ((1, 4096), (1, 32768), (32, 4096))]
GPU_DECODE += [("Qwen2-7B", 1, 32768, 28, 4, 128), ("Qwen2-0.5B", 1, 32768, 14, 2, 64)]
CPU_DECODE = [("Qwen2-0.5B", 1, 700, 14, 2, 64), ("TinyLlama", 8, 700, 32, 4, 64)]
# Tokens of the sequences of a packed training step: pictures of 576 tokens with text, some turns long, some without
PACKED = (620, 655, 700, 640, 1210, 690, 98, 2011, 733, 645, 1480, 660, 871, 612, 45, 1930, 702, 640, 1105, 337)
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
BACKENDS["efficient"] = SDPBackend.EFFICIENT_ATTENTION


def shapes(device: str) -> tuple[list, list]:
    return (GPU, GPU_DECODE) if device == "cuda" else (CPU, CPU_DECODE)


def count(device: str) -> int:
    rows, decode = shapes(device)
    return len(rows) + len(decode) + (device == "cuda")


def cases(device: str, dtype: torch.dtype, compiled: bool) -> Iterator[Case]:
    rows, decode = shapes(device)
    for shape in rows:
        yield _rows(*shape, device, dtype, compiled)
    if device == "cuda":
        yield _packed(device, dtype)
    for shape in decode:
        yield _decode(*shape, device, dtype)


def _random(*shapes: tuple[int, ...], device: str, dtype: torch.dtype, grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s, device=device).to(dtype).requires_grad_(grad) for s in shapes]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """[B, T, H, K], as our layers hold them."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]).transpose(
        1, 2
    )


def _with_backend(backend: SDPBackend, causal: bool) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(q, k, v, causal)

    return function


def _flex(T: int, causal: bool, device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device) if causal else None
    flex = torch.compile(flex_attention, dynamic=False)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return function


def _transformers(causal: bool, groups: int) -> Callable[..., Tensor]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = causal, groups  # type: ignore[assignment]
    return lambda q, k, v: sdpa_attention_forward(module, *(x.transpose(1, 2) for x in (q, k, v)), None)[0]


def _taken(functions: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Without the peers that refuse the shape."""
    kept = {}
    for name, function in functions.items():
        try:
            function()
        except RuntimeError as refused:
            if name == "ours":
                raise
            print(f"  {name} does not take it: {str(refused).splitlines()[0]}")
            continue
        kept[name] = function
    return kept


def _rows(label, B, T, H, G, K, causal, direction, device, dtype, compiled) -> Case:
    q, k, v = _random((B, T, H, K), (B, T, G, K), (B, T, G, K), device=device, dtype=dtype, grad=direction == BOTH)
    (dy,) = _random((B, T, H, K), device=device, dtype=dtype)
    cu = range(0, B * T + 1, T)
    peers: dict[str, Callable[..., Tensor]] = {
        "ours": lambda *qkv: attention(*(x.flatten(0, 1) for x in qkv), cu, causal).unflatten(0, (B, T))
    }
    peers["eager"] = lambda q, k, v: _sdpa(q, k, v, causal)
    if device == "cuda":
        peers |= {f"SDPA {name}": _with_backend(backend, causal) for name, backend in BACKENDS.items()}
        if compiled and direction == FORWARD and (T == 4096 or B == 16):  # each is a minute of compiling
            peers["FlexAttention"] = _flex(T, causal, device)
    elif find_spec("transformers"):
        peers["transformers"] = _transformers(causal, H // G)

    def step(function: Callable[..., Tensor]) -> Callable[[], Any]:
        if direction == FORWARD:
            return lambda: function(q, k, v)
        return lambda: torch.autograd.grad(function(q, k, v), (q, k, v), dy)

    flops = 4.0 * B * H * K * T * T * (0.5 if causal else 1.0) * (1.0 if direction == FORWARD else 3.5)
    traffic = 2.0 * (q.nbytes + k.nbytes) * (1.0 if direction == FORWARD else 3.0)
    shape = f"{B} x {T} x {H}/{G} x {K} {'causal' if causal else 'full'}"
    return Case("attention", label, shape, direction, flops, traffic, _taken({n: step(f) for n, f in peers.items()}))


def _packed(device, dtype) -> Case:
    """A training step's attention: packed rows against the same rows padded to the longest."""
    H, K, T, longest = 32, 128, sum(PACKED), max(PACKED)
    q, k, v, dy = _random(*((T, H, K),) * 4, device=device, dtype=dtype, grad=True)
    padded = _random(*((len(PACKED), longest, H, K),) * 4, device=device, dtype=dtype, grad=True)
    cu = [sum(PACKED[:n]) for n in range(len(PACKED) + 1)]

    def ours() -> Any:
        return torch.autograd.grad(attention(q, k, v, cu, True), (q, k, v), dy)

    def eager() -> Any:
        return torch.autograd.grad(_sdpa(*padded[:3], True), padded[:3], padded[3])

    flops = 4.0 * H * K * sum(n * n for n in PACKED) * 0.5 * 3.5
    functions = _taken({"ours": ours, "eager": eager})
    return Case("attention", "packed", f"{len(PACKED)} rows, {T} tokens", BOTH, flops, 12.0 * q.nbytes, functions)


def _decode(label, B, S, H, G, K, device, dtype) -> Case:
    q, k, v = _random((B, H, K), (B, S, G, K), (B, S, G, K), device=device, dtype=dtype)
    lengths = torch.full((B,), S, device=device)

    def eager() -> Tensor:
        return _sdpa(q[:, None], k, v, False)

    functions: dict[str, Callable[[], Any]] = {"ours": lambda: decode_attention(q, k, v, lengths), "eager": eager}
    if device == "cpu" and find_spec("transformers"):
        theirs = _transformers(False, H // G)
        functions["transformers"] = lambda: theirs(q[:, None], k, v)
    flops, traffic = 4.0 * B * H * K * S, float(k.nbytes + v.nbytes)
    return Case("decode_attention", label, f"{B} x {S} x {H}/{G} x {K}", FORWARD, flops, traffic, _taken(functions))


def missed(row: dict[str, Any]) -> list[str]:
    """Goals for an H200 that a row does not meet."""
    ratios, label, found = row["ratios"], row["label"], []

    def want(name: str, got: float, least: float) -> None:
        if got < least:
            found.append(f"{got:.2f} of {name}, {least:.2f} wanted")

    if row["kernel"] == "decode_attention":
        if row["shape"].startswith("1 x"):
            want("copy bandwidth", row["share_of_roofline"], 0.85)
        return found
    if label == "packed":
        want("padded SDPA", ratios["eager"], 1.3)
    elif label == "decoder":
        floor_tflops = 550.0 if row["direction"] == FORWARD else 450.0
        want(f"{floor_tflops:.0f} TFLOP/s", row["flop_per_s"] / 1e12 / floor_tflops, 1.0)
        want("SDPA cuDNN", ratios.get("SDPA cuDNN", 1.0), 1.0)
    elif label in ("CLIP-L", "SigLIP"):
        want("the best SDPA", min(ratio for name, ratio in ratios.items() if "SDPA" in name or name == "eager"), 1.2)
    return found
