"""Benchmarks in their public formats: annotations and answers in, the numbers that papers report out.

Answers are rows with `question_id` (or `id`) and `text` (or `answer`), as LLaVA's scripts and `minillava jobs` write
them; MME's own tool has a folder of tables too. A question without an answer counts as wrong.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from minillava.errors import UserError
from minillava.evaluation import answers as rules
from minillava.files import parse_json, read_rows, read_text

Scores = dict[str, float]  # in %, or points
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")


class Answers(dict[str, dict[str, Any]]):
    """By id: rows with their `text`. `missed` are the questions that were looked for and are not there."""

    def __init__(self) -> None:
        self.missed: set[str] = set()


def read_answers(path: Path) -> Answers:
    """Raises UserError for a row without an id, or whose id comes twice; what `jobs` could not answer is empty."""
    found = Answers()
    for number, row in enumerate(read_rows(path), 1):
        name = row.get("question_id", row.get("id", row.get("questionId"))) if isinstance(row, dict) else None
        if name is None:
            raise UserError(f"{path}: row {number} has no question_id or id; give each answer the id of its question")
        if str(name) in found:
            raise UserError(f"{path}: the answer to {name} comes twice; leave one out")
        found[str(name)] = row | {"text": str(row.get("text", row.get("answer", row.get("prediction", ""))))}
    if not found:
        raise UserError(f"{path}: has no answers; give a row of question_id and text for each question")
    return found


def _json(path: Path) -> Any:
    return parse_json(read_text(path), path)


def _share(scores: Iterable[float]) -> float:
    return 100 * mean(scores)


def _text(found: Answers, name: Any) -> str:
    if str(name) not in found:
        found.missed.add(str(name))
    return found[str(name)]["text"] if str(name) in found else ""


def _each(rule: Callable[[str, Any], float], truth: Mapping[Any, Any], found: Answers) -> Scores:
    """One number: the mean over the questions."""
    return {"accuracy": _share(rule(_text(found, name), given) for name, given in truth.items())}


def vqa(path: Path, found: Answers) -> Scores:
    """VQAv2 and OK-VQA: annotations of the VQA site; also by type of answer."""
    rows = _json(path)["annotations"]
    scores = {row["question_id"]: rules.vqa(_text(found, row["question_id"]), _said(row)) for row in rows}
    kinds = sorted({row.get("answer_type", "") for row in rows} - {""})
    return {"accuracy": _share(scores.values())} | {
        kind: _share(scores[row["question_id"]] for row in rows if row["answer_type"] == kind) for kind in kinds
    }


def _said(row: Mapping[str, Any]) -> list[str]:
    return [answer["answer"] if isinstance(answer, dict) else answer for answer in row["answers"]]


def vizwiz(path: Path, found: Answers) -> Scores:
    """A list of pictures, whose name is the question's id."""
    return _each(rules.vqa, {row["image"]: _said(row) for row in read_rows(path)}, found)


def textvqa(path: Path, found: Answers) -> Scores:
    """TextVQA's JSON. LLaVA's answers have the picture's id and the question in their prompt; others the question's."""
    rows, scores = _json(path)["data"], []
    for row in rows:
        name = row["question_id"] if str(row["question_id"]) in found else row["image_id"]
        asked = found.get(str(name), {}).get("prompt", row["question"])
        same = row["question"].lower() in asked.lower()
        scores.append(rules.textvqa(_text(found, name) if same else "", _said(row)))
    return {"accuracy": _share(scores)}


def gqa(path: Path, found: Answers) -> Scores:
    """The questions of a split: id -> answer."""
    return _each(rules.gqa, {name: row["answer"] for name, row in _json(path).items()}, found)


def pope(path: Path, found: Answers) -> Scores:
    """Rows with question_id, label and category (random, popular, adversarial); papers report the mean of three F1."""
    groups = defaultdict(list)
    for row in read_rows(path):
        groups[row.get("category", "all")].append((rules.pope(_text(found, row["question_id"])), row["label"]))
    scores: Scores = {}
    for name, pairs in groups.items():
        yes, right = [said == "yes" for said, _ in pairs], [label == "yes" for _, label in pairs]
        hits = sum(a and b for a, b in zip(yes, right))
        precision, recall = hits / max(1, sum(yes)), hits / max(1, sum(right))
        scores |= {
            f"{name} F1": 100 * 2 * precision * recall / ((precision + recall) or 1),
            f"{name} accuracy": _share(said == label for said, label in pairs),
            f"{name} precision": 100 * precision,
            f"{name} recall": 100 * recall,
            f"{name} yes": _share(yes),
        }
    return {"F1": mean(scores[f"{name} F1"] for name in groups)} | scores


def scienceqa(path: Path, found: Answers) -> Scores:
    """problems.json, with pid_splits.json beside it of its split test; also of the questions with a picture alone."""
    problems, splits = _json(path), path.with_name("pid_splits.json")
    names = _json(splits)["test"] if splits.is_file() else list(problems)
    letters = "ABCDE"
    right = {}
    for name in names:
        said = rules.letter(_text(found, name), letters)
        at = letters.index(said) if said else -1
        right[name] = float(at == problems[name]["answer"] and at < len(problems[name]["choices"]))
    pictures = [right[name] for name in names if problems[name].get("image")]
    return {"accuracy": _share(right.values())} | ({"with a picture": _share(pictures)} if pictures else {})


