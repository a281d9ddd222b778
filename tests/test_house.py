"""The house: which room may import which, as ../docs/house.md draws it; read from the source, nothing is run.

`python tests/test_house.py` prints rooms, floors and arrows, and how long the code is.
"""

import ast
import re
import statistics
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [path.name for path in sorted((ROOT / "minillava").iterdir()) if (path / "__init__.py").is_file()]
MODEL = ["llava", "vit", "projector", "decoder", "visual_tokens"]  # the files that show LLaVA itself
HALL = [*MODEL, "processor", "config", "schema", "device", "errors"]  # what is read in an afternoon
SCRIPTS = [ROOT / "train.py", ROOT / "generate.py"]  # two of cli's commands, for a checkout that is not installed
GROUND = ["errors", "schema", "config", "device", "files", "kernels"]  # what any room may use

# What a room may import besides GROUND, and itself. A script may import anything.
_ALLOWED: dict[str, list[str]] = {
    "errors": [],
    "schema": ["errors", "files"],
    "config": ["errors", "schema"],
    "device": ["errors"],
    "files": ["errors"],
    "kernels": [],
    "recipe": [],
    "layers": [],
    "visual_tokens": [],
    "vit": ["layers"],
    "decoder": ["layers"],
    "projector": ["layers", "visual_tokens"],
    "llava": ["layers", "vit", "projector", "decoder", "visual_tokens"],
    "chat": [],
    "media": ["visual_tokens"],
    "processor": ["chat", "media", "visual_tokens"],
    "checkpoints": [*MODEL, "layers", "chat"],
    "generation": [*MODEL, "layers", "chat", "processor", "media"],
    "data": ["processor", "chat", "media", "visual_tokens", "recipe"],
    "api": [*MODEL, "layers", "chat", "media", "processor", "checkpoints", "generation"],
}
_ALLOWED["evaluation"] = [*_ALLOWED["generation"], "generation", "data", "checkpoints", "recipe", "api"]
_ALLOWED["training"] = [r for r in _ALLOWED if r not in (*GROUND, "evaluation")]
_ALLOWED["synthetic"] = [*_ALLOWED["training"], "training"]


def sources() -> dict[str, list[Path]]:
    """The Python files of every room; tests are no room."""
    package = ROOT / "minillava"
    rooms = {p.stem: [p] for p in package.glob("*.py") if not p.stem.startswith("__")}
    rooms |= {folder: sorted((package / folder).rglob("*.py")) for folder in FOLDERS}
    rooms |= {"kernels": sorted((ROOT / "kernels").rglob("*.py")), "bench": sorted((ROOT / "bench").rglob("*.py"))}
    rooms["cli"] += SCRIPTS
    return rooms


def imported(path: Path) -> set[str]:
    """The rooms whose modules a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            bare = module in ("minillava", "bench")
            names = [f"{module}.{alias.name}" for alias in node.names] if bare else [module]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "minillava" and rest:
                found.add(rest.split(".")[0])
            elif top == "bench":
                found.add("bench")
    # `from minillava import LLaVA` is what minillava/__init__.py takes from api.py.
    return {"api" if name == "LLaVA" else name for name in found} - {"__version__"}


def arrows() -> dict[str, set[str]]:
    """Room -> the rooms that it imports."""
    return {room: set().union(*map(imported, paths)) - {room} for room, paths in sources().items()}


def floor_of(graph: dict[str, set[str]]):
    """A function that tells a room's floor: 1 for what imports no other room. A circle is a RecursionError."""

    @cache
    def floor(room: str) -> int:
        return 1 + max(map(floor, graph[room]), default=0)

    return floor


def functions() -> list[tuple[int, str]]:
    """Lines of every function of the engine, and its name."""
    found = []
    for paths in sources().values():
        for path in paths:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    found.append((node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}: {node.name}"))
    return sorted(found, reverse=True)


def lines_of(paths) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def hall_lines() -> int:
    return lines_of(ROOT / "minillava" / f"{name}.py" for name in HALL)


def engine_lines() -> int:
    """minillava, kernels with C, and the scripts."""
    suffixes = (".py", ".c", ".h")
    rooms = [path for folder in ("minillava", "kernels") for path in (ROOT / folder).rglob("*")]
    return lines_of([path for path in rooms if path.suffix in suffixes] + SCRIPTS)


def test_no_import_runs_up_and_none_leaves_its_table():
    wrong = {
        f"{room} -> {other}"
        for room, others in arrows().items()
        if room in _ALLOWED
        for other in others
        if other not in GROUND and other not in _ALLOWED[room]
    }
    assert not wrong


def test_instruction_data_needs_no_training():
    """A folder of `synthetic` that asks models: it would stand beside `evaluation` if it were a room."""
    found = set().union(*map(imported, (ROOT / "minillava" / "synthetic" / "instruct").glob("*.py")))
    assert found <= {*GROUND, *_ALLOWED["generation"], "generation", "api", "synthetic"}


def test_every_room_has_its_line_in_the_table():
    assert set(sources()) - set(_ALLOWED) - {"bench", "cli"} == set()


def test_no_circle_and_few_floors():
    graph = arrows()
    assert {other for others in graph.values() for other in others} <= set(graph)
    floor = floor_of(graph)
    floors = {room: floor(room) for room in graph}
    assert max(floors.values()) <= 10 and len(floors) <= 26


def test_modules_of_a_room_make_no_circle():
    """Within a room as well: a reader of one file needs no other that needs it."""
    files = {path for paths in sources().values() for path in paths}
    module = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    module |= {f"minillava.{name}": path for name, path in module.items() if name.startswith("kernels")}

    def needs(path):
        found = set()
        for node in ast.parse(path.read_text()).body:  # at the top: what is imported in a function is there by then
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                found |= {module[name] for name in names if name in module}
        return found - {path}

    floor = floor_of({path: needs(path) for path in files})
    assert max(map(floor, files)) < 40


def test_the_hall_is_short():
    assert hall_lines() <= 1600


def test_functions_are_short():
    found = functions()
    assert statistics.median(length for length, _ in found) <= 8
    assert [name for length, name in found if length > 60] == []


def test_packages_of_the_wheel_are_the_folders():
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'^ {4}"(minillava[\w.]*)",$', text, re.M))
    folders = {path.parent for name in ("minillava", "kernels") for path in (ROOT / name).rglob("*.py")}
    folders |= {ROOT / "recipes"}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert listed == {name if name.startswith("minillava") else f"minillava.{name}" for name in names}


if __name__ == "__main__":
    graph = arrows()
    floor = floor_of(graph)
    for room in sorted(graph, key=floor):
        print(f"{floor(room):2} {room:14} {lines_of(sources()[room]):6} lines -> {', '.join(sorted(graph[room]))}")
    print(f"{len(graph)} rooms, {max(map(floor, graph))} floors, {sum(map(len, graph.values()))} arrows")
    print(f"hall {hall_lines()} lines, engine {engine_lines()} lines")
    print(f"functions: median {statistics.median(n for n, _ in functions())}, longest {functions()[:5]}")
