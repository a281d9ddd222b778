"""LLaVA JSON: what is accepted, every way it can be wrong, and examples that agree with their conversation."""

import dataclasses
import io
import json
import re
import zipfile

import pytest
import torch
from helpers import REAL, Pictures, stored
from PIL import Image

from minillava.chat.messages import Message
from minillava.chat.tokenizer import load_tokenizer
from minillava.config import IGNORE, ChatConfig, ImageConfig, LayoutConfig, ModelConfig, VisionConfig
from minillava.data.batch import pack
from minillava.data.dataset import SampleError, encode_sample
from minillava.data.files import Folder
from minillava.data.llava_json import Sample
from minillava.data.mixture import read_data
from minillava.data.table import scan
from minillava.errors import UserError
from minillava.media.visual import Visual
from minillava.processor import Example, Processor
from minillava.recipe import DataConfig
from minillava.synthetic.train_tokenizer import train_small_tokenizer
from minillava.visual_tokens import Span

CIFAR = REAL / "cifar10"
SPAN = 4  # visual tokens of an image below
CORPUS = ["USER: <image>\nWhat color is it? red ASSISTANT: red blue green ###\n", "Why? Because it is so. a b c d"] * 30


def png(colour, size=(6, 4)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {"a.png": png("red"), "sub/b.png": png("blue"), "broken.png": b"no picture"}


def turns(*texts, roles=("human", "gpt")):
    return [{"from": roles[number % 2], "value": text} for number, text in enumerate(texts)]


ONE = {"id": "one", "image": "a.png", "conversations": turns("What?\n<image>", "red", "Why?", "so")}
TWO = {"id": 2, "image": ["a.png", "sub/b.png"], "conversations": turns("<image> and <image>: same?", "no")}
TEXT = {"conversations": turns("Hi", "Hello")}


@pytest.fixture(params=["folder", "zip"])
def root(request, tmp_path):
    """FILES as a folder or as a zip."""
    if request.param == "zip":
        with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in FILES.items():
                archive.writestr(name, data)
        return tmp_path / "images.zip"
    for name, data in FILES.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(data)
    return tmp_path / "images"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_small_tokenizer(CORPUS, folder, ["<s>", "</s>", "<pad>", "<image>", "<im_start>", "<im_end>"])
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def config(tokenizer):
    return ModelConfig(
        vision=VisionConfig(image_size=8, patch_size=4),
        image=ImageConfig(size=8),
        chat=ChatConfig(image_token_id=tokenizer.token_id("<image>"), bos_id=tokenizer.bos_id),
    )


def write(tmp_path, samples, name="data.json"):
    path = tmp_path / name
    if name.endswith("jsonl"):
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples) + "\n")
    else:
        path.write_text(json.dumps(samples, indent=1))
    return path


def read_samples(path, root):
    return read_data([DataConfig(str(path), str(root or ""))])


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_json_and_jsonl_folder_and_zip(tmp_path, root, name):
    path = write(tmp_path, [ONE, TWO, TEXT], name)
    one, two, text = read_samples(path, root)
    assert [s.id for s in (one, two, text)] == ["one", "2", "2"]  # a sample without an id goes by its number
    assert one.messages == (
        Message("user", "What?\n<image>"),
        Message("assistant", "red"),
        Message("user", "Why?"),
        Message("assistant", "so"),
    )
    assert [ref.image().getpixel((0, 0)) for ref in two.images] == [(255, 0, 0), (0, 0, 255)]
    assert text.media == ()
    assert one.name == f"{path}: sample 'one'"


def test_role_content_and_system_and_messages_key(tmp_path):
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    path = write(tmp_path, [{"messages": conversation}, {"conversations": conversation[1:]}])
    first, second = read_samples(path, None)
    assert [m.role for m in first.messages] == ["system", "user", "assistant"]
    assert first.messages[1:] == second.messages


def test_earlier_turns_beside_an_instruction_stand_in_front_of_it(tmp_path, root):
    """LLaMA-Factory's Alpaca rows: `history` was left out in silence."""
    row = {"instruction": "Why?", "input": "", "output": "so", "history": [["Hi", "Hello"]], "system": "Be brief."}
    shown = row | {"image": "a.png", "history": [["Which color?", "red"]], "system": ""}
    text, picture = read_samples(write(tmp_path, [row, shown]), root)
    assert [m.text for m in text.messages] == ["Be brief.", "Hi", "Hello", "Why?", "so"]
    assert [m.text for m in picture.messages] == ["<image>\nWhich color?", "red", "Why?", "so"]


