"""Checkpoints in and out: one table per foreign layout says which tensor is which, and serves loading and saving.

Strict both ways: every tensor of a checkpoint is used once or is on `EXTRAS`, every parameter is filled once, and
shapes are compared before memory is taken; what does not fit is listed in one error. The model is built without
memory (meta device) and filled a few megabytes at a time, so loading peaks at about one copy of the weights.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillava.config import ModelConfig, UserError
from minillava.hf_config import is_original, model_config, read_json, tower_folder
from minillava.hf_export import add_image_token, jinja_of, to_hf, write_tokenizer_json
from minillava.llava import LLaVA
from minillava.tensor_files import SHARD, Stored, inspect, inspect_folder, read, write

if TYPE_CHECKING:
    from minillava.tokenizer import Tokenizer

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
            qkv = [apart.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
            apart[name.replace(".attn.q.", FUSED)] = torch.cat(qkv)
    return {rename(name, layout, to_ours=False) or name: tensor for name, tensor in apart.items()}


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
    layout: dict[str, str] = field(default_factory=dict)  # of vision, projector and decoder, for messages
    extra: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)

    def add(self, tensors: dict[str, Stored], layout: str, override: bool = False) -> None:
        known = TOWER_EXTRAS if layout == "tower" else EXTRAS
        for foreign, stored in tensors.items():
            name = rename(foreign, layout, to_ours=True)
            if name is None:
                self.extra += [] if re.fullmatch(known, foreign) else [foreign]
                continue
            parts = {name: stored}
            if FUSED in name and "onevision" in layout:
                shape = (stored.shape[0] // 3, *stored.shape[1:]) if stored.shape else ()
                shares = [dataclasses.replace(stored, shape=shape, share=(i, 3)) for i in range(3)]
                parts = {name.replace(FUSED, f".attn.{part}."): one for part, one in zip("qkv", shares)}
            if self.source.keys() & parts.keys() and not override:
                self.twice.append(foreign)
            self.source |= parts
            self.layout[name.split(".")[0]] = layout

    def has(self, part: str) -> bool:
        return any(name.startswith(part) for name in self.source)

    def check(self, where: str, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raise one UserError that lists everything missing, extra, doubled or misshapen."""
        theirs = self.layout.get("decoder", "hf")
        foreign = {n: rename(n, self.layout.get(n.split(".")[0], theirs), to_ours=False) or n for n in wanted}
        missing = [foreign[n] for n in wanted if n not in self.source and n not in OPTIONAL]
        extra = self.extra + [s.name for n, s in self.source.items() if n not in wanted]
        problems = [
            f"{kind}: {_collapse(names)}"
            for kind, names in (("missing", missing), ("extra", extra), ("more than once", self.twice))
            if names
        ]
        for name, stored in self.source.items():
            if name in wanted and stored.shape != wanted[name]:
                problems.append(
                    f"misshapen: {stored.name} is {[*stored.shape]}, config.json makes it {[*wanted[name]]}"
                )
            elif name in wanted and not re.fullmatch(r"(torch\.)?(b?float(16|32|64)|B?F(16|32|64))", stored.dtype):
                problems.append(f"not floating point: {stored.name} is {stored.dtype}")
        if problems:
            raise UserError(f"{where}: the tensors do not fit config.json; " + "; ".join(problems))


def _collapse(names: Iterable[str]) -> str:
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


