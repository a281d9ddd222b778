"""Direct preference optimisation (arXiv 2305.18290): of two answers to one prompt the better shall gain on the worse.

d = (log p(chosen) - log p(rejected)) - (the same under the model that the stage began with); log-probabilities are sums
over the answers' tokens, their end token among them. The start is had without a second model: adapters are switched
off, and what is trained in full is kept as it was and put back for the pass; or its log-probabilities are cached.

Letters: P pairs, N samples; 2: chosen, rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.data.batch import rounded_up
from minillava.data.dataset import SampleError
from minillava.data.llava_json import Check, Sample
from minillava.data.pairs import PairBatch, PairDataset
from minillava.errors import UserError
from minillava.layers import lora, sharded
from minillava.recipe import DPOConfig, StageConfig
from minillava.training import parallel
from minillava.training.llava_task import LLaVATask
from minillava.training.task import Run

MEASURES = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")


class DPOTask(LLaVATask):
    """Preferences in place of answers; its losses are counted in pairs."""

    dataset_type = PairDataset
    dataset: PairDataset
    held_out: PairDataset | None
    sums: Sequence[Tensor] = ()  # of MEASURES

    def __init__(self, run: Run, stage: StageConfig):
        for part, adapters in stage.lora.items():
            if adapters.dropout:
                raise UserError(
                    f"stage '{stage.name}': lora.{part}.dropout is {adapters.dropout:g}, but dpo compares answers "
                    "under the same weights; set it to 0"
                )
        super().__init__(run, stage)
        self.started: dict[str, Tensor] = {}  # what is trained in full, as the stage began
        self.measures()

    def checked(self, check: Check) -> Check:
        """Both answers of every pair."""

        def both(sample: Sample) -> None:
            if sample.rejected is None:
                raise UserError("has no chosen and rejected answer, which task dpo needs; give both")
            check(sample)
            check(sample.worse)

        return both

    # ---- the model as the stage began ----

    def prepare(self, weights: Callable[[], AbstractContextManager[Callable[..., Any]]]) -> None:
        if self.stage.dpo.cached:
            for dataset, name in ((self.dataset, "start.npy"), (self.held_out, "start-held-out.npy")):
                if dataset is not None:
                    dataset.start_N2 = self.cached(dataset, self.run.folder / self.stage.name / name, weights)
            return
        with weights():
            self.started = {name: sharded.local(now.detach()).clone() for name, now in self.trained_in_full()}

    def trained_in_full(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters that are trained and no adapters, as they stand in the model now."""
        for part, module in self.parts.items():
            if part in self.stage.lr:
                for name, parameter in module.named_parameters():
                    if part not in self.stage.lora and "lora_" not in name:
                        yield f"{part}.{name}", parameter

    @contextmanager
    def as_begun(self) -> Iterator[None]:
        """As long as this lasts the model is the one that the stage began with."""
        parallel.reshard(self.model)
        now = {name: sharded.local(parameter.detach()) for name, parameter in self.trained_in_full()}
        kept = {name: tensor.clone() for name, tensor in now.items()}
        for name, tensor in now.items():
            tensor.copy_(self.started[name])
        try:
            with torch.no_grad(), lora.off(self.model):
                yield
        finally:
            parallel.reshard(self.model)
            for name, tensor in now.items():
                tensor.copy_(kept[name])

    def cached(self, dataset: PairDataset, path: Path, weights: Callable[..., Any]) -> np.ndarray:
        """Log-probabilities [N, 2] of all samples' answers, from a file or computed; NaN for what is unusable."""
        if path.is_file():
            return np.load(path)
        table_N2 = torch.zeros(len(dataset), 2, dtype=torch.float64)
        micro, ranks = self.stage.micro, parallel.world()
        self.model.eval()
        with weights() as call, torch.no_grad():
            for first in range(0, len(dataset), micro * ranks):
                begin = first + parallel.rank() * micro
                table_N2[begin : begin + micro] = torch.nan
                usable, pairs = [], []
                for index in range(begin, min(begin + micro, len(dataset))):
                    try:
                        pairs.append(dataset[index])
                        usable.append(index)
                    except SampleError:
                        continue  # training replaces and counts it
                (batch,) = self.alike([dataset.pack(pairs) if pairs else None])
                logp_P2 = self.log_probs(call, batch.to(self.run.device))
                table_N2[usable] = logp_P2[: len(usable)].cpu().double()
        self.model.train()
        parallel.summed(table_N2)  # of each row one rank has more than zeros
        if parallel.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}")
            np.save(partial, table_N2.numpy())
            partial.rename(path)
        return table_N2.numpy()

    # ---- a step ----

    def log_probs(self, call: Callable[..., Any], batch: PairBatch) -> Tensor:
        """Of both answers of each pair, [P, 2] in float32; all a batch has if it holds no pairs."""
        losses_B = call(
            batch.ids_T, images=batch.pixels_NCHW, labels=batch.labels_T, cu_seqlens=batch.cu_seqlens,
            spans=batch.spans, shown=getattr(batch, "shown", ()), by_sequence=True,
        )  # fmt: skip
        return -losses_B[: 2 * getattr(batch, "pairs", 0)].view(-1, 2)

    def loss(self, call: Callable[..., Any], micro: Any) -> tuple[Tensor, int]:
        batch: Any = micro.to(self.run.device)
        if self.run.device.type == "cpu":
            batch = rounded_up(batch, self.config.chat.image_token_id)
        start_P2 = getattr(batch, "start_P2", None)
        if start_P2 is None and not self.stage.dpo.cached:
            with self.as_begun():
                start_P2 = self.log_probs(call, batch)
        logp_P2 = self.log_probs(call, batch)
        if start_P2 is None:  # a batch that other ranks have pairs for
            start_P2 = logp_P2.detach()
        start_P2 = start_P2.to(logp_P2)
        losses_P = preference_loss(self.stage.dpo, logp_P2, start_P2, answer_lengths(batch, len(logp_P2)))
        chosen_P, rejected_P = (self.stage.dpo.beta * (logp_P2 - start_P2).detach()).unbind(1)
        values_P = (chosen_P, rejected_P, chosen_P - rejected_P, (chosen_P > rejected_P).float())
        self.sums = [total + value_P.sum() for total, value_P in zip(self.sums, values_P)]
        return losses_P.sum(), len(logp_P2)

    def measures(self) -> dict[str, Tensor]:
        sums, self.sums = self.sums, [torch.zeros((), device=self.run.device)] * len(MEASURES)
        return dict(zip(MEASURES, sums))

    def flops(self, micro: Any) -> float:
        return super().flops(micro) * (1 if self.stage.dpo.cached else 4 / 3)  # the start's forward pass

    def evaluate(self, call: Callable[..., Any]) -> dict[str, float]:
        """Mean loss of held-out pairs, their rewards, and the share of which the better answer has the higher one."""
        if self.held_out is None:
            return {}
        total, pairs = 0.0, 0
        self.measures()
        for first in range(0, len(self.held_out), self.stage.micro):
            rows = range(first, min(first + self.stage.micro, len(self.held_out)))
            batch: Any = self.held_out.batch(rows, 0)
            loss, count = self.loss(call, batch)
            total, pairs = total + loss.item(), pairs + count
        return {"eval_loss": total / pairs} | {name: s.item() / pairs for name, s in self.measures().items()}


