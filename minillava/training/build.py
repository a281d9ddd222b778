"""The model that a recipe asks for: a checkpoint, or parts of checkpoints, or a new one; and what stages made of it."""

from __future__ import annotations

import dataclasses
import pkgutil
from pathlib import Path
from typing import Any

import torch

from minillava.chat.tokenizer import Tokenizer, load_tokenizer
from minillava.checkpoints.adapters import merge_peft
from minillava.checkpoints.checkpoint import Checkpoint, check_export, without_memory
from minillava.checkpoints.config_json import format_of
from minillava.checkpoints.config_parts import read_decoder, read_image, read_native_tower, read_vision
from minillava.checkpoints.families import NATIVE_TOWERS
from minillava.checkpoints.hub import resolve
from minillava.checkpoints.loading import Sink, take
from minillava.checkpoints.names import Plan, kinds, layout_of, unstack
from minillava.checkpoints.original_llava import is_original
from minillava.checkpoints.tensor_files import inspect_folder
from minillava.config import ImageConfig, ModelConfig
from minillava.device import compute_dtype
from minillava.errors import UserError
from minillava.layers import lora
from minillava.layers.scheme import Scheme
from minillava.layers.sharded import assign
from minillava.llava import LLaVAModel
from minillava.projector import Projector
from minillava.recipe import ModelRecipe, Recipe, StageConfig, with_tables
from minillava.schema import optional_json, read_json
from minillava.training import parallel, train_state
from minillava.training.task import Run

# Tokenizers that are made, not read: name in a recipe -> module and function(folder, recipe) that writes the files.
TOKENIZERS = {
    "shapes": "minillava.synthetic.train_tokenizer:of_shapes",
    "data": "minillava.synthetic.train_tokenizer:of_data",
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
    base = Checkpoint.open(wanted.base) if wanted.base else None
    config, tokenizer = read_config(recipe, folder, base)
    if base is None:
        model = new_model(wanted, config, recipe.seed, (lambda *_: None) if shared else None)
    elif wanted.quantize or not shared:
        model = load_base(wanted, base, device)
    else:
        model = base.load(device="meta")
    save_dtype = torch.float32 if model.decoder.embed.weight.dtype == torch.float32 else torch.bfloat16
    computes = {compute_dtype(stage.dtype, device) for stage in recipe.stage}
    half = torch.bfloat16 if torch.bfloat16 in computes else torch.float32  # what 16-bit checkpoints are held in
    for parameter in model.parameters():
        place = parameter.device if parameter.is_meta else device
        parameter.data = parameter.data.to(place, parameter.dtype if parameter.dtype == torch.float32 else half)
    return Run(recipe, folder, model.under(config), tokenizer, device, save_dtype, base)


def read_config(recipe: Recipe, folder: Path, base: Checkpoint | None) -> tuple[ModelConfig, Tokenizer]:
    """What [model] says, without its weights; a tokenizer that has to be made is written into the run's folder."""
    wanted = recipe.model
    with parallel.main_first():
        tokenizer = make_tokenizer(recipe, folder, base)
    if base is not None:
        config = with_tables(base.config, wanted.tables, "model")
        if config != dataclasses.replace(base.config, chat=config.chat):
            parts = [name for name in wanted.tables if getattr(config, name) != getattr(base.config, name)]
            raise UserError(
                f"model: a base brings its own sizes and image size; leave [model.{min(set(parts) - {'chat'})}] out, "
                "only [model.chat] can be changed"
            )
    else:
        config = new_config(wanted, tokenizer)
    if tokenizer.vocab_size > config.decoder.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the decoder's embedding {config.decoder.vocab_size} rows; "
            "set model.decoder.vocab_size or use the model's own tokenizer"
        )
    check_export(config)
    return config, tokenizer


def load_base(wanted: ModelRecipe, base: Checkpoint, device: torch.device) -> LLaVAModel:
    """The base in the dtype of its files, whole, with the recipe's adapter merged in or in 4 bits on `device`."""
    scheme = Scheme.parse(wanted.quantize) if wanted.quantize else None
    model = base.load(device=device if scheme else "cpu", quantize=scheme)
    if wanted.adapter:
        merge_peft(model, Path(wanted.adapter))
    return model.to(device) if scheme else model


