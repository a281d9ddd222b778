"""Every recipe, unchanged but for sizes and data, trains tiny models on the built-in world, mixed as real data are."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minillava.config import ChatConfig, DecoderConfig, ImageConfig, ModelConfig, ProjectorConfig, VisionConfig
from minillava.decoder import Decoder
from minillava.hf_parts import read_decoder, read_vision
from minillava.llava import LLaVA
from minillava.names import rename
from minillava.pipeline import run_recipe
from minillava.progress import read_log
from minillava.recipe import read_recipe
from minillava.shapes_samples import write
from minillava.tokenizer import load_tokenizer
from minillava.train_tokenizer import train_small_tokenizer
from minillava.vit import VisionTower
from minillava.weights import load_model, save_model

RECIPES = Path(__file__).parents[1] / "recipes"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SEEN = {**SIZES, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rope_theta": 1e4}
PARTS = {  # what a recipe names: config.json of a tiny one
    "lmsys/vicuna": {**SIZES, **HEADS, "model_type": "llama"},
    "Qwen/Qwen2": {**SIZES, **HEADS, "model_type": "qwen2", "max_position_embeddings": 32768},
    "openai/clip": {**SEEN, "model_type": "clip_vision_model"},
    "google/siglip": {**SEEN, "model_type": "siglip_vision_model"},
}  # fmt: skip
SPECIAL = (
    *("<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
BASES = {  # what a recipe goes on from: the recipe that makes a tiny one, and its stage
    "liuhaotian/llava-v1.5-13b": ("llava-1.5-13b", "finetune"),
    "runs/llava-1.5-7b/pretrain/model": ("llava-1.5-7b", "pretrain"),
    "llava-hf/llava-v1.6-vicuna-7b-hf": ("llava-next", "finetune"),
    "lmms-lab/llava-onevision-qwen2-7b-si": ("onevision", "si"),
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
            if "vision" in config["model_type"]:
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

        self.save_onevision_15(tokenizer)

    def save_onevision_15(self, tokenizer):
        """What ds/merge_model.py makes, tiny: RICE, Qwen3 and a new merger in one checkpoint."""
        sizes = tokenizer.vocab_size, 32, 48, 2, 4, 2, 8, 5e6
        image, video = map(tokenizer.token_id, SPECIAL[-2:])
        config = ModelConfig(
            VisionConfig(32, 48, 2, 4, 14, 14, activation="gelu", rotary=True, select_layers=(-1,)),
            ProjectorConfig(merge=2),
            DecoderConfig(*sizes, norm_eps=1e-6, max_positions=32768, qk_norm=True, model_type="qwen3"),
            ImageConfig(14, "native", min_pixels=3136, max_pixels=20000),
            chat=ChatConfig("onevision_1_5", "", False, False, *(SPECIAL[-2], image, SPECIAL[-1], video), None, (2,)),
        )
        model = LLaVA(config)
        model.init_weights(0)
        save_model(model, self.folder / "onevision-15", tokenizer)

    def sets(self, recipe):
        """Sizes and data in place of a recipe's; all else stays."""
        sets = ["device=cpu", "stage.*.dtype=float32", "stage.*.epochs=0", "stage.*.steps=2", "stage.*.batch_size=4",
                "stage.*.micro_batch=2", "stage.*.workers=0"]  # fmt: skip
        for key in ("vision_from", "decoder_from"):
            wanted = getattr(recipe.model, key)
            part = next((part for part in PARTS if wanted.startswith(part)), None)
            sets += [f"model.{key}={self.folder / part.replace('/', '-')}"] if part else []
        if recipe.model.base:
            made = BASES.get(recipe.model.base)
            sets.append(f"model.base={self.made(*made) if made else self.folder / 'onevision-15'}")
        for stage in recipe.stage:
            kinds = ["caption"] if "template" in stage.chat else ["picture", "text", "several", "video"]
            takes = {"picture": stage.data[-1].take, "video": stage.data[0].take}
            files = (
                f'{{path = "{self.files[k]}", images = "{self.folder}/data/media", take = "{takes.get(k, "all")}"}}'
                for k in kinds
            )
            sets.append(f"stage.{stage.name}.data=[{', '.join(files)}]")
        return sets

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


@pytest.mark.parametrize("name", [path.stem for path in sorted(RECIPES.glob("*.toml")) if path.stem != "nano"])
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
