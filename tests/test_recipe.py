"""Recipes: every key is checked, --set reaches every value, and what was used reads back as what it was."""

import dataclasses
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
from helpers import ROOT

from minillava.config import (
    ChatConfig,
    DecoderConfig,
    ImageConfig,
    LayoutConfig,
    LoRAConfig,
    ProjectorConfig,
    RopeScaling,
    VisionConfig,
)
from minillava.errors import UserError
from minillava.recipe import (
    DataConfig,
    DPOConfig,
    Recipe,
    StageConfig,
    differences,
    interval_of,
    may_change,
    read_recipe,
    stage_index,
    to_toml,
)

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
TEXT = """
name = "two"
[model]
tokenizer = "t"
[[stage]]
name = "first"
lr = {projector = 1e-3}
steps = 10
[[stage]]
name = "second"
lr = {projector = 1e-3, decoder = 2e-5}
epochs = 2
data = [{path = "a.json", images = "a.zip"}, {path = "b.json"}]
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "two.toml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_reads_and_reads_back_equal(path, tmp_path):
    recipe = read_recipe(path)
    saved = tmp_path / "recipe.toml"
    saved.write_text(to_toml(recipe))
    assert read_recipe(saved) == recipe
    assert not differences(recipe, read_recipe(saved))


def test_odd_values_read_back_equal(recipe_file):
    odd = 'C:\\data\\"x" \x7f\t\u00e9\U0001f600.json'
    recipe = read_recipe(recipe_file, ["stage.second.clip=inf", "stage.second.eps=1e-12"])
    stages = (dataclasses.replace(recipe.stage[0], data=(DataConfig(odd, odd),)), recipe.stage[1])
    recipe = dataclasses.replace(recipe, stage=stages, name=odd)
    recipe_file.write_text(to_toml(recipe))
    assert read_recipe(recipe_file) == recipe


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("seed=7", lambda r: r.seed == 7),
        ("stage.first.steps=3", lambda r: r.stage[0].steps == 3),
        ("stage.1.epochs=3", lambda r: r.stage[1].epochs == 3.0),
        ("stage.*.batch_size=6", lambda r: [s.batch_size for s in r.stage] == [6, 6]),
        (
            "stage.second.lr.vision=2e-6",
            lambda r: r.stage[1].lr == {"projector": 1e-3, "decoder": 2e-5, "vision": 2e-6},
        ),
        ("stage.second.lr={decoder = 1.0}", lambda r: r.stage[1].lr == {"decoder": 1.0}),
        ("stage.second.data.1.path=my data/c.json", lambda r: r.stage[1].data[1].path == "my data/c.json"),
        ("stage.first.betas=[0.9, 0.98]", lambda r: r.stage[0].betas == (0.9, 0.98)),
        ("model.vision.hidden_size=64", lambda r: r.model.vision == {"hidden_size": 64}),
        ("model.base=owner/name", lambda r: r.model.base == "owner/name"),
    ],
)
def test_set_reaches_every_kind_of_value(recipe_file, change, wanted):
    before = read_recipe(recipe_file)
    assert not wanted(before)
    assert wanted(read_recipe(recipe_file, [change]))


def test_a_constant_rate_has_no_floor(recipe_file):
    with pytest.raises(UserError, match=r"stage 'first': schedule constant .* leave floor out"):
        read_recipe(recipe_file, ["stage.first.schedule=constant", "stage.first.floor=0.1"])


def test_paths_are_relative_to_the_working_folder_or_to_the_recipe(recipe_file, tmp_path, monkeypatch):
    beside, work = tmp_path / "a.json", tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for name in ("t", "a.zip", "data"):
        (tmp_path / name).mkdir()
    (work / "b.json").touch()
    (tmp_path / "b.json").touch()
    beside.touch()
    recipe = read_recipe(recipe_file)
    first, second = recipe.stage[1].data
    assert (first.path, first.images, recipe.model.tokenizer) == (
        str(beside),
        str(tmp_path / "a.zip"),
        str(tmp_path / "t"),
    )
    assert (second.path, second.images) == (str(work / "b.json"), "")  # the working folder's comes first
    assert read_recipe(recipe_file, ["model.tokenizer=data"]).model.tokenizer == "data"  # a word, whatever lies there
    assert read_recipe(recipe_file, ["model.base=no/where"]).model.base == "no/where"


def test_a_copy_of_a_recipe_means_the_same_files_wherever_it_is_read(recipe_file, tmp_path, monkeypatch):
    """Of two folders with files of the same names those where it was read first; patterns and new folders too."""
    for name in ("work", "other"):
        (tmp_path / name / "base").mkdir(parents=True)
        (tmp_path / name / "b.json").touch()
        (tmp_path / name / "c1.json").touch()
    monkeypatch.chdir(tmp_path / "work")
    sets = [
        "model.base=base",
        "stage.second.data=[{path='c*.json', fetch='new'}]",
        "stage.first.data=[{path='b.json'}]",
    ]
    recipe = read_recipe(recipe_file, sets)
    assert recipe.model.base == str(tmp_path / "work" / "base")
    copy = tmp_path / "other" / "recipe.toml"
    copy.write_text(to_toml(recipe))
    for folder in ("other", "."):
        monkeypatch.chdir(tmp_path / folder)
        assert read_recipe(copy) == recipe


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("sed=7", ["unknown key 'sed'", "'seed'"]),
        ("stage.frist.steps=3", ["no entry 'frist'", "'first'"]),
        ("stage.5.steps=3", ["no entry '5'"]),
        ("stage.first.warm_up=0.1", ["unknown key 'warm_up'", "'warmup'"]),
        ("stage.first.lr.projector=-1.0", ["lr.projector is -1.0"]),
        ("stage.first.lr={}", ["lr is empty"]),
        ("stage.first.epochs=1", ["either steps or epochs"]),
        ("stage.first.steps=many", ["expected a whole number", "many"]),
        ("stage.first.schedule=cosin", ["stage 'first': schedule is 'cosin'", "'cosine'"]),
        ("stage.first.dtype=float16", ["'float16'"]),
        ("stage.first.warmup=3", ["warmup is 3.0", "[0, 1)"]),
        ("stage.first.name=second", ["used twice"]),
        ("stage.first.name=../x", ["other characters than letters"]),
        ("stage.first.chat.template_name=plain", ["unknown key 'template_name'", "'template'"]),
        ("model.vision.hidden=64", ["unknown key 'hidden'", "'hidden_size'"]),
        ("model.decoder.num_layers.x=1", ["expected a whole number"]),
        ("model.vision.activation=relu", ["vision: activation is 'relu'", "'gelu'"]),
        ("stage.first.steps.x=1", ["inside a value"]),
        ("stage=[]", ["has no [[stage]]"]),
        ("stage.second.data.0.take=random:x", ["take 'random:x'", "first:N"]),
        ("stage.second.layout.girds=[[1, 2]]", ["unknown key 'girds'", "'grids'"]),
        ("stage.second.floor=2.0", ["floor is 2.0", "not in [0, 1]"]),
        ("stage.second.row_tokens=100", ["row_tokens is below max_tokens"]),
        ('sinks=["tensorbord"]', ["'tensorbord'", "'tensorboard'"]),
        ("seed", ["expected key=value"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(recipe_file, change, words):
    with pytest.raises(UserError) as caught:
        read_recipe(recipe_file, [change])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_every_number_has_a_range():
    classes = (Recipe, StageConfig, DataConfig, DPOConfig, LoRAConfig, VisionConfig, ProjectorConfig, RopeScaling)
    classes += (DecoderConfig, ImageConfig, LayoutConfig, ChatConfig)

    def numbers(hint):
        return hint in (int, float) or any(map(numbers, get_args(hint)))

    for cls in classes:
        ranged = {field for field, hint in get_type_hints(cls, include_extras=True).items() if interval_of(hint)}
        assert ranged == {field for field, hint in get_type_hints(cls).items() if numbers(hint)}


@pytest.mark.parametrize("change", [
    "stage.first.clip=-1", "stage.first.clip=nan", "stage.first.eval_samples=-3", "stage.first.lr.projector=nan",
    "stage.first.lr.projector=inf", "stage.first.weight_decay=-0.1", "stage.first.weight_decay=inf",
    "stage.first.betas=[0.9, 1.0]", "stage.first.betas=[-0.1, 0.9]", "stage.first.eps=0", "stage.first.eps=nan",
    "stage.first.steps=-1", "stage.second.epochs=nan", "stage.second.epochs=inf", "stage.first.row_tokens=-1",
    "stage.first.save_every=-1", "stage.first.workers=-2", "stage.first.seed=-2", "seed=-1", "timeout=0",
    "stage.first.lora={projector = {alpha = nan}}", "stage.first.lora={projector = {rank = 0}}",
    "stage.first.lora={projector = {alpha = 0}}", "stage.second.data.0.max_bad=nan", "stage.first.dpo.beta=inf",
    "model.decoder.num_heads=0", "model.decoder.rope_theta=-1", "model.decoder.rope_scaling={factor = 0}",
    "model.vision.norm_eps=nan", "model.image.std=[1, 0, 1]", "model.image.mean=[nan, 0, 1]",
    "model.projector.layers=9",
    "stage.first.layout.video_fps=-1", "stage.first.chat.eos_ids=[-5]", "stage.first.max_tokens=1",
])  # fmt: skip
def test_a_number_out_of_range_is_refused_before_the_start(recipe_file, change):
    key = re.findall(r"[a-z_]+(?= ?=)", change)[-1]
    with pytest.raises(UserError, match=rf"{key} is (-?[\d.]+|nan|inf), which is not in [\[(]"):
        read_recipe(recipe_file, [change])


def test_unreadable_recipes(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = ")
    with pytest.raises(UserError, match="is not TOML"):
        read_recipe(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_recipe(tmp_path / "latin.toml")


def test_differences_name_the_keys_and_which_may_change_on_resume(recipe_file):
    old = read_recipe(recipe_file)
    free = read_recipe(recipe_file, ["stage.*.workers=3", "stage.first.save_every=7"], out="elsewhere")
    assert differences(old, free) and all(may_change(*change) for change in differences(old, free).items())
    new = read_recipe(recipe_file, ["stage.second.lr.decoder=1e-4", "seed=1", "stage.second.data.0.path=c.json"])
    assert differences(old, new) == {
        "seed": "42 -> 1",
        "stage.second.data.0.path": "a.json -> c.json",
        "stage.second.lr.decoder": "2e-05 -> 0.0001",
    }
    assert [may_change(*change) for change in differences(old, new).items()] == [False, False, True]
    part = read_recipe(recipe_file, ["stage.second.lr.vision=1e-4"])
    assert not any(may_change(*change) for change in differences(old, part).items())  # another part cannot join


def test_stage_index_suggests(recipe_file):
    recipe = read_recipe(recipe_file)
    assert stage_index(recipe, "second") == 1
    with pytest.raises(UserError, match="did you mean 'second'"):
        stage_index(recipe, "secnd")


def test_micro_batch_is_bounded_by_the_batch():
    assert StageConfig(batch_size=8).micro == 8
    assert StageConfig(batch_size=8, micro_batch=3).micro == 3
    assert StageConfig(batch_size=8, micro_batch=30).micro == 8


P, D, V = "projector", "decoder", "vision"
ALL = {P: 1e-5, D: 1e-5, V: 2e-6}
# (rates, batch size, epochs or steps) of each stage, from the papers and scripts that the recipes name.
NUMBERS = {
    "llava-v1": [({P: 2e-3}, 128, 1), ({P: 2e-5, D: 2e-5}, 32, 3)],
    "llava-1.5-7b": [({P: 1e-3}, 256, 1), ({P: 2e-5, D: 2e-5}, 128, 1)],
    "llava-1.5-13b": [({P: 1e-3}, 256, 1), ({P: 2e-5, D: 2e-5}, 128, 1)],
    "llava-1.5-7b-lora": [({P: 1e-3}, 256, 1), ({P: 2e-5, D: 2e-4}, 128, 1)],
    "llava-1.5-7b-qlora": [({P: 2e-5, D: 2e-5}, 128, 1)],
    "llava-1.5-task": [({P: 2e-5, D: 2e-5}, 128, 1)],
    "llava-1.5-task-lora": [({P: 2e-5, D: 2e-4}, 128, 1)],
    "llava-1.5-hd": [({P: 1e-3}, 256, 1), ({P: 2e-5, D: 2e-5}, 128, 1)],
    "llava-next": [({P: 1e-3}, 256, 1), (ALL, 128, 1)],
    "next-video": [(ALL, 128, 1)],
    "next-video-dpo": [({P: 5e-7, D: 5e-7, V: 5e-7}, 128, 3)],
    "llava-video": [(ALL, 256, 1)],
    "onevision": [({P: 1e-3}, 512, 1), (ALL, 256, 1), (ALL, 256, 1), (ALL, 256, 1)],
    "onevision-1.5": [
        ({P: 1e-4}, 8, 2500),
        ({P: 1e-5, D: 1e-5, V: 1e-5}, 16, 20000),
        ({P: 1e-5, D: 1e-5, V: 1e-5}, 224, 3500),
    ],
    "onevision-2": [
        ({P: 1e-4}, 8, 2500),
        ({P: 1e-5, D: 1e-5, V: 1e-5}, 16, 20000),
        *[({P: 1e-5, D: 1e-5, V: 1e-5}, 132, 1)] * 5,  # of the last four the rates are in no source
    ],
    "onevision-1.5-lora": [({P: 2e-5, D: 2e-5}, 64, 1)],  # nobody's: LLaVA-1.5's over 4 bits
    "onevision-2-lora": [({P: 2e-5, D: 2e-5}, 64, 1)],
}


def test_the_papers_numbers():
    recipes = {path.stem: read_recipe(path) for path in RECIPES if not path.stem.startswith("nano")}
    assert {
        name: [(s.lr, s.batch_size, s.epochs or s.steps) for s in recipe.stage] for name, recipe in recipes.items()
    } == NUMBERS
    for name, recipe in recipes.items():
        assert recipe.name == name
        for stage in recipe.stage:
            assert (stage.schedule, stage.clip) == ("linear" if stage.task == "dpo" else "cosine", 1.0)
            if stage.task == "dpo":
                assert (stage.warmup, stage.dpo) == (0.1, DPOConfig(0.1, "sigmoid", 0.0))
            elif name not in ("onevision-1.5", "onevision-2"):
                assert (stage.warmup, stage.weight_decay, stage.betas, stage.eps) == (0.03, 0.0, (0.9, 0.999), 1e-8)
            if name == "llava-v1" or (name.startswith("llava-1.5") and name != "llava-1.5-hd"):
                assert stage.max_tokens == 2048 and stage.floor == 0
    adapters = {name: recipe.stage[-1].lora["decoder"] for name, recipe in recipes.items() if recipe.stage[-1].lora}
    assert {name: (a.rank, a.alpha, a.dropout) for name, a in adapters.items()} == {
        "llava-1.5-7b-lora": (128, 256, 0.05),
        "llava-1.5-task-lora": (128, 256, 0.05),
        "llava-1.5-7b-qlora": (64, 16, 0.05),
        "onevision-1.5-lora": (64, 16, 0.05),
        "onevision-2-lora": (64, 16, 0.05),
    }
    for stage in recipes["onevision-2"].stage:
        assert (stage.eps, stage.warmup, stage.row_tokens) == (1e-5, 0.002, stage.max_tokens)
        assert (stage.betas, stage.weight_decay) == (((0.9, 0.95), 0.01) if stage.name == "mid" else ((0.9, 0.99), 0))
    frames = {s.name: s.layout["max_frames"] for s in recipes["onevision-2"].stage if s.layout.get("one_row")}
    assert frames == {"seconds": 30, "minutes": 90, "long": 384, "codec": 384}
    for stage, floor, betas, decay, row in zip(
        recipes["onevision-1.5"].stage, (0.01, 0.1, 0.1), ((0.9, 0.99), (0.9, 0.95), (0.9, 0.99)),
        (0, 0.01, 0), (32768, 32768, 0), strict=True,
    ):  # fmt: skip
        assert (stage.floor, stage.betas, stage.weight_decay, stage.row_tokens) == (floor, betas, decay, row)
        assert (stage.eps, stage.warmup, stage.max_tokens) == (1e-5, 0.002, 32768)


def test_help_needs_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']\ntry: runpy.run_path('train.py', run_name='__main__')\n"
    )
    code += "except SystemExit: print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.endswith("False\n") and "--resume" in shown
