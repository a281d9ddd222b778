"""What is measured: every kernel and its peers at the real shapes of LLaVA-1.5 7B, 13B and OneVision 0.5B, 7B."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from minillava.kernels import fused_mlp as mlp
from minillava.kernels import linear_cross_entropy as loss
from minillava.kernels import rms_norm as norm
from minillava.kernels import swiglu as glu

KERNELS = ("fused_mlp", "linear_cross_entropy", "rms_norm", "swiglu", "attention", "decode_attention", "nf4_matmul")
HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None

# label, K, H, O, rows: the table of projector shapes (rows are tokens of 1 to 64 pictures)
PROJECTORS = [("7B", 1024, 4096, 4096, rows) for rows in (576, 2304, 4608, 9216, 36864)]
PROJECTORS += [("13B", 1024, 5120, 5120, 9216), ("SigLIP 0.5B", 1152, 896, 896, 729)]
PROJECTORS += [("SigLIP 0.5B", 1152, 896, 896, 11664), ("SigLIP 7B", 1152, 3584, 3584, 729)]
PROJECTORS += [("SigLIP 7B", 1152, 3584, 3584, 11664)]
# label, D, V, rows: supervised positions of a training step
HEADS = [("7B", 4096, 32000, 8192), ("13B", 5120, 32000, 4096), ("0.5B", 896, 151936, 4096), ("8B", 4096, 128256, 4096)]
# kernel, label, rows, width: a decoder's norms and SwiGLU over the tokens of a training step
ELEMENTWISE = [("rms_norm", "7B", 8192, 4096), ("rms_norm", "13B", 8192, 5120), ("rms_norm", "0.5B", 8192, 896)]
ELEMENTWISE += [("swiglu", "7B", 8192, 11008), ("swiglu", "13B", 8192, 13824), ("swiglu", "0.5B", 8192, 4864)]
TINY_ELEMENTWISE = [("rms_norm", "tiny", 512, 64), ("swiglu", "tiny", 512, 64)]
TINY_PROJECTORS = [("tiny", 32, 64, 64, rows) for rows in (1, 96)]
TINY_HEADS = [("tiny", 32, 512, 64)]


@dataclass(frozen=True)
class Case:
    """One row of the report: `functions` maps each peer to a call without arguments; "ours" is the kernel."""

    kernel: str
    label: str
    shape: str
    direction: str  # "forward" or "forward+backward"
    flops: float  # of the matrix products; of an elementwise kernel, about what it computes
    bytes: float  # least traffic: inputs, weights, results and gradients once
    functions: dict[str, Callable[[], Any]]


def cases(device: str, dtype: torch.dtype, tiny: bool, compiled: bool = True):
    """Build the cases one after another, of which one holds memory; the last are those of attention.py and nf4.py."""
    from bench import attention, nf4

    for label, K, H, O, rows in TINY_PROJECTORS if tiny else PROJECTORS:
        for direction in ("forward", "forward+backward"):
            yield _projector(label, K, H, O, rows, direction, device, dtype, compiled)
    for label, D, V, rows in TINY_HEADS if tiny else HEADS:
        yield _head(label, D, V, rows, device, dtype, compiled)
    for kernel, label, rows, width in TINY_ELEMENTWISE if tiny else ELEMENTWISE:
        for direction in ("forward", "forward+backward"):
            yield _elementwise(kernel, label, rows, width, direction, device, dtype, compiled)
    yield from attention.cases(device, dtype, compiled)
    yield from nf4.cases(device, dtype, tiny)


def _random(shapes, device: str, dtype: torch.dtype, grad: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [(torch.randn(s, device=device) * s[-1] ** -0.5).to(dtype).requires_grad_(grad) for s in shapes]


def _compile(function: Callable, device: str) -> Callable:
    return torch.compile(function, mode="max-autotune-no-cudagraphs" if device == "cuda" else "default", dynamic=False)


def _projector(label, K, H, O, rows, direction, device, dtype, compiled) -> Case:
    backward = direction != "forward"
    x, *weights = _random(((rows, K), (H, K), (H,), (O, H), (O,)), device, dtype, backward)
    x = x.detach()  # the tower is frozen
    dy = torch.randn(rows, O, device=device).to(dtype)
    hidden = torch.randn(rows, H, device=device).to(dtype)
    w1, _, w2, _ = (w.detach() for w in weights)

    def step(function: Callable) -> Callable:
        if not backward:
            return lambda: function(x, *weights, "gelu")
        return lambda: torch.autograd.grad(function(x, *weights, "gelu"), weights, dy)

    def products() -> None:
        x @ w1.T, hidden @ w2.T
        if backward:
            dy @ w2, dy.T @ hidden, hidden.T @ x

    functions = {"ours": step(mlp.fused_mlp), "eager": step(mlp.reference), "products only": products}
    if compiled:
        functions["torch.compile"] = step(_compile(mlp.reference, device))
    forward = 2.0 * rows * H * (K + O)
    flops = forward + (2.0 * rows * H * (K + 2 * O) if backward else 0.0)
    traffic = x.element_size() * (rows * (K + O) + H * (K + O)) * (2.0 if backward else 1.0)
    return Case("fused_mlp", label, f"{rows} x {K}-{H}-{O}", direction, flops, traffic, functions)


def _head(label, D, V, rows, device, dtype, compiled) -> Case:
    hidden, weight = _random(((rows, D), (V, D)), device, dtype, True)
    targets = torch.randint(0, V, (rows,), device=device)

    def step(function: Callable) -> Callable:
        return lambda: torch.autograd.grad(function(hidden, weight, targets) / rows, (hidden, weight))

    def autograd_free(h: torch.Tensor, w: torch.Tensor) -> Callable:
        def products() -> None:
            logits = h @ w.T
            logits @ w, logits.T @ h

        return products

    functions = {
        "ours": step(loss.linear_cross_entropy),
        "eager": step(loss.reference),
        "products only": autograd_free(hidden.detach(), weight.detach()),
    }
    if compiled:
        functions["torch.compile"] = step(
            _compile(lambda h, w, t: F.cross_entropy(h @ w.T, t, reduction="sum"), device)
        )
    if HAS_LIGER and device == "cuda":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        functions["Liger"] = step(lambda h, w, t: liger_fused_linear_cross_entropy(h, w, t, reduction="sum"))
    traffic = 2.0 * hidden.element_size() * (rows * D + V * D)
    flops = 6.0 * rows * D * V
    return Case("linear_cross_entropy", label, f"{rows} x {D}-{V}", "forward+backward", flops, traffic, functions)


def _elementwise(kernel, label, rows, width, direction, device, dtype, compiled) -> Case:
    backward = direction != "forward"
    x, weight, other, dy = _random(((rows, width), (width,), (rows, width), (rows, width)), device, dtype, backward)
    dy = dy.detach()
    rms = kernel == "rms_norm"
    leaves = (x, weight) if rms else (x, other)
    ours, plain = (norm.rms_norm, norm.reference) if rms else (glu.swiglu, glu.reference)
    extra = (1e-5,) if rms else ()

    def step(function: Callable) -> Callable:
        if not backward:
            return lambda: function(*leaves, *extra)
        return lambda: torch.autograd.grad(function(*leaves, *extra), leaves, dy)

    functions = {"ours": step(ours), "eager": step(plain)}
    if compiled:
        functions["torch.compile"] = step(_compile(plain, device))
    if HAS_LIGER and device == "cuda":
        from liger_kernel.transformers.functional import liger_rms_norm, liger_swiglu

        functions["Liger"] = step(liger_rms_norm if rms else liger_swiglu)
    # numbers moved for each number of x: forward in and out, then gradients and what was saved in, gradients out
    moved = (2, 3) if rms else (3, 5)
    traffic = float(x.nbytes * (moved[0] + (moved[1] if backward else 0)))
    flops = (12.0 if backward else 5.0) * x.numel()
    return Case(kernel, label, f"{rows} x {width}", direction, flops, traffic, functions)
