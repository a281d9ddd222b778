"""lmms-eval's tasks through our adapter and through our server, one at a time and eight: the same digits.

The slow test runs lmms-eval itself where it is installed; the others need three of its names, or stand-ins for them.
"""

import importlib.util
import itertools
import json
import random
import socket
import subprocess
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest

from minillava import LLaVA
from minillava.errors import UserError
from minillava.synthetic import shapes

INSTALLED = importlib.util.find_spec("lmms_eval") is not None

TASK = """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {parquet}}}}}
task: {name}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.visual
doc_to_text: "{text}"
doc_to_target: {target}
{more}
"""
LINE = """process_results: !function utils.scored
generation_kwargs: {max_new_tokens: 12, temperature: 0, do_sample: false, until: ["\\n\\n"]}
metric_list: [{metric: hits, aggregation: mean, higher_is_better: true}]"""
CHOICES = """doc_to_choice: !function utils.choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
UTILS = """
def visual(doc):
    return [doc["image"].convert("RGB")]

def choices(doc):
    return ["yes", "no"]

def number(doc):
    return choices(doc).index(doc["answer"])

def scored(doc, results):
    return {"hits": float(results[0].strip().lower() == doc["answer"])}
"""


def asked(kinds, count):
    """Scenes with a question each."""
    for number, scene in enumerate(itertools.islice(shapes.scenes(3, "unseen"), count)):
        (question,) = shapes.questions(scene, random.Random(number), 1, kinds)
        yield scene.image(), question


@pytest.fixture
def lmms(monkeypatch):
    """Our adapter's module, above lmms-eval or above stand-ins for what it takes from it."""
    if not INSTALLED:

        class Model:
            def __init__(self):
                self.rank, self.task_dict = 0, {}
                self.cache_hook = types.SimpleNamespace(add_partial=lambda *args: None)

        Pair = dataclass(type("GenerationResult", (), {"__annotations__": {"text": str, "token_counts": Any}}))
        counts, fields = (lambda *n: n), dict(lmms=Model, GenerationResult=Pair, Instance=object, ModelManifest=object)
        module = types.SimpleNamespace(**fields, TokenCounts=counts)
        for name in ("lmms_eval.api.instance", "lmms_eval.api.model", "lmms_eval.models.registry_v2"):
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "minillava.evaluation.lmms", raising=False)
    module = importlib.import_module("minillava.evaluation.lmms")
    yield module
    if not INSTALLED:
        monkeypatch.delitem(sys.modules, "minillava.evaluation.lmms")


def instances(adapter, documents, *arguments):
    """As lmms-eval makes them of documents; `arguments` for each: its text, then what is asked for."""
    adapter.task_dict = {"scenes": {"test": documents}}
    for number, (text, how) in enumerate(arguments):
        args = (text, how, lambda doc: doc["shown"], number, "scenes", "test")
        yield types.SimpleNamespace(args=args, task_name="scenes")


def test_it_answers_as_generate_does(lmms, tmp_path):
    """Whatever the batch; text alone, two pictures, a video, and a task's own end."""
    documents, texts = [], []
    for image, question in asked(shapes.KINDS, 5):
        documents.append({"shown": [image]})
        texts.append(question.text)
    documents[1]["shown"] *= 2
    documents[2]["shown"] = None
    frames = tmp_path / "clip"
    frames.mkdir()
    documents[3]["shown"][0].save(frames / "0.png")
    documents[3]["shown"] = [[str(frames)]]
    how = {"max_new_tokens": 6, "temperature": 0, "until": ["\n\n"], "do_sample": False, "top_p": None}
    plain = LLaVA.from_pretrained("nano", dtype="float32")
    shown = [doc["shown"] for doc in documents]
    want = [
        plain.generate(text, () if number == 3 else some or (), 6, videos=some[0] if number == 3 else ()).text
        for number, (text, some) in enumerate(zip(texts, shown))
    ]
    for batch in (1, "3"):
        adapter = lmms.MiniLLaVA("nano", dtype="float32", batch_size=batch)
        requests = [*instances(adapter, documents, *((text, how) for text in texts))]
        got = adapter.generate_until(requests)
        assert [one.text for one in got] == want
    cut = next(text for text in want if text)
    requests = [*instances(adapter, documents, *((text, how | {"until": cut[-1]}) for text in texts))]
    assert all(cut[-1] not in one.text for one in adapter.generate_until(requests))


