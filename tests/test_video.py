"""Clips: the frames that were asked for, from files, bytes and folders; what is no video is one line."""

import dataclasses
import io
import sys
import wave

import numpy as np
import pytest
from PIL import Image

from minillava.config import DecoderConfig, LayoutConfig, ModelConfig, UserError
from minillava.image import prepare_clip
from minillava.video import _frames, choose, open_clip

av = pytest.importorskip("av")

FRAMES, RATE = 60, 12


def config(frames=32, fps=0.0, **layout):
    layout = LayoutConfig(max_frames=frames, video_fps=fps, **layout)
    return ModelConfig(decoder=DecoderConfig(max_positions=1 << 20), layout=layout)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Five seconds of a bar that moves by one pixel a frame; key frames every 10, with B-frames between."""
    path = tmp_path_factory.mktemp("video") / "grey.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE, options={"bf": "2"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 10
        for i in range(FRAMES):
            pixels_HWC = np.zeros((48, 64, 3), dtype=np.uint8)
            pixels_HWC[:, i : i + 4] = 255
            frame = av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(found, path):
    """Which frames of the file these are: compared with all of them, decoded one after the other."""
    with av.open(str(path)) as container:
        frames = [frame.to_image().tobytes() for frame in container.decode(video=0)]
    assert len(set(frames)) == FRAMES
    return [frames.index(frame.tobytes()) for frame in found.frames]


def greys(found):
    return [frame.getpixel((0, 0))[0] for frame in found.frames]


@pytest.mark.parametrize("count", [1, 2, 5, 32, 60, 100])
def test_frames_are_spread_evenly(clip, count):
    expected = np.linspace(0, FRAMES - 1, min(count, FRAMES)).astype(int).tolist()
    for source in (clip, str(clip), clip.read_bytes()):
        found = open_clip(source, config(count))
        assert numbers(found, clip) == expected
        assert found.times_s == pytest.approx([i / RATE for i in expected]) and found.length_s == pytest.approx(5)
        assert found.frames[0].size == (64, 48)


def test_frames_a_second(clip):
    assert numbers(open_clip(clip, config(32, fps=2)), clip) == list(range(0, FRAMES, 6))
    assert numbers(open_clip(clip, config(3, fps=2)), clip) == [0, 29, 59]  # too many: spread evenly
    assert choose(100, 30.0, config(8, fps=60)) == np.linspace(0, 99, 8).astype(int).tolist()


def test_only_needed_frames_are_decoded(clip):
    """From the key frame before each to it: not the sixty that there are."""
    decoded = []

    class Counted:
        def __init__(self, container):
            self.seek, self.container = container.seek, container

        def decode(self, stream):
            for frame in self.container.decode(stream):
                decoded.append(frame.pts)
                yield frame

    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        packets = [(p.pts, p.dts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None]
        shown, keys = sorted(p[0] for p in packets), {pts: dts for pts, dts, key in packets if key}
        assert len(keys) > 4
        found = _frames(Counted(container), stream, [shown[3], shown[41]], keys)
    assert len(found) == 2 and len(decoded) < 20


def test_a_folder_and_a_list_of_frames(tmp_path):
    for i in range(12):
        Image.new("RGB", (20, 10), (i,) * 3).save(tmp_path / f"frame{i}.png")  # frame10 comes after frame9
    (tmp_path / "notes.txt").write_text("no frame")
    assert greys(open_clip(tmp_path, config())) == list(range(12))
    found = open_clip(tmp_path, config(3))
    assert greys(found) == [0, 5, 11] and found.times_s == (0, 5, 11) and found.length_s == 12
    pictures = [Image.open(tmp_path / f"frame{i}.png") for i in (7, 2)]
    assert greys(open_clip(pictures, config())) == [7, 2]


def test_what_is_told_of_the_times(clip):
    expected = (
        "The video lasts for 5.00 seconds, and 3 frames are uniformly sampled from it. These frames are located at "
        "0.00s,2.42s,4.92s.Please answer the following questions related to this video."
    )
    assert open_clip(clip, config(3)).instruction() == expected


def test_frames_are_fitted_as_the_layout_says(clip):
    found = open_clip(clip, config(2))
    for fit, lit in (("crop", True), ("pad", False)):
        pixels_NCHW, span = prepare_clip(found.frames, config(video_fit=fit))
        assert pixels_NCHW.shape == (2, 3, 336, 336) and span.clip and span.views == 2
        assert (pixels_NCHW[1, 0, 0, 0] == pixels_NCHW[1, 0, 168, 168]).item() == lit  # the corner is padding


def broken(clip, tmp_path):
    data = clip.read_bytes()
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))
    (tmp_path / "empty").mkdir()
    yield "no.mp4", None, "no such video file or folder of frames"
    yield "empty.mp4", b"", "empty"
    yield "text.mp4", b"this is no video" * 99, "cannot be decoded"
    yield "head.mp4", data[: len(data) // 3], "cannot be decoded|broken|without frames"
    yield "sound.mp4", sound.getvalue(), "only sound or text"
    yield "empty", None, "no frames in it"


def test_what_is_no_video_is_one_line(clip, tmp_path):
    for name, data, message in broken(clip, tmp_path):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message) as caught:
            open_clip(tmp_path / name, config())
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_without_pyav(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="pip install av"):
        open_clip(clip, config())


def test_a_bound_that_the_context_sets(clip):
    short = dataclasses.replace(config(60), decoder=DecoderConfig(max_positions=1024 + 10 * 144))
    assert len(open_clip(clip, short).frames) == 10
