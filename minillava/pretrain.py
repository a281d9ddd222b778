"""The two parts that real recipes download, made small and here: a CLIP tower from pairs of pictures and phrases, and a
decoder from text. Both learn from the built-in world, whose held-out combinations they never see or read.

CLIP: Radford et al. 2021 (arXiv 2103.00020). Differs: a picture goes with a phrase for each thing in it, the score of
a pair is that of its best patch (late interaction, FILIP, arXiv 2111.07783), and each true phrase is contrasted with
all false ones that there are.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava import chat, shapes
from minillava.chat import Message
from minillava.config import UserError
from minillava.data import Batch, Example, pack
from minillava.image import prepare
from minillava.llava import next_labels
from minillava.recipe import StageConfig
from minillava.tasks import Run, Task, rounded_up
from minillava.tokenizer import train_small_tokenizer
from minillava.vit import VisionTower


def write_tokenizer(folder: Path) -> None:
    """The tokenizer of the built-in world: every word of it is one token, other text falls back to bytes."""
    rng = random.Random(0)
    texts = []
    for scene in itertools.islice(shapes.scenes(0, "train"), 2000):
        words = shapes.caption(scene, rng)
        texts.append(f"<image>{words}\n")
        for opening in (words, "<image>"):
            for message in shapes.conversation(scene, rng, 12, opening):
                texts.append(f"USER: {message.text} ASSISTANT:" if message.role == "user" else f" {message.text}</s>")
    train_small_tokenizer(texts, folder, vocab_size=512)


class Stream(Task):
    """A task whose micro-batches are made from the number of the step alone, two ahead of their use in a thread."""

    def __init__(self, run: Run, stage: StageConfig):
        self.run, self.stage = run, stage
        self.seed = stage.seed if stage.seed >= 0 else run.recipe.seed

    def make(self, rng: random.Random, size: int) -> Any:
        raise NotImplementedError

    def step(self, number: int) -> list[Any]:
        rng = random.Random(f"{self.stage.task} {self.seed} {number}")
        sizes = [self.stage.micro] * (self.stage.batch_size // self.stage.micro)
        rest = self.stage.batch_size % self.stage.micro
        return [self.make(rng, size) for size in sizes + [rest] * bool(rest)]

    def batches(self, start: int, stop: int) -> Iterator[list[Any]]:
        with ThreadPoolExecutor(1) as pool:
            pending = [pool.submit(self.step, number) for number in range(start, min(start + 2, stop))]
            for number in range(start, stop):
                if number + 2 < stop:
                    pending.append(pool.submit(self.step, number + 2))
                yield pending.pop(0).result()


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
    """The vision tower beside a small text tower; score of a pair = its best patch's cosine, scaled."""

    def __init__(self, vision: VisionTower, vocab_size: int):
        super().__init__()
        self.vision = vision
        self.rest = PhraseTower(vocab_size, vision.config.hidden_size)

    def forward(self, pairs: Pairs) -> Tensor:
        """Scores [N, M] in float32."""
        dtype = self.rest.visual_projection.weight.dtype
        x_NTD = self.vision.embed(pairs.pixels_NCHW.to(dtype))
        for block in self.vision.blocks:
            x_NTD = block(x_NTD)
        patches_NPE = self.rest.visual_projection(self.vision.post_norm(x_NTD)[:, self.vision.config.class_token :])
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


