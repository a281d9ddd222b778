"""Prompts and pictures in the forms that people have them in: the answer is the plain form's."""

import base64
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import tiny_pair
from PIL import Image

from minillava.api import LLaVA
from minillava.chat.messages import Message
from minillava.errors import UserError
from minillava.generation.sampling import GREEDY, Sampler, Sampling
from minillava.media.sources import OwnSources
from minillava.synthetic.shapes import demo_scene

TEXT = "What is this?"


@pytest.fixture(scope="module")
def model(tiny_model, tiny_tokenizer):
    return LLaVA(tiny_model, tiny_tokenizer)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A file, and what it holds in every other form."""
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    image.save(path)
    data = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"file": path, "text": str(path), "image": image, "bytes": data, "array": np.asarray(image), "url": url}


def same(one, other):
    return one.token_ids == other.token_ids and one.image_tokens == other.image_tokens > 0


@pytest.mark.parametrize("form", ["text", "image", "bytes", "array", "url", "open"])
def test_a_picture_in_any_form_by_itself_or_in_a_list(model, picture, form):
    wanted = model.generate(TEXT, [picture["file"]], 6)
    given = (lambda: io.BytesIO(picture["bytes"])) if form == "open" else (lambda: picture[form])
    assert same(model.generate(TEXT, given(), 6), wanted) and same(model.generate(TEXT, [given()], 6), wanted)


def test_frames_of_a_video_in_any_form(model, picture):
    def seen(frames):
        (request,) = model._requests(TEXT, videos=[frames])
        return request.media[0].open(model.config).pixels_NCHW

    wanted = seen([picture["file"]] * 3)
    for form in ("text", "image", "bytes", "array", "url"):
        assert torch.equal(seen([picture[form]] * 3), wanted)
    assert torch.equal(seen([io.BytesIO(picture["bytes"]) for _ in range(3)]), wanted)
    clip = OwnSources(folder=picture["file"].parent).open([picture["file"].name] * 3, True, 1)
    assert torch.equal(clip.open(model.config).pixels_NCHW, wanted)


@pytest.mark.parametrize("video", [3, [3], [[b""]], np.zeros((2, 4, 4, 3), np.uint8), [torch.zeros(3, 4, 4)]])
def test_what_is_no_video_is_a_line(model, video):
    with pytest.raises(UserError, match=r"cannot be (a|read)"):
        model.generate(TEXT, videos=[video])


def test_with_frames_refuses_what_is_no_number_of_them_and_keeps_the_notes(model):
    for frames, fps in ((0, None), (-1, None), (None, -1.0), (None, float("nan"))):
        with pytest.raises(UserError, match="use 1 frame or more"):
            model.with_frames(frames, fps)
    noted = LLaVA(model.model, model.tokenizer, ["a note"])
    assert noted.with_frames(2).notes == ["a note"]


def test_messages_as_openais_as_hugging_faces_and_our_own(model, picture):
    wanted = model.generate(TEXT, [picture["file"]], 6)
    text = {"type": "text", "text": TEXT}
    for parts, images in (
        ([{"type": "image_url", "image_url": {"url": picture["url"]}}, text], ()),
        ([{"type": "image", "image": picture["image"]}, text], ()),
        ([{"type": "image", "path": str(picture["file"])}, text], ()),
        ([{"type": "image"}, text], picture["file"]),
        ([{"type": "image", "text": None}, text | {"image": None}], picture["file"]),  # as a table's rows have them
        ([text], picture["file"]),
    ):
        for prompt in ([{"role": "user", "content": parts}], {"role": "user", "content": parts}):
            assert same(model.generate(prompt, images, 6), wanted), parts
    arrays = [{"type": "image", "image": picture["array"][:, ::step]} for step in (1, -1)]  # which do not compare
    there = {"role": "user", "content": [arrays[0], text, arrays[1]]}
    beside = [part["image"] for part in arrays]
    assert same(model.generate(there), model.generate(f"<image>\n{TEXT}<image>", beside))
    turns = [{"role": "user", "content": f"<image>\n{TEXT}"}, {"role": "assistant", "content": "red"},
             {"role": "user", "content": "Sure?"}]  # fmt: skip
    ours = [Message(turn["role"], turn["content"]) for turn in turns]
    assert same(model.generate(turns, picture["file"], 6), model.generate(ours, [picture["file"]], 6))
    with pytest.raises(UserError, match="more pictures in the messages than were given"):
        model.generate([{"role": "user", "content": [{"type": "image"}, text]}])


def test_several_prompts_are_each_alone(model, picture):
    prompts = [TEXT, "what color?", [{"role": "user", "content": "what color?"}]]
    black = Image.new("RGB", (8, 8))
    found = model.generate(prompts, [picture["file"], None, [black]], 6)
    alone = [model.generate(TEXT, picture["file"], 6), model.generate(prompts[1], (), 6)]
    alone.append(model.generate(prompts[2], black, 6))
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in alone]
    shared = model.generate(prompts[:2], picture["file"], 6, temperature=1.0, seed=4)
    for number, answer in enumerate(shared):
        assert same(answer, model.generate(prompts[number], picture["file"], 6, temperature=1.0, seed=4 + number))
    with pytest.raises(UserError, match="3 prompts, but 2 images"):
        model.generate(prompts, [black, black])
    with pytest.raises(UserError, match=r"prompt 2: .*no such image file"):
        model.generate(prompts[:2], [black, "nowhere.png"])
    with pytest.raises(UserError, match="conversation is empty"):
        model.generate([])


def test_a_stream_is_the_answer_in_pieces(model, picture):
    wanted, pieces = model.generate(TEXT, picture["file"], 12), []
    stream = model.stream(TEXT, picture["file"], max_new_tokens=12)
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            assert "".join(pieces) == end.value.text == wanted.text and len(pieces) > 1
            break
    with pytest.raises(UserError, match="one prompt"):
        model.stream([TEXT])


def test_stop_device_to_and_eval(model, picture):
    whole = model.generate(TEXT, picture["file"], 12).text
    word = whole.split()[1]
    for stop in (word, [word]):
        assert model.generate(TEXT, picture["file"], 12, stop=stop).text == whole[: whole.index(word)].strip()
    assert model.device.type == "cpu" and model.to("cpu").eval() is model and not model.model.training


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("https://example.org/x.png", "fetch"),
        (5, "cannot be a int"),
        (np.zeros((4, 4, 3)), "array of float64"),
        ("data:image/png;base64,!", "damaged"),
    ],
)
def test_what_is_no_picture_is_a_line(model, source, error):
    with pytest.raises(UserError, match=error) as raised:
        model.generate(TEXT, source)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_costs_what_it_costs_in_transformers(tiny_tokenizer, tmp_path, penalty):
    theirs, engine = tiny_pair("qwen2", tiny_tokenizer, tmp_path)
    model = LLaVA(engine.model, tiny_tokenizer)
    prompt = "red red blue green circle"
    with torch.no_grad():
        ids = torch.tensor([engine.row(0, _raw(prompt), {}).ids])
        want = theirs.generate(ids, max_new_tokens=24, do_sample=False, repetition_penalty=penalty, use_cache=False)
    answer = model.generate(prompt, raw=True, max_new_tokens=24, repetition_penalty=penalty)
    length = len(answer.token_ids)
    assert list(answer.token_ids) == want[0, ids.shape[1] :][:length].tolist() and length > 8
    plain = model.generate(prompt, raw=True, max_new_tokens=24)
    assert plain.token_ids != answer.token_ids
    both = model.generate([prompt, prompt], raw=True, max_new_tokens=24, repetition_penalty=penalty)
    assert [a.token_ids for a in both] == [answer.token_ids] * 2


def _raw(prompt):
    from minillava.generation.request import Request

    return Request(raw=prompt)


@pytest.mark.parametrize("min_p", [0.02, 0.3, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p):
    transformers = pytest.importorskip("transformers")
    logits_BV = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)) * 2
    warped_BV = transformers.MinPLogitsWarper(min_p)(None, logits_BV.clone())
    kept = set(warped_BV[0].isfinite().nonzero().flatten().tolist())
    drawn = set()
    sampler = Sampler(1, 2000, torch.device("cpu"))
    sampler.enter(0, Sampling(1.0, min_p=min_p, seed=3), 2000)
    for _ in range(2000):
        drawn.add(int(sampler(logits_BV, slice(0, 1), frozenset(sampler.kind_B.tolist()))))
    assert drawn <= kept and len(drawn) >= 0.7 * len(kept)
    for bad in (Sampling(min_p=2.0), Sampling(repetition_penalty=0.0)):
        with pytest.raises(UserError, match="use"):
            bad.check()
    GREEDY.check()


def test_one_text_where_a_list_may_be_is_one_of_one(model):
    """Not its letters."""
    assert [choice.text for choice in model.score(TEXT, choices="yes")] == ["yes"]
    with pytest.raises(UserError, match=r"dog\.jpg: no such image file"):
        model.conversation("dog.jpg").ask(TEXT)
    with pytest.raises(UserError, match=r"cannot be fetched from host\.invalid"):
        model.generate(TEXT, "https://host.invalid/a.png", fetch="host.invalid")


COUNT = """
import sys
import minillava, minillava.kernels
from minillava import LLaVA

ours, passed = tuple(minillava.__path__[0:1] + minillava.kernels.__path__[0:1]), {}


def watch(frame, event, _):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(ours):
        if not code.co_name.endswith(("comp>", "genexpr>")):  # of which newer Pythons make no call
            passed[code.co_filename, code.co_qualname] = None


model = LLaVA.from_pretrained("nano", device="cpu")
sys.setprofile(watch)
model.generate("What color is the moon?", images=sys.argv[1:])
sys.setprofile(None)
print(*(f"{path}: {name}" for path, name in passed), sep="\\n")
"""


def test_an_answer_passes_through_few_functions(tmp_path):
    """The first one of the model that ships, from the call of `generate` until it is back: a reader's way."""
    demo_scene()[0].save(tmp_path / "demo.png")
    command = [sys.executable, "-c", COUNT, tmp_path / "demo.png"]
    passed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert 100 < len(passed) <= 130, "\n".join(passed)