def renew(run: Run) -> None:
    """Give the run its model as a stage that ranks share begins: on meta, or in 4 bits and whole on every rank."""
    dtypes = {name: p.dtype for name, p in run.model.named_parameters()}
    quantized = run.base is not None and bool(run.recipe.model.quantize)
    if run.base is not None and quantized:
        run.model = load_base(run.recipe.model, run.base, run.device).under(run.config)
    else:
        run.model = without_memory(run.config)
    for name, parameter in run.model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    for stage in run.finished if quantized else ():
        load_stage(run, stage)


def read_weights(run: Run) -> None:
    """Give the run's model, if it is on meta, split over the ranks or not, its weights: those it starts with, then
    those of the stages that are finished. They pass through the host's memory one by one."""
    model = run.model
    if not any(p.is_meta for p in model.parameters()):
        return
    offloaded = run.recipe.offload and any(hasattr(p, "device_mesh") for p in model.parameters())
    model.to_empty(device="cpu" if offloaded else run.device)
    named = dict(model.named_parameters())

    def put(name: str, tensor: torch.Tensor) -> None:
        assign(named[name], tensor)

    if run.base is not None:
        run.base.load(sink=put)
        if run.recipe.model.adapter:
            merge_peft(model, Path(run.recipe.model.adapter))
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.recipe.seed)  # as at the start of a run in one process
            new_model(run.recipe.model, run.config, run.recipe.seed, put)
    for stage in run.finished:
        load_stage(run, stage)


def load_stage(run: Run, stage: StageConfig) -> None:
    """Give the run's model what a finished stage trained; parts of the stage's own (CLIP's text tower) are left out."""
    folder = run.folder / stage.name
    newest = train_state.latest(folder / "checkpoints")
    if newest is None:
        raise UserError(f"{folder}: is marked as finished but has no checkpoint; remove the folder to train it again")
    train_state.read_state(newest)  # which compares checksums
    named, trained = dict(run.model.named_parameters()), newest / train_state.TRAINED
    found = train_state.shapes(trained)
    adapters = [name for name in found if "lora_" in name]
    ours = [name for name in found if name.split(".")[0] in ("vision", "projector", "decoder") and "lora_" not in name]
    if not named.keys() >= set(ours):
        raise UserError(f"{newest}: does not fit this recipe's model; use another folder")
    if parallel.world() == 1:
        for name in ours:
            named[name].data = named[name].data.float()
    train_state.load(trained, {name: named[name] for name in ours}, strict=False)
    values = train_state.read(trained, adapters) if adapters else {}
    if adapters and run.recipe.model.quantize:  # 4-bit weights cannot take them in
        for part, config in stage.lora.items():
            for name, parameter in lora.attach(getattr(run.model, part), part, config).items():
                parameter.data = values[name]
    else:
        lora.merge(named, values, stage.lora)


def make_tokenizer(recipe: Recipe, folder: Path, base: Checkpoint | None) -> Tokenizer:
    """The tokenizer that [model] names, or of its base; one that has to be made is written into the run's folder."""
    wanted = recipe.model
    if base is not None and not wanted.tokenizer:
        return base.tokenizer()
    name = wanted.tokenizer or wanted.decoder_from
    if not name:
        raise UserError(
            "model: no tokenizer; set tokenizer to a folder, to 'data' to train one on the stages' data, or to 'shapes'"
        )
    if name not in TOKENIZERS:
        return load_tokenizer(resolve(name))
    if not (folder / "tokenizer" / "tokenizer_config.json").is_file():
        pkgutil.resolve_name(TOKENIZERS[name])(folder / "tokenizer", recipe)
    return load_tokenizer(folder / "tokenizer")


# ---- a new model, of parts ----


def new_config(wanted: ModelRecipe, tokenizer: Tokenizer) -> ModelConfig:
    """Sizes from the parts' own config.json where there are parts, with the recipe's tables laid over them.

    The vocabulary's size and its special ids come from the tokenizer where the tables are silent.
    """
    config = ModelConfig()
    tables: dict[str, dict[str, Any]] = {name: dict(table) for name, table in wanted.tables.items()}
    if wanted.vision_from:
        config = dataclasses.replace(config, **tower_config(wanted.vision_from, tables["vision"].get("select_layers")))
    if wanted.decoder_from:
        path = resolve(wanted.decoder_from) / "config.json"
        config = dataclasses.replace(config, decoder=read_decoder(read_json(path), str(path)))
    else:
        tables["decoder"].setdefault("vocab_size", tokenizer.vocab_size)
    size = with_tables(config, {"vision": tables["vision"]}, "model").vision.image_size
    tables["image"].setdefault("size", size)
    chat = {"image_token": config.chat.image_token, "video_token": config.chat.video_token} | tables["chat"]
    marker, video_marker = (tokenizer.token_id(chat[name]) for name in ("image_token", "video_token"))
    ids = {
        "bos_id": tokenizer.bos_id,
        "eos_ids": [] if tokenizer.eos_id is None else [tokenizer.eos_id],
        "pad_id": tokenizer.pad_id,
        "image_token_id": config.chat.image_token_id if marker is None else marker,
        "video_token_id": config.chat.video_token_id if video_marker is None else video_marker,
    }
    tables["chat"] = ids | tables["chat"]
    return with_tables(config, tables, "model")


