"""Recipes: a TOML file says everything about a training run, `--set key=value` changes single values.

A recipe is a model and a list of stages. Every key is a field of a dataclass below; an unknown one is an error that
suggests the nearest. What a run used is written back as TOML beside its results and compared on resume.
"""

import dataclasses
import glob
import os
import re
import tomllib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from minillava.config import (
    ChatConfig,
    Count,
    Fraction,
    LayoutConfig,
    LoRAConfig,
    ModelConfig,
    NotNegative,
    Positive,
    Share,
    Size,
)
from minillava.errors import UserError, nearest
from minillava.files import check_null, read_text
from minillava.schema import from_dict, to_dict

# Keys that may be others when a run is resumed: where and how it computes, what it shows, how long and how fast it
# learns from there on. The rest is what checkpoints and the order of the data depend on.
ON_RESUME = (
    *("workers", "save_every", "keep", "log_every", "shard", "offload", "timeout", "checkpointing", "compile", "sinks"),
    *("steps", "epochs", "lr", "warmup", "schedule", "floor", "weight_decay", "clip", "eval_every"),
)


@dataclass(frozen=True)
class DataConfig:
    """A data set: conversations in any layout of minillava/data/layouts.py."""

    path: str = ""  # JSON, JSON lines, parquet, Arrow or a tar; a folder of them, or a pattern; a hub id (OWNER/NAME)
    images: str = ""  # the folder or zip that its image paths are relative to; empty: they are in the rows, or none
    take: str = "all"  # which of its samples: all, first:N, end:N or random:N (by seed); N may be a percentage
    bad: Literal["stop", "skip"] = "stop"  # what a sample does that cannot be used: stop the run before it starts
    max_bad: Share = 0.01  # share of its samples that skip may leave out
    fetch: str = ""  # folder that pictures given by URL are fetched into; empty: none is fetched
    stream: bool = False  # read parquet of the hub over the network, in place of fetching it first


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
class DPOConfig:
    """How task dpo learns from preferences (arXiv 2305.18290). The defaults are those of LLaVA-NeXT's script."""

    beta: Positive = 0.1  # how far the model may move from where it started: the larger, the less
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"  # 2305.18290; SLiC, 2305.10425; 2310.12036
    cross_entropy: NotNegative = 0.0  # weight of the chosen answer's mean loss a token beside it (RPO, 2404.19733)
    cached: bool = False  # the start's log-probabilities are computed once, before training, not in every step


@dataclass(frozen=True)
class StageConfig:
    """One stage. The defaults are those that all of LLaVA's scripts share (HF Trainer's where they are silent)."""

    name: str = ""
    task: str = "llava"  # a name of minillava.training.tasks.TASKS
    data: tuple[DataConfig, ...] = ()
    eval_data: tuple[DataConfig, ...] = ()  # empty: eval_samples are held out of data
    shapes: dict[str, Any] = field(default_factory=dict)  # of the built-in world: minillava.training.tasks.TASKS
    chat: dict[str, Any] = field(default_factory=dict)  # keys of ChatConfig for this stage, such as template = "plain"
    layout: dict[str, Any] = field(default_factory=dict)  # keys of LayoutConfig for this stage, laid over the model's
    lr: dict[str, Positive] = field(default_factory=dict)  # peak learning rate per part; a part without one is frozen
    dpo: DPOConfig = field(default_factory=DPOConfig)  # of task dpo
    lora: dict[str, LoRAConfig] = field(default_factory=dict)  # parts that train adapters (at their lr) in their place
    steps: Count = 0  # optimizer steps; or
    epochs: NotNegative = 0.0  # passes over the data
    batch_size: Size = 128  # samples an optimizer step
    micro_batch: Count = 0  # samples a forward pass on one rank; 0: all of batch_size, in equal shares
    row_tokens: Count = 0  # pack samples into rows of this many tokens; batch_size and micro_batch then count rows
    warmup: Fraction = 0.03  # share of the steps in which the rate rises linearly
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # of the rate, behind its rise
    floor: Share = 0.0  # share of the peak rate that cosine and linear end at
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"  # 8 bits: bitsandbytes'; muon: matrices, AdamW the rest
    weight_decay: NotNegative = 0.0  # of matrices; norms, biases and embeddings never decay
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    clip: Annotated[float, "[0, inf]"] = 1.0  # norm that the whole gradient is clipped to; 0: never
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; bfloat16 where the hardware has it
    checkpointing: Literal["off", "selective", "full"] = "off"  # activations computed again in the backward pass
    compile: bool = False  # torch.compile every block, but for its attention
    max_tokens: Annotated[int, "[2, inf)"] = 2048  # of a sample, visual tokens too; longer ones are cut and counted
    eval_every: Count = 0  # steps between evaluations; 0: only at the end
    eval_samples: Count = 0  # samples in an evaluation; 0: none, or all of eval_data
    eval_exact: bool = False  # also ask each question of them alone, and count exact answers by its first two words
    split_turns: bool = False  # each turn of a conversation about pictures is a sample of its own
    save_every: Count = 500  # steps between checkpoints; 0: only at the end
    keep: Size = 2  # checkpoints kept
    log_every: Size = 1  # steps between lines of log.jsonl
    workers: Count = 0  # processes that prepare data; 0: a thread, or nobody else where the model has all cores
    seed: Annotated[int, "[-1, 9223372036854)"] = -1  # of the order of the data; -1: the recipe's

    @property
    def micro(self) -> int:
        """Samples (or rows) of a micro-batch."""
        return min(self.micro_batch or self.batch_size, self.batch_size)


