"""Clips: the frames that were asked for, from files, bytes and folders; what is no video is one line."""

import dataclasses
import io
import struct
import sys
import wave
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from minillava.config import DecoderConfig, LayoutConfig, ModelConfig
from minillava.errors import UserError
from minillava.media.image import prepare_clip
from minillava.media.video import _frames, choose, open_clip

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


MADE = [  # container, codec: AVI and raw streams have no times, program streams one for several frames
    ("mp4", "libx264"), ("mp4", "libx265"), ("mov", "mjpeg"), ("matroska", "libx264"), ("webm", "libvpx-vp9"),
    ("mpegts", "mpeg2video"), ("mpegts", "libx264"), ("flv", "libx264"), ("nut", "mpeg4"), ("mxf", "mpeg2video"),
    ("avi", "mpeg4"), ("avi", "libx264"), ("mpeg", "mpeg2video"), ("mpeg", "mpeg1video"), ("vob", "mpeg2video"),
    ("dvd", "mpeg2video"), ("asf", "libx264"), ("asf", "wmv2"), ("h264", "libx264"), ("hevc", "libx265"),
    ("m4v", "mpeg4"), ("mpeg2video", "mpeg2video"), ("gif", "gif"), ("ivf", "libvpx"),
]  # fmt: skip


@pytest.mark.parametrize(("container", "codec"), MADE)
def test_frames_are_the_ones_asked_for_in_every_container(tmp_path, container, codec):
    """B-frames, key frames every 10: the very pictures of decoding from the start, and their times."""
    path, rate = tmp_path / "clip", 24 if codec.startswith(container[:4]) else 25  # raw streams say their own
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {"bf": "2"}
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, options=options if codec.startswith(("libx", "mpeg")) else {})
        stream.width, stream.height, stream.gop_size = 128, 96, 10
        stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p")
        for i in range(FRAMES):
            pixels_HWC = np.zeros((96, 128, 3), dtype=np.uint8)
            pixels_HWC[:, 2 * i : 2 * i + 8] = 255
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")))
        file.mux(stream.encode())
    for count in (1, 2, 5, 13, 60):
        found = open_clip(path, config(count))
        wanted = np.linspace(0, FRAMES - 1, count).astype(int).tolist()
        assert list(found.numbers) == numbers(found, path) == wanted
        assert np.allclose(found.times_s, np.array(wanted) / rate, atol=0.02)
        assert found.length_s == pytest.approx(FRAMES / rate, abs=0.05)


SHOWN = {  # a display matrix: what is top left, top right, bottom left of a picture that is red, green / blue, white
    (1, 0, 0, 1): "red green blue", (-1, 0, 0, 1): "green red white", (1, 0, 0, -1): "blue white red",
    (-1, 0, 0, -1): "white blue green", (0, 1, 1, 0): "red blue green", (0, 1, -1, 0): "blue red white",
    (0, -1, 1, 0): "green white red", (0, -1, -1, 0): "white green blue",
}  # fmt: skip


@pytest.mark.parametrize("matrix", SHOWN)
def test_a_display_matrix_turns_and_mirrors(tmp_path, matrix):
    a, b, c, d = matrix
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        pixels_HWC = np.full((32, 64, 3), 255, dtype=np.uint8)
        pixels_HWC[:16, :32], pixels_HWC[:16, 32:], pixels_HWC[16:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")))
        file.mux(stream.encode())
    data = bytearray(path.read_bytes())
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = data.index(plain, data.index(b"tkhd"))  # ISO 14496-12, 8.3.2
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    (frame, *_) = open_clip(bytes(data), config(1)).frames
    assert frame.size == ((64, 32) if a else (32, 64))
    names = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}
    w, h = frame.size
    shown = [frame.getpixel(place) for place in ((w // 4, h // 4), (3 * w // 4, h // 4), (w // 4, 3 * h // 4))]
    assert " ".join(names[tuple(int(level > 127) for level in pixel)] for pixel in shown) == SHOWN[matrix]


def test_frames_a_second(clip):
    assert numbers(open_clip(clip, config(32, fps=2)), clip) == list(range(0, FRAMES, 6))
    assert numbers(open_clip(clip, config(3, fps=2)), clip) == [0, 29, 59]  # too many: spread evenly
    assert choose(100, 30.0, config(8, fps=60)) == np.linspace(0, 99, 8).astype(int).tolist()


@pytest.mark.parametrize("container", ["matroska", "mp4"])
def test_frames_that_come_unevenly_are_so_many_a_second_on_average(tmp_path, container):
    """Of 10 frames in 6 seconds Matroska states that they are 10 a second."""
    path, milliseconds = tmp_path / "clip", [0, 100, 200, 1000, 3000, 3100, 3200, 3300, 5900, 6000]
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, at in enumerate(milliseconds):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    found = open_clip(path, config(32, fps=0.5))
    assert found.rate == pytest.approx(1.5, abs=0.2) and found.numbers == (0, 3, 6, 9)
    assert found.times_s == pytest.approx((0, 1, 3.2, 6), abs=0.01)


def test_a_colon_in_a_name_is_no_protocol(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "https:a"):
        (tmp_path / name).write_bytes(clip.read_bytes())
        assert len(open_clip(name, config(2)).frames) == 2


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


def test_only_known_containers_and_no_other_file(clip, tmp_path, monkeypatch):
    """What a file names is not opened: playlists of this very clip, by path and as bytes; a path like a protocol."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "concat:a.mp4").write_bytes(b"no video")
    (tmp_path / "subfile,,start,0,end,0,,:a.mp4").write_bytes(b"no video")
    lists = {
        "list.ffconcat": "ffconcat version 1.0\nfile a.mp4\n",
        "list.mp4": "ffconcat version 1.0\nfile a.mp4\n",
        "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\na.mp4\n#EXT-X-ENDLIST\n",
        "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" profiles="x">'
        '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>a.mp4</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>",
        "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 0 RTP/AVP 96\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    assert len(open_clip("a.mp4", config()).frames) == 32
    with av.open("list.ffconcat") as container:  # which FFmpeg itself does
        assert container.streams.video[0].width == 64
    for name in [*lists, "concat:a.mp4", "subfile,,start,0,end,0,,:a.mp4"]:
        sources = [name, (tmp_path / name).read_bytes()] if name in lists else [name]
        for source in sources:
            with pytest.raises(UserError, match=r"not a kind of video that is opened here|cannot be decoded"):
                open_clip(source, config())


@pytest.mark.parametrize(
    ("ending", "codec"),
    [("mov", "mpeg4"), ("mkv", "mpeg4"), ("webm", "libvpx"), ("avi", "mpeg4"), ("ts", "mpeg2video"), ("flv", "flv"),
     ("mpg", "mpeg2video"), ("wmv", "wmv2"), ("3gp", "mpeg4"), ("nut", "mpeg4"), ("ogg", "libvpx"), ("gif", "gif")],
)  # fmt: skip
def test_the_known_containers_open(tmp_path, ending, codec):
    path = tmp_path / f"a.{ending}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb8" if codec == "gif" else "yuv420p"
        for grey in range(0, 250, 10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey, np.uint8), "rgb24")))
        container.mux(stream.encode())
    for source in (path, path.read_bytes()):
        assert len(open_clip(source, config()).frames) >= 20


def test_without_pyav(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="pip install av"):
        open_clip(clip, config())


def test_a_bound_that_the_context_sets(clip):
    short = dataclasses.replace(config(60), decoder=DecoderConfig(max_positions=1024 + 22 * 144))
    assert len(open_clip(clip, short).frames) == 22
