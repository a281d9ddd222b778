"""The projector: vision features to word embeddings; and how those of several views become one sequence.

LLaVA v1 uses one linear layer, LLaVA-1.5 two with an exact (erf) GELU between them (arXiv 2310.03744, section 3.3),
OneVision-1.5 two over the features of 2 x 2 patches, each normalised (arXiv 2509.23661).
Letters: N views, P patches of one, C channels, D width, H rows and W columns of a map of patches, T tokens.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.config import LayoutConfig, ModelConfig
from minillava.kernels.fused_mlp import fused_mlp
from minillava.layers.activations import ACTIVATIONS
from minillava.visual_tokens import Span


class Projector(nn.Module):
    """[..., vision width] -> [..., decoder width]; where patches are merged, [P, 1, D] in their order -> [T, 1, D]."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.config = config = model.projector
        in_features = model.vision.hidden_size * len(model.vision.select_layers)
        out_features = hidden = model.decoder.hidden_size
        if config.merge > 1:
            self.norm = nn.LayerNorm(in_features, eps=config.norm_eps)
            in_features = hidden = in_features * config.merge**2
        widths = [in_features] + [hidden] * (config.layers - 1) + [out_features]
        self.linears = nn.ModuleList(nn.Linear(i, o, bias=config.bias) for i, o in pairwise(widths))
        newline = model.layout.merge == "unpad"
        # Learned, behind the rows of a map. Here so that it is trained with the projector; the original counts it as
        # part of the language model.
        self.newline = nn.Parameter(torch.randn(out_features) * out_features**-0.5) if newline else None

    def forward(self, x: Tensor) -> Tensor:
        if self.config.merge > 1:
            x = self.norm(x).view(-1, 1, self.linears[0].in_features)
        plain = all(isinstance(linear, nn.Linear) and not hasattr(linear, "lora_A") for linear in self.linears)
        if plain and len(self.linears) == 2:
            first, second = self.linears
            return fused_mlp(x, first.weight, first.bias, second.weight, second.bias, self.config.activation)
        for i, linear in enumerate(self.linears):
            x = linear(ACTIVATIONS[self.config.activation](x) if i else x)
        return x


def pool(x_NPC: Tensor, layout: LayoutConfig) -> Tensor:
    """Fewer patches a frame: stride x stride of them become one."""
    side = math.isqrt(x_NPC.shape[1])
    x_NCHW = x_NPC.transpose(1, 2).unflatten(2, (side, side))
    if layout.video_pool == "bilinear":
        x_NCHW = F.interpolate(x_NCHW, size=[-(-side // layout.video_stride)] * 2, mode="bilinear")
    else:
        reduce = F.avg_pool2d if layout.video_pool == "average" else F.max_pool2d
        x_NCHW = reduce(x_NCHW, layout.video_stride)
    return x_NCHW.flatten(2).transpose(1, 2)


def arrange(x_NPD: Tensor, span: Span, layout: LayoutConfig, newline_D: Tensor | None) -> Tensor:
    """Projected features of the views of one picture or clip -> its visual tokens [T, D].

    Base view first, then the map of its tiles; see `LayoutConfig` for where the newline goes.
    """

    def ended(x_NTD: Tensor) -> Tensor:
        """The newline behind each of N sequences."""
        assert newline_D is not None
        return torch.cat([x_NTD, newline_D.to(x_NTD.dtype).expand(len(x_NTD), 1, -1)], dim=1)

    if span.clip and not span.native:
        x_NPD = x_NPD if layout.pool_first else pool(x_NPD, layout)
        if layout.video_newline == "grid":
            x_NPD = ended(x_NPD.unflatten(1, (span.height, span.width)).flatten(0, 1))
        elif layout.video_newline == "frame":
            x_NPD = ended(x_NPD)
        elif layout.video_newline == "one_token":
            x_NPD = ended(x_NPD.flatten(0, 1)[None])
        return x_NPD.flatten(0, 1)
    if not span.rows:
        return (ended(x_NPD) if layout.merge == "unpad" else x_NPD).flatten(0, 1)
    if layout.merge == "flat":
        return x_NPD.flatten(0, 1)
    side = math.isqrt(x_NPD.shape[1])
    tiles = x_NPD[1:].unflatten(0, (span.rows, span.columns)).unflatten(2, (side, side))
    map_HWD = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    H, W, _ = map_HWD.shape
    map_HWD = map_HWD[span.top : H - span.top, span.left : W - span.left]
    if map_HWD.shape[:2] != (span.height, span.width):
        map_DHW = map_HWD.permute(2, 0, 1)
        map_HWD = F.interpolate(map_DHW[None], size=(span.height, span.width), mode="bilinear")[0].permute(1, 2, 0)
    return torch.cat([x_NPD[0], (ended(map_HWD) if layout.merge == "unpad" else map_HWD).flatten(0, 1)])
