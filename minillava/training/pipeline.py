"""A whole run: its stages one after the other, and how a killed one goes on.

The run's folder holds recipe.toml (as used), log.jsonl, curves.png, tokenizer/ where the run made one, and for each
stage STAGE/checkpoints, STAGE/model (the export, in Hugging Face layout) and STAGE/done.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from minillava import files
from minillava.checkpoints.checkpoint import Checkpoint, without_memory
from minillava.data.survey import show_samples, spread, survey
from minillava.device import describe_device, pick_device
from minillava.errors import UserError
from minillava.layers import lora
from minillava.recipe import Recipe, StageConfig, differences, may_change, read_recipe, stage_index, to_toml
from minillava.schema import read_json
from minillava.training import parallel, train_state
from minillava.training.build import load_stage, make_run, read_config, read_weights, renew
from minillava.training.export import export, export_adapters, write_answers
from minillava.training.progress import Log, plot, read_log
from minillava.training.task import Run, make_task
from minillava.training.tasks import TASKS, check_task
from minillava.training.trainer import Trainer

SURVEYED = 1000  # samples that are encoded to count what is in the data
ANSWERS = 8  # to held-out samples, written at a stage's end


def run_recipe(recipe: Recipe, resume: bool = False, only: str | None = None) -> dict[str, dict[str, float]]:
    """Train the stages of a recipe (or `only` one) and return what each one's last evaluation measured.

    Raises UserError where the folder holds another run, or this one and not `resume`, or another process writes there.
    """
    chosen = recipe.stage if only is None else (recipe.stage[stage_index(recipe, only)],)
    for stage in chosen:
        check_task(stage)
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS reads when it starts
        torch.use_deterministic_algorithms(True, warn_only=True)
    device = parallel.start(pick_device(recipe.device, ("cuda", "mps")), recipe.timeout)
    with contextlib.ExitStack() as until_the_end:
        with parallel.main_first():
            if parallel.is_main():
                check_folder(recipe.folder)
                until_the_end.enter_context(files.claimed(recipe.folder))
                resume = open_folder(recipe, recipe.folder, resume or parallel.restarted(), only)
        resume = bool(parallel.agree([resume and parallel.is_main()])[0])
        try:
            return run_stages(recipe, chosen, device, resume)
        except OSError as error:
            if error.filename is None:  # of what is printed
                raise
            newest = [train_state.latest(recipe.folder / stage.name / "checkpoints") for stage in recipe.stage]
            found = [path for path in newest if path]
            left = f"--resume goes on from {found[-1]}" if found else "no checkpoint was saved yet"
            raise UserError(f"{files.refused(error)}; {left}") from error


def run_stages(
    recipe: Recipe, chosen: tuple[StageConfig, ...], device: torch.device, resume: bool
) -> dict[str, dict[str, float]]:
    """Train the chosen stages in the recipe's folder, which is this run's alone; returns what `run_recipe` does."""
    began_s, folder = time.monotonic(), recipe.folder
    torch.manual_seed(recipe.seed)
    run = make_run(recipe, folder, device)
    ranks = f", {parallel.world()} ranks" if parallel.world() > 1 else ""
    sizes = ", ".join(f"{name} {lora.count(part):,}" for name, part in run.model.named_children())
    print(f"{recipe.name} in {folder} on {describe_device(device)}{ranks}; parameters: {sizes}")
    log = Log(folder / "log.jsonl", recipe.sinks) if parallel.is_main() else Log(Path(os.devnull))
    results: dict[str, dict[str, float]] = {}
    picture = folder / "curves.png"
    curves = f"curves: {picture}" if picture.is_file() else "no curves.png"
    try:
        for stage in recipe.stage[: recipe.stage.index(chosen[-1]) + 1]:
            finished = (folder / stage.name / "done.json").is_file()
            if stage in chosen and not (resume and finished):
                results[stage.name] = run_stage(run, stage, log, resume)
                if parallel.is_main():
                    curves = plot(log.path, picture)
            else:
                results |= take_finished(run, stage)
    finally:
        log.close()
    print(f"done in {time.monotonic() - began_s:,.0f} s; {curves}")
    if (model := folder / chosen[-1].name / "model").is_dir():
        print(f"ask it: minillava ask --model {model} --image FILE --prompt TEXT")
    return results


def take_finished(run: Run, stage: StageConfig) -> dict[str, dict[str, float]]:
    """Give the run what an earlier run made of a stage, and return what that measured; nothing if it never began."""
    folder = run.folder / stage.name
    if not folder.exists():
        print(f"stage {stage.name}: has not been run in {run.folder}; going on without it")
        return {}
    if not (folder / "done.json").is_file():
        raise UserError(f"{folder}: is not finished; finish it with --resume --stage {stage.name}")
    if parallel.is_main():  # it may have been killed behind its last word
        train_state.keep_weights(folder / "checkpoints")
    run.finished.append(stage)
    if parallel.world() == 1:
        load_stage(run, stage)
    print(f"stage {stage.name}: finished before")
    done = folder / "done.json"
    measured = read_json(done).get("eval")
    if not isinstance(measured, dict):
        raise UserError(f"{done}: has no measurements under 'eval'; remove it to finish the stage again")
    return {stage.name: measured}


def run_stage(run: Run, stage: StageConfig, log: Log, resume: bool) -> dict[str, float]:
    """Train one stage, export it and write sample answers; returns what its last evaluation measured."""
    print(f"stage {stage.name}: {stage.task}")
    shared = TASKS[stage.task].shared
    torch.manual_seed(run.seed(stage) + parallel.rank() * shared)  # ranks that share a step drop out differently
    began_s = time.monotonic()
    folder = run.folder / stage.name
    # Where ranks share the work, each stage splits a model on meta and reads its shards; see `build.read_weights`.
    if parallel.world() > 1:
        renew(run)
        if not shared:
            read_weights(run)
    task = make_task(run, stage)
    trainer = Trainer(task, stage, run.device, folder, log, resume, run.recipe)
    if parallel.is_main():
        log.rewind(stage.name, trainer.step, trainer.steps)
    print(f"  {trainer.describe()}", flush=True)
    measured = trainer.run()
    trainer.finish(measured)
    # The optimizer's memory goes before answers are asked for; adapters become weights of the next stage's model.
    skipped = trainer.skipped
    del trainer
    run.finished.append(stage)
    if parallel.world() == 1 and stage is not run.recipe.stage[-1]:
        adapters = lora.detach(run.model)
        lora.merge(dict(run.model.named_parameters()), adapters, stage.lora)
    if parallel.is_main() and task.held_out is not None and "template" not in stage.chat:
        shown = [task.held_out.samples[i] for i in spread(len(task.held_out), ANSWERS)]
        try:
            write_answers(folder / "model", shown, folder / "answers.jsonl", run.device)
        except torch.OutOfMemoryError:
            print("  no sample answers: the exported model does not fit beside the training")
    parallel.barrier()
    tally = f"; {task.tally}" if task.tally else ""
    skips = f"; {skipped} steps skipped" if skipped else ""
    print(f"  {time.monotonic() - began_s:,.0f} s{tally}{skips}", flush=True)
    return measured


def inspect_recipe(recipe: Recipe, number: int, only: str | None = None) -> None:
    """Show `number` samples of each stage, or of `only` one, as the model would see them; no weights are loaded.

    Raises UserError where a sample cannot be used or trains nothing.
    """
    chosen = recipe.stage if only is None else (recipe.stage[stage_index(recipe, only)],)
    with tempfile.TemporaryDirectory() as folder:
        base = Checkpoint.open(recipe.model.base) if recipe.model.base else None
        config, tokenizer = read_config(recipe, Path(folder), base)
        run = Run(recipe, Path(folder), without_memory(config), tokenizer, torch.device("cpu"), torch.float32)
        for stage in chosen:
            print(f"stage {stage.name}: {stage.task}")
            if not TASKS[stage.task].shared:
                print("  makes its own data, which is not shown")
                continue
            task = make_task(run, dataclasses.replace(stage, row_tokens=0))
            show_samples(task.dataset, number)  # type: ignore[attr-defined]
            found = survey(task.dataset, SURVEYED)  # type: ignore[attr-defined]
            print(found.by_file())
            found.check(allowed=0)


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
    reached = [stage for stage in stages if train_state.latest(folder / stage.name / "checkpoints")]
    if not reached or (only and reached[-1].name != only):
        raise UserError(f"{folder}: stage {only or stages[0].name} has no checkpoint yet; wait for one (save_every)")
    run = make_run(recipe, folder, torch.device("cpu"))
    for stage in reached:
        load_stage(run, stage)
    run.finished = reached[:-1]
    newest = train_state.latest(folder / stage.name / "checkpoints")
    assert newest is not None
    target = folder / stage.name / f"model-{newest.name}"
    export(run, target)
    if stage.lora:
        trained = train_state.read(newest / train_state.TRAINED)
        export_adapters(run, target.with_name(f"adapter-{newest.name}"), trained, stage)
    return target


def check_folder(folder: Path) -> None:
    """Raises UserError where a folder holds something else than a run."""
    if folder.exists() and (not folder.is_dir() or not (files.is_empty(folder) or (folder / "recipe.toml").is_file())):
        raise UserError(f"{folder}: holds something else than a run; choose another folder with --out")


def open_folder(recipe: Recipe, folder: Path, resume: bool, only: str | None) -> bool:
    """Begin a run in the folder, or check that it holds this very run. Returns whether to continue what is in it."""
    saved = folder / "recipe.toml"
    if saved.is_file():
        untouched = only is not None and not (folder / only).exists()
        if not resume and not untouched:
            raise UserError(f"{folder}: holds an earlier run; continue it with --resume, or choose another with --out")
        take_changes(recipe, folder, differences(read_recipe(saved), recipe))
        return resume
    if resume:
        print(f"{folder}: nothing to resume there; starting from the beginning")
    files.write_whole(saved, to_toml(recipe))
    return False


def take_changes(recipe: Recipe, folder: Path, changed: dict[str, str]) -> None:
    """Go on with other values: each is printed, logged and kept in recipe.toml.

    Raises UserError for what cannot change under a run, or is of a stage that is finished.
    """
    fixed = [f"{key}: {values}" for key, values in changed.items() if not may_change(key, values)]
    if fixed:
        raise UserError(
            f"{folder}: was begun with other values ({'; '.join(fixed)}), which cannot change on the way; leave them "
            "as they were to go on (--resume takes the run's own recipe), or begin another run with another --out"
        )
    rows: list[dict[str, Any]] = []
    for key, values in changed.items():
        word, _, name = key.partition(".")
        stage = name.partition(".")[0] if word == "stage" else recipe.stage[0].name
        if word == "stage" and (folder / stage / "done.json").is_file():
            raise UserError(
                f"{folder}: stage '{stage}' is finished, {key} cannot change; begin another run from its model with "
                f"--set model.base={folder / stage / 'model'}"
            )
        newest = train_state.latest(folder / stage / "checkpoints")
        step = int(newest.name.removeprefix("step-")) if newest else 0
        print(f"{folder}: goes on with {key}: {values}")
        rows.append({"stage": stage, "step": step, "changed": {key: values}})
    if rows:
        log = folder / "log.jsonl"
        rows = (read_log(log) if log.is_file() else []) + rows  # without a line that a kill has cut off
        files.write_whole(log, "".join(json.dumps(row) + "\n" for row in rows))
        files.write_whole(folder / "recipe.toml", to_toml(recipe))
