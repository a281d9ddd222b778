"""Each benchmark from a small file in its public format, with scores worked by hand; and the command."""

import csv
import itertools
import json
import random
import re

import pytest

from minillava.cli import evaluate, main
from minillava.evaluation import benchmarks
from minillava.synthetic import shapes


def put(path, content, lines=False):
    text = "".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content)
    path.write_text(text)
    return path


def said(folder, texts, **more):
    rows = [
        {"question_id": name, "text": text, "answer_id": "x", "model_id": "y"} | more for name, text in texts.items()
    ]
    return put(folder / "answers.jsonl", rows, lines=True)


def scores(capsys, name, annotations, answers):
    assert main(["evaluate", name, str(annotations), str(answers), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["scores"]


def people(*texts):
    return [{"answer": text, "answer_id": n} for n, text in enumerate(texts)]


def test_vqa_by_type_and_missing_answers_are_wrong(tmp_path, capsys):
    rows = [
        {"question_id": 1, "answer_type": "yes/no", "answers": people(*["yes"] * 9, "no")},
        {"question_id": 2, "answer_type": "number", "answers": people(*["2"] * 5, *["three"] * 5)},
        {"question_id": 3, "answer_type": "number", "answers": people(*["7"] * 9, "8")},
    ]
    path = put(tmp_path / "v2_val.json", {"annotations": rows})
    found = scores(capsys, "vqav2", path, said(tmp_path, {1: "Yes", 2: "two"}))
    assert found == {"accuracy": pytest.approx(200 / 3), "number": 50.0, "yes/no": 100.0}


def test_vizwiz_and_textvqa(tmp_path, capsys):
    path = put(tmp_path / "val.json", [{"image": "a.jpg", "answers": people(*["cat"] * 2, *["dog"] * 8)}])
    found = scores(capsys, "vizwiz", path, said(tmp_path, {"a.jpg": "cat"}))
    assert found["accuracy"] == pytest.approx(100 * (2 * 1 / 3 + 8 * 2 / 3) / 10)
    rows = [{"question_id": 5, "image_id": "p", "question": "What is it?", "answers": ["red"] * 9 + ["stop"]},
            {"question_id": 6, "image_id": "p", "question": "Which year?", "answers": ["1999"] * 10}]  # fmt: skip
    path = put(tmp_path / "textvqa.json", {"data": rows})
    llavas = [{"question_id": "p", "prompt": "Which year?\nAnswer with one word.", "text": "1999"}]
    found = scores(capsys, "textvqa", path, put(tmp_path / "a.jsonl", llavas, lines=True))
    assert found == {"accuracy": 50.0}
    assert scores(capsys, "textvqa", path, said(tmp_path, {5: "Stop", 6: "1999"})) == {"accuracy": 65.0}


def test_gqa_chartqa_docvqa(tmp_path, capsys):
    path = put(tmp_path / "gqa.json", {"1": {"answer": "yes"}, "2": {"answer": "left"}, "3": {"answer": "dog"}})
    found = scores(capsys, "gqa", path, said(tmp_path, {"1": "Yes.", "2": "right", "3": "Dog"}))
    assert found["accuracy"] == pytest.approx(200 / 3)
    path = put(tmp_path / "chart.json", [{"imgname": "a", "label": "100"}, {"imgname": "b", "label": "Blue"}])
    assert scores(capsys, "chartqa", path, said(tmp_path, {0: "104", 1: "red"})) == {"accuracy": 50.0}
    path = put(
        tmp_path / "doc.json", {"data": [{"questionId": 1, "answers": ["hello"]}, {"questionId": 2, "answers": ["x"]}]}
    )
    assert scores(capsys, "docvqa", path, said(tmp_path, {1: "helo", 2: "nothing"})) == {"ANLS": pytest.approx(40.0)}


def test_pope_is_the_mean_of_three_f1(tmp_path, capsys):
    labels = {"random": "yyyn", "popular": "yynn", "adversarial": "ynnn"}
    given = {"random": "yynn", "popular": "yyyn", "adversarial": "nyyn"}
    word = {"y": "yes", "n": "no"}
    rows, texts = [], {}
    for group, letters in labels.items():
        for n, (label, answer) in enumerate(zip(letters, given[group])):
            rows.append({"question_id": f"{group}{n}", "category": group, "label": word[label]})
            texts[f"{group}{n}"] = {"y": "Yes, it is.", "n": "No"}[answer]
    found = scores(capsys, "pope", put(tmp_path / "p.jsonl", rows, lines=True), said(tmp_path, texts))
    f1 = [2 * 1 * (2 / 3) / (1 + 2 / 3), 2 * (2 / 3) * 1 / (2 / 3 + 1), 0.0]
    assert found["F1"] == pytest.approx(100 * sum(f1) / 3)
    assert (found["random accuracy"], found["random precision"], found["random recall"], found["random yes"]) == (
        75.0, 100.0, pytest.approx(200 / 3), 50.0
    )  # fmt: skip


def test_scienceqa_of_the_test_split(tmp_path, capsys):
    problem = {"choices": ["cat", "dog", "cow"], "answer": 1}
    problems = {"1": {**problem, "image": "image.png"}, "2": problem, "3": problem, "4": problem}
    path = put(tmp_path / "problems.json", problems)
    put(tmp_path / "pid_splits.json", {"test": ["1", "2", "3"], "train": ["4"]})
    found = scores(capsys, "scienceqa", path, said(tmp_path, {"1": "B", "2": "The answer is B.", "3": "E", "4": "A"}))
    assert found == {"accuracy": pytest.approx(200 / 3), "with a picture": 100.0}


def test_mme_adds_accuracy_and_accuracy_plus(tmp_path, capsys):
    rows, texts = [], {}
    for task, picture, answers in (("color", "a", "YY"), ("color", "b", "YN"), ("code_reasoning", "c", "NN")):
        for n, answer in enumerate(answers):
            name = f"{task}/{picture}{n}"
            rows.append({"question_id": name, "image": picture, "category": task, "label": "Yes"})
            texts[name] = {"Y": "Yes.", "N": "no"}[answer]
    path = put(tmp_path / "mme.jsonl", rows, lines=True)
    found = scores(capsys, "mme", path, said(tmp_path, texts))
    assert found == {"perception": 75.0 + 50.0, "cognition": 0.0, "color": 125.0, "code_reasoning": 0.0}
    put(path, rows[:-1], lines=True)
    assert main(["evaluate", "mme", str(path), str(tmp_path / "answers.jsonl")]) == 2
    assert "c has 1 questions; MME asks two" in capsys.readouterr().err


def test_seed_and_mmbench_with_rotations(tmp_path, capsys):
    questions = [{"question_id": "1", "answer": "A", "question_type_id": 1, "data_type": "image"},
                 {"question_id": "2", "answer": "C", "question_type_id": 10, "data_type": "video"}]  # fmt: skip
    path = put(tmp_path / "seed.json", {"questions": questions, "question_type": {"Scene": 1, "Action": 10}})
    found = scores(capsys, "seed", path, said(tmp_path, {"1": "A. cat", "2": "B"}))
    assert found == {"accuracy": 50.0, "image": 100.0, "Scene": 100.0, "video": 0.0, "Action": 0.0}
    path = tmp_path / "mmbench.tsv"
    with path.open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "question", "A", "B", "answer"])
        for index, answer in ((1, "A"), (1_000_001, "B"), (2, "A"), (1_000_002, "B")):
            table.writerow([index, "two\nlines", "x", "y", answer])
    found = scores(capsys, "mmbench", path, said(tmp_path, {1: "A", 1_000_001: "B", 2: "A", 1_000_002: "A"}))
    assert found == {"accuracy": 75.0, "circular": 50.0}


