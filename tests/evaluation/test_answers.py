"""Scores of single answers: worked by hand from the papers' rules and from the official code's behaviour.

Rules of VQA and TextVQA were also compared with the official evaluators on 30,000 random cases each: no difference.
"""

import random

import pytest

from minillava.evaluation import answers as rules

TEN = ["red"] * 3 + ["Blue"] * 2 + ["green", "the green", "a  green", "two", "2"]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("red", (3 * 2 / 3 + 7 * 1) / 10),  # whoever said it is left out three times of ten
        ("Red", (3 * 2 / 3 + 7 * 1) / 10),  # case
        ("the red", (3 * 2 / 3 + 7 * 1) / 10),  # articles
        ("blue", (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("an green", (3 * 2 / 3 + 7 * 1) / 10),  # three spellings of one answer
        ("two", (2 * 1 / 3 + 8 * 2 / 3) / 10),  # number words are digits
        ("yellow", 0.0),
        ("", 0.0),
    ],
)
def test_vqa_accuracy_leaves_each_person_out(answer, score):
    assert rules.vqa(answer, TEN) == pytest.approx(score) == rules.textvqa(answer, TEN)


def test_where_all_agree_vqa_normalises_nothing_and_textvqa_does():
    assert rules.vqa("Yes", ["yes"] * 10) == 0 and rules.textvqa("Yes", ["yes"] * 10) == 1
    assert rules.vqa("yes\n", ["yes"] * 10) == 1


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The U.S.A.", "usa"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("a dog, a cat", "dog cat"),
        ("blue/green", "blue green"),
        ("1,000 dogs!", "1000 dogs"),
        ("well-known", "well known"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("None", "0"),
        ("It's", "it's"),
    ],
)
def test_normalisation_by_hand(text, plain):
    assert rules.normalised(text) == plain


def test_textvqas_own_normalisation():
    assert rules.textvqa_normalised("Joe's?") == "joe 's" and rules.textvqa_normalised("1,5") == "15"


def test_properties_of_vqa_accuracy():
    """It does not depend on the order of people, nor on case, articles and number words of the answer."""
    rng = random.Random(0)
    words = ["red", "two", "a dog", "don't know", "3.5", "black and white"]
    for _ in range(300):
        given = [rng.choice(words) for _ in range(10)]
        if len(set(given)) == 1:
            continue
        answer, score = (said := rng.choice(words)), rules.vqa(said, given)
        assert 0 <= score <= 1 and score == pytest.approx(rules.vqa(answer, rng.sample(given, 10)))
        for other in (answer.upper(), f"the {answer}", answer.replace("two", "2"), f" {answer}\n"):
            assert rules.vqa(other, given) == pytest.approx(score)
        assert score == pytest.approx(min(1.0, given.count(answer) * (10 - 1) / 30), abs=0.12)


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [("Yes.", "yes", 1), ("yes, it is", "yes", 0), ("left", "left", 1), ("the left", "left", 0)],
)
def test_gqa(answer, truth, score):
    assert rules.gqa(answer, truth) == score


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("0.5", "50%", 1),
        ("52%", "0.5", 1),
        ("-95", "-100", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),  # against nought texts are compared
        ("Blue", "blue", 1),
        ("1,000", "1000", 0),
    ],
)
def test_relaxed_accuracy(answer, truth, score):
    assert rules.relaxed(answer, truth) == score


@pytest.mark.parametrize(
    ("answer", "given", "score"),
    [
        ("hello world", ["Hello  World"], 1.0),
        ("helo", ["hello"], 0.8),
        ("abcd", ["abxy"], 0.5),
        ("abcd", ["axyz"], 0.0),  # 0.25 is below the threshold
        ("cat", ["dog", "cats"], 0.75),
        ("", ["x"], 0.0),
    ],
)
def test_anls(answer, given, score):
    assert rules.anls(answer, given) == pytest.approx(score)


def test_letters_of_scienceqa():
    for text, said in (("B", "B"), ("B. a dog", "B"), ("The answer is B.", "B"), ("b", ""), ("B.", ""), ("", ""),
                       ("AB", ""), ("The answer is A. No: The answer is B.", ""), ("F", "")):  # fmt: skip
        assert rules.letter(text) == said, text


def test_letters_elsewhere():
    for text, said in (("B", "B"), ("b", "B"), ("(C) dog", "C"), ("A. cat", "A"), ("D: x", "D"), ("A dog", "A"),
                       ("Apple", ""), ("", ""), ("E", "")):  # fmt: skip
        assert rules.first_letter(text) == said, text


def test_yes_and_no():
    for text, said in (("Yes", "yes"), ("No, there is not", "no"), ("There is no dog", "no"), ("Yes. No.", "yes"),
                       ("nothing", "yes"), ("NO", "yes"), ("It is not, no", "no"), ("", "yes")):  # fmt: skip
        assert rules.pope(text) == said, text
    for text, said in (("Yes.", "yes"), ("no", "no"), ("Y", "yes"), ("N", "no"), ("Not at all", "no"), ("x", "other"),
                       ("I think yes", "other"), ("", "other")):  # fmt: skip
        assert rules.mme(text) == said, text
