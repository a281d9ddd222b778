"""README, CONTRIBUTING and docs say what is there: rooms, files, commands with their options, tests, links."""

import argparse
import importlib
import inspect
import re
import shlex

import pytest
from helpers import ROOT

from minillava.cli import COMMANDS

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", README, re.M | re.S)


def test_the_tree_shows_every_room_and_every_file_of_the_hall():
    tree = next(block for block in BLOCKS if block.startswith("minillava/\n"))
    files = {path.name for path in (ROOT / "minillava").glob("*.py") if not path.stem.startswith("_")}
    rooms = {f"{path.name}/" for path in (ROOT / "minillava").iterdir() if path.is_dir() and path.name != "__pycache__"}
    inside, below = tree.split("\nkernels/")
    shown = set(re.findall(r"[a-z_]+\.py|^  [a-z_]+/", inside, re.M))
    assert {name.strip() for name in shown} == files | rooms
    for name in re.findall(r"([a-z_]+/|[a-z0-9_]+\.py)(?= )", "kernels/" + below):
        assert any((ROOT / folder / name).exists() for folder in ("", "kernels", "recipes")), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    named = re.findall(r"`((?:minillava|kernels|recipes|docs|tests|bench)/(?!.*NAME)[\w./-]*\w)`", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def commands():
    """Every `minillava ...` of README's blocks, lines joined."""
    lines = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
    return [
        re.sub(r"^.*?-m minillava|^minillava", "minillava", line)
        for line in lines
        if re.search(r"^(minillava |torchrun.* -m minillava )", line)
    ]


@pytest.mark.parametrize("line", commands())
def test_commands_have_these_options(line):
    _, name, *words = shlex.split(line, comments=True)
    assert name in COMMANDS
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"minillava.cli.{name}").add_arguments(parser)
    parser.parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tests_that_are_named_exist(page):
    found = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    for files, names in re.findall(
        r"`(test_\w+\.py)`(?:: ((?:`test_\w+`(?:, )?)+))?", page.read_text(encoding="utf-8")
    ):
        assert files in found, files
        for name in re.findall(r"test_\w+", names):
            assert f"def {name}(" in found[files], f"{files}: {name}"


def test_the_table_of_kernels_has_their_signatures():
    rows = re.findall(r"^\| `(\w+)` \| `(\(.*\))` \|$", README, re.M)
    assert len(rows) == 7
    for name, written in rows:
        function = getattr(importlib.import_module(f"minillava.kernels.{name}"), name)
        signature = inspect.signature(function)
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(bare)) == written, name


def test_the_example_for_other_projects_runs(capsys):
    (code,) = [block for block in BLOCKS if "from minillava.kernels import" in block]
    exec(code, {})
    assert capsys.readouterr().out == "torch.Size([576, 96]) torch.Size([576, 64])\n"
