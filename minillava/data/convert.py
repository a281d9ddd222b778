"""Public data sets as conversations: VQAv2, OK-VQA, A-OKVQA, GQA, OCR-VQA, TextCaps, RefCOCO, Visual Genome, ShareGPT.

By content, never by name. Prompts for the form of answers are LLaVA-1.5's (arXiv 2310.03744, table 7): questions about
one picture become turns of one conversation, boxes are on the padded square, and multiple-choice questions are asked as
often as they have choices, each time in another order of these.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillava.data.layouts import MARKER
from minillava.errors import UserError
from minillava.files import claimed_file, named, parse_json, read_rows, read_text

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
DESCRIBE = "Provide a short description for this region."
LOCATE = "Provide the bounding box coordinate of the region this sentence describes."


@dataclass(frozen=True)
class Turn:
    """A question about a picture and its answer; `form` says how to answer."""

    image: str
    question: str
    answer: str
    form: str = ""
    copy: int = 0  # of the same question; copies are no turns of one conversation


def vqa(files: Sequence[Any], rng: random.Random) -> Iterator[Turn]:
    """VQAv2's and OK-VQA's questions and annotations; the answer is the one that most annotators gave."""
    asked = {q["question_id"]: q for file in files for q in file.get("questions", ())}
    for given in (a for file in files for a in file.get("annotations", ())):
        answer = given.get("multiple_choice_answer")
        answer = answer or Counter(a["answer"] for a in given["answers"]).most_common(1)[0][0]  # of several the first
        question = asked.get(given["question_id"])
        if question is None:
            raise UserError(f"an annotation of question {given['question_id']}, which is in no file; give its file too")
        yield Turn(f"{given['image_id']:012d}.jpg", question["question"], answer, SHORT)


def aokvqa(files: Sequence[Any], rng: random.Random) -> Iterator[Turn]:
    """A-OKVQA: choices by letter, in as many orders as there are choices."""
    for item in (item for file in files for item in file):
        choices, right = item["choices"], item["correct_choice_idx"]
        for shift in range(len(choices)):
            order = [(at + shift) % len(choices) for at in range(len(choices))]
            options = "\n".join(f"{chr(65 + at)}. {choices[choice]}" for at, choice in enumerate(order))
            letter = chr(65 + order.index(right))
            yield Turn(f"{item['image_id']:012d}.jpg", f"{item['question']}\n{options}", letter, LETTER, shift)


def gqa(files: Sequence[Any], rng: random.Random) -> Iterator[Turn]:
    """GQA's questions by their id."""
    for item in (item for file in files for item in file.values()):
        yield Turn(f"{item['imageId']}.jpg", item["question"], item["answer"], SHORT)


def ocrvqa(files: Sequence[Any], rng: random.Random) -> Iterator[Turn]:
    """OCR-VQA's book covers, those of its training split (1)."""
    for name, item in ((name, item) for file in files for name, item in file.items()):
        if item.get("split", 1) == 1:
            for question, answer in zip(item["questions"], item["answers"], strict=True):
                yield Turn(f"{name}.jpg", question, answer, SHORT)


def textcaps(files: Sequence[Any], rng: random.Random) -> Iterator[Turn]:
    """One of TextCaps' captions of each picture, with the words that were read there where the file has them."""
    captions: dict[str, list[tuple[str, str]]] = {}
    for item in (item for file in files for item in file["data"]):
        tokens = item.get("ocr_tokens")
        form = f"{CAPTION}\nReference OCR token: {', '.join(tokens)}" if tokens else CAPTION
        for caption in [item["caption_str"]] if item.get("caption_str") else item["reference_strs"]:
            captions.setdefault(item["image_id"], []).append((caption, form))
    for image, some in captions.items():
        caption, form = rng.choice(some)
        yield Turn(f"{image}.jpg", "", caption, form)


