"""CIFAR-10's photographs through both stages on two ranks, one of which is killed; the run goes on, its export answers.

`pytest -s tests/test_real_ranks.py` is the command for it; without the real files (see ../shared/real) it is skipped.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from helpers import REAL, ROOT

from minillava.training.progress import read_log

CIFAR = REAL / "cifar10"
RECIPE = """
name = "cifar"
device = "cpu"
[model]
vision_from = "{root}/minillava/nano"
tokenizer = "data"
chat = {{template = "vicuna_short"}}
decoder = {{hidden_size = 128, intermediate_size = 384, num_layers = 4, num_heads = 4, num_kv_heads = 4, \
head_dim = 32, max_positions = 1024, tie_embeddings = true}}
[[stage]]
name = "pretrain"
data = [{{path = "{real}/captions-train.json", images = "{real}/images-train.zip", take = "random:10%"}}]
chat = {{template = "plain"}}
lr = {{projector = 4e-3}}
steps = 10
batch_size = 32
[[stage]]
name = "finetune"
data = [{{path = "{real}/instruct-train.json", images = "{real}/images-train.zip", take = "random:10%"}}]
lr = {{projector = 4e-3, decoder = 4e-3}}
steps = 40
batch_size = 32
save_every = 8
eval_samples = 64
"""


def launch(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(not CIFAR.is_dir() or sys.platform != "linux", reason="no CIFAR-10 in ../shared/real, or no /proc")
def test_cifar_on_two_ranks_killed_and_resumed(tmp_path):
    (tmp_path / "cifar.toml").write_text(RECIPE.format(root=ROOT, real=CIFAR))
    out, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "train.py"),
               str(tmp_path / "cifar.toml"), "--out", str(out)]  # fmt: skip
    killed = launch(*command)
    while not (log.exists() and sum(row["stage"] == "finetune" for row in read_log(log)) > 16):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    ranks = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    killed.communicate()
    assert killed.returncode != 0 and not (out / "finetune" / "done.json").exists()

    resumed = launch(*command, "--resume")
    said, errors = resumed.communicate()
    assert resumed.returncode == 0, errors[-3000:]
    assert "stage pretrain: finished before" in said and "going on at step" in said and "on 2 ranks" in said
    rows = [row for row in read_log(log) if row["stage"] == "finetune" and "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 41)) and all(math.isfinite(row["loss"]) for row in rows)
    assert all(row["samples"] == 32 for row in rows)
    early, late = (sum(row["loss"] for row in part) / len(part) for part in (rows[:4], rows[-4:]))
    print(said, f"loss {early:.3f} -> {late:.3f}")
    assert late < early / 2

    with zipfile.ZipFile(CIFAR / "images-train.zip") as file:
        picture = file.extract("truck_1757.jpg", tmp_path)
    question = "Is it an animal or a vehicle?\nAnswer the question using a single word or phrase."
    asked = launch(str(ROOT / "generate.py"), "--model", str(out / "finetune" / "model"), "--image", picture,
                   "--prompt", question, "--max-new-tokens", "16", "--json")  # fmt: skip
    answer, errors = asked.communicate()
    assert asked.returncode == 0, errors[-3000:]
    print(answer)
    answer = json.loads(answer)
    assert answer["image_tokens"] == 16 and answer["finish_reason"] == "stop" and answer["text"].strip()
