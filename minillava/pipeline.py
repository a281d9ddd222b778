"""A whole run: the model that a recipe asks for, its stages one after the other, and how a killed run goes on.

The run's folder holds recipe.toml (as used), log.jsonl, curves.png, tokenizer/ where the run made one, and for each
stage STAGE/checkpoints, STAGE/model (the export, in Hugging Face layout) and STAGE/done.json.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minillava import checkpoint, hf_config, look, lora, names, parallel, tensor_files, weights
from minillava.config import ModelConfig, UserError, nearest
from minillava.llava import LLaVA
from minillava.progress import Log, plot
from minillava.projector import Projector
from minillava.quantize import Scheme
from minillava.recipe import ModelRecipe, Recipe, StageConfig, differences, read_recipe, stage_index, to_toml
from minillava.tasks import LLaVATask, Run, export, make_task, merge_config, task_class
from minillava.tokenizer import Tokenizer, load_tokenizer
from minillava.trainer import Trainer, compute_dtype

ANSWERS = 8  # to held-out samples, written at a stage's end
# Tokenizers that are made, not read: name in a recipe -> module and function(folder, recipe) that writes the files.
TOKENIZERS = {
    "shapes": "minillava.train_tokenizer:of_shapes",
    "data": "minillava.train_tokenizer:of_data",
}


def run_recipe(recipe: Recipe, resume: bool = False, only: str | None = None) -> dict[str, dict[str, float]]:
    """Train the stages of a recipe (or `only` one) and return what each one's last evaluation measured.

    Raises UserError where the folder holds another run, or this one and `resume` is not set.
    """
    began_s = time.monotonic()
    folder = recipe.folder
    chosen = recipe.stage if only is None else (recipe.stage[stage_index(recipe, only)],)
    device = parallel.start(pick_device(recipe.device), recipe.timeout)
    with parallel.main_first():
        if parallel.is_main():
            resume = open_folder(recipe, folder, resume or parallel.restarted(), only)
    resume = bool(parallel.agree([resume and parallel.is_main()])[0])
    torch.manual_seed(recipe.seed)
    run = make_run(recipe, folder, device)
    ranks = f", {parallel.world()} ranks" if parallel.world() > 1 else ""
    print(f"{recipe.name} in {folder} on {describe_device(device)}{ranks}; {count(run.model)}")
    log = Log(folder / "log.jsonl", recipe.sinks) if parallel.is_main() else Log(Path(os.devnull))
    results: dict[str, dict[str, float]] = {}
    try:
        for stage in recipe.stage[: recipe.stage.index(chosen[-1]) + 1]:
            done = folder / stage.name / "done.json"
            if stage in chosen and not (resume and done.is_file()):
                results[stage.name] = run_stage(run, stage, log, resume)
                if parallel.is_main():
                    plot(log.path, folder / "curves.png")
            elif done.is_file():
                run.finished.append(stage)
                if run.fill is None:
                    load_stage(run, run.model, stage)
                results[stage.name] = json.loads(done.read_text(encoding="utf-8"))["eval"]
                print(f"stage {stage.name}: finished before")
            elif done.parent.exists():
                raise UserError(f"{done.parent}: is not finished; finish it with --resume --stage {stage.name}")
            else:
                print(f"stage {stage.name}: has not been run in {folder}; going on without it")
    finally:
        log.close()
    print(f"done in {time.monotonic() - began_s:,.0f} s; curves: {folder / 'curves.png'}")
    for stage in chosen[-1:]:
        if (folder / stage.name / "model").is_dir():
            print(f"ask it: python generate.py --model {folder / stage.name / 'model'} --image FILE --prompt TEXT")
    return results


def run_stage(run: Run, stage: StageConfig, log: Log, resume: bool) -> dict[str, float]:
    print(f"stage {stage.name}: {stage.task}")
    seed = run.recipe.seed if stage.seed < 0 else stage.seed
    torch.manual_seed(seed + parallel.rank() * task_class(stage).split)  # ranks that share a step drop out differently
    began_s = time.monotonic()
    folder = run.folder / stage.name
    run.model.config = run.config
    if run.fill is not None:
        run.model = fresh(run)
        if not task_class(stage).split:
            run.fill(run.model)
    task = make_task(run, stage)
    trainer = Trainer(task, stage, run.device, folder, log, resume, run.recipe)
    if parallel.is_main():
        log.rewind(stage.name, trainer.step)
    print(f"  {trainer.describe()}", flush=True)
    measured = trainer.run()
    trainer.finish(measured)
    run.finished.append(stage)
    if run.fill is None and stage is not run.recipe.stage[-1]:
        adapters = lora.detach(run.model)
        lora.add(dict(run.model.named_parameters()), adapters, lora.scales_of(adapters, stage.lora))
    if (
        parallel.is_main()
        and isinstance(task, LLaVATask)
        and task.held_out is not None
        and "template" not in stage.chat
    ):
        shown = [task.held_out.samples[i] for i in look.spread(len(task.held_out), ANSWERS)]
        try:
            look.write_answers(folder / "model", shown, folder / "answers.jsonl", run.device)
        except torch.OutOfMemoryError:
            print("  no sample answers: the exported model does not fit beside the training")
    parallel.barrier()
    summary = "; ".join(filter(None, (f"  {time.monotonic() - began_s:,.0f} s", task.summary())))
    print(summary + (f"; {trainer.skipped} steps skipped" if trainer.skipped else ""), flush=True)
    return measured


def inspect_recipe(recipe: Recipe, number: int, only: str | None = None) -> None:
    """Show `number` samples of each stage, or of `only` one, as the model would see them; no weights are loaded.

    Raises UserError where a sample cannot be used or trains nothing.
    """
    chosen = recipe.stage if only is None else (recipe.stage[stage_index(recipe, only)],)
    with tempfile.TemporaryDirectory() as folder:
        config, tokenizer = read_config(recipe, Path(folder))
        with torch.device("meta"):
            model = LLaVA(config)
        run = Run(recipe, Path(folder), model, tokenizer, torch.device("cpu"), torch.float32)
        for stage in chosen:
            print(f"stage {stage.name}: {stage.task}")
            if not issubclass(task_class(stage), LLaVATask):
                print("  makes its own data, which is not shown")
                continue
            task = make_task(run, dataclasses.replace(stage, row_tokens=0))
            look.show(task.dataset, number)  # type: ignore[attr-defined]


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


def export_newest(folder: Path, only: str | None = None) -> Path:
    """Write the model of a run's newest checkpoint (of stage `only`, or of the last stage that has one) in Hugging Face
    layout, and adapters in PEFT's, beside the checkpoints. Returns where; the run may be going on.

    Raises UserError where there is no run or no checkpoint.
    """
    saved = folder / "recipe.toml"
    if not saved.is_file():
        raise UserError(f"{folder}: holds no run; give the folder of one with --out")
    recipe = read_recipe(saved, out=str(folder))
    stages = recipe.stage if only is None else recipe.stage[: stage_index(recipe, only) + 1]
    reached = [stage for stage in stages if checkpoint.latest(folder / stage.name / "checkpoints")]
    if not reached or (only and reached[-1].name != only):
        raise UserError(f"{folder}: stage {only or stages[0].name} has no checkpoint yet; wait for one (save_every)")
    run = make_run(recipe, folder, torch.device("cpu"))
    for stage in reached:
        load_stage(run, run.model, stage)
    newest = checkpoint.latest(folder / stage.name / "checkpoints")
    assert newest is not None
    target, partial = (folder / stage.name / f"{dot}model-{newest.name}" for dot in ("", "."))
    for path in (target, partial):
        shutil.rmtree(path, ignore_errors=True)
    export(run, partial)
    partial.rename(target)
    if stage.lora:
        trained = checkpoint.read(newest / checkpoint.TRAINED)
        lora.save_peft(target.with_name(f"adapter-{newest.name}"), trained, stage.lora, recipe.model.base)
    return target


def on_meta(model: LLaVA) -> LLaVA:
    """The same model without its weights."""
    with torch.device("meta"):
        fresh = LLaVA(model.config)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    for name, parameter in fresh.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return fresh


def open_folder(recipe: Recipe, folder: Path, resume: bool, only: str | None) -> bool:
    """Make the folder, or check that it holds this very run. Returns whether to continue what is in it."""
    saved = folder / "recipe.toml"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not saved.is_file():
            raise UserError(f"{folder}: holds something else than a run; choose another folder with --out")
        untouched = only is not None and not (folder / only).exists()
        if not resume and not untouched:
            raise UserError(f"{folder}: holds an earlier run; continue it with --resume, or choose another with --out")
        changed = differences(read_recipe(saved), recipe)
        if changed:
            raise UserError(f"{folder}: was started with another recipe ({'; '.join(changed)}); choose another --out")
        return resume
    if resume:
        print(f"{folder}: nothing to resume there; starting from the beginning")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".recipe.partial"
    temporary.write_text(to_toml(recipe), encoding="utf-8")
    temporary.rename(saved)
    return False


# ---- the model ----


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
    scheme = Scheme.parse(wanted.quantize) if wanted.quantize else None
    model = weights.load_model(wanted.base, device=device if scheme else "cpu", quantize=scheme)
    if wanted.adapter:
        lora.merge_peft(model, Path(wanted.adapter))
    return model.to(device) if scheme else model


def fresh(run: Run) -> LLaVA:
    """The run's model at the start of a stage that ranks share: on meta, or in 4 bits and whole on every rank."""
    if not run.recipe.model.quantize:
        return on_meta(run.model)
    model, dtypes = load_base(run.recipe.model, run.device), {n: p.dtype for n, p in run.model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    model.config = run.model.config
    for stage in run.finished:
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


def make_tokenizer(recipe: Recipe, folder: Path) -> Tokenizer:
    wanted = recipe.model
    name = wanted.tokenizer or wanted.base or wanted.decoder_from
    if not name:
        raise UserError(
            "model: no tokenizer; set tokenizer to a folder, to 'data' to train one on the stages' data, or to 'shapes'"
        )
    if name in TOKENIZERS:
        module, function = TOKENIZERS[name].split(":")
        if not (folder / "tokenizer" / "tokenizer_config.json").is_file():
            getattr(importlib.import_module(module), function)(folder / "tokenizer", recipe)
        return load_tokenizer(folder / "tokenizer")
    return load_tokenizer(weights.resolve(name))


def new_config(wanted: ModelRecipe, tokenizer: Tokenizer) -> ModelConfig:
    """Sizes from the parts' own config.json where there are parts, with the recipe's tables laid over them.

    The vocabulary's size and its special ids come from the tokenizer where the tables are silent.
    """
    config = ModelConfig()
    tables: dict[str, dict[str, Any]] = {name: dict(table) for name, table in wanted.tables.items()}
    if wanted.vision_from:
        path = weights.resolve(wanted.vision_from)
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
        path = weights.resolve(wanted.decoder_from)
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
        # PyTorch's own start, which the papers' learning rates of stage 1 are for.
        newline = config.layout.merge == "unpad"
        sizes = config.vision.feature_size, config.decoder.hidden_size
        model.projector = Projector(config.projector, *sizes, newline)
    else:
        model = LLaVA(config)
        model.init_weights(seed)
    named = dict(model.named_parameters())
    given: set[str] = set()
    for source, part, layout in sources:
        if source:
            folder = weights.resolve(source)
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
        model = on_meta(model)
    return model


def is_llava(raw: dict[str, Any]) -> bool:
    """Whether a config.json is that of a whole LLaVA, whose tower can be taken out."""
    return raw.get("model_type", "").startswith("llava")


def pick_device(name: str) -> torch.device:
    if name == "auto":
        backends = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        return torch.device(next((kind for kind, there in backends.items() if there), "cpu"))
    kinds = ("auto", "cpu", "cuda", "mps")
    if name.split(":")[0] not in kinds:
        raise UserError(f"device '{name}'{nearest(name, kinds)}")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device '{name}': this PyTorch sees no GPU; use device = \"cpu\"")
    return device


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{device.type} ({torch.get_num_threads()} threads), torch {torch.__version__}"


def count(model: LLaVA) -> str:
    parts = ((name, lora.count(part)) for name, part in model.named_children())
    return "parameters: " + ", ".join(f"{name} {number:,}" for name, number in parts)
