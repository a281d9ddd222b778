"""The built-in world: drawn scenes with captions and questions, so that everything here runs with no download.

A scene is one to five things on a 3 x 3 board, each with a color, a shape and a size; where it stands in its square,
how it is turned, its exact tint and the background vary. Everything follows from a seed. One color of every shape is
held out (`HELD_OUT`): no picture, caption or question of the training split ever pairs the two, so the test split
`held_out` asks about things that the model has never seen or read of.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import cos, pi, sin
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from minillava.chat.messages import Message

SIDE = 64  # pixels of a picture
CELL = SIDE / 3
COLORS = {
    "red": (214, 40, 46),
    "orange": (240, 138, 30),
    "yellow": (242, 216, 52),
    "green": (58, 160, 62),
    "cyan": (62, 200, 208),
    "blue": (44, 84, 206),
    "purple": (132, 60, 176),
    "pink": (244, 140, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
SIZES = {"small": (5.0, 6.0), "large": (8.2, 9.6)}  # radius in pixels
PLACES = ("top-left", "top", "top-right", "left", "middle", "right", "bottom-left", "bottom", "bottom-right")
HELD_OUT = frozenset((color, SHAPES[(3 * i + 1) % 8]) for i, color in enumerate(COLORS))
MAX_THINGS = 5
DESCRIBE = 0.05  # share of conversations that end with a description
KINDS = ("color", "shape", "size", "place", "count", "exist", "relation", "what")


@dataclass(frozen=True)
class Thing:
    """One drawn thing, by the words that name it."""

    color: str
    shape: str
    size: str
    cell: int  # index into PLACES, row by row

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"

    @property
    def held_out(self) -> bool:
        return (self.color, self.shape) in HELD_OUT


VALUES: dict[str, Sequence[Any]] = {"color": [*COLORS], "shape": SHAPES, "size": [*SIZES], "cell": range(9)}


def all_things() -> list[Thing]:
    """Every thing that there can be, those of held-out combinations among them."""
    return [Thing(*values) for values in itertools.product(*VALUES.values())]


def rivals(thing: Thing) -> dict[str, list[Thing]]:
    """For each attribute, the things that agree with this one in all others (itself among them)."""
    return {name: [dataclasses.replace(thing, **{name: v}) for v in values] for name, values in VALUES.items()}


@dataclass(frozen=True)
class Scene:
    """Things on the board, in reading order."""

    things: tuple[Thing, ...]
    seed: int  # of everything that has no name: tints, positions inside the squares, turns, background

    def draw(self) -> np.ndarray:
        """The picture, uint8 [64, 64, 3]."""
        rng = random.Random(self.seed)
        canvas = _background(rng)
        for thing in self.things:
            _paint(canvas, thing, rng)
        return np.rint(canvas.clip(0, 255)).astype(np.uint8)

    def image(self) -> Image.Image:
        return Image.fromarray(self.draw())


@dataclass(frozen=True)
class Question:
    """A question about a scene and its only right answer."""

    kind: str
    text: str
    answer: str
    about_held_out: bool = False  # a thing of a held-out combination is asked for


# ---------------------------------------------------------------------------------------------------------- drawing


def _background(rng: random.Random) -> np.ndarray:
    """A dim slope of one tint with grain, float32 [64, 64, 3]."""
    grey = rng.uniform(20, 105)
    tint = [grey + rng.uniform(-14, 14) for _ in range(3)]
    angle, strength = rng.uniform(0, 2 * pi), rng.uniform(0, 18)
    start = rng.randrange(_GRAIN_LENGTH - SIDE * SIDE)
    slope = _grain()[start : start + SIDE * SIDE].reshape(SIDE, SIDE) + np.float32(strength * cos(angle)) * _ACROSS
    slope += np.float32(strength * sin(angle)) * _ACROSS[:, None]
    canvas = np.empty((SIDE, SIDE, 3), np.float32)
    for channel, level in enumerate(tint):
        np.add(slope, np.float32(level), out=canvas[:, :, channel])
    return canvas


_ACROSS = np.linspace(-1, 1, SIDE, dtype=np.float32)
_GRAIN_LENGTH = 1 << 16


@lru_cache(maxsize=1)
def _grain() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, _GRAIN_LENGTH).astype(np.float32)


_VARIANTS = 24  # sprites of each shape and size: radius, turn and position below a pixel
_BOX = 28  # pixels a side of a sprite


def _paint(canvas: np.ndarray, thing: Thing, rng: random.Random) -> None:
    mask = _sprite(thing.shape, thing.size, rng.randrange(_VARIANTS))
    color = [level + rng.uniform(-16, 16) for level in COLORS[thing.color]]
    reach = CELL / 2 - SIZES[thing.size][1] + 0.5
    row, column = divmod(thing.cell, 3)
    left = round((column + 0.5) * CELL + rng.uniform(-reach, reach) - _BOX / 2)
    top = round((row + 0.5) * CELL + rng.uniform(-reach, reach) - _BOX / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + _BOX, SIDE), min(top + _BOX, SIDE)
    alpha = mask[y0 - top : y1 - top, x0 - left : x1 - left, None]
    view = canvas[y0:y1, x0:x1]
    view += alpha * (np.array(color, np.float32) - view)


@cache
def _sprite(shape: str, size: str, variant: int) -> np.ndarray:
    """Coverage of one drawn shape, float32 [28, 28] in 0..1; drawn eight times larger and averaged down."""
    rng = random.Random(f"{shape} {size} {variant}")
    k = 8
    radius, turn = rng.uniform(*SIZES[size]) * k, rng.uniform(-0.22, 0.22)
    cx, cy = (_BOX / 2 + rng.uniform(-0.5, 0.5)) * k, (_BOX / 2 + rng.uniform(-0.5, 0.5)) * k
    image = Image.new("L", (_BOX * k, _BOX * k))
    draw = ImageDraw.Draw(image)

    def disc(x: float, y: float, r: float, fill: int = 255) -> None:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def polygon(points: list[tuple[float, float]]) -> None:
        """Points in units of the radius, turned about the centre."""
        c, s = cos(turn), sin(turn)
        draw.polygon([(cx + radius * (x * c - y * s), cy + radius * (x * s + y * c)) for x, y in points], fill=255)

    def spokes(count: int, radii: tuple[float, ...], start: float) -> list[tuple[float, float]]:
        return [(radii[i % len(radii)] * cos(a), radii[i % len(radii)] * sin(a))
                for i, a in enumerate(start + 2 * pi * i / count for i in range(count))]  # fmt: skip

    if shape == "circle":
        disc(cx, cy, 0.92 * radius)
    elif shape == "ring":
        disc(cx, cy, radius)
        disc(cx, cy, 0.52 * radius, fill=0)
    elif shape == "moon":
        disc(cx, cy, radius)
        disc(cx + 0.5 * radius * cos(turn), cy + 0.5 * radius * sin(turn), 0.78 * radius, fill=0)
    elif shape == "square":
        polygon(spokes(4, (1.14,), pi / 4))
    elif shape == "triangle":
        polygon(spokes(3, (1.15,), -pi / 2))
    elif shape == "star":
        polygon(spokes(10, (1.15, 0.46), -pi / 2))
    elif shape == "cross":
        a, b = 0.34, 1.0
        polygon(
            [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
        )
    else:  # heart: 16 sin^3 and its companion, the usual parametric curve
        ts = [2 * pi * i / 60 for i in range(60)]
        curve = [(16 * sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t))) for t in ts]
        polygon([(x / 16, (y - 2.5) / 16 + 0.1) for x, y in curve])
    return np.asarray(image.reduce(k), np.float32) / 255


# ----------------------------------------------------------------------------------------------------------- scenes


def make_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene of the seen combinations; with `held_out`, at least one thing is of a held-out one."""
    number = rng.randint(1, MAX_THINGS)
    cells = rng.sample(range(9), number)
    # Often few colors or few shapes: then a question has to bind the two instead of spotting one.
    colors = rng.sample(list(COLORS), rng.choice((2, 3, 8)))
    shapes = rng.sample(SHAPES, rng.choice((2, 3, 8)))
    things = []
    for i, cell in enumerate(cells):
        if held_out and i == 0:
            color, shape = rng.choice(sorted(HELD_OUT))
        else:
            color, shape = rng.choice(colors), rng.choice(shapes)
            while (color, shape) in HELD_OUT:
                color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        things.append(Thing(color, shape, rng.choice(list(SIZES)), cell))
    things.sort(key=lambda t: t.cell)
    return Scene(tuple(things), rng.getrandbits(32))


