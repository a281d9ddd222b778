"""Samples that a template cannot hold are found before a run, in the whole file, by the run and by --inspect."""

import dataclasses
import json

import pytest
from helpers import talk

from minillava.config import ChatConfig
from minillava.data.llava_json import prompt_check
from minillava.data.mixture import read_data
from minillava.errors import UserError
from minillava.recipe import DataConfig

CUT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'][:6] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_PICTURE = CUT.replace("m['content'][:6]", "m['content'] | replace('<image>', '')")
SYSTEM = [{"from": "system", "value": "Be brief."}]


def row(*turns, **more):
    return {"conversations": list(turns), **more}


GOOD = [
    row(*talk("What of <video>, the word?", "It is <b>bold</b>."), id="word"),
    row(*SYSTEM, *talk("Hi", "Hello"), id="system"),
    row(*talk("Two  blanks \n and a break", " x "), id="blanks"),
]
WRONG = {
    "a stop token": (row(*talk("What is </s>?", "x")), {}, "a text holds '</s>', which is a special token"),
    "in an answer": (row(*talk("Q", "<pad>")), {}, "a text holds '<pad>'"),
    "a video's marker": (row(*talk("What of <video>?", "x")), {"video_token": "<video>"}, "a text holds '<video>'"),
    "the checkpoint's own": (row(*talk("<|image_pad|>", "x")), {"image_token": "<|image_pad|>"}, "'<|image_pad|>'"),
    "no picture": (row(*talk("Hi", "x")), {"template": "plain"}, "takes one <image> and one caption"),
    "no place": (row(*SYSTEM, *talk("Hi", "x")), {"template": "llama_2x"}, "is unknown"),
    "text left out": (row(*talk("A long question", "x")), {"template": "jinja", "jinja": CUT},
                      "leaves out text of message 1, 'A long question'"),
    "picture left out": (row(*talk("<image>", "x"), image="a.png"), {"template": "jinja", "jinja": NO_PICTURE},
                         "leaves out pictures or videos of 1"),
}  # fmt: skip


def chat_of(tokenizer, **values):
    return dataclasses.replace(ChatConfig(image_token_id=-200, video_token_id=-201, bos_id=tokenizer.bos_id), **values)


@pytest.fixture
def read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")

    def read(rows, check, **keys):
        (tmp_path / "data.json").write_text(json.dumps(rows))
        return read_data([DataConfig(str(tmp_path / "data.json"), str(tmp_path), **keys)], 0, check)

    return read


def test_what_can_be_held_is_left_alone(read, tiny_tokenizer):
    assert len(read(GOOD, prompt_check(chat_of(tiny_tokenizer), tiny_tokenizer))) == 3


@pytest.mark.parametrize("case", list(WRONG))
def test_what_cannot_is_named_wherever_it_stands(read, tiny_tokenizer, capsys, case):
    wrong, values, words = WRONG[case]
    check = prompt_check(chat_of(tiny_tokenizer, **values), tiny_tokenizer)
    fine = row(*talk("<image>", "Red"), image="a.png") if values.get("template") == "plain" else row(*talk("Hi", "Red"))
    rows = [fine] * 199 + [wrong | {"id": "bad"}]
    with pytest.raises(UserError) as caught:
        read(rows if "unknown" not in words else rows[-1:], check)
    assert "sample 'bad' (number" in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)
    if "unknown" not in words and "picture" not in case:
        assert len(read(rows, check, bad="skip", max_bad=0.005)) == 199
        assert "1 of 200 (0.50%) are skipped, the first: " in capsys.readouterr().out
