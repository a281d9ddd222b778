"""The loop that every stage uses.

Trained parameters are float32 masters. Each step computes with copies of them in the compute dtype, through
functional_call, so that gradients arrive in float32 and frozen parts are converted once a stage; there is no autocast.
A step's loss is the sum over its micro-batches divided by the supervised positions of all of them, so accumulation
equals the big batch (averaging means, as the HF Trainer did, does not: LLaVA issue 1407).
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from minillava import checkpoint
from minillava.config import UserError, nearest
from minillava.metrics import Clock, matmul_peak, peak_bytes
from minillava.optim import make_optimizer
from minillava.progress import Bar, Log
from minillava.recipe import StageConfig
from minillava.tasks import Task

MAX_NON_FINITE = 5  # steps in a row without a finite gradient before the run stops


class Trainer:
    """Trains one stage in `folder`, from the newest checkpoint there if `resume` is set."""

    def __init__(self, task: Task, stage: StageConfig, device: torch.device, folder: Path, log: Log, resume: bool):
        self.task, self.stage, self.folder, self.log = task, stage, folder, log
        self.dtype = compute_dtype(stage.dtype, device)
        self.steps = task.total_steps()
        self.step = self.skipped = self.non_finite = 0
        self.trained = self._choose_parameters()
        self.optimizer = make_optimizer(task.model, self.trained, stage)
        trained = {id(p) for p in self.trained.values()}
        self.named = dict(task.model.named_parameters())
        # Frozen weights in the compute dtype. Those that have it already are not copied.
        self.frozen = {n: p.detach().to(self.dtype) for n, p in self.named.items() if id(p) not in trained}
        self.loose = {n: p for n, p in self.named.items() if id(p) in trained}
        self.plain = all(p.dtype == self.dtype for p in self.named.values())
        self.clock = Clock(device, task.parts.get("vision"))
        self.device = device
        newest = checkpoint.latest(folder / "checkpoints") if resume else None
        if newest is not None:
            self._load(newest)

    # ---- what is trained ----

    def _choose_parameters(self) -> dict[str, Tensor]:
        """Freeze everything but the parts that have a rate; name what is left PART.NAME and make it float32."""
        parts, rates = self.task.parts, self.stage.lr
        for name in rates:
            if name not in parts:
                raise UserError(f"stage '{self.stage.name}': lr for '{name}', which task '{self.stage.task}' has not"
                                f"{nearest(name, parts)}")  # fmt: skip
        for parameter in self.task.model.parameters():
            parameter.requires_grad_(False)
        trained: dict[str, Tensor] = {}
        for part, module in parts.items():
            if part in rates:
                for name, parameter in module.named_parameters():
                    parameter.data = parameter.data.float()
                    trained[f"{part}.{name}"] = parameter.requires_grad_(True)
        found = {id(p) for p in self.task.model.parameters() if p.requires_grad}
        if found != {id(p) for p in trained.values()} or len(found) != len(trained):
            raise RuntimeError(f"task '{self.stage.task}': parts overlap or are not inside the model")
        return trained

    def describe(self) -> str:
        """What is trained at which rate, read back from the optimizer and the parameters, not from the recipe."""
        rates = {group["part"]: group["lr"] for group in self.optimizer.param_groups}
        words = []
        for part, module in self.task.parts.items():
            count = sum(p.numel() for p in module.parameters())
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            words.append(f"{part} {trained:,} at {rates[part]:g}" if trained else f"{part} {count:,} frozen")
        stage, accumulation = self.stage, -(-self.stage.batch_size // self.stage.micro)
        batch = f"{stage.batch_size} samples" + (f" ({accumulation} x {stage.micro})" if accumulation > 1 else "")
        dtype = str(self.dtype).removeprefix("torch.")
        resumed = f", going on at step {self.step:,}" if self.step else ""
        return f"{'; '.join(words)}\n  {self.steps:,} steps of {batch} in {dtype}{resumed}"

    # ---- a step ----

    def weights(self) -> Callable[..., Any]:
        """The model as a function, with the weights as they are now in the compute dtype."""
        model = self.task.model
        if self.plain:
            return model
        tensors = {**self.frozen, **{name: p.to(self.dtype) for name, p in self.loose.items()}}
        return lambda *args, **kwargs: functional_call(model, tensors, args, kwargs)

    def train_step(self, micros: list[Any]) -> dict[str, Any]:
        """One optimizer step; the loss and the gradient norm are means over the supervised positions."""
        call = self.weights()
        total, count = torch.zeros((), device=next(iter(self.trained.values())).device), 0
        for micro in micros:
            with self.clock("forward"):
                loss, supervised = self.task.loss(call, micro)
            if loss.requires_grad:  # text alone has no gradient where only the projector is trained
                with self.clock("backward"):
                    loss.backward()
            total += loss.detach()
            count += supervised
        del call
        grads = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        loss_sum, norm_sum = torch.stack([total, norm.to(total.device)]).tolist()  # the step's one synchronisation
        values = {"loss": loss_sum / max(count, 1), "grad_norm": norm_sum / max(count, 1), "supervised": count}
        if count and math.isfinite(loss_sum) and math.isfinite(norm_sum):
            self.non_finite = 0
            scale = 1 / count
            if self.stage.clip:
                scale *= min(1.0, self.stage.clip / (values["grad_norm"] + 1e-6))
            if grads:
                torch._foreach_mul_(grads, scale)
            factor = schedule(self.stage, self.step, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.stage.lr[group["part"]] * factor
            with self.clock("optimizer"):
                self.optimizer.step()
        else:
            self._skip(values)
        self.optimizer.zero_grad(set_to_none=True)
        return values

    def _skip(self, values: dict[str, Any]) -> None:
        self.skipped += 1
        self.non_finite += 1
        if self.non_finite >= MAX_NON_FINITE:
            raise UserError(
                f"stage '{self.stage.name}': {self.non_finite} steps in a row, the last {self.step + 1}, had no finite "
                f'gradient (loss {values["loss"]}, norm {values["grad_norm"]}); lower lr, or set dtype = "float32"'
            )

    # ---- the stage ----

    def run(self) -> dict[str, float]:
        """All steps that are left, then the last evaluation, whose measurements are returned."""
        stage, name = self.stage, self.stage.name
        bar = Bar(name, self.step, self.steps)
        batches = self.task.batches(self.step, self.steps)
        measured: dict[str, float] = {}
        self.task.model.train()
        try:
            with interrupt_asked() as asked:
                while self.step < self.steps:
                    began_s = time.perf_counter()
                    micros = next(batches)
                    data_s = time.perf_counter() - began_s
                    values = self.train_step(micros)
                    step_s = time.perf_counter() - began_s
                    first = self.step == 0
                    self.step += 1
                    bar.step(values["loss"], values["supervised"], data_s, step_s, self.skipped)
                    if self.step % stage.log_every == 0 or self.step == self.steps:
                        self._log_step(values, micros, data_s, step_s)
                    if first:
                        self._note_idle(bar)
                    if stage.eval_every and self.step % stage.eval_every == 0 and self.step < self.steps:
                        self._evaluate(bar)
                    due = stage.save_every and self.step % stage.save_every == 0
                    if due or asked or self.step == self.steps:
                        self.save()
                    if asked and self.step < self.steps:
                        raise KeyboardInterrupt
            measured = self._evaluate(bar)
        finally:
            bar.close()
            self.clock.close()
            if hasattr(batches, "close"):
                batches.close()
        return measured

    def _log_step(self, values: dict[str, Any], micros: list[Any], data_s: float, step_s: float) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        rates = {group["part"]: group["lr"] for group in self.optimizer.param_groups}
        tokens, flops = sum(map(self.task.tokens, micros)), sum(map(self.task.flops, micros))
        if flops:
            finite["mfu"] = round(flops / step_s / matmul_peak(self.device, self.dtype), 4)
        self.log.write(
            stage=self.stage.name, step=self.step, **finite, lr=rates, tokens=tokens, **self.task.counts(micros),
            tok_per_s=round(tokens / step_s, 1), supervised_per_s=round(values["supervised"] / step_s, 1),
            data_s=round(data_s, 5), **self.clock.read(), step_s=round(step_s, 5),
            peak_bytes=peak_bytes(self.device), skipped=self.skipped,
        )  # fmt: skip

    def _note_idle(self, bar: Bar) -> None:
        """Say which trained parameters the first step did not reach (the blocks behind CLIP's chosen layer, say)."""
        idle = [name for name, p in self.trained.items() if p not in self.optimizer.state]
        if idle and not self.skipped:
            named = ", ".join(idle[:4]) + (", ..." if len(idle) > 4 else "")
            bar.note(f"  {len(idle)} trained tensors had no gradient in step 1: {named}")

    def _evaluate(self, bar: Bar) -> dict[str, float]:
        self.task.model.eval()
        with torch.no_grad():
            measured = self.task.evaluate(self.weights())
        self.task.model.train()
        self.clock.marks.clear()
        if measured:
            self.log.write(stage=self.stage.name, step=self.step, eval=measured)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
            bar.note(f"  {self.stage.name} step {self.step:,}: {shown}")
        return measured

    # ---- checkpoints ----

    def save(self) -> None:
        random, python = checkpoint.random_state()
        tensors = checkpoint.optimizer_tensors(self.optimizer, self.trained) | random
        state = {"step": self.step, "skipped": self.skipped, "non_finite": self.non_finite, "random": python}
        state["task"] = self.task.state()
        files: dict[str, dict[str, Any]] = {
            checkpoint.TRAINED: self.trained,
            checkpoint.OPTIMIZER: tensors,
            checkpoint.STATE: state,
        }
        checkpoint.write(self.folder / "checkpoints", self.step, files, self.stage.keep)

    def _load(self, path: Path) -> None:
        state = checkpoint.read_state(path / checkpoint.STATE)
        checkpoint.fill(self.trained, checkpoint.read_tensors(path / checkpoint.TRAINED), path)
        tensors = checkpoint.read_tensors(path / checkpoint.OPTIMIZER)
        checkpoint.fill_optimizer(self.optimizer, self.trained, tensors)
        checkpoint.set_random_state(tensors, state["random"])
        self.step, self.skipped, self.non_finite = state["step"], state["skipped"], state["non_finite"]
        self.task.load_state(state["task"])

    def finish(self, measured: dict[str, float]) -> None:
        """Export the result, mark the stage as finished, and drop what only a continuation would need."""
        export, temporary = self.folder / "model", self.folder / ".model.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(export, ignore_errors=True)
        self.task.save(temporary)
        if temporary.exists():
            os.rename(temporary, export)
        checkpoint.write_json(
            self.folder / "done.json", {"steps": self.steps, "skipped": self.skipped, "eval": measured}
        )
        newest = checkpoint.latest(self.folder / "checkpoints")
        for path in (self.folder / "checkpoints").iterdir():
            if path != newest:
                shutil.rmtree(path)
        if newest is not None:
            (newest / checkpoint.OPTIMIZER).unlink(missing_ok=True)


def schedule(stage: StageConfig, step: int, steps: int) -> float:
    """Factor of the peak rate in step `step` (from 0): a linear rise, then half a cosine towards zero.

    As in the HF Trainer, but for one step's shift: there the first step has a rate of zero.
    """
    warmup = math.ceil(stage.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if stage.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 where the hardware multiplies it: elsewhere it would be emulated, and slower than float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None
    else:
        native = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if native else torch.float32


@contextmanager
def interrupt_asked() -> Iterator[list[int]]:
    """A list that SIGTERM and Ctrl-C fill, so that the step can be finished and saved; the second stops at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield asked
        return

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
