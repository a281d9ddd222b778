"""LLaVA's two stages on the built-in world, and how good the result is on scenes that it has never seen."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from minillava import chat, shapes
from minillava.chat import Message
from minillava.config import UserError
from minillava.data import MARKER, Example, Sample
from minillava.image import prepare
from minillava.layout import image_tokens
from minillava.llava import LLaVA
from minillava.pretrain import exact
from minillava.tasks import LLaVATask
from minillava.tokenizer import Tokenizer

PER_SCENE = 4  # questions about each scene of an evaluation


class ShapesTask(LLaVATask):
    """`shapes`: samples (how many there are), turns (0: captions), scenes (of each split in an evaluation)."""

    def read_samples(self, seed: int) -> tuple[Sequence[Sample], Sequence[Sample]]:
        known = {"samples": 20000, "turns": 10, "scenes": 100}
        unknown = self.stage.shapes.keys() - known.keys()
        if unknown:
            raise UserError(f"stage '{self.stage.name}': shapes.{unknown.pop()} is unknown; known: {', '.join(known)}")
        options = known | self.stage.shapes
        self.scenes = options["scenes"]
        return shapes.Samples(options["samples"], options["turns"], seed), []

    def evaluate(self, call: Callable[..., Any]) -> dict[str, float]:
        if self.config.chat.template == "plain":
            return {}
        measured = {}
        for split in ("unseen", "held_out"):
            asked = ask(split, self.scenes)
            right = answered(call, self.run.model, self.run.tokenizer, asked)
            measured[split] = sum(right) / len(right)
        return measured


Asked = list[tuple[shapes.Scene, shapes.Question]]


def ask(split: str, count: int, seed: int = 0) -> Asked:
    """Questions about `count` scenes of a split; in held_out all are about a thing of a held-out combination."""
    asked: Asked = []
    for number, scene in enumerate(itertools.islice(shapes.scenes(seed, split), count)):
        rng = random.Random(f"{split} questions {seed} {number}")
        found = [q for q in shapes.questions(scene, rng, 40) if q.about_held_out or split != "held_out"]
        kinds = rng.sample(shapes.KINDS, PER_SCENE)
        asked += [(scene, next(q for q in found if q.kind == kind)) for kind in kinds if any(q.kind == kind for q in found)]
    return asked


def answered(call: Callable[..., Any], model: LLaVA, tokenizer: Tokenizer, asked: Asked, blank: bool = False) -> list[bool]:
    """Which questions are answered exactly, each asked alone in a first turn. `blank`: the picture's pixels are zero."""
    config = model.config
    spans = [image_tokens(config, shapes.SIDE, shapes.SIDE)]
    examples = []
    for scene, question in asked:
        messages = (Message("user", f"{MARKER}\n{question.text}"), Message("assistant", question.answer))
        ids, labels = chat.encode(config.chat, tokenizer, messages, spans, generate=False)
        pixels_NCHW = prepare(scene.image(), config.image)[None]
        examples.append(Example(ids, labels, torch.zeros_like(pixels_NCHW) if blank else pixels_NCHW))
    return exact(call, examples)
