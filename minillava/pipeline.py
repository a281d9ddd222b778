"""A whole run: its stages one after the other, and how a killed one goes on.

The run's folder holds recipe.toml (as used), log.jsonl, curves.png, tokenizer/ where the run made one, and for each
stage STAGE/checkpoints, STAGE/model (the export, in Hugging Face layout) and STAGE/done.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from minillava import checkpoint, look, lora, parallel
from minillava.build import fresh, load_stage, make_run, read_config
from minillava.config import UserError
from minillava.device import describe_device, pick_device
from minillava.llava import LLaVA
from minillava.progress import Log, plot
from minillava.recipe import Recipe, StageConfig, differences, read_recipe, stage_index, to_toml
from minillava.tasks import LLaVATask, Run, export, export_adapters, make_task, task_class
from minillava.trainer import Trainer

ANSWERS = 8  # to held-out samples, written at a stage's end


def run_recipe(recipe: Recipe, resume: bool = False, only: str | None = None) -> dict[str, dict[str, float]]:
    """Train the stages of a recipe (or `only` one) and return what each one's last evaluation measured.

    Raises UserError where the folder holds another run, or this one and `resume` is not set.
    """
    began_s = time.monotonic()
    folder = recipe.folder
    chosen = recipe.stage if only is None else (recipe.stage[stage_index(recipe, only)],)
    device = parallel.start(pick_device(recipe.device, ("cuda", "mps")), recipe.timeout)
    with parallel.main_first():
        if parallel.is_main():
            resume = open_folder(recipe, folder, resume or parallel.restarted(), only)
    resume = bool(parallel.agree([resume and parallel.is_main()])[0])
    torch.manual_seed(recipe.seed)
    run = make_run(recipe, folder, device)
    ranks = f", {parallel.world()} ranks" if parallel.world() > 1 else ""
    sizes = ", ".join(f"{name} {lora.count(part):,}" for name, part in run.model.named_children())
    print(f"{recipe.name} in {folder} on {describe_device(device)}{ranks}; parameters: {sizes}")
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
    """Train one stage, export it and write sample answers; returns what its last evaluation measured."""
    print(f"stage {stage.name}: {stage.task}")
    seed, shared = run.recipe.seed if stage.seed < 0 else stage.seed, issubclass(task_class(stage), LLaVATask)
    torch.manual_seed(seed + parallel.rank() * shared)  # ranks that share a step drop out differently
    began_s = time.monotonic()
    folder = run.folder / stage.name
    run.model.config = run.config
    if run.fill is not None:
        run.model = fresh(run)
        if not shared:
            run.fill(run.model)
    task = make_task(run, stage)
    trainer = Trainer(task, stage, run.device, folder, log, resume, run.recipe)
    if parallel.is_main():
        log.rewind(stage.name, trainer.step)
    print(f"  {trainer.describe()}", flush=True)
    measured = trainer.run()
    trainer.finish(measured)
    skipped = trainer.skipped
    del trainer  # with the optimizer's memory, which the answers may need
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
    print(summary + (f"; {skipped} steps skipped" if skipped else ""), flush=True)
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
    target = folder / stage.name / f"model-{newest.name}"
    export(run, target)
    if stage.lora:
        trained = checkpoint.read(newest / checkpoint.TRAINED)
        export_adapters(run, target.with_name(f"adapter-{newest.name}"), trained, stage.lora)
    return target


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
    checkpoint.write_whole(saved, to_toml(recipe))
    return False
