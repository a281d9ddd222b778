"""Optimizers: AdamW, or Muon for the matrices and AdamW for the rest.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) orthogonalises the momentum of each matrix. Its updates are
scaled to AdamW's size (Liu et al. 2025, arXiv 2502.16982), so both take the same learning rate. On the small models of
recipe nano it needs about half of AdamW's steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minillava.recipe import StageConfig


class Together:
    """Several optimizers over disjoint parameters as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        self.param_groups: list[dict[str, Any]] = [group for o in optimizers for group in o.param_groups]
        self.state, self.defaults = optimizers[0].state, optimizers[0].defaults
        for optimizer in optimizers[1:]:
            optimizer.state = self.state

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


def make_optimizer(model: nn.Module, trained: dict[str, Tensor], stage: StageConfig) -> Together:
    """A group for each part (first word of a name) and kind; norms, biases and embeddings do not decay."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    groups: dict[tuple[str, bool, bool], list[Tensor]] = {}
    for name, parameter in trained.items():
        decays = parameter.ndim > 1 and id(parameter) not in embeddings
        muon = stage.optimizer == "muon" and decays and parameter.ndim == 2 and not name.endswith("head.weight")
        groups.setdefault((name.split(".")[0], decays, muon), []).append(parameter)

    def listed(wanted: bool) -> list[dict[str, Any]]:
        return [
            {"params": params, "part": part, "lr": stage.lr[part], "weight_decay": stage.weight_decay * decays}
            for (part, decays, muon), params in groups.items()
            if muon == wanted
        ]

    optimizers: list[torch.optim.Optimizer] = []
    if listed(False):
        fused = next(iter(trained.values())).device.type in ("cpu", "cuda", "mps")
        optimizers.append(torch.optim.AdamW(listed(False), betas=stage.betas, eps=stage.eps, fused=fused))
    if listed(True):
        optimizers.append(torch.optim.Muon(listed(True), adjust_lr_fn="match_rms_adamw"))
    return Together(*optimizers)
