"""The model that a recipe asks for: a checkpoint, or parts of checkpoints, or a new one; and what stages made of it."""

from __future__ import annotations

import dataclasses
import functools
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minillava import checkpoint, hf_config, lora, names, parallel, tensor_files, weights
from minillava.config import ModelConfig, UserError
from minillava.device import compute_dtype
from minillava.hub import resolve
from minillava.llava import LLaVA
from minillava.projector import Projector
from minillava.quantize import Scheme
from minillava.recipe import ModelRecipe, Recipe, StageConfig
from minillava.tasks import Run, merge_config
from minillava.tokenizer import Tokenizer, load_tokenizer

# Tokenizers that are made, not read: name in a recipe -> module and function(folder, recipe) that writes the files.
TOKENIZERS = {
    "shapes": "minillava.train_tokenizer:of_shapes",
    "data": "minillava.train_tokenizer:of_data",
}


def make_run(recipe: Recipe, folder: Path, device: torch.device) -> Run:
    """Load or create the model and its tokenizer as [model] says.

    Where ranks share the work the model stays on meta; each stage splits it and has its shards filled.
    """
    wanted, shared = recipe.model, parallel.world() > 1
    if wanted.quantize and not wanted.base:
        raise UserError("model: quantize is for the weights of a base; name one, or leave quantize out")
    if wanted.adapter and (wanted.quantize or not wanted.base):
        raise UserError("model: an adapter becomes part of a base in 16 bits; name that, and leave quantize out")
    config, tokenizer = read_config(recipe, folder)
    if not wanted.base:
        model = new_model(wanted, config, recipe.seed, (lambda *_: None) if shared else None)
    elif wanted.quantize or not shared:
        model = load_base(wanted, device)
    else:
        model = weights.load_model(wanted.base, device="meta")
    model.config = config
    computes = {compute_dtype(stage.dtype, device) for stage in recipe.stage}
    half = torch.bfloat16 if torch.bfloat16 in computes else torch.float32  # what 16-bit checkpoints are held in
    save_dtype = torch.float32 if model.decoder.embed.weight.dtype == torch.float32 else torch.bfloat16
    for parameter in model.parameters():
        place = parameter.device if parameter.is_meta else device
        parameter.data = parameter.data.to(place, parameter.dtype if parameter.dtype == torch.float32 else half)
    run = Run(recipe, folder, model, tokenizer, device, save_dtype)
    if shared:
        run.fill = functools.partial(fill, run)
    return run


def read_config(recipe: Recipe, folder: Path) -> tuple[ModelConfig, Tokenizer]:
    """What [model] says, without its weights; a tokenizer that has to be made is written into the run's folder."""
    wanted = recipe.model
    with parallel.main_first():
        tokenizer = make_tokenizer(recipe, folder)
    if wanted.base:
        read = weights.read_config(wanted.base)
        config = merge_config(read, wanted.tables, "model")
        if config != dataclasses.replace(read, chat=config.chat):
            raise UserError("model: a base brings its own sizes and image size; only [model.chat] can be changed")
    else:
        config = new_config(wanted, tokenizer)
    if tokenizer.vocab_size > config.decoder.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the decoder's embedding {config.decoder.vocab_size} rows; "
            "set model.decoder.vocab_size or use the model's own tokenizer"
        )
    return config, tokenizer


def load_base(wanted: ModelRecipe, device: torch.device) -> LLaVA:
    """The base in the dtype of its files, whole, with the recipe's adapter merged in or in 4 bits on `device`."""
    scheme = Scheme.parse(wanted.quantize) if wanted.quantize else None
    model = weights.load_model(wanted.base, device=device if scheme else "cpu", quantize=scheme)
    if wanted.adapter:
        lora.merge_peft(model, Path(wanted.adapter))
    return model.to(device) if scheme else model


def fresh(run: Run) -> LLaVA:
    """The run's model at the start of a stage that ranks share: on meta, or in 4 bits and whole on every rank."""
    quantized, dtypes = bool(run.recipe.model.quantize), {n: p.dtype for n, p in run.model.named_parameters()}
    if quantized:
        model = load_base(run.recipe.model, run.device)
    else:
        with torch.device("meta"):
            model = LLaVA(run.model.config)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    model.config = run.model.config
    for stage in run.finished if quantized else ():
        load_stage(run, model, stage)
    return model


def fill(run: Run, model: LLaVA) -> None:
    """Give a model on meta, split over the ranks or not, its weights: those it starts with, then those of the stages
    that are finished. They pass through the host's memory one by one."""
    if not any(p.is_meta for p in model.parameters()):
        return
    wanted = run.recipe.model
    offloaded = run.recipe.offload and any(hasattr(p, "device_mesh") for p in model.parameters())
    model.to_empty(device="cpu" if offloaded else run.device)
    named = dict(model.named_parameters())

    def put(name: str, tensor: torch.Tensor) -> None:
        parallel.fill(named[name], tensor)

    if wanted.base:
        weights.load_model(wanted.base, sink=put)
        if wanted.adapter:
            lora.merge_peft(model, Path(wanted.adapter))
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.recipe.seed)  # as at the start of a run in one process
            new_model(wanted, model.config, run.recipe.seed, put)
    for stage in run.finished:
        load_stage(run, model, stage)


