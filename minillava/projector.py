"""The projector: vision features to word embeddings.

LLaVA v1 uses one linear layer, LLaVA-1.5 two with an exact (erf) GELU between them (arXiv 2310.03744, section 3.3).
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from minillava.config import ProjectorConfig
from minillava.kernels.fused_mlp import fused_mlp
from minillava.vit import ACTIVATIONS


class Projector(nn.Module):
    """[..., vision width] -> [..., decoder width]."""

    def __init__(self, config: ProjectorConfig, in_features: int, out_features: int):
        super().__init__()
        self.config = config
        widths = [in_features] + [out_features] * config.layers
        self.linears = nn.ModuleList(nn.Linear(i, o, bias=config.bias) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.linears) == 2:
            first, second = self.linears
            return fused_mlp(x, first.weight, first.bias, second.weight, second.bias, self.config.activation)
        for i, linear in enumerate(self.linears):
            x = linear(ACTIVATIONS[self.config.activation](x) if i else x)
        return x