def scenes(seed: int, split: str, start: int = 0) -> Iterator[Scene]:
    """Endless scenes of a split: train, unseen (same pairs, other scenes) or held_out; item i is always the same."""
    for i in itertools.count(start):
        yield make_scene(random.Random(f"{split} {seed} {i}"), held_out=split == "held_out")


def at(cell: int) -> str:
    return "in the middle" if PLACES[cell] == "middle" else f"at the {PLACES[cell]}"


def caption(scene: Scene, rng: random.Random, shuffle: bool = False) -> str:
    """All things with all that has a name, in reading order unless `shuffle`; place first or last, as rng has it."""
    things = rng.sample(scene.things, len(scene.things)) if shuffle else scene.things
    if rng.random() < 0.5:
        return ", ".join(f"a {t} {at(t.cell)}" for t in things) + "."
    return ", ".join(f"{at(t.cell)} a {t}" for t in things) + "."


# -------------------------------------------------------------------------------------------------------- questions


def _unique(scene: Scene, thing: Thing, *attributes: str) -> bool:
    """Whether no other thing agrees with this one in all of these attributes."""
    return all(
        other is thing or any(getattr(other, a) != getattr(thing, a) for a in attributes) for other in scene.things
    )


def _ask_look(scene: Scene, rng: random.Random, asked: str) -> Question | None:
    """The color or the shape of a thing that is named by place, or by the other of the two and what else it takes."""
    t = rng.choice(scene.things)
    by, name = ("shape", t.shape) if asked == "color" else ("color", f"{t.color} thing")
    if rng.random() < 0.3:
        text = f"the thing {at(t.cell)}"
    elif _unique(scene, t, by):
        text = f"the {name}"
    elif _unique(scene, t, by, "size"):
        text = f"the {t.size} {name}"
    else:
        text = f"the {name} {at(t.cell)}"
    return Question(asked, f"What {asked} is {text}?", getattr(t, asked), t.held_out)


