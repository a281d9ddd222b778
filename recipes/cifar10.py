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
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from minillava.errors import UserError
from minillava.files import answered_soon, named, refused

HUB, FILE = "uoft-cs/cifar10", "plain_text/train-00000-of-00001.parquet"
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
    """Pictures and classes of the hub's file: columns `img` (PNG bytes) and `label`. Raises UserError for another."""
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(path).iter_batches(1000, columns=["img", "label"]):
            for row in batch.to_pylist():
                yield Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB"), CLASSES[row["label"]]
    except (OSError, ValueError, LookupError, TypeError) as error:  # pyarrow's are some of these
        why = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: is not the training file of CIFAR-10 ({why}); fetch it again") from None


def download() -> Path:
    """The hub's training file, in its cache. Raises UserError where it cannot be had."""
    from huggingface_hub import hf_hub_download

    try:
        with answered_soon():
            return Path(hf_hub_download(HUB, FILE, repo_type="dataset"))
    except Exception as error:  # noqa: BLE001 what the hub's client and its transports raise has no common class
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"CIFAR-10 was not downloaded ({why}); give {FILE} of huggingface.co/datasets/{HUB} by --parquet"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after a line about what is missing."""
    parser = argparse.ArgumentParser(prog="python -m minillava.recipes.cifar10", description="CIFAR-10 for LLaVA.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("cifar10"), help="where to (default: cifar10)")
    parser.add_argument("--parquet", type=Path, metavar="FILE", help="the hub's training file, where it is there")
    args = parser.parse_args(argv)
    try:
        if find_spec("pyarrow") is None:
            raise UserError("CIFAR-10 is in parquet, which needs pyarrow; pip install pyarrow")
        with named(args.folder):
            count = write(args.folder, read_parquet(args.parquet or download()))
    except (UserError, OSError) as error:
        print(f"error: {refused(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 2
    print(f"{count:,} pictures in {args.folder}/pictures.zip, with captions.json and questions.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
