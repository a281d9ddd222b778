"""The loop that every stage uses.

Trained parameters are float32 masters. Each step computes with copies of them in the compute dtype, which stand in the
model for as long as the step lasts, so that gradients arrive in float32 and frozen parts are converted once a stage;
there is no autocast. With several ranks FSDP2 does the same to the shards (minillava.training.parallel).
A step's loss is the sum over its micro-batches, those of all ranks, divided by the supervised positions of all of them,
so neither accumulation nor ranks change it (averaging means, as the HF Trainer did, does: LLaVA issue 1407).
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from minillava import files
from minillava.checkpoints.checkpoint import Checkpoint
from minillava.device import compute_dtype, matmul_peak, peak_bytes
from minillava.errors import UserError
from minillava.layers import lora, sharded
from minillava.recipe import Recipe, StageConfig
from minillava.training import parallel, train_state
from minillava.training.build import read_weights
from minillava.training.export import export_adapters
from minillava.training.llava_task import LLaVATask
from minillava.training.metrics import Clock
from minillava.training.optim import make_optimizer
from minillava.training.progress import Bar, Log
from minillava.training.task import Task

MAX_NON_FINITE = 5  # steps in a row without a finite gradient before the run stops


class Trainer:
    """Trains one stage in `folder`, from the newest checkpoint there if `resume` is set.

    `recipe` says how the ranks that torchrun started share the model.
    """

    def __init__(
        self, task: Task, stage: StageConfig, device: torch.device, folder: Path, log: Log, resume: bool,
        recipe: Recipe | None = None,
    ):  # fmt: skip
        self.task, self.stage, self.folder, self.log = task, stage, folder, log
        self.recipe = recipe or Recipe()
        self.device, self.dtype = device, compute_dtype(stage.dtype, device)
        self.steps = task.total_steps()
        self.step = self.skipped = self.non_finite = 0
        self.unlogged = 0  # steps since the last line of the log
        self.shared = task if parallel.world() > 1 and isinstance(task, LLaVATask) else None
        self.trained = self._choose_parameters()
        if self.shared:
            parallel.shard(task.model, self.dtype, self.recipe.shard, self.recipe.offload, device)
            read_weights(self.shared.run)
            named = {f"{part}.{n}": p for part, module in task.parts.items() for n, p in module.named_parameters()}
            self.trained = {name: named[name] for name in self.trained}  # sharding has put new ones in their place
        seed = self.recipe.seed if stage.seed < 0 else stage.seed
        lora.initialise({n: p for n, p in self.trained.items() if "lora_" in n}, seed)
        self.optimizer = make_optimizer(task.model, self.trained, stage)
        trained = {id(p) for p in self.trained.values()}
        # Frozen weights in the compute dtype. Those that have it already are not copied.
        self.frozen = {
            id(p): p.detach().to(self.dtype)
            for p in task.model.parameters()
            if id(p) not in trained and not self.shared
        }
        self.plain = self.shared is not None or all(p.dtype == self.dtype for p in task.model.parameters())
        self.saver = train_state.Saver(folder / "checkpoints", stage.keep)
        self.clock = Clock(device, task.parts.get("vision"))
        task.prepare(self.weights)
        newest = train_state.latest(folder / "checkpoints") if resume else None
        if newest is not None:
            self._load(newest)

    # ---- what is trained ----

    def _choose_parameters(self) -> dict[str, Tensor]:
        """Freeze everything but the parts that have a rate; name what is left PART.NAME and make it float32."""
        parts, rates = self.task.parts, self.stage.lr
        for parameter in self.task.model.parameters():
            parameter.requires_grad_(False)
        trained: dict[str, Tensor] = {}
        for part, module in parts.items():
            if part in self.stage.lora:
                adapters = lora.attach(module, part, self.stage.lora[part])
                trained |= {name: parameter.requires_grad_(True) for name, parameter in adapters.items()}
            elif part in rates:
                if any(hasattr(layer, "dequantize") for layer in module.modules()):
                    raise UserError(f"stage '{self.stage.name}': {part} is in 4 bits and learns by adapters only; "
                                    f"add lora.{part}, or leave lr.{part} out")  # fmt: skip
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
            count = lora.count(module)
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            kind = f"{part} adapters" if part in self.stage.lora else part
            words.append(f"{kind} {trained:,} at {rates[part]:g}" if trained else f"{part} {count:,} frozen")
        stage, accumulation = self.stage, -(-self.stage.batch_size // self.stage.micro)
        batch = f"{stage.batch_size} samples" + (f" ({accumulation} x {stage.micro})" if accumulation > 1 else "")
        dtype = str(self.dtype).removeprefix("torch.")
        dtype += f" on {parallel.world()} ranks" if self.shared else ""
        resumed = f", going on at step {self.step:,}" if self.step else ""
        return f"{'; '.join(words)}\n  {self.steps:,} steps of {batch} in {dtype}{resumed}"

    # ---- a step ----

    @contextmanager
    def weights(self) -> Iterator[Callable[..., Any]]:
        """The model, with its weights as they are now in the compute dtype in it: for as long as this lasts, because a
        backward pass may compute parts of the forward pass again."""
        model, places = self.task.model, []
        if not self.plain:
            copies = self.frozen | {id(p): p.to(self.dtype) for p in self.trained.values()}
            places = [(m._parameters, k, p) for m in model.modules() for k, p in m._parameters.items() if p is not None]
            for slots, key, parameter in places:
                slots[key] = copies[id(parameter)]  # type: ignore[assignment]
        try:
            yield model
        finally:
            for slots, key, parameter in places:
                slots[key] = parameter
            parallel.reshard(model)

    def train_step(self, micros: list[Any]) -> dict[str, Any]:
        """One optimizer step; the loss and the gradient norm are means over the supervised positions."""
        total, count = torch.zeros((), device=self.device), 0
        if self.shared:
            micros = self.shared.alike(micros)
        with self.weights() as call:
            for micro in micros:
                with self.clock("forward"):
                    loss, supervised = self.task.loss(call, micro)
                if loss.requires_grad:  # text alone has no gradient where only the projector is trained
                    with self.clock("backward"):
                        loss.backward()
                total += loss.detach()
                count += supervised
        grads = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = sharded.whole(torch.nn.utils.get_total_norm(grads))
        measured = self.task.measures()
        sums = torch.stack([total, *measured.values()])
        if self.shared:
            sums = parallel.summed(torch.cat([sums.double(), sums.new_tensor([count]).double()]))
            count, sums = int(sums[-1]), sums[:-1]
        # The step's one synchronisation.
        loss_sum, norm_sum, *others = torch.cat([sums[:1], norm.to(sums)[None], sums[1:]]).tolist()
        values = {"loss": loss_sum / max(count, 1), "grad_norm": norm_sum / max(count, 1), "supervised": count}
        values |= {name: value / max(count, 1) for name, value in zip(measured, others)}
        if count and math.isfinite(loss_sum) and math.isfinite(norm_sum):
            self.non_finite = 0
            scale = 1 / count
            if self.stage.clip:
                scale *= min(1.0, self.stage.clip / (values["grad_norm"] + 1e-6))
            if grads:
                torch._foreach_mul_([sharded.local(grad) for grad in grads], scale)
            factor = schedule(self.stage, self.step, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.stage.lr[group["part"]] * factor
            with self.clock("optimizer"):
                self.optimizer.step()
        else:
            self._skip(values)
        self.task.model.zero_grad()
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
        watch = parallel.Watch(self.folder, self.recipe.timeout)
        undo = parallel.wrap_blocks(self.task.model, stage.checkpointing, stage.compile)
        measured: dict[str, float] = {}
        self.task.model.train()
        try:
            with interrupt_asked() as asked:
                while self.step < self.steps:
                    watch.step(f"stage {name}, step {self.step + 1}")
                    self._next_step(batches, bar)
                    if stage.eval_every and self.step % stage.eval_every == 0 and self.step < self.steps:
                        self._evaluate(bar)
                    # Ranks do not get a signal in the same step: all stop when one did.
                    due = stage.save_every and self.step % stage.save_every == 0
                    (stopped,) = parallel.agree([len(asked)])
                    if due or stopped or self.step == self.steps:
                        self.save()
                    if stopped and self.step < self.steps:
                        raise KeyboardInterrupt
            watch.step(f"stage {name}, last evaluation")
            measured = self._evaluate(bar)
            self.saver.wait()
        finally:
            # A run that was interrupted still writes what it saved; one that failed must not wait for other ranks.
            failed = isinstance(sys.exc_info()[1], Exception)
            watch.close(failed)
            undo()
            if not failed:
                self.saver.wait()
            bar.close()
            self.clock.close()
            if hasattr(batches, "close"):
                batches.close()
        return measured

    def _next_step(self, batches: Iterator[list[Any]], bar: Bar) -> None:
        """One step with its data, shown and logged."""
        began_s = time.perf_counter()
        micros = next(batches)
        data_s = time.perf_counter() - began_s
        values = self.train_step(micros)
        step_s = time.perf_counter() - began_s
        self.step += 1
        self.unlogged += 1
        bar.step(values["loss"], values["supervised"], data_s, step_s, self.skipped)
        if self.step % self.stage.log_every == 0 or self.step == self.steps:
            self._log_step(values, micros, data_s, step_s)
        if self.step == 1:
            self._note_idle(bar)

    def _log_step(self, values: dict[str, Any], micros: list[Any], data_s: float, step_s: float) -> None:
        """A line of the log: times are the first rank's, those of phases means since the line before; all else is of
        all ranks together."""
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        rates = {group["part"]: group["lr"] for group in self.optimizer.param_groups}
        counts = self.task.counts(micros)
        if self.shared:
            together = parallel.summed(torch.tensor(list(counts.values()), dtype=torch.float64))
            counts = {key: int(value) for key, value in zip(counts, together.tolist())}
        if counts["flops"]:
            peak = matmul_peak(self.device, self.dtype) * (parallel.world() if self.shared else 1)
            finite["mfu"] = float(f"{counts['flops'] / step_s / peak:.4g}")
        if room := counts.pop("room", 0):
            counts["empty"] = round(1 - counts["tokens"] / room, 5)
        self.log.write(
            stage=self.stage.name, step=self.step, **finite, lr=rates, **counts,
            tok_per_s=round(counts["tokens"] / step_s, 1), supervised_per_s=round(values["supervised"] / step_s, 1),
            data_s=round(data_s, 5), **self.clock.read(self.unlogged), step_s=round(step_s, 5),
            peak_bytes=peak_bytes(self.device), skipped=self.skipped,
        )  # fmt: skip
        self.unlogged = 0

    def _note_idle(self, bar: Bar) -> None:
        """Say which trained parameters the first step did not reach (the blocks behind CLIP's chosen layer, say)."""
        idle = [name for name, p in self.trained.items() if p not in self.optimizer.state]
        if idle and not self.skipped:
            named = ", ".join(idle[:4]) + (", ..." if len(idle) > 4 else "")
            bar.note(f"  {len(idle)} trained tensors had no gradient in step 1: {named}")

    def _evaluate(self, bar: Bar) -> dict[str, float]:
        self.task.model.eval()
        of_steps = len(self.clock.marks)
        with torch.no_grad(), self.weights() as call:
            measured = self.task.evaluate(call)
        self.task.model.train()
        del self.clock.marks[of_steps:]
        if measured:
            self.log.write(stage=self.stage.name, step=self.step, eval=measured)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
            bar.note(f"  {self.stage.name} step {self.step:,}: {shown}")
        return measured

    # ---- checkpoints ----

    def save(self) -> None:
        """Save in the background; `saver.wait()` waits until it is done."""
        if parallel.is_main():
            self.log.sync()
        tensors, python = train_state.random_state()
        state = {"step": self.step, "skipped": self.skipped, "non_finite": self.non_finite, "random": python}
        state["task"] = parallel.gathered(self.task.tally.state() if self.task.tally else {})
        optimizer = train_state.optimizer_tensors(self.optimizer, self.trained)
        self.saver.save(self.step, self.trained, chain(optimizer, tensors.items()), state)

    def _load(self, path: Path) -> None:
        state = train_state.read_state(path)
        train_state.load(path / train_state.TRAINED, self.trained)
        train_state.load_optimizer(path / train_state.OPTIMIZER, self.optimizer, self.trained)
        train_state.load_random_state(path / train_state.OPTIMIZER, state["random"])
        self.step, self.skipped, self.non_finite = state["step"], state["skipped"], state["non_finite"]
        if self.step > self.steps:
            name = self.stage.name
            more = "give more epochs" if self.stage.epochs else f"give --set stage.{name}.steps={self.step} or more"
            raise UserError(f"stage '{name}': {path} is past its {self.steps:,} steps; {more}")
        if self.task.tally and parallel.rank() < len(state["task"]):
            self.task.tally.load(state["task"][parallel.rank()])

    def export(self) -> None:
        """Write what has been trained so far in Hugging Face layout, as folder model/ of the stage."""
        export = self.folder / "model"
        if parallel.is_main():
            for left in self.folder.glob(f".model-{'[0-9a-f]' * 8}*"):  # of a run that was killed while it exported
                shutil.rmtree(left)
        self.task.save(export)
        if self.stage.lora:
            assert isinstance(self.task, LLaVATask)  # no other has adapters
            trained = {n: t.cpu() for n, t in ((n, sharded.whole(p.detach())) for n, p in self.trained.items())}
            if parallel.is_main():
                export_adapters(self.task.run, self.folder / "adapter", trained, self.stage)
            self._compare(self.task, export)
        parallel.barrier()

    def _compare(self, task: LLaVATask, export: Path) -> None:
        """Say how far the merged model's logits are from the adapters': about what its dtype rounds off. Of the merged
        model only one block at a time is on the device."""
        model: Any = task.model.eval()
        with torch.no_grad(), self.weights() as call:
            adapted = task.probe(call)
        if parallel.is_main():
            try:
                merged = Checkpoint.open(export).load().under(model.config)
                coarse = max(torch.finfo(dtype).eps for dtype in (self.dtype, merged.decoder.embed.weight.dtype))
                parallel.passing_through(merged, self.device, self.dtype)
                with torch.no_grad():
                    apart = (task.probe(merged) - adapted).abs().max().item() / adapted.abs().max().item()
            except torch.OutOfMemoryError:
                print("  the merged model was not compared: not a block of it fits beside the training")
                return
            doubt = "" if apart <= coarse**0.5 else "; THAT IS MUCH: use adapter/ over the base, and report this"
            print(f"  the merged model's logits are within {apart:.1e} of the adapters' (of their largest){doubt}")

    def finish(self, measured: dict[str, float]) -> None:
        """Export the result, mark the stage as finished, and drop what only a continuation would need."""
        self.export()
        if parallel.is_main():
            done = {"steps": self.steps, "skipped": self.skipped, "eval": measured}
            files.write_whole(self.folder / "done.json", json.dumps(done, indent=1) + "\n")
            train_state.keep_weights(self.folder / "checkpoints")
        parallel.barrier()


def schedule(stage: StageConfig, step: int, steps: int) -> float:
    """Factor of the peak rate in step `step` (from 0): a linear rise, then half a cosine towards the floor.

    Linear: a line in place of the cosine. As in the HF Trainer, but for a step's shift: there the first has no rate.
    """
    warmup = math.ceil(stage.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if stage.schedule == "constant":
        return 1.0
    passed = (step - warmup) / max(1, steps - warmup)
    fallen = 1 - passed if stage.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * passed))
    return stage.floor + (1 - stage.floor) * fallen


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
