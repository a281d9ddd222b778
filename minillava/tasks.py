"""What a stage trains and on what: the interface that the trainer knows, and LLaVA's own task over its JSON data.

A run has one LLaVA, which its stages train one after the other; a task names the parts of it (and, where it needs
any, parts of its own, such as CLIP's text tower) and turns batches into losses.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pkgutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from minillava import lora, parallel
from minillava.config import ModelConfig, UserError, from_dict, nearest, to_dict
from minillava.data import IGNORE, MARKER, Batch, Example, Sample, pack
from minillava.hf_export import to_original
from minillava.image import prepare_views
from minillava.llava import LLaVA, next_labels
from minillava.loader import Dataset, Loader, Tally, check_supervision
from minillava.metrics import Work
from minillava.packing import Order
from minillava.recipe import LoRAConfig, Recipe, StageConfig
from minillava.samples import split_data, turns_of
from minillava.tokenizer import Tokenizer
from minillava.weights import save_model

# Name in a recipe -> module and factory (run, stage) -> Task.
TASKS = {
    "llava": "minillava.tasks:LLaVATask",
    "clip": "minillava.pretrain:ClipTask",
    "text": "minillava.pretrain:TextTask",
    "shapes": "minillava.shapes_task:ShapesTask",
}


@dataclass
class Run:
    """What the stages of a run share."""

    recipe: Recipe
    folder: Path
    model: LLaVA
    tokenizer: Tokenizer
    device: torch.device
    save_dtype: torch.dtype  # of exported checkpoints
    fill: Callable[[LLaVA], None] | None = None  # gives a model that is on meta its weights; None: it has them
    finished: list[StageConfig] = field(default_factory=list)  # stages whose results the model has, or shall be given

    def __post_init__(self) -> None:
        self.config: ModelConfig = self.model.config  # of the model that comes out; a stage's layout may differ


class Task(ABC):
    """One stage's work. Subclasses set what is here; of what is defined, the rest has defaults.

    Ranks share the steps and the model of an LLaVATask, which may train adapters; of others every rank does all work.
    """

    model: nn.Module  # what `loss` calls; what of it is in no part is frozen
    parts: dict[str, nn.Module]  # by the name that `lr` has for them; disjoint, all inside `model`
    stage: StageConfig

    def total_steps(self) -> int:
        """Optimizer steps of the stage."""
        if not self.stage.steps:
            raise UserError(f"stage '{self.stage.name}': its data has no end; set steps instead of epochs")
        return self.stage.steps

    @abstractmethod
    def batches(self, start: int, stop: int) -> Iterator[list[Any]]:
        """The micro-batches of steps start to stop (exclusive). Step k holds the same whatever `start` was."""

    @abstractmethod
    def loss(self, call: Callable[..., Any], micro: Any) -> tuple[Tensor, int]:
        """The SUM of the losses of a micro-batch and how many they are; `call` is `model` with the weights to use."""

    @abstractmethod
    def tokens(self, micro: Any) -> int:
        """How many tokens (or pairs) go through the model, for the rate that is shown."""

    def flops(self, micro: Any) -> float:
        """What a training step with it costs; 0 where nobody has counted."""
        return 0.0

    def counts(self, micros: list[Any]) -> dict[str, int]:
        """What else the log should have of a step's data, in numbers that add up over ranks."""
        return {}

    def evaluate(self, call: Callable[..., Any]) -> dict[str, float]:
        """Measurements by name; nothing where there is nothing to evaluate. Runs under no_grad and model.eval()."""
        return {}

    def probe(self, call: Callable[..., Any]) -> Tensor:
        """Logits for an input that is always the same, by which a model with adapters is compared with the export."""
        raise UserError(f"stage '{self.stage.name}': task '{self.stage.task}' trains no adapters; leave lora out")

    def save(self, folder: Path) -> None:  # noqa: B027 a task whose result is no checkpoint writes none
        """Export the result into a folder that does not exist yet."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside weights, step and random state, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 there is none
        """Take back what `state` returned."""

    def summary(self) -> str:
        """A line for the end of the stage; empty for none."""
        return ""


def task_class(stage: StageConfig) -> type[Task]:
    """The class of a stage's task. Raises UserError that suggests the nearest name."""
    if stage.task not in TASKS:
        raise UserError(f"stage '{stage.name}': no task '{stage.task}'{nearest(stage.task, TASKS)}")
    return pkgutil.resolve_name(TASKS[stage.task])


