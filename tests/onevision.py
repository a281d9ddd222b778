"""Tiny OneVision-2 models, for several test files.

Letters: P patches, F canvases.
"""

import dataclasses

import torch
from PIL import Image

from minillava import LLaVA
from minillava.chat.tokenizer import load_tokenizer
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

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>"]  # fmt: skip
TOWER = VisionConfig(
    64, 96, 2, 2, 14, 14, activation="gelu", norm_eps=1e-6, class_token=False, select_layers=(-1,), rotary=True,
    rotary_shares=(4, 6, 6), rotary_pairs=True, window=4,
)  # fmt: skip
DENSE = DecoderConfig(0, 32, 48, 2, 4, 2, 16, rope_theta=8e6, norm_eps=1e-6, max_positions=4096, qk_norm=True,
                      model_type="qwen3")  # fmt: skip
MOE = dataclasses.replace(DENSE, num_experts=6, experts_per_token=2, expert_size=24, model_type="qwen3_moe")
LAYOUT = LayoutConfig(video_sampling="rounded", max_frames=384, time_tags=True)


def config(decoder=DENSE, vision=TOWER, merge=2, layout=LAYOUT):
    chat = ChatConfig("onevision_1_5", "", False, False, "<|image_pad|>", 5, "<|video_pad|>", 6, None, (2,))
    image = ImageConfig(vision.patch_size, "native", min_pixels=3136, max_pixels=20000)
    return ModelConfig(vision, ProjectorConfig(2, merge=merge, norm_eps=vision.norm_eps), decoder, image, layout, chat)


def fill(module, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + ("norm" in name and name.endswith("weight")))
    return module.eval()


def drawn(width, height, seed=0):
    pixels_HWC = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels_HWC.to(torch.uint8).numpy())


def packed(canvases, rows, columns, merge=2):
    """Positions of canvases, row by row, whose blocks come from frames 0, 3, 3, 4, ..."""
    blocks = canvases * rows * columns // merge**2
    time = torch.tensor([0, 3, 3, 4, 7]).repeat(blocks)[:blocks].cumsum(0)
    corner = torch.stack([time, torch.arange(blocks) % 5 * merge, torch.arange(blocks) % 3 * merge], 1)
    at = corner.view(canvases, rows // merge, 1, columns // merge, 1, 3).repeat(1, 1, merge, 1, merge, 1)
    at[..., 1] += torch.arange(merge).view(1, 1, merge, 1, 1)
    at[..., 2] += torch.arange(merge).view(1, 1, 1, 1, merge)
    return at.reshape(canvases, rows * columns, 3)


def make_tokenizer(folder):
    words = [
        "What happens? Is this from it? seconds <0.5> 1.5 system user assistant You are a helpful assistant.\n"
    ] * 3
    train_small_tokenizer(words, folder, SPECIALS)
    return load_tokenizer(folder)


def make_model(folder, form="", **parts):
    """A tiny model with random weights, saved in the folder and loaded from there."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    parts["decoder"] = dataclasses.replace(parts.get("decoder", DENSE), vocab_size=tokenizer.vocab_size)
    LLaVA(fill(LLaVAModel(config(**parts))), tokenizer).save_pretrained(folder / "saved", form)
    return LLaVA.from_pretrained(folder / "saved", dtype="float32")
