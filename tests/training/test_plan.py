"""`minillava plan`: within 7 % of what PyTorch's allocator says, and what a config alone tells."""

import dataclasses
import json

import pytest
import torch

from bench import plan as bench
from minillava.cli import run_command
from minillava.cli.train import find_recipe
from minillava.config import DecoderConfig, LoRAConfig, ModelConfig, VisionConfig
from minillava.errors import UserError
from minillava.recipe import StageConfig, read_recipe
from minillava.training.cards import CARDS, Card, card_of
from minillava.training.fit import fit_training, recipe_model, settings
from minillava.training.plan import Plan, plan_answer, plan_training

SMALL = dataclasses.replace(
    bench.CONFIG,
    vision=VisionConfig(128, 256, 3, 2, 224, 14),
    decoder=DecoderConfig(4096, 256, 640, 3, 4, 2, 64, max_positions=2048),
)


@pytest.mark.parametrize("name", ["QLoRA, bf16, checkpointing", "answer, bf16"])
def test_a_small_plan_is_what_the_allocator_says(name):
    found = bench.measured(name, SMALL)
    assert abs(sum(bench.planned(name, SMALL).values()) / found - 1) <= bench.WITHIN


@pytest.mark.slow
def test_six_plans_are_what_the_allocator_says():
    """Each in a process of its own: full, LoRA and QLoRA, with and without checkpointing; answers in bf16 and NF4."""
    assert len(bench.CASES) == 6 and bench.main([]) == 0


def test_an_answer_of_7b_by_hand():
    """LLaVA-1.5 7B: two bytes a weight, keys and values of 32 layers of 4096."""
    plan = plan_answer(ModelConfig(), torch.bfloat16, prompt=1000, new=48, picture=(640, 480))
    D, V, C = 4096, 32000, 1024
    decoder = 2 * V * D + 32 * (4 * D * D + 3 * D * 11008 + 2 * D) + D
    tower = 24 * (4 * (C * C + C) + 2 * C * 4096 + 4096 + C + 4 * C) + C + 588 * C + 577 * C + 4 * C
    projector = C * D + D + D * D + D
    assert plan.parts["weights"] == 2 * (decoder + tower + projector)
    assert 0 <= plan.parts["cache"] - 2 * 32 * 1048 * D * 2 < 100
    assert plan.token_bytes == 2 * (decoder - V * D) + 2 * 32 * 1048 * D * 2
    assert plan.flops == pytest.approx(2 * 6.6e9 * 1000 + 2 * 0.3e9 * 576, rel=0.1)
    nf4 = plan_answer(ModelConfig(), torch.bfloat16, "nf4", prompt=1000, new=48)
    blocks = 32 * (4 * D * D + 3 * D * 11008)
    assert plan.parts["weights"] - nf4.parts["weights"] == pytest.approx(blocks * (2 - 0.5 - 4 / 64), rel=0.03)


def test_a_training_step_by_hand():
    """AdamW: masters, gradients and two moments in float32 of all that is trained; copies in bf16."""
    stage = StageConfig(name="x", lr={"projector": 1e-3, "decoder": 1e-4}, batch_size=2, dtype="bfloat16")
    plan = plan_training(SMALL, stage, torch.bfloat16, tokens=320)
    trained = 256 * 128 + 256 + 256 * 256 + 256 + 2 * 4096 * 256 + 256
    trained += 3 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 640 + 2 * 256)
    assert plan.parts["optimizer"] == pytest.approx(8 * trained, rel=0.01)
    assert plan.parts["copies"] == pytest.approx(2 * trained, rel=0.01)
    long = dict(tokens=1900, picture=None)
    plan = plan_training(SMALL, stage, torch.bfloat16, **long)
    checkpointed = plan_training(SMALL, dataclasses.replace(stage, checkpointing="full"), torch.bfloat16, **long)
    assert checkpointed.peak < plan.peak and checkpointed.flops > plan.flops
    assert checkpointed.parts["activations"] < 0.5 * plan.parts["activations"]
    plan = plan_training(SMALL, stage, torch.bfloat16, tokens=320)
    eight = plan_training(SMALL, dataclasses.replace(stage, optimizer="adamw8bit"), torch.bfloat16, tokens=320)
    assert eight.parts["optimizer"] < 0.3 * plan.parts["optimizer"]


def test_samples_are_planned_as_long_as_training_leaves_them():
    """max_tokens is 2,048 by default; the decoder's context cuts first."""
    short = dataclasses.replace(SMALL, decoder=dataclasses.replace(SMALL.decoder, max_positions=512))
    stage = StageConfig(name="x", lr={"decoder": 1e-4}, batch_size=1, dtype="bfloat16")
    plan, cut, whole = (plan_training(short, stage, torch.bfloat16, tokens=n) for n in (0, 512, 2048))
    assert plan.parts == cut.parts and plan.parts["activations"] < whole.parts["activations"]


def test_recipes_are_planned_before_their_parts_are_there():
    """Vicuna and CLIP are known by name; a base that another recipe makes is what that recipe says."""

    def find(name):
        return read_recipe(find_recipe(name))

    config, held = recipe_model(find("llava-1.5-7b-qlora"), find)
    assert config.decoder == ModelConfig().decoder and config.vision == ModelConfig().vision and held == torch.bfloat16
    config, held = recipe_model(find("llava-1.5-13b"), find)
    assert config.decoder.hidden_size == 5120 and config.projector.layers == 2
    config, held = recipe_model(find("nano"), find)
    assert config.decoder.hidden_size == 128 and held == torch.float32


def test_what_fits_is_the_first_way_and_the_most_samples():
    stage = StageConfig(name="x", lr={"projector": 1e-3, "decoder": 1e-4}, batch_size=8)
    ways = [name for name, *_ in settings(stage, "")]
    assert len(ways) == 5 and ways[0] == "as it is" and "nf4-double" in ways[-1]

    def plan(changed, quantize):  # GiB: a way's own, and one for each sample
        base = 3 if quantize else 17 if changed.lora else 60 if changed.optimizer == "adamw8bit" else 100
        return Plan({"weights": (base + changed.micro_batch) << 30}, 1.0)

    found = {gb: (how, micro) for gb, how, micro, _ in fit_training(plan, stage, "")}
    assert found[16] == (ways[4], 8) and found[24] == (ways[3], 2) and found[80] == (ways[2], 8)
    assert found[141] == (ways[0], 8)
    lora = dataclasses.replace(stage, lora={"decoder": LoRAConfig()}, checkpointing="full")
    assert [name for name, *_ in settings(lora, "nf4")] == ["as it is"]


def test_the_command(capsys):
    assert run_command("plan", ["nano", "--stage", "finetune", "--set", "stage.finetune.micro_batch=8", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["peak"] == sum(plan["parts"].values()) and plan["flops"] > 0
    assert run_command("plan", ["nano", "--stage", "clip"]) == 0
    assert "task 'clip' is not planned" in capsys.readouterr().out
    assert run_command("plan", ["minillava/nano", "--fit", "--card", "h100"]) == 0
    assert capsys.readouterr().out.count(" GB ") == 5
    for wrong in (["nano", "--card", "abacus"], ["nano", "--picture", "big"], ["minillava/nano", "--set", "seed=1"]):
        assert run_command("plan", wrong) == 2
    with pytest.raises(UserError, match="known: RTX-4060Ti-16GB"):
        card_of("?")
    assert all(isinstance(card, Card) and card.usable < card.memory_gb * 1e9 for card in CARDS.values())
