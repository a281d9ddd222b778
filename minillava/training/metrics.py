"""Where the time of a step goes, and which share of the machine's matrix speed it uses.

Model FLOPs utilisation as in PaLM (arXiv 2204.02311, appendix B): the FLOPs that a step needs, recomputed activations
left out, over what the same machine reaches in one large product of the same dtype, measured in the first step.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from minillava.decoder import Experts
from minillava.llava import LLaVAModel


class Clock:
    """Seconds spent in named phases. On a GPU by events that are read once they have passed, so nothing waits for them:
    what the optimizer took is then reported with the step after it."""

    def __init__(self, device: torch.device, vision: nn.Module | None = None):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any, Any]] = []  # phase, began, ended
        self.hooks = []
        if vision is not None:  # the tower runs inside the forward pass
            began: list[Any] = []
            self.hooks = [
                vision.register_forward_pre_hook(lambda *_: began.append(self.now())),
                vision.register_forward_hook(lambda *_: self.marks.append(("vision", began.pop(), self.now()))),
            ]

    def now(self) -> float | torch.cuda.Event:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = self.now()
        yield
        self.marks.append((phase, began, self.now()))

    def read(self, steps: int = 1) -> dict[str, float]:
        """PHASE_s of a step, the mean of those `steps` since the last call; the tower's is taken out of the forward
        pass's."""
        seconds: dict[str, float] = defaultdict(float)
        waiting = []
        for phase, began, ended in self.marks:
            if self.cuda and not ended.query():
                waiting.append((phase, began, ended))
            else:
                seconds[f"{phase}_s"] += began.elapsed_time(ended) * 1e-3 if self.cuda else ended - began
        self.marks = waiting
        if "forward_s" in seconds:
            seconds["forward_s"] -= seconds["vision_s"]
        return {name: round(value / steps, 5) for name, value in seconds.items()}


class Work:
    """FLOPs of a training step of a LLaVA, from the sizes of its linear layers and what of them is trained.

    A product costs 2 FLOPs a weight and token, once forward, once for the gradient of its input and once for that of
    its weight where that is trained; a frozen tower has no backward pass. Causal attention is counted by half.
    """

    def __init__(self, model: LLaVAModel):
        config = model.config
        vision, projector, decoder = model.vision, model.projector, model.decoder
        seen = any(p.requires_grad for p in vision.parameters())
        self.patch = _products(vision.blocks[: config.vision.layers_run], seen) + _products(projector, seen)
        last: Any = decoder.blocks[-1]  # behind its attention it works on supervised positions alone
        late = _products(last.attn.out, True) + _products(last.mlp, True)
        self.token = _products(decoder.blocks, True) - late
        head = config.decoder.hidden_size * config.decoder.vocab_size
        self.answer = late + 2 * head * (2 + decoder.head_weight.requires_grad)
        self.view = 4 * config.vision.hidden_size * config.vision.layers_run * (3 if seen else 1)
        width = config.decoder.num_heads * config.decoder.head_dim
        self.pair = 2 * width * config.decoder.num_layers * 3  # of queries and keys, half of which are hidden

    def flops(self, cu_seqlens: Sequence[int], supervised: int, patches: Sequence[int]) -> float:
        """Of one forward and backward pass over packed rows and views (or native frames) of so many patches each."""
        pairs = sum((end - start) ** 2 for start, end in pairwise(cu_seqlens))
        total = self.token * cu_seqlens[-1] + self.pair * pairs + self.answer * supervised
        return total + self.patch * sum(patches) + self.view * sum(n * n for n in patches)


def _products(module: nn.Module, input_gradient: bool) -> int:
    """FLOPs a token of the linear layers inside, backward pass included."""
    total = 0
    layer: Any
    for layer in module.modules():
        if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
            trained = {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}
            total += 2 * layer.in_features * layer.out_features * (1 + input_gradient + ("weight" in trained))
            total += sum(6 * p.numel() for name, p in trained.items() if name.startswith("lora_"))
        elif isinstance(layer, Experts):  # a token takes a few of them
            weights = layer.per_token * sum(w.numel() // len(w) for w in (layer.gate, layer.up, layer.down))
            total += 2 * weights * (1 + input_gradient + layer.gate.requires_grad)
    return total
