"""What several test files share: a tiny random model, with its tokenizer."""

import os

import pytest
import torch
from helpers import ROOT, tiny_config

from minillava.chat.tokenizer import load_tokenizer
from minillava.config import DecoderConfig
from minillava.llava import LLaVAModel
from minillava.synthetic.train_tokenizer import train_small_tokenizer

# Processes that tests start run the code of this checkout, wherever they are started.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: ASSISTANT: what color is the large circle? red green blue\n"
] * 2


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_small_tokenizer(TEXTS, folder, vocab_size=400)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer):
    """16-pixel pictures of 4 visual tokens, grouped-query attention; read only. Its weights are large enough that an
    answer depends on the whole prompt."""
    decoder = DecoderConfig(tiny_tokenizer.vocab_size, 32, 48, 3, 4, 2, 8, max_positions=200)
    model = LLaVAModel(tiny_config(tiny_tokenizer, decoder)).eval()
    model.init_weights(seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.mul_(15 if name == "decoder.embed.weight" else 8)
    return model


@pytest.fixture
def prompt(tiny_model):
    """Ids with one picture among them, and its pixels."""
    ids = [1, *[tiny_model.config.chat.image_token_id] * 4, *range(20, 60)]
    generator = torch.Generator().manual_seed(3)
    return torch.tensor(ids), torch.randn(1, 3, 16, 16, generator=generator)
