"""The tour runs, and page, notebook and pictures are what comes out today; its terms are explained once."""

import base64
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def tour():
    spec = importlib.util.spec_from_file_location("make_tour", DOCS / "make_tour.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_tour"] = module  # where its dataclass looks
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_tour"]


def same(drawn, stored):
    """Two pictures, but for rounding."""
    stored = stored.convert("RGB")
    apart = np.abs(np.asarray(drawn, dtype=int) - np.asarray(stored, dtype=int)) if drawn.size == stored.size else 255
    return np.mean(apart) < 1


def test_the_notebook_runs_and_page_and_pictures_are_up_to_date(tour):
    """The code of the notebook is executed, cell after cell, and gives what notebook and page show."""
    stored = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
    found = [tour.Cell("".join(cell["source"]), cell["cell_type"] == "code") for cell in stored["cells"]]
    assert [(cell.code, cell.text) for cell in found] == [(cell.code, cell.text) for cell in tour.cells()]
    tour.run(found)
    assert tour.page(found) == (DOCS / "tour.md").read_text(encoding="utf-8"), "run python docs/make_tour.py"
    pictures = 0
    for cell, shown in zip(found, stored["cells"]):
        outputs = shown.get("outputs", [])
        printed = "".join(line for out in outputs if out["output_type"] == "stream" for line in out["text"])
        images = [out["data"]["image/png"] for out in outputs if "data" in out]
        assert printed == cell.printed and len(images) == (cell.picture is not None)
        if cell.picture is not None:
            pictures += 1
            assert same(cell.picture, Image.open(io.BytesIO(base64.b64decode(images[0]))))
            assert same(cell.picture, Image.open(DOCS / f"tour/{pictures}.png"))
    assert pictures == len(list((DOCS / "tour").glob("*.png"))) >= 6


def test_every_term_is_explained_once_and_576_is_explained(tour):
    found = tour.cells()[:-1]
    terms = [term for term, _, _ in tour.terms(found)]
    assert len(terms) == len(set(terms)) > 30
    text = "\n".join(cell.text for cell in found if not cell.code)
    for word in ("patch", "class token", "placeholder", "softmax", "label mask", "AnyRes", "kernel"):
        assert word in terms
    assert "336 / 14 = 24" in (DOCS / "tour.md").read_text() and "Where does 576 come from?" in text
    readme = (ROOT / "README.md").read_text().split("## The house")[0]
    assert "docs/tour.md" in readme


@pytest.mark.slow
def test_the_three_commands_of_the_kernel_chapter(tmp_path):
    """In a copy: the change passes its test and is measured; without `* up` the test fails."""
    for folder in ("minillava", "kernels", "tests", "bench", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    text = (DOCS / "tour.md").read_text().split("## 11.")[1].split("## Glossary")[0]
    change, test, bench = re.findall(r"^```\n(.+)\n```$", text, re.M)
    kernel = tmp_path / "kernels/swiglu.py"
    before = kernel.read_text()

    def call(command):
        command = command.replace("python ", f"{sys.executable} ", 1)
        done = subprocess.run(command, shell=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": "."},
                              capture_output=True, text=True)  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    assert call(change)[0] == 0 and kernel.read_text() != before and "tl.sigmoid(gate)" in kernel.read_text()
    status, out = call(test)
    assert status == 0, out
    status, out = call(bench)
    assert status == 0 and "swiglu" in out, out
    assert (
        call(
            change.replace("tl.sigmoid(gate) * up|", "tl.sigmoid(gate)|").replace(
                "gate / (1.0 + tl.exp(-gate))", "gate \\* tl.sigmoid(gate)"
            )
        )[0]
        == 0
    )
    assert call(test)[0] != 0
