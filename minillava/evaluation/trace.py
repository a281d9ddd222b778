"""What passes each stage of a model, ours or transformers': recorded by hooks on its modules.

A pass may be fed: every stage then gets what a reference pass gave it, whatever came out of the stage before, so that a
fault shows where it is and not behind it. Letters: T tokens or patches, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.kernels.cpu import library
from minillava.layers.int8 import Linear8bit
from minillava.layers.quantize import Linear4bit
from minillava.llava import LLaVAModel

GROUP = 64  # inputs of a row that share a scale where C code rounds them to bytes (kernels/cpu)


@dataclass
class Trace:
    """What went into each stage and came out of it, [T, D] in float64 on the CPU."""

    taken: dict[str, Tensor] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)
    rotary: Tensor | None = None  # cos and sin of the decoder, [T, 2 K]
    logits: Tensor | None = None  # [T, V]; None: the pass ended before


class OtherShape(Exception):
    """A stage was given another number of rows than in the reference pass."""


def rows(x: Tensor) -> Tensor:
    return x.detach().flatten(0, -2).to("cpu", torch.float64)


def record(stages: Mapping[str, nn.Module], run: Callable[[], Tensor], fed: Trace | None = None) -> Trace:
    """One pass, `run`, to logits. With `fed`, stages take what they took there; it ends where the shapes differ."""
    trace = Trace()

    def before(name: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x, more = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        trace.taken[name] = rows(x)
        if name == "decoder layer 0":
            trace.rotary = _rotary(args, kwargs)
        if fed is not None:
            if fed.taken[name].shape != trace.taken[name].shape:
                raise OtherShape(name)
            x = fed.taken[name].to(x.device, x.dtype).view(x.shape)
        return (x, *more), {key: value for key, value in kwargs.items() if key != "hidden_states"}

    def behind(name: str, module: nn.Module, args: tuple, out: Any) -> None:
        trace.made[name] = rows(out[0] if isinstance(out, tuple) else out)

    with contextlib.ExitStack() as hooks:
        for name, module in stages.items():
            if fed is not None and name not in fed.taken:
                continue
            pre = module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
            for handle in (pre, module.register_forward_hook(partial(behind, name))):
                hooks.callback(handle.remove)
        with contextlib.suppress(OtherShape), torch.no_grad():
            trace.logits = rows(run())
    return trace


def _rotary(args: tuple, kwargs: dict) -> Tensor:
    """cos and sin [T, 2 K] of either code: ours has the first half of sin negated."""
    if "position_embeddings" in kwargs:
        return torch.cat([rows(x) for x in kwargs["position_embeddings"]], 1)
    cos_TK, sin_TK = map(rows, args[1])
    return torch.cat([cos_TK, -sin_TK[:, : sin_TK.shape[1] // 2], sin_TK[:, sin_TK.shape[1] // 2 :]], 1)


def our_stages(model: LLaVAModel) -> dict[str, nn.Module]:
    """The modules of a model of ours, in order."""
    seen = model.vision.blocks[: model.config.vision.layers_run]
    stages: dict[str, nn.Module] = {f"vision layer {i}": block for i, block in enumerate(seen)}
    stages["projector"] = model.projector
    stages |= {f"decoder layer {i}": block for i, block in enumerate(model.decoder.blocks)}
    return stages | {"logits": model.decoder.norm}


# ---- our own code as a reference ----


@contextlib.contextmanager
def in_dtype(model: nn.Module, part: str, dtype: torch.dtype, rounds: bool) -> Iterator[None]:
    """A part of the model with its weights in another dtype, those in few bits as plain matrices; afterwards as it was.

    `rounds`: inputs of these in bf16 are rounded to bytes.
    """
    module = model.get_submodule(part)
    kept = [(p, p.data) for p in module.parameters()]
    few = {f"{part}.{name}".removesuffix("."): m for name, m in module.named_modules()
           if isinstance(m, Linear4bit | Linear8bit)}  # fmt: skip
    for p, data in kept:
        p.data = data.to(dtype)
    for name, layer in few.items():
        model.set_submodule(name, Dense(layer, dtype, rounds))
    try:
        yield
    finally:
        for name, layer in few.items():
            model.set_submodule(name, layer)
        for p, data in kept:
            p.data = data


class Dense(nn.Module):
    """A layer in few bits as a plain matrix."""

    def __init__(self, layer: Linear4bit | Linear8bit, dtype: torch.dtype, rounds: bool):
        super().__init__()
        self.weight, self.bias = layer.dequantize(torch.float32).to(dtype), layer.bias
        self.rounds = rounds and dtype == torch.bfloat16 and not getattr(layer, "exact", False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(in_bytes(x) if self.rounds else x, self.weight, self.bias)


def in_bytes(x: Tensor) -> Tensor:
    """Inputs rounded to 127 steps of the largest of every GROUP, as C code for weights in few bits rounds them."""
    if x.shape[-1] % GROUP:
        return x
    groups = x.float().unflatten(-1, (-1, GROUP))
    step = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (groups / step).round().mul(step).flatten(-2).to(x.dtype)


@contextlib.contextmanager
def plain_in(model: LLaVAModel, dtype: torch.dtype, rounds: bool) -> Iterator[None]:
    """The model as plain PyTorch in a dtype (see `in_dtype`), one block at a time: no code of ours for CPUs."""
    with contextlib.ExitStack() as stack:
        kept, library.library = library.library, lambda: None
        stack.callback(setattr, library, "library", kept)
        for part in ("vision", "projector", "decoder.embed", "decoder.norm", "decoder.head"):
            if part != "decoder.head" or not model.config.decoder.tie_embeddings:
                stack.enter_context(in_dtype(model, part, dtype, rounds))
        for number, block in enumerate(model.decoder.blocks):
            name, at_work = f"decoder.blocks.{number}", contextlib.ExitStack()
            enter = block.register_forward_pre_hook(
                lambda *_, name=name, at_work=at_work: at_work.enter_context(in_dtype(model, name, dtype, rounds))
            )
            leave = block.register_forward_hook(lambda *_, at_work=at_work: at_work.close(), always_call=True)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        yield