def mme(path: Path, found: Answers) -> Scores:
    """Rows with question_id, image, category and label. For each task accuracy and accuracy+ (both questions about a
    picture), added up; perception and cognition are sums over their tasks."""
    tasks: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(path):
        label = str(row["label"]).lower().strip().rstrip(".")
        tasks[row["category"]][row["image"]].append(rules.mme(_text(found, row["question_id"])) == label)
    points = {}
    for name, pictures in tasks.items():
        if odd := next((picture for picture, right in pictures.items() if len(right) != 2), None):
            raise UserError(
                f"{path}: {name}: {odd} has {len(pictures[odd])} questions; MME asks two about each picture"
            )
        plus = _share(all(right) for right in pictures.values())
        points[name] = _share(one for right in pictures.values() for one in right) + plus
    sums = {"perception": 0.0, "cognition": 0.0}
    for name, value in points.items():
        sums["perception" if name in PERCEPTION else "cognition"] += value
    return sums | points


def seed(path: Path, found: Answers) -> Scores:
    """SEED-Bench.json: all, of pictures, of videos, and by type of question."""
    data = _json(path)
    names = {number: name for name, number in data.get("question_type", {}).items()}
    right, groups = {}, defaultdict(list)
    for row in data["questions"]:
        name = row["question_id"]
        right[name] = float(rules.first_letter(_text(found, name)) == row["answer"])
        kind = row.get("question_type_id")
        for group in (row.get("data_type"), names.get(kind, kind)):
            groups[str(group)].append(right[name])
    return {"accuracy": _share(right.values())} | {name: _share(group) for name, group in groups.items()}


def mmbench(path: Path, found: Answers) -> Scores:
    """A table with index and answer. Rotated questions (index + n 1,000,000) count as right when all of them are."""
    rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t"))
    if not rows or not {"index", "answer"} <= rows[0].keys():
        raise UserError(f"{path}: has no columns index and answer; the test split's answers are not public, take dev")
    right = {row["index"]: rules.first_letter(_text(found, row["index"])) == row["answer"] for row in rows}
    whole = defaultdict(list)
    for name, hit in right.items():
        whole[int(name) % 1_000_000].append(hit)
    scores = {"accuracy": _share(right.values())}
    return scores | ({"circular": _share(map(all, whole.values()))} if len(whole) < len(right) else {})


def chartqa(path: Path, found: Answers) -> Scores:
    """A list of rows with label, whose ids are `id` or their numbers from 0."""
    rows = read_rows(path)
    return _each(rules.relaxed, {row.get("id", n): str(row["label"]) for n, row in enumerate(rows)}, found)


def docvqa(path: Path, found: Answers) -> Scores:
    """DocVQA and InfographicVQA: ANLS."""
    truth = {row["questionId"]: row["answers"] for row in _json(path)["data"]}
    return {"ANLS": _each(rules.anls, truth, found)["accuracy"]}


BENCHMARKS: dict[str, Callable[[Path, Answers], Scores]] = {
    "vqav2": vqa, "okvqa": vqa, "vizwiz": vizwiz, "textvqa": textvqa, "gqa": gqa, "pope": pope, "scienceqa": scienceqa,
    "mme": mme, "seed": seed, "mmbench": mmbench, "chartqa": chartqa, "docvqa": docvqa,
}  # fmt: skip

# As published by haotian-liu/LLaVA (docs/MODEL_ZOO.md: LLaVA-1.5 and NeXT) and by arXiv 2408.03326 (OneVision).
MODELS = ("LLaVA-1.5 7B", "LLaVA-1.5 13B", "NeXT Vicuna-7B", "NeXT Mistral-7B", "NeXT Vicuna-13B", "NeXT 34B")
PUBLISHED: dict[str, tuple[str, Sequence[float | None]]] = {  # benchmark -> the score that is meant, and it by model
    "vqav2": ("accuracy", (78.5, 80.0, 81.8, 82.2, 82.8, 83.7)),
    "gqa": ("accuracy", (62.0, 63.3, 64.2, 64.8, 65.4, 67.1)),
    "vizwiz": ("accuracy", (50.0, 53.6, 57.6, 60.0, 60.5, 63.8)),
    "scienceqa": ("with a picture", (66.8, 71.6, 70.1, 72.8, 73.6, 81.8)),
    "textvqa": ("accuracy", (58.2, 61.3, 64.9, 65.7, 67.1, 69.5)),
    "pope": ("F1", (85.9, 85.9, 86.5, 86.7, 86.2, 87.7)),
    "mme": ("perception", (1510.7, 1531.3, 1519.0, 1498.0, 1575.0, 1631.0)),
    "mmbench": ("accuracy", (64.3, 67.7, 67.4, 68.7, 70.0, 79.3)),
    "seed": ("accuracy", (58.6, 61.6, None, None, None, None)),
}
TOLERANCE = {"mme": 15.0}  # points; others 0.5: other cards and batches move that much (re-runs in LLaVA's issue 927)


def compared(benchmark: str, scores: Scores) -> list[tuple[str, float, bool]]:
    """Published models: the number, and whether the score is within the tolerance of it."""
    name, values = PUBLISHED.get(benchmark, ("", ()))
    if name not in scores:
        return []
    near = TOLERANCE.get(benchmark, 0.5)
    return [(model, value, abs(scores[name] - value) <= near) for model, value in zip(MODELS, values) if value]
