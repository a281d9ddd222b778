"""Instruction data: made once however often a run is killed or an endpoint fails; what is no use is refused."""

import gc
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import REAL, ROOT, disk_of
from PIL import Image
from server import DETAIL, REASON, TALK, Server, well

from minillava.cli import run_command
from minillava.data.table import scan
from minillava.errors import UserError
from minillava.synthetic.instruct import models
from minillava.synthetic.instruct.collect import Journal, run, scene_items
from minillava.synthetic.instruct.models import Reply
from minillava.synthetic.instruct.prompts import KINDS, messages_for
from minillava.synthetic.instruct.replies import Rejected, check, choice, conversation_of
from minillava.synthetic.instruct.scenes import Box, Scene, read_scenes

pytest.importorskip("openai")
COCO = REAL / "llava" / "caps_boxes_coco2014_val_80.jsonl"
SCENE = Scene("7", "7.jpg", ["A cat on a mat."], [Box("cat", (0.1, 0.2, 0.5, 0.9))])


@pytest.fixture
def quick(monkeypatch):
    """The first wait before a try again is short."""
    monkeypatch.setattr(models.Endpoint, "wait_s", 0.01)
    monkeypatch.setattr(models.Endpoint.__init__, "__defaults__", (*models.Endpoint.__init__.__defaults__[:-1], 0.01))


@pytest.fixture
def scenes(tmp_path):
    """Ten pictures of a row each."""
    rows = [{"id": str(n), "image": f"{n}.jpg", "captions": [f"Thing {n}."], "instances": []} for n in range(10)]
    path = tmp_path / "scenes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def instruct(*words):
    return run_command("instruct", [str(word) for word in words])


def read(path):
    return json.loads(path.read_text())


# ---- what goes in ----


def test_coco_is_read_by_content(tmp_path):
    """COCO's captions and instances, in two files of other names, are the scenes of JSON lines; crowds are left out."""
    pictures = [{"id": 7, "file_name": "7.jpg", "width": 200, "height": 100}]
    words = {"images": pictures, "annotations": [{"image_id": 7, "caption": "A cat\non a mat."}]}
    notes = [{"image_id": 7, "category_id": 3, "bbox": [20, 20, 80, 70], "iscrowd": 0},
             {"image_id": 7, "category_id": 3, "bbox": [0, 0, 200, 100], "iscrowd": 1}]  # fmt: skip
    things = {"images": pictures, "annotations": notes, "categories": [{"id": 3, "name": "cat"}]}
    (tmp_path / "a").write_text(json.dumps(words))
    (tmp_path / "b").write_text(json.dumps(things, indent=1))
    assert read_scenes([tmp_path / "a", tmp_path / "b"]) == [SCENE]
    assert str(SCENE) == "A cat on a mat.\n\ncat: [0.100, 0.200, 0.500, 0.900]"
    row = {"id": "7", "image": "7.jpg", "captions": ["A cat on a mat."], "width": 200, "height": 100}
    row["instances"] = [{"category": "cat", "bbox": [20, 20, 100, 90]}]
    (tmp_path / "c").write_text(json.dumps(row))
    assert read_scenes([tmp_path / "c"]) == [SCENE]
    row["width"] = 90
    (tmp_path / "c").write_text(json.dumps(row))
    with pytest.raises(UserError, match="of cat is not inside the picture"):
        read_scenes([tmp_path / "c"])
    with pytest.raises(UserError, match="picture 7 has no captions"):
        read_scenes([tmp_path / "b"])


@pytest.mark.skipif(not COCO.is_file(), reason="needs LLaVA's 80 pictures of COCO")
def test_the_eighty_real_pictures():
    scenes = read_scenes([COCO])
    assert len(scenes) == 80 and all(len(scene.captions) >= 5 for scene in scenes)
    assert str(scenes[0]).startswith("A donut shop is full of different flavors of donuts.")


