"""What is shown of samples is what is trained, and what cannot be trained stops a run before it starts."""

import dataclasses

import pytest
from onevision import DENSE, config, make_tokenizer

from minillava.config import IGNORE, ChatConfig, ImageConfig, LayoutConfig, ModelConfig, VisionConfig
from minillava.data.dataset import Dataset
from minillava.data.survey import describe, passages, show_samples, survey
from minillava.errors import UserError
from minillava.synthetic.samples import Samples


@pytest.fixture
def dataset(tiny_tokenizer):
    config = ModelConfig(
        vision=VisionConfig(16, 32, 2, 2, 16, 4),
        image=ImageConfig(16),
        layout=LayoutConfig(grids=((1, 2), (2, 1), (1, 3)), merge="unpad", several="pad"),
        chat=ChatConfig(image_token_id=tiny_tokenizer.token_id("<image>"), bos_id=tiny_tokenizer.bos_id),
    )
    return Dataset(Samples(40, seed=0, kinds=("picture", "text", "several", "video")), config, tiny_tokenizer, 4000)


def test_colours_are_around_what_is_trained(dataset):
    """All of it and nothing else, for every kind of sample; pictures are their views and tokens."""
    for i in range(len(dataset)):
        sample, example = dataset.samples[i], dataset[i]
        runs = list(passages(dataset, example))
        learned = [label for label in example.labels if label != IGNORE]
        assert "".join(text for text, trained in runs if trained) == dataset.tokenizer.decode(learned, False)
        answers = [f" {m.text}</s>" for m in sample.messages if m.role == "assistant"]
        assert [text for text, trained in runs if trained] == answers
        shown = describe(dataset, i, ("«", "»"))
        assert shown.count("[picture:") == len(sample.images) and shown.count("[clip:") == len(sample.videos)
        assert f"{len(example.ids):,} tokens, {len(learned):,} trained" in shown
        for span in example.spans:
            assert f"{span.tokens:,} tokens]" in shown
            assert span.views == 1 or f"{span.views} {'frames' if span.clip else 'views'}, " in shown


def test_the_report_counts_by_file_and_stops_on_samples_that_train_nothing(dataset, capsys):
    show_samples(dataset, 3)
    print(survey(dataset, 1000).by_file())
    out = capsys.readouterr().out
    assert out.count("trained\n") == 3 and "«" in out
    for kind in ("picture", "text", "several", "video"):
        assert f"  {kind}: 10 tried," in out
    assert "; 0 (0.0%) longer than 4,000 and cut" in out
    dataset.max_tokens = 120  # not enough for most
    with pytest.raises(UserError, match=r"\d+ of 40 samples tried cannot be used, the first: .*has no token to learn"):
        survey(dataset, 1000).check(allowed=0)


def test_one_bad_sample_in_two_hundred_may_be_lost(dataset):
    found = survey(dataset, 1000)
    assert "of 40 samples are supervised, such as ' " in str(found) and found.total["samples"] == 40
    found.check(allowed=0)
    found.files["text"]["samples"] += 160
    found.failures = ["x: sample 'y': gone"]
    found.check(allowed=1 / 200)  # 1 of 201
    found.files["text"]["samples"] -= 2
    with pytest.raises(UserError, match=r"1 of 199 samples tried cannot be used, the first: x: sample 'y': gone"):
        found.check(allowed=1 / 200)


def test_frames_behind_their_times_are_shown_one_by_one(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    made = config(dataclasses.replace(DENSE, vocab_size=tokenizer.vocab_size))
    dataset = Dataset(Samples(8, seed=0, kinds=("several", "video")), made, tokenizer, 4000)
    for i in range(len(dataset)):
        example = dataset[i]
        shown = describe(dataset, i, ("«", "»"))
        frames = [f"<{n}.0 seconds><|vision_start|>[clip: {count} tokens]<|vision_end|>"
                  for visual in example.visuals for n, (_, count) in enumerate(visual.tags)]  # fmt: skip
        assert "".join(frames) in shown and f"{len(example.ids):,} tokens" in shown
        assert shown.count("[picture: ") == len(example.visuals) - bool(frames)


@pytest.mark.parametrize("answer", ["", " \n"])
def test_empty_answers_are_counted(dataset, answer):
    assert "empty" not in str(survey(dataset, 40)) + survey(dataset, 40).by_file()
    samples = [dataset.samples[i] for i in range(40)]
    for i in (4, 8):
        messages = [dataclasses.replace(m, text=answer) if m.role == "assistant" else m for m in samples[i].messages]
        samples[i] = dataclasses.replace(samples[i], messages=tuple(messages))
    dataset.samples = samples
    found = survey(dataset, 40)
    assert ", 2 have an empty answer" in str(found)
    assert [line.rsplit("; ")[-1] for line in found.by_file().splitlines() if "empty" in line] == [
        "2 have an empty answer"
    ]
