"""Which tensor is which: one table per foreign layout, read in both directions; and what a set of files lacks.

Strict: every tensor of a checkpoint is used once or is on `EXTRAS`, every parameter is filled once, and shapes are
compared before memory is taken; what does not fit is listed in one error.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minillava.config import UserError
from minillava.quantize import COMPANION, quant_state
from minillava.tensor_files import Stored, read

Row = tuple[str, str]  # (foreign name, our name)

# <n> is a number, <p> is "weight" or "bias", <a|b> a choice: the same on either side. [x] is left out by some writers.
TOWER: tuple[Row, ...] = (
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.patch_embedding.<p>", "patch_embedding.<p>"),
    ("embeddings.position_embedding.weight", "position_embedding.weight"),
    ("pre_layrnorm.<p>", "pre_norm.<p>"),  # that misspelling is the real name
    ("encoder.layers.<n>.layer_norm<1|2>.<p>", "blocks.<n>.norm<1|2>.<p>"),
    ("encoder.layers.<n>.self_attn.<q|k|v|out>_proj.<p>", "blocks.<n>.attn.<q|k|v|out>.<p>"),
    ("encoder.layers.<n>.mlp.fc<1|2>.<p>", "blocks.<n>.mlp.fc<1|2>.<p>"),
    ("post_layernorm.<p>", "post_norm.<p>"),
)
DECODER: tuple[Row, ...] = (
    ("embed_tokens.weight", "embed.weight"),
    ("layers.<n>.input_layernorm.weight", "blocks.<n>.attn_norm.weight"),
    ("layers.<n>.post_attention_layernorm.weight", "blocks.<n>.mlp_norm.weight"),
    ("layers.<n>.self_attn.<q|k|v>_proj.<p>", "blocks.<n>.attn.<q|k|v>.<p>"),
    ("layers.<n>.self_attn.o_proj.weight", "blocks.<n>.attn.out.weight"),
    ("layers.<n>.self_attn.<q|k>_norm.weight", "blocks.<n>.attn.<q|k>_norm.weight"),
    ("layers.<n>.mlp.<gate|up|down>_proj.weight", "blocks.<n>.mlp.<gate|up|down>.weight"),
    ("layers.<n>.mlp.gate.weight", "blocks.<n>.mlp.router.weight"),
    ("layers.<n>.mlp.experts.<n>.<gate|up|down>_proj.weight", "blocks.<n>.mlp.experts.<n>.<gate|up|down>"),
    ("norm.weight", "norm.weight"),
)
RICE: tuple[Row, ...] = (
    ("class_embedding", "class_embedding"),
    ("class_pos_emb", "class_angles"),
    ("patch_embed.proj.weight", "patch_embedding.weight"),
    ("pre_layernorm.<p>", "pre_norm.<p>"),
    ("blocks.<n>.norm<1|2>.<p>", "blocks.<n>.norm<1|2>.<p>"),
    ("blocks.<n>.attn.qkv.<p>", "blocks.<n>.attn.qkv.<p>"),  # three of ours: FUSED
    ("blocks.<n>.attn.proj.<p>", "blocks.<n>.attn.out.<p>"),
    ("blocks.<n>.mlp.fc<1|2>.<p>", "blocks.<n>.mlp.fc<1|2>.<p>"),
)
MERGER: tuple[Row, ...] = (
    ("ln_q.<p>", "norm.<p>"),
    ("mlp.0.<p>", "linears.0.<p>"),
    ("mlp.2.<p>", "linears.1.<p>"),
)


def _under(foreign: str, ours: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple((foreign + a, ours + b) for a, b in rows)


# Two linear layers in transformers; a third is written only by us.
_LINEARS = tuple((f"linear_{i + 1}.<p>", f"linears.{i}.<p>") for i in range(8))
# A Sequential, whose odd members are GELUs; the single layer of v1 is not in a Sequential.
_SEQUENTIAL = (("[0.]<p>", "linears.0.<p>"), *((f"{2 * i}.<p>", f"linears.{i}.<p>") for i in range(1, 8)))
LAYOUTS: dict[str, tuple[Row, ...]] = {
    "hf": (  # transformers before 4.52, and what every later one writes; our own
        *_under("vision_tower.[vision_model.]", "vision.", TOWER),
        *_under("multi_modal_projector.", "projector.", _LINEARS),
        ("image_newline", "projector.newline"),
        *_under("language_model.model.", "decoder.", DECODER),
        ("language_model.lm_head.weight", "decoder.head.weight"),
    ),
    "hf_new": (  # the module tree of transformers 4.52 and later
        *_under("model.vision_tower.[vision_model.]", "vision.", TOWER),
        *_under("model.multi_modal_projector.", "projector.", _LINEARS),
        ("model.image_newline", "projector.newline"),
        *_under("model.language_model.", "decoder.", DECODER),
        ("lm_head.weight", "decoder.head.weight"),
    ),
    "original": (  # haotian-liu/LLaVA; without tower and projector, any LLaMA-like language model
        *_under("model.vision_tower.vision_tower.[vision_model.]", "vision.", TOWER),
        *_under("model.mm_projector.", "projector.", _SEQUENTIAL),
        ("model.image_newline", "projector.newline"),
        *_under("model.", "decoder.", DECODER),
        ("lm_head.weight", "decoder.head.weight"),
    ),
    "tower": _under("[vision_model.]", "vision.", TOWER),  # CLIP or SigLIP on its own
    "onevision_1_5": (  # as its files have it
        *_under("visual.", "vision.", RICE),
        *_under("visual.merger.", "projector.", MERGER),
        *_under("model.", "decoder.", DECODER),
        ("lm_head.weight", "decoder.head.weight"),
    ),
    "onevision_1_5_tree": (  # as its module tree has it
        *_under("model.visual.", "vision.", RICE),
        *_under("model.visual.merger.", "projector.", MERGER),
        *_under("model.language_model.", "decoder.", DECODER),
        ("lm_head.weight", "decoder.head.weight"),
    ),
}
# Tensors that carry no weight of ours: buffers that old writers saved; SigLIP's pooling head, which LLaVA does without.
EXTRAS = (
    r"(.*\.)?(rotary_emb\.inv_freq|embeddings\.position_ids)"
    r"|(.*vision_tower\.)?(vision_model\.)?head\.(probe|attention|layernorm|mlp)\b.*"
)
TOWER_EXTRAS = EXTRAS + r"|text_model\..*|(text|visual)_projection\.weight|logit_(scale|bias)"  # the text half of CLIP
# Never run by LLaVA, and so left out of some checkpoints; then they are what an untrained norm is.
OPTIONAL = {"vision.post_norm.weight": 1.0, "vision.post_norm.bias": 0.0}


@functools.cache
def _parts(template: str) -> tuple[str, ...]:
    return tuple(p for p in re.split(r"(<.*?>|\[.*?\])", template) if p)


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    def regex(part: str) -> str:
        if part[0] == "[":
            return f"(?:{re.escape(part[1:-1])})?"
        return (
            "(" + {"<n>": r"\d+", "<p>": "weight|bias"}.get(part, part[1:-1]) + ")"
            if part[0] == "<"
            else re.escape(part)
        )

    return re.compile("".join(map(regex, _parts(template))))


def rename(name: str, layout: str, to_ours: bool) -> str | None:
    """A tensor's name on the other side of a layout's table, or None if the table does not know it."""
    for row in LAYOUTS[layout]:
        source, target = row if to_ours else reversed(row)
        match = _pattern(source).fullmatch(name)
        if match:
            groups = iter(match.groups())
            return "".join(next(groups) if p[0] == "<" else p.strip("[]") for p in _parts(target))
    return None


FUSED = ".attn.qkv."  # RICE's files hold q, k and v one above the other
EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(gate|up|down)")  # one of those stacked in the parameter \1.\3


def to_files(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """A state dict under a layout's names: experts apart, q, k and v of the tower together where files have them so."""
    apart = unstack(state)
    if "onevision" in layout:
        for name in [n for n in apart if n.startswith("vision.") and ".attn.q." in n]:
            fused = name.replace(".attn.q.", FUSED)
            apart[fused] = torch.cat([apart.pop(part) for part in _apart(fused)])
    return {rename(name, layout, to_ours=False) or name: tensor for name, tensor in apart.items()}