# ---- what comes out ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_examples_are_good_replies(kind):
    """What the model is shown passes what its own replies have to pass."""
    shots = [message for message in messages_for(kind, SCENE)[1:-1]]
    assert len(shots) >= 2
    for asked, reply in zip(shots[::2], shots[1::2]):
        turns = conversation_of(kind, SCENE, reply.text, cut=False)
        assert all(question and answer for question, answer in turns)
        for box in re.findall(r"\[([\d., ]+)\]", asked.text):
            left, top, right, bottom = map(float, box.split(","))
            assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1


def test_replies_in_the_forms_that_models_write():
    expected = [("What is it?", "A cat."), ("Why?", "It sleeps.\nIt is late.")]
    for text in (
        "Question: What is it?\nAnswer: A cat.\n\nQuestion: Why?\nAnswer: It sleeps.\nIt is late.",
        "**Question:** What is it?\n**Answer:** A cat.\n\n---\n**Question:** Why?\n**Answer:** It sleeps.\nIt is late.",
        "1. Question: What is it?\n   Answer: A cat.\n2. Question: Why?\n   Answer: It sleeps.\n   It is late.",
        "Q1: What is it?\nA1: A cat.\nQ2: Why?\nA2: It sleeps.\nIt is late.\n",
    ):
        assert conversation_of("conversation", SCENE, text, False) == expected


@pytest.mark.parametrize(
    "kind,text,reason",
    [
        ("conversation", "", "empty"),
        ("conversation", "Sure!\n" + TALK, "text in front"),
        ("conversation", "Question: What?\nAnswer: A cat.", "1 questions"),
        ("conversation", TALK + "\nQuestion: And?", "take turns"),
        ("conversation", "Question: A?\nAnswer: B\nQuestion: C?\nAnswer:", "empty question or answer"),
        ("conversation", TALK + "\n" + TALK, "comes twice"),
        ("conversation", TALK.replace("A thing", "As the caption says, a cat"), "was given: 'caption'"),
        ("complex", REASON.replace("Somebody", "The bounding box shows that somebody"), "bounding box"),
        ("complex", REASON.replace("Somebody", "According to the description somebody"), "According to the"),
        ("complex", REASON.replace("it there,", "it at [0.2, 0.1, 1.4, 0.5],"), "not inside the picture"),
        ("complex", REASON.replace("it there,", "it at [0.6, 0.1, 0.4, 0.5],"), "not inside the picture"),
        ("complex", REASON.replace("it there,", "<image>,"), "<image> in the text"),
        ("detail", "As an AI language model I cannot see pictures, so there is nothing to describe here.", "ref"),
        ("detail", "A cat.", "no description"),
        ("detail", TALK + " " * 40, "no description"),
    ],
)  # fmt: skip
def test_what_is_no_use_is_rejected(kind, text, reason):
    with pytest.raises(Rejected, match=re.escape(reason)):
        conversation_of(kind, SCENE, text, cut=False)


def test_boxes_inside_the_picture_may_be_named():
    turns = conversation_of("complex", SCENE, REASON.replace("it there,", "it at [0.2, 0.1, 0.4, 0.5],"), False)
    assert len(turns) == 1
    with pytest.raises(Rejected, match="cut off"):
        conversation_of("complex", SCENE, REASON, cut=True)


@pytest.mark.skipif(not COCO.is_file(), reason="needs LLaVA's answers of GPT-4")
def test_gpt4s_real_answers_pass():
    """90 answers that GPT-4 wrote from captions and boxes, and that LLaVA's authors kept, all pass."""
    rows = [
        json.loads(line)
        for line in (REAL / "llava" / "coco2014_val_gpt4_qa_30x3.jsonl").read_text().split("\n")
        if line
    ]
    assert len(rows) == 90
    for row in rows:
        check(f"{row['instruction']}\n{row['output']}")


# ---- runs ----


