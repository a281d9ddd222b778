"""What several test files share besides fixtures (conftest.py)."""

import contextlib
import copy
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from minillava.chat import prompt
from minillava.checkpoints.checkpoint import Checkpoint
from minillava.config import ChatConfig, ImageConfig, LoRAConfig, ModelConfig, VisionConfig
from minillava.data.files import MediaStore, StoredMedia
from minillava.generation.engine import Engine
from minillava.layers import lora

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("MINILLAVA_REAL", ROOT.parent / "shared" / "real"))  # files that no one here made


@contextlib.contextmanager
def disk_of(size):
    """As on a full disk, for root as well: a write past so many bytes of a file is refused by the system."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Pictures(MediaStore):
    """Images (or the bytes of files) in memory, by name."""

    def __init__(self, pictures):
        self.pictures = pictures

    def has(self, name):
        return name in self.pictures

    def get(self, name):
        return self.pictures[name]


def stored(name, pictures, video=False):
    """A picture or video of a store, or of a dict, by name."""
    return StoredMedia(pictures if isinstance(pictures, MediaStore) else Pictures(pictures), video, name)


class AnyVocabulary:
    """A tokenizer that has every special token."""

    special_tokens: dict[str, str] = {}  # noqa: RUF012

    def token_id(self, token):
        return 0


def pieces(chat, messages, generate):
    """A conversation as pieces of text, whatever the vocabulary."""
    return prompt.render(chat, AnyVocabulary(), messages, generate)


def encode(chat, tokenizer, messages, visual_tokens, generate):
    """Ids and labels of a conversation whose pictures have so many tokens."""
    return prompt.encode(chat, tokenizer, prompt.render(chat, tokenizer, messages, generate), visual_tokens)


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


def load_model(folder, dtype=None, device="cpu", base=None, quantize=None, sink=None):
    """The model of a checkpoint."""
    return Checkpoint.open(folder, base).load(dtype, device, quantize, sink)


def read_config(folder):
    """The ModelConfig of a checkpoint."""
    return Checkpoint.open(folder).config


# ---- adapters ----

LORA = LoRAConfig(rank=4, alpha=8.0, dropout=0.05)


def adapted(tiny_model, *parts):
    """A copy of the model with adapters that have learned something, and what was trained, by name."""
    model = copy.deepcopy(tiny_model).eval()
    trained = {}
    for part in parts:
        trained |= lora.attach(getattr(model, part), part, LORA)
    lora.initialise(trained, seed=1)
    return model, trained


def learn(trained):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in trained.items():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.3, generator=generator)


@torch.no_grad()
def logits(model, prompt):
    return model(prompt[0], prompt[1])


def close(a, b):
    """Within what float32 leaves of two orders of summation behind this model's large weights."""
    return (a - b).abs().max() <= 1e-4 * b.abs().max()


# ---- a tiny LLaVA of transformers' ----

TEXT = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
VISION = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
)
PIXELS = dict(
    image_processor_type="CLIPImageProcessor", size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
)


def logits_there(model, ids, pixels):
    with torch.no_grad():
        return model(input_ids=ids[None], pixel_values=pixels).logits[0]


def logits_here(model, ids, pixels):
    with torch.no_grad():
        return model(ids, images=pixels)


def tiny_pair(decoder, tokenizer, folder):
    """A tiny LLaVA of transformers' that computes its attention in the open, and an engine of ours of the same files.

    decoder: its model_type. Its weights are large enough that an answer depends on the whole prompt.
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = transformers.AutoConfig.for_model(
        decoder, **{**TEXT, "vocab_size": tokenizer.vocab_size}, num_key_value_heads=2
    )
    vision = transformers.AutoConfig.for_model("clip_vision_model", **VISION)
    marker = tokenizer.token_id("<image>")
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=marker)
    config._attn_implementation = "eager"
    theirs = transformers.LlavaForConditionalGeneration(config).eval()
    for p in theirs.parameters():
        p.data.mul_(4 if p.ndim > 1 else 1)
    theirs.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    ours = load_model(folder)
    chat = ChatConfig(image_token_id=marker, bos_id=tokenizer.bos_id, eos_ids=(tokenizer.eos_id,))
    return theirs, Engine(ours.under(dataclasses.replace(ours.config, chat=chat)), tokenizer)
