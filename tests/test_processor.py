"""One function for asking and training: the same ids, pictures and clips in prompt order, opened once, cut whole."""

import dataclasses
import random

import pytest
import torch
from helpers import tiny_config
from PIL import Image

from minillava.chat.messages import Message
from minillava.config import IGNORE, DecoderConfig, LayoutConfig
from minillava.errors import UserError
from minillava.media.visual import Media, media
from minillava.processor import MediaError, Processor, user_message


def picture(shade, size=(16, 16)):
    return Image.new("RGB", size, (shade, shade, shade))


@pytest.fixture(params=["one marker", "two markers"])
def processor(request, tiny_tokenizer):
    """Frames of 4 tokens are pooled to one; a clip has a marker of its own, or that of pictures."""
    config = tiny_config(tiny_tokenizer, DecoderConfig())
    if request.param == "two markers":
        chat = dataclasses.replace(config.chat, video_token="<video>", video_token_id=-201)
        config = dataclasses.replace(config, chat=chat)
    return Processor(config, tiny_tokenizer)


def shades(example):
    """The first grey level of each picture or clip, in the order of the pixels."""
    mean, std = 0.48145466, 0.26862954
    return [round(float(v.pixels_NCHW[0, 0, 0, 0] * std + mean) * 255) for v in example.visuals]


def marked(processor, text):
    return text if processor.config.chat.video_token else text.replace("<video>", "<image>")


def test_a_prompt_is_the_beginning_of_the_sample_that_it_asks_for(processor):
    """Ids, pictures and clips of every prompt in a conversation; the sample has loss on its answers."""
    rng = random.Random(0)
    for _ in range(20):
        messages, given = [], []
        for turn in range(rng.randint(1, 3)):
            seen = [Media(picture(rng.randrange(256)), video=rng.random() < 0.5) for _ in range(rng.randrange(3))]
            given += seen
            messages += [
                user_message(processor.config.chat, f"what {turn}?", seen),
                Message("assistant", f"red {turn}"),
            ]
        sample = processor(messages, given)
        assert [label for label in sample.labels if label != IGNORE]
        assert all(label in (IGNORE, id) for id, label in zip(sample.ids, sample.labels, strict=True))
        for turn in range(1, len(messages), 2):
            markers = processor.config.chat.markers
            count = sum(m.text.count(marker) for m in messages[:turn] for marker in markers)
            prompt = processor(messages[:turn], given[:count], generate=True)
            assert sample.ids[: len(prompt.ids)] == prompt.ids
            assert sample.labels[len(prompt.ids)] == sample.ids[len(prompt.ids)]  # where the answer begins
            alone = [visual.span.clip for visual in prompt.visuals]
            assert [visual.span.clip for visual in sample.visuals[: len(alone)]] == alone
            assert shades(sample)[: len(alone)] == shades(prompt)


def test_pictures_and_clips_stand_in_prompt_order(processor):
    """Where these have different markers, each takes the next of its kind, in whatever order they are given."""
    text = marked(processor, "<video> <image> and <image> or <video>?")
    clips, pictures = [Media([picture(10)] * 2, True), Media([picture(40)], True)], media([picture(20), picture(30)])
    ordered = [clips[0], *pictures, clips[1]]
    given = [ordered, [*pictures, *clips]] if processor.config.chat.video_token else [ordered]
    for some in given:
        for example in (processor([Message("user", text)], some, generate=True), processor(text, some)):
            assert shades(example) == [10, 20, 30, 40]
            assert [visual.span.clip for visual in example.visuals] == [True, False, False, True]
            chat, at = processor.config.chat, 0
            placeholders = [id for id in example.ids if id in chat.markers.values()]
            for visual in example.visuals:
                wanted = chat.video_token_id if visual.span.clip and chat.video_token else chat.image_token_id
                assert placeholders[at : at + visual.span.tokens] == [wanted] * visual.span.tokens
                at += visual.span.tokens
            assert at == len(placeholders)
            given_ids = processor.given(example.ids, ordered)
            assert given_ids.ids == example.ids and shades(given_ids) == shades(example)


