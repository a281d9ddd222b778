"""python -m bench.train: the nano recipe's last stage, ours beside the same model in transformers' classes.

Both start from the same exported weights, draw the same samples (text and pictures are made and encoded by the same
code, ours in its thread, theirs in a DataLoader's worker), train projector and decoder in the same dtype and batch, and
take turns, a few steps each, in one process. A step is from one optimizer step's end to the next one's, data included;
the first of every turn is dropped. The peer is transformers' Trainer over LlavaForConditionalGeneration (SDPA, bf16 by
autocast, AdamW), with rows padded to the longest. Ours is timed with AdamW too, and with the recipe's own optimizer.
What it finds goes to bench/results/<device>, as train.json and train.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch.utils.data import Dataset

from bench import machine
from minillava.checkpoints.save import save_model
from minillava.recipe import read_recipe
from minillava.synthetic.task import ShapesTask
from minillava.training.pipeline import make_run, pick_device
from minillava.training.progress import Log
from minillava.training.trainer import Trainer

NANO = machine.ROOT / "recipes" / "nano.toml"


def ours(sets: list[str], folder: Path) -> tuple[ShapesTask, Callable[[int], list[float]]]:
    """Our stage, and a function that trains so many steps and returns when each ended."""
    recipe = read_recipe(NANO, sets, str(folder))
    stage = recipe.stage[-1]
    run = make_run(recipe, folder, pick_device(recipe.device))
    task = ShapesTask(run, stage)
    trainer = Trainer(task, stage, run.device, folder, Log(folder / "log.jsonl"), False)
    run.model.train()

    def steps(count: int) -> list[float]:
        ends = []
        for micros in task.batches(trainer.step, trainer.step + count):
            trainer.train_step(micros)
            trainer.step += 1
            ends.append(time.perf_counter())
        return ends

    return task, steps


class Rows(Dataset):
    """Our samples, encoded, for transformers' Trainer."""

    def __init__(self, task: ShapesTask):
        self.data = task.dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.data[index]
        return {"input_ids": example.ids, "labels": example.labels, "pixel_values": example.pixels_NCHW}


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch as LLaVA's collator makes it: padded on the right to the longest; some rows may have no pixels."""
    longest = max(len(row["input_ids"]) for row in rows)

    def fill(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    ids = fill("input_ids", 0)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask, pixels = (torch.arange(longest) < lengths[:, None]).long(), [row["pixel_values"] for row in rows]
    batch = {"input_ids": ids, "labels": fill("labels", -100), "attention_mask": mask}
    pixels = [views_NCHW for views_NCHW in pixels if views_NCHW is not None]
    return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})


def theirs(task: ShapesTask, checkpoint: Path, folder: Path) -> tuple[Any, Callable[[int], list[float]]]:
    """transformers' model, and a function that trains it so many steps with its Trainer."""
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    stage, cpu = task.stage, task.run.device.type == "cpu"
    half = task_dtype(task) == torch.bfloat16

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    def steps(count: int) -> list[float]:
        clock = Clock()
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=count, per_device_train_batch_size=stage.batch_size,
            learning_rate=min(stage.lr.values()), adam_beta1=stage.betas[0], adam_beta2=stage.betas[1],
            warmup_steps=1, lr_scheduler_type="cosine", max_grad_norm=stage.clip, bf16=half,
            use_cpu=cpu, dataloader_num_workers=1, remove_unused_columns=False, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, optim="adamw_torch",
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, padded, Rows(task), callbacks=[clock])
        trainer.train()
        return clock.ends

    return model, steps


def task_dtype(task: ShapesTask) -> torch.dtype:
    from minillava.training.trainer import compute_dtype

    return compute_dtype(task.stage.dtype, task.run.device)


def same_loss(task: ShapesTask, model: Any) -> float:
    """How far the two models' losses on one batch are apart, relatively, in float32."""
    rows = [Rows(task)[i] for i in range(16)]
    with torch.no_grad():
        batch = {key: value.to(task.run.device) for key, value in padded(rows).items()}
        peer = model.to(task.run.device)(**batch).loss.item()
        total, count = task.loss(task.run.model, task.dataset.batch(range(16), 0))
    return abs(total.item() / count - peer) / peer


def table(result: dict[str, Any], names: list[str]) -> str:
    """The result as Markdown."""
    facts, limits = result["facts"], result["limits"]
    lines = [
        f"# A training step of recipe nano's last stage on {facts['device']}, {facts['threads']} threads",
        "",
        f"{machine.made_of(facts)}; {result['dtype'].removeprefix('torch.')}; "
        f"{result['batch_size']} samples a step; the two models' first losses are {result['loss_apart']:.1e} apart.",
        f"Measured: copy {limits['copy_bytes_per_s'] / 1e12:.3f} TB/s, "
        f"matmul {limits['matmul_flop_per_s'] / 1e12:.3f} TFLOP/s.",
        "",
        "| | ms a step (quartiles) | samples/s | of transformers' speed |",
        "|---|---|---|---|",
    ]
    for name in names:
        ms = [1e3 * result[name][key] for key in ("median_s", "low_s", "high_s")]
        lines.append(f"| {name} | {ms[0]:.1f} ({ms[1]:.1f}-{ms[2]:.1f}) | {result[name]['samples_per_s']:.1f} "
                     f"| {result[name]['times_transformers']:.2f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn, the first of which is dropped")
    parser.add_argument("--batch-size", type=int, default=192)
    machine.add_out(parser)
    chosen = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = chosen.rounds * chosen.steps
    sets = [f"stage.*.steps={total}", f"stage.*.batch_size={chosen.batch_size}"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        task, adamw = ours([*sets, "stage.*.optimizer=adamw"], folder / "adamw")
        save_model(task.run.model.to(torch.float32), folder / "model", task.run.tokenizer)
        model, peer = theirs(task, folder / "model", folder / "peer")
        apart = same_loss(task, model)
        own = ours(sets, folder / "own")[1]
        turns = {"minillava": adamw, "minillava, recipe's optimizer": own, "transformers Trainer": peer}
        seconds: dict[str, list[float]] = {name: [] for name in turns}
        for number in range(chosen.rounds):
            for name, turn in turns.items():
                ends = turn(chosen.steps)
                seconds[name] += [b - a for a, b in pairwise(ends)]
            print(f"round {number + 1} of {chosen.rounds}", flush=True)
    result: dict[str, Any] = {
        "facts": machine.facts(device),
        "dtype": str(task_dtype(task)),
        "batch_size": chosen.batch_size,
        "loss_apart": apart,
        "limits": machine.limits(device, task_dtype(task), tiny=device == "cpu"),
    }
    for name, times in seconds.items():
        low, median, high = quantiles(times, n=4)
        result[name] = {"low_s": low, "median_s": median, "high_s": high, "samples_per_s": chosen.batch_size / median}
    for name in turns:
        result[name]["times_transformers"] = result["transformers Trainer"]["median_s"] / result[name]["median_s"]
    text = table(result, list(turns))
    print(text, end="")
    out = machine.out(chosen, device)
    (out / "train.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "train.md").write_text(text, encoding="utf-8")
    print(f"wrote {out}/train.json, train.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