def _ask_one(scene: Scene, rng: random.Random, asked: str) -> Question | None:
    """The size or the place of a thing that color and shape tell from all others."""
    t = rng.choice(scene.things)
    if not _unique(scene, t, "color", "shape"):
        return None
    words, answer = ("How large", t.size) if asked == "size" else ("Where", at(t.cell))
    return Question(asked, f"{words} is the {t.color} {t.shape}?", answer, t.held_out)


def _ask_count(scene: Scene, rng: random.Random, asked: str) -> Question | None:
    t = rng.choice(scene.things)
    attribute = rng.choice(("", "color", "shape", "size"))
    if not attribute:
        return Question(asked, "How many things are there?", str(len(scene.things)), t.held_out)
    value = getattr(t, attribute)
    if rng.random() < 0.25:  # sometimes of what is not there
        value = rng.choice(VALUES[attribute])
    text = plural(value) if attribute == "shape" else f"{value} things"
    answer = sum(getattr(o, attribute) == value for o in scene.things)
    return Question(asked, f"How many {text} are there?", str(answer), t.held_out and getattr(t, attribute) == value)


def _ask_exist(scene: Scene, rng: random.Random, asked: str) -> Question | None:
    """Half yes; most of the rest pair a color and a shape that are both there, on different things."""
    t = rng.choice(scene.things)
    if rng.random() < 0.5:
        return Question(asked, f"Is there {an(t.color)} {t.shape}?", "yes", t.held_out)
    there = {(o.color, o.shape) for o in scene.things}
    color, shape = rng.choice(scene.things).color, rng.choice(scene.things).shape
    if (color, shape) in there:
        color, shape = (rng.choice(list(COLORS)), shape) if rng.random() < 0.5 else (color, rng.choice(SHAPES))
    if (color, shape) in there or (color, shape) in HELD_OUT:
        return None
    near = any(o.held_out and (o.color == color or o.shape == shape) for o in scene.things)
    return Question(asked, f"Is there {an(color)} {shape}?", "no", near)


