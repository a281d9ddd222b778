"""What several test files share besides fixtures (conftest.py)."""

import json
import os
from pathlib import Path

from PIL import Image, ImageDraw

from minillava.config import ChatConfig, ImageConfig, ModelConfig, VisionConfig
from minillava.store import ImageStore

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("MINILLAVA_REAL", ROOT.parent / "shared" / "real"))  # files that no one here made


class Pictures(ImageStore):
    """Images (or the bytes of files) in memory, by name."""

    def __init__(self, pictures):
        self.pictures = pictures

    def has(self, name):
        return name in self.pictures

    def get(self, name, label):
        return self.pictures[name]


def tiny_config(tokenizer, decoder, layers=3):
    """16-pixel pictures of 4 visual tokens, for this decoder."""
    ids = {"image_token_id": tokenizer.token_id("<image>"), "bos_id": tokenizer.bos_id, "eos_ids": (tokenizer.eos_id,)}
    vision = VisionConfig(16, 32, layers, 2, 16, 8)
    return ModelConfig(vision, decoder=decoder, image=ImageConfig(16), chat=ChatConfig(**ids))


def talk(question, answer):
    """A question and its answer as turns of LLaVA's JSON."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_world(root, pictures, colors, yes, texts):
    """data.json: so many pictures (in images/) of discs in these colors, with answers of unequal length, up to `yes`
    words longer; text.json: conversations of these turns, without a picture."""
    (root / "images").mkdir()
    samples = []
    for i in range(pictures):
        color = colors[i % len(colors)]
        picture = Image.new("RGB", (24, 16), "white")
        ImageDraw.Draw(picture).ellipse((2, 2, 10 + i % 7, 10 + i % 5), fill=color)
        picture.save(root / "images" / f"{i}.png")
        turns = talk("<image>\nWhich?", f"It is {color}." + " Yes." * (i % yes))
        samples.append({"id": f"s{i}", "image": f"{i}.png", "conversations": turns})
    (root / "data.json").write_text(json.dumps(samples))
    (root / "text.json").write_text(json.dumps([{"id": f"t{i}", "conversations": t} for i, t in enumerate(texts)]))
