"""Which tensor is which: one table per foreign layout, read in both directions; and what a set of files lacks.

The tables of towers and decoders are their families' (`checkpoints.families`).

Strict: every tensor of a checkpoint is used once or is on `EXTRAS`, every parameter is filled once, and shapes are
compared before memory is taken; what does not fit is listed in one error.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from minillava.checkpoints.families import DECODERS, NATIVE_TOWERS, TOWERS, Row
from minillava.checkpoints.tensor_files import Stored, read
from minillava.errors import UserError
from minillava.layers.quantize import companion_of, quant_state

CLIP = TOWERS["clip_vision_model"].tensors  # and SigLIP's
RICE = TOWERS["rice_vit"].tensors
DECODER = DECODERS["llama"].tensors  # and those of all that came after it
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


CLASS_TOKEN = "vision.class_embedding"
_TREE = (  # what OneVision's module trees have in common
    *_under("model.visual.merger.", "projector.", MERGER),
    *_under("model.language_model.", "decoder.", DECODER),
    ("lm_head.weight", "decoder.head.weight"),
)


def _around(tower: tuple[Row, ...], wrapper: str = "") -> dict[str, tuple[Row, ...]]:
    """The layouts of a LLaVA whose tower has these tensors, and of that tower on its own."""
    tower = _under(wrapper, "", tower)

    def hf(model: str, language: str, head: str) -> tuple[Row, ...]:
        return (
            *_under(f"{model}vision_tower.", "vision.", tower),
            *_under(f"{model}multi_modal_projector.", "projector.", _LINEARS),
            (f"{model}image_newline", "projector.newline"),
            *_under(language, "decoder.", DECODER),
            (head, "decoder.head.weight"),
        )

    return {
        # Transformers before 4.52, and what every later one writes, our own; the module tree of those later ones.
        "hf": hf("", "language_model.model.", "language_model.lm_head.weight"),
        "hf_new": hf("model.", "model.language_model.", "lm_head.weight"),
        "original": (  # haotian-liu/LLaVA; without tower and projector, any LLaMA-like language model
            *_under("model.vision_tower.vision_tower.", "vision.", tower),
            *_under("model.mm_projector.", "projector.", _SEQUENTIAL),
            ("model.image_newline", "projector.newline"),
            *_under("model.", "decoder.", DECODER),
            ("lm_head.weight", "decoder.head.weight"),
        ),
        "tower": _under("", "vision.", tower),
    }


# By kind; where a tower's tensors are not called as CLIP's are, "kind/model_type" too.
LAYOUTS: dict[str, tuple[Row, ...]] = {
    **_around(CLIP, "[vision_model.]"),
    "onevision_1_5": (  # as its files have it
        *_under("visual.", "vision.", RICE),
        *_under("visual.merger.", "projector.", MERGER),
        *_under("model.", "decoder.", DECODER),
        ("lm_head.weight", "decoder.head.weight"),
    ),
    "onevision_1_5_tree": (  # as its module tree has it
        *_under("model.visual.", "vision.", RICE),
        *_TREE,
    ),
    "onevision_1_5_native": (  # as transformers' open pull request 48896 has it
        ("model.visual.class_embedding.weight", CLASS_TOKEN),
        ("model.visual.class_pos_emb.weight", "vision.class_angles"),
        *_under("model.visual.", "vision.", RICE[2:]),
        *_TREE,
    ),
    "onevision_2": (*_under("model.visual.", "vision.", TOWERS["onevision_encoder"].tensors), *_TREE),
    **{
        f"tower/{model_type}": _under("", "vision.", family.alone or family.tensors)
        for model_type, family in NATIVE_TOWERS.items()
    },
    **{
        f"{kind}/{model_type}": rows
        for model_type, family in TOWERS.items()
        if family.whole == "llava" and family.tensors != CLIP
        for kind, rows in _around(family.tensors).items()
    },
}


def kinds(*wanted: str) -> tuple[str, ...]:
    """The layouts of these kinds, whatever the tower."""
    return tuple(name for name in LAYOUTS if name.partition("/")[0] in wanted)


def with_tower(kind: str, model_type: str) -> str:
    """The layout of this kind for a tower."""
    return f"{kind}/{model_type}" if f"{kind}/{model_type}" in LAYOUTS else kind


# With all parts, and by tensors known apart.
WHOLE = kinds("hf", "hf_new", "onevision_1_5", "onevision_1_5_tree", "onevision_1_5_native", "onevision_2")
# Tensors that carry no weight of ours: buffers that old writers saved, and what towers have and LLaVA does not run.
EXTRAS = (
    r"(.*\.)?(rotary_emb\.inv_freq|embeddings\.position_ids)"
    rf"|(.*vision_tower\.)?(vision_model\.)?({'|'.join(family.unused for family in TOWERS.values() if family.unused)})"
)
TOWER_EXTRAS = EXTRAS + r"|text_model\..*|(text|visual)_projection\.weight|logit_(scale|bias)"  # the text half of CLIP
# Never run by LLaVA, and so left out of some checkpoints; then they are what an untrained norm is.
OPTIONAL = {"vision.post_norm.weight": 1.0, "vision.post_norm.bias": 0.0}


def _compiled(source: str, target: str) -> tuple[re.Pattern[str], str]:
    """A row as the pattern of a name, and what `Match.expand` makes the other name from."""
    kinds, number = {"n": r"\d+", "p": "weight|bias"}, itertools.count(1)

    def regex(part: re.Match[str]) -> str:
        group, optional = part.groups()
        return f"({kinds.get(group, group)})" if group else f"(?:{re.escape(optional)})?" if optional else "[.]"

    pattern = re.compile(re.sub(r"<(.*?)>|\[(.*?)\]|\.", regex, source))
    return pattern, re.sub("<.*?>", lambda _: rf"\g<{next(number)}>", re.sub(r"[\[\]]", "", target))


@functools.cache
def _table(layout: str, to_ours: bool) -> list[tuple[re.Pattern[str], str]]:
    return [_compiled(*(row if to_ours else row[::-1])) for row in LAYOUTS[layout]]


def rename(name: str, layout: str, to_ours: bool) -> str | None:
    """A tensor's name on the other side of a layout's table, or None if the table does not know it."""
    for pattern, other in _table(layout, to_ours):
        if match := pattern.fullmatch(name):
            return match.expand(other)
    return None


def layout_of(tensors: Iterable[str], layouts: Iterable[str]) -> str:
    """The layout that knows most of these names; of equals the first."""
    names = list(tensors)
    return max(layouts, key=lambda layout: sum(rename(name, layout, to_ours=True) is not None for name in names))


FLOATING = re.compile(r"(torch\.)?(b?float(16|32|64)|B?F(16|32|64))")  # a dtype, as files spell it
QKV = ".attn.qkv."  # RICE's files hold q, k and v one above the other
EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(gate|up|down)")  # one of those stacked in the parameter \1.\3


def joins_qkv(layout: str) -> bool:
    """Whether files of a layout hold q, k and v of the tower as one."""
    return any(QKV in ours for _, ours in LAYOUTS[layout])


def to_files(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """A state dict under a layout's names: experts apart, q, k and v of the tower together where files have them so."""
    apart = unstack(state)
    if joins_qkv(layout):
        for name in [n for n in apart if n.startswith("vision.") and ".attn.q." in n]:
            joined = name.replace(".attn.q.", QKV)
            apart[joined] = torch.cat([apart.pop(part) for part in shares_of(joined)])
    named = {rename(name, layout, to_ours=False) or name: tensor for name, tensor in apart.items()}
    return {name: t[None] if name.endswith("class_embedding.weight") else t for name, t in named.items()}