def make_task(run: Run, stage: StageConfig) -> Task:
    """The task of a stage. Raises UserError for an unknown one, and for what it cannot do."""
    cls = task_class(stage)
    if stage.lora and not issubclass(cls, LLaVATask):
        raise UserError(f"stage '{stage.name}': task '{stage.task}' trains no adapters; leave lora out")
    return cls(run, stage)  # type: ignore[call-arg]


def shape_options(stage: StageConfig, **known: Any) -> dict[str, Any]:
    """What a task reads of `shapes`, over the defaults `known`. Raises UserError for any other key."""
    for key in stage.shapes.keys() - known.keys():
        raise UserError(f"stage '{stage.name}': shapes.{key} is unknown{nearest(key, known)}")
    return known | stage.shapes


def export(run: Run, folder: Path) -> None:
    """The run's model as a Hugging Face folder, all of it in one dtype (masters are float32 while they are trained)."""
    with torch.device("meta"):
        model = LLaVA(run.model.config)
    # Every rank goes through all weights, because it holds its part of each; the first keeps and writes them.
    tensors = ((name, t.to("cpu", run.save_dtype)) for name, t in lora.weights(run.model))
    state = {name: tensor for name, tensor in tensors if parallel.is_main()}
    if parallel.is_main():
        model.load_state_dict(state, assign=True)
        save_model(model, folder, run.tokenizer)


def export_adapters(run: Run, folder: Path, trained: dict[str, Tensor], configs: dict[str, LoRAConfig]) -> None:
    """What was trained beside the run's base in PEFT's files, and in the original repository's where that has them."""
    wanted = run.recipe.model
    original = to_original(run.config, wanted.vision_from, wanted.decoder_from)
    lora.save_peft(folder, trained, configs, wanted.base, original)