def _apart(name: str) -> list[str]:
    """Our names for what a file has under one name."""
    return [name.replace(FUSED, f".attn.{part}.") for part in "qkv"] if FUSED in name else [name]


def unstack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacked parameters of routed experts taken apart, as files hold them: one matrix an expert."""
    apart: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part, _, kind = name.rpartition(".")
        stacked = part.endswith(".mlp") and kind in ("gate", "up", "down")
        apart |= {f"{part}.experts.{e}.{kind}": tensor[e] for e in range(len(tensor))} if stacked else {name: tensor}
    return apart


# ---- which tensor goes where ----


@dataclass
class Plan:
    """Where every parameter comes from, and what is wrong with that."""

    source: dict[str, Stored] = field(default_factory=dict)  # by our name
    companions: dict[str, dict[str, Stored]] = field(default_factory=dict)  # of weights in four bits, by our name
    layout: dict[str, str] = field(default_factory=dict)  # of vision, projector and decoder, for messages
    extra: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)

    def add(self, tensors: dict[str, Stored], layout: str, override: bool = False) -> None:
        """Match a layout's tensors with our names; with `override` they take the places of those that were there."""
        known = TOWER_EXTRAS if layout == "tower" else EXTRAS
        for foreign, stored in tensors.items():
            companion = COMPANION.fullmatch(foreign)
            name = rename(companion[1] if companion else foreign, layout, to_ours=True)
            if companion and name:
                for one in _apart(name):
                    self.companions.setdefault(one, {})[companion[2]] = stored
                continue
            if name is None:
                self.extra += [] if re.fullmatch(known, foreign) else [foreign]
                continue
            parts = {name: stored}
            if FUSED in name:
                shape = (stored.shape[0] // 3, *stored.shape[1:]) if stored.shape else ()
                shares = [dataclasses.replace(stored, shape=shape, share=(i, 3)) for i in range(3)]
                parts = dict(zip(_apart(name), shares))
            if self.source.keys() & parts.keys() and not override:
                self.twice.append(foreign)
            self.source |= parts
            self.layout[name.split(".")[0]] = layout

    def has(self, part: str) -> bool:
        """Whether there is anything whose name begins so."""
        return any(name.startswith(part) for name in self.source)

    def read_companions(self, name: str) -> dict[str, Tensor]:
        """What belongs to a weight in four bits, by the companion's name."""
        parts = self.companions[name]
        return {part: tensor.clone() for part, tensor in zip(parts, read(parts.values()))}

    def check(self, where: str, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raise one UserError that lists everything missing, extra, doubled or misshapen."""
        theirs = self.layout.get("decoder", "hf")
        foreign = {n: rename(n, self.layout.get(n.split(".")[0], theirs), to_ours=False) or n for n in wanted}
        missing = [foreign[n] for n in wanted if n not in self.source and n not in OPTIONAL]
        extra = self.extra + [s.name for n, s in self.source.items() if n not in wanted]
        problems = [
            f"{kind}: {collapse(names)}"
            for kind, names in (("missing", missing), ("extra", extra), ("more than once", self.twice))
            if names
        ]
        for name, stored in self.source.items():
            shape = stored.shape
            if name in self.companions:
                try:
                    rows, columns = quant_state(self.read_companions(name))["shape"]
                except ValueError as error:
                    problems.append(f"{stored.name} {error}")
                    continue
                shape = (rows // stored.share[1], columns)
            elif name in wanted and not re.fullmatch(r"(torch\.)?(b?float(16|32|64)|B?F(16|32|64))", stored.dtype):
                problems.append(f"not floating point: {stored.name} is {stored.dtype}")
                continue
            if name in wanted and shape != wanted[name]:
                problems.append(f"misshapen: {stored.name} is {[*shape]}, config.json makes it {[*wanted[name]]}")
        if problems:
            raise UserError(f"{where}: the tensors do not fit config.json; " + "; ".join(problems))


def collapse(names: Iterable[str]) -> str:
    """Names with the numbers of blocks drawn together: 'layers.{0-31}.mlp.up_proj.weight, norm.weight'."""
    blocks: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=layers\.)\d+|(?<=blocks\.)\d+", name)
        key = name if number is None else f"{name[: number.start()]}*{name[number.end() :]}"
        blocks.setdefault(key, []).extend([int(number[0])] if number else [])
    shown = []
    for key, numbers in blocks.items():
        runs: list[list[int]] = []
        for n in sorted(numbers):
            if runs and runs[-1][1] == n - 1:
                runs[-1][1] = n
            else:
                runs.append([n, n])
        spans = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
        shown.append(key.replace("*", spans if spans.isdigit() else f"{{{spans}}}", 1) if runs else key)
    return ", ".join(sorted(shown))
