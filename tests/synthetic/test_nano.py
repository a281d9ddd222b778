"""The nano recipe: its tasks, its measure of exact answers, and a whole run at toy size."""

import json
import math
from pathlib import Path

import pytest
import torch

from minillava.chat.messages import Message
from minillava.chat.tokenizer import load_tokenizer
from minillava.config import IGNORE
from minillava.generation.engine import Engine, Request
from minillava.media.visual import media
from minillava.processor import Example
from minillava.recipe import read_recipe
from minillava.synthetic import pretrain, shapes, train_tokenizer
from minillava.synthetic import task as shapes_task
from minillava.training.pipeline import run_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "nano.toml"


def test_contrast_is_the_softmax_over_one_true_and_all_false_phrases():
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    true = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    expected = 0.0
    for n, m in true.nonzero().tolist():
        false = sum(math.exp(s) for s, t in zip(scores[n].tolist(), true[n].tolist()) if not t)
        expected -= math.log(math.exp(scores[n, m]) / (math.exp(scores[n, m]) + false))
    assert pretrain.contrast(scores, true).item() == pytest.approx(expected, rel=1e-5)


def test_exact_agrees_with_greedy_decoding(tiny_model, tiny_tokenizer):
    """True for what the engine says, false as soon as one token of it is another."""
    prompts = [tiny_tokenizer.encode(text, True) for text in ("what color", "is the large circle red?", "USER: blue")]
    answers = Engine(tiny_model, tiny_tokenizer).generate(
        [Request(prompt_ids=ids, max_new_tokens=5) for ids in prompts]
    )
    said, changed = [], []
    for ids, answer in zip(prompts, answers):
        said.append(Example([*ids, *answer.token_ids], [IGNORE] * len(ids) + list(answer.token_ids)))
        for i in range(len(answer.token_ids)):
            other = list(answer.token_ids)
            other[i] = (other[i] + 1) % tiny_tokenizer.vocab_size
            changed.append(Example([*ids, *other], [IGNORE] * len(ids) + other))
    with torch.no_grad():
        assert pretrain.exact_all(tiny_model, said, rows=2) == [True] * 3
        assert not any(pretrain.exact_all(tiny_model, changed))


def test_every_word_of_the_world_is_one_token(tmp_path):
    train_tokenizer.of_shapes(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    words = [*shapes.COLORS, *shapes.SHAPES, *shapes.SIZES, *shapes.PLACES, *map(shapes.plural, shapes.SHAPES)]
    assert {word: len(tokenizer.encode(f" {word}", first=False)) for word in words} == dict.fromkeys(words, 1)
    strange = "Zwölf Boxkämpfer"
    assert tokenizer.decode(tokenizer.encode(strange, first=True)) == strange


def test_a_question_is_asked_of_its_own_scene_and_once():
    asked = shapes_task.ask("held_out", 40)
    assert len(asked) > 80 and all(question.about_held_out for _, question in asked)
    assert all(len({q.kind for s, q in asked if s == scene}) <= shapes_task.PER_SCENE for scene, _ in asked[:20])
    assert shapes_task.ask("held_out", 40) == asked and shapes_task.ask("held_out", 40, seed=1) != asked


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """Recipe nano with two steps a stage."""
    folder = tmp_path_factory.mktemp("nano") / "run"
    sets = ["stage.*.steps=2", "stage.*.batch_size=4", "stage.*.eval_every=0", "stage.finetune.shapes.scenes=2"]
    return folder, run_recipe(read_recipe(RECIPE, sets, str(folder)))


def test_the_whole_recipe_runs(toy_run):
    folder, results = toy_run
    assert list(results) == ["clip", "text", "pretrain", "finetune"]
    shares = json.loads((folder / "accuracy.json").read_text())
    assert set(shares) == {"unseen scenes", "held-out pairs", "no picture"}
    assert all(0 <= share <= 1 for kinds in shares.values() for share in kinds.values())
    assert (folder / "samples.png").stat().st_size > 1000 and (folder / "curves.png").is_file()


def test_its_result_answers_about_a_picture(toy_run):
    from minillava import LLaVA

    image, question, _ = shapes.demo_scene()
    model = LLaVA.from_pretrained(toy_run[0] / "finetune" / "model")
    answer = model.generate(question, images=[image], max_new_tokens=3)
    assert 1 <= len(answer.token_ids) <= 3
    again = Engine(model.model, model.tokenizer).generate(
        [Request([Message("user", f"<image>\n{question}")], media([image]), max_new_tokens=3)]
    )
    assert again[0].token_ids == answer.token_ids


LORA = """
[model]
base = "nano"
[[stage]]
name = "finetune"
task = "shapes"
shapes = { scenes = 2 }
steps = 1
batch_size = 4
lr = { decoder = 1e-3 }
lora = { decoder = { rank = 2, alpha = 4.0 } }
"""


@pytest.mark.parametrize("quantize", ["", "nf4"])
def test_adapters_are_measured_too(tmp_path, quantize):
    """Those of a model in bf16, or in four bits, as what they are merged into."""
    (tmp_path / "lora.toml").write_text(LORA)
    run_recipe(read_recipe(tmp_path / "lora.toml", [f"model.quantize={quantize!r}"], str(tmp_path / "run")))
    shares = json.loads((tmp_path / "run/accuracy.json").read_text())
    assert list(shares) == ["unseen scenes", "held-out pairs", "no picture"]
    assert (tmp_path / "run/finetune/done.json").is_file()


def test_the_model_that_ships_sees():
    """Exact answers on scenes and pairs that it never saw, and guesses without the picture (README has the table)."""
    from minillava import LLaVA

    model = LLaVA.from_pretrained(Path(pretrain.__file__).parents[1] / "nano", device="cpu")
    shares = {}
    for split, blank in (("unseen", False), ("held_out", False), ("unseen", True)):
        with torch.inference_mode():
            right = shapes_task.answered(
                model.model, model.model, model.tokenizer, shapes_task.ask(split, 60, seed=3), blank
            )
        shares[split, blank] = sum(right) / len(right)
    assert shares["unseen", False] > 0.95 and shares["held_out", False] > 0.88, shares
    assert shares["unseen", True] < 0.35, shares
    image, question, answer = shapes.demo_scene()  # what `make demo` asks
    assert model.generate(question, images=[image]).text.strip() == answer
