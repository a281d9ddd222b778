"""What bench.train_7b trains on: conversations with the lengths of LLaVA-1.5's data, and random weights."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minillava.chat.templates import TEMPLATES
from minillava.config import ModelConfig
from minillava.layers.linear import Unallocated
from minillava.layers.quantize import Linear4bit, chosen_layers
from minillava.layers.scheme import Scheme
from minillava.llava import LLaVAModel
from minillava.synthetic.train_tokenizer import train_small_tokenizer

# LLaVA-1.5's 665K (table 7 of arXiv 2310.03744): thousands of samples; mean and deviation of their texts' tokens
SHARES = {
    "conversation": (58, 250, 110), "detail": (23, 170, 50), "complex": (77, 200, 80), "vqav2": (83, 90, 40),
    "gqa": (72, 150, 90), "okvqa": (9, 40, 15), "ocrvqa": (80, 130, 50), "aokvqa": (66, 70, 15),
    "textcaps": (22, 40, 8), "refcoco": (48, 180, 60), "vg": (86, 350, 120), "sharegpt": (40, 1400, 900),
}  # fmt: skip


def text_tokens(count: int, seed: int = 0) -> list[tuple[int, bool]]:
    """Tokens of the texts of so many samples as in LLaVA-1.5's 665K, template apart, and whether there is a picture.

    The shares are the paper's, means and spreads of the texts are rough; 6 % are text alone, and long.
    """
    rng = np.random.default_rng(seed)
    names, weights = list(SHARES), np.array([share for share, _, _ in SHARES.values()], float)
    found = []
    for name in rng.choice(names, count, p=weights / weights.sum()):
        _, mean, spread = SHARES[name]
        spread = np.log(1 + (spread / mean) ** 2)
        found.append((int(rng.lognormal(np.log(mean) - spread / 2, spread**0.5)) + 10, name != "sharegpt"))
    return found


def make_data(folder: Path, count: int, scale: int) -> None:
    """Conversations, captions and texts that are too long, 16 pictures, and a tokenizer; texts are 1/scale as long."""
    rng, words = random.Random(0), [a + b + c for a in "bdgklmnp" for b in "aeo" for c in "rs"]
    (folder / "images").mkdir(parents=True)
    for i in range(16):
        noise = np.random.default_rng(i).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(folder / "images" / f"{i}.jpg")

    def sample(number: int, tokens: int, picture: bool, turn: int) -> dict[str, Any]:
        """Half of the words are answers, in turns of `turn` words and 5 tokens of the template."""
        turns = []
        for at in range(0, max(tokens // scale, 2), 2 * turn + 5):
            half = max(1, min(turn, (tokens // scale - at) // 2))
            asked, told = (" ".join(rng.choices(words, k=half)) for _ in range(2))
            mark = "<image>\n" if picture and not at else ""
            turns += [{"from": "human", "value": mark + asked}, {"from": "gpt", "value": told}]
        return {"id": str(number), "conversations": turns} | ({"image": f"{number % 16}.jpg"} if picture else {})

    captions = [max(12, int(rng.lognormvariate(3.7, 0.4))) for _ in range(count)]
    files = {
        "mix": [sample(i, n, seen, 12) for i, (n, seen) in enumerate(text_tokens(count))],
        "captions": [sample(i, 2 * n, True, 4096) for i, n in enumerate(captions)],
        "long": [sample(i, 2400 * scale, True, 12) for i in range(8)],
    }
    for name, samples in files.items():
        (folder / f"{name}.json").write_text(json.dumps(samples), encoding="utf-8")
    texts = [f"{TEMPLATES['vicuna_v1'].system} USER: {w} {w}\n{w} ASSISTANT: {w}</s>" for w in words]
    train_small_tokenizer(texts * 2, folder / "tokenizer", vocab_size=960)


# ---- the model ----


def draw(name: str, tensor: Tensor) -> None:
    """Random weights by name, the same in any dtype: bf16's numbers."""
    if "norm" in name or name.endswith("bias"):
        tensor.fill_(float("norm" in name and name.endswith("weight")))
        return
    generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
    std = (tensor[0].numel() if tensor.ndim > 1 else tensor.numel()) ** -0.5
    values = torch.empty(tensor.shape, dtype=torch.bfloat16, device=tensor.device)
    tensor.copy_(values.normal_(0.0, std, generator=generator))


def build(config: ModelConfig, scheme: Scheme | None, device: torch.device, dtype: torch.dtype) -> LLaVAModel:
    """Made on the device, one tensor after the other."""
    with Unallocated():
        model = LLaVAModel(config)
    small, state = chosen_layers(model, scheme) if scheme else set(), {}
    for name, parameter in list(model.named_parameters()):
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        draw(name, values)
        if name.removesuffix(".weight") in small:
            model.set_submodule(name.removesuffix(".weight"), Linear4bit.from_weight(values, None, scheme))
        else:
            state[name] = values
    model.load_state_dict(state, strict=False, assign=True)
    return model
