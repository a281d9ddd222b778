"""recipes/cifar10.py: from the hub's parquet to LLaVA's format, which the recipe's reader takes."""

import io
import json
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT
from PIL import Image

from minillava.recipes import cifar10


def test_parquet_becomes_pictures_captions_and_questions(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = []
    for i in range(60):
        data = io.BytesIO()
        Image.new("RGB", (32, 32), (i * 4, 100, 50)).save(data, "PNG")
        rows.append({"img": {"bytes": data.getvalue(), "path": None}, "label": i % 10})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    command = [
        sys.executable,
        "-m",
        "minillava.recipes.cifar10",
        tmp_path / "out",
        "--parquet",
        tmp_path / "train.parquet",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("60 pictures"), done.stderr

    names = zipfile.ZipFile(tmp_path / "out" / "pictures.zip").namelist()
    captions, questions = (json.loads((tmp_path / "out" / f"{n}.json").read_text()) for n in ("captions", "questions"))
    assert len(names) == 60 and {s["image"] for s in captions} == {s["image"] for s in questions} == set(names)
    for sample in (*captions, *questions):
        label, said = sample["image"].split("_")[0], [turn["value"] for turn in sample["conversations"]]
        assert said[0].startswith("<image>\n") and "<image>" not in "".join(said[1:])
        if sample in captions:
            assert label in said[1]
            continue
        answers = dict(zip((text.removeprefix("<image>\n").split("\n")[0] for text in said[::2]), said[1::2]))
        assert answers.pop("What is in the photo?") == label
        assert (answers.pop("Is it an animal or a vehicle?") == "vehicle") == (label in cifar10.VEHICLES)
        ((question, answer),) = answers.items()
        assert (answer == "yes") == (f" {label} " in question)


def test_no_more_than_so_many_of_a_class(tmp_path):
    pictures = [(Image.new("L", (8, 8)), label) for label in ("cat", "dog", "cat", "cat")]
    assert cifar10.write(tmp_path, pictures, per_class=2) == 3
    assert len(zipfile.ZipFile(tmp_path / "pictures.zip").namelist()) == 3
