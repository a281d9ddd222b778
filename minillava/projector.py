"""The projector: vision features to word embeddings.

LLaVA v1 uses one linear layer, LLaVA-1.5 two with an exact (erf) GELU between them (arXiv 2310.03744, section 3.3),
OneVision-1.5 two over the features of 2 x 2 patches, each normalised (arXiv 2509.23661).
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from minillava.config import ProjectorConfig
from minillava.kernels.fused_mlp import fused_mlp
from minillava.vit import ACTIVATIONS


class Projector(nn.Module):
    """[..., vision width] -> [..., decoder width]; where patches are merged, [P, 1, D] in their order -> [T, 1, D]."""

    def __init__(self, config: ProjectorConfig, in_features: int, out_features: int):
        super().__init__()
        self.config = config
        hidden = out_features
        if config.merge > 1:
            self.norm = nn.LayerNorm(in_features, eps=config.norm_eps)
            in_features = hidden = in_features * config.merge**2
        widths = [in_features] + [hidden] * (config.layers - 1) + [out_features]
        self.linears = nn.ModuleList(nn.Linear(i, o, bias=config.bias) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        if self.config.merge > 1:
            x = self.norm(x).view(-1, 1, self.linears[0].in_features)
        if len(self.linears) == 2:
            first, second = self.linears
            return fused_mlp(x, first.weight, first.bias, second.weight, second.bias, self.config.activation)
        for i, linear in enumerate(self.linears):
            x = linear(ACTIVATIONS[self.config.activation](x) if i else x)
        return x
