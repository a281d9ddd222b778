"""The built-in world: the same from the same seed, held-out pairs kept out, answers true of the scene."""

import itertools
import random
import re

import numpy as np
import pytest

from minillava.data.llava_json import MARKER
from minillava.synthetic import shapes
from minillava.synthetic.samples import Samples

PAIRS = {f"{color} {shape}{s}" for color, shape in shapes.HELD_OUT for s in ("", "s", "es")}


def take(split: str, count: int, seed: int = 0) -> list[shapes.Scene]:
    return list(itertools.islice(shapes.scenes(seed, split), count))


def test_scenes_and_pictures_repeat_and_can_be_entered_anywhere():
    again = take("train", 30)
    assert take("train", 30) == again
    assert next(shapes.scenes(0, "train", start=17)) == again[17]
    assert np.array_equal(again[3].draw(), again[3].draw())
    assert take("unseen", 30) != again and take("train", 30, seed=1) != again


def test_training_never_pairs_what_is_held_out():
    """Neither in a picture nor in a word of a caption, a question or an answer."""
    assert {color for color, _ in shapes.HELD_OUT} == set(shapes.COLORS)
    assert {shape for _, shape in shapes.HELD_OUT} == set(shapes.SHAPES)
    samples = [*Samples(300, 0, ("picture",), 6), *Samples(100, 0, ("caption",))]
    for sample in samples:
        text = " ".join(message.text for message in sample.messages)
        assert not any(re.search(rf"\b{pair}\b", text) for pair in PAIRS), text
    for split in ("train", "unseen"):
        assert not any(thing.held_out for scene in take(split, 500) for thing in scene.things)


def test_held_out_scenes_hold_and_ask_about_held_out_things():
    scenes = take("held_out", 200)
    assert all(any(thing.held_out for thing in scene.things) for scene in scenes)
    asked = [q for i, scene in enumerate(scenes) for q in shapes.questions(scene, random.Random(i), 12)]
    about = [q for q in asked if q.about_held_out]
    assert {q.kind for q in about} == set(shapes.KINDS)
    assert {q.answer for q in about if q.kind == "exist"} == {"yes", "no"}


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_answers_are_true(kind):
    """Read each question back with a parser of its own and look the answer up in the scene."""
    checked = 0
    for i, scene in enumerate(take("unseen", 150)):
        for q in shapes.questions(scene, random.Random(i), 6, (kind,)):
            assert q.answer == look_up(scene, q.text), (q, scene)
            checked += 1
    assert checked > 100


def look_up(scene: shapes.Scene, question: str) -> str:
    words = re.findall(r"[\w-]+", question)
    singular = {shapes.plural(shape): shape for shape in shapes.SHAPES} | {shape: shape for shape in shapes.SHAPES}

    def things(words: list[str]) -> list[shapes.Thing]:
        found = list(scene.things)
        for word in words:
            if word in shapes.COLORS:
                found = [t for t in found if t.color == word]
            elif word in singular:
                found = [t for t in found if t.shape == singular[word]]
            elif word in shapes.SIZES:
                found = [t for t in found if t.size == word]
            elif word in shapes.PLACES:
                found = [t for t in found if shapes.PLACES[t.cell] == word]
        return found

    def only(words: list[str]) -> shapes.Thing:
        (thing,) = things(words)
        return thing

    match words[:2]:
        case ["What", "color"]:
            return only(words).color
        case ["What", "shape"]:
            return only(words).shape
        case ["How", "large"]:
            return only(words[2:]).size
        case ["Where", "is"]:
            place = shapes.PLACES[only(words).cell]
            return "in the middle" if place == "middle" else f"at the {place}"
        case ["How", "many"]:
            return str(len(things(words)))
        case ["Is", "there"]:
            return "yes" if things(words) else "no"
        case ["What", "is"]:
            found = things(words)
            return f"a {found[0].size} {found[0].color} {found[0].shape}" if found else "nothing"
    # Is the A B left or right of the C D?   Is the A B above or below the C D?
    i = words.index("or")
    a, b = only(words[: i - 1]), only(words[i + 2 :])
    (ya, xa), (yb, xb) = divmod(a.cell, 3), divmod(b.cell, 3)
    first, second, to_first = ("left", "right", xa < xb) if words[i - 1] == "left" else ("above", "below", ya < yb)
    assert (xa != xb if first == "left" else ya != yb) and words[i + 1] == second
    return first if to_first else second


def test_samples_are_in_llavas_format():
    samples = Samples(50, 0, ("picture",), 4)
    assert samples[7] == samples[7] and len(samples) == 50
    for sample in samples:
        assert sum(message.text.count(MARKER) for message in sample.messages) == len(sample.images) == 1
        assert [m.role for m in sample.messages] == ["user", "assistant"] * (len(sample.messages) // 2)
        assert sample.images[0].image().size == (shapes.SIDE, shapes.SIDE)
    caption = Samples(50, 0, ("caption",))[7].messages
    assert caption[0].text == MARKER and len(caption) == 2


def test_things_stay_inside_their_squares():
    """The brightest change against the same background lies in the named square."""
    for cell in range(9):
        scene = shapes.Scene((shapes.Thing("yellow", "circle", "small", cell),), seed=cell)
        empty = shapes.Scene((), seed=cell)
        changed = np.abs(scene.draw().astype(int) - empty.draw()).sum(2)
        y, x = (int(v) for v in np.argwhere(changed > changed.max() / 2).mean(0))
        assert (int(y / shapes.CELL), int(x / shapes.CELL)) == divmod(cell, 3)
