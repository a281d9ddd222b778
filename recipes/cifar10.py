"""Make the three files of README's example on photographs from CIFAR-10 (Krizhevsky, 2009): 20,000 pictures in a zip,
captions, and short questions, both in LLaVA's format.

python -m minillava.recipes.cifar10 [FOLDER] [--parquet FILE]

It downloads the training file of huggingface.co/datasets/uoft-cs/cifar10 (needs pyarrow); --parquet takes one that is
there. torchvision's pictures will do too: `write(FOLDER, ((image, CLASSES[label]) for image, label in CIFAR10(...)))`.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VEHICLES = {"airplane", "automobile", "ship", "truck"}
PER_CLASS = 2000
REQUESTS = ("Describe the image concisely.", "Write a short caption.", "Give a brief description of the photo.")
CAPTIONS = ("A photo of {}.", "This picture shows {}.", "{} in a small photo.", "There is {} here.")
SHORT = "\nAnswer the question using a single word or phrase."


def write(folder: Path, pictures: Iterable[tuple[Image.Image, str]], per_class: int = PER_CLASS) -> int:
    """pictures.zip, captions.json and questions.json from pictures and their classes; returns how many pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    random_, seen = random.Random(0), Counter[str]()
    captions, questions = [], []
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        for image, label in pictures:
            if seen[label] == per_class:
                continue
            name = f"{label}_{seen[label]:04}.jpg"
            seen[label] += 1
            data = io.BytesIO()
            image.convert("RGB").save(data, "JPEG", quality=95)
            archive.writestr(name, data.getvalue())
            captions.append(_sample(f"cap_{name}", name, [_caption(label, random_)]))
            questions.append(_sample(f"qa_{name}", name, _questions(label, random_)))
    for file, samples in (("captions.json", captions), ("questions.json", questions)):
        random_.shuffle(samples)
        (folder / file).write_text(json.dumps(samples), encoding="utf-8")
    return sum(seen.values())


def _caption(label: str, random_: random.Random) -> tuple[str, str]:
    noun = f"{'an' if label[0] in 'aeiou' else 'a'} {label}"
    text = random_.choice(CAPTIONS).format(noun)
    return random_.choice(REQUESTS), text[0].upper() + text[1:]


def _questions(label: str, random_: random.Random) -> list[tuple[str, str]]:
    """What it is, whether it is an animal, and whether it is a class that it is in half of the cases."""
    asked = label if random_.random() < 0.5 else random_.choice([name for name in CLASSES if name != label])
    article = "an" if asked[0] in "aeiou" else "a"
    turns = [
        ("What is in the photo?", label),
        ("Is it an animal or a vehicle?", "vehicle" if label in VEHICLES else "animal"),
        (f"Is there {article} {asked} in the photo?", "yes" if asked == label else "no"),
    ]
    random_.shuffle(turns)
    return [(question + SHORT, answer) for question, answer in turns]


def _sample(name: str, image: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    said = [text for turn in turns for text in turn]
    said[0] = f"<image>\n{said[0]}"
    conversation = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    return {"id": name.removesuffix(".jpg"), "image": image, "conversations": conversation}


def read_parquet(path: Path) -> Iterator[tuple[Image.Image, str]]:
    """Pictures and classes of the hub's file: columns `img` (PNG bytes) and `label`."""
    from pyarrow.parquet import ParquetFile

    for batch in ParquetFile(path).iter_batches(1000, columns=["img", "label"]):
        for row in batch.to_pylist():
            yield Image.open(io.BytesIO(row["img"]["bytes"])), CLASSES[row["label"]]


def main() -> int:
    """Exit status: 0, or 2 after a line about what is missing."""
    parser = argparse.ArgumentParser(prog="python -m minillava.recipes.cifar10", description="CIFAR-10 for LLaVA.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("cifar10"), help="where to (default: cifar10)")
    parser.add_argument("--parquet", type=Path, metavar="FILE", help="the hub's training file, where it is there")
    args = parser.parse_args()
    try:
        import pyarrow  # noqa: F401
        from huggingface_hub import hf_hub_download

        name = "plain_text/train-00000-of-00001.parquet"
        path = args.parquet or hf_hub_download("uoft-cs/cifar10", name, repo_type="dataset")
        count = write(args.folder, read_parquet(Path(path)))
    except (ImportError, OSError) as error:
        hint = "pip install pyarrow" if isinstance(error, ImportError) else "give the training file by --parquet"
        print(f"error: CIFAR-10 was not read ({str(error).splitlines()[0]}); {hint}", file=sys.stderr)
        return 2
    print(f"{count:,} pictures in {args.folder}/pictures.zip, with captions.json and questions.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
