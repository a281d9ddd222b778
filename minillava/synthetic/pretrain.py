"""The two parts that real recipes download, made small and here: a CLIP tower from pairs of pictures and phrases, and a
decoder from text. Both learn from the built-in world, whose held-out combinations they never see or read.

CLIP: Radford et al. 2021 (arXiv 2103.00020). Differs: a picture goes with a phrase for each thing in it, the score of
a pair is that of its best patch (late interaction, FILIP, arXiv 2111.07783), and each true phrase is contrasted with
all false ones that there are.
"""

from __future__ import annotations

import itertools
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minillava.chat.messages import Message
from minillava.config import IGNORE
from minillava.data.batch import Batch, pack, rounded_up
from minillava.data.llava_json import MARKER, Sample
from minillava.data.mixture import split_data
from minillava.media.image import prepare
from minillava.processor import Example, Processor
from minillava.recipe import StageConfig
from minillava.synthetic import shapes
from minillava.training.llava_task import exact
from minillava.training.task import Run, Task
from minillava.training.tasks import options
from minillava.vit import VisionTower


class Stream(Task):
    """A task whose micro-batches are made from the number of the step alone."""

    def __init__(self, run: Run, stage: StageConfig):
        self.run, self.stage, self.seed = run, stage, run.seed(stage)

    @abstractmethod
    def make(self, rng: random.Random, size: int) -> Any:
        """A micro-batch of so many samples."""

    def batches(self, start: int, stop: int) -> Iterator[list[Any]]:
        size, micro = self.stage.batch_size, self.stage.micro
        for step in range(start, stop):
            rng = random.Random(f"{self.stage.task} {self.seed} {step}")
            yield [self.make(rng, min(micro, size - first)) for first in range(0, size, micro)]


# ------------------------------------------------------------------------------------------------- pictures, phrases


@dataclass
class Pairs:
    """N pictures, M phrases, and which of them are true of which."""

    pixels_NCHW: Tensor
    ids_T: Tensor  # the phrases, end to end
    starts_M: Tensor  # where each begins
    true_NM: Tensor


class PhraseTower(nn.Module):
    """What CLIP has beside its vision tower. A phrase is the sum of its words: a color must then look the same on every
    shape, so that pairs which never occur are learned with those that do.
    """

    def __init__(self, vocab_size: int, visual_size: int, size: int = 128):
        super().__init__()
        self.embed = nn.EmbeddingBag(vocab_size, size, mode="sum")
        self.visual_projection = nn.Linear(visual_size, size, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, ids_T: Tensor, starts_M: Tensor) -> Tensor:
        return self.embed(ids_T, starts_M)


class Clip(nn.Module):
    """The vision tower beside a small text tower; score of a pair = its best patch's cosine, scaled. With `whole` the
    phrases are about whole pictures, and the mean of the patches counts."""

    def __init__(self, vision: VisionTower, vocab_size: int, whole: bool):
        super().__init__()
        self.whole = whole
        self.vision = vision
        self.rest = PhraseTower(vocab_size, vision.config.hidden_size)

    def forward(self, pairs: Pairs) -> Tensor:
        """Scores [N, M] in float32."""
        dtype = self.rest.visual_projection.weight.dtype
        x_NTD = self.vision.embed(pairs.pixels_NCHW.to(dtype))
        for block in self.vision.blocks:
            x_NTD = block(x_NTD)
        patches_NPE = self.rest.visual_projection(self.vision.post_norm(x_NTD)[:, self.vision.config.class_token :])
        if self.whole:
            patches_NPE = patches_NPE.mean(1, keepdim=True)
        phrases_ME = self.rest(pairs.ids_T, pairs.starts_M)
        patches_NPE, phrases_ME = (F.normalize(x.float(), dim=-1).to(dtype) for x in (patches_NPE, phrases_ME))
        scores_NM = (patches_NPE.flatten(0, 1) @ phrases_ME.T).unflatten(0, patches_NPE.shape[:2]).amax(1)
        return scores_NM.float() * self.rest.log_scale.float().exp()

    def init_weights(self, seed: int) -> None:
        torch.manual_seed(seed)
        nn.init.normal_(self.rest.embed.weight)
        nn.init.xavier_uniform_(self.rest.visual_projection.weight)
        nn.init.normal_(self.vision.patch_embedding.weight, 0, 0.05)


