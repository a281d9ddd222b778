"""The order of batches, what a lost picture costs, and the same batches however they are prepared."""

import io
import threading
import time
from collections import Counter

import pytest
import torch
from helpers import Pictures, stored
from PIL import Image

from minillava.chat.messages import Message
from minillava.chat.tokenizer import load_tokenizer
from minillava.config import ChatConfig, ImageConfig, ModelConfig, VisionConfig
from minillava.data.dataset import Dataset
from minillava.data.llava_json import Sample
from minillava.data.loader import Loader, Tally
from minillava.data.packing import Order
from minillava.errors import UserError
from minillava.synthetic.train_tokenizer import train_small_tokenizer


def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 99)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_small_tokenizer(["USER: <image>\nWhich? ASSISTANT: 0 1 2 3 4 5 6 7 8 9</s>"] * 9, folder)
    return load_tokenizer(folder)


def dataset(tokenizer, count, bad=(), text_only=(), max_tokens=999, seed=0):
    """Sample i shows a picture of the colour i and answers i; those of `bad` are no pictures."""
    config = ModelConfig(
        vision=VisionConfig(image_size=8, patch_size=4),
        image=ImageConfig(size=8),
        chat=ChatConfig(image_token_id=tokenizer.token_id("<image>"), bos_id=tokenizer.bos_id),
    )
    store = Pictures({str(i): b"no picture" if i in bad else png(i) for i in range(count)})
    samples = []
    for i in range(count):
        media = () if i in text_only else (stored(str(i), store),)
        question = Message("user", "<image>\nWhich?" if media else "Which?")
        samples.append(Sample(str(i), media, (question, Message("assistant", str(i))), "data.json"))
    return Dataset(samples, config, tokenizer, max_tokens, seed)


def same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.ids_T, y.ids_T) and torch.equal(x.labels_T, y.labels_T)
        assert x.cu_seqlens == y.cu_seqlens and x.supervised == y.supervised
        assert torch.equal(x.pixels_NCHW, y.pixels_NCHW)
        assert x.lost == y.lost
    return True


def test_the_same_batches_however_they_are_prepared(tokenizer):
    """In a thread, in one and two processes, and resumed in the middle; unreadable pictures included."""
    data = dataset(tokenizer, 300, bad={5, 77, 208})
    order = Order(300, 8, seed=1)
    inline = Loader(data, order, 0, 80)
    batches = list(inline)
    assert sum(len(batch.lost) for batch in batches) >= 6  # in each of two epochs
    for workers in (1, 2):
        loader = Loader(data, order, 0, 80, workers=workers)
        assert same(loader, batches) and loader.tally == inline.tally
    assert same(Loader(data, order, 41, 80), batches[41:])


def test_one_lost_picture_costs_that_sample_only(tokenizer):
    count, bad = 2000, {123}
    data = dataset(tokenizer, count, bad=bad, text_only=set(range(0, count, 2)) - bad)
    loader = Loader(data, Order(count, 50), 0, 40)
    answers, pictures = Counter(), 0
    for batch in loader:
        assert len(batch.cu_seqlens) == 51
        pictures += len(batch.pixels_NCHW)
        for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:]):
            labels_T = batch.labels_T[start:end]
            answers[int(tokenizer.decode(labels_T[labels_T >= 0].tolist()))] += 1
    twice = [number for number, times in answers.items() if times == 2]
    assert set(range(count)) - set(answers) == bad and len(twice) == 1
    assert twice[0] % 2 == 1 and pictures == count // 2  # one of the same modality stood in
    assert loader.tally.drawn == count + 1 and loader.tally.lost_draws == 1
    assert list(loader.tally.lost) == [123]
    assert loader.tally.lost[123].startswith("data.json: sample '123': 123: not an image")
    assert "1 different ones unusable and replaced" in str(loader.tally)