def test_eighty_pictures_once_through_two_kills(tmp_path):
    """A server that answers well, slowly, wrongly, with 429 and 500, or cuts the line; the process is killed twice."""
    dice, pictures = random.Random(0), COCO
    if not COCO.is_file():  # the real ones, where they are at hand
        rows = [{"id": str(n), "image": f"{n}.jpg", "captions": [f"Thing {n}."]} for n in range(80)]
        pictures = tmp_path / "pictures.jsonl"
        pictures.write_text("\n".join(map(json.dumps, rows)))

    def behave(number, messages):
        lot = dice.random()
        if lot < 0.72:
            return well(messages)
        ways = [("slow", 0.2, well(messages)), "I read in the caption that ...", ("status", 429, 0.05),
                ("status", 500, None), ("cut",), ("garbage",)]  # fmt: skip
        return dice.choice(ways)

    with Server(behave) as server:
        out = tmp_path / "out"
        command = [sys.executable, "-m", "minillava", "instruct", str(pictures), "--out", str(out), "--model", "m",
                   "--url", server.url, "--kinds", "conversation", "--tries", "9", "--concurrency", "6"]  # fmt: skip
        for until in (15, 45):
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 100
            while len(server.texts) < until and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert process.poll() is None and len(server.texts) >= until
            process.send_signal(signal.SIGKILL)
            process.wait()
        kept = len(Journal(out / "replies.jsonl").replies)
        assert 15 <= kept <= len(server.texts)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        samples = read(out / "instruct.json")
        assert [row["id"] for row in samples] == [f"{scene.id}/conversation" for scene in read_scenes([pictures])]
        assert not (out / "rejects.jsonl").read_text()
        replies = Journal(out / "replies.jsonl").replies
        assert set(server.paid.values()) == {1} and replies.keys() == server.paid.keys()  # every answer paid for once
        assert {key: reply.text for key, reply in replies.items()} == server.texts
        assert f"{len(replies):,} replies: {100 * len(replies):,} prompt tokens" in done.stdout
        assert server.most_busy <= 6
        before = len(server.requests)
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
        assert len(server.requests) == before  # nothing is left to ask


def test_the_output_trains_as_it_is(scenes, tmp_path, quick):
    with Server(lambda number, messages: well(messages)) as server:
        assert instruct(scenes, "--out", tmp_path / "out", "--model", "m", "--url", server.url) == 0
        asked = [request["messages"] for request in server.requests]
        assert {messages[0]["role"] for messages in asked} == {"system"}
        assert {messages[-1]["content"] for messages in asked} == {f"Thing {number}." for number in range(10)}
    (tmp_path / "images").mkdir()
    for number in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{number}.jpg")
    samples, report = scan(tmp_path / "out" / "instruct.json", tmp_path / "images")
    assert len(samples) == 30 and not report.problems
    assert {sample.messages[-1].text for sample in samples} == {"One.", DETAIL, REASON.partition("Answer: ")[2]}
    markers = {sample.messages[0].text.startswith("<image>\n") for sample in samples}
    assert markers == {True, False}  # in front and behind


def test_a_refused_request_is_let_go_of(scenes, tmp_path, quick):
    """Reasons are kept until the end, and not what was asked, with the picture in it."""
    openai, alive = pytest.importorskip("openai"), []
    model, rows = models.Endpoint("", "m"), read_scenes([scenes])

    def note(done):
        gc.collect()
        alive.append(sum(issubclass(type(found), openai.APIStatusError) for found in gc.get_objects()))

    with Server(lambda number, messages: ("status", 422, None)) as server:
        model.url = server.url
        outcome = run(tmp_path / "out", "x.json", [*scene_items(model, rows, ["detail"], 1)], {}, 1, note=note)
    assert len(outcome.rejects) == len(alive) == 10 and alive == [0] * 10


