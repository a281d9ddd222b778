"""A tiny LLaVA of transformers' and a prompt with a picture, for layers in few bits."""

import json

import pytest
import torch
from helpers import PIXELS, TEXT, VISION


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A LLaVA of transformers' on disk, in float32."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = transformers.AutoConfig.for_model("qwen2", **TEXT, num_key_value_heads=2)
    vision = transformers.AutoConfig.for_model("clip_vision_model", **VISION)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=7)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for name, p in model.named_parameters():
        p.data.mul_(4 if p.ndim > 1 and "embed" not in name else 1)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return folder


@pytest.fixture(scope="session")
def exam():
    generator = torch.Generator().manual_seed(3)
    ids = torch.cat((torch.tensor([1] + [7] * 4), torch.randint(10, 320, (12,), generator=generator)))
    return ids, torch.randn(1, 3, 28, 28, generator=generator)
