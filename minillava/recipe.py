"""Recipes: a TOML file says everything about a training run, `--set key=value` changes single values.

A recipe is a model and a list of stages. Every key is a field of a dataclass below; an unknown one is an error that
suggests the nearest. What a run used is written back as TOML beside its results and compared on resume.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minillava.config import ChatConfig, LayoutConfig, ModelConfig, UserError, from_dict, nearest, to_dict

# Keys that may differ when a run is resumed: they do not change what is computed.
FREE_KEYS = (
    *("out", "workers", "save_every", "keep", "log_every", "shard", "offload", "timeout", "checkpointing", "compile"),
    "sinks",
)


@dataclass(frozen=True)
class DataConfig:
    """One file of samples in LLaVA's JSON format."""

    path: str = ""  # .json or .jsonl
    images: str = ""  # the folder or zip that its image paths are relative to; may be empty for text alone
    take: str = "all"  # which of its samples: all, first:N, end:N or random:N (by seed); N may be a percentage


@dataclass(frozen=True)
class ModelRecipe:
    """What is trained: a checkpoint, or parts of checkpoints, or sizes for a new model. Tables override."""

    base: str = ""  # a LLaVA checkpoint: folder or hub id
    vision_from: str = ""  # a vision tower on its own (CLIP) or that of a LLaVA: folder or hub id
    decoder_from: str = ""  # a language model on its own (Vicuna), with its tokenizer: folder or hub id
    adapter: str = ""  # folder with PEFT's LoRA files, merged into the base at the start
    quantize: str = ""  # 4-bit weights of the base for a start with adapters (QLoRA): nf4, nf4-double, ...
    tokenizer: str = ""  # folder; "data": trained on all stages' data; "shapes"; empty: of base or decoder_from
    vision: dict[str, Any] = field(default_factory=dict)  # keys of VisionConfig
    projector: dict[str, Any] = field(default_factory=dict)  # keys of ProjectorConfig
    decoder: dict[str, Any] = field(default_factory=dict)  # keys of DecoderConfig
    image: dict[str, Any] = field(default_factory=dict)  # keys of ImageConfig
    layout: dict[str, Any] = field(default_factory=dict)  # keys of LayoutConfig
    chat: dict[str, Any] = field(default_factory=dict)  # keys of ChatConfig

    @property
    def tables(self) -> dict[str, dict[str, Any]]:
        return {name: getattr(self, name) for name in ("vision", "projector", "decoder", "image", "layout", "chat")}


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on the linear layers of one part (arXiv 2106.09685). The defaults are LLaVA-1.5's."""

    rank: int = 128
    alpha: float = 256.0  # the update is scaled by alpha / rank
    dropout: float = 0.05  # of what goes into an adapter
    targets: tuple[str, ...] = ()  # last words of the layers' names, such as q and v; empty: all but the head

    @property
    def scale(self) -> float:
        """What the product of the two factors is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class StageConfig:
    """One stage. The defaults are those that all of LLaVA's scripts share (HF Trainer's where they are silent)."""

    name: str = ""
    task: str = "llava"  # a name of minillava.tasks.TASKS
    data: tuple[DataConfig, ...] = ()
    eval_data: tuple[DataConfig, ...] = ()  # empty: eval_samples are held out of data
    shapes: dict[str, Any] = field(default_factory=dict)  # options of the built-in world; the task reads them
    chat: dict[str, Any] = field(default_factory=dict)  # keys of ChatConfig for this stage, such as template = "plain"
    layout: dict[str, Any] = field(default_factory=dict)  # keys of LayoutConfig for this stage, laid over the model's
    lr: dict[str, float] = field(default_factory=dict)  # peak learning rate per part; a part without one is frozen
    lora: dict[str, LoRAConfig] = field(default_factory=dict)  # parts that train adapters (at their lr) in their place
    steps: int = 0  # optimizer steps; or
    epochs: float = 0.0  # passes over the data
    batch_size: int = 128  # samples an optimizer step
    micro_batch: int = 0  # samples a forward pass on one rank; 0: all of batch_size, in equal shares
    row_tokens: int = 0  # pack samples into rows of this many tokens; batch_size and micro_batch then count rows
    warmup: float = 0.03  # share of the steps in which the rate rises linearly
    schedule: Literal["cosine", "constant"] = "cosine"  # of the rate, behind its rise
    floor: float = 0.0  # share of the peak rate that the cosine ends at
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"  # 8 bits: bitsandbytes'; muon: matrices, AdamW the rest
    weight_decay: float = 0.0  # of matrices; norms, biases and embeddings never decay
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0  # norm that the whole gradient is clipped to; 0: never
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; bfloat16 where the hardware has it
    checkpointing: Literal["off", "selective", "full"] = "off"  # activations computed again in the backward pass
    compile: bool = False  # torch.compile every block, but for its attention
    max_tokens: int = 2048  # of a sample, visual tokens included; longer ones are cut and counted
    eval_every: int = 0  # steps between evaluations; 0: only at the end
    eval_samples: int = 0  # samples in an evaluation; 0: none, or all of eval_data
    eval_exact: bool = False  # also ask each question of them alone, and count exact answers by its first two words
    split_turns: bool = False  # each turn of a conversation about pictures is a sample of its own
    save_every: int = 500  # steps between checkpoints; 0: only at the end
    keep: int = 2  # checkpoints kept
    log_every: int = 1  # steps between lines of log.jsonl
    workers: int = 0  # processes that prepare data; 0: a thread, or nobody else where the model has all cores
    seed: int = -1  # of the order of the data; -1: the recipe's

    @property
    def micro(self) -> int:
        """Samples (or rows) of a micro-batch."""
        return min(self.micro_batch or self.batch_size, self.batch_size)


@dataclass(frozen=True)
class Recipe:
    """A training run. Each field is a key of the file."""

    name: str = ""
    seed: int = 42
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda, cuda:1, mps
    out: str = ""  # the run's folder; empty: runs/NAME
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()  # who is told what the log is told
    shard: int = 0  # ranks that share one copy of the model under torchrun (HSDP: those of a node); 0: all
    offload: bool = False  # under torchrun, keep parameters and optimizer in the hosts' memory
    timeout: float = 10.0  # minutes after which a rank that waits for the others says where it stands and gives up
    model: ModelRecipe = field(default_factory=ModelRecipe)
    stage: tuple[StageConfig, ...] = ()

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")


def read_recipe(path: Path, sets: Sequence[str] = (), out: str | None = None) -> Recipe:
    """The recipe in a TOML file, with `--set` changes applied and everything checked.

    Raises UserError that names the file and the key.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); give the path of a recipe such as recipes/nano.toml"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: is not TOML: {error}") from None
    for text in sets:
        _set(values, text)
    if out is not None:
        values["out"] = out
    values.setdefault("name", path.stem)
    recipe = from_dict(Recipe, values, str(path))
    _check(recipe, str(path))
    return recipe


