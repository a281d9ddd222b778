"""Each public layout from a small sample of its documented format; boxes on the padded square and back."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from minillava.cli import main
from minillava.config import ImageConfig
from minillava.data.convert import CAPTION, DESCRIBE, LETTER, LOCATE, SHORT, convert, on_square
from minillava.data.table import scan
from minillava.errors import UserError
from minillava.media import image as pictures

QUESTIONS = {"data_subtype": "train2014", "questions": [
    {"image_id": 9, "question": "What is it?", "question_id": 90},
    {"image_id": 7, "question": "How many?", "question_id": 70},
    {"image_id": 9, "question": "Is it red?", "question_id": 91},
]}  # fmt: skip


def answered(*answers, **more):
    return {"answers": [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers)], **more}


COCO = {"images": [{"id": 9, "width": 200, "height": 100}],
        "annotations": [{"id": 5, "image_id": 9, "bbox": [20, 10, 100, 50]}]}  # fmt: skip
REFS = [{"ref_id": 1, "ann_id": 5, "image_id": 9, "split": "train", "sentences": [{"sent": "left dog"}]},
        {"ref_id": 2, "ann_id": 5, "image_id": 9, "split": "val", "sentences": [{"sent": "kept out"}]}]  # fmt: skip
BOX = "[0.10, 0.30, 0.60, 0.55]"  # (20, 10 + 50, 120, 60 + 50) / 200
REGIONS = [{"id": 3, "regions": [{"region_id": 1, "image_id": 3, "phrase": "a tree ", "x": 20, "y": 10, "width": 100,
                                  "height": 50}]}]  # fmt: skip
SIZES = [{"image_id": 3, "width": 200, "height": 100, "url": "https://x/rak248/VG_100K_2/3.jpg"}]
# Layout: files; what is said of each conversation, picture first.
PUBLIC = {
    "VQAv2": ([QUESTIONS, {"annotations": [
        answered("a dog", "dog", multiple_choice_answer="dog", question_id=90, image_id=9),
        answered("2", "2", "3", multiple_choice_answer="2", question_id=70, image_id=7),
        answered("no", multiple_choice_answer="no", question_id=91, image_id=9)]}],
        [["000000000009.jpg", f"<image>\nWhat is it?\n{SHORT}", "dog", "Is it red?", "no"],
         ["000000000007.jpg", f"<image>\nHow many?\n{SHORT}", "2"]]),
    "OK-VQA": ([QUESTIONS, {"annotations": [answered("cat", "dog", "dog", question_id=90, image_id=9)]}],
               [["000000000009.jpg", f"<image>\nWhat is it?\n{SHORT}", "dog"]]),
    "A-OKVQA": ([[{"image_id": 4, "question": "Why?", "choices": ["rain", "snow"], "correct_choice_idx": 1}]],
                [["000000000004.jpg", f"<image>\nWhy?\nA. rain\nB. snow\n{LETTER}", "B"],
                 ["000000000004.jpg", f"<image>\nWhy?\nA. snow\nB. rain\n{LETTER}", "A"]]),
    "GQA": ([{"01": {"imageId": "n16", "question": "Is it?", "answer": "yes", "fullAnswer": "Yes, it is."}}],
            [["n16.jpg", f"<image>\nIs it?\n{SHORT}", "yes"]]),
    "OCR-VQA": ([{"0761": {"imageURL": "http://x/1.jpg", "questions": ["Who wrote it?", "Which year?"],
                           "answers": ["A. B.", "1999"], "split": 1},
                  "0762": {"questions": ["Who?"], "answers": ["x"], "split": 3}}],
                [["0761.jpg", f"<image>\nWho wrote it?\n{SHORT}", "A. B.", "Which year?", "1999"]]),
    "TextCaps": ([{"data": [{"image_id": "ab", "caption_str": "A sign.", "image_path": "train/ab.jpg"}]}],
                 [["ab.jpg", f"<image>\n{CAPTION}", "A sign."]]),
    "RefCOCO": ([REFS, COCO], [["000000000009.jpg", f"<image>\n{DESCRIBE}\n{BOX}", "left dog"]]),
    "Visual Genome": ([REGIONS, SIZES], [["VG_100K_2/3.jpg", f"<image>\n{DESCRIBE}\n{BOX}", "a tree"]]),
    "ShareGPT": ([[{"id": "q", "conversations": [{"from": "gpt", "value": "Welcome"}, {"from": "human", "value": "Hi"},
                                                 {"from": "gpt", "value": "Hello"}, {"from": "human", "value": "?"}]},
                   {"id": "r", "conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}]],
                 [[None, "Hi", "Hello"]]),
}  # fmt: skip


@pytest.mark.parametrize("layout", list(PUBLIC))
def test_public_layouts(tmp_path, layout, capsys):
    files, expected = PUBLIC[layout]
    paths = [tmp_path / f"{i}" for i in range(len(files))]
    for path, content in zip(paths, files):
        path.write_text(json.dumps(content))
    found = list(convert(paths))
    if layout in ("RefCOCO", "Visual Genome"):  # which way is by chance
        both = [expected[0], [expected[0][0], f"<image>\n{LOCATE}\n{expected[0][2]}", BOX]]
        drawn = [said(sample) for seed in range(20) for sample in convert(paths, seed=seed)]
        assert all(one in both for one in drawn) and all(one in drawn for one in both)
        expected = [said(found[0])]
    assert [said(sample) for sample in found] == expected
    out = tmp_path / "set.jsonl"
    for more in ([], ["--append"]):
        assert main(["convert", *map(str, paths), "--out", str(out), "--images", "pictures/", *more]) == 0
    printed = capsys.readouterr().out
    assert f"{len(expected):,} {found[0]['source']} conversations" in printed
    assert ("1 ShareGPT conversations left out" in printed) == (layout == "ShareGPT")
    for row in expected:
        if row[0]:
            (tmp_path / "pictures" / row[0]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "pictures" / row[0]).write_bytes(b"")
    samples, report = scan(out, tmp_path)  # it trains as it is
    assert len(samples) == 2 * len(expected) and not report.problems


@pytest.mark.parametrize("more", [[], ["--append"]])
def test_a_file_that_another_process_writes_is_left_alone(tmp_path, capsys, more):
    out, holds = tmp_path / "set.jsonl", "import sys; from minillava.files import *; from pathlib import Path\n"
    holds += "with claimed_file(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    (tmp_path / "gqa.json").write_text(json.dumps({"1": {"imageId": "a", "question": "?", "answer": "!"}}))
    out.write_text("there\n")
    command = ["convert", str(tmp_path / "gqa.json"), "--out", str(out), *more]
    with subprocess.Popen([sys.executable, "-c", holds, str(out)], stdin=-1, stdout=-1) as other:
        assert other.stdout.readline() == b"held\n"
        assert main(command) == 2 and out.read_text() == "there\n"
        other.stdin.close()
    assert f"error: {out}: process {other.pid} of " in capsys.readouterr().err
    assert main(command) == 0
    lines = out.read_text().splitlines()
    assert len(lines) == 1 + bool(more) and json.loads(lines[-1])["image"] == "a.jpg"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gqa.json", "set.jsonl"]


def said(sample):
    return [sample.get("image"), *(turn["value"] for turn in sample["conversations"])]


def test_the_pickle_of_refcoco_is_read_and_none_that_would_run(tmp_path):
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(REFS, protocol=0))
    (tmp_path / "instances.json").write_text(json.dumps(COCO))
    assert len(list(convert([tmp_path / "refs(unc).p", tmp_path / "instances.json"]))) == 1
    (tmp_path / "bad.p").write_bytes(pickle.dumps(Image.open))
    with pytest.raises(UserError, match=r"bad.p: holds PIL.Image.open"):
        list(convert([tmp_path / "bad.p"]))


@pytest.mark.parametrize("content,words", [({"a": 1}, "of no known layout"), ({"data": []}, "of no known layout"),
                                           ({"1": {"questions": ["a"], "answers": []}}, "not as OCR-VQA has it"),
                                           ([{"conversations": []}, {"id": 1}], "not as ShareGPT has it"),
                                           (REFS, "not as RefCOCO has it")])  # fmt: skip
def test_what_is_not_known_is_refused(tmp_path, content, words):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        list(convert([tmp_path / "x.json"]))


def test_many_questions_are_several_conversations(tmp_path):
    rows = {str(i): {"imageId": "a", "question": f"{i}?", "answer": str(i)} for i in range(23)}
    (tmp_path / "gqa.json").write_text(json.dumps(rows))
    found = list(convert([tmp_path / "gqa.json"], turns=10))
    assert [len(sample["conversations"]) for sample in found] == [20, 20, 6]
    assert len({sample["id"] for sample in found}) == 3
    assert [sample["conversations"][0]["value"] for sample in found] == [f"<image>\n{i}?\n{SHORT}" for i in (0, 10, 20)]


def test_boxes_survive_padding_and_back():
    """On 1,000 sizes: within half of the last digit of the square's side."""
    rng = np.random.default_rng(0)
    for width, height in np.exp(rng.uniform(0, np.log(5000), (1000, 2))).astype(int).tolist():
        x1, x2 = sorted(rng.uniform(0, width, 2))
        y1, y2 = sorted(rng.uniform(0, height, 2))
        side, square = max(width, height), np.array(json.loads(on_square((x1, y1, x2, y2), width, height)))
        assert ((square >= 0) & (square <= 1)).all()
        back = square * side - [(side - width) // 2, (side - height) // 2] * 2
        assert np.abs(np.subtract(back, (x1, y1, x2, y2))).max() <= 0.005 * side + 1e-9


@pytest.mark.parametrize("width,height", [(40, 17), (17, 40), (31, 30), (30, 31), (25, 25), (64, 1)])
def test_boxes_are_where_the_padding_of_pictures_puts_them(width, height):
    """A red box is found by its pixels on the square that the model sees."""
    box = (width // 4, height // 4, width // 4 + max(1, width // 2), height // 4 + max(1, height // 2))
    picture = Image.new("RGB", (width, height), "white")
    picture.paste((255, 0, 0), box)
    side = max(width, height)
    padded = np.asarray(pictures._pad(picture, ImageConfig(size=side), "x"))
    rows, columns = np.nonzero((padded == (255, 0, 0)).all(-1))
    found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    square = np.array(json.loads(on_square(box, width, height)))
    assert (np.rint(square * side) == found).all() and np.abs(square - np.divide(found, side)).max() <= 0.005 + 1e-9