def test_published_numbers_stand_beside(tmp_path, capsys):
    truth = {str(n): {"answer": "yes"} for n in range(1000)}
    path = put(tmp_path / "gqa.json", truth)
    answers = said(tmp_path, {str(n): "yes" if n < 623 else "no" for n in range(1000)})
    assert main(["evaluate", "gqa", str(path), str(answers)]) == 0
    out = capsys.readouterr().out
    assert "62.30" in out and "LLaVA-1.5 7B" in out
    lines = {line.split("  ")[1]: line for line in out.splitlines() if "published" in line}
    assert "within" in lines["LLaVA-1.5 7B"] and "within" not in lines["LLaVA-1.5 13B"]
    rows = [line for line in out.splitlines() if line.startswith("  ")]
    assert len({re.search(r"\d+\.\d\d(?= |$)", line).end() for line in rows}) == 1  # one column


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_questions_without_an_answer_are_counted(tmp_path, capsys, options):
    """Ids that match nothing are not just a score of 0."""
    path = put(tmp_path / "gqa.json", {str(n): {"answer": "yes"} for n in range(8)})
    answers = said(tmp_path, {f"{n}": "yes" for n in (0, 1, "q2")})
    assert main(["evaluate", "gqa", str(path), str(answers), *options]) == 0
    out = capsys.readouterr().out
    assert (
        json.loads(out)["unanswered"] == 6 if options else "3 answers; 6 questions have none and count as wrong" in out
    )


