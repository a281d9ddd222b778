"""Video: a file (through PyAV, the extra `video`), or a folder of frames, as a few pictures and their times.

Which frames: as the samplers of LLaVA-NeXT's demos, evenly from the first to the last (truncated positions), or so
many a second. The packets of the stream say how many frames there are and when, so that only those between a key frame
and a wanted one are decoded, and only the wanted ones become pictures.
"""

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minillava.config import ModelConfig
from minillava.errors import UserError
from minillava.media.image import MAX_PIXELS, open_image, reason
from minillava.visual_tokens import frame_limit

# FFmpeg has 300 demuxers, and playlists among them (HLS, DASH, concat, SDP) open other files and hosts.
CONTAINERS = (
    "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif,apng,ivf,nut,mxf,dv,rm,h264,hevc,obu,m4v,mpegvideo,mjpeg,wav,mp3"
)
ONLY = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
# Containers whose packets have the times of their frames, and that find the packet at a time.
SEARCHED = {"mov", "mp4", "matroska", "webm", "mpegts", "flv", "ivf", "nut", "mxf", "gif"}
RAW = {"h264", "hevc", "m4v", "mpegvideo", "obu"}  # no container at all
# Signs of a, b, c, d of a display matrix, by which (x, y) is shown at (a x + c y, b x + d y), y downwards.
TURNED = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT, (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180, (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90, (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}  # fmt: skip
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

VideoSource = str | Path | bytes | Sequence[str | Path | bytes | Image.Image]


@dataclass(frozen=True)
class Clip:
    """The frames of a video that are looked at."""

    frames: tuple[Image.Image, ...]  # RGB
    times_s: tuple[float, ...]  # of each, from the start
    length_s: float
    numbers: tuple[int, ...] = ()  # of each, in its source
    rate: float = 1.0  # frames of the source a second
    places_FP3: Tensor | None = None  # canvases (`minillava.media.canvases`): frame, row and column of their patches
    decimals: int | None = None  # of the seconds that a prompt is to show; None: as the model has it
    filmed: bool = False  # decoded from a video file, not given as pictures

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
        size = open_image(source[0], name).size if config.image.fit == "native" else (0, 0)
        wanted = choose(len(source), 0.0, config, *size)
        frames = [open_image(source[i], str(source[i]) if isinstance(source[i], str | Path) else name) for i in wanted]
        return Clip(tuple(frames), tuple(float(i) for i in wanted), float(len(source)), tuple(wanted))
    return _decode(source, config, name)  # type: ignore[arg-type]  # the lists are gone


def choose(count: int, rate: float, config: ModelConfig, width: int = 0, height: int = 0) -> list[int]:
    """Which of `count` frames, shown `rate` a second, to look at: every n-th one, n = rate / layout.video_fps rounded.

    Without video_fps, and where these are more than `frame_limit`, that many from the first to the last. OneVision-2
    rounds their places and takes fewer of short videos; of a list of frames (rate 0) it takes all.
    """
    limit, fps, layout = frame_limit(config, width, height), config.layout.video_fps, config.layout
    if layout.video_sampling == "rounded":
        return _choose_rounded(count, rate, limit, config)
    rate = rate or 1.0
    if fps:
        wanted = range(0, count, max(1, round(rate / fps)))
        if len(wanted) <= limit:
            return list(wanted)
    return np.linspace(0, count - 1, min(limit, count)).astype(int).tolist()


def _choose_rounded(count: int, rate: float, limit: int, config: ModelConfig) -> list[int]:
    layout, length_s = config.layout, count / rate if rate else 0.0
    if not rate:
        number = count
    elif layout.video_fps:
        number = max(1, int(length_s * layout.video_fps))
    else:
        number = layout.num_frames or (8 if length_s < 10 else 16 if length_s < 30 else limit)
        if limit < min(layout.num_frames, count):
            raise UserError(f"{layout.num_frames} frames do not fit the context; take {limit} or fewer")
    return torch.linspace(0, count - 1, min(number, limit, count)).round().int().tolist()


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

    def opened() -> Any:
        # The whole path, as FFmpeg takes what is in front of a colon for a protocol.
        return av.open(io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(source), "r", options=ONLY)

    try:
        with opened() as container:
            stream = _stream(container, name)
            found = _searched(container, stream, config, name)
        return found or _played(opened, config, name)
    except av.error.ArgumentError:  # what FFmpeg says of a format that is not on the list
        raise UserError(f"{name}: not a kind of video that is opened here; convert it to MP4, MKV or WebM") from None
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{name}: a video that cannot be decoded ({reason(error)}); convert it") from None


def _stream(container: Any, name: str) -> Any:
    if not container.streams.video:
        raise UserError(f"{name}: no pictures in it, only sound or text; give a video")
    stream = container.streams.video[0]
    if stream.width * stream.height > MAX_PIXELS:
        raise UserError(f"{name}: frames of more than {MAX_PIXELS:,} pixels; scale the video down first")
    stream.thread_type = "AUTO"
    return stream


def _clip(frames: list[Image.Image], wanted: list[int], times_s: Sequence[float], rate: float) -> Clip:
    times = tuple(times_s[i] for i in wanted)
    return Clip(tuple(frames), times, times_s[-1] + 1 / rate, tuple(wanted), rate, filmed=True)


def _rate(stated: Any, times_s: Sequence[float]) -> float:
    """Frames a second: what the file states, unless its frames are off that by one or more, as where they come unevenly
    (Matroska then states their usual distance): on average."""
    between, length_s = len(times_s) - 1, times_s[-1]
    if stated and (not length_s or abs(between - length_s * stated) < 1):
        return float(stated)
    return between / (length_s or 1.0) or 1.0


def _searched(container: Any, stream: Any, config: ModelConfig, name: str) -> Clip | None:
    """The clip by the times of the packets, decoding little; None for a file whose packets do not say all of them.

    Some containers give packets decoding times alone (AVI), one time for several (MPEG program streams) or none (raw
    streams), and some place the frames behind a jump a little elsewhere.
    """
    packets = [(p.pts, p.dts, p.is_keyframe) for p in container.demux(stream) if p.size]
    known = set(container.format.name.split(",")) & SEARCHED
    if not known or not packets or any(pts is None for pts, _, _ in packets):
        return None
    shown = sorted(pts for pts, _, _ in packets)
    keys = {pts: pts if dts is None else dts for pts, dts, key in packets if key}
    base = float(stream.time_base or 1)
    times_s = [(pts - shown[0]) * base for pts in shown]
    rate = _rate(stream.average_rate, times_s)
    wanted = choose(len(shown), rate, config, stream.width, stream.height)
    frames = _frames(container, stream, [shown[i] for i in wanted], keys)
    if frames is None:
        return None
    if len(frames) < len(wanted):
        raise UserError(f"{name}: broken after {len(frames)} of {len(wanted)} frames; fetch it again, or convert it")
    return _clip(frames, wanted, times_s, rate)


def _played(opened: Callable[[], Any], config: ModelConfig, name: str) -> Clip:
    """The clip of a file that is decoded from its start to its end: once to count its frames, once to take some."""
    with opened() as container:
        stream = _stream(container, name)
        pts = [frame.pts for frame in container.decode(stream)]
        if not pts:
            raise UserError(f"{name}: a video without frames; fetch it again, or leave it out")
        base, wide, high = float(stream.time_base or 1), stream.width, stream.height
        rates = [stream.average_rate, stream.codec_context.framerate]  # FFmpeg takes 25 a second for a raw stream's
        stated = next(filter(None, reversed(rates) if container.format.name in RAW else rates), None)
    if None not in pts and pts == sorted(set(pts)):
        times_s = [(at - pts[0]) * base for at in pts]
        rate = _rate(stated, times_s)
    else:  # some decoders give decoding times
        rate = float(stated or 1.0)
        times_s = [number / rate for number in range(len(pts))]
    wanted = choose(len(pts), rate, config, wide, high)
    with opened() as container:
        played = enumerate(container.decode(_stream(container, name)))
        chosen, until = frozenset(wanted), wanted[-1] + 1
        frames = [_upright(frame) for number, frame in islice(played, until) if number in chosen]
    return _clip(frames, wanted, times_s, rate)


def _frames(container: Any, stream: Any, wanted: list[int], keys: dict[int, int]) -> list[Image.Image] | None:
    """The frames at these presentation times (ascending, in the stream's units), as RGB; fewer where it breaks off, and
    None where one of them has another time than its packet.

    Jumps to a key frame where one lies between what was decoded last and what is wanted next. `keys` has their decoding
    times too: files are searched by these, and behind B-frames a key frame is decoded before its time.
    """
    decoded: Iterator[Any] = iter(())
    frames: list[Image.Image] = []
    at = min(wanted[0], *keys, 0) - 1
    for pts in wanted:
        key = max((key for key in keys if at < key <= pts), default=None)
        if key is not None or not frames:
            container.seek(min(keys.values(), default=0) if key is None else keys[key], stream=stream)
            decoded = container.decode(stream)
        for frame in decoded:
            if frame.pts is None or frame.pts > pts:
                return None
            if frame.pts == pts:
                frames.append(_upright(frame))
                at = pts
                break
        else:
            break
    return frames


def _upright(frame: Any) -> Image.Image:
    """A frame as RGB, turned and mirrored as the file says: a matrix of 3 x 3, its first two columns and rows used."""
    if frame.width * frame.height > MAX_PIXELS:  # otherwise than the stream said
        raise ValueError(f"a frame of more than {MAX_PIXELS:,} pixels")
    picture = frame.to_image()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    a, b, _, c, d = np.sign(np.frombuffer(bytes(matrix), np.int32)[:5]).tolist()
    way = TURNED.get((a, b, c, d))
    if way is not None:
        return picture.transpose(way)
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
