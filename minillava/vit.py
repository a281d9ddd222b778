"""The vision tower: one class for CLIP (Radford et al. 2021, arXiv 2103.00020) and its relatives.

Towers differ in `VisionConfig`, not in classes. What comes out are hidden states *before* any final norm, because
LLaVA reads the features of the second to last block.

Letters: N images, C channels, S side in pixels, T tokens (patches, and the class token), D width, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.config import VisionConfig
from minillava.kernels.attention import attention


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Attention(nn.Module):
    """Bidirectional self-attention over all tokens of an image."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.hidden_size, config.hidden_size)
        self.k = nn.Linear(config.hidden_size, config.hidden_size)
        self.v = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_NTD: Tensor) -> Tensor:
        N, T, _ = x_NTD.shape
        q, k, v = (proj(x_NTD).view(N * T, self.num_heads, -1) for proj in (self.q, self.k, self.v))
        o = attention(q, k, v, range(0, N * T + 1, T), causal=False)
        return self.out(o.reshape(N, T, -1))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_NTD: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_NTD)))


class Block(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_NTD: Tensor) -> Tensor:
        x_NTD = x_NTD + self.attn(self.norm1(x_NTD))
        return x_NTD + self.mlp(self.norm2(x_NTD))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        D = config.hidden_size
        if config.class_token:
            self.class_embedding = nn.Parameter(torch.empty(D))
        self.patch_embedding = nn.Conv2d(3, D, config.patch_size, config.patch_size, bias=config.patch_bias)
        self.position_embedding = nn.Embedding(config.num_patches + config.class_token, D)
        if config.pre_norm:
            self.pre_norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.post_norm = nn.LayerNorm(D, eps=config.norm_eps)  # CLIP's own head reads through it; LLaVA never does

    def embed(self, pixels_NCSS: Tensor) -> Tensor:
        """Patches, class token and positions -> hidden state 0, [N, T, D]."""
        S = self.config.image_size
        if pixels_NCSS.ndim != 4 or pixels_NCSS.shape[1:] != (3, S, S):
            raise ValueError(f"the tower takes pixels of shape [N, 3, {S}, {S}], got {list(pixels_NCSS.shape)}")
        conv, p = self.patch_embedding, self.config.patch_size
        # Its windows do not overlap, so it is a product; oneDNN's convolution takes ten times as long (bf16, training).
        patches = pixels_NCSS.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5)
        patches_NPC = patches.reshape(len(pixels_NCSS), -1, conv.weight[0].numel())
        x_NTD = F.linear(patches_NPC, conv.weight.flatten(1), conv.bias)
        if self.config.class_token:
            x_NTD = torch.cat([self.class_embedding.to(x_NTD.dtype).expand(len(x_NTD), 1, -1), x_NTD], dim=1)
        x_NTD = x_NTD + self.position_embedding.weight
        return self.pre_norm(x_NTD) if self.config.pre_norm else x_NTD

    def forward(self, pixels_NCSS: Tensor) -> Tensor:
        """Pixels [N, 3, S, S] -> features [N, P, D * selected layers], in the order of `select_layers`."""
        cfg = self.config
        wanted = [layer % (cfg.num_layers + 1) for layer in cfg.select_layers]
        x_NTD = self.embed(pixels_NCSS)
        states = {0: x_NTD}
        for i, block in enumerate(self.blocks[: cfg.layers_run], start=1):
            x_NTD = block(x_NTD)
            if i in wanted:
                states[i] = x_NTD
        drop = 1 if cfg.class_token and not cfg.keep_class_token else 0
        return torch.cat([states[i][:, drop:] for i in wanted], dim=-1)