def preference_loss(config: DPOConfig, logp_P2: Tensor, start_P2: Tensor, lengths_P2: Tensor) -> Tensor:
    """The loss of each pair, [P], from log-probabilities of both answers now and at the start, and their tokens.

    ipo compares means over the tokens, as its authors do and TRL does; the others sums.
    """
    gained_P2 = logp_P2 - start_P2
    if config.loss == "ipo":
        chosen_P, rejected_P = (gained_P2 / lengths_P2).unbind(1)
        losses_P = (chosen_P - rejected_P - 1 / (2 * config.beta)) ** 2
    else:
        margin_P = config.beta * (gained_P2[:, 0] - gained_P2[:, 1])
        losses_P = F.relu(1 - margin_P) if config.loss == "hinge" else -F.logsigmoid(margin_P)
    if config.cross_entropy:
        losses_P = losses_P - config.cross_entropy * logp_P2[:, 0] / lengths_P2[:, 0]
    return losses_P


def answer_lengths(batch: PairBatch, pairs: int) -> Tensor:
    """Supervised tokens of both answers of each pair, [P, 2]."""
    learned_T = (batch.labels_T >= 0).long()
    before_T = F.pad(learned_T.cumsum(0), (1, 0))
    counts_B = before_T[torch.tensor(batch.cu_seqlens, device=before_T.device)].diff()
    return counts_B[: 2 * pairs].view(-1, 2)