def test_a_wait_that_the_server_asks_for_holds_for_all(scenes, tmp_path, quick):
    def behave(number, messages):
        return ("status", 429, 1) if number == 5 else ("slow", 0.05, well(messages))

    with Server(behave) as server:
        assert instruct(scenes, "--out", tmp_path / "out", "--model", "m", "--url", server.url, "--concurrency", 3) == 0
    refused = server.times[4]
    assert not [at for at in server.times if refused + 0.3 < at < refused + 0.95]
    assert any(at >= refused + 0.95 for at in server.times)


def test_rejects_say_why_and_what_is_fatal_stops(scenes, tmp_path, quick, capsys):
    def behave(number, messages):
        return ("status", 422, None) if messages[-1]["content"] == "Thing 3." else "I see the captions."

    words = ["--kinds", "detail", "--model", "m", "--tries", 2, "--limit", 5]
    with Server(behave) as server:
        assert instruct(scenes, *words, "--out", tmp_path / "out", "--url", server.url) == 0
        assert len(server.requests) == 9  # each twice, but for the one that the server refuses
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"{number}/detail" for number in range(5)]
    assert "refuses the request: 422" in rows[3]["reason"] and read(tmp_path / "out" / "instruct.json") == []
    for status, wait, message in ((401, 0, "OPENAI_API_KEY"), (503, 0, "5 got no answer"), (429, 7200, "wait 7,200 s")):
        with Server(lambda number, messages, does=("status", status, wait): does) as server:
            assert instruct(scenes, *words, "--out", tmp_path / str(status), "--url", server.url) == 2
        assert message in capsys.readouterr().err


def test_cost_is_counted_and_bounded(scenes, tmp_path, quick, capsys):
    words = [scenes, "--out", tmp_path / "out", "--model", "m", "--concurrency", 1, "--kinds", "detail"]
    words += ["--price", "10000,50000"]  # a reply of 100 and 20 tokens is 2
    with Server(lambda number, messages: well(messages)) as server:
        assert instruct(*words, "--url", server.url, "--max-cost", 7) == 2
        assert len(server.requests) == 4 and len(read(tmp_path / "out" / "instruct.json")) == 4
        assert "8 are spent of 7" in capsys.readouterr().err
        assert instruct(*words, "--url", server.url) == 0
        assert "20 spent" in capsys.readouterr().out
        assert instruct(*words, "--url", server.url, "--temperature", 0.1) == 2
        assert "was begun with another temperature" in capsys.readouterr().err


def test_dry_run_counts_and_asks_nobody(scenes, tmp_path, capsys, tiny_tokenizer):
    tiny_tokenizer.save(tmp_path / "tokenizer")
    words = [scenes, "--dry-run", "--limit", 2, "--kinds", "complex", "--tokenizer", tmp_path / "tokenizer"]
    assert instruct(*words, "--price", "1,2", "--max-tokens", 10) == 0
    out = capsys.readouterr().out
    texts = ["\n".join(m.text for m in messages_for("complex", s)) for s in read_scenes([scenes])[:2]]
    total = sum(len(tiny_tokenizer.encode(text, True)) for text in texts)
    assert f"in all {total:,} prompt tokens, and at most 20 new ones" in out and "[user] Thing 0." in out
    assert instruct(scenes, "--dry-run") == 0 and "in all about " in capsys.readouterr().out
    assert not Path("runs/instruct").exists()


def test_a_line_that_a_kill_cut_off_is_asked_again(tmp_path):
    journal = Journal(tmp_path / "replies.jsonl")
    for key in ("a", "b"):
        journal.add(key, Reply(f"half a surrogate \ud83d of {key}"))
    journal.close()
    whole = (tmp_path / "replies.jsonl").read_bytes()
    (tmp_path / "replies.jsonl").write_bytes(whole[:-7])
    again = Journal(tmp_path / "replies.jsonl")
    assert again.replies.keys() == {"a"}
    again.add("b", Reply("b"))
    again.close()
    assert Journal(tmp_path / "replies.jsonl").replies.keys() == {"a", "b"}


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(scenes, tmp_path, quick, capsys):
    with Server(lambda number, messages: "word " * 400) as server:
        words = [scenes, "--kinds", "detail", "--model", "m", "--url", server.url, "--out", tmp_path / "out"]
        with disk_of(9999):
            assert instruct(*words) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {tmp_path / 'out' / 'replies.jsonl'}: File too large; make room")
        asked = len(server.requests)
        assert instruct(*words) == 0
        assert 0 < asked < len(server.requests)