def refcoco(files: Sequence[Any], rng: random.Random) -> Iterator[Turn]:
    """RefCOCO's, RefCOCO+'s and RefCOCOg's sentences, and COCO's instances; those of its training split."""
    sizes = {i["id"]: i for file in files if isinstance(file, dict) for i in file["images"]}
    boxes = {a["id"]: a["bbox"] for file in files if isinstance(file, dict) for a in file["annotations"]}
    for ref in (ref for file in files if isinstance(file, list) for ref in file):
        if ref.get("split", "train") == "train":
            size, (x, y, width, height) = sizes[ref["image_id"]], boxes[ref["ann_id"]]
            box = on_square((x, y, x + width, y + height), size["width"], size["height"])
            for sentence in ref["sentences"]:
                yield region(f"{ref['image_id']:012d}.jpg", sentence["sent"], box, rng)


def genome(files: Sequence[Any], rng: random.Random) -> Iterator[Turn]:
    """Visual Genome's region descriptions, and its image data for the sizes."""
    sizes = {i["image_id"]: i for file in files for i in file if "width" in i}
    for area in (area for file in files for i in file for area in i.get("regions", ())):
        size = sizes[area["image_id"]]
        folder = size.get("url", "VG_100K/").rsplit("/", 2)[-2]
        width, height = size["width"], size["height"]
        left, top = min(max(area["x"], 0), width), min(max(area["y"], 0), height)
        edges = (left, top, min(area["x"] + area["width"], width), min(area["y"] + area["height"], height))
        box = on_square(edges, width, height)
        yield region(f"{folder}/{area['image_id']}.jpg", area["phrase"].strip(), box, rng)


