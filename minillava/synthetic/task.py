"""LLaVA's two stages on the built-in world, and how good the result is on scenes that it has never seen."""

from __future__ import annotations

import itertools
import json
import random
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from minillava.chat.messages import Message
from minillava.chat.tokenizer import Tokenizer
from minillava.checkpoints.checkpoint import Checkpoint
from minillava.data.llava_json import Sample
from minillava.generation.engine import Engine, Request
from minillava.llava import LLaVAModel
from minillava.media.visual import Media
from minillava.processor import Processor, user_message
from minillava.synthetic import shapes
from minillava.synthetic.pretrain import exact_all
from minillava.synthetic.samples import Samples
from minillava.training import parallel
from minillava.training.llava_task import LLaVATask
from minillava.training.tasks import options

PER_SCENE = 4  # questions about each scene of an evaluation


class ShapesTask(LLaVATask):
    """Its options are in `minillava.training.tasks`."""

    def read_samples(self, seed: int) -> tuple[Sequence[Sample], Sequence[Sample]]:
        chosen = options(self.stage)
        self.scenes = chosen["scenes"]
        kind = "picture" if chosen["turns"] else "caption"
        return Samples(chosen["samples"], seed, (kind,), chosen["turns"]), []

    def evaluate(self, call: Callable[..., Any]) -> dict[str, float]:
        if self.config.chat.template == "plain":
            return {}
        measured = {}
        for split in ("unseen", "held_out"):
            right = answered(call, self.run.model, self.run.tokenizer, ask(split, self.scenes))
            measured[split] = sum(right) / len(right)
        return measured

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self.config.chat.template != "plain" and parallel.is_main():
            whole = parallel.world() == 1 and not self.stage.lora  # float32 adapters do not compute with a base in bf16
            model = self.run.model if whole else Checkpoint.open(folder).load()
            print(report(model, self.run.tokenizer, self.run.folder, 4 * self.scenes))


Asked = list[tuple[shapes.Scene, shapes.Question]]


def ask(split: str, count: int, seed: int = 0) -> Asked:
    """Questions about `count` scenes of a split; in held_out all are about a thing of a held-out combination."""
    asked: Asked = []
    for number, scene in enumerate(itertools.islice(shapes.scenes(seed, split), count)):
        rng = random.Random(f"{split} questions {seed} {number}")
        found = [q for q in shapes.questions(scene, rng, 40) if q.about_held_out or split != "held_out"]
        first = {question.kind: question for question in reversed(found)}
        asked += [(scene, first[kind]) for kind in rng.sample(shapes.KINDS, PER_SCENE) if kind in first]
    return asked


def answered(
    call: Callable[..., Any], model: LLaVAModel, tokenizer: Tokenizer, asked: Asked, blank: bool = False
) -> list[bool]:
    """Which questions are answered exactly, each asked alone in a first turn. `blank`: all pixels are zero."""
    processor, examples = Processor(model.config, tokenizer), []
    for scene, question in asked:
        media = [Media(scene.image())]
        messages = user_message(model.config.chat, question.text, media), Message("assistant", question.answer)
        examples.append(processor(messages, media))
        if blank:
            examples[-1].visuals[0].pixels_NCHW.zero_()
    return exact_all(call, examples, model.decoder.embed.weight.device)


def report(model: LLaVAModel, tokenizer: Tokenizer, folder: Path, scenes: int) -> str:
    """Write accuracy.json and samples.png into a run's folder; return the table of exact answers by kind."""
    splits = {"unseen scenes": ("unseen", False), "held-out pairs": ("held_out", False), "no picture": ("unseen", True)}
    shares: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for title, (split, blank) in splits.items():
            asked = ask(split, scenes, seed=1)
            right = answered(model, model, tokenizer, asked, blank)
            by_kind: dict[str, list[bool]] = {"all": right}
            for (_, question), hit in zip(asked, right):
                by_kind.setdefault(question.kind, []).append(hit)
            shares[title] = {kind: sum(hits) / len(hits) for kind, hits in by_kind.items()}
    (folder / "accuracy.json").write_text(json.dumps(shares, indent=2) + "\n", encoding="utf-8")
    draw_samples(model, tokenizer, folder / "samples.png")
    rows = [f"  {'exact answers':14}" + "".join(f"{title:>16}" for title in shares)]
    for kind in (*shapes.KINDS, "all"):
        rows.append(f"  {kind:14}" + "".join(f"{share[kind]:16.1%}" for share in shares.values()))
    return "\n".join([*rows, f"  pictures with answers: {folder / 'samples.png'}"])


def draw_samples(model: LLaVAModel, tokenizer: Tokenizer, path: Path) -> None:
    """Twelve scenes, the upper half with seen and the lower half with held-out pairs, each with what the model says."""
    engine = Engine(model, tokenizer)
    first = [next(group) for split in ("unseen", "held_out") for _, group in
             itertools.islice(itertools.groupby(ask(split, 6, seed=2), key=lambda pair: pair[0]), 6)]  # fmt: skip
    requests = []
    for scene, question in first:
        media = [Media(scene.image())]
        requests.append(Request([user_message(model.config.chat, question.text, media)], media, max_new_tokens=16))
    answers = engine.generate(requests)
    side, gap, text = 192, 16, 44
    sheet = Image.new("RGB", (6 * (side + gap) + gap, 2 * (side + text + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, ((scene, question), answer) in enumerate(zip(first, answers)):
        x, y = gap + i % 6 * (side + gap), gap + i // 6 * (side + text + gap)
        sheet.paste(scene.image().resize((side, side), Image.Resampling.NEAREST), (x, y))
        draw.multiline_text((x, y + side + 4), textwrap.fill(question.text, 32), fill="black")
        words = answer.text.strip()
        right = words == question.answer
        note = "" if right else f"  ({question.answer})"
        draw.text((x, y + side + 30), words + note, fill="darkgreen" if right else "darkred")
    sheet.save(path)