def load_stage(run: Run, model: LLaVA, stage: StageConfig) -> None:
    """Give a model what a finished stage trained; parts of the stage's own (CLIP's text tower) are left out."""
    folder = run.folder / stage.name
    newest = checkpoint.latest(folder / "checkpoints")
    if newest is None:
        raise UserError(f"{folder}: is marked as finished but has no checkpoint; remove the folder to train it again")
    named = dict(model.named_parameters())
    found = checkpoint.shapes(newest / checkpoint.TRAINED)
    adapters = [name for name in found if "lora_" in name]
    ours = [name for name in found if name.split(".")[0] in ("vision", "projector", "decoder") and "lora_" not in name]
    if not named.keys() >= set(ours):
        raise UserError(f"{newest}: does not fit this recipe's model; use another folder")
    if run.fill is None:
        for name in ours:
            named[name].data = named[name].data.float()
    checkpoint.load(newest / checkpoint.TRAINED, {name: named[name] for name in ours}, strict=False)
    values = checkpoint.read(newest / checkpoint.TRAINED, adapters) if adapters else {}
    if adapters and run.recipe.model.quantize:  # 4-bit weights cannot take them in
        for part, config in stage.lora.items():
            for name, parameter in lora.attach(getattr(model, part), part, config).items():
                parameter.data = values[name]
    elif adapters:
        lora.add(named, values, lora.scales_of(adapters, stage.lora))


def make_tokenizer(recipe: Recipe, folder: Path) -> Tokenizer:
    """The tokenizer that [model] names, or of its base; one that has to be made is written into the run's folder."""
    wanted = recipe.model
    name = wanted.tokenizer or wanted.base or wanted.decoder_from
    if not name:
        raise UserError(
            "model: no tokenizer; set tokenizer to a folder, to 'data' to train one on the stages' data, or to 'shapes'"
        )
    if name in TOKENIZERS:
        if not (folder / "tokenizer" / "tokenizer_config.json").is_file():
            pkgutil.resolve_name(TOKENIZERS[name])(folder / "tokenizer", recipe)
        return load_tokenizer(folder / "tokenizer")
    return load_tokenizer(resolve(name))


def new_config(wanted: ModelRecipe, tokenizer: Tokenizer) -> ModelConfig:
    """Sizes from the parts' own config.json where there are parts, with the recipe's tables laid over them.

    The vocabulary's size and its special ids come from the tokenizer where the tables are silent.
    """
    config = ModelConfig()
    tables: dict[str, dict[str, Any]] = {name: dict(table) for name, table in wanted.tables.items()}
    if wanted.vision_from:
        path = resolve(wanted.vision_from)
        raw, layers = hf_config.read_json(path / "config.json"), tables["vision"].get("select_layers", [-2])
        if is_llava(raw):
            whole = weights.read_config(path)
            vision, image = whole.vision, whole.image
        else:
            vision = hf_config.read_vision(raw, str(path / "config.json"), layers, False)
            pixels = hf_config.read_json(path / "preprocessor_config.json")
            image = hf_config.read_image(pixels, str(path / "preprocessor_config.json"), vision)
        config = dataclasses.replace(config, vision=vision, image=image)
    if wanted.decoder_from:
        path = resolve(wanted.decoder_from)
        decoder = hf_config.read_decoder(hf_config.read_json(path / "config.json"), str(path / "config.json"))
        config = dataclasses.replace(config, decoder=decoder)
    else:
        tables["decoder"].setdefault("vocab_size", tokenizer.vocab_size)
    size = merge_config(config, {"vision": tables["vision"]}, "model").vision.image_size
    tables["image"].setdefault("size", size)
    marker = tokenizer.token_id(tables["chat"].get("image_token", config.chat.image_token))
    ids = {
        "bos_id": tokenizer.bos_id,
        "eos_ids": [] if tokenizer.eos_id is None else [tokenizer.eos_id],
        "pad_id": tokenizer.pad_id,
        "image_token_id": config.chat.image_token_id if marker is None else marker,
    }
    tables["chat"] = ids | tables["chat"]
    return merge_config(config, tables, "model")


def new_model(
    wanted: ModelRecipe, config: ModelConfig, seed: int, sink: Callable[[str, torch.Tensor], None] | None = None
) -> LLaVA:
    """A new LLaVA with the weights of a vision tower and of a language model in it, where the recipe names them.

    With a `sink` every weight goes there, and the model that is returned has none (it is on meta).
    """
    sources = (wanted.vision_from, "vision.", "tower"), (wanted.decoder_from, "decoder.", "original")
    if all(source for source, _, _ in sources):
        with torch.device("meta"):
            model = LLaVA(config)
        model.projector = Projector(config)  # PyTorch's own start, which the papers' rates of stage 1 are for
    else:
        model = LLaVA(config)
        model.init_weights(seed)
    named = dict(model.named_parameters())
    given: set[str] = set()
    for source, part, layout in sources:
        if source:
            folder = resolve(source)
            if part == "vision." and is_llava(hf_config.read_json(folder / "config.json")):
                model.vision.load_state_dict(weights.load_model(folder).vision.state_dict(), assign=True)
                continue
            plan = names.Plan()
            plan.add(tensor_files.inspect_folder(folder), layout)
            empty = {name: p.detach() for name, p in named.items() if name.startswith(part)}
            plan.check(str(folder), {name: tuple(t.shape) for name, t in names.unstack(empty).items()})
            state = weights.take(plan, empty, sink=sink)
            model.load_state_dict(state, strict=False, assign=True)
            given |= state.keys()
    left = [name for name, p in model.named_parameters() if p.is_meta and name not in given]
    if left:
        raise UserError(f"{wanted.vision_from}, {wanted.decoder_from}: no weights for {', '.join(left)}")
    if sink is not None:
        for name, parameter in model.named_parameters():
            if name not in given:
                sink(name, parameter.detach())
        model.to("meta")
    return model


def is_llava(raw: dict[str, Any]) -> bool:
    """Whether a config.json is that of a whole LLaVA, whose tower can be taken out."""
    return raw.get("model_type", "").startswith("llava")