def test_what_rows_share_is_opened_once(processor, monkeypatch):
    count = 0

    def counted(self):
        nonlocal count
        count += 1
        return self.source

    monkeypatch.setattr(Media, "read", counted)
    shared, opened = picture(7), {}
    rows = [processor("<image> what?", media([shared]), opened=opened) for _ in range(3)]
    assert count == 1 and len({id(row.visuals[0]) for row in rows}) == 1
    processor("<image> and <image>?", media([shared, picture(8)]), opened=opened)
    assert count == 3  # among several a picture may be prepared otherwise
    processor("<image>", media([shared]))
    assert count == 4


def test_the_cut_leaves_whole_pictures_and_the_count_is_the_length(processor):
    text = marked(processor, "<image> is <video> red?")
    messages = [
        Message("user", text),
        Message("assistant", "it is red"),
        Message("user", "why?"),
        Message("assistant", "so"),
    ]
    given = [Media(picture(1)), Media([picture(2)] * 3, True)]
    whole = processor(messages, given)
    measured = processor(messages, given, measure=True)
    assert measured.ids == whole.ids and not measured.visuals[0].pixels_NCHW.numel()
    placeholders = set(processor.config.chat.markers.values())
    for length in range(len(whole.ids) + 1):
        some = processor(messages, given, max_tokens=length)
        assert len(some.ids) <= length and some.cut == len(whole.ids) - len(some.ids)
        assert (some.ids, some.labels) == (whole.ids[: len(some.ids)], whole.labels[: len(some.ids)])
        assert sum(id in placeholders for id in some.ids) == sum(visual.span.tokens for visual in some.visuals)
        assert len(some.ids) == length or whole.ids[len(some.ids)] in placeholders
    assert shades(some) == [1, 2] and some.pixels_NCHW.shape[0] == 4 and len(some.spans) == 2


def test_the_times_of_a_clip_stand_behind_its_marker(tiny_tokenizer):
    config = tiny_config(tiny_tokenizer, DecoderConfig())
    config = dataclasses.replace(config, layout=LayoutConfig(time_instruction=True))
    processor = Processor(config, tiny_tokenizer)
    given = [Media(picture(1)), Media([picture(2)] * 3, True)]
    example = processor([Message("user", "<image>\n<image>\nwhat?")], given, generate=True)
    text = tiny_tokenizer.decode([id for id in example.ids if id != config.chat.image_token_id])
    assert "USER: \n\nThe video lasts for 3.00 seconds, and 3 frames" in text and "this video.\nwhat?" in text
    sample = [Message("user", "<image>\n<image>\nwhat?"), Message("assistant", "a")]
    assert processor(sample, given, measure=True).ids[: len(example.ids)] == example.ids


@pytest.mark.parametrize("pictures", [0, 1, 3])
def test_markers_and_pictures_must_agree(processor, pictures):
    given = media([picture(i) for i in range(pictures)])
    expected = f"2 '<image>' in the text, but {pictures} pictures; give one picture for each"
    for call in (lambda: processor([Message("user", "<image> or <image>?")], given, generate=True),
                 lambda: processor("<image> or <image>?", given)):  # fmt: skip
        with pytest.raises(UserError, match=expected):
            call()
    with pytest.raises(UserError, match=f"the ids hold 5 image placeholders, the pictures make {4 * pictures} visual"):
        processor.given([9, *[processor.config.chat.image_token_id] * 5], given)


def test_what_cannot_be_read_is_named(processor, tmp_path):
    with pytest.raises(MediaError, match=r"gone\.png: no such image file"):
        processor("<image>", media([tmp_path / "gone.png"]))
    with pytest.raises(MediaError, match=r"^b\.png: not an image"):
        processor("<image>", [Media(b"no picture", name="b.png")])
    assert torch.equal(processor("<image>", media([torch.ones(3, 16, 16)])).pixels_NCHW, torch.ones(1, 3, 16, 16))