@dataclass(frozen=True)
class Recipe:
    """A training run. Each field is a key of the file."""

    name: str = ""
    seed: Annotated[int, "[0, 9223372036854)"] = 42
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda, cuda:1, mps
    deterministic: bool = False  # on a GPU too the same bits in every run: attention's backward costs two fifths more
    out: str = ""  # the run's folder; empty: runs/NAME
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()  # where else the log's numbers go
    shard: Count = 0  # ranks that share one copy of the model under torchrun (HSDP: those of a node); 0: all
    offload: bool = False  # under torchrun, keep parameters and optimizer in the hosts' memory
    timeout: Positive = 10.0  # minutes after which a rank that waits for the others says where it stands and gives up
    model: ModelRecipe = field(default_factory=ModelRecipe)
    stage: tuple[StageConfig, ...] = ()

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")


def read_recipe(path: Path, sets: Sequence[str] = (), out: str | None = None) -> Recipe:
    """The recipe in a TOML file, with `--set` changes applied and everything checked.

    Paths are relative to the working folder or, where nothing is there, to the file's, and made absolute. Raises
    UserError that names the file and the key.
    """
    try:
        values = tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        why = str(error).replace(" (at ", ", ").removesuffix(")")
        raise UserError(
            f"{path}: is not TOML ({why}); correct it, or give a recipe such as recipes/nano.toml"
        ) from None
    for text in sets:
        _set(values, text)
    if out is not None:
        values["out"] = out
    values.setdefault("name", path.stem)
    recipe = _find_files(from_dict(Recipe, values, str(path)), path.parent)
    _check(recipe, str(path))
    return recipe