def _plan(folder: Path, raw: dict[str, Any], base: Path | None) -> tuple[Plan, Plan | None]:
    """Match the tensors of a folder (and of tower, projector file and base) with parameters; a delta's base apart."""
    tensors = inspect_folder(folder)
    projector = folder / "mm_projector.bin"
    if not tensors and not (is_original(raw) and projector.is_file()):
        raise UserError(f"{folder}: no weights (model.safetensors or pytorch_model.bin, or their .index.json)")

    def known(layout: str) -> int:
        return sum(rename(name, layout, to_ours=True) is not None for name in tensors)

    layout = "original" if is_original(raw) else max(("hf", "hf_new", "onevision_1_5", "onevision_1_5_tree"), key=known)
    plan, delta = Plan(), None
    plan.add(tensors, layout)
    if not is_original(raw):
        if base is not None:
            raise UserError(f"{folder}: is complete in itself; a base is for deltas and projectors of original LLaVA")
        return plan, None
    if not plan.has("projector.") and projector.is_file():  # beside a full model lies the one of stage 1: superseded
        if not plan.has("decoder."):
            name = raw.get("_name_or_path")
            if base is None and not name:
                raise UserError(f"{folder}: holds a projector only; say which language model it belongs to (base)")
            plan.add(_decoder_of(base or find(str(name), folder, "the base (_name_or_path)")), "original")
            base = None
        plan.add(inspect(projector), "original", override=True)  # may carry embeddings trained with it
    if base is not None:
        delta = Plan()
        delta.add(_decoder_of(base), "original")
    if not plan.has("vision."):
        tower = tower_folder(raw, folder, find)
        found = inspect_folder(tower)
        if not found:
            raise UserError(f"{tower}: no weights of the vision tower (model.safetensors or pytorch_model.bin)")
        plan.add(found, "tower")
    return plan, delta


def _decoder_of(base: Path) -> dict[str, Stored]:
    tensors = inspect_folder(base)
    if not tensors:
        raise UserError(f"{base}: no weights of the base (model.safetensors or pytorch_model.bin)")
    return tensors


# ---- loading ----


def load_model(
    folder: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    base: Path | str | None = None,
) -> LLaVA:
    """The model of a checkpoint folder or hub id, in `dtype` (None: that of its embeddings in the file).

    `base` completes original checkpoints that are not: a delta is added to it, a lone mm_projector.bin put on top.
    Raises UserError for whatever is missing, left over, misshapen or unreadable.
    """
    folder = resolve(folder)
    raw = read_json(folder / "config.json")
    config = model_config(raw, folder, find)
    with torch.device("meta"):
        model = LLaVA(config)
    empty = model.state_dict()
    wanted = {name: tuple(p.shape) for name, p in unstack(empty).items()}
    plan, delta = _plan(folder, raw, None if base is None else resolve(base))
    head = plan.source.pop("decoder.head.weight", None) if config.decoder.tie_embeddings else None
    plan.check(str(folder), wanted)
    if dtype is None:
        dtype = next(read([plan.source["decoder.embed.weight"]])).dtype
    state = take(plan, empty, None if delta else dtype, device)
    if head is not None:
        _check_tied(head, plan.source["decoder.embed.weight"], state["decoder.embed.weight"].dtype)
    if delta is not None:
        _add_base(state, delta, wanted, str(base))
        for name in state:
            state[name] = state[name].to(dtype)
    for name in (OPTIONAL.keys() & wanted.keys()) - state.keys():
        state[name] = torch.full(wanted[name], OPTIONAL[name], dtype=dtype, device=device)
    model.load_state_dict(state, assign=True)
    return model.eval()


