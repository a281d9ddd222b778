"""Words of a recipe that are known without torch: tasks, their options, quantisations."""

import pkgutil

import pytest

from minillava.config import LoRAConfig
from minillava.errors import UserError
from minillava.recipe import DataConfig, DPOConfig, ModelRecipe, Recipe, StageConfig
from minillava.training.llava_task import LLaVATask
from minillava.training.tasks import TASKS, check_words, options


@pytest.mark.parametrize(
    ("task", "shapes", "words"),
    [
        ("lava", {}, "no task 'lava' (did you mean 'llava'?)"),
        ("llava", {"turns": 1}, "task 'llava' has no option shapes.turns; leave it out"),
        ("shapes", {"turn": 1}, "shapes.turn is unknown (did you mean 'turns'?)"),
        ("text", {"scenes": 1}, "shapes.scenes is unknown (known: turns)"),
        ("shapes", {"scenes": 0}, "shapes.scenes is 0, expected a whole number, 1 or more"),
        ("text", {"turns": -1}, "shapes.turns is -1, expected a whole number, 0 or more"),
        ("text", {"turns": True}, "shapes.turns is true, expected a whole number"),
        ("text", {"turns": "many"}, "shapes.turns is 'many', expected a whole number"),
    ],
)
def test_a_wrong_word_is_one_line_that_names_it(task, shapes, words):
    with pytest.raises(UserError) as caught:
        check_words(Recipe(stage=(StageConfig(name="a", task=task, shapes=shapes),)))
    assert str(caught.value).startswith(f"stage 'a': {words}")


@pytest.mark.parametrize(
    ("task", "part", "words"),
    [
        ("llava", "projectr", "lr for 'projectr', which task 'llava' has not (did you mean 'projector'?)"),
        ("text", "vision", "lr for 'vision', which task 'text' has not (known: decoder)"),
    ],
)
def test_a_rate_for_a_part_that_a_task_has_not(task, part, words):
    with pytest.raises(UserError) as caught:
        check_words(Recipe(stage=(StageConfig(name="a", task=task, lr={part: 1e-3}),)))
    assert str(caught.value) == f"stage 'a': {words}"


@pytest.mark.parametrize("task", ["text", "clip"])
def test_adapters_for_a_task_that_trains_none(task):
    part = TASKS[task].parts[0]
    stage = StageConfig(name="a", task=task, lr={part: 1e-3}, lora={part: LoRAConfig()})
    with pytest.raises(UserError) as caught:
        check_words(Recipe(stage=(stage,)))
    assert str(caught.value) == f"stage 'a': task '{task}' trains no adapters; leave lora out"


@pytest.mark.parametrize(
    ("task", "ignored", "words"),
    [
        ("shapes", {"data": (DataConfig("x.json"),)}, "task 'shapes' makes its own data; set task = \"llava\""),
        ("shapes", {"eval_data": (DataConfig("x.json"),)}, "task 'shapes' makes its own data; set task = \"llava\""),
        ("llava", {"dpo": DPOConfig(beta=0.5)}, "task 'llava' does not read dpo; set task = \"dpo\""),
        ("dpo", {"split_turns": True}, "task 'dpo' has no use for split_turns; leave it out"),
        ("clip", {"row_tokens": 4096}, "task 'clip' has no use for row_tokens; leave it out"),
        ("text", {"eval_exact": True}, "task 'text' has no use for eval_exact; leave it out"),
        ("shapes", {"eval_exact": True}, "task 'shapes' has no use for eval_exact; leave it out"),
    ],
)
def test_what_a_task_would_ignore_is_refused(task, ignored, words):
    with pytest.raises(UserError) as caught:
        check_words(Recipe(stage=(StageConfig(name="a", task=task, **ignored),)))
    assert str(caught.value).startswith(f"stage 'a': {words}")


def test_what_ranks_share_is_a_llava():
    for kind in TASKS.values():
        assert issubclass(pkgutil.resolve_name(kind.factory), LLaVATask) == kind.shared


def test_a_wrong_quantisation():
    with pytest.raises(UserError, match=r"quantize 'nf5'.*'nf4'"):
        check_words(Recipe(model=ModelRecipe(quantize="nf5")))


def test_options_have_the_tasks_defaults():
    stage = StageConfig(task="shapes", shapes={"turns": 0, "scenes": 2})
    check_words(Recipe(model=ModelRecipe(quantize="nf4"), stage=(stage,)))
    assert options(stage) == {"samples": 20000, "turns": 0, "scenes": 2}
    assert options(StageConfig(task="text")) == {"turns": 8}
