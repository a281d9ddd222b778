"""What a stage may do, and its options. Without torch, so that a wrong word in a recipe costs nothing."""

from __future__ import annotations

from minillava.errors import UserError, nearest
from minillava.files import shown
from minillava.layers.scheme import Scheme
from minillava.recipe import Recipe, StageConfig

# Name in a recipe -> module and factory (run, stage) -> Task.
TASKS = {
    "llava": "minillava.training.llava_task:LLaVATask",
    "dpo": "minillava.training.dpo_task:DPOTask",
    "clip": "minillava.synthetic.pretrain:ClipTask",
    "text": "minillava.synthetic.pretrain:TextTask",
    "shapes": "minillava.synthetic.task:ShapesTask",
}
# The parts of each that may have a rate.
LLAVA = ("vision", "projector", "decoder")
TRAINS = {"llava": LLAVA, "dpo": LLAVA, "clip": ("vision", "text"), "text": ("decoder",), "shapes": LLAVA}
# Options of `shapes` that these read, with their defaults: how many samples there are, questions about a scene (0:
# captions), scenes of each split in an evaluation.
OPTIONS = {"text": {"turns": 8}, "shapes": {"samples": 20000, "turns": 10, "scenes": 100}}


def options(stage: StageConfig) -> dict[str, int]:
    """What a stage's `shapes` says, over the defaults of its task."""
    return OPTIONS[stage.task] | stage.shapes


def check_words(recipe: Recipe) -> None:
    """Raises UserError for a task that there is not, a part or an option that it has not, an unknown quantisation."""
    if recipe.model.quantize:
        Scheme.parse(recipe.model.quantize)
    for stage in recipe.stage:
        check_task(stage)


def check_task(stage: StageConfig) -> None:
    """`check_words` of one stage."""
    at = f"stage '{stage.name}'"
    if stage.task not in TASKS:
        raise UserError(f"{at}: no task '{stage.task}'{nearest(stage.task, TASKS)}")
    for name in stage.lr.keys() - set(TRAINS[stage.task]):
        raise UserError(f"{at}: lr for '{name}', which task '{stage.task}' has not{nearest(name, TRAINS[stage.task])}")
    known = OPTIONS.get(stage.task, {})
    for key, value in stage.shapes.items():
        if not known:
            raise UserError(f"{at}: task '{stage.task}' has no option shapes.{key}; leave it out")
        if key not in known:
            raise UserError(f"{at}: shapes.{key} is unknown{nearest(key, known)}")
        least = 0 if key == "turns" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{at}: shapes.{key} is {shown(value)}, expected a whole number, {least} or more")
