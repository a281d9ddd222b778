"""LLaVA's own task: conversations about pictures in LLaVA's JSON, or whatever else can be read as samples."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillava.config import IGNORE
from minillava.data.batch import Batch, blank_example, pack, rounded_up, with_row
from minillava.data.dataset import Dataset
from minillava.data.llava_json import MARKER, Check, Sample, prompt_check
from minillava.data.loader import Loader, Tally
from minillava.data.mixture import split_data
from minillava.data.packing import Order
from minillava.data.survey import survey
from minillava.data.table import order_of_groups, turns_of
from minillava.errors import UserError
from minillava.llava import next_labels
from minillava.processor import Example
from minillava.recipe import StageConfig, with_tables
from minillava.training import parallel
from minillava.training.export import export
from minillava.training.metrics import Work
from minillava.training.task import Run, Task


class LLaVATask(Task):
    """Next-token loss on the answers of conversations about pictures: LLaVA's stages (arXiv 2304.08485, 4.2)."""

    dataset_type = Dataset

    def __init__(self, run: Run, stage: StageConfig):
        self.run, self.stage = run, stage
        self.config = with_tables(run.config, {"chat": stage.chat, "layout": stage.layout}, f"stage '{stage.name}'")
        run.model = self.model = run.model.under(dataclasses.replace(run.config, layout=self.config.layout))
        self.parts = {"vision": run.model.vision, "projector": run.model.projector, "decoder": run.model.decoder}
        seed = run.seed(stage)

        samples, held_out = self.read_samples(seed)
        limit = min(stage.max_tokens, self.config.decoder.max_positions)
        self.dataset = self.dataset_type(samples, self.config, run.tokenizer, limit, seed)
        self.held_out = self.dataset_type(held_out, self.config, run.tokenizer, limit, seed) if held_out else None
        self.tally = Tally(len(samples))
        found = survey(self.dataset, 200)
        found.check(allowed=1 / 200)
        print(f"  {found}")
        lengths = None
        if stage.row_tokens:
            with parallel.main_first():
                lengths = self.dataset.measure(stage.workers, run.folder / stage.name / "lengths.npy")
        rank, ranks = parallel.rank(), parallel.world()
        micro = min(stage.micro, -(-stage.batch_size // ranks))
        self.order = Order(
            len(samples), stage.batch_size, seed, micro=micro, rank=rank, ranks=ranks,
            row_tokens=stage.row_tokens, lengths=lengths, **order_of_groups(samples),
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
        return split_data(self.stage, seed, self.checked(prompt_check(self.config.chat, self.run.tokenizer)))

    def checked(self, check: Check) -> Check:
        """What is asked of every sample before the run starts."""
        return check

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

    def alike(self, micros: list[Any]) -> list[Any]:
        """As many micro-batches on every rank, with pictures in the same ones, whatever the ranks drew: all then call
        the same modules. What is added teaches nothing; pictures that no rank has are not made up."""
        (most,) = parallel.agree([len(micros)])
        micros = micros + [None] * (most - len(micros))
        seen = parallel.agree([int(micro is not None and micro.pixels_NCHW is not None) for micro in micros])
        return [self.filled_up(micro, bool(pictures)) for micro, pictures in zip(micros, seen)]

    def filled_up(self, micro: Batch | None, pictures: bool) -> Batch:
        """The micro-batch; where there is none or it lacks pictures, with a row of one picture or token."""
        if micro is not None and (not pictures or micro.pixels_NCHW is not None):
            return micro
        blank = blank_example(self.config) if pictures else Example([self.config.chat.bos_id or 0], [IGNORE])
        return pack([blank]) if micro is None else with_row(micro, blank)

    def flops(self, micro: Batch) -> float:
        """What a training step with it costs."""
        patches = [patches for span in micro.spans if span.native for patches in span.windows]
        if not patches and micro.pixels_NCHW is not None:
            patches = [self.config.vision.num_patches] * len(micro.pixels_NCHW)
        return self.work.flops(micro.cu_seqlens, micro.supervised, patches)

    @cached_property
    def work(self) -> Work:
        """Asked for in a step, when it is settled what is trained."""
        return Work(self.run.model)

    def counts(self, micros: list[Batch]) -> dict[str, float]:
        """Also samples and, where they are packed, the tokens that the rows have room for."""
        counts = {"tokens": sum(len(micro.ids_T) for micro in micros), "flops": sum(map(self.flops, micros))}
        counts["samples"] = sum(micro.samples for micro in micros)
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
        """Logits for an input that is always the same, by which a model with adapters is compared with the export."""
        blank = self.filled_up(None, True).to(self.run.device)
        return call(blank.ids_T, images=blank.pixels_NCHW, cu_seqlens=blank.cu_seqlens, spans=blank.spans)

    def save(self, folder: Path) -> None:
        """The checkpoint is the run's model: a stage's own chat and layout are how it was trained, no more."""
        export(self.run, folder)


def exact(call: Callable[..., Any], batch: Batch) -> list[bool]:
    """For each row whether greedy decoding would give its supervised tokens, stop token included.

    One pass over the given answer tells: decoding leaves it exactly where some token is not the most likely one.
    """
    logits_TV = call(batch.ids_T, images=batch.pixels_NCHW, cu_seqlens=batch.cu_seqlens, spans=batch.spans)
    wanted_T = next_labels(batch.labels_T, batch.cu_seqlens)
    hit_T = (logits_TV.argmax(-1) == wanted_T) | (wanted_T == IGNORE)
    return [bool(hit_T[a:b].all()) for a, b in itertools.pairwise(batch.cu_seqlens)]