@pytest.mark.parametrize(
    "count,bad,stops,workers",
    [(10, 1, False, 0), (10, 2, True, 0), (400, 4, False, 0), (400, 5, True, 0), (400, 5, True, 2)],
)
def test_past_one_per_cent_the_run_stops(tokenizer, count, bad, stops, workers):
    loader = Loader(dataset(tokenizer, count, bad=set(range(bad))), Order(count, 8), 0, 3 * -(-count // 8), workers)
    if not stops:
        assert len(list(loader)) == len(loader) and len(loader.tally.lost) == bad
        return
    with pytest.raises(UserError, match=rf"sample '\d+': \d+: not an image.*so far {bad} of {count} samples") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


def test_a_failing_disk_stops_the_run_soon(tokenizer):
    """Long before 1 % of a large set (80) is lost: by the share of the draws, or by ten failures in a row."""
    data = dataset(tokenizer, 8000, bad=set(range(0, 8000, 5)))
    loader = Loader(data, Order(8000, 8), 0, 1000)
    with pytest.raises(UserError, match=r"so far 2\d of 8000 samples .* so the run stops"):
        list(loader)
    with pytest.raises(UserError, match=r"10 unusable samples in a row, the last: data\.json: sample"):
        list(Loader(dataset(tokenizer, 3000, bad=set(range(3000))), Order(3000, 8), 0, 5))


def test_a_text_sample_is_replaced_by_a_text_sample(tokenizer):
    data = dataset(tokenizer, 200, text_only={3, 77, 150})
    endless = (Message("user", "Which? " * 999), Message("assistant", "3"))
    data.samples[3] = Sample("3", (), endless, "data.json")
    for epoch in range(5):
        example, lost = data.draw(3, epoch)
        assert [index for index, _ in lost] == [3] * len(lost) and "cut from" in lost[0][1]
        assert tokenizer.decode([label for label in example.labels if label >= 0]) in (" 77", " 150")


def test_the_tally_survives_a_checkpoint(tokenizer):
    loader = Loader(dataset(tokenizer, 300, bad={5, 77}, max_tokens=9), Order(300, 50), 0, 6)
    with pytest.raises(UserError):  # max_tokens leaves nothing to learn
        list(loader)
    loader = Loader(dataset(tokenizer, 300, bad={5, 77}), Order(300, 50), 0, 6)
    list(loader)
    restored = Tally(300)
    restored.load(loader.tally.state())
    assert restored == loader.tally and set(restored.lost) == {5, 77}


def test_cut_rows_are_counted(tokenizer):
    whole = dataset(tokenizer, 40)
    longest = max(len(whole[i].ids) for i in range(40))
    loader = Loader(dataset(tokenizer, 40, max_tokens=longest - 1), Order(40, 10), 0, 4)
    list(loader)
    expected = sum(len(whole[i].ids) >= longest for i in range(40))
    assert expected > 0 and (loader.tally.cut_rows, loader.tally.cut_tokens) == (expected, expected)


def test_work_is_done_ahead(tokenizer):
    """By lower bounds and events alone: a busy machine may not fail it."""

    class Slow(Dataset):
        def batch(self, indices, epoch):
            time.sleep(0.02)
            made.append(threading.current_thread().name)
            if len(made) == 3:
                third.set()
            return super().batch(indices, epoch)

    made, third = [], threading.Event()
    data = dataset(tokenizer, 8)
    loader = Loader(Slow(data.samples, data.config, tokenizer, 999), Order(8, 1), 0, 8, ahead=2)
    batches = iter(loader)
    next(batches)
    assert third.wait(60)  # the two behind it come without being asked for
    list(batches)
    assert len(made) == 8 and all(name.startswith("loader") for name in made)


def test_leaving_early_ends_the_thread(tokenizer):
    for _ in Loader(dataset(tokenizer, 50), Order(50, 1), 0, 50):
        break
    deadline_s = time.monotonic() + 10
    while any(thread.name.startswith("loader") for thread in threading.enumerate()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_lengths_are_those_of_the_encoded_samples(tokenizer, tmp_path, workers):
    longest = max(len(dataset(tokenizer, 1100)[i].ids) for i in range(0, 1100, 50))
    data = dataset(tokenizer, 1100, bad={7}, text_only=range(0, 1100, 3), max_tokens=longest - 1)
    encoded = [len(data[i].ids) if i != 7 else None for i in range(1100)]
    lengths = data.measure(workers, tmp_path / "lengths.npy").tolist()
    assert lengths[:7] + lengths[8:] == encoded[:7] + encoded[8:] and max(lengths) == longest - 1
    assert min(lengths) < lengths[7] < longest  # what is unreadable is taken to be as long as most
    again = Dataset(data.samples, data.config, None, longest - 1)  # no tokenizer: from the file alone
    assert again.measure(0, tmp_path / "lengths.npy").tolist() == lengths


def test_packed_batches_hold_every_sample_and_keep_to_the_budget(tokenizer, tmp_path):
    """Also where a picture is lost: no stand-in is longer than what it stands in for."""
    count, bad = 400, {11, 251}
    data = dataset(tokenizer, count, bad=bad, text_only=range(0, count, 2))
    lengths = data.measure(0, tmp_path / "lengths.npy")
    order = Order(count, 4, seed=1, micro=1, row_tokens=2000, lengths=lengths)
    loader = Loader(data, order, 0, order.num_steps(1) * order.parts)
    answers, filled, rows = Counter(), 0, 0
    for batch in loader:
        assert len(batch.ids_T) <= 2000 * batch.rows
        filled, rows = filled + len(batch.ids_T), rows + batch.rows
        for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:]):
            labels_T = batch.labels_T[start:end]
            answers[int(tokenizer.decode(labels_T[labels_T >= 0].tolist()))] += 1
    assert set(range(count)) - set(answers) == bad and answers.total() == count
    assert filled / (2000 * rows) > 0.95 and rows <= -(-lengths.sum() // 2000) + 1