def _find_files(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with each path that is there, in the working folder or in `folder`, made absolute: a copy of it means
    the same files wherever it is read."""

    def find(path: str) -> str:
        for place in (Path(path), folder / path) if path else ():
            if place.exists() or (glob.has_magic(str(place)) and glob.glob(str(place))):
                return os.path.abspath(place)
        return path

    def find_all(files: tuple[DataConfig, ...]) -> tuple[DataConfig, ...]:
        return tuple(
            replace(f, path=find(f.path), images=find(f.images), fetch=os.path.abspath(f.fetch) if f.fetch else "")
            for f in files
        )

    m, made = recipe.model, ("data", "shapes")  # tokenizers that are made, not found
    found: dict[str, Any] = {key: find(getattr(m, key)) for key in ("base", "vision_from", "decoder_from", "adapter")}
    model = replace(m, **found, tokenizer=m.tokenizer if m.tokenizer in made else find(m.tokenizer))
    stages = (replace(s, data=find_all(s.data), eval_data=find_all(s.eval_data)) for s in recipe.stage)
    return replace(recipe, model=model, stage=tuple(stages))


def _set(values: dict[str, Any], text: str) -> None:
    """Apply one 'a.b.c=value'. Stages are addressed by name, number or * for all."""
    key, equals, raw = text.partition("=")
    if not equals or not all(word.strip() for word in key.split(".")):
        raise UserError(f"--set {text}: expected key=value, such as --set stage.finetune.steps=100")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = raw.strip()  # a bare word or a path, which the shell has stripped of its quotes
    _assign(values, key.strip().split("."), value, f"--set {text}")


def _assign(node: Any, path: list[str], value: Any, where: str) -> None:
    key, rest = path[0], path[1:]
    targets: list[Any]
    if isinstance(node, list):
        names = [str(item.get("name", "")) if isinstance(item, dict) else "" for item in node]
        place = names.index(key) if key in names else int(key) if key.isdigit() else len(node)
        if place >= len(node) and key != "*":
            raise UserError(f"{where}: no entry '{key}'{nearest(key, [n for n in names if n] or ['0'])}")
        targets = [*range(len(node))] if key == "*" else [place]
    elif isinstance(node, dict):
        targets = [key]
        if rest:
            node.setdefault(key, {})
    else:
        raise UserError(f"{where}: '{key}' is inside a value, not a table; check the names before it")
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

    for key, value in _flat("", to_dict(recipe)):
        check_null(value if isinstance(value, str) else "", f"{where}: {key}")
    check_ranges(recipe, f"{where}: ")
    check_ranges(from_dict(ModelConfig, recipe.model.tables, f"{where}: model"), f"{where}: model.")
    require(bool(recipe.stage), "has no [[stage]]; add one")
    parts = [name for name in ("vision_from", "decoder_from") if getattr(recipe.model, name)]
    clash = f"model: a base has its tower and decoder; leave {', '.join(parts)} out"
    require(not recipe.model.base or not parts, clash)
    names = [stage.name for stage in recipe.stage]
    for stage in recipe.stage:
        at = f"stage '{stage.name}'"
        require(
            stage.name.replace("-", "").replace("_", "").isalnum(),
            f"{at}: the name has other characters than letters, digits, - and _; choose another",
        )
        require(names.count(stage.name) == 1, f"{at}: the name is used twice")
        # Tables and data.
        chat = from_dict(ChatConfig, stage.chat, f"{where}: {at}: chat")
        brought = {"merge": "unpad"} if recipe.model.base else {}  # a base's own layout is not known yet
        layout = from_dict(LayoutConfig, brought | recipe.model.layout | stage.layout, f"{where}: {at}: layout")
        for kind, table in (("chat", chat), ("layout", layout)):
            check_ranges(table, f"{where}: {at}: {kind}.")
        for file in (*stage.data, *stage.eval_data):
            require(
                re.fullmatch(r"all|(first|end|random):(?!0+(\.0*)?%?$)(\d+(\.\d+)?%|\d+)", file.take) is not None,
                f"{at}: data: take '{file.take}'; use all, first:N, end:N or random:N, where N may be a percentage",
            )
        # What is trained, how long and how fast.
        require(bool(stage.lr), f"{at}: lr is empty, nothing would be trained; set e.g. lr = {{projector = 1e-3}}")
        require(
            (stage.steps > 0) != (stage.epochs > 0),
            f"{at}: has steps = {stage.steps} and epochs = {stage.epochs:g}; set either steps or epochs and leave the "
            f"other 0, as --set stage.{stage.name}.{'epochs' if stage.steps else 'steps'}={0 if stage.steps else 100}",
        )
        require(
            stage.schedule != "constant" or not stage.floor,
            f"{at}: schedule constant never falls to a floor; leave floor out, or use cosine or linear",
        )
        require(
            not (stage.compile and stage.checkpointing == "selective"),
            f"{at}: compiled code does not show which products to keep; use checkpointing full or off with compile",
        )
        # Adapters.
        for part in stage.lora:
            require(part in stage.lr, f"{at}: lora.{part} has no rate; give lr.{part}, or leave lora.{part} out")
        last = stage is recipe.stage[-1] or not (stage.lora and recipe.model.quantize)
        require(last, f"{at}: adapters over 4 bits can only be the last stage; start another recipe from the export")
        # Counts, and the lengths of samples and rows.
        require(
            not stage.row_tokens or stage.row_tokens >= stage.max_tokens,
            f"{at}: row_tokens is below max_tokens; a row must hold any sample (twice that leaves little empty)",
        )


def interval_of(hint: Any) -> str:
    """The interval of the numbers in a field of this type, "" if it has none."""
    own = getattr(hint, "__metadata__", ("",))[0]
    return own or next(filter(None, map(interval_of, typing.get_args(hint))), "")


def check_ranges(config: Any, where: str) -> None:
    """Raise UserError for a number of a (nested) dataclass outside the interval of its field's type; NaN is in none."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for part in dataclasses.fields(config):
        pending = [(f"{where}{part.name}", getattr(config, part.name))]
        while pending:
            name, value = pending.pop()
            if dataclasses.is_dataclass(value):
                title = getattr(value, "name", "")
                check_ranges(value, f"{name} '{title}': " if title else f"{name}.")
            elif isinstance(value, dict):
                pending += [(f"{name}.{key}", v) for key, v in value.items() if "Any" not in str(part.type)]
            elif isinstance(value, tuple):
                pending += [(name, v) for v in value]
            elif isinstance(value, int | float) and not isinstance(value, bool):
                interval = interval_of(hints[part.name])
                low, high = (float(end) for end in interval[1:-1].split(","))
                above = low < value or (low == value and interval[0] == "[")
                if not (above and (value < high or (value == high and interval[-1] == "]"))):
                    raise UserError(f"{name} is {value}, which is not in {interval}")


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML that `read_recipe` reads back to the same value."""
    try:
        import tomli_w
    except ImportError:
        raise UserError("recipe.toml is written by tomli-w, which is not here: pip install tomli-w") from None
    return tomli_w.dumps(to_dict(recipe))


def differences(old: Recipe, new: Recipe) -> dict[str, str]:
    """key -> 'old -> new' for every key but the folder's that differs, in order."""
    before, after = (dict(_flat("", to_dict(recipe))) for recipe in (old, new))
    missing = "(absent)"
    return {
        key: f"{before.get(key, missing)} -> {after.get(key, missing)}"
        for key in {**before, **after}
        if key != "out" and before.get(key, missing) != after.get(key, missing)
    }


def may_change(key: str, values: str) -> bool:
    """Whether an entry of `differences` may be one between a run and its continuation: no part is added or taken."""
    words = key.split(".")
    return words[2 if words[0] == "stage" and len(words) > 2 else 0] in ON_RESUME and "(absent)" not in values


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


def with_tables(config: ModelConfig, tables: dict[str, dict[str, Any]], where: str) -> ModelConfig:
    """The config with a recipe's [model] tables laid over it."""
    values = to_dict(config)
    for name, table in tables.items():
        values[name] |= table
    return from_dict(ModelConfig, values, where)