class ClipTask(Stream):
    """Trains the run's vision tower; the text tower is dropped afterwards. Every batch holds all phrases."""

    def __init__(self, run: Run, stage: StageConfig):
        super().__init__(run, stage)
        self.model = Clip(run.model.vision, run.model.config.decoder.vocab_size)
        self.model.init_weights(self.seed)
        self.model.to(run.device)
        self.parts = {"vision": self.model.vision, "text": self.model.rest}
        things = [thing for thing in shapes.all_things() if not thing.held_out]
        self.column = {thing: j for j, thing in enumerate(things)}
        phrases = [run.tokenizer.encode(f"a {thing} {shapes.at(thing.cell)}", True) for thing in things]
        starts = [0, *itertools.accumulate(map(len, phrases))]
        self.ids_T = torch.tensor([id for phrase in phrases for id in phrase], device=run.device)
        self.starts_M = torch.tensor(starts[:-1], device=run.device)

    def make(self, rng: random.Random, size: int) -> Pairs:
        return self.pairs([shapes.make_scene(rng) for _ in range(size)])

    def pairs(self, scenes: Sequence[shapes.Scene]) -> Pairs:
        true_NM = torch.zeros(len(scenes), len(self.column), dtype=torch.bool)
        for i, scene in enumerate(scenes):
            true_NM[i, [self.column[thing] for thing in scene.things]] = True
        pixels_NCHW = torch.stack([prepare(scene.image(), self.run.model.config.image) for scene in scenes])
        return Pairs(pixels_NCHW.to(self.run.device), self.ids_T, self.starts_M, true_NM.to(self.run.device))

    def loss(self, call: Callable[..., Any], micro: Pairs) -> tuple[Tensor, int]:
        return contrast(call(micro), micro.true_NM), int(micro.true_NM.sum())

    def tokens(self, micro: Pairs) -> int:
        return micro.true_NM.numel()

    def evaluate(self, call: Callable[..., Any]) -> dict[str, float]:
        """How often the true word of a phrase beats the other words of its kind, over unseen scenes."""
        scenes = list(itertools.islice(shapes.scenes(self.seed, "unseen"), 128))
        scores_NM = torch.cat([call(self.pairs(scenes[i : i + 32])) for i in range(0, len(scenes), 32)]).cpu().numpy()
        right: dict[str, list[bool]] = {}
        for scores_M, scene in zip(scores_NM, scenes):
            for thing in scene.things:
                for name, rivals in shapes.rivals(thing).items():
                    best = max((r for r in rivals if r in self.column), key=lambda r: scores_M[self.column[r]])
                    right.setdefault(name, []).append(best == thing)
        return {name: sum(values) / len(values) for name, values in right.items()}


# --------------------------------------------------------------------------------------------------------------- text


class TextTask(Stream):
    """Trains the run's decoder on text: scenes in words, then questions about them, laid out as LLaVA's turns.

    Next-token loss on everything. `shapes.turns`: questions a text.
    """

    def __init__(self, run: Run, stage: StageConfig):
        super().__init__(run, stage)
        options = dict(stage.shapes)
        self.turns = options.pop("turns", 8)
        if options:
            raise UserError(f"stage '{stage.name}': shapes.{next(iter(options))} is unknown; task text knows turns")
        self.model = run.model
        self.parts = {"decoder": run.model.decoder}

    def make(self, rng: random.Random, size: int) -> Batch:
        return pack([self.example(shapes.make_scene(rng), rng) for _ in range(size)])

    def example(self, scene: shapes.Scene, rng: random.Random) -> Example:
        messages = shapes.conversation(scene, rng, self.turns, opening=shapes.caption(scene, rng, shuffle=True))
        ids, _ = chat.encode(self.run.model.config.chat, self.run.tokenizer, messages, [], generate=False)
        return Example(ids, [chat.IGNORE, *ids[1:]], None)

    def loss(self, call: Callable[..., Any], micro: Batch) -> tuple[Tensor, int]:
        batch = rounded_up(micro.to(self.run.device), self.run.model.config.chat.image_token_id)
        return call(batch.ids_T, labels=batch.labels_T, cu_seqlens=batch.cu_seqlens), batch.supervised

    def tokens(self, micro: Batch) -> int:
        return len(micro.ids_T)

    def evaluate(self, call: Callable[..., Any]) -> dict[str, float]:
        """Share of exact answers when the scene is told in words."""
        rng = random.Random("text evaluation")
        asked = []
        for scene in itertools.islice(shapes.scenes(self.seed, "unseen"), 200):
            for question in shapes.questions(scene, rng, 2):
                text = shapes.caption(scene, rng) + f"\n{question.text}"
                asked.append((Message("user", text), Message("assistant", question.answer)))
        chat_config, tokenizer = self.run.model.config.chat, self.run.tokenizer
        rows = [chat.encode(chat_config, tokenizer, messages, [], generate=False) for messages in asked]
        right = exact(call, [Example(ids, labels, None) for ids, labels in rows], self.run.device)
        return {"reading": sum(right) / len(right)}


def exact(
    call: Callable[..., Any], examples: Sequence[Example], device: torch.device | str = "cpu", rows: int = 64
) -> list[bool]:
    """For each example whether greedy decoding would give its supervised tokens, stop token included.

    One pass over the given answer tells: decoding leaves it exactly where some token is not the most likely one.
    """
    right: list[bool] = []
    for first in range(0, len(examples), rows):
        batch = pack(examples[first : first + rows]).to(device)
        logits_TV = call(batch.ids_T, images=batch.pixels_NCHW, cu_seqlens=batch.cu_seqlens, spans=batch.spans)
        wanted_T = next_labels(batch.labels_T, batch.cu_seqlens)
        hit_T = (logits_TV.argmax(-1) == wanted_T) | (wanted_T == chat.IGNORE)
        right += [bool(hit_T[a:b].all()) for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:])]
    return right
