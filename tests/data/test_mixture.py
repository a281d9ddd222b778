"""The nano recipe's four stages on somebody's own pictures: LLaVA's JSON and a zip, by overrides alone."""

import dataclasses
import io
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from minillava.chat.tokenizer import load_tokenizer
from minillava.data.mixture import choose, split_data
from minillava.data.table import turns_of
from minillava.errors import UserError
from minillava.recipe import DataConfig, read_recipe
from minillava.training.pipeline import run_recipe

NANO = Path(__file__).parents[2] / "recipes/nano.toml"
COLORS = {"red": (220, 30, 30), "green": (30, 160, 30), "blue": (40, 60, 220), "white": (240, 240, 240)}


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """160 plain pictures of four colors, with captions and with two short questions each."""
    root = tmp_path_factory.mktemp("own")
    captions, questions = [], []
    with zipfile.ZipFile(root / "pictures.zip", "w") as file:
        for i in range(160):
            color = list(COLORS)[i % 4]
            data = io.BytesIO()
            Image.new("RGB", (20, 20), tuple(c - i % 13 for c in COLORS[color])).save(data, "PNG")
            file.writestr(f"{i}.png", data.getvalue())
            turns = [("Which color is it?", color), ("Is it red?", "yes" if color == "red" else "no")]
            turns = turns if i % 3 else turns[::-1]
            said = [
                {"from": who, "value": text}
                for n, (q, a) in enumerate(turns)
                for who, text in (("human", "<image>\n" * (n == 0) + q), ("gpt", a))
            ]
            questions.append({"id": f"q{i}", "image": f"{i}.png", "conversations": said})
            said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"A {color} picture."}]
            captions.append({"id": f"c{i}", "image": f"{i}.png", "conversations": said})
    (root / "captions.json").write_text(json.dumps(captions))
    (root / "questions.json").write_text(json.dumps(questions[::-1]))  # another order, the same pictures
    data = {
        name: f'[{{path="{root}/{name}.json", images="{root}/pictures.zip"}}]' for name in ("captions", "questions")
    }
    return [
        "model.tokenizer=data", "model.vision.hidden_size=32", "model.vision.intermediate_size=64",
        "model.decoder.hidden_size=64", "model.decoder.intermediate_size=96", "model.decoder.head_dim=16",
        f"stage.clip.data={data['captions']}", f"stage.pretrain.data={data['captions']}",
        f"stage.text.data={data['questions']}", f"stage.finetune.data={data['questions']}",
        "stage.pretrain.task=llava", "stage.finetune.task=llava",
        *(f"stage.{name}.shapes={{}}" for name in ("text", "pretrain", "finetune")),
        "stage.*.eval_samples=24", "stage.*.batch_size=16", "stage.*.eval_every=0",
        "stage.clip.steps=20", "stage.text.steps=5", "stage.pretrain.steps=5", "stage.finetune.steps=40",
        "stage.finetune.split_turns=true", "stage.finetune.eval_exact=true",
    ]  # fmt: skip


@pytest.mark.slow
def test_nano_learns_colors_from_a_zip(overrides, tmp_path):
    recipe = read_recipe(NANO, overrides, str(tmp_path / "run"))
    results = run_recipe(recipe)
    assert results["clip"]["caption"] >= 0.9
    assert {"Which color", "Is it"} < results["finetune"].keys()
    assert results["finetune"]["Which color"] >= 0.75 and results["finetune"]["Is it"] >= 0.85
    tokenizer = load_tokenizer(tmp_path / "run/tokenizer")
    assert len(tokenizer.encode("\nWhich color is it? ASSISTANT: white", False)) == 8  # every word is one token

    # All stages hold out the same pictures, and none of them is trained on.
    splits = [split_data(stage, recipe.seed) for stage in recipe.stage]
    held_out = [{sample.images[0].name for sample in held} for _, held in splits]
    assert all(names == held_out[0] and len(names) == 24 for names in held_out)
    assert not any(sample.images[0].name in held_out[0] for samples, _ in splits for sample in samples)
    assert len(splits[-1][0]) == 2 * len(splits[0][0])  # a sample for each turn


def test_turns_are_split_only_where_that_changes_nothing(overrides):
    stage = read_recipe(NANO, overrides).stage[-1]
    sample = split_data(stage, 0)[1][0]
    first, second = turns_of(sample)
    assert [m.text for m in first.messages + second.messages] == [
        *(m.text for m in sample.messages[:2]), f"<image>\n{sample.messages[2].text}", sample.messages[3].text,
    ]  # fmt: skip
    assert turns_of(first) == [first]


def test_no_picture_with_several_samples_is_on_both_sides(tmp_path, capsys):
    """The cut fell among the samples of one picture."""
    (tmp_path / "pictures").mkdir()
    rows = []
    for i in range(20):
        Image.new("RGB", (4, 4)).save(tmp_path / f"pictures/{i}.png")
        said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
        rows += [{"id": f"{i} {n}", "image": f"{i}.png", "conversations": said} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = (DataConfig(str(tmp_path / "rows.json"), str(tmp_path / "pictures")),)
    stage = dataclasses.replace(read_recipe(NANO).stage[-1], data=data, eval_samples=6, split_turns=False)
    trained, held_out = split_data(stage, 0)
    names = [{sample.images[0].name for sample in samples} for samples in (trained, held_out)]
    assert not names[0] & names[1] and len(held_out) == 6 and len(trained) == 72
    assert "2 more samples about the last pictures that are held out" in capsys.readouterr().out

    (tmp_path / "rows.json").write_text(json.dumps([row | {"image": "0.png"} for row in rows]))  # a name for all
    trained, held_out = split_data(stage, 0)
    assert len(held_out) == 6 and len(trained) == 74
    assert "74 samples about a picture of the same name" in capsys.readouterr().out


def test_a_tokenizer_from_data_needs_data(tmp_path):
    with pytest.raises(UserError, match="needs a stage with data"):
        run_recipe(read_recipe(NANO, ["model.tokenizer=data"], str(tmp_path / "run")))


def test_a_mixture_takes_what_it_says():
    assert list(choose(70, "all", "")) == list(range(70))
    assert list(choose(70, "first:10%", "")) == list(range(7)) and list(choose(70, "first:1%", "")) == [0]
    assert list(choose(70, "end:3", "")) == [67, 68, 69] and list(choose(70, "first:99", "")) == list(range(70))
    assert list(choose(70, "end:0", "")) == []
    drawn = choose(70, "random:20", "a")
    assert len(set(drawn)) == 20 and drawn == sorted(drawn) and set(drawn) < set(range(70))
    assert choose(70, "random:20", "a") == drawn != choose(70, "random:20", "b")
