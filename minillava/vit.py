"""The vision tower: one class for CLIP (Radford et al. 2021, arXiv 2103.00020) and its relatives.

Towers differ in `VisionConfig`, not in classes. What comes out are hidden states *before* any final norm, because
LLaVA reads the features of the second to last block.

Letters: N views, C channels, S side in pixels, T tokens (patches, and the class token), D width, H heads, K head size,
P patches of all pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.config import VisionConfig
from minillava.decoder import cos_sin, rotate
from minillava.kernels import pointwise_cpu
from minillava.kernels.attention import attention


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation x * sigmoid(1.702 x)."""
    y = pointwise_cpu.quick_gelu(x)
    return x * torch.sigmoid(1.702 * x) if y is None else y


Segments = tuple[Sequence[int], Tensor, Tensor]  # boundaries of packed frames; cos and sin of their tokens, [T, 1, K]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def patch_positions(height: int, width: int, merge: int) -> Tensor:
    """Row and column [P, 2] of the patches of a height x width map, block by block: those that become one token."""
    at_HW = torch.arange(height * width).view(height // merge, merge, width // merge, merge).transpose(1, 2).flatten()
    return torch.stack([at_HW // width, at_HW % width], dim=1)


class Attention(nn.Module):
    """Bidirectional self-attention over all tokens of a view, or of each packed frame where there are `segments`."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.hidden_size, config.hidden_size)
        self.k = nn.Linear(config.hidden_size, config.hidden_size)
        self.v = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_NTD: Tensor, segments: Segments | None = None) -> Tensor:
        N, T, _ = x_NTD.shape
        q, k, v = (proj(x_NTD).view(N * T, self.num_heads, -1) for proj in (self.q, self.k, self.v))
        cu_seqlens: Sequence[int] = range(0, N * T + 1, T)
        if segments is not None:
            cu_seqlens, *rotary = segments
            wide = rotary[0].dtype
            q, k = (rotate(x.to(wide), *rotary).to(x.dtype) for x in (q, k))
        o = attention(q, k, v, cu_seqlens, causal=False)
        return self.out(o.reshape(N, T, -1))


class MLP(nn.Module):
    """Two linear layers with the tower's activation between them, [N, T, D] -> [N, T, D]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_NTD: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_NTD)))


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to its input, [N, T, D] -> [N, T, D]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_NTD: Tensor, segments: Segments | None = None) -> Tensor:
        return self.after(x_NTD, self.attn(self.norm1(x_NTD), segments))

    def after(self, x_NTD: Tensor, seen_NTD: Tensor) -> Tensor:
        """The block behind its attention."""
        x_NTD = x_NTD + seen_NTD
        return x_NTD + self.mlp(self.norm2(x_NTD))


class VisionTower(nn.Module):
    """Patches, positions and blocks; the final norm, which checkpoints have, LLaVA does not run."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        D = config.hidden_size
        if config.class_token:
            self.class_embedding = nn.Parameter(torch.empty(D))
        self.patch_embedding = nn.Conv2d(3, D, config.patch_size, config.patch_size, bias=config.patch_bias)
        if config.rotary:
            self.class_angles = nn.Parameter(torch.empty(1, D // config.num_heads // 2))  # learned, in radians
        else:
            self.position_embedding = nn.Embedding(config.num_patches + config.class_token, D)
        if config.pre_norm:
            self.pre_norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        if not config.rotary:  # CLIP's own head reads through it; LLaVA never does
            self.post_norm = nn.LayerNorm(D, eps=config.norm_eps)

    def embed(self, pixels_NCSS: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Patches, class token and positions -> hidden state 0, [N, T, D].

        With `lengths`, the patches of each frame, the views are single patches: [1, T, D] for all frames together.
        """
        S = self.config.image_size
        if pixels_NCSS.ndim != 4 or pixels_NCSS.shape[1:] != (3, S, S):
            raise ValueError(f"the tower takes pixels of shape [N, 3, {S}, {S}], got {list(pixels_NCSS.shape)}")
        conv, p = self.patch_embedding, self.config.patch_size
        # Its windows do not overlap, so it is a product; oneDNN's convolution takes ten times as long (bf16, training).
        patches = pixels_NCSS.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5)
        patches_NPC = patches.reshape(len(pixels_NCSS), -1, conv.weight[0].numel())
        x_NTD = F.linear(patches_NPC, conv.weight.flatten(1), conv.bias)
        if self.config.rotary:
            x_NTD = _with_class(x_NTD.flatten(0, 1), self.class_embedding[None], lengths)[None]
            return self.pre_norm(x_NTD)
        if self.config.class_token:
            x_NTD = torch.cat([self.class_embedding.to(x_NTD.dtype).expand(len(x_NTD), 1, -1), x_NTD], dim=1)
        x_NTD = x_NTD + self.position_embedding.weight
        return self.pre_norm(x_NTD) if self.config.pre_norm else x_NTD

    def forward(self, pixels_NCSS: Tensor, grids: Sequence[tuple[int, int, int]] = (), merge: int = 1) -> Tensor:
        """Pixels [N, 3, S, S] -> features [N, P, D * selected layers], in the order of `select_layers`.

        A rotary tower takes patches in the order of `patch_positions`, and (frames, rows, columns) of each picture:
        [N, 3, patch, patch] -> [N, 1, ...]. Frames do not see each other.
        """
        cfg = self.config
        lengths = [rows * columns for frames, rows, columns in grids for _ in range(frames)]
        segments = self.segments(grids, merge, pixels_NCSS) if cfg.rotary else None
        wanted = [layer % (cfg.num_layers + 1) for layer in cfg.select_layers]
        x_NTD = self.embed(pixels_NCSS, lengths)
        states = {0: x_NTD}
        for i, block in enumerate(self.blocks[: cfg.layers_run], start=1):
            x_NTD = block(x_NTD, segments)
            if i in wanted:
                states[i] = x_NTD
        features_NTD = torch.cat([states[i] for i in wanted], dim=-1)
        if segments is None:
            return features_NTD[:, 1 if cfg.class_token and not cfg.keep_class_token else 0 :]
        if cfg.strip_slip:
            return features_NTD[0, 1 : 1 + sum(lengths), None]
        starts = torch.tensor(segments[0][:-1], device=x_NTD.device)
        patches_T = torch.ones(x_NTD.shape[1], dtype=torch.bool, device=x_NTD.device).index_fill(0, starts, False)
        return features_NTD[0, patches_T, None]

    def segments(self, grids: Sequence[tuple[int, int, int]], merge: int, like: Tensor) -> Segments:
        """Boundaries of the frames, class tokens included, and the rotary tables of their tokens.

        An axis has half of the frequencies; angles are float32's. The class token's angles are learned.
        """
        half = self.class_angles.shape[1] // 2
        frequency_F = 1 / 10000 ** (torch.arange(half, dtype=torch.float32, device=like.device) / half)
        places = [patch_positions(rows, columns, merge).repeat(frames, 1) for frames, rows, columns in grids]
        angles_PA = (torch.cat(places).to(like.device)[:, :, None] * frequency_F).flatten(1)
        lengths = [rows * columns for frames, rows, columns in grids for _ in range(frames)]
        angles_TA = _with_class(angles_PA, self.class_angles.to(angles_PA.dtype), lengths)
        boundaries = list(accumulate((n + 1 for n in lengths), initial=0))
        return boundaries, *cos_sin(angles_TA, torch.promote_types(like.dtype, torch.float32))


def _with_class(x_PD: Tensor, class_1D: Tensor, lengths: Sequence[int]) -> Tensor:
    """Put a row in front of each so many rows of x."""
    return torch.cat([part for x in x_PD.split(list(lengths)) for part in (class_1D.to(x.dtype), x)])