def _ask_relation(scene: Scene, rng: random.Random, asked: str) -> Question | None:
    """Where one thing stands seen from another, sideways or up and down."""
    if len(scene.things) < 2:
        return None
    a, b = rng.sample(scene.things, 2)
    sideways = rng.random() < 0.5
    at_a, at_b = (t.cell % 3 if sideways else t.cell // 3 for t in (a, b))
    if at_a == at_b or not (_unique(scene, a, "color", "shape") and _unique(scene, b, "color", "shape")):
        return None
    before, after = ("left", "right") if sideways else ("above", "below")
    of = " of" if sideways else ""
    text = f"Is the {a.color} {a.shape} {before} or {after}{of} the {b.color} {b.shape}?"
    return Question(asked, text, before if at_a < at_b else after, a.held_out or b.held_out)


def _ask_what(scene: Scene, rng: random.Random, asked: str) -> Question | None:
    cell = rng.choice(scene.things).cell if rng.random() < 0.85 else rng.randrange(9)
    t = next((t for t in scene.things if t.cell == cell), None)
    return Question(asked, f"What is {at(cell)}?", f"a {t}" if t else "nothing", t is not None and t.held_out)


_ASK = dict(zip(KINDS, (_ask_look, _ask_look, _ask_one, _ask_one, _ask_count, _ask_exist, _ask_relation, _ask_what)))


def an(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def questions(scene: Scene, rng: random.Random, number: int, kinds: tuple[str, ...] = KINDS) -> list[Question]:
    """Up to `number` different questions about a scene, kinds drawn evenly."""
    found: dict[str, Question] = {}
    for _ in range(4 * number):
        if len(found) == number:
            break
        kind = rng.choice(kinds)
        question = _ASK[kind](scene, rng, kind)
        if question is not None:
            found.setdefault(question.text, question)
    return list(found.values())


def conversation(scene: Scene, rng: random.Random, turns: int, opening: str) -> tuple[Message, ...]:
    """Questions about a scene as one conversation; `opening` (a picture's marker, or words) stands before the first.

    Some (a share of DESCRIBE) end with the request for a description; at the end it gives nothing away.
    """
    pairs = [(q.text, q.answer) for q in questions(scene, rng, turns)]
    if not pairs or rng.random() < DESCRIBE:
        pairs.append(("Describe the picture.", caption(scene, rng)))
    return spoken(opening, pairs)


def spoken(opening: str, pairs: Sequence[tuple[str, str]]) -> tuple[Message, ...]:
    messages: list[Message] = []
    for text, answer in pairs:
        text = text if messages else f"{opening}\n{text}"
        messages += [Message("user", text), Message("assistant", answer)]
    return tuple(messages)


def demo_scene() -> tuple[Image.Image, str, str]:
    """A picture of held-out combinations, a question about it, and the right answer."""
    rng = random.Random("demo")
    for scene in scenes(0, "held_out"):
        asked = [q for q in questions(scene, rng, 8, ("color",)) if q.about_held_out]
        if len(scene.things) == 4 and asked:
            return scene.image(), asked[0].text, asked[0].answer
    raise AssertionError("scenes never end")
