"""What a stage may do, and its options. Without torch, so that a wrong word in a recipe costs nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from minillava.errors import UserError, nearest
from minillava.files import shown
from minillava.layers.scheme import Scheme
from minillava.recipe import DPOConfig, Recipe, StageConfig


@dataclass(frozen=True)
class Kind:
    """A task, by its name in a recipe."""

    factory: str  # module and class, which is called with run and stage
    parts: tuple[str, ...] = ("vision", "projector", "decoder")  # that may have a rate
    options: dict[str, int] = field(default_factory=dict)  # that it reads of `shapes`, with their defaults
    shared: bool = True  # ranks share its steps and its model, and it may train adapters; else every rank does all work
    reads: bool = True  # data of the stage, where it has some
    ignores: tuple[str, ...] = ()  # keys of a stage that would change nothing


# Options: how many samples there are, questions about a scene (0: captions), scenes of each split in an evaluation.
TASKS = {
    "llava": Kind("minillava.training.llava_task:LLaVATask"),
    "dpo": Kind("minillava.training.dpo_task:DPOTask", ignores=("split_turns", "eval_exact")),
    "clip": Kind(
        "minillava.synthetic.pretrain:ClipTask",
        ("vision", "text"),
        shared=False,
        ignores=("row_tokens", "eval_exact"),
    ),
    "text": Kind(
        "minillava.synthetic.pretrain:TextTask",
        ("decoder",),
        {"turns": 8},
        shared=False,
        ignores=("row_tokens", "eval_exact"),
    ),
    "shapes": Kind(
        "minillava.synthetic.task:ShapesTask",
        options={"samples": 20000, "turns": 10, "scenes": 100},
        reads=False,
        ignores=("split_turns", "eval_exact"),
    ),
}


def options(stage: StageConfig) -> dict[str, int]:
    """What a stage's `shapes` says, over the defaults of its task."""
    return TASKS[stage.task].options | stage.shapes


def check_words(recipe: Recipe) -> None:
    """Raises UserError for an unknown quantisation, a task that there is not, and what a task has or trains not."""
    if recipe.model.quantize:
        Scheme.parse(recipe.model.quantize)
    for stage in recipe.stage:
        check_task(stage)


def check_task(stage: StageConfig) -> None:
    """`check_words` of one stage."""
    at = f"stage '{stage.name}'"
    if stage.task not in TASKS:
        raise UserError(f"{at}: no task '{stage.task}'{nearest(stage.task, TASKS)}")
    task = TASKS[stage.task]
    for name in stage.lr.keys() - set(task.parts):
        raise UserError(f"{at}: lr for '{name}', which task '{stage.task}' has not{nearest(name, task.parts)}")
    if stage.lora and not task.shared:
        raise UserError(f"{at}: task '{stage.task}' trains no adapters; leave lora out")
    if (stage.data or stage.eval_data) and not task.reads:
        raise UserError(f"{at}: task '{stage.task}' makes its own data; set task = \"llava\", or leave data out")
    if stage.dpo != DPOConfig() and stage.task != "dpo":
        raise UserError(f"{at}: task '{stage.task}' does not read dpo; set task = \"dpo\", or leave dpo out")
    for key in task.ignores:
        if getattr(stage, key):
            raise UserError(f"{at}: task '{stage.task}' has no use for {key}; leave it out")
    for key, value in stage.shapes.items():
        if not task.options:
            raise UserError(f"{at}: task '{stage.task}' has no option shapes.{key}; leave it out")
        if key not in task.options:
            raise UserError(f"{at}: shapes.{key} is unknown{nearest(key, task.options)}")
        least = 0 if key == "turns" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{at}: shapes.{key} is {shown(value)}, expected a whole number, {least} or more")
