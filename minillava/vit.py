"""The vision tower: one class for CLIP (Radford et al. 2021, arXiv 2103.00020) and its relatives.

Towers differ in `VisionConfig`, not in classes. What comes out are hidden states *before* any final norm, because
LLaVA reads the features of the second to last block.

Letters: N views, C channels, S side in pixels, T tokens (patches, and the class token), D width, H heads, K head size,
P patches of all pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from minillava.config import VisionConfig
from minillava.kernels.attention import attention
from minillava.kernels.cpu.product import linear
from minillava.layers.activations import ACTIVATIONS
from minillava.layers.linear import Linear
from minillava.layers.rotary import cos_sin, rotate

Context = tuple[Sequence[int], Tensor, Tensor]  # boundaries of packed windows; cos and sin of their tokens, [T, 1, K]


def make_norm(config: VisionConfig) -> nn.Module:
    """A norm of the tower's width."""
    return (nn.RMSNorm if config.norm == "rms" else nn.LayerNorm)(config.hidden_size, eps=config.norm_eps)


class Attention(nn.Module):
    """Bidirectional self-attention over all tokens of a view, or of each window where there is a `context`."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads, self.pairs = config.num_heads, config.rotary_pairs
        self.q = Linear(config.hidden_size, config.hidden_size)
        self.k = Linear(config.hidden_size, config.hidden_size)
        self.v = Linear(config.hidden_size, config.hidden_size)
        self.out = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_NTD: Tensor, context: Context | None = None) -> Tensor:
        N, T, _ = x_NTD.shape
        q, k, v = (proj(x_NTD).view(N * T, self.num_heads, -1) for proj in (self.q, self.k, self.v))
        cu_seqlens: Sequence[int] = range(0, N * T + 1, T)
        if context is not None:
            cu_seqlens, *rotary = context
            wide = rotary[0].dtype
            if self.pairs:  # scores do not mind the order of channels: even ones first, then a pair is one of halves
                q, k = (x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for x in (q, k))
            q, k = (rotate(x.to(wide), *rotary).to(x.dtype) for x in (q, k))
        o = attention(q, k, v, cu_seqlens, causal=False)
        return self.out(o.reshape(N, T, -1))


class MLP(nn.Module):
    """Two linear layers with the tower's activation between them, [N, T, D] -> [N, T, D]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_NTD: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_NTD)))


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to its input, [N, T, D] -> [N, T, D]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config)
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x_NTD: Tensor, context: Context | None = None) -> Tensor:
        return self.after(x_NTD, self.attn(self.norm1(x_NTD), context))

    def after(self, x_NTD: Tensor, seen_NTD: Tensor) -> Tensor:
        """The block behind its attention; training compiles it by name."""
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
        if config.rotary and config.class_token:
            self.class_angles = nn.Parameter(torch.empty(1, D // config.num_heads // 2))  # learned, in radians
        if not config.rotary:
            self.position_embedding = nn.Embedding(config.num_patches + config.class_token, D)
        if config.pre_norm:
            self.pre_norm = make_norm(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        if not config.rotary or config.final_norm:  # CLIP's own head reads through it; LLaVA never does
            self.post_norm = make_norm(config)

    def embed(self, pixels_NCSS: Tensor, windows: Sequence[int] = ()) -> Tensor:
        """Patches, class token and positions -> hidden state 0, [N, T, D].

        With `windows`, the patches that see each other, the views are single patches: [1, T, D] for all together.
        """
        S = self.config.image_size
        if pixels_NCSS.ndim != 4 or pixels_NCSS.shape[1:] != (3, S, S):
            raise ValueError(f"the tower takes pixels of shape [N, 3, {S}, {S}], got {list(pixels_NCSS.shape)}")
        conv, p = self.patch_embedding, self.config.patch_size
        # Its windows do not overlap, so it is a product; oneDNN's convolution takes ten times as long (bf16, training).
        patches = pixels_NCSS.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5)
        patches_NPC = patches.reshape(len(pixels_NCSS), -1, conv.weight[0].numel())
        x_NTD = linear(patches_NPC, conv.weight.flatten(1), conv.bias)
        if self.config.rotary:
            x_TD = x_NTD.flatten(0, 1)
            x_TD = _with_class(x_TD, self.class_embedding[None], windows) if self.config.class_token else x_TD
            return self.pre_norm(x_TD[None])
        if self.config.class_token:
            x_NTD = torch.cat([self.class_embedding.to(x_NTD.dtype).expand(len(x_NTD), 1, -1), x_NTD], dim=1)
        x_NTD = x_NTD + self.position_embedding.weight
        return self.pre_norm(x_NTD) if self.config.pre_norm else x_NTD

    def forward(self, pixels_NCSS: Tensor, positions_P3: Tensor | None = None, windows: Sequence[int] = ()) -> Tensor:
        """Pixels [N, 3, S, S] -> features [N, P, D * selected layers], in the order of `select_layers`.

        A rotary tower takes patches [P, 3, patch, patch] -> [P, 1, ...], the frame, row and column of each, and how
        many see each other (`windows` of consecutive ones).
        """
        cfg = self.config
        context = None if positions_P3 is None else self.context(positions_P3, windows, pixels_NCSS)
        wanted = [layer % (cfg.num_layers + 1) for layer in cfg.select_layers]
        x_NTD = self.embed(pixels_NCSS, windows)
        states = {0: x_NTD}
        for i, block in enumerate(self.blocks[: max(wanted)], start=1):
            x_NTD = block(x_NTD, context)
            if i in wanted:
                states[i] = x_NTD
        if cfg.final_norm:
            states[cfg.num_layers] = self.post_norm(states[cfg.num_layers])
        features_NTD = torch.cat([states[i] for i in wanted], dim=-1)
        if context is None:
            return features_NTD[:, 1 if cfg.class_token and not cfg.keep_class_token else 0 :]
        if not cfg.class_token:
            return features_NTD[0, :, None]
        if cfg.strip_slip:
            return features_NTD[0, 1 : 1 + sum(windows), None]
        starts = torch.tensor(context[0][:-1], device=x_NTD.device)
        patches_T = torch.ones(x_NTD.shape[1], dtype=torch.bool, device=x_NTD.device).index_fill(0, starts, False)
        return features_NTD[0, patches_T, None]

    def context(self, positions_P3: Tensor, windows: Sequence[int], like: Tensor) -> Context:
        """Boundaries of the windows, class tokens included, and the rotary tables of their tokens.

        Each axis has its share of the frequencies, from 1 down to 1 / theta; angles are float32's. The class token's
        angles are learned.
        """
        cfg = self.config
        half = cfg.hidden_size // cfg.num_heads // 2
        sizes = [half * share // sum(cfg.rotary_shares) for share in cfg.rotary_shares]
        steps = [torch.arange(size, dtype=torch.float32, device=like.device) / size for size in sizes]
        axes = positions_P3.to(like.device, torch.float32).unbind(1)
        angles_TA = torch.cat([at_P[:, None] * (1 / cfg.rotary_theta**step_F) for at_P, step_F in zip(axes, steps)], 1)
        if cfg.class_token:
            angles_TA = _with_class(angles_TA, self.class_angles.to(angles_TA.dtype), windows)
        boundaries = list(accumulate((n + cfg.class_token for n in windows), initial=0))
        return boundaries, *cos_sin(angles_TA, torch.promote_types(like.dtype, torch.float32), cfg.rotary_pairs)


def _with_class(x_PD: Tensor, class_1D: Tensor, lengths: Sequence[int]) -> Tensor:
    """Put a row in front of each so many rows of x."""
    return torch.cat([part for x in x_PD.split(list(lengths)) for part in (class_1D.to(x.dtype), x)])
