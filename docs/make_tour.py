"""Runs docs/tour.py cell by cell and writes docs/tour.md, tour.ipynb and tour/*.png. `python docs/make_tour.py`

A cell's result is what it prints, and its last expression: a picture, or a value. No notebook's machinery is needed.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

DOCS = Path(__file__).parent
PICTURES = DOCS / "tour"
NOTICE = "<!-- Written by `python docs/make_tour.py` from docs/tour.py, which a test keeps so. -->"


@dataclass
class Cell:
    text: str
    code: bool
    printed: str = ""
    picture: Image.Image | None = None


def cells() -> list[Cell]:
    """The cells of tour.py, and the glossary as a last one."""
    found = []
    for part in re.split(r"^# %%", (DOCS / "tour.py").read_text(encoding="utf-8"), flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        code = "[markdown]" not in head
        text = body.strip() if code else re.sub(r"^# ?", "", body.strip(), flags=re.M)
        found.append(Cell(text, code))
    return [*found, Cell(glossary(found), False)]


def terms(found: list[Cell]) -> list[tuple[str, str, int]]:
    """Every bold term, the sentence that explains it, and the number of its part; the question of part 2 is none."""
    listed, part = [], 0
    for cell in found:
        for paragraph in [] if cell.code else re.sub(r"```.*?```", "", cell.text, flags=re.S).split("\n\n"):
            heading = re.match(r"## (\d+)\.", paragraph)
            part = int(heading[1]) if heading else part
            for sentence in re.split(r"(?<=[.?!]) ", paragraph.replace("\n", " ")):
                for term in re.findall(r"\*\*([^*?]+)\*\*", sentence):
                    listed.append((term, sentence.replace("**", ""), part))
    return listed


def glossary(found: list[Cell]) -> str:
    lines = [
        f"- **{term}** (part {part}): {sentence.rstrip('.')}."
        for term, sentence, part in sorted(terms(found), key=lambda entry: entry[0].lower())
    ]
    return "## Glossary\n\nThe sentence that explains each word, and where it stands.\n\n" + "\n".join(lines)


def run(found: list[Cell]) -> list[Cell]:
    """Execute the code cells in order, in one namespace, and fill in what came out."""
    names: dict[str, Any] = {"__name__": "tour"}
    sys.path.insert(0, str(DOCS))  # for systems.py
    try:
        for cell in found:
            if not cell.code:
                continue
            tree, last, out = ast.parse(cell.text), None, io.StringIO()
            if isinstance(tree.body[-1], ast.Expr):
                last = ast.Expression(tree.body.pop().value)
            with contextlib.redirect_stdout(out):
                exec(compile(tree, "tour.py", "exec"), names)
                value = None if last is None else eval(compile(last, "tour.py", "eval"), names)
            if isinstance(value, Image.Image):
                cell.picture = value.convert("RGB")
            elif value is not None:
                print(repr(value), file=out)
            cell.printed = out.getvalue()
    finally:
        sys.path.remove(str(DOCS))
        import torch

        torch.set_grad_enabled(True)
    return found


def page(found: list[Cell]) -> str:
    """The Markdown."""
    blocks, number, part = [NOTICE], 0, ""
    for cell in found:
        part = ([part] if cell.code else [part, *re.findall(r"^## (.+)$", cell.text, re.M)])[-1]
        blocks.append(f"```python\n{cell.text}\n```" if cell.code else cell.text)
        if cell.printed:
            blocks.append(f"```text\n{cell.printed.rstrip()}\n```")
        if cell.picture is not None:
            number += 1
            blocks.append(f"![{part}](tour/{number}.png)")
    return "\n\n".join(blocks) + "\n"


def notebook(found: list[Cell]) -> dict[str, Any]:
    """The same as a Jupyter notebook (nbformat 4.5)."""
    out: list[dict[str, Any]] = []
    for number, cell in enumerate(found):
        lines = cell.text.splitlines(keepends=True)
        made: dict[str, Any] = {
            "cell_type": "code" if cell.code else "markdown",
            "id": f"cell-{number}",
            "metadata": {},
        }
        made["source"] = lines
        if cell.code:
            outputs: list[dict[str, Any]] = []
            if cell.printed:
                text = cell.printed.splitlines(keepends=True)
                outputs.append({"output_type": "stream", "name": "stdout", "text": text})
            if cell.picture is not None:
                data = {"image/png": base64.b64encode(png(cell.picture)).decode()}
                outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
            made |= {"execution_count": None, "outputs": outputs}
        out.append(made)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": out}


def png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return data.getvalue()


def main() -> None:
    found = run(cells())
    PICTURES.mkdir(exist_ok=True)
    for old in PICTURES.glob("*.png"):
        old.unlink()
    for number, cell in enumerate([cell for cell in found if cell.picture is not None], start=1):
        (PICTURES / f"{number}.png").write_bytes(png(cell.picture))
    (DOCS / "tour.md").write_text(page(found), encoding="utf-8")
    (DOCS / "tour.ipynb").write_text(json.dumps(notebook(found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
