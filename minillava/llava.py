"""LLaVA: a vision tower looks, a projector translates, a decoder speaks (Liu et al. 2023, arXiv 2304.08485).

`forward` is the whole model on one screen: embed, see, project, splice, decode. Sequences are packed end to end;
see `minillava.decoder`. Each picture stands in the ids as as many copies of the placeholder as it has visual tokens.

Letters: T tokens, N views of the tower's size, P patches of one, D width, V vocabulary, S supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minillava.cache import KVCache
from minillava.config import ModelConfig, UserError
from minillava.decoder import Decoder
from minillava.kernels.linear_cross_entropy import linear_cross_entropy
from minillava.layout import Span, view_span
from minillava.projector import Projector, pack, pool
from minillava.vit import VisionTower

IGNORE = -100  # label of a position that is not supervised


class LLaVA(nn.Module):
    """Tower, projector and decoder of one config; packed sequences in, logits or the summed loss out."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.projector = Projector(config)
        self.decoder = Decoder(config.decoder)

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Sequence[int] | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        spans: Sequence[Span] = (),
    ) -> Tensor:
        """Logits [T, V], or with labels the sum of the losses over the supervised positions, in float32.

        `input_ids` is [T] with boundaries `cu_seqlens` (one sequence if None), or [B, T] for B equally long ones.
        `images` is pixels [N, 3, S, S] of all views, in the order of their placeholders; `spans` says which of them are
        one picture or clip, and how (by default each is a picture). `labels` holds at each position the id that
        stands there, or -100; the shift by one happens here. `last_only` keeps the last position of each sequence.
        Raises UserError if placeholders and visual features disagree in number.
        """
        if input_ids.ndim == 2:
            cu_seqlens = range(0, input_ids.numel() + 1, input_ids.shape[1])
        ids_T = input_ids.flatten()
        cu_seqlens = (0, len(ids_T)) if cu_seqlens is None else cu_seqlens

        x_TD = self.embed(ids_T)
        if images is not None and len(images):
            x_TD = self.splice(x_TD, ids_T, self.see(images, spans))

        if labels is not None:
            next_T = next_labels(labels.flatten(), cu_seqlens)
            where_S, next_S = supervised(next_T)
            x_SD = self.decoder(x_TD, cu_seqlens, cache, where_S)
            return linear_cross_entropy(x_SD, self.decoder.head_weight, next_S)
        ends_B = torch.tensor(cu_seqlens[1:], device=x_TD.device) - 1 if last_only else None
        return self.decoder.logits(self.decoder(x_TD, cu_seqlens, cache, ends_B))

    def embed(self, ids_T: Tensor) -> Tensor:
        """Word embeddings [T, D]; a placeholder outside the vocabulary gets those of id 0 until it is replaced."""
        for placeholder in set(self.config.chat.markers.values()):
            if not 0 <= placeholder < self.config.decoder.vocab_size:
                ids_T = ids_T.masked_fill(ids_T == placeholder, 0)
        return self.decoder.embed(ids_T)

    def see(self, images: Tensor, spans: Sequence[Span] = (), at_once: int = 0) -> list[Tensor]:
        """Pixels [N, 3, S, S] of the views -> visual tokens [T, D] of each picture or clip.

        A frozen tower is run without building a graph. `at_once` bounds the views in one pass of the tower.
        """
        layout = self.config.layout
        spans = spans or [view_span(self.config)] * len(images)
        images = images.to(self.vision.patch_embedding.weight.dtype)
        frozen = not any(p.requires_grad for p in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            if self.config.vision.rotary:
                merge, frames = self.config.projector.merge, [span.frames for span in spans]
                if at_once and not self.config.vision.strip_slip:  # frames do not see each other
                    frames = [(1, rows, columns) for count, rows, columns in frames for _ in range(count)]
                    parts = images.split([rows * columns for _, rows, columns in frames])
                    seen = [self.vision(part, [frame], merge) for part, frame in zip(parts, frames)]
                else:
                    seen = [self.vision(images, frames, merge)]
            else:
                seen = [self.vision(some) for some in images.split(at_once or len(images))]
            features_NPC = torch.cat(seen) if len(seen) > 1 else seen[0]
        features_NPC = features_NPC.to(next(self.projector.parameters()).dtype)
        if self.config.vision.rotary:
            return list(self.projector(features_NPC).flatten(0, 1).split([span.tokens for span in spans]))
        views = [span.views for span in spans]
        if not any(span.clip for span in spans):
            parts = self.projector(features_NPC).split(views)
        elif layout.pool_first:
            pooled = (pool(x, layout) if s.clip else x for x, s in zip(features_NPC.split(views), spans))
            parts = [self.projector(x_NPC) for x_NPC in pooled]
        else:
            projected = self.projector(features_NPC).split(views)
            parts = [pool(x, layout) if s.clip else x for x, s in zip(projected, spans)]
        return [pack(x_NPD, span, layout, self.projector.newline) for x_NPD, span in zip(parts, spans)]

    def splice(self, x_TD: Tensor, ids_T: Tensor, visual: Sequence[Tensor]) -> Tensor:
        """Put the visual tokens [T, D] of each picture and clip where the placeholders are, in this order."""
        where = torch.isin(ids_T, ids_T.new_tensor(list(self.config.chat.markers.values()))).nonzero().squeeze(1)
        visual_TD = torch.cat(list(visual))
        if len(where) != len(visual_TD):
            raise UserError(
                f"the prompt has {len(where)} image placeholders, the pictures give {len(visual_TD)} visual tokens"
            )
        return x_TD.index_copy(0, where, visual_TD.to(x_TD.dtype))

    def init_weights(self, seed: int) -> None:
        """Random normal weights for training from nothing; outputs into the residual are scaled by depth (GPT-2).

        The deviation is 0.02 in the tower, as in CLIP, and fan_in ** -0.5 elsewhere: 0.02 fits widths near 2500, and a
        narrow decoder that starts with it hardly attends.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if "norm" in name:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                in_tower = name.startswith("vision")
                std = 0.02 if in_tower else p.shape[-1] ** -0.5
                if name.endswith(("attn.out.weight", "mlp.down.weight", "mlp.down", "mlp.fc2.weight")):
                    std /= (2 * len(self.vision.blocks if in_tower else self.decoder.blocks)) ** 0.5
                with torch.no_grad():
                    p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=generator))


def next_labels(labels_T: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
    """Shift labels so that position t holds the label of t + 1; the last of each sequence predicts nothing."""
    next_T = torch.cat([labels_T[1:], labels_T.new_full((1,), IGNORE)])
    next_T[torch.tensor(cu_seqlens[1:], device=labels_T.device) - 1] = IGNORE
    return next_T


def supervised(next_T: Tensor) -> tuple[Tensor, Tensor]:
    """The positions that have a label, and the labels. Their number is rounded up to a multiple of 64 by repeating the
    last one without its label: a new number in every step would make oneDNN compile all of the last block's products.
    """
    where_S = (next_T != IGNORE).nonzero().squeeze(1)
    more = -len(where_S) % 64
    labels_S = torch.cat([next_T[where_S], next_T.new_full((more,), IGNORE)])
    return torch.cat([where_S, where_S[-1:].expand(more)]), labels_S
