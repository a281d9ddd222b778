"""recipes/cifar10.py: from the hub's parquet to LLaVA's format, which the recipe's reader takes."""

import io
import json
import os
import subprocess
import sys
import zipfile

import huggingface_hub
import pytest
from helpers import ROOT, disk_of
from PIL import Image

from minillava.recipes import cifar10


def write_parquet(path, label="label", count=60):
    """As the hub's training file is."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = []
    for i in range(count):
        data = io.BytesIO()
        Image.new("RGB", (32, 32), (i * 4, 100, 50)).save(data, "PNG")
        rows.append({"img": {"bytes": data.getvalue(), "path": None}, label: i % 10})
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_becomes_pictures_captions_and_questions(tmp_path):
    given = write_parquet(tmp_path / "train.parquet")
    command = [sys.executable, "-m", "minillava.recipes.cifar10", tmp_path / "out", "--parquet", given]
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


def test_it_is_downloaded_from_the_hub(tmp_path, monkeypatch, capsys):
    given, asked = write_parquet(tmp_path / "train.parquet", count=20), []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: (asked.append((a, k)), given)[1])
    assert cifar10.main([str(tmp_path / "out")]) == 0
    assert asked == [((cifar10.HUB, cifar10.FILE), {"repo_type": "dataset"})]
    assert capsys.readouterr().out.startswith("20 pictures")
    assert len(json.loads((tmp_path / "out" / "questions.json").read_text())) == 20


@pytest.mark.parametrize("settings", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_without_a_network_it_says_what_to_do(tmp_path, settings):
    pytest.importorskip("pyarrow")
    environment = os.environ | {"HF_HOME": str(tmp_path)} | settings
    command = [sys.executable, "-m", "minillava.recipes.cifar10", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and done.stderr.startswith("error: CIFAR-10 was not downloaded")
    assert done.stderr.count("\n") == 1 and "--parquet" in done.stderr


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    other = write_parquet(tmp_path / "other.parquet", label="class", count=1)
    (tmp_path / "text.parquet").write_text("no table")
    good = write_parquet(tmp_path / "good.parquet", count=10)
    for folder, parquet, said in (
        ("out", tmp_path / "none.parquet", "none.parquet: is not the training file"),
        ("out", tmp_path / "text.parquet", "text.parquet: is not the training file"),
        ("out", other, "other.parquet: is not the training file"),
        ("text.parquet", good, "text.parquet: File exists; a file stands where a folder is wanted"),
    ):
        assert cifar10.main([str(tmp_path / folder), "--parquet", str(parquet)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("error: ") and error.count("\n") == 1
    with disk_of(999):
        assert cifar10.main([str(tmp_path / "full"), "--parquet", str(good)]) == 2
    assert "full: File too large; make room there" in capsys.readouterr().err
    monkeypatch.setattr(cifar10, "find_spec", lambda name: None)
    assert cifar10.main([str(tmp_path / "x")]) == 2 and "pip install pyarrow" in capsys.readouterr().err