def _set(values: dict[str, Any], text: str) -> None:
    """Apply one 'a.b.c=value'. Stages are addressed by name, number or * for all."""
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text}: expected key=value, such as --set stage.finetune.steps=100")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()  # a bare word or a path, which the shell has stripped of its quotes
    _assign(values, key.strip().split("."), value, f"--set {text}")


def _assign(node: Any, path: list[str], value: Any, where: str) -> None:
    key, rest = path[0], path[1:]
    targets: list[Any]
    if isinstance(node, list):
        names = [str(item.get("name", "")) if isinstance(item, dict) else "" for item in node]
        if key == "*":
            targets = list(range(len(node)))
        elif key in names:
            targets = [names.index(key)]
        elif key.isdigit() and int(key) < len(node):
            targets = [int(key)]
        else:
            raise UserError(f"{where}: no entry '{key}'{nearest(key, [n for n in names if n] or ['0'])}")
    elif isinstance(node, dict):
        targets = [key]
        if rest:
            node.setdefault(key, {})
    else:
        raise UserError(f"{where}: '{key}' is inside a value, not a table")
    for target in targets:
        if rest:
            _assign(node[target], rest, value, where)
        else:
            node[target] = value


def _check(recipe: Recipe, where: str) -> None:
    """What the types do not say. Raises UserError at the first mistake."""

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise UserError(f"{where}: {message}")

    from_dict(ModelConfig, recipe.model.tables, f"{where}: model")
    require(bool(recipe.stage), "has no [[stage]]; add one")
    names = [stage.name for stage in recipe.stage]
    for stage in recipe.stage:
        at = f"stage '{stage.name}'"
        require(
            stage.name.replace("-", "").replace("_", "").isalnum(),
            f"{at}: a name of letters, digits, - and _ is needed",
        )
        require(names.count(stage.name) == 1, f"{at}: the name is used twice")
        from_dict(ChatConfig, stage.chat, f"{where}: {at}: chat")
        brought = {"merge": "unpad"} if recipe.model.base else {}  # a base's own layout is not known yet
        from_dict(LayoutConfig, brought | recipe.model.layout | stage.layout, f"{where}: {at}: layout")
        for file in (*stage.data, *stage.eval_data):
            require(
                re.fullmatch(r"all|(first|end|random):\d+(\.\d+)?%|(first|end|random):\d+", file.take) is not None,
                f"{at}: data: take '{file.take}'; use all, first:N, end:N or random:N, where N may be a percentage",
            )
        require(bool(stage.lr), f"{at}: lr is empty, nothing would be trained; set e.g. lr = {{projector = 1e-3}}")
        for part, rate in stage.lr.items():
            require(rate > 0, f"{at}: lr.{part} is {rate}; leave the part out to freeze it")
        require((stage.steps > 0) != (stage.epochs > 0), f"{at}: set either steps or epochs")
        require(stage.batch_size > 0 and stage.micro_batch >= 0, f"{at}: batch_size and micro_batch must be positive")
        require(0 <= stage.warmup < 1, f"{at}: warmup is a share of the steps, from 0 to below 1")
        require(0 <= stage.floor <= 1, f"{at}: floor is a share of the peak rate, from 0 to 1")
        require(
            not (stage.compile and stage.checkpointing == "selective"),
            f"{at}: compiled code does not show which products to keep; use checkpointing full or off with compile",
        )
        for part, lora in stage.lora.items():
            require(part in stage.lr, f"{at}: lora.{part} has no rate; give lr.{part}, or leave lora.{part} out")
            require(lora.rank > 0 and 0 <= lora.dropout < 1, f"{at}: lora.{part}: rank > 0 and 0 <= dropout < 1")
        last = stage is recipe.stage[-1] or not (stage.lora and recipe.model.quantize)
        require(last, f"{at}: adapters over 4 bits can only be the last stage; start another recipe from the export")
        require(stage.keep > 0 and stage.log_every > 0, f"{at}: keep and log_every must be at least 1")
        require(stage.max_tokens > 1, f"{at}: max_tokens must be at least 2")
        require(
            not stage.row_tokens or stage.row_tokens >= stage.max_tokens,
            f"{at}: row_tokens is below max_tokens; a row must hold any sample (twice that leaves little empty)",
        )


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML that `read_recipe` reads back to the same value."""
    values = to_dict(recipe)
    stages = values.pop("stage")
    model = values.pop("model")
    lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
    for title, table in (("[model]", model), *(("[[stage]]", stage) for stage in stages)):
        lines += ["", title, *(f"{key} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return repr(value)  # inf and nan are TOML too
    return json.dumps(value)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """'key: old -> new' for every key that differs and matters, in order."""
    before, after = (dict(_flat("", to_dict(recipe))) for recipe in (old, new))
    keys = [key for key in {**before, **after} if key.rsplit(".", 1)[-1] not in FREE_KEYS]
    missing = "(absent)"
    return [
        f"{key}: {before.get(key, missing)} -> {after.get(key, missing)}"
        for key in keys
        if before.get(key, missing) != after.get(key, missing)
    ]


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = ((item.get("name", i) if isinstance(item, dict) else i, item) for i, item in enumerate(value))
    else:
        yield prefix, value
    for key, item in items:
        yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)


def stage_index(recipe: Recipe, name: str) -> int:
    """Where the stage of this name stands. Raises UserError that suggests the nearest."""
    names = [stage.name for stage in recipe.stage]
    if name not in names:
        raise UserError(f"recipe '{recipe.name}' has no stage '{name}'{nearest(name, names)}")
    return names.index(name)
