"""A picture or clip: `Media` is what a prompt is given, `Visual` what tower and prompt need of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minillava.config import ModelConfig
from minillava.media.canvases import is_canvases, open_canvases
from minillava.media.image import image_size, open_image, prepare_clip, prepare_views
from minillava.media.video import Clip, VideoSource, open_clip
from minillava.visual_tokens import Span, clip_span, image_span, time_runs, view_span

ImageSource = str | Path | bytes | Image.Image | Tensor  # a tensor holds prepared pixels_CHW


@dataclass
class Visual:
    """A picture or clip, opened. Rows of a batch may share one, which is then seen once."""

    pixels_NCHW: Tensor  # its views
    span: Span
    times: str = ""  # of a clip: what the prompt says of its length and frames, behind its marker
    tags: tuple[tuple[str, int], ...] = ()  # of a clip: "<1.5 seconds>", visual tokens behind it; and so on
    visual_TD: Tensor | None = None  # what tower and projector make of the pixels, once they have

    @property
    def counts(self) -> list[int]:
        """Visual tokens at each marker that the prompt has for it in the end."""
        return [count for _, count in self.tags] or [self.span.tokens]


@dataclass(frozen=True, slots=True)
class Media:
    """A picture, or with `video` a clip, that is opened when it is needed. An error calls it `name`, or by its path."""

    source: Any  # ImageSource or VideoSource
    video: bool = False
    name: str = ""

    def read(self) -> Any:
        """The picture, or the clip, or where it is."""
        return self.source

    def image(self, name: str = "") -> Image.Image:
        """The picture itself, RGB. Raises UserError that starts with `name`, or else its own."""
        return open_image(self.read(), name or self.name)

    def open(self, config: ModelConfig, several: bool = False) -> Visual:
        """Its pixels and span; `several`: there are other pictures in its prompt. Raises UserError that names it."""
        if self.video:
            clip = self._clip(config)
            packed = clip.numbers, clip.places_FP3, clip.filmed
            pixels_NCHW, span = prepare_clip(clip.frames, config, self.name or "the video", *packed)
            return self._described(clip, pixels_NCHW, span, config)
        source = self.read()
        if isinstance(source, Tensor):
            return Visual(source[None], view_span(config))
        return Visual(*prepare_views(open_image(source, self.name), config, several, self.name or "the image"))

    def measure(self, config: ModelConfig, several: bool = False) -> Visual:
        """As `open`, but without pixels: a picture is not decoded for it (a clip is)."""
        if self.video:
            clip = self._clip(config)
            span = clip_span(config, len(clip.frames), *clip.frames[0].size, clip.numbers, clip.places_FP3)
            return self._described(clip, torch.empty(0), span, config)
        source = self.read()
        size = source.size if isinstance(source, Image.Image) else image_size(source, self.name)
        return Visual(torch.empty(0), image_span(config, *size, several))

    def _clip(self, config: ModelConfig) -> Clip:
        source = self.read()
        if isinstance(source, str | Path) and is_canvases(Path(source)):
            return open_canvases(Path(source))
        return open_clip([source] if isinstance(source, Image.Image) else source, config, self.name)

    def _described(self, clip: Clip, pixels_NCHW: Tensor, span: Span, config: ModelConfig) -> Visual:
        """What the prompt says of its times, as the model was trained."""
        layout, tags = config.layout, tuple[tuple[str, int], ...]()
        if layout.time_tags:
            decimals = layout.time_decimals if clip.decimals is None else clip.decimals
            runs = time_runs(span, config.projector.merge)
            tags = tuple((f"<{number / clip.rate:.{decimals}f} seconds>", tokens) for number, tokens in runs)
        return Visual(pixels_NCHW, span, clip.instruction() if layout.time_instruction else "", tags)


def media(images: Sequence[ImageSource] = (), videos: Sequence[VideoSource] = ()) -> list[Media]:
    """Pictures, then clips."""
    return [Media(image) for image in images] + [Media(video, True) for video in videos]