def contrast(scores_NM: Tensor, true_NM: Tensor) -> Tensor:
    """Sum over the true pairs of -log softmax against all false phrases of the same picture."""
    false_N1 = scores_NM.masked_fill(true_NM, float("-inf")).logsumexp(1, keepdim=True)
    return F.softplus(false_N1 - scores_NM)[true_NM].sum()


class Scenes:
    """Pictures of the built-in world, with a phrase for each thing in them."""

    def __init__(self) -> None:
        self.things = [thing for thing in shapes.all_things() if not thing.held_out]
        self.phrases = [f"a {thing} {shapes.at(thing.cell)}" for thing in self.things]
        self.number = {thing: j for j, thing in enumerate(self.things)}

    def draw(self, rng: random.Random) -> tuple[Image.Image, list[int]]:
        return self.show(shapes.make_scene(rng))

    def show(self, scene: shapes.Scene) -> tuple[Image.Image, list[int]]:
        """The picture, and the numbers of the phrases that are true of it."""
        return scene.image(), [self.number[thing] for thing in scene.things]

    def evaluate(self, score: Callable[[list[tuple[Image.Image, list[int]]]], Tensor], seed: int) -> dict[str, float]:
        """How often the true word of a phrase beats the other words of its kind, over unseen scenes."""
        scenes = list(itertools.islice(shapes.scenes(seed, "unseen"), 128))
        right: dict[str, list[bool]] = {}
        for scores_M, scene in zip(score([self.show(scene) for scene in scenes]).numpy(), scenes):
            for thing in scene.things:
                for name, rivals in shapes.rivals(thing).items():
                    best = max((r for r in rivals if r in self.number), key=lambda r: scores_M[self.number[r]])
                    right.setdefault(name, []).append(best == thing)
        return {name: sum(values) / len(values) for name, values in right.items()}


class Captions:
    """LLaVA's JSON as pairs: the first picture of a sample and its last answer. Equal captions are one phrase.

    A picture is drawn as a random part of it, at least half of its area, mirrored or not.
    """

    def __init__(self, stage: StageConfig, seed: int):
        samples, self.held_out = split_data(stage, seed)
        self.samples = samples[np.array([i for i, sample in enumerate(samples) if sample.images], dtype=int)]
        self.phrases = sorted({sample.messages[-1].text for sample in (*samples, *self.held_out)})
        self.number = {phrase: j for j, phrase in enumerate(self.phrases)}

    def draw(self, rng: random.Random) -> tuple[Image.Image, list[int]]:
        image, true = self.show(rng.choice(self.samples))
        share = rng.uniform(0.5, 1) ** 0.5
        width, height = (max(1, round(share * side)) for side in image.size)
        left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image, true

    def show(self, sample: Sample) -> tuple[Image.Image, list[int]]:
        picture = sample.images[0]
        return picture.image(f"{sample.name}: {picture.name}"), [self.number[sample.messages[-1].text]]

    def evaluate(self, score: Callable[[list[tuple[Image.Image, list[int]]]], Tensor], seed: int) -> dict[str, float]:
        """How often a picture that was held out has its own caption first."""
        pairs = [self.show(sample) for sample in self.held_out if sample.images]
        hits = [int(best) in true for best, (_, true) in zip(score(pairs).argmax(1), pairs)]
        return {"caption": sum(hits) / len(hits)} if hits else {}


