"""What a stage trains and on what: the interface that the trainer knows.

A run has one LLaVA, which its stages train one after the other; a task names the parts of it (and, where it needs
any, parts of its own, such as CLIP's text tower) and turns batches into losses.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillava.chat.tokenizer import Tokenizer
from minillava.checkpoints.checkpoint import Checkpoint
from minillava.config import ModelConfig
from minillava.data.dataset import Dataset
from minillava.data.loader import Tally
from minillava.errors import UserError
from minillava.llava import LLaVAModel
from minillava.recipe import Recipe, StageConfig
from minillava.training.tasks import TASKS


@dataclass
class Run:
    """What the stages of a run share."""

    recipe: Recipe
    folder: Path
    model: LLaVAModel  # where ranks share the work on meta, see `build.read_weights`
    tokenizer: Tokenizer
    device: torch.device
    save_dtype: torch.dtype  # of exported checkpoints
    base: Checkpoint | None = None  # what the recipe starts from, where it does from a whole model
    finished: list[StageConfig] = field(default_factory=list)  # stages whose results the model has, or shall be given

    def __post_init__(self) -> None:
        self.config: ModelConfig = self.model.config  # of the model that comes out; a stage's layout may differ

    def seed(self, stage: StageConfig) -> int:
        return self.recipe.seed if stage.seed < 0 else stage.seed


class Task(ABC):
    """One stage's work. Subclasses set what is here; of what is defined, the rest has defaults."""

    model: nn.Module  # what `loss` calls; what of it is in no part is frozen
    parts: dict[str, nn.Module]  # by the name that `lr` has for them (`tasks.Kind.parts`); disjoint, all inside `model`
    stage: StageConfig
    held_out: Dataset | None = None  # samples that are not trained: evaluated, and some of them asked at the end
    tally: Tally | None = None  # what the data cost, of tasks that read some; saved with the run, shown at its end

    def total_steps(self) -> int:
        if not self.stage.steps:
            raise UserError(f"stage '{self.stage.name}': its data has no end; set steps instead of epochs")
        return self.stage.steps

    @abstractmethod
    def batches(self, start: int, stop: int) -> Iterator[list[Any]]:
        """The micro-batches of steps start to stop (exclusive). Step k holds the same whatever `start` was."""

    @abstractmethod
    def loss(self, call: Callable[..., Any], micro: Any) -> tuple[Tensor, int]:
        """The SUM of the losses of a micro-batch and how many they are; `call` is `model` with the weights to use."""

    def prepare(self, weights: Callable[[], AbstractContextManager[Callable[..., Any]]]) -> None:  # noqa: B027 most need not
        """Called once, before a checkpoint is taken up: the model is as the stage began. `weights()` gives `call`."""

    def measures(self) -> dict[str, Tensor]:
        """What the losses since the last call measured beside, in sums over the same; the log shows means."""
        return {}

    @abstractmethod
    def counts(self, micros: list[Any]) -> dict[str, float]:
        """What the log should have of a step's data, in numbers that add up over ranks: first of all the tokens (or
        pairs) that go through the model, and the flops that this costs, 0 where nobody has counted."""

    def evaluate(self, call: Callable[..., Any]) -> dict[str, float]:
        """Measurements by name; nothing where there is nothing to evaluate. Runs under no_grad and model.eval()."""
        return {}

    def save(self, folder: Path) -> None:  # noqa: B027 a task whose result is no checkpoint writes none
        """Export the result into a folder that does not exist yet."""


def make_task(run: Run, stage: StageConfig) -> Task:
    return pkgutil.resolve_name(TASKS[stage.task].factory)(run, stage)