def on_square(box: tuple[float, ...], width: int, height: int) -> str:
    """A box (left, top, right, bottom) in pixels of a picture as LLaVA-1.5's data has it: [0.12, 0.30, 0.56, 0.98].

    These are shares of the side of the square that `media.image` pads to: as wide as the longer side, the picture in
    its middle, half a pixel to the left or top where that does not come out even.
    """
    side = max(width, height)
    padding = ((side - width) // 2, (side - height) // 2) * 2
    return f"[{', '.join(f'{(at + before) / side:.2f}' for at, before in zip(box, padding))}]"


def region(image: str, phrase: str, box: str, rng: random.Random) -> Turn:
    """What is at a place, or where something is, by chance."""
    asked, answer, form = (box, phrase, DESCRIBE) if rng.random() < 0.5 else (phrase, box, LOCATE)
    return Turn(image, f"{form}\n{asked}", answer)


def has(value: Any, *keys: str) -> bool:
    return isinstance(value, dict) and all(key in value for key in keys)


def first(value: Any) -> Any:
    return next(iter(value.values() if isinstance(value, dict) else value), None) if value else None


# Layout -> what one of its files looks like, and what reads all of them.
LAYOUTS: dict[str, tuple[Callable[[Any], bool], Callable[[Sequence[Any], random.Random], Iterator[Turn]]]] = {
    "VQA": (lambda f: has(f, "annotations") and has(first(f["annotations"]), "question_id", "answers"), vqa),
    "A-OKVQA": (lambda f: isinstance(f, list) and has(first(f), "choices", "correct_choice_idx"), aokvqa),
    "GQA": (lambda f: isinstance(f, dict) and has(first(f), "imageId", "question", "answer"), gqa),
    "OCR-VQA": (lambda f: isinstance(f, dict) and has(first(f), "questions", "answers"), ocrvqa),
    "TextCaps": (lambda f: has(f, "data") and (has(first(f["data"]), "caption_str")
                                               or has(first(f["data"]), "reference_strs")), textcaps),
    "RefCOCO": (lambda f: isinstance(f, list) and has(first(f), "ann_id", "sentences"), refcoco),
    "Visual Genome": (lambda f: isinstance(f, list) and has(first(f), "regions"), genome),
}  # fmt: skip


def convert(
    paths: Sequence[Path], folder: str = "", turns: int = 10, seed: int = 0, counts: Counter[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Samples of LLaVA's JSON from the files of one data set, with `folder` in front of the names of pictures and at
    most so many turns each; what is left out is in `counts`.

    Raises UserError for files of no layout that is known, and for one that breaks its own."""
    files = [load(path) for path in paths]
    if any(isinstance(file, list) and has(first(file), "conversations") for file in files):
        try:
            yield from sharegpt(files, Counter() if counts is None else counts)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{paths[0]}: not as ShareGPT has it ({error!r}); correct it") from None
        return
    for name, (looks, read) in LAYOUTS.items():
        if any(looks(file) for file in files):
            try:
                yield from merged(read(files, random.Random(seed)), name, folder, turns)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise UserError(f"{paths[0]}: not as {name} has it ({error!r}); give all of its files") from None
            return
    raise UserError(
        f"{paths[0]}: of no known layout ({', '.join([*LAYOUTS, 'ShareGPT'])}); write LLaVA's JSON yourself"
    )


def merged(found: Iterable[Turn], source: str, folder: str, most_turns: int) -> Iterator[dict[str, Any]]:
    """Turns about one picture as conversations, by first questions, behind which the form of all answers stands."""
    by_image: dict[tuple[str, str, int], list[Turn]] = {}
    for turn in found:
        by_image.setdefault((turn.image, turn.form, turn.copy), []).append(turn)
    for (image, form, copy), turns in by_image.items():
        for start in range(0, len(turns), most_turns):
            said = []
            for number, turn in enumerate(turns[start : start + most_turns]):
                lines = [MARKER, turn.question, form] if number == 0 else [turn.question or form]
                said.append({"from": "human", "value": "\n".join(filter(None, lines))})
                said.append({"from": "gpt", "value": turn.answer})
            name = f"{source}/{image}/{copy}.{start // most_turns}"
            yield {"id": name, "image": folder + image, "conversations": said, "source": source}


def sharegpt(files: Iterable[Any], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """ShareGPT's conversations: without an opening answer or an unanswered question, and those of two who alternate;
    others are counted."""
    roles = {"human": "human", "user": "human", "gpt": "gpt", "chatgpt": "gpt", "bing": "gpt", "bard": "gpt"}
    for number, item in enumerate(item for file in files for item in file):
        said = [(roles.get(turn.get("from")), turn.get("value")) for turn in item["conversations"]]
        said = said[1:] if said and said[0][0] == "gpt" else said
        said = said[:-1] if len(said) % 2 else said
        right = all(role == ("human", "gpt")[i % 2] and text for i, (role, text) in enumerate(said))
        if said and right and not any(MARKER in text for _, text in said):
            turns = [{"from": role, "value": text} for role, text in said]
            yield {"id": f"ShareGPT/{item.get('id', number)}", "conversations": turns, "source": "ShareGPT"}
        else:
            counts["ShareGPT conversations left out (empty, not of two in turn, or with a marker)"] += 1


class Plain(pickle.Unpickler):
    """Reads lists, objects, texts and numbers, and nothing that would run: refs(unc).p of RefCOCO has no more."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(f"holds {module}.{name}, which data has no need of; write it as JSON")


def load(path: Path) -> Any:
    """A JSON file, JSON lines, or RefCOCO's pickle. Raises UserError."""
    try:
        with path.open("rb") as file:
            if file.read(1) in (b"\x80", b"(") or path.suffix in (".p", ".pkl"):
                file.seek(0)
                return Plain(file, encoding="utf-8").load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()}); check the path") from None
    except (ValueError, EOFError, LookupError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: is no pickle of data ({' '.join(str(error).split())}); fetch it again") from None
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return read_rows(path)
    except (ValueError, RecursionError):
        return parse_json(text, path)  # which says what is wrong


def write_set(paths: Sequence[Path], out: Path, folder: str, turns: int, seed: int, append: bool) -> Counter[str]:
    """Write the samples of a data set as JSON lines, behind what is there with `append`; counts by source.

    Raises UserError where another process writes there.
    """
    counts: Counter[str] = Counter()
    with named(out), contextlib.ExitStack() as until_the_end:
        file = until_the_end.enter_context(out.open("a", encoding="utf-8", errors="backslashreplace"))
        if out.is_file():  # a device has no lock, and nothing to go
            until_the_end.enter_context(claimed_file(out))
            if not append:
                file.truncate(0)
        for sample in convert(paths, folder, turns, seed, counts):
            counts[f"{sample['source']} conversations"] += 1
            counts[f"{sample['source']} answers"] += len(sample["conversations"]) // 2
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    return counts
