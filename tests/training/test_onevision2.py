"""OneVision-2 is trained as the others are: whole, with adapters, over 4 bits; on two ranks as on one; resumed.

The data are drawn: pictures, clips of one to nine frames, and texts; a row of tokens holds several of them.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, talk
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from minillava import LLaVA
from minillava.chat.tokenizer import load_tokenizer
from minillava.checkpoints.save import save_model
from minillava.config import (
    ChatConfig,
    DecoderConfig,
    ImageConfig,
    LayoutConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from minillava.llava import LLaVAModel
from minillava.synthetic.train_tokenizer import train_small_tokenizer
from minillava.training.progress import read_log

pytestmark = pytest.mark.xdist_group("ranks")
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>"]  # fmt: skip
RECIPE = """
name = "tiny"
device = "cpu"
[model]
base = "{root}/base"
[[stage]]
name = "a"
data = [{{path = "{root}/data.json", images = "{root}/media"}}]
lr = {{projector = 1e-2}}
layout = {{one_row = true}}
steps = 6
batch_size = 4
micro_batch = 1
row_tokens = 400
max_tokens = 400
dtype = "float32"
save_every = 0
"""
LORA = "stage.a.lora={decoder = {rank = 4, alpha = 8, dropout = 0.0}}"
MODES = {
    "full": ["stage.a.lr={vision = 1e-3, projector = 1e-2, decoder = 1e-3}"],
    "lora": ["stage.a.lr={projector = 1e-3, decoder = 1e-2}", LORA],
    "qlora": ["stage.a.lr={projector = 1e-3, decoder = 1e-2}", LORA, "model.quantize=nf4"],
}


def disc(seed):
    picture = Image.new("RGB", (60, 56), "white")
    ImageDraw.Draw(picture).ellipse((2, 2, 20 + seed % 30, 20 + seed % 20), fill=("red", "green", "blue")[seed % 3])
    return picture


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("onevision2")
    (root / "media").mkdir()
    samples = []
    for i in range(24):
        answer = f"It is {('red', 'green', 'blue')[i % 3]}." + " Yes." * (i % 4)
        sample = {"id": f"s{i}", "conversations": talk("<image>\nWhich?" if i % 3 == 0 else "Which?", answer)}
        if i % 3 == 0:
            disc(i).save(root / "media" / f"{i}.png")
            sample["image"] = f"{i}.png"
        elif i % 3 == 1:
            (root / "media" / f"clip{i}").mkdir()
            for frame in range(1 + i % 9):
                disc(i + frame).save(root / "media" / f"clip{i}" / f"{frame}.png")
            sample |= {"video": f"clip{i}", "conversations": talk("<video>\nWhich?", answer)}
        samples.append(sample)
    (root / "data.json").write_text(json.dumps(samples))
    words = ["system user assistant You are a helpful assistant. Which? It is red. green. blue. Yes. <0.0 seconds>\n"]
    train_small_tokenizer(words * 3, root / "tokenizer", SPECIALS)
    tokenizer = load_tokenizer(root / "tokenizer")
    config = ModelConfig(
        VisionConfig(64, 96, 2, 2, 14, 14, activation="gelu", norm_eps=1e-6, class_token=False, select_layers=(-1,),
                     rotary=True, rotary_shares=(4, 6, 6), rotary_pairs=True, window=4),
        ProjectorConfig(merge=2, norm_eps=1e-6),
        DecoderConfig(tokenizer.vocab_size, 64, 96, 2, 4, 2, 16, max_positions=512, qk_norm=True, model_type="qwen3"),
        ImageConfig(14, "native", min_pixels=3136, max_pixels=20000),
        LayoutConfig(video_sampling="rounded", max_frames=9, time_tags=True),
        ChatConfig("onevision_1_5", "", False, False, "<|image_pad|>", 5, "<|video_pad|>", 6, None, (2,)),
    )  # fmt: skip
    model = LLaVAModel(config)
    model.init_weights(seed=0)
    save_model(model, root / "base", tokenizer)
    (root / "recipe.toml").write_text(RECIPE.format(root=root))
    return root


def curve(out):
    return [(row["loss"], row["grad_norm"]) for row in read_log(out / "log.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def runs(world):
    """All modes on two ranks; on one, from beginning to end and stopped behind step 3, then resumed."""
    jobs = [{"sets": sets, "out": f"{world}/{mode}-2"} for mode, sets in MODES.items()]
    torchrun(world, 2, jobs)
    jobs = [{"sets": sets, "out": f"{world}/{mode}-1"} for mode, sets in MODES.items()]
    for mode, sets in MODES.items():
        job = {"sets": sets, "out": f"{world}/{mode}-resumed"}
        jobs += [job | {"stop_at": 3}, job | {"resume": True}]
    torchrun(world, 1, jobs)


def torchrun(world, ranks, jobs):
    file = world / f"jobs-{ranks}.json"
    file.write_text(json.dumps([{"recipe": str(world / "recipe.toml"), **job} for job in jobs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    own = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "ranks.py"), str(file)], env=os.environ | own, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-12000:]


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_learn_as_one(world, runs, mode):
    one, two = (torch.tensor(curve(world / f"{mode}-{ranks}"), dtype=torch.float64) for ranks in (1, 2))
    assert len(one) == 6 and one.isfinite().all() and one[-1, 0] < one[0, 0]
    torch.testing.assert_close(two, one, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_stopped_run_goes_on_to_the_bit(world, runs, mode):
    assert curve(world / f"{mode}-resumed") == curve(world / f"{mode}-1")
    whole, resumed = (load_file(world / f"{mode}-{name}/a/model/model.safetensors") for name in ("1", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(t, resumed[name]) for name, t in whole.items())


@pytest.mark.parametrize("mode", MODES)
def test_the_export_holds_what_was_trained(world, runs, mode):
    """In the released names; the tower moves where it has a rate, and an answer comes of what was saved."""
    state, base = (load_file(path / "model.safetensors") for path in (world / f"{mode}-1/a/model", world / "base"))
    assert {name.split(".lora")[0] for name in state} >= {"model.visual.merger.mlp.0.weight", "lm_head.weight"}
    moved = [
        name for name in base if state[name].shape == base[name].shape and not torch.equal(state[name], base[name])
    ]
    assert any("visual.encoder" in name for name in moved) == (mode == "full")
    assert any("visual.merger" in name for name in moved) and any("language_model" in name for name in moved)
    model = LLaVA.from_pretrained(world / f"{mode}-1/a/model", dtype="float32")
    assert model.config.layout.time_tags and not model.config.layout.one_row
    assert model.generate("Which?", images=[disc(3)], max_new_tokens=3).token_ids