ASKED = [{"role": "user", "content": "Which color?"}]
BOTH = {key: [*ASKED, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
PREFERENCES = {
    "ultrafeedback_binarized": {"prompt": "Which color?", "messages": BOTH["chosen"], **BOTH},
    "prompt in front of both and alone": {"prompt": ASKED, **BOTH},
    "a system message in front of both": {
        "prompt": "Which color?",
        **{key: [{"role": "system", "content": "Be brief."}, *turns] for key, turns in BOTH.items()},
    },
    "Alpaca": {"instruction": "Which", "input": "color?", "chosen": "chosen", "rejected": "rejected"},
    "Alpaca, pictures": {
        "image": "a.png", "history": [["Hi", "Hello"]], "instruction": "Which color?",
        "chosen": "chosen", "rejected": "rejected",
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", list(PREFERENCES))
def test_a_preference_has_its_prompt_once(tmp_path, root, layout):
    (sample,) = read_samples(write(tmp_path, [PREFERENCES[layout]]), root)
    said = [message.text for message in sample.messages if message.role != "system"]
    asked = ["<image>\nHi", "Hello", "Which color?"] if sample.media else ["Which color?"]
    assert (" ".join(said[:-1]).split(), said[-1]) == (" ".join(asked).split(), "chosen")
    assert sample.rejected == "rejected" and sample.worse.messages[:-1] == sample.messages[:-1]


def test_pictures_and_videos_without_markers_stand_in_front(tmp_path, root):
    """In preferences too; without videos the word <video> is no marker."""
    tag = {"image": "a.png", "texts": [{"user": "What is the <video> tag?", "assistant": "One of HTML."}]}
    both = {"image": "a.png", "video": "sub/b.png", "prompt": "Alike?", "chosen": "No.", "rejected": "Yes."}
    samples = read_samples(write(tmp_path, [tag, both]), root)
    assert [sample.messages[0].text for sample in samples] == [
        "<image>\nWhat is the <video> tag?", "<image>\n<video>\nAlike?",
    ]  # fmt: skip
    assert [medium.video for medium in samples[1].media] == [False, True]


@pytest.mark.parametrize("row", [{"prompt": "Hi", "completion": "Go away.", "label": False},
                                 {"conversations": turns("Hi", "Go away."), "kto_tag": False}])  # fmt: skip
def test_answers_that_were_judged_bad_are_not_learned(tmp_path, row):
    good = {key: True if value is False else value for key, value in row.items()}
    assert len(read_samples(write(tmp_path, [good]), None)) == 1
    with pytest.raises(UserError, match="judged to be bad"):
        read_samples(write(tmp_path, [row]), None)


def test_first_turn_from_gpt_is_dropped_and_counted(tmp_path, root):
    opening = {"conversations": turns("Welcome", "Hi", "Hello", roles=("gpt", "human"))}
    samples, report = scan(write(tmp_path, [opening, ONE, TWO, TEXT]), root)
    assert [m.text for m in samples[0].messages] == ["Hi", "Hello"]
    names = ("samples", "text only", "images", "several images", "turns")
    assert [report.counts[name] for name in names] == [4, 2, 3, 1, 2 + 4 + 2 + 2]
    assert report.counts["dropped first turns"] == 1 and not report.problems
    assert "4 samples, 2 text only, 3 images, 1 several images" in str(report)


def changed(**values):
    return {**ONE, **values}


def talk(*conversation):
    return changed(conversations=list(conversation))


BAD = {
    "more markers": (talk(*turns("<image> <image>", "x")), r"2 <image> in the text but 1 images; add the"),
    "marker without image": ({**talk(*turns("<image>", "x")), "image": None}, "1 <image> in the text but 0 images"),
    "fewer markers": (talk(*turns("What?", "x")), r"0 <image> in the text but 1 images; add a <image>"),
    "missing image": (changed(image="gone.png"), r"image gone\.png is missing; add it or remove the sample"),
    "missing folder": (changed(image="no/where.png"), r"image no/where\.png is missing"),
    "order": (talk(*turns("<image>", "x", roles=("human", "human"))), r"wrong role order: message 2 .*'user'"),
    "gpt twice": (talk(*turns("<image>", "x"), turns("", "z")[1]), "wrong role order: message 3 .*'assistant'"),
    "no answer": (talk(*turns("<image>", "x", "y")), "wrong role order: .*ends with 'user'"),
    "late system": (talk(*turns("<image>", "x"), {"from": "system", "value": ""}), "wrong role order"),
    "unknown role": (talk(*turns("<image>", "x", roles=("human", "bot"))), "unknown role 'bot'; use human"),
    "empty": (talk(), "conversation is empty; remove"),
    "only a greeting": (talk(*turns("x", roles=("gpt",) * 2)), "conversation is empty; remove"),
    "none": ({"id": "one"}, "'conversations' must be a list of turns, got nothing"),
    "turns as text": (changed(conversations="hello"), "must be a list of turns, got a text"),
    "turn as text": (talk("hello", "you"), "a turn must be an object"),
    "number": (talk(*turns("<image>", 7)), "text of a turn must be a string, got a whole number"),
    "image type": (changed(image=7), "'image' must be a path or a list of paths"),
    "image list type": (changed(image=["a.png", None]), "'image' must be a path or a list of paths"),
    "missing video": (changed(video="a.mp4", image=None), "video a.mp4 is missing"),
    "video without marker": (changed(video="a.mp4"), "0 <video> in the text but 1 videos"),
    "surrogate": (talk(*turns("<image>", "\ud83d")), "surrogate"),
    "null byte": (changed(image="a\0.png"), "is missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(BAD))
def test_bad_samples_are_one_line_that_names_them(tmp_path, root, kind):
    sample, words = BAD[kind]
    path = write(tmp_path, [TEXT, sample, TWO, sample])
    with pytest.raises(UserError, match=words) as caught:
        read_samples(path, root)
    message = str(caught.value)
    assert message.startswith(f"{path}: sample 'one' (number 1): ") and "\n" not in message
    assert message.endswith(f"(1 more of {path} are wrong too)")
    samples, report = scan(path, root)
    assert len(samples) == report.counts["samples"] == 2 and len(report.problems) == 2


def test_a_sample_that_is_no_object(tmp_path):
    for wrong in ("text", 7, None, ["list"]):
        with pytest.raises(UserError, match=r"sample '0' \(number 0\): expected an object"):
            read_samples(write(tmp_path, [wrong]), None)


@pytest.mark.parametrize(
    "data,words",
    [
        (b'[{"id": 1},\n oops]', r"not JSON at line 2 .*expected a list of samples"),
        (b'{"conversations": []}\n{oops}\n', "not JSON at line 2"),
        (b"[" + b"1" * 5000 + b"]", "not JSON at line 1 .*digits"),
        (b"", "no samples"),
        (b"[]", "no samples"),
        (b"\xff\xfe\x00", r"not UTF-8 text \(byte 0\)"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
        (None, "no such file; check the path"),
    ],
)
def test_bad_files(tmp_path, data, words):
    path = tmp_path / "bad.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        read_samples(path, None)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_bad_image_roots(tmp_path):
    path = write(tmp_path, [ONE])
    with pytest.raises(UserError, match=r"gone: no such image folder or zip; check the path"):
        read_samples(path, tmp_path / "gone")
    (tmp_path / "no.zip").write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match=r"no\.zip: cannot be read as a zip file"):
        read_samples(path, tmp_path / "no.zip")
    with pytest.raises(UserError, match="no image folder was given; set one"):
        read_samples(path, None)


def supervised_text(tokenizer, example):
    return tokenizer.decode([label for label in example.labels if label != IGNORE], skip_special=False)


def test_examples_hold_the_conversation(tmp_path, root, config, tokenizer):
    one, two, text = (
        encode_sample(sample, Processor(config, tokenizer), 999)
        for sample in read_samples(write(tmp_path, [ONE, TWO, TEXT]), root)
    )
    assert supervised_text(tokenizer, one) == " red</s> so</s>"
    assert [example.ids.count(config.chat.image_token_id) for example in (one, two, text)] == [SPAN, 2 * SPAN, 0]
    assert one.pixels_NCHW.shape == (1, 3, 8, 8) and two.pixels_NCHW.shape == (2, 3, 8, 8)
    assert text.pixels_NCHW is None
    for example in (one, two, text):
        assert len(example.ids) == len(example.labels) and example.cut == 0
        assert all(label in (IGNORE, id) for id, label in zip(example.ids, example.labels))


def test_another_placeholder_of_the_checkpoint(config, tokenizer):
    """The JSON always says <image>; a checkpoint may call it otherwise."""
    sample = Sample(
        "x",
        (stored("a", {"a": FILES["a.png"]}),),
        (Message("user", "<image>\nWhat?"), Message("assistant", "red")),
    )
    other = dataclasses.replace(
        config, chat=dataclasses.replace(config.chat, image_token="<pad>", image_token_id=tokenizer.pad_id)
    )
    ids = encode_sample(sample, Processor(config, tokenizer), 999).ids
    swap = {tokenizer.token_id("<image>"): tokenizer.pad_id}
    assert encode_sample(sample, Processor(other, tokenizer), 999).ids == [swap.get(id, id) for id in ids]


@pytest.mark.parametrize("start_end", [False, True])
def test_no_cut_goes_through_an_image(config, tokenizer, start_end):
    """At every possible length: a prefix of the whole, whole images only, and exactly their pixels."""
    config = dataclasses.replace(config, chat=dataclasses.replace(config.chat, image_start_end=start_end))
    pictures = Pictures({"a": FILES["a.png"], "b": FILES["sub/b.png"]})
    messages = (
        Message("user", "What?"),
        Message("assistant", "a b c"),
        Message("user", "<image><image>\nWhy?"),
        Message("assistant", "d"),
        Message("user", "<image>\nIs it?"),
        Message("assistant", "red"),
    )
    sample = Sample("long", tuple(stored(name, pictures) for name in "aba"), messages)
    whole = encode_sample(sample, Processor(config, tokenizer), 999)
    image_id, start_id = config.chat.image_token_id, tokenizer.token_id("<im_start>")
    lengths, refused = set(), 0
    for length in range(1, len(whole.ids) + 1):
        try:
            example = encode_sample(sample, Processor(config, tokenizer), length)
        except SampleError as error:
            assert re.search(rf"sample 'long': cut from {len(whole.ids)} to {length} tokens", str(error))
            refused += 1
            continue
        size = len(example.ids)
        assert size <= length and example.ids == whole.ids[:size] and example.labels == whole.labels[:size]
        assert example.cut == len(whole.ids) - size
        count, rest = divmod(example.ids.count(image_id), SPAN)
        assert rest == 0 and example.ids[-1] != start_id
        pixels = example.pixels_NCHW
        assert (0 if pixels is None else len(pixels)) == count
        assert pixels is None or torch.equal(pixels, whole.pixels_NCHW[:count])
        inside = size < length and whole.ids[length] != image_id and whole.ids[length - 1] != image_id
        assert not inside or start_end  # shortened only where an image (or its wrapping) was in the way
        lengths.add(size)
    assert refused and len(lengths) > 10 and len(whole.ids) in lengths


def test_unusable_samples_are_named(tmp_path, root, config, tokenizer):
    path = write(tmp_path, [changed(image="broken.png"), TEXT])
    broken, _ = read_samples(path, root)
    with pytest.raises(SampleError, match=r"data\.json: sample 'one': broken\.png: not an image") as caught:
        encode_sample(broken, Processor(config, tokenizer), 999)
    assert "\n" not in str(caught.value)
    gone = Sample("g", (stored("gone.png", Folder(tmp_path)),), broken.messages, str(path))
    with pytest.raises(SampleError, match=r"sample 'g': gone\.png: no such image file"):
        encode_sample(gone, Processor(config, tokenizer), 999)


def test_pack():
    pixels = [torch.full((count, 3, 2, 2), float(count)) for count in (1, 2)]
    rows = [
        Example([1, 2, 3], [IGNORE, IGNORE, 3], [Visual(pixels[0], Span(4))], cut=5),
        Example([4, 5], [IGNORE, 5]),
        Example([6, 7, 8], [IGNORE, 7, 8], [Visual(pixels[1], Span(4, views=2))], cut=2),
    ]
    batch = pack(rows)
    assert batch.ids_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and batch.ids_T.dtype == torch.int64
    assert (
        batch.labels_T.tolist() == [IGNORE, IGNORE, 3, IGNORE, 5, IGNORE, 7, 8] and batch.labels_T.dtype == torch.int64
    )
    assert batch.cu_seqlens == (0, 3, 5, 8) and batch.supervised == 4
    assert (batch.cut_rows, batch.cut_tokens) == (2, 7)
    assert torch.equal(batch.pixels_NCHW, torch.cat(pixels))
    assert pack(rows[1:2]).pixels_NCHW is None
    assert batch.to("meta").ids_T.device.type == "meta"


@pytest.mark.skipif(not CIFAR.is_dir(), reason="no real files beside the repo (MINILLAVA_REAL)")
@pytest.mark.parametrize("name,turns_each", [("captions-train.json", 2), ("instruct-train.json", 6)])
def test_real_data_in_its_zip(name, turns_each, config, tokenizer):
    samples, report = scan(CIFAR / name, CIFAR / "images-train.zip")
    assert not report.problems and report.counts["samples"] == report.counts["images"] == len(samples) > 1000
    assert report.counts["turns"] == turns_each * len(samples)
    for sample in samples[:: len(samples) // 20]:
        example = encode_sample(sample, Processor(config, tokenizer), 999)
        answers = [message.text for message in sample.messages if message.role == "assistant"]
        assert supervised_text(tokenizer, example) == "".join(f" {answer}</s>" for answer in answers)
        assert sample.images[0].image().size == (32, 32)


# ---- tiles, several pictures, videos ----


def tiled_config(config):
    """The same model with tiles and a newline; clips have a marker of their own."""
    layout = LayoutConfig(grids=((2, 1), (1, 2), (2, 2)), merge="unpad", several="pad", video_newline="frame")
    chat = dataclasses.replace(config.chat, video_token="<video>", video_token_id=-201)
    return dataclasses.replace(config, layout=layout, chat=chat)


def test_samples_of_tiles_several_pictures_and_frames(tmp_path, config, tokenizer):
    """One picture is tiled, two are padded, a folder of frames is a clip: spans, pixels and placeholders agree."""
    for i in range(3):
        (tmp_path / "clip").mkdir(exist_ok=True)
        Image.new("RGB", (9, 8), (i * 80,) * 3).save(tmp_path / "clip" / f"{i}.png")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 7)).save(tmp_path / name)
    samples = [
        {"id": 1, "image": "a.png", "conversations": turns("<image>\nWhat?", "red")},
        {"id": 2, "image": ["a.png", "b.png"], "conversations": turns("<image> and <image>: same?", "no")},
        {"id": 3, "video": "clip", "conversations": turns("<image>\nWhat moves?", "it")},  # as LLaVA-Video has it
        {
            "id": 4,
            "video": "clip",
            "image": "a.png",
            "conversations": turns("<video>\nWhat?", "it", "<image>\nLike this?", "yes"),
        },
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(samples))
    read, report = scan(path, tmp_path)
    assert report.counts["samples"] == report.counts["images"] == 4 and report.counts["videos"] == 2
    assert not report.counts["text only"] and not report.problems
    config = tiled_config(config)
    views = [[3], [1, 1], [3], [3, 3]]
    examples = [encode_sample(sample, Processor(config, tokenizer), 10_000) for sample in read]
    for example, expected, sample in zip(examples, views, read):
        assert [span.views for span in example.spans] == expected
        assert example.pixels_NCHW.shape[0] == sum(expected)
        for kind, marker in ((False, config.chat.image_token_id), (True, config.chat.video_token_id)):
            assert example.ids.count(marker) == sum(s.tokens for s in example.spans if s.clip == kind), sample.id
    assert examples[3].spans[0].clip and not examples[3].spans[1].clip  # in the order of their markers
    batch = pack(examples)
    assert [span.views for span in batch.spans] == [3, 1, 1, 3, 3, 3] and len(batch.pixels_NCHW) == 14
    cut = encode_sample(read[3], Processor(config, tokenizer), examples[3].ids.index(config.chat.image_token_id) + 3)
    assert len(cut.spans) == 1 and len(cut.pixels_NCHW) == 3 and cut.cut
    told = dataclasses.replace(config, layout=dataclasses.replace(config.layout, time_instruction=True))
    longer = encode_sample(read[2], Processor(told, tokenizer), 10_000)
    text = tokenizer.decode([i for i in longer.ids if i >= 0])
    assert "The video lasts for 3.00 seconds, and 3 frames" in text and "0.00s,1.00s,2.00s" in text


def test_a_video_in_front_of_a_picture_stays_there(tmp_path, config, tokenizer):
    """Also where a checkpoint has one marker for both; so do the names in the JSON, which list pictures apart."""
    (tmp_path / "clip").mkdir()
    for name in ("clip/0.png", "clip/1.png", "a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    talk = turns("<video>\nWhat?", "it", "<image>\nLike this?", "yes")
    (sample,) = read_samples(
        write(tmp_path, [{"id": 4, "video": "clip", "image": "a.png", "conversations": talk}]), tmp_path
    )
    assert [(medium.name, medium.video) for medium in sample.media] == [("clip", True), ("a.png", False)]
    for some in (config, tiled_config(config)):
        example = encode_sample(sample, Processor(some, tokenizer), 10_000)
        assert [span.clip for span in example.spans] == [True, False]


def test_a_broken_video_costs_one_sample(tmp_path, config, tokenizer):
    pytest.importorskip("av")
    (tmp_path / "bad.mp4").write_bytes(b"no video" * 50)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": "v", "video": "bad.mp4", "conversations": turns("<video>\nWhat?", "x")}]))
    (sample,) = read_samples(path, tmp_path)
    with pytest.raises(SampleError, match=r"sample 'v': bad.mp4: a video that cannot be decoded"):
        encode_sample(sample, Processor(tiled_config(config), tokenizer), 1000)
