"""What is known of a picture without looking at it: captions and boxes, from COCO's files or as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillava.errors import UserError
from minillava.files import misfit, parse_json, read_text

SLACK = 0.002  # by which a box may lie outside the picture: COCO's are rounded


@dataclass(frozen=True)
class Box:
    """A thing and its corners (left, top, right, bottom) as shares of the picture's width and height."""

    category: str
    corners: tuple[float, float, float, float]


@dataclass
class Scene:
    """A picture by its name, and what people wrote and drew about it."""

    id: str
    image: str
    captions: list[str] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)

    def __str__(self) -> str:
        """As a language model reads it: captions, an empty line, boxes."""
        boxes = (f"{box.category}: [{', '.join(f'{x:.3f}' for x in box.corners)}]" for box in self.boxes)
        return "\n".join([*self.captions, "", *boxes]).strip()


def read_scenes(paths: Sequence[Path]) -> list[Scene]:
    """The pictures of all files, what several say of one (COCO has captions and boxes apart) put together.

    A file is COCO's JSON (images and annotations), or JSON lines of id, image, captions and instances (category, bbox).
    Raises UserError that names the file and the picture, also for a box outside it and for one without captions.
    """
    scenes: dict[str, Scene] = {}
    for path in paths:
        text = read_text(path)
        for found in (_read_coco if _is_coco(text) else _read_lines)(path, text):
            scene = scenes.setdefault(found.id, Scene(found.id, found.image))
            scene.captions += found.captions
            scene.boxes += found.boxes
    bare = [scene for scene in scenes.values() if not scene.captions]
    if bare:
        raise UserError(f"{paths[0]}: picture {bare[0].id} has no captions ({len(bare):,} have none); add their file")
    if not scenes:
        raise UserError(f"{paths[0]}: no pictures in it; give COCO's JSON, or JSON lines with captions and instances")
    return list(scenes.values())


def _is_coco(text: str) -> bool:
    """By content: one object with annotations, not one a line."""
    try:
        first = json.loads(text.partition("\n")[0])
    except (ValueError, RecursionError):
        return True  # an object over several lines
    return isinstance(first, dict) and "annotations" in first


def _read_coco(path: Path, text: str) -> list[Scene]:
    """COCO's captions_*.json or instances_*.json; crowds, whose boxes hold many things, are left out."""
    values = parse_json(text, path)
    try:
        pictures = {picture["id"]: picture for picture in values["images"]}
        names = {category["id"]: category["name"] for category in values.get("categories", [])}
        scenes = {number: Scene(str(number), picture["file_name"]) for number, picture in pictures.items()}
        for note in values["annotations"]:
            scene, picture = scenes[note["image_id"]], pictures[note["image_id"]]
            if "caption" in note:
                scene.captions.append(_line(note["caption"]))
            elif not note.get("iscrowd"):
                x, y, w, h = note["bbox"]
                width, height = picture["width"], picture["height"]
                corners = x / width, y / height, (x + w) / width, (y + h) / height
                scene.boxes.append(_box(names[note["category_id"]], corners, f"{path}: picture {scene.id}"))
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not COCO's JSON ({misfit(error)}); expected images and annotations") from None
    return list(scenes.values())


def _read_lines(path: Path, text: str) -> list[Scene]:
    """JSON lines; corners are shares of the picture, or pixels where width and height stand beside them."""
    scenes = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        row = parse_json(line, where)
        try:
            image, captions = row["image"], row["captions"]
            if not isinstance(image, str) or not isinstance(captions, list):
                raise TypeError
            scene = Scene(str(row.get("id", image)), image, [_line(caption) for caption in captions])
            width, height = row.get("width") or 1, row.get("height") or 1
            for thing in row.get("instances") or []:
                left, top, right, bottom = thing["bbox"]
                corners = left / width, top / height, right / width, bottom / height
                scene.boxes.append(_box(thing["category"], corners, where))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise UserError(
                f"{where}: {misfit(error)}; expected image, captions and instances of category and bbox"
            ) from None
        scenes.append(scene)
    return scenes


def _line(text: Any) -> str:
    return " ".join(str(text).split())


def _box(category: str, corners: tuple[float, ...], where: str) -> Box:
    if not in_picture(corners):
        shown = ", ".join(f"{x:.3g}" for x in corners)
        raise UserError(f"{where}: box [{shown}] of {category} is not inside the picture; check its width and height")
    left, top, right, bottom = (min(max(x, 0.0), 1.0) for x in corners)
    return Box(category, (left, top, right, bottom))


def in_picture(corners: Sequence[float]) -> bool:
    """Whether (left, top, right, bottom) are in order and inside."""
    left, top, right, bottom = corners
    return -SLACK <= left <= right <= 1 + SLACK and -SLACK <= top <= bottom <= 1 + SLACK