def shares_of(name: str) -> list[str]:
    """Our names for what a file has under one name."""
    return [name.replace(QKV, f".attn.{part}.") for part in "qkv"] if QKV in name else [name]


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
    companions: dict[str, dict[str, Stored]] = field(default_factory=dict)  # of quantised weights, by our name
    layout: dict[str, str] = field(default_factory=dict)  # of vision, projector and decoder, for messages
    extra: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    head: Stored | None = None  # of a model that ties it to its embedding
    delta: Plan | None = None  # of the base that all this is added to

    def add(self, tensors: dict[str, Stored], layout: str, override: bool = False) -> None:
        """Match a layout's tensors with our names; with `override` they take the places of those that were there."""
        known = TOWER_EXTRAS if layout in kinds("tower") else EXTRAS
        for foreign, stored in tensors.items():
            companion = companion_of(foreign)
            name = rename(companion[0] if companion else foreign, layout, to_ours=True)
            if companion and name:
                for one in shares_of(name):
                    self.companions.setdefault(one, {})[companion[1]] = stored
                continue
            if name is None:
                self.extra += [] if re.fullmatch(known, foreign) else [foreign]
                continue
            if name == CLASS_TOKEN and stored.shape[:-1] == (1,):  # an embedding of one row
                stored = replace(stored, shape=stored.shape[1:])
            shares = shares_of(name)
            if self.source.keys() & set(shares) and not override:
                self.twice.append(foreign)
            for i, one in enumerate(shares):
                self.companions.pop(one, None) if override else None
                self.source[one] = stored.part(i, len(shares))
            self.layout[name.split(".")[0]] = layout

    def has(self, part: str) -> bool:
        """Whether there is anything whose name begins so."""
        return any(name.startswith(part) for name in self.source)

    def read_companions(self, name: str) -> dict[str, Tensor]:
        """What belongs to a quantised weight, by the companion's name."""
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
            if name in self.companions and "SCB" not in self.companions[name]:
                try:
                    rows, columns = quant_state(self.read_companions(name))["shape"]
                except ValueError as error:
                    problems.append(f"{stored.name} {error}")
                    continue
                shape = (rows // stored.share[1], columns)
            elif name in wanted and name not in self.companions and not FLOATING.fullmatch(stored.dtype):
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
        groups = itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])  # equal within a run
        runs = [[n for _, n in group] for _, group in groups]
        spans = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
        shown.append(key.replace("*", spans if spans.isdigit() else f"{{{spans}}}", 1) if runs else key)
    return ", ".join(sorted(shown))
