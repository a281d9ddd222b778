"""The other samples of the built-in world: what they say is true, and what is written reads back."""

import numpy as np
import pytest
from PIL import Image

from minillava.config import ChatConfig, ImageConfig, LayoutConfig, ModelConfig, VisionConfig
from minillava.data.dataset import encode_sample
from minillava.data.llava_json import MARKER, VIDEO_MARKER
from minillava.data.table import scan
from minillava.processor import Processor
from minillava.synthetic import shapes
from minillava.synthetic.samples import KINDS, Samples, write


def test_kinds_hold_what_they_say():
    samples = Samples(500, seed=1)
    for index, sample in enumerate(samples):
        kind = KINDS[index % len(KINDS)]
        text = " ".join(m.text for m in sample.messages)
        assert sample.source == kind and samples[index] == sample
        assert text.count(MARKER) == len(sample.images) and text.count(VIDEO_MARKER) == len(sample.videos)
        counts = {"text": (0, 0), "several": (len(sample.images), 0), "video": (0, 1)}.get(kind, (1, 0))
        assert (len(sample.images), len(sample.videos)) == counts
        assert kind != "several" or 2 <= len(sample.images) <= 4
        assert [m.role for m in sample.messages] == ["user", "assistant"] * (len(sample.messages) // 2)
        assert not any(f"{color} {shape}" in text for color, shape in shapes.HELD_OUT)
    assert Samples(5, seed=2)[1] != samples[1]


def test_answers_are_about_the_right_picture_and_the_clip_moves_as_told():
    samples = Samples(200, seed=3, kinds=("several", "video"))
    for index in range(0, 200, 2):
        scenes, messages = samples.scenes(index), samples[index].messages
        for asked, answered in zip(messages[::2], messages[1::2]):
            if "In picture " in asked.text:
                number, text = asked.text.split("In picture ")[1].split(": ", 1)
                if text == "How many things are there?":
                    assert answered.text == str(len(scenes[int(number) - 1].things))
    for index in range(1, 200, 2):
        cells = [scene.things[0].cell for scene in samples.scenes(index)]
        across, down = (cells[-1] % 3) - (cells[0] % 3), cells[-1] // 3 - cells[0] // 3
        told = samples[index].messages[1].text
        assert {(2, 0): "right", (-2, 0): "left", (0, 2): "down", (0, -2): "up"}[across, down] == told
        assert samples[index].messages[3].text == shapes.at(cells[-1])
        frames = samples.get(f"{index}-0")
        assert 3 <= len(frames) <= 9 and not np.array_equal(frames[0], frames[-1])


def test_what_is_written_is_the_same_samples(tmp_path):
    for kind, path in write(tmp_path, 4, seed=5).items():
        made = Samples(4, 5, (kind,))
        for read, sample in zip(scan(path, tmp_path / "media")[0], made, strict=True):
            assert read.messages == sample.messages and read.id == sample.id
            for ours, theirs in zip(read.images, sample.images, strict=True):
                assert np.array_equal(ours.image(), theirs.image())
            for ours, theirs in zip(read.videos, sample.videos, strict=True):
                frames = sorted((tmp_path / "media" / ours.name).iterdir())
                assert all(np.array_equal(Image.open(a), b) for a, b in zip(frames, theirs.read()))


@pytest.mark.parametrize("merge", ["flat", "unpad"])
def test_all_are_encoded(tiny_tokenizer, merge):
    layout = LayoutConfig(grids=((1, 2), (2, 1), (1, 3)), merge=merge) if merge == "unpad" else LayoutConfig()
    config = ModelConfig(
        vision=VisionConfig(16, 32, 2, 2, 16, 4),
        image=ImageConfig(16),
        layout=layout,
        chat=ChatConfig(image_token_id=tiny_tokenizer.token_id("<image>"), bos_id=tiny_tokenizer.bos_id),
    )
    tokens = set()
    for sample in Samples(50, seed=0):
        example = encode_sample(sample, Processor(config, tiny_tokenizer), 4000)
        assert sum(span.tokens for span in example.spans) == example.ids.count(config.chat.image_token_id)
        tokens |= {span.tokens for span in example.spans if not span.clip}
    assert (len(tokens) > 1) == (merge == "unpad")  # pictures of three shapes
