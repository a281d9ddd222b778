"""A file of questions: each answer is the one that it has alone, in its row's place, whatever kills the run."""

import base64
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from minillava import LLaVA
from minillava.cli import main
from minillava.synthetic import shapes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Six drawn scenes, and rows that ask about them in every form."""
    root = tmp_path_factory.mktemp("jobs")
    for number, scene in enumerate(itertools.islice(shapes.scenes(5, "unseen"), 6)):
        scene.image().save(root / f"{number}.png")
    return root


def questions(count):
    texts = ["What color is the circle?", "How many things are there?", "Describe the picture.", "Is there a star?"]
    return [{"id": f"q{n}", "image": f"{n % 6}.png", "prompt": texts[n // 6 % 4]} for n in range(count)]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def jobs(rows, out, *words):
    return main(["jobs", str(rows), str(out), "--dtype", "float32", "--images", str(rows.parent), *map(str, words)])


def test_every_form_is_answered_as_alone_and_mistakes_stay_in_place(world, capsys):
    data = "data:image/png;base64," + base64.b64encode((world / "0.png").read_bytes()).decode()
    text = "What color is the circle?"
    parts = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": text}]
    rows = [
        {"id": 1, "image": "0.png", "prompt": text},
        {"question_id": "two", "image": "0.png", "text": f"<image>\n{text}", "category": "color"},
        {"id": "3", "messages": [{"role": "user", "content": parts}]},
        {"custom_id": "four", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": "x", "messages": [{"role": "user", "content": parts}], "max_tokens": 2}},
        "{broken",
        {"id": "6", "image": "missing.png", "prompt": text},
        {"id": "7", "image": "0.png"},
        {"id": "8", "prompt": text, "temperature": "hot"},
        {"custom_id": "nine", "body": {"messages": "?", "n": 3}},
        {"id": "10", "prompt": "why " * 5000},
        {"id": "11", "images": ["0.png", "1.png"], "prompt": "What is different?", "temperature": 1.0, "seed": 3.0},
        *({"id": "12", "prompt": text, "seed": 1, "temperature": 1.0, **wrong} for wrong in
          ({"temperature": 1e39}, {"temperature": 10**400}, {"top_k": 1e30}, {"seed": 1e20},
           {"repetition_penalty": 1e39})),
    ]  # fmt: skip
    out = world / "forms.out.jsonl"
    assert jobs(write(world / "forms.jsonl", rows), out, "--slots", 3, "--max-new-tokens", 20) == 1
    found, printed = read(out), capsys.readouterr().out
    assert "5 answered, 11 with an error" in printed and len(found) == len(rows)
    model = LLaVA.from_pretrained("nano", dtype="float32")
    alone = model.generate(text, str(world / "0.png"), 20)
    assert [row["text"] for row in found[:3]] == [alone.text] * 3 and [row["id"] for row in found[:3]] == [
        1,
        "two",
        "3",
    ]
    assert found[0]["new_tokens"] == len(alone.token_ids) and found[0]["prompt_tokens"] == alone.prompt_tokens
    body = found[3]["response"]["body"]
    assert body["choices"][0]["message"]["content"] == model.generate(text, str(world / "0.png"), 2).text
    assert body["usage"]["completion_tokens"] <= 2 and found[3]["custom_id"] == "four" and found[3]["error"] is None
    for row, words in zip(found[4:8], ("not a JSON object", "missing.png", "no question", "temperature is 'hot'")):
        assert words in row["error"] and "text" not in row
    assert found[8]["response"] is None and "one answer" in found[8]["error"]["message"]
    assert "context" in found[9]["error"]
    assert all(re.search("^(temperature|top_k|seed|repetition_penalty) is .*; use", r["error"]) for r in found[11:])
    shown = [str(world / "0.png"), str(world / "1.png")]
    assert found[10]["text"] == model.generate("What is different?", shown, 20, temperature=1.0, seed=3).text


def test_a_picture_is_seen_once_and_the_batch_stays_full(world, monkeypatch):
    from minillava.generation.engine import Engine
    from minillava.generation.scheduler import Scheduler

    seen, live, see, step = [], [], Engine.see, Scheduler.step

    def watched(self, pictures):
        before = self.pictures_seen
        found = see(self, pictures)
        seen.append(self.pictures_seen - before)
        return found

    def stepped(self):
        events = step(self)
        live.append(len(self.live))
        return events

    monkeypatch.setattr(Engine, "see", watched)
    monkeypatch.setattr(Scheduler, "step", stepped)
    rows = [{**row, "prompt": "Describe the picture."} for row in questions(48)]
    assert jobs(write(world / "many.jsonl", rows), world / "many.out.jsonl", "--slots", 4) == 0
    assert sum(seen) == 6
    assert sum(live[8:-40]) / len(live[8:-40]) > 3


def kill_and_go_on(world, count, kills, name):
    """The bytes of an uninterrupted run, and those of one that was killed so often."""
    rows = write(world / f"{name}.jsonl", questions(count))
    words = ["--slots", 4, "--temperature", 0.7, "--max-new-tokens", 24]
    assert jobs(rows, world / f"{name}.whole", *words) == 0
    out = world / f"{name}.killed"
    command = [sys.executable, "-m", "minillava", "jobs", rows, out, "--dtype", "float32", "--images", world, *words]
    command, environment = [*map(str, command)], os.environ | {"OMP_NUM_THREADS": "1"}
    for number in range(kills):
        until = random.randrange(count * number // kills, count * (number + 1) // kills)
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (out.is_file() and out.read_bytes().count(b"\n") > until):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        if number == 0:  # and a line that was half written
            with out.open("a") as file:
                file.write('{"id": "q')
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "were there already" in done.stdout and f"/{count}" in done.stderr
    assert [path.name for path in world.glob(f".{name}*")] == []
    return (world / f"{name}.whole").read_bytes(), out.read_bytes()


def test_killed_it_goes_on(world):
    whole, killed = kill_and_go_on(world, 60, 1, "once")
    assert whole == killed and [row["id"] for row in read(world / "once.killed")] == [f"q{n}" for n in range(60)]


@pytest.mark.slow
def test_five_hundred_rows_and_five_kills(world):
    whole, killed = kill_and_go_on(world, 500, 5, "often")
    assert whole == killed and whole.count(b"\n") == 500


def test_a_finished_file_is_left_and_others_are_refused(world, capsys):
    rows, out = write(world / "a.jsonl", questions(4)), world / "a.out"
    assert jobs(rows, out) == 0
    before = out.read_bytes()
    assert jobs(rows, out) == 0 and out.read_bytes() == before
    assert "0 answered" in capsys.readouterr().out
    other = write(world / "b.jsonl", [{"id": "x", "prompt": "?"}, *questions(4)])
    for words, message in (
        ((other, out), "line 1 is no answer to row 1"),
        ((world / "none.jsonl", out), "no such file"),
        ((rows, rows), "the rows themselves"),
        ((rows, world / "c", "--slots", 0), "1 or more"),
        ((rows, world / "c", "--images", world / "nowhere"), "no such folder"),
    ):
        words = [*words, *([] if "--images" in words else ["--images", world])]
        assert main(["jobs", *map(str, words)]) == 2
        assert message in capsys.readouterr().err
    assert out.read_bytes() == before