def test_the_model_that_ships_is_asked_and_goes_on(tmp_path, capsys):
    """Drawn scenes as a split of GQA's form; the answers that a kill left are kept."""
    truth, rows = {}, []
    for number, scene in enumerate(itertools.islice(shapes.scenes(3, "unseen"), 24)):
        (question,) = shapes.questions(scene, random.Random(number), 1, ("color", "size", "exist"))
        scene.image().save(tmp_path / f"{number}.png")
        truth[str(number)] = {"answer": question.answer}
        rows.append({"question_id": str(number), "image": f"{number}.png", "text": question.text, "category": "x"})
    annotations, questions = put(tmp_path / "gqa.json", truth), put(tmp_path / "q.jsonl", rows, lines=True)
    answers = tmp_path / "answers.jsonl"
    command = ["evaluate", "gqa", annotations, answers, "--questions", questions, "--images", tmp_path, "--json"]
    command = [*map(str, command), "--dtype", "float32"]
    assert main(command) == 0
    whole, (first,) = answers.read_bytes(), capsys.readouterr().out.splitlines()
    assert json.loads(first)["scores"]["accuracy"] > 75
    answers.write_bytes(b"".join(whole.splitlines(True)[:9]) + b'{"id": "9", "te')
    assert main(command) == 0
    assert answers.read_bytes() == whole and capsys.readouterr().out.splitlines() == [first]


def test_the_command_knows_every_benchmark():
    assert tuple(benchmarks.BENCHMARKS) == evaluate.BENCHMARKS and set(benchmarks.PUBLISHED) < {*evaluate.BENCHMARKS}


def test_mistakes_are_a_line(tmp_path, capsys):
    good = put(tmp_path / "gqa.json", {"1": {"answer": "yes"}})
    answers = said(tmp_path, {"1": "yes"})
    twice = put(tmp_path / "twice.jsonl", [{"id": 1, "text": "a"}, {"id": 1, "text": "b"}], lines=True)
    none = put(tmp_path / "none.jsonl", [{"text": "a"}], lines=True)
    (tmp_path / "broken.json").write_text("{")
    for words, message in (
        (("gqq", good, answers), "benchmark 'gqq' is unknown (did you mean 'gqa'?)"),
        (("gqa", tmp_path / "x.json", answers), "no such file"),
        (("gqa", tmp_path / "broken.json", answers), "cannot be read as JSON"),
        (("gqa", good, twice), "the answer to 1 comes twice"),
        (("gqa", good, none), "row 1 has no question_id or id"),
        (("vqav2", good, answers), "is not vqav2's file"),
        (("seed", good, answers), "is not seed's file"),
        (("mmbench", good, answers), "no columns index and answer"),
    ):
        assert main(["evaluate", *map(str, words)]) == 2, words
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