# ---- preferences ----


def test_preferences_from_two_answers_and_a_judge(scenes, tmp_path, quick):
    """The judge prefers the answer with more words, but for one picture the place, and for one nothing."""
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{number}.jpg")
        said = [{"from": "human", "value": f"<image>\nWhat is {number}?"}, {"from": "gpt", "value": "Old."}]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": said})
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    answers = {}

    def behave(number, messages):
        last = messages[-1]["content"]
        if messages[0]["role"] != "system":
            question = last[1]["text"]
            assert last[0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
            answers[question] = answers.get(question, 0) + 1
            words = 1 if "4" in question else answers[question] % 2 + 1
            return " ".join(["word"] * words)
        assert "Thing" in last  # what is known of the picture
        first, second = re.search(r"Answer A: (.*)\n\nAnswer B: (.*)", last).groups()
        if "What is 5?" in last:
            return "A"
        return "neither" if "What is 6?" in last else "A." if len(first) > len(second) else "**B**"

    words = [scenes, "--questions", tmp_path / "questions.json", "--images", tmp_path / "images", "--model", "m"]
    with Server(behave) as server:
        assert instruct(*words, "--out", tmp_path / "out", "--url", server.url, "--judge", "j") == 0
        assert {body["model"] for body in server.requests} == {"m", "j"}
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rejects] == ["4", "5", "6"]
    assert "same" in rejects[0]["reason"] and "a place" in rejects[1]["reason"] and "neither" in rejects[2]["reason"]
    samples, report = scan(tmp_path / "out" / "preferences.json", tmp_path / "images")
    assert len(samples) == 7 and not report.problems
    assert {(sample.messages[-1].text, sample.rejected) for sample in samples} == {("word word", "word")}


def test_choices():
    assert [choice(text) for text in ("A", " b.", "Answer B", "**A**", "(B)")] == [0, 1, 1, 0, 1]
    with pytest.raises(Rejected):
        choice("Both are good")
    with pytest.raises(Rejected):
        choice("")


def test_a_checkpoint_answers_in_this_process(scenes, tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    """The engine's own answers; of a model that has learned nothing all are rejected, each with its reason. The hub is
    asked for the model once."""
    from minillava.checkpoints.save import save_model

    save_model(tiny_model, tmp_path / "model", tiny_tokenizer)
    fetched = []
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda api, name: fetched.append(name))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: str(tmp_path / "model"))
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(3):
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(tmp_path / "images" / f"{number}.jpg")
        said = [{"from": "human", "value": f"<image>\nred {number}"}, {"from": "gpt", "value": "blue"}]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": said})
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    words = ["--questions", tmp_path / "questions.json", "--images", tmp_path / "images", "--max-tokens", 6]
    out = tmp_path / "out"
    with Server(lambda number, messages: "A") as server:
        words += ["--model", "some/model", "--judge", "j", "--judge-url", server.url]
        assert instruct(*words, "--out", out) == 0
    assert fetched == ["some/model"] and read(out / "settings.json")["model"] == "some/model"
    replies = Journal(out / "replies.jsonl").replies
    assert sum("/answer/" in key for key in replies) == 6 and len(read(out / "preferences.json")) == 0
    assert all(reply.prompt_tokens > 4 and reply.new_tokens <= 6 for key, reply in replies.items() if "answer" in key)