def tower_config(source: str, select_layers: Any) -> dict[str, Any]:
    """The vision and image config that a tower brings, and the merger's where it takes pictures of any size."""
    tower = Checkpoint.open(source)
    where, family = str(tower.folder / "config.json"), NATIVE_TOWERS.get(tower.raw.get("model_type", ""))
    if is_llava(tower):
        brought = {"vision": tower.config.vision, "image": tower.config.image}
        return brought | ({"projector": tower.config.projector} if tower.config.vision.rotary else {})
    if family is not None:
        vision, merger = read_native_tower(tower.raw, where)
        image = ImageConfig(vision.patch_size, "native", max_pixels=family.max_pixels)
        # A tower's own head, and the norm before it, stay behind.
        return {"vision": dataclasses.replace(vision, final_norm=False), "image": image, "projector": merger}
    vision = read_vision(tower.raw, where, select_layers or [-2], False)
    path = tower.folder / "preprocessor_config.json"
    return {"vision": vision, "image": read_image(read_json(path), str(path), vision)}


def new_model(wanted: ModelRecipe, config: ModelConfig, seed: int, sink: Sink | None = None) -> LLaVAModel:
    """A new LLaVA with the weights of a vision tower and of a language model in it, where the recipe names them.

    With a `sink` every weight goes there, and the model that is returned has none (it is on meta).
    """
    if wanted.vision_from and wanted.decoder_from:
        model = without_memory(config)
        model.projector = Projector(config)  # PyTorch's own start, which the papers' rates of stage 1 are for
    else:
        model = LLaVAModel(config)
        model.init_weights(seed)
    given: set[str] = set()
    if wanted.vision_from:
        tower = Checkpoint.open(wanted.vision_from)
        if is_llava(tower):
            model.vision.load_state_dict(tower.load().vision.state_dict(), assign=True)
        else:
            given |= take_part(model, "vision.", tower.folder, "tower", sink)
    if wanted.decoder_from:
        given |= take_part(model, "decoder.", resolve(wanted.decoder_from), "original", sink)
    left = [name for name, p in model.named_parameters() if p.is_meta and name not in given]
    if left:
        raise UserError(f"{wanted.vision_from}, {wanted.decoder_from}: no weights for {', '.join(left)}")
    if sink is not None:
        for name, parameter in model.named_parameters():
            if name not in given:
                sink(name, parameter.detach())
        model.to("meta")
    return model


def take_part(model: LLaVAModel, part: str, folder: Path, kind: str, sink: Sink | None) -> set[str]:
    """Fill one part of a model from a folder that holds it alone, in a layout of this kind; returns which weights."""
    plan, tensors = Plan(), inspect_folder(folder)
    plan.add(tensors, layout_of(tensors, kinds(kind)))
    empty = {name: p.detach() for name, p in model.named_parameters() if name.startswith(part)}
    for name in [n for n in plan.source if n.startswith("vision.post_norm.") and n not in empty]:
        del plan.source[name]  # at the end of RICE on its own, and of no LLaVA's
    if "decoder.head.weight" in empty and optional_json(folder / "config.json").get("tie_word_embeddings"):
        plan.source.setdefault("decoder.head.weight", plan.source["decoder.embed.weight"])
    plan.check(str(folder), {name: tuple(t.shape) for name, t in unstack(empty).items()})
    state = take(plan.source, empty, sink=sink)
    model.load_state_dict(state, strict=False, assign=True)
    return set(state)


def is_llava(checkpoint: Checkpoint) -> bool:
    """Whether it is a whole LLaVA, whose tower can be taken out."""
    return is_original(checkpoint.raw) or format_of(checkpoint.raw) is not None
