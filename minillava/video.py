"""Video: a file (through PyAV, the extra `video`), or a folder of frames, as a few pictures and their times.

Which frames: as the samplers of LLaVA-NeXT's demos, evenly from the first to the last (truncated positions), or so
many a second. The packets of the stream say how many frames there are and when, so that only those between a key frame
and a wanted one are decoded, and only the wanted ones become pictures.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minillava.config import ModelConfig, UserError
from minillava.image import MAX_PIXELS, open_image
from minillava.layout import frame_limit

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

VideoSource = str | Path | bytes | Sequence[str | Path | bytes | Image.Image]


@dataclass(frozen=True)
class Clip:
    """The frames of a video that are looked at."""

    frames: tuple[Image.Image, ...]  # RGB
    times_s: tuple[float, ...]  # of each, from the start
    length_s: float

    def instruction(self) -> str:
        """The sentence on times that LLaVA-Video was trained with (LLaVA-NeXT's video_demo.py)."""
        times = ",".join(f"{time:.2f}s" for time in self.times_s)
        return (
            f"The video lasts for {self.length_s:.2f} seconds, and {len(self.frames)} frames are uniformly sampled "
            f"from it. These frames are located at {times}.Please answer the following questions related to this video."
        )


def open_clip(source: VideoSource, config: ModelConfig, name: str = "") -> Clip:
    """The frames that a model looks at of a file, the bytes of one, a folder of frames, or a list of pictures.

    The frames of a folder come in the order of the numbers in their names; they, and those of a list, are taken to be
    one second apart. Raises UserError that starts with `name` (by default the path) for what is no video or is broken.
    """
    name = name or (str(source) if isinstance(source, str | Path) else "the video")
    if isinstance(source, str | Path) and Path(source).is_dir():
        source = _frame_files(Path(source))
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        if not source:
            raise UserError(f"{name}: no frames in it; give a video file, or a folder of JPEG or PNG files")
        wanted = choose(len(source), 1.0, config)
        frames = [open_image(source[i], str(source[i]) if isinstance(source[i], str | Path) else name) for i in wanted]
        return Clip(tuple(frames), tuple(float(i) for i in wanted), float(len(source)))
    return _decode(source, config, name)  # type: ignore[arg-type]  # the lists are gone


def choose(count: int, rate: float, config: ModelConfig) -> list[int]:
    """Which of `count` frames, shown `rate` a second, to look at: every n-th one, n = rate / layout.video_fps rounded.

    Without video_fps, and where these are more than `frame_limit`, that many from the first to the last.
    """
    limit, fps = frame_limit(config), config.layout.video_fps
    if fps:
        wanted = range(0, count, max(1, round(rate / fps)))
        if len(wanted) <= limit:
            return list(wanted)
    return np.linspace(0, count - 1, min(limit, count)).astype(int).tolist()


def _frame_files(folder: Path) -> list[Path]:
    """The pictures of a folder, 2.png before 10.png."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES]
    return sorted(files, key=lambda path: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", path.name)])


def _decode(source: str | Path | bytes, config: ModelConfig, name: str) -> Clip:
    try:
        import av
    except ImportError:
        raise UserError(f"{name}: videos need PyAV; pip install av, or give a folder of frames") from None

    if not isinstance(source, bytes):
        if not Path(source).is_file():
            raise UserError(f"{name}: no such video file or folder of frames; check the path")
        if not Path(source).stat().st_size:
            raise UserError(f"{name}: the video file is empty (0 bytes); fetch it again")
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), "r") as container:
            if not container.streams.video:
                raise UserError(f"{name}: no pictures in it, only sound or text; give a video")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise UserError(f"{name}: frames of more than {MAX_PIXELS:,} pixels; scale the video down first")
            packets = [(p.pts, p.dts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None]
            if not packets:
                raise UserError(f"{name}: a video without frames; fetch it again, or leave it out")
            shown = sorted(pts for pts, _, _ in packets)
            keys = {pts: pts if dts is None else dts for pts, dts, key in packets if key}
            base = float(stream.time_base or 1)
            times_s = [(pts - shown[0]) * base for pts in shown]
            rate = float(stream.average_rate or 0) or (len(shown) - 1) / (times_s[-1] or 1.0) or 1.0
            wanted = choose(len(shown), rate, config)
            frames = _frames(container, stream, [shown[i] for i in wanted], keys)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{name}: a video that cannot be decoded ({' '.join(reason.split())}); convert it") from None
    if len(frames) < len(wanted):
        raise UserError(f"{name}: broken after {len(frames)} of {len(wanted)} frames; fetch it again, or convert it")
    return Clip(tuple(frames), tuple(times_s[i] for i in wanted), times_s[-1] + 1 / rate)


def _frames(container: Any, stream: Any, wanted: list[int], keys: dict[int, int]) -> list[Image.Image]:
    """The frames at these presentation times (ascending, in the stream's units), as RGB; fewer where it breaks off.

    Jumps to a key frame where one lies between what was decoded last and what is wanted next. `keys` has their decoding
    times too: files are searched by these, and behind B-frames a key frame is decoded before its time.
    """
    stream.thread_type = "AUTO"
    decoded: Iterator[Any] = iter(())
    frames: list[Image.Image] = []
    at = min(wanted[0], *keys, 0) - 1
    for pts in wanted:
        key = max((key for key in keys if at < key <= pts), default=None)
        if key is not None or not frames:
            container.seek(min(keys.values(), default=0) if key is None else keys[key], stream=stream)
            decoded = container.decode(stream)
        for frame in decoded:
            if frame.pts is not None and frame.pts >= pts:
                picture = frame.to_image()
                frames.append(picture.rotate(frame.rotation, expand=True) if frame.rotation else picture)
                at = frame.pts
                break
        else:
            break
    return frames