class LLaVATask(Task):
    """Next-token loss on the answers of conversations about pictures: LLaVA's stages (arXiv 2304.08485, 4.2)."""

    def __init__(self, run: Run, stage: StageConfig):
        self.run, self.stage = run, stage
        self.model = run.model
        self.parts = {"vision": run.model.vision, "projector": run.model.projector, "decoder": run.model.decoder}
        self.config = merge_config(run.config, {"chat": stage.chat, "layout": stage.layout}, f"stage '{stage.name}'")
        run.model.config = dataclasses.replace(run.config, layout=self.config.layout)
        seed = stage.seed if stage.seed >= 0 else run.recipe.seed

        samples, held_out = self.read_samples(seed)
        limit = min(stage.max_tokens, self.config.decoder.max_positions)
        self.dataset = Dataset(samples, self.config, run.tokenizer, limit, seed)
        self.held_out = Dataset(held_out, self.config, run.tokenizer, limit, seed) if held_out else None
        self.tally = Tally(len(samples))
        print(f"  {check_supervision(self.dataset)}")
        lengths = None
        if stage.row_tokens:
            with parallel.main_first():
                lengths = self.dataset.measure(stage.workers, run.folder / stage.name / "lengths.npy")
        rank, ranks = parallel.rank(), parallel.world()
        micro = min(stage.micro, -(-stage.batch_size // ranks))
        self.order = Order(
            len(samples), stage.batch_size, seed, micro=micro, rank=rank, ranks=ranks,
            row_tokens=stage.row_tokens, lengths=lengths,
        )  # fmt: skip
        if lengths is not None:
            rows = len(self.order.epoch(0)[1]) - 1
            print(
                f"  {rows:,} rows of {stage.row_tokens:,} tokens an epoch, {len(samples) / rows:.1f} samples each, "
                f"{self.order.empty():.2%} empty"
            )

    def read_samples(self, seed: int) -> tuple[Sequence[Sample], Sequence[Sample]]:
        """Samples to train on and samples to evaluate on. Raises UserError if any of them cannot be used."""
        if not self.stage.data:
            raise UserError(
                f'stage \'{self.stage.name}\': no data; give data = [{{path = "x.json", images = "folder or zip"}}]'
            )
        return split_data(self.stage, seed)

    def total_steps(self) -> int:
        return self.stage.steps or self.order.num_steps(self.stage.epochs)

    def batches(self, start: int, stop: int) -> Iterator[list[Batch]]:
        parts, on_gpu = self.order.parts, self.run.device.type == "cuda"
        # Where the model has every core, a thread that makes data holds all others up at the end of each operation.
        spare = self.run.device.type != "cpu" or torch.get_num_threads() < (os.cpu_count() or 1) or self.stage.workers
        loader = Loader(
            self.dataset, self.order, start * parts, stop * parts, self.stage.workers,
            ahead=max(2, min(parts, 8)) if spare else 0, pin=on_gpu, tally=self.tally,
        )  # fmt: skip
        micros = iter(loader)
        for _ in range(start, stop):
            step = [next(micros) for _ in range(parts)]
            yield [batch for batch in step if len(batch.ids_T)]

    def loss(self, call: Callable[..., Any], micro: Batch) -> tuple[Tensor, int]:
        batch = micro.to(self.run.device)
        if self.run.device.type == "cpu":
            batch = rounded_up(batch, self.config.chat.image_token_id)
        loss = call(
            batch.ids_T, images=batch.pixels_NCHW, labels=batch.labels_T, cu_seqlens=batch.cu_seqlens, spans=batch.spans
        )
        return loss, batch.supervised

    def has_pictures(self, micro: Batch | None) -> bool:
        """Whether the vision parts work on a micro-batch."""
        return micro is not None and micro.pixels_NCHW is not None

    def filled_up(self, micro: Batch | None, pictures: bool) -> Batch:
        """The micro-batch, or where there is none or pictures are missing, with a row that is one picture, or one
        token, without a label."""
        if micro is not None and (not pictures or self.has_pictures(micro)):
            return micro
        blank = blank_example(self.config) if pictures else Example([self.config.chat.bos_id or 0], [IGNORE], None)
        return pack([blank]) if micro is None else with_row(micro, blank)

    def fill(self) -> None:
        """Give the model its weights, after it was split over the ranks."""
        assert self.run.fill is not None
        self.run.fill(self.run.model)

    def tokens(self, micro: Batch) -> int:
        return len(micro.ids_T)

    def flops(self, micro: Batch) -> float:
        patches = [
            span.height * span.width for span in micro.spans for _ in range(span.frames[0] if span.native else 0)
        ]
        if not patches and micro.pixels_NCHW is not None:
            patches = [self.config.vision.num_patches] * len(micro.pixels_NCHW)
        return self.work.flops(micro.cu_seqlens, micro.supervised, patches)

    @cached_property
    def work(self) -> Work:
        """Asked for in a step, when it is settled what is trained."""
        return Work(self.run.model)

    def counts(self, micros: list[Batch]) -> dict[str, int]:
        """Samples of the step and, where they are packed, the tokens that its rows have room for."""
        counts = {"samples": sum(len(micro.cu_seqlens) - 1 for micro in micros)}
        if self.stage.row_tokens:
            counts["room"] = self.stage.row_tokens * sum(micro.rows for micro in micros)
        return counts

    def evaluate(self, call: Callable[..., Any]) -> dict[str, float]:
        """Loss a supervised token on what was held out, and on that of each file where there are several."""
        if self.held_out is None:
            return {}
        counts: Counter[str] = Counter()
        totals: dict[str, list[float]] = {}
        for source in dict.fromkeys(sample.source for sample in self.held_out.samples):
            mine = [i for i, sample in enumerate(self.held_out.samples) if sample.source == source]
            for first in range(0, len(mine), self.stage.micro):
                loss, supervised = self.loss(call, self.held_out.batch(mine[first : first + self.stage.micro], 0))
                totals.setdefault(source, []).append(loss.item())
                counts[source] += supervised
        measured = {"eval_loss": sum(map(sum, totals.values())) / counts.total()}
        if len(totals) > 1:
            paths = [Path(source) for source in totals]
            stems = [path.stem if [p.stem for p in paths].count(path.stem) == 1 else str(path) for path in paths]
            for stem, (source, losses) in zip(stems, totals.items()):
                measured[f"eval_loss/{stem}"] = sum(losses) / counts[source]
        return measured | self.exact_answers(self.held_out, call) if self.stage.eval_exact else measured

    def exact_answers(self, held_out: Dataset, call: Callable[..., Any]) -> dict[str, float]:
        """Share of exact answers by the first two words of the question, each question asked alone in a first turn."""
        samples = [turn for sample in held_out.samples for turn in turns_of(sample)]
        alone = Dataset(samples, self.config, self.run.tokenizer, held_out.max_tokens)
        right: dict[str, list[bool]] = {}
        for first in range(0, len(samples), self.stage.micro):
            rows = range(first, min(first + self.stage.micro, len(samples)))
            batch = alone.batch(rows, 0)
            for row, hit in zip(rows, exact(call, batch.to(self.run.device))):
                words = samples[row].messages[-2].text.replace(MARKER, "").split()
                right.setdefault(" ".join(words[:2]), []).append(hit)
        return {kind: sum(hits) / len(hits) for kind, hits in right.items()}

    def probe(self, call: Callable[..., Any]) -> Tensor:
        blank = self.filled_up(None, True).to(self.run.device)
        return call(blank.ids_T, images=blank.pixels_NCHW, cu_seqlens=blank.cu_seqlens, spans=blank.spans)

    def save(self, folder: Path) -> None:
        """The checkpoint is the run's model: a stage's own chat and layout are how it was trained, no more."""
        model, mine = self.run.model, self.run.model.config
        model.config = self.run.config
        export(self.run, folder)
        model.config = mine

    def state(self) -> dict[str, Any]:
        return self.tally.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.tally.load(state)

    def summary(self) -> str:
        return str(self.tally)


def exact(call: Callable[..., Any], batch: Batch) -> list[bool]:
    """For each row whether greedy decoding would give its supervised tokens, stop token included.

    One pass over the given answer tells: decoding leaves it exactly where some token is not the most likely one.
    """
    logits_TV = call(batch.ids_T, images=batch.pixels_NCHW, cu_seqlens=batch.cu_seqlens, spans=batch.spans)
    wanted_T = next_labels(batch.labels_T, batch.cu_seqlens)
    hit_T = (logits_TV.argmax(-1) == wanted_T) | (wanted_T == IGNORE)
    return [bool(hit_T[a:b].all()) for a, b in itertools.pairwise(batch.cu_seqlens)]


def blank_example(config: ModelConfig) -> Example:
    """One small grey picture and nothing else; nothing in it is learned."""
    image = Image.new("RGB", (config.image.size, config.image.size), "grey")
    views_NCHW, span = prepare_views(image, config, True, "blank")
    ids = [config.chat.image_token_id] * span.tokens
    return Example(ids, [IGNORE] * span.tokens, views_NCHW, spans=(span,))


def with_row(batch: Batch, example: Example) -> Batch:
    """The batch with a last row that teaches nothing; only one that has no pictures takes one with a picture."""
    row = pack([example])
    ids_T, labels_T = torch.cat([batch.ids_T, row.ids_T]), torch.cat([batch.labels_T, row.labels_T])
    pixels_NCHW = batch.pixels_NCHW if row.pixels_NCHW is None else row.pixels_NCHW
    return dataclasses.replace(
        batch, ids_T=ids_T, labels_T=labels_T, cu_seqlens=(*batch.cu_seqlens, len(ids_T)), pixels_NCHW=pixels_NCHW,
        spans=batch.spans + row.spans,
    )  # fmt: skip


def rounded_up(batch: Batch, image_token_id: int) -> Batch:
    """The batch with a last row that teaches nothing, so that its length is a multiple of 64.

    On a CPU oneDNN compiles every product for its very sizes: some 11 a step, 1 to 2 ms and about 1 MB each, for each
    length that it has not met. Of multiples of 64 it soon has met them all.
    """
    more, filler = -len(batch.ids_T) % 64, 1 if image_token_id == 0 else 0
    return with_row(batch, Example([filler] * more, [IGNORE] * more, None)) if more else batch


def merge_config(config: ModelConfig, tables: dict[str, dict[str, Any]], where: str) -> ModelConfig:
    """The config with a recipe's [model] tables laid over it."""
    values = to_dict(config)
    for name, table in tables.items():
        values[name] |= table
    return from_dict(ModelConfig, values, where)
