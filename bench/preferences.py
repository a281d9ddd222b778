"""DPO on drawn scenes: preferences against false answers to "Is there ...?" and what they cost elsewhere.

python -m bench.preferences [--scenes N] [--run FOLDER] [--set KEY=VALUE]... [--keep]

A model that knows drawn scenes (the one that ships; --set model.base=DIR for the one of `minillava train`, about
which the table in bench/results is) answers such questions about training scenes. Pairs are made of the answers that
it gets wrong or nearly so, and of sure ones beside them, more where "yes" is right: doubtful answers alone turn the
model over, and "no" alone makes it say no. Trained on these, it is asked about scenes that no training had. JSON and
a table, preferences.json and preferences.md, go to runs/bench/cpu.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from bench import machine
from minillava import LLaVA
from minillava.chat.messages import Message
from minillava.data.batch import pack
from minillava.media.visual import Media
from minillava.processor import user_message
from minillava.recipe import read_recipe
from minillava.synthetic import shapes
from minillava.synthetic.task import Asked, answered
from minillava.training.pipeline import run_recipe

OTHER = {"yes": "no", "no": "yes"}
DOUBT = 1.0  # nats by which a true answer may be likelier than the false one and still be doubtful
SURE = {"no": 1, "yes": 3}  # sure answers beside each doubtful one
RECIPE = """
name = "preferences"
device = "cpu"
[model]
base = "nano"
[[stage]]
name = "dpo"
task = "dpo"
data = [{{path = "{folder}/pairs.json", images = "{folder}"}}]
dpo = {{beta = 0.3, cached = true}}
lr = {{projector = 5e-5, decoder = 5e-5}}
epochs = 2
batch_size = 64
dtype = "float32"
schedule = "linear"
warmup = 0.1
save_every = 0
"""


def ask(split: str, scenes: int, seed: int, kinds: tuple[str, ...], number: int) -> Asked:
    """Questions of these kinds about so many scenes of a split."""
    asked: Asked = []
    for at, scene in enumerate(itertools.islice(shapes.scenes(seed, split), scenes)):
        rng = random.Random(f"preferences {split} {seed} {at}")
        asked += [(scene, question) for question in shapes.questions(scene, rng, number, kinds)]
    return asked


@torch.inference_mode()
def margins(llava: LLaVA, asked: Asked, rows: int = 64) -> list[float]:
    """By how many nats the true answer, yes or no, is likelier than the false one."""
    found = []
    for first in range(0, len(asked), rows):
        examples = []
        for scene, question in asked[first : first + rows]:
            media = [Media(scene.image())]
            user = user_message(llava.config.chat, question.text, media)
            for answer in (question.answer, OTHER[question.answer]):
                examples.append(llava.engine.processor([user, Message("assistant", answer)], media))
        batch = pack(examples)
        losses_B = llava.model(
            batch.ids_T, batch.pixels_NCHW, batch.labels_T, batch.cu_seqlens, spans=batch.spans, by_sequence=True
        )
        found += (losses_B[1::2] - losses_B[::2]).tolist()
    return found


def write_pairs(llava: LLaVA, folder: Path, scenes: int) -> int:
    """pairs.json and its pictures; returns how many pairs there are."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, rng = ask("train", scenes, 77, ("exist",), 4), random.Random(0)
    known = [(scene, question, margin) for (scene, question), margin in zip(asked, margins(llava, asked))]
    chosen = []
    for answer, share in SURE.items():
        mine = [row for row in known if row[1].answer == answer]
        doubtful = [row for row in mine if row[2] < DOUBT]
        sure = [row for row in mine if row[2] >= DOUBT]
        chosen += doubtful + rng.sample(sure, min(len(sure), share * len(doubtful)))
    rng.shuffle(chosen)
    rows = []
    for number, (scene, question, _) in enumerate(chosen):
        scene.image().save(folder / f"{number}.png")
        row = {"id": number, "image": f"{number}.png", "prompt": question.text, "chosen": question.answer}
        rows.append(row | {"rejected": OTHER[question.answer]})
    (folder / "pairs.json").write_text(json.dumps(rows))
    return len(rows)


@torch.inference_mode()
def errors(llava: LLaVA) -> dict[str, float]:
    """Share of wrong answers: false "exists" (yes where it is no), wrong "no", and those to all other kinds."""
    others = tuple(kind for kind in shapes.KINDS if kind != "exist")
    found = {}
    for split in ("held_out", "unseen"):
        asked = ask(split, 2000, 5, ("exist",), 2)
        wrong = [(question.answer, margin < 0) for (_, question), margin in zip(asked, margins(llava, asked))]
        for name, answer in (("false exists", "no"), ("wrong no", "yes")):
            some = [missed for given, missed in wrong if given == answer]
            found[f"{split}, {name}"] = sum(some) / len(some)
        right = answered(llava.model, llava.model, llava.tokenizer, ask(split, 500, 5, others, 4))
        found[f"{split}, other kinds"] = 1 - sum(right) / len(right)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scenes", type=int, default=12000, help="training scenes to look for pairs in")
    parser.add_argument("--run", type=Path, default=Path("runs/preferences"), help="folder for the pairs and the run")
    machine.add_out(parser)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    args = parser.parse_args(arguments)
    began_s, folder, run = time.monotonic(), args.run / "pairs", args.run / f"run-{time.time_ns()}"
    args.run.mkdir(parents=True, exist_ok=True)
    (args.run / "recipe.toml").write_text(RECIPE.format(folder=folder))
    recipe = read_recipe(args.run / "recipe.toml", args.set, str(run))
    nano = LLaVA.from_pretrained(recipe.model.base, dtype="float32")
    pairs = (
        len(json.loads((folder / "pairs.json").read_text()))
        if folder.exists()
        else write_pairs(nano, folder, args.scenes)
    )
    run_recipe(recipe)
    after = errors(LLaVA.from_pretrained(run / "dpo" / "model", dtype="float32"))
    row = {"pairs": pairs, "set": args.set, "before": errors(nano), "after": after}
    found = {"facts": machine.facts("cpu"), "seconds": round(time.monotonic() - began_s), **row}
    write(found, machine.out(args, "cpu"))


def write(found: dict[str, Any], folder: Path) -> None:
    """preferences.json and preferences.md, which is printed too."""
    lines = [f"{found['pairs']:,} pairs, {found['seconds']} s. {machine.made_of(found['facts'])}", ""]
    lines += ["| wrong answers, % | before | after |", "|---|---|---|"]
    lines += [f"| {name} | {100 * b:.2f} | {100 * found['after'][name]:.2f} |" for name, b in found["before"].items()]
    (folder / "preferences.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "preferences.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
