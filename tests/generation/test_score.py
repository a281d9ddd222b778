"""Log-probabilities of given answers: those of transformers, and of one pass over prompt and answer."""

import pytest
import torch
from helpers import tiny_pair
from PIL import Image

from minillava.chat.messages import Message
from minillava.errors import UserError
from minillava.generation import score as score_file
from minillava.generation.engine import Request
from minillava.generation.score import score
from minillava.media.visual import media
from minillava.processor import user_message

CHOICES = ["red", "it is blue", "the large circle is green, not red", "red"]


@pytest.fixture(scope="module", params=["qwen2", "mistral", "llama"])
def pair(request, tiny_tokenizer, tmp_path_factory):
    return tiny_pair(request.param, tiny_tokenizer, tmp_path_factory.mktemp("score"))


@pytest.mark.parametrize("pictures,raw", [(1, False), (2, False), (0, True)])
def test_they_are_transformers_own(pair, pictures, raw):
    """Each choice by itself behind the whole prompt there, all of them behind one prefill here."""
    theirs, engine = pair
    given = media([Image.effect_noise((40, 30), 50 + i).convert("RGB") for i in range(pictures)])
    messages = [user_message(engine.config.chat, "what color is it?", given)]
    request = Request(raw="what color is the circle? ") if raw else Request(messages, given)
    found = score(engine, request, CHOICES)
    assert [choice.text for choice in found] == CHOICES and found[0].logprobs == pytest.approx(found[3].logprobs)
    row = engine.row(0, request, {})
    pixels = torch.cat([picture.pixels_NCHW for picture in row.pictures]) if pictures else None
    for choice in found:
        ids = torch.tensor([*row.ids, *choice.token_ids])
        assert engine.tokenizer.decode(choice.token_ids).strip() == choice.text
        with torch.no_grad():
            logits_TV = theirs(input_ids=ids[None], pixel_values=pixels).logits[0]
        logprobs_TV = logits_TV.log_softmax(-1)[len(row.ids) - 1 : -1]
        wanted_T = logprobs_TV.gather(1, torch.tensor(choice.token_ids)[:, None])[:, 0]
        assert (torch.tensor(choice.logprobs) - wanted_T).abs().max() < 1e-5
        assert abs(choice.logprob - wanted_T.sum()) < 1e-5 * len(wanted_T)
    assert len({round(choice.logprob, 2) for choice in found}) == 3, "too alike to prove anything"


def test_many_choices_take_several_passes_and_the_prompt_one(pair, monkeypatch):
    _, engine = pair
    given = media([Image.new("RGB", (30, 30), "red")])
    request, seen = Request([user_message(engine.config.chat, "what?", given)], given), engine.pictures_seen
    wanted = score(engine, request, CHOICES)
    assert engine.pictures_seen == seen + 1
    for name, value in (("PASS_CHOICES", 2), ("PASS_TOKENS", 1), ("PASS_CHOICES", 1)):
        monkeypatch.setattr(score_file, name, value)
        for choice, other in zip(score(engine, request, CHOICES), wanted, strict=True):
            assert choice.token_ids == other.token_ids and choice.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_the_end_of_an_answer_is_not_counted(pair):
    """The tokens are those of a training sample's answer, but for what the template writes behind it."""
    _, engine = pair
    messages = [Message("user", "what?")]
    (choice,) = score(engine, Request(messages), ["red"])
    sample = engine.processor([*messages, Message("assistant", "red")]).ids
    at = len(engine.row(0, Request(messages), {}).ids)
    assert sample[at : at + len(choice.token_ids)] == list(choice.token_ids)
    assert sample[at + len(choice.token_ids) :] == [engine.tokenizer.eos_id]


def test_what_cannot_be_scored_is_refused(pair):
    _, engine = pair
    asked = Request([Message("user", "what?")])
    long = "red " * engine.config.decoder.max_positions
    for request, choices, error in (
        (asked, [], "no choices"),
        (asked, ["red", " "], "a choice is empty"),
        (asked, [long], "do not fit"),
        (asked, ["<image>"], "1 '<image>' in the text, but 0 pictures"),
        (Request(prompt_ids=[5, 6]), ["red"], "not behind ids"),
    ):
        with pytest.raises(UserError, match=error):
            score(engine, request, choices)
