"""Every vision tower inside a LLaVA, at tiny size: transformers builds and saves it, we load it, and back.

The logits are within twice the error of transformers' float32 against float64. Letters: T tokens, V vocabulary.
"""

import copy

import pytest
import torch
from helpers import load_model

from minillava.checkpoints.families import TOWERS
from minillava.checkpoints.save import save_model

transformers = pytest.importorskip("transformers")

TINY = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
)
FAMILY = {  # model_type -> transformers' class of its config, and what is not as above
    "clip_vision_model": ("CLIPVisionConfig", {}),
    "siglip_vision_model": ("SiglipVisionConfig", {"vision_use_head": False}),
}
IMAGE = 90  # the placeholder's id


def llava_of(name, more, folder):
    """transformers' LLaVA around a tower, random and decisive, saved with an image processor."""
    text = dict(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    vision = getattr(transformers, name)(**TINY | more)
    config = transformers.LlavaConfig(
        vision_config=vision, image_token_index=IMAGE,
        text_config=transformers.LlamaConfig(**text, num_key_value_heads=2, bos_token_id=1, eos_token_id=2),
        vision_feature_select_strategy="default" if TOWERS[vision.model_type].decides["class_token"] else "full",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    sides = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    transformers.CLIPImageProcessor(**sides).save_pretrained(folder)
    return model


def test_every_tower_of_a_llava_is_here():
    assert set(FAMILY) == {name for name, family in TOWERS.items() if family.whole == "llava"}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILY)
def test_logits_and_back(family, tmp_path):
    theirs = llava_of(*FAMILY[family], tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", torch.float32)
    pixels_NCHW = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    ids_T = torch.tensor([1, *[IMAGE] * 4, 5, 6, 7])

    def logits(model, pixels):
        return model(input_ids=ids_T[None], pixel_values=pixels).logits[0].double()

    exact_TV = logits(copy.deepcopy(theirs).double(), pixels_NCHW.double())
    found_TV = ours(ids_T, images=pixels_NCHW).double()
    assert exact_TV.std() > 0.1
    assert (found_TV - exact_TV).norm() <= 2 * (logits(theirs, pixels_NCHW) - exact_TV).norm()

    save_model(ours, tmp_path / "ours")
    again, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert torch.equal(logits(again.eval(), pixels_NCHW), logits(theirs, pixels_NCHW))
