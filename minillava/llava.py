"""LLaVA: a vision tower looks, a projector translates, a decoder speaks (Liu et al. 2023, arXiv 2304.08485).

`forward` is the whole model on one screen: embed, see, project, splice, decode. Sequences are packed end to end;
see `minillava.decoder`. Each picture stands in the ids as as many copies of the placeholder as it has visual tokens.

Letters: T tokens, N views of the tower's size, P patches of one, D width, V vocabulary, S supervised positions.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minillava.config import IGNORE, ModelConfig
from minillava.decoder import Decoder
from minillava.errors import UserError
from minillava.kernels.linear_cross_entropy import linear_cross_entropy
from minillava.layers.cache import KVCache
from minillava.projector import Projector, arrange, pool
from minillava.visual_tokens import Span, patch_positions, view_span
from minillava.vit import VisionTower

PATCHES_A_VIEW = 576  # at native size a view of `at_once` is as many patches: those of CLIP-L/336


class LLaVAModel(nn.Module):
    """Tower, projector and decoder of one config; packed sequences in, logits or the summed loss out."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.projector = Projector(config)
        self.decoder = Decoder(config.decoder)

    def under(self, config: ModelConfig) -> LLaVAModel:
        """The same network, with the same weights, under a config that differs in chat or layout."""
        model = copy.copy(self)
        model.config = config
        return model

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Sequence[int] | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        spans: Sequence[Span] = (),
        visual: Sequence[Tensor] = (),
        slots: Sequence[int] | None = None,
        shown: Sequence[int] = (),
        by_sequence: bool = False,
    ) -> Tensor:
        """Logits [T, V], or with labels the sum of the losses over the supervised positions, in float32:
        one sum, or with `by_sequence` that of each sequence, [B].

        `input_ids` is [T] with boundaries `cu_seqlens` (one sequence if None), or [B, T] for B equally long ones.
        `images` is pixels [N, 3, S, S] of all views, in the order of their placeholders; `spans` says which of them are
        one picture or clip, and how (by default each is a picture). `visual` is what `see` made of them, if it did.
        Where `shown` is given, the placeholders are for pictures of these numbers: one may stand in several sequences.
        `labels` holds at each position the id that stands there, or -100; the shift by one happens here. With a cache
        sequence b continues slot `slots[b]` (b if None), and [B, 1] is a decode step, which asks nothing of the host.
        `last_only` keeps the last position of each sequence.
        Raises UserError if placeholders and visual features disagree in number.
        """
        ids_T = input_ids.flatten()
        boundaries = (0, len(ids_T)) if cu_seqlens is None else cu_seqlens
        if input_ids.ndim == 2:
            boundaries = range(0, len(ids_T) + 1, input_ids.shape[1])
        x_TD = self.embed(ids_T)
        if images is not None and len(images):
            visual = self.see(images, spans)
        if shown:
            visual = [visual[number] for number in shown]
        if len(visual):
            x_TD = self.splice(x_TD, ids_T, visual)

        # Only supervised positions go through the end of the last block and the head.
        if labels is not None:
            next_T = next_labels(labels.flatten(), boundaries)
            where_S, next_S = supervised(next_T)
            x_SD = self.decoder(x_TD, boundaries, cache, where_S)
            if by_sequence:
                return losses_of(x_SD, self.decoder.head_weight, next_S, where_S, boundaries)
            return linear_cross_entropy(x_SD, self.decoder.head_weight, next_S)
        if cache is not None and input_ids.shape[1:] == (1,):
            return self.decoder.logits(self.decoder(x_TD, None, cache))
        ends_B = torch.tensor(boundaries[1:], device=x_TD.device) - 1 if last_only else None
        return self.decoder.logits(self.decoder(x_TD, boundaries, cache, ends_B, slots))

    def embed(self, ids_T: Tensor) -> Tensor:
        """Word embeddings [T, D]; a placeholder outside the vocabulary gets those of id 0 until it is replaced."""
        for placeholder in set(self.config.chat.markers.values()):
            if not 0 <= placeholder < self.config.decoder.vocab_size:
                ids_T = ids_T.masked_fill(ids_T == placeholder, 0)
        return self.decoder.embed(ids_T)

    def see(self, images: Tensor, spans: Sequence[Span] = (), at_once: int = 0) -> list[Tensor]:
        """Pixels [N, 3, S, S] of the views -> visual tokens [T, D] of each picture or clip.

        `at_once` bounds the views in one pass of the tower (0: all).
        """
        spans = spans or [view_span(self.config)] * len(images)
        layout, views = self.config.layout, [span.views for span in spans]
        if self.config.vision.rotary:
            parts = self._see_native(images, spans, at_once)
        else:
            seen = [self._look(some) for some in images.split(at_once or len(images))]
            features_NPC = torch.cat(seen) if len(seen) > 1 else seen[0]
            if layout.pool_first and any(span.clip for span in spans):
                pooled = zip(features_NPC.split(views), spans)
                parts = [self.projector(pool(x, layout) if span.clip else x) for x, span in pooled]
            else:
                parts = self.projector(features_NPC).split(views)
        return [arrange(x_NPD, span, layout, self.projector.newline) for x_NPD, span in zip(parts, spans)]

    def _look(self, images: Tensor, *where: Any) -> Tensor:
        """One pass of the tower. One that is frozen runs without building a graph."""
        weight, frozen = self.vision.patch_embedding.weight, not any(p.requires_grad for p in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features_NPC = self.vision(images.to(weight.dtype), *where)
        return features_NPC.to(next(self.projector.parameters()).dtype)

    def _see_native(self, images: Tensor, spans: Sequence[Span], at_once: int) -> Sequence[Tensor]:
        """Towers that take pictures of any size as patches: some windows of them in a pass, or all in one.

        A pass is projected before the next begins: what is held of a long video is its tokens.
        """
        positions_P3 = torch.cat([patch_positions(span, self.config.projector.merge) for span in spans])
        windows = [patches for span in spans for patches in span.windows]
        bounded = at_once and not self.config.vision.strip_slip
        groups = [windows[part] for part in passes(windows, at_once * PATCHES_A_VIEW)] if bounded else [windows]
        sizes = list(map(sum, groups))
        parts = zip(images.split(sizes), positions_P3.split(sizes), groups)
        return torch.cat([self.projector(self._look(*part)) for part in parts]).split([span.tokens for span in spans])

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


def passes(sizes: Sequence[int], most: int, count: int = sys.maxsize) -> list[slice]:
    """Things of these sizes in order, in passes of at most `count` and of at most `most` together; one that is larger
    has a pass of its own."""
    found, start, total = list[slice](), 0, 0
    for at, size in enumerate(sizes):
        if at > start and (total + size > most or at - start == count):
            found.append(slice(start, at))
            start, total = at, 0
        total += size
    return [*found, slice(start, len(sizes))]


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


def losses_of(x_SD: Tensor, weight_VD: Tensor, next_S: Tensor, where_S: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
    """The sum of the losses in each sequence, [B]; the positions `where_S` are in order."""
    ends_B = torch.searchsorted(where_S, torch.tensor(cu_seqlens, device=where_S.device))
    lengths = ends_B.diff().tolist()  # one wait for a GPU, not two
    parts = zip(x_SD.split(lengths), next_S.split(lengths))
    return torch.stack([linear_cross_entropy(x, weight_VD, labels) for x, labels in parts])
