"""Geometry without pixels: how many visual tokens an image of W x H becomes. THE count.

The data pipeline, the prompt, the memory planner and the model all ask `image_tokens`; nothing else counts patches.
LLaVA v1 (arXiv 2304.08485) and LLaVA-1.5 (arXiv 2310.03744) show the tower one square view of every image.
"""

from __future__ import annotations

from minillava.config import ModelConfig, UserError, VisionConfig


def view_tokens(vision: VisionConfig) -> int:
    """Tokens of one square view: its patches, and the class token where it is handed to the projector."""
    return vision.num_patches + int(vision.keep_class_token and vision.class_token)


def num_views(config: ModelConfig, width: int, height: int) -> int:
    """Square views of the tower's size that an image of width x height pixels is shown as: one."""
    return 1


def image_tokens(config: ModelConfig, width: int, height: int) -> int:
    """Visual tokens that an image of width x height pixels takes up in the prompt.

    Raises UserError if the image has no area or the prepared pixels would not be what the tower sees.
    """
    if width < 1 or height < 1:
        raise UserError(f"an image of {width} x {height} pixels has no area; leave it out")
    if config.image.size != config.vision.image_size:
        raise UserError(
            f"config: images are prepared at {config.image.size} pixels a side but the vision tower sees "
            f"{config.vision.image_size}; make image.size and vision.image_size equal"
        )
    return num_views(config, width, height) * view_tokens(config.vision)
