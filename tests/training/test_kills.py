"""Runs that are killed, beside a second writer, on disks that fill up: at the end there is what an uninterrupted run
has, to the bit, and no row of a log or an answer is lost or doubled.

60 kills: pytest -m slow tests/training/test_kills.py -s
"""

import functools
import hashlib
import itertools
import json
from collections import Counter

import pytest
from helpers import talk, write_world
from killing import Killed, small_disk
from server import Server, well

from minillava.synthetic import shapes
from minillava.synthetic.train_tokenizer import train_small_tokenizer
from minillava.training.progress import read_log

RECIPE = """
name = "tiny"
device = "cpu"
[model]
tokenizer = "tokenizer"
vision = {hidden_size = 16, intermediate_size = 32, num_layers = 2, num_heads = 2, image_size = 16, patch_size = 8}
decoder = {hidden_size = 16, intermediate_size = 32, num_layers = 2, num_heads = 2, num_kv_heads = 1, head_dim = 8, \
max_positions = 256, tie_embeddings = true}
[[stage]]
name = "first"
data = [{path = "data.json", images = "images"}]
chat = {template = "plain"}
lr = {projector = 1e-2}
steps = 10
batch_size = 4
save_every = 3
[[stage]]
name = "second"
data = [{path = "data.json", images = "images"}, {path = "text.json"}]
lr = {projector = 1e-2, decoder = 2e-2}
steps = 24
batch_size = 4
eval_samples = 4
eval_every = 5
save_every = 4
"""
TIMES = ("tok_per_s", "supervised_per_s", "mfu", "peak_bytes")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Files of each command: pictures and a recipe; drawn scenes and questions; captions."""
    root = tmp_path_factory.mktemp("kills")
    write_world(root, 24, ("red", "green", "blue"), 3, [talk("Sure?", "Yes. It is.")] * 8)
    words = "USER: \nWhich? ASSISTANT: It is red. It is green. It is blue. Yes.</s>Sure?"
    train_small_tokenizer([words] * 3, root / "tokenizer", vocab_size=400)
    (root / "recipe.toml").write_text(RECIPE)
    for number, scene in enumerate(itertools.islice(shapes.scenes(5, "unseen"), 6)):
        scene.image().save(root / f"{number}.png")
    rows = [{"id": f"q{n}", "image": f"{n % 6}.png", "prompt": "Describe the picture."} for n in range(60)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scenes = [{"id": str(n), "image": f"{n}.jpg", "captions": [f"Thing {n}."]} for n in range(60)]
    (root / "scenes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scenes))
    return root


def lines_of(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


class Train:
    def words(self, world, out):
        return ["train", world / "recipe.toml", "--out", out / "run", "--resume"]

    def progress(self, out):
        return lines_of(out / "run" / "log.jsonl")

    def result(self, out):
        """Every row but for its times, and the bytes of what was exported."""
        rows = [
            {k: v for k, v in row.items() if not k.endswith("_s") and k not in TIMES}
            for row in read_log(out / "run" / "log.jsonl")
        ]
        files = sorted((out / "run").glob("*/model/*"))
        return rows, {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Jobs:
    def words(self, world, out):
        how = ["--dtype", "float32", "--slots", 4, "--temperature", 0.7, "--max-new-tokens", 12]
        return ["jobs", world / "rows.jsonl", out / "out.jsonl", "--images", world, *how]

    def progress(self, out):
        return lines_of(out / "out.jsonl")

    def result(self, out):
        assert [path.name for path in out.glob(".*")] == []
        return (out / "out.jsonl").read_bytes()


class Instruct:
    def __init__(self, server):
        self.server = server

    def words(self, world, out):
        how = ["--model", "m", "--url", self.server.url, "--kinds", "conversation", "--concurrency", 3]
        return ["instruct", world / "scenes.jsonl", "--out", out / "data", *how]

    def progress(self, out):
        return lines_of(out / "data" / "replies.jsonl")

    def result(self, out):
        replies = [json.loads(line)["key"] for line in (out / "data" / "replies.jsonl").read_text().splitlines()]
        paid = dict(self.server.paid)
        self.server.texts.clear()  # which it gives at once when it is asked again
        self.server.paid.clear()
        return sorted(replies), paid, (out / "data" / "instruct.json").read_bytes()


def kill_often(command, world, tmp_path, kills, seed):
    """Rounds of a command, each from nothing to its end, until it was killed so often: the result of one without kills,
    those of the rounds, and how often they were killed."""
    out, total, ends = tmp_path / "whole", Counter(), []
    out.mkdir()
    Killed(command.words(world, out), lambda: 0, tmp_path, 0).to_the_end(0)
    whole = command.result(out)
    while total["kills"] < kills:
        number = len(ends)
        where = tmp_path / f"round-{number}"
        with small_disk(where) as disk:
            words, progress = command.words(world, where), functools.partial(command.progress, where)
            run = Killed(words, progress, tmp_path, f"{seed} {number}", disk)
            run.to_the_end(kills - total["kills"])
            ends.append(command.result(where))
        total += run.count
    print(f"{type(command).__name__}: {len(ends)} rounds, {dict(total)}")
    return whole, ends, total["kills"]


@pytest.mark.parametrize(("command", "kills"), [(Train(), 2), (Jobs(), 1)], ids=["train", "jobs"])
def test_killed_it_ends_as_if_it_had_not_been(world, tmp_path, command, kills):
    whole, ends, killed = kill_often(command, world, tmp_path, kills, seed=1)
    assert killed >= kills and ends == [whole] * len(ends)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "kills"), [(Train(), 32), (Jobs(), 18)], ids=["train", "jobs"])
def test_fifty_kills(world, tmp_path, command, kills):
    whole, ends, killed = kill_often(command, world, tmp_path, kills, seed=2)
    assert killed >= kills and ends == [whole] * len(ends)


@pytest.mark.slow
def test_ten_kills_while_instruction_data_is_made(world, tmp_path):
    pytest.importorskip("openai")
    with Server(lambda number, messages: ("slow", 0.05, well(messages))) as server:
        whole, ends, killed = kill_often(Instruct(server), world, tmp_path, 10, seed=3)
    keys, paid, _ = whole
    assert len(keys) == len(set(keys)) == len(paid) == 60 and set(paid.values()) == {1}  # one reply each, paid once
    assert killed >= 10 and ends == [whole] * len(ends)