def take(
    plan: Plan, empty: dict[str, Tensor], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Read what a plan found, in the order of the files; `empty` holds the parameters (on meta, say) by our names."""
    state: dict[str, Tensor] = {}
    ordered = sorted(plan.source.items(), key=lambda item: (str(item[1].path), item[1].name))
    for (name, _), stored in zip(ordered, read([stored for _, stored in ordered])):
        tensor = stored.to(device, dtype, copy=True)
        if expert := EXPERT.fullmatch(name):
            name = f"{expert[1]}.{expert[3]}"
            if name not in state:
                state[name] = tensor.new_empty(empty[name].shape)
            state[name][int(expert[2])] = tensor
        else:
            state[name] = tensor
    return state


def _check_tied(head: Stored, embed: Stored, dtype: torch.dtype) -> None:
    """A tied model may store its head; it must be the embedding then."""
    same = head.shape == embed.shape
    if same:
        (a, b) = (t.to(dtype, copy=True) for t in read([head, embed]))
        same = torch.equal(a, b)
    if not same:
        raise UserError(f"{head.path}: {head.name} differs from the embedding, but config.json ties the two")


def _add_base(state: dict[str, Tensor], delta: Plan, wanted: dict[str, tuple[int, ...]], where: str) -> None:
    """Delta weights: target = delta + base, in the delta's dtype; a base may have fewer rows of vocabulary."""
    decoder = {name: shape for name, shape in wanted.items() if name.startswith("decoder.")}
    for name in ("decoder.embed.weight", "decoder.head.weight"):
        stored = delta.source.get(name)
        if stored and name in decoder and stored.shape[0] <= decoder[name][0]:
            decoder[name] = (stored.shape[0], decoder[name][1])
    delta.check(where, decoder)
    ordered = sorted(delta.source.items(), key=lambda item: (str(item[1].path), item[1].name))
    for (name, stored), tensor in zip(ordered, read([s for _, s in ordered])):
        rows = state[name][: stored.shape[0]]
        rows += tensor.to(rows.device, rows.dtype)


def read_config(folder: Path | str) -> ModelConfig:
    """The ModelConfig of a checkpoint folder: config.json with the processor's, tokenizer's and tower's files."""
    folder = resolve(folder)
    return model_config(read_json(folder / "config.json"), folder, find)


# ---- saving ----


def save_model(model: LLaVA, folder: Path | str, tokenizer: Tokenizer | None = None, shard_bytes: int = SHARD) -> None:
    """Write a folder that transformers loads (Hugging Face layout), in the dtype that the model has.

    Written beside and renamed, so that `folder` never holds half a checkpoint. It must not exist, be empty, or hold an
    earlier save, which is replaced as a whole; UserError otherwise.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose a folder to save to")
    if folder.is_dir() and any(folder.iterdir()) and "minillava" not in _config_if_any(folder):
        raise UserError(f"{folder}: holds something else than an earlier save; choose another folder")
    config, state = model.config, {name: t.detach() for name, t in model.state_dict().items()}
    temporary = folder.absolute().with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        if tokenizer is not None:
            tokenizer.save(temporary)
            config = add_image_token(config, state, tokenizer, temporary)
            if (temporary / "tokenizer.model").is_file() and not (temporary / "tokenizer.json").is_file():
                write_tokenizer_json(temporary)
        files = to_hf(config, str(state["decoder.embed.weight"].dtype).removeprefix("torch."))
        for name, values in files.items():
            (temporary / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (temporary / "chat_template.jinja").write_text(jinja_of(config.chat), encoding="utf-8")
        write(to_files(state, "onevision_1_5" if config.vision.rotary else "hf"), temporary, shard_bytes)
        if folder.is_dir():
            old = temporary.with_name(temporary.name + "-old")
            os.rename(folder, old)
            os.rename(temporary, folder)
            shutil.rmtree(old)
        else:
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _config_if_any(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


# ---- folders and hub ids ----


def resolve(source: Path | str) -> Path:
    """A checkpoint folder as it is, or a hub id ('owner/name') downloaded or taken from the local cache."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith((".", "/")):
        raise UserError(f"{source}: no such folder")
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.jinja", "*.model", "*.txt"]
    try:
        found = Path(snapshot_download(str(source), allow_patterns=[*small, "*.safetensors"]))
        if not any(found.glob("*.safetensors")):  # older checkpoints
            found = Path(snapshot_download(str(source), allow_patterns=[*small, "*.bin"]))
    except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{source}: no such folder here, not in the local Hugging Face cache, and not downloaded ({reason}); "
            f"fetch it where there is a network ('hf download {source}') or give a folder"
        ) from None
    return found


def find(name: str, checkpoint: Path, what: str) -> Path:
    """A folder that a checkpoint's config.json names: relative to the checkpoint, as it stands, or a hub id."""
    for candidate in (checkpoint / name, Path(name)):
        if candidate.is_dir():
            return candidate
    try:
        return resolve(name)
    except UserError as error:
        raise UserError(f"{checkpoint}: {what} is not in {checkpoint / name}; {error}") from None
