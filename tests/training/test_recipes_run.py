"""Every recipe, unchanged but for sizes and data, trains tiny models on the built-in world, mixed as real data are."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import load_model
from safetensors.torch import save_file

from minillava.chat.tokenizer import load_tokenizer
from minillava.checkpoints.config_parts import read_decoder, read_native_tower, read_vision
from minillava.checkpoints.names import rename
from minillava.decoder import Decoder
from minillava.recipe import read_recipe
from minillava.synthetic.samples import write
from minillava.synthetic.train_tokenizer import train_small_tokenizer
from minillava.training.pipeline import run_recipe
from minillava.training.progress import read_log
from minillava.vit import VisionTower

RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SEEN = {**SIZES, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rope_theta": 1e4}
PARTS = {  # what a recipe names: config.json of a tiny one
    "lmsys/vicuna": {**SIZES, **HEADS, "model_type": "llama"},
    "Qwen/Qwen3": {**SIZES, **HEADS, "model_type": "qwen3", "head_dim": 8, "max_position_embeddings": 32768,
                   "tie_word_embeddings": True},
    "DeepGlint-AI/rice-vit": {**SEEN, "model_type": "mlcd_vision_model", "patch_size": 14},
    "lmms-lab-encoder/onevision-encoder": {**SEEN, "model_type": "onevision_encoder", "hidden_size": 64},
    "Qwen/Qwen2": {**SIZES, **HEADS, "model_type": "qwen2", "max_position_embeddings": 32768},
    "openai/clip": {**SEEN, "model_type": "clip_vision_model"},
    "google/siglip": {**SEEN, "model_type": "siglip_vision_model"},
}  # fmt: skip
SPECIAL = (
    *("<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
NATIVE = ("mlcd_vision_model", "onevision_encoder")  # take pictures of any size
BASES = {  # what a recipe goes on from: the recipe that makes a tiny one, and its stage
    "liuhaotian/llava-v1.5-13b": ("llava-1.5-13b", "finetune"),
    "runs/llava-1.5-7b/pretrain/model": ("llava-1.5-7b", "pretrain"),
    "llava-hf/llava-v1.6-vicuna-7b-hf": ("llava-next", "finetune"),
    "llava-hf/LLaVA-NeXT-Video-7B-hf": ("next-video", "finetune"),
    "lmms-lab/llava-onevision-qwen2-7b-si": ("onevision", "si"),
    "lmms-lab/LLaVA-OneVision-1.5-8B-Instruct": ("onevision-1.5", "instruct"),
    "lmms-lab-encoder/LLaVA-OneVision-2-8B-Instruct": ("onevision-2", "codec"),
}


class World:
    """Data, tiny towers and language models, and what the recipes have made of them so far."""

    def __init__(self, folder):
        self.folder, self.files = folder, write(folder / "data", 6)
        texts = [
            row["value"]
            for path in self.files.values()
            for s in json.loads(path.read_text())
            for row in s["conversations"]
        ]
        train_small_tokenizer(texts * 2, folder / "tokenizer", SPECIAL, vocab_size=500)
        tokenizer = load_tokenizer(folder / "tokenizer")
        torch.manual_seed(0)
        for name, config in PARTS.items():
            path = folder / name.replace("/", "-")
            path.mkdir()
            if config["model_type"] in NATIVE:
                module = VisionTower(read_native_tower(config, name)[0])
                prefix, layout = "vision.", f"tower/{config['model_type']}"
            elif "vision" in config["model_type"]:
                prefix, layout, module = "vision.", "tower", VisionTower(read_vision(config, name, [-2], False))
                kind = "CLIP" if "clip" in config["model_type"] else "Siglip"
                size = {"shortest_edge": 28} if kind == "CLIP" else {"height": 28, "width": 28}
                processor = {"image_processor_type": f"{kind}ImageProcessor", "size": size}
                processor |= {"crop_size": 28} if kind == "CLIP" else {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
                (path / "preprocessor_config.json").write_text(json.dumps(processor))
            else:
                config = {**config, "vocab_size": tokenizer.vocab_size}
                prefix, layout, module = "decoder.", "original", Decoder(read_decoder(config, name))
                tokenizer.save(path)
            for p in module.parameters():
                torch.nn.init.normal_(p, std=0.2)
            (path / "config.json").write_text(json.dumps(config))
            state = {rename(prefix + n, layout, to_ours=False): p.detach() for n, p in module.named_parameters()}
            save_file(state, path / "model.safetensors")

    def sets(self, recipe):
        """Sizes and data in place of a recipe's; all else stays."""
        sets = ["device=cpu", "stage.*.dtype=float32", "stage.*.epochs=0", "stage.*.steps=2", "stage.*.batch_size=4",
                "stage.*.micro_batch=2", "stage.*.workers=0"]  # fmt: skip
        for key in ("vision_from", "decoder_from"):
            wanted = getattr(recipe.model, key)
            part = next((part for part in PARTS if wanted.startswith(part)), None)
            sets += [f"model.{key}={self.folder / part.replace('/', '-')}"] if part else []
        if recipe.model.base:
            sets.append(f"model.base={self.made(*BASES[recipe.model.base])}")
        for stage in recipe.stage:
            if stage.task == "dpo":
                sets.append(
                    f'stage.{stage.name}.data=[{{path = "{self.pairs()}", images = "{self.folder}/data/media"}}]'
                )
                continue
            kinds = ["caption"] if "template" in stage.chat else ["picture", "text", "several", "video"]
            takes = {"picture": stage.data[-1].take, "video": stage.data[0].take}
            files = (
                f'{{path = "{self.files[k]}", images = "{self.folder}/data/media", take = "{takes.get(k, "all")}"}}'
                for k in kinds
            )
            sets.append(f"stage.{stage.name}.data=[{', '.join(files)}]")
        return sets

    def pairs(self):
        """Preferences about clips: each true answer before that of another sample."""
        rows = json.loads(self.files["video"].read_text())
        for row, other in zip(rows, rows[1:] + rows[:1]):
            row["chosen"], row["rejected"] = row["conversations"].pop(), {"from": "gpt", "value": f"{other['id']}."}
        path = self.folder / "pairs.json"
        path.write_text(json.dumps(rows))
        return path

    def run(self, name):
        """The recipe as it was run, and its folder; run once, however many tests ask."""
        out = self.folder / "runs" / name
        recipe = read_recipe(RECIPES / f"{name}.toml")
        recipe = read_recipe(RECIPES / f"{name}.toml", self.sets(recipe), str(out))
        if not out.exists():
            run_recipe(recipe)
        return recipe, out

    def made(self, name, stage):
        return self.run(name)[1] / stage / "model"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", sorted({path.stem for path in RECIPES.glob("*.toml")} - {"nano", "nano-long"}))
def test_recipe(world, name):
    """All its stages run, with finite losses, and train the parts that have a rate and no other."""
    recipe, out = world.run(name)
    rows = read_log(out / "log.jsonl")
    before = load_model(recipe.model.base).state_dict() if recipe.model.base else None
    for stage in recipe.stage:
        steps = [row for row in rows if row["stage"] == stage.name and "loss" in row]
        assert len(steps) == 2 and all(math.isfinite(row["loss"]) and row["supervised"] > 0 for row in steps)
        assert (
            steps[0]["lr"].keys() == stage.lr.keys() and steps[0]["lr"] == stage.lr
        )  # a step of warm-up, then the peak
        after = load_model(out / stage.name / "model").state_dict()
        moved = {n for n in after if before is None or not torch.equal(before[n], after[n])}
        if before is not None:
            assert {n.split(".")[0] for n in moved} == stage.lr.keys() | (
                {"decoder"} if recipe.model.quantize else set()
            )
            if stage.lora:
                assert not any("norm" in n or "embed" in n or "head" in n for n in moved if n.startswith("decoder"))
        before = after