def test_choices_have_their_mean_loss(lmms):
    documents = [{"shown": image, "text": question.text} for image, question in asked(("exist", "count"), 4)]
    adapter = lmms.MiniLLaVA("nano", dtype="float32")
    wanted = [(doc["text"], f" {choice}") for doc in documents for choice in ("yes", "no")]
    requests = [*instances(adapter, [doc for doc in documents for _ in range(2)], *wanted)]
    for request in requests:  # as lmms-eval numbers them: both choices are of one document
        number = request.args[3] // 2 * 2
        request.args = (*request.args[:3], number, *request.args[4:])
    got = [one.text for one in adapter.loglikelihood(requests)]
    plain = LLaVA.from_pretrained("nano", dtype="float32")
    for number, doc in enumerate(documents):
        choices = plain.score(doc["text"], doc["shown"], ["yes", "no"])
        answer = plain.generate(doc["text"], doc["shown"]).token_ids
        for (loss, greedy), choice in zip(got[2 * number :], choices):
            assert loss == pytest.approx(-choice.logprob / len(choice.token_ids), abs=1e-5)
            assert greedy == (tuple(answer[: len(choice.token_ids)]) == choice.token_ids)
    assert len({greedy for _, greedy in got}) == 2


def test_what_it_cannot_do_is_one_line(lmms):
    with pytest.raises(UserError, match="--batch_size auto"):
        lmms.MiniLLaVA("nano", batch_size="auto")
    adapter = lmms.MiniLLaVA("nano", dtype="float32")
    sound = {"shown": [{"array": [], "sampling_rate": 16000}]}
    with pytest.raises(UserError, match="scenes, test 0: shows a dict"):
        adapter.generate_until([*instances(adapter, [sound], ("what is it?", {}))])
    with pytest.raises(UserError, match="task scenes: num_beams is 5"):
        adapter.generate_until([*instances(adapter, [{"shown": None}], ("what is it?", {"num_beams": 5}))])
    unconditional = types.SimpleNamespace(args=("", "yes"), task_name="scenes")
    with pytest.raises(UserError, match="task scenes: acc_mutual_info"):
        adapter.loglikelihood([unconditional])
    with pytest.raises(NotImplementedError, match="one round"):
        adapter.generate_until_multi_round([])


def lmms_eval(folder, name, *words, **places):
    """The task's results and answers, by lmms-eval's own command."""
    out = folder / "-".join(str(word).rpartition("=")[2].replace("/", "_") for word in (*words, name))
    command = [sys.executable, "-m", "lmms_eval", "--tasks", name, "--include_path", folder / "tasks"]
    command += ["--log_samples", "--output_path", out, *words]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=folder, timeout=600)
    results = [*out.rglob("*_results.json")]
    assert len(results) == 1, done.stderr  # it ends with 0 where it failed, too
    (samples,) = out.rglob("*_samples_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return json.loads(results[0].read_text())["results"][name], [row["filtered_resps"] for row in rows]


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs lmms-eval 0.7.3")
def test_the_same_digit_through_adapter_and_endpoint(tmp_path):
    """64 drawn scenes; one request at a time and eight; yes or no also as a choice."""
    datasets = pytest.importorskip("datasets")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text(UTILS)
    for name, kind, target, kinds, more in (
        ("scenes", "generate_until", "answer", shapes.KINDS, LINE),
        ("yesno", "multiple_choice", "!function utils.number", ("exist",), CHOICES),
    ):
        rows = [{"image": image, "question": q.text, "answer": q.answer} for image, q in asked(kinds, 64)]
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        features = datasets.Features(
            image=datasets.Image(), question=datasets.Value("string"), answer=datasets.Value("string")
        )
        datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / f"{name}.parquet")
        text = TASK.format(
            parquet=tmp_path / f"{name}.parquet", name=name, kind=kind, text="{{question}}", target=target, more=more
        )
        (tasks / f"{name}.yaml").write_text(text)

    ours = "pretrained=nano,dtype=float32"
    first, texts = lmms_eval(tmp_path, "scenes", "--model", "minillava", "--model_args", ours, "--batch_size", 1)
    assert lmms_eval(tmp_path, "scenes", "--model", "minillava", "--model_args", ours, "--batch_size", 8) == (
        first, texts)  # fmt: skip
    assert first["hits,none"] > 0.8
    choice, _ = lmms_eval(tmp_path, "yesno", "--model", "minillava", "--model_args", ours, "--batch_size", 8)
    assert choice["acc,none"] > 0.85

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = [sys.executable, "-m", "minillava", "serve", "--model", "nano", "--dtype", "float32", "--port", str(port)]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert str(port) in server.stdout.readline()
            for together in (1, 8):
                where = f"model_version=nano,base_url=http://127.0.0.1:{port}/v1,api_key=none,num_concurrent={together}"
                again = lmms_eval(tmp_path, "scenes", "--model", "openai", "--model_args", where)
                assert again == (first, texts), together
        finally:
            server.terminate()
