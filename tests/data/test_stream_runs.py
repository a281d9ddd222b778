"""Whole runs on 100,000 rows of parquet, in processes: memory, SIGKILL, two ranks. Minutes, so `pytest -m slow`."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, talk
from PIL import Image

from minillava.training.progress import read_log

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("psutil")
pytestmark = pytest.mark.slow
ROWS, BATCH, SAVE = 100_000, 500, 40
RECIPE = """
name = "stream"
device = "cpu"
[model]
tokenizer = "{root}/tokenizer"
vision = {{hidden_size = 16, intermediate_size = 16, num_layers = 1, num_heads = 1, image_size = 16, patch_size = 16}}
decoder = {{hidden_size = 16, intermediate_size = 16, num_layers = 1, num_heads = 1, num_kv_heads = 1, head_dim = 16}}
[[stage]]
name = "finetune"
lr = {{projector = 1e-3, decoder = 1e-3}}
data = [{{path = "{root}/rows.parquet"}}]
epochs = 1
batch_size = {batch}
dtype = "float32"
save_every = {save}
"""
# `minillava train`, and a line for each step: its number, the process's memory, and the answers that are learned.
RUN = """
import json, sys
import psutil
from minillava.cli import main
from minillava.data import columns
from minillava.training import parallel
from minillava.training.trainer import Trainer
columns.CACHE_BYTES = 24 << 20
train_step, process = Trainer.train_step, psutil.Process()
def step(self, micros):
    values, texts = train_step(self, micros), []
    for micro in micros:
        for first, last in zip(micro.cu_seqlens, micro.cu_seqlens[1:]):
            labels = micro.labels_T[first:last]
            texts.append(self.task.run.tokenizer.decode(labels[labels >= 0].tolist()).strip())
    with open(f"{sys.argv[1]}-{parallel.rank()}", "a") as file:
        print(json.dumps([self.step + 1, process.memory_info().rss, texts]), file=file)
    return values
Trainer.train_step = step
sys.exit(main(["train", *sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def stream(tmp_path_factory, tiny_tokenizer):
    """200 MB of rows whose answer is their number, in groups of 500, of which a process keeps 12 MB; and a recipe.

    All have as many tokens. With unequal ones a process that trains in bf16 grows by 200 MB within 100 steps,
    not from a stream alone: libraries keep code and buffers for each shape.
    """
    root, writer = tmp_path_factory.mktemp("stream"), None
    rng = np.random.default_rng(0)
    for first in range(0, ROWS, 500):
        rows = []
        for number in range(first, first + 500):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(file, "PNG", compress_level=0)
            picture = {"bytes": file.getvalue(), "path": None}
            rows.append({"image": picture, "conversations": talk("<image>\nWhich?", f"{number:06}")})
        table = pa.Table.from_pylist(rows)
        writer = writer or pq.ParquetWriter(root / "rows.parquet", table.schema, compression="none")
        writer.write_table(table)
    writer.close()
    tiny_tokenizer.save(root / "tokenizer")
    (root / "recipe.toml").write_text(RECIPE.format(root=root, batch=BATCH, save=SAVE))
    (root / "run.py").write_text(RUN)
    return root


def command(stream, name, *words, ranks=1):
    """Starts a run of this name; one that is there is gone on with."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, str(stream / "run.py"), str(stream / f"seen-{name}"),
            str(stream / "recipe.toml"), "--out", str(stream / name), *words]  # fmt: skip


def start(*args, **options):
    with open(args[0] / f"{args[1]}.txt", "a") as out:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command(*args, **options), cwd=ROOT, env=environment, stdout=out, stderr=out)


def finish(process, stream, name):
    assert process.wait(1500) == 0, (stream / f"{name}.txt").read_text()[-2000:]


def losses(stream, name):
    rows = [row for row in read_log(stream / name / "log.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, ROWS // BATCH + 1))
    return [row["loss"] for row in rows]


def seen(stream, name, rank=0):
    """[step, memory, answers] of all steps that a rank took."""
    return [json.loads(line) for line in (stream / f"seen-{name}-{rank}").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(stream):
    """A run that nothing happens to."""
    finish(start(stream, "whole"), stream, "whole")
    return losses(stream, "whole")


def test_memory_is_flat_and_each_sample_is_learned_from_once(stream, whole):
    rows = seen(stream, "whole")
    assert sorted(int(text) for _, _, texts in rows for text in texts) == list(range(ROWS))
    memory = [rss for _, rss, _ in rows[10:]]  # the cache of row groups is full by then
    assert max(memory) - memory[0] < 50e6, (memory[0], max(memory))
    assert whole[-1] < 0.8 * whole[0]


def test_killed_twice_equals_uninterrupted(stream, whole):
    """By SIGKILL, somewhere between two checkpoints: the same losses to the bit."""
    for until in (SAVE + 7, 3 * SAVE + 21):
        process = start(stream, "killed", "--resume")
        log = stream / "killed" / "log.jsonl"
        while process.poll() is None and not (log.is_file() and read_log(log) and read_log(log)[-1]["step"] >= until):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (stream / "killed.txt").read_text()[-2000:]
    finish(start(stream, "killed", "--resume"), stream, "killed")
    steps = [step for step, _, _ in seen(stream, "killed")]
    assert len(steps) > len(set(steps)) == ROWS // BATCH  # some were taken again
    assert losses(stream, "killed") == whole


def test_two_ranks_learn_from_each_sample_once(stream, whole):
    """Two processes under torchrun, by gloo: together they draw what one process draws, and lose the same."""
    finish(start(stream, "ranks", ranks=2), stream, "ranks")
    both = [seen(stream, "ranks", rank) for rank in range(2)]
    assert sorted(int(text) for rows in both for _, _, texts in rows for text in texts if text) == list(range(ROWS))
    assert all(len(first[2]) == len(second[2]) == BATCH // 2 for first, second in zip(*both))
    assert losses(stream, "ranks") == pytest.approx(whole, abs=1e-5)
