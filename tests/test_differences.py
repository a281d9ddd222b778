"""docs/differences.md: what transformers and others do otherwise than LLaVA's own code and ours, each shown by running
both. Where a newer version agrees, its test fails and the row can go."""

import io
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minillava.chat.tokenizer import load_tokenizer
from minillava.config import ImageConfig, LayoutConfig, ModelConfig, VisionConfig
from minillava.media.image import open_image
from minillava.media.video import choose, open_clip
from minillava.visual_tokens import image_span

transformers = pytest.importorskip("transformers")
PAGE = (Path(__file__).parents[1] / "docs" / "differences.md").read_text()


def clear_green():
    """A PNG of one pixel, of which nothing is to be seen."""
    file = io.BytesIO()
    Image.new("RGBA", (1, 1), (0, 255, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_frames_of_a_video():
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    theirs = default_sample_indices_fn(VideoMetadata(total_num_frames=100, fps=10.0, duration=10.0), num_frames=8)
    ours = choose(100, 10.0, ModelConfig(layout=LayoutConfig(max_frames=8, video_fps=0.0)))
    assert list(theirs) == [0, 12, 25, 37, 50, 62, 75, 87] and str(list(map(int, theirs)))[1:-1] in PAGE
    assert ours == [0, 14, 28, 42, 56, 70, 84, 99] and str(ours)[1:-1] in PAGE


def test_times_of_uneven_frames(tmp_path):
    """One frame a second, then fifty in one: the time of the sixth."""
    av = pytest.importorskip("av")
    from transformers.video_utils import load_video

    with av.open(path := tmp_path / "clip.mp4", "w") as clip:
        stream = clip.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.codec_context.time_base = 64, 64, Fraction(1, 1000)
        for time in (*range(0, 5000, 1000), *range(5000, 6000, 20)):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            clip.mux(stream.encode(frame))
        clip.mux(stream.encode(None))
    theirs = load_video(str(path), backend="pyav")[1].timestamps
    ours = open_clip(path, ModelConfig(layout=LayoutConfig(max_frames=64, video_fps=0.0)))
    assert round(theirs[5], 2) == 0.55 and "at 0.55 s" in PAGE
    assert dict(zip(ours.numbers, ours.times_s))[5] == 5.0 and "the file's own: 5 s" in PAGE


def test_counts_of_tiled_pictures():
    """LLaVA-NeXT's list of grids, read as (width, height) by the original and as (height, width) by transformers."""
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    listed = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    grids = tuple((w // 336, h // 336) for w, h in listed)
    original, theirs = (
        ModelConfig(
            vision=VisionConfig(),
            image=ImageConfig(fit="squash"),
            layout=LayoutConfig(grids=some, merge="unpad", round_unpad=rounds),
        )
        for some, rounds in ((grids, False), (tuple(grid[::-1] for grid in grids), True))
    )
    generator, differ = np.random.default_rng(0), 0
    for width, height in generator.integers(50, 2000, (3000, 2)).tolist():
        span = image_span(theirs, width, height)
        rows, columns = get_anyres_image_grid_shape((height, width), listed, 336)
        assert span.views == 1 + rows * columns
        assert select_best_resolution((height, width), listed) == (rows * 336, columns * 336)
        differ += span.tokens != image_span(original, width, height).tokens
    assert f"{differ} of 3,000" in PAGE


def test_a_tokenizer_that_does_not_say_legacy(tmp_path):
    import sentencepiece

    file = io.BytesIO()
    words = iter(["USER: What is it? ASSISTANT: It is red. It is green."] * 20)
    options = dict(vocab_size=60, model_type="bpe", byte_fallback=False, minloglevel=2, hard_vocab_limit=False)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=words, model_writer=file, **options)
    (tmp_path / "tokenizer.model").write_bytes(file.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    theirs, ours = transformers.LlamaTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    text = "</s>USER: What"
    theirs, ours = theirs(text, add_special_tokens=False).input_ids, ours.encode(text, False)
    model = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    shown = [[model.id_to_piece(id) for id in ids] for ids in (theirs, ours)]
    assert shown == [["</s>", "US", "ER", ":", "▁What"], ["</s>", "▁USER", ":", "▁What"]]


def test_the_colour_of_clear_pixels():
    datasets = pytest.importorskip("datasets")
    white, green = (255, 255, 255), (0, 255, 0)
    data = clear_green()
    assert open_image(data, "a.png").getpixel((0, 0)) == white
    theirs = transformers.image_transforms.convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
    assert tuple(theirs[0, 0]) == white
    decoded = datasets.Image(mode="RGB").decode_example({"bytes": data, "path": None})
    assert decoded.getpixel((0, 0)) == green
    assert Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0)) == green  # as the original
