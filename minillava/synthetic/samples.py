"""Samples of the built-in world in every form that LLaVAs learn from: captions, questions, text, pictures, clips.

python -m minillava.synthetic.samples FOLDER [NUMBER] writes so many of each kind, JSON and media, for any recipe.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from minillava.chat.messages import Message
from minillava.data.files import MediaStore, StoredMedia
from minillava.data.llava_json import MARKER, VIDEO_MARKER, Sample
from minillava.synthetic.shapes import Scene, at, caption, conversation, make_scene, questions, spoken

KINDS = ("caption", "picture", "text", "several", "video")
WAYS = {"right": 1, "left": -1, "down": 3, "up": -3}  # one step on the board, as a change of the cell's number


@lru_cache(maxsize=1024)  # asked for twice: for the words, then for the pictures
def _scenes(kind: str, seed: int, index: int) -> tuple[Scene, ...]:
    """The pictures of a sample, or the frames of its clip."""
    rng = random.Random(f"train {seed} {index}")
    if kind == "video":
        return _clip(rng)
    return tuple(make_scene(rng) for _ in range(rng.randint(2, 4) if kind == "several" else 1))


class Samples(MediaStore, Sequence[Sample]):
    """`number` training samples in LLaVA's format, of the kinds in turn, made when they are asked for; the same index
    gives the same sample. A conversation has up to `turns` questions, and at least half as many.
    """

    def __init__(self, number: int, seed: int, kinds: tuple[str, ...] = KINDS, turns: int = 3):
        self.number, self.seed, self.kinds, self.turns = number, seed, kinds, turns

    def __len__(self) -> int:
        return self.number

    def scenes(self, index: int) -> tuple[Scene, ...]:
        return _scenes(self.kinds[index % len(self.kinds)], self.seed, index)

    def __getitem__(self, index):  # type: ignore[override]
        if not 0 <= index < self.number:
            raise IndexError(index)
        kind = self.kinds[index % len(self.kinds)]
        scenes, rng = self.scenes(index), random.Random(f"words {self.seed} {index}")
        count = {"text": 0, "several": len(scenes)}.get(kind, 1)
        media = tuple(StoredMedia(self, kind == "video", f"{index}-{n}") for n in range(count))
        if kind == "caption":
            messages: tuple[Message, ...] = (Message("user", MARKER), Message("assistant", caption(scenes[0], rng)))
        elif kind == "several":
            messages = _about_several(scenes, rng, self.turns)
        elif kind == "video":
            messages = _about_clip(scenes)
        else:
            turns = rng.randint((self.turns + 1) // 2, self.turns)
            opening = MARKER if kind == "picture" else caption(scenes[0], rng)
            messages = conversation(scenes[0], rng, turns, opening)
        return Sample(f"{kind}-{index}", media, messages, kind)

    def has(self, name: str) -> bool:
        return name.split("-")[0].isdigit() and int(name.split("-")[0]) < self.number

    def get(self, name: str) -> Any:
        """A picture, or a clip's frames. Of several pictures some are wide or high, so that tiles have work."""
        index, number = map(int, name.split("-"))
        scenes = self.scenes(index)
        kind = self.kinds[index % len(self.kinds)]
        if kind == "video":
            return [scene.image() for scene in scenes]
        picture = scenes[number].image()
        if kind != "several":
            return picture
        side = picture.width
        size = random.Random(name).choice([(side, side), (2 * side, side), (side, 3 * side)])
        return picture.resize(size, Image.Resampling.NEAREST)


def _about_several(scenes: Sequence[Scene], rng: random.Random, turns: int) -> tuple[Message, ...]:
    """Questions that name the picture they are about; half of the samples have the markers inside the text."""
    if rng.random() < 0.5:
        opening = "\n".join([MARKER] * len(scenes))
    else:
        opening = " ".join(f"Picture {n}: {MARKER}" for n in range(1, len(scenes) + 1))
    pairs = []
    for _ in range(turns):
        n = rng.randrange(len(scenes))
        pairs += [(f"In picture {n + 1}: {q.text}", q.answer) for q in questions(scenes[n], rng, 1)]
    return spoken(opening, pairs or [("How many pictures are there?", str(len(scenes)))])


def _clip(rng: random.Random) -> tuple[Scene, ...]:
    """A thing that crosses the board, three squares in a line, for three to nine frames."""
    scene = make_scene(rng)
    way = rng.choice(list(WAYS))
    line = rng.randrange(3)
    cells = [3 * line + i for i in range(3)] if way in ("right", "left") else [line + 3 * i for i in range(3)]
    if WAYS[way] < 0:
        cells.reverse()
    thing, hold = scene.things[0], rng.randint(1, 3)
    return tuple(replace(scene, things=(replace(thing, cell=cell),)) for cell in cells for _ in range(hold))


def _about_clip(scenes: Sequence[Scene]) -> tuple[Message, ...]:
    first, last = scenes[0].things[0], scenes[-1].things[0]
    step = (last.cell - first.cell) // 2
    way = next(way for way, by in WAYS.items() if by == step)
    asked = f"Which way does the {first.color} {first.shape} move?"
    return spoken(VIDEO_MARKER, [(asked, way), ("Where is it at the end?", at(last.cell))])


def write(folder: Path, number: int, seed: int = 0) -> dict[str, Path]:
    """A JSON file for each kind, with `number` samples; pictures and folders of frames under `folder`/media."""
    files = {}
    for kind in KINDS:
        samples, rows = Samples(number, seed, (kind,)), []
        for sample in samples:
            row: dict[str, Any] = {"id": sample.id}
            for medium in sample.media:
                pictures = samples.get(medium.name)
                path = folder / "media" / f"{kind}-{medium.name}"
                if isinstance(pictures, list):
                    path.mkdir(parents=True, exist_ok=True)
                    for n, frame in enumerate(pictures):
                        frame.save(path / f"{n}.png")
                else:
                    path = path.with_suffix(".png")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    pictures.save(path)
                row.setdefault("video" if medium.video else "image", []).append(path.name)
            names = {"user": "human", "assistant": "gpt"}
            row["conversations"] = [{"from": names[m.role], "value": m.text} for m in sample.messages]
            rows.append(row)
        files[kind] = folder / f"{kind}.json"
        files[kind].parent.mkdir(parents=True, exist_ok=True)
        files[kind].write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return files


if __name__ == "__main__":
    for kind, path in write(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100).items():
        print(f"{kind}: {path}")
