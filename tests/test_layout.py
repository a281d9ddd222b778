"""The visual-token count, against the published counts (reference: one square view an image)."""

import dataclasses

import pytest

from minillava.config import ImageConfig, ModelConfig, UserError, VisionConfig
from minillava.layout import image_tokens

SIZES = [(336, 336), (1000, 500), (640, 480), (1, 9000)]


@pytest.mark.parametrize("width,height", SIZES)
def test_published_counts(width, height):
    assert image_tokens(ModelConfig(), width, height) == 576  # LLaVA-1.5
    v1 = ModelConfig(vision=VisionConfig(image_size=224), image=ImageConfig(size=224, fit="crop"))
    assert image_tokens(v1, width, height) == 256  # LLaVA v1 at 224
    kept = dataclasses.replace(v1, vision=VisionConfig(image_size=224, keep_class_token=True))
    assert image_tokens(kept, width, height) == 257
    siglip = VisionConfig(image_size=384, keep_class_token=True, class_token=False)
    assert image_tokens(ModelConfig(vision=siglip, image=ImageConfig(size=384)), width, height) == 27 * 27


def test_what_cannot_be_counted_is_an_error():
    with pytest.raises(UserError, match="0 x 5 pixels has no area"):
        image_tokens(ModelConfig(), 0, 5)
    with pytest.raises(UserError, match=r"224 pixels a side but the vision tower sees 336"):
        image_tokens(ModelConfig(image=ImageConfig(size=224)), 10, 10)