def test_a_model_that_judges_itself_is_asked_for_and_loaded_once(tmp_path, monkeypatch):
    monkeypatch.setattr("minillava.cli.instruct.resolve", lambda name: found.append(name) or tmp_path)
    monkeypatch.setattr("minillava.synthetic.instruct.models.Local", lambda *how: made.append(how))
    monkeypatch.setattr("minillava.synthetic.instruct.collect.run", lambda *a, **k: None)
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "blue"}]
    Image.new("RGB", (8, 8)).save(tmp_path / "0.jpg")
    (tmp_path / "questions.json").write_text(json.dumps([{"id": "0", "image": "0.jpg", "conversations": said}]))
    words = ["--questions", tmp_path / "questions.json", "--images", tmp_path, "--model", "some/model"]
    for more in ([], ["--judge", "some/model"]):
        found, made = [], []
        assert instruct(*words, *more, "--out", tmp_path / "out") == 0
        assert found == ["some/model"] and len(made) == 1


def test_our_own_server_answers_and_is_judged(tmp_path):
    """`minillava serve` with the model that ships, asked warmly about drawn scenes; the judge knows the scenes."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    from minillava import LLaVA
    from minillava.generation.serve import app, running
    from minillava.media import sources
    from minillava.synthetic import shapes

    rows, truth = [], {}
    (tmp_path / "images").mkdir()
    for number, scene in enumerate(itertools.islice(shapes.scenes(9, "unseen"), 64)):
        (question,) = shapes.questions(scene, random.Random(number), 1, ("place", "size", "count", "shape"))
        scene.image().save(tmp_path / "images" / f"{number}.png")
        said = [{"from": "human", "value": f"<image>\n{question.text}"}, {"from": "gpt", "value": question.answer}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": said})
        truth[question.text] = question.answer
    (tmp_path / "questions.json").write_text(json.dumps(rows))

    def judge(number, messages):
        text = messages[-1]["content"][1]["text"]
        question, first, second = re.search(r"Question: (.*)\n\nAnswer A: (.*)\n\nAnswer B: (.*)", text, re.S).groups()
        return "A" if first == truth[question] else "B" if second == truth[question] else "neither"

    engine = LLaVA.from_pretrained("nano", dtype="float32").engine
    served = app.Server(
        running.Running(engine, running.Limits(slots=4, chunk=64)), "nano", sources.Sources(), app.Access()
    )
    http = uvicorn.Server(uvicorn.Config(served.app(), port=0, log_level="error"))
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}/v1"
    with Server(judge) as server:
        words = ["--questions", tmp_path / "questions.json", "--images", tmp_path / "images", "--temperature", 2]
        words += ["--judge", "j", "--judge-url", server.url, "--max-tokens", 12]
        assert instruct(*words, "--out", tmp_path / "out", "--model", "nano", "--url", url) == 0
    pairs = read(tmp_path / "out" / "preferences.json")
    assert 1 <= len(pairs) <= 64  # the server draws its own seeds; 9 to 16 seen
    assert all(row["chosen"] == truth[row["prompt"].removeprefix("<image>\n")] != row["rejected"] for row in pairs)
    replies = Journal(tmp_path / "out" / "replies.jsonl").replies
    assert all(reply.prompt_tokens > 16 for key, reply in replies.items() if "/answer/" in key)  # it saw a picture
    http.should_exit = True
    thread.join(20)


def test_mistakes_are_one_line(scenes, tmp_path, capsys):
    for words, message in (
        ([], "no captions"),
        ([scenes], "nobody to ask"),
        ([scenes, "--model", "m", "--kinds", "detial"], "detial: unknown"),
        ([scenes, "--model", "m", "--price", "1"], "expected two numbers"),
        ([scenes, "--model", "m", "--max-cost", "1"], "needs --price"),
        ([tmp_path / "none.jsonl", "--model", "m"], "cannot be read"),
        (["--questions", scenes, "--model", "m"], "give --images"),
    ):
        assert instruct(*words) == 2
        assert message in capsys.readouterr().err