class ClipTask(Stream):
    """Trains the run's vision tower on `data`, or on the built-in world where the stage has none. The text tower is
    dropped afterwards. Every batch holds all phrases that there are."""

    def __init__(self, run: Run, stage: StageConfig):
        super().__init__(run, stage)
        self.model = Clip(run.model.vision, run.config.decoder.vocab_size, whole=bool(stage.data))
        self.model.init_weights(self.seed)
        self.model.to(run.device)
        self.parts = {"vision": self.model.vision, "text": self.model.rest}
        self.source = Captions(stage, self.seed) if stage.data else Scenes()
        phrases = [run.tokenizer.encode(phrase, True) for phrase in self.source.phrases]
        starts = [0, *itertools.accumulate(map(len, phrases))]
        self.ids_T = torch.tensor([id for phrase in phrases for id in phrase], device=run.device)
        self.starts_M = torch.tensor(starts[:-1], device=run.device)

    def make(self, rng: random.Random, size: int) -> Pairs:
        return self.pairs([self.source.draw(rng) for _ in range(size)])

    def pairs(self, drawn: Sequence[tuple[Image.Image, list[int]]]) -> Pairs:
        true_NM = torch.zeros(len(drawn), len(self.source.phrases), dtype=torch.bool)
        for row_M, (_, true) in zip(true_NM, drawn):
            row_M[true] = True
        pixels_NCHW = torch.stack([prepare(image, self.run.config.image) for image, _ in drawn])
        return Pairs(pixels_NCHW.to(self.run.device), self.ids_T, self.starts_M, true_NM.to(self.run.device))

    def loss(self, call: Callable[..., Any], micro: Pairs) -> tuple[Tensor, int]:
        return contrast(call(micro), micro.true_NM), int(micro.true_NM.sum())

    def counts(self, micros: list[Pairs]) -> dict[str, float]:
        return {"tokens": sum(micro.true_NM.numel() for micro in micros), "flops": 0.0}

    def evaluate(self, call: Callable[..., Any]) -> dict[str, float]:
        def score(drawn: list[tuple[Image.Image, list[int]]]) -> Tensor:
            rows = [call(self.pairs(drawn[i : i + 64])) for i in range(0, len(drawn), 64)]
            return torch.cat(rows).cpu() if rows else torch.empty(0, len(self.source.phrases))

        return self.source.evaluate(score, self.seed)


# --------------------------------------------------------------------------------------------------------------- text


class TextTask(Stream):
    """Trains the run's decoder on text: scenes in words, then questions about them, laid out as LLaVA's turns; or the
    conversations of `data`, without their pictures. Next-token loss on everything.

    `shapes.turns`: questions a text about a scene.
    """

    def __init__(self, run: Run, stage: StageConfig):
        super().__init__(run, stage)
        self.turns = options(stage)["turns"]
        self.samples = split_data(stage, self.seed)[0] if stage.data else []
        self.model = run.model
        self.parts = {"decoder": run.model.decoder}

    def make(self, rng: random.Random, size: int) -> Batch:
        return pack([self.example(rng) for _ in range(size)])

    def example(self, rng: random.Random) -> Example:
        if self.samples:
            messages = tuple(
                Message(m.role, m.text.replace(MARKER, "").strip()) for m in rng.choice(self.samples).messages
            )
        else:
            scene = shapes.make_scene(rng)
            messages = shapes.conversation(scene, rng, self.turns, opening=shapes.caption(scene, rng, shuffle=True))
        ids = Processor(self.run.config, self.run.tokenizer)(messages).ids
        return Example(ids, [IGNORE, *ids[1:]])

    def loss(self, call: Callable[..., Any], micro: Batch) -> tuple[Tensor, int]:
        batch = rounded_up(micro.to(self.run.device), self.run.config.chat.image_token_id)
        return call(batch.ids_T, labels=batch.labels_T, cu_seqlens=batch.cu_seqlens), batch.supervised

    def counts(self, micros: list[Batch]) -> dict[str, float]:
        return {"tokens": sum(len(micro.ids_T) for micro in micros), "flops": 0.0}

    def evaluate(self, call: Callable[..., Any]) -> dict[str, float]:
        """Share of exact answers when the scene is told in words."""
        if self.samples:
            return {}
        rng = random.Random("text evaluation")
        asked = []
        for scene in itertools.islice(shapes.scenes(self.seed, "unseen"), 200):
            for question in shapes.questions(scene, rng, 2):
                text = shapes.caption(scene, rng) + f"\n{question.text}"
                asked.append((Message("user", text), Message("assistant", question.answer)))
        processor = Processor(self.run.config, self.run.tokenizer)
        right = exact_all(call, [processor(messages) for messages in asked], self.run.device)
        return {"reading": sum(right) / len(right)}


def exact_all(
    call: Callable[..., Any], examples: Sequence[Example], device: torch.device | str = "cpu", rows: int = 64
) -> list[bool]:
    """`exact` for any number of examples, so many rows at a time."""
    starts = range(0, len(examples), rows)
    return [hit for start in starts for hit in exact(call, pack(examples[start : start + rows]).to(device))]
