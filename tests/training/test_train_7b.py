"""The bench of training at 7B shapes, rehearsed: what it runs, how far losses are apart, and what it judges."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import train_7b
from bench.train_7b import MODES, goals, main


@pytest.mark.slow
def test_the_rehearsal_runs(tmp_path, capsys, monkeypatch):
    """Ours and the peer, by LoRA: rows of both, the long sample, losses that agree and fall."""
    pytest.importorskip("peft")
    monkeypatch.setitem(MODES, "lora", dataclasses.replace(MODES["lora"], ways=(("full", 4, False),)))
    arguments = ["--modes", "lora", "--compare", "lora", "--compare-steps", "8", "--steps", "1"]
    assert main([*arguments, "--size", "tiny", "--dtype", "float32", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "train_7b.json").read_text())
    rows = [(row["who"], row["activations"], row["micro"], row.get("long", False)) for row in result["speed"]]
    peer = "transformers + PEFT" + " + Liger" * torch.cuda.is_available()
    assert rows == [(who, "full", *row) for who in ("minillava", peer) for row in ((4, False), (1, True))]
    assert all(row["samples_per_s"] > 0 and row["mfu"] > 0 for row in result["speed"])
    (losses,) = result["losses"]
    assert losses["holds"] and losses["apart"]["greatest"] < 1e-5 and len(losses["minillava"]) == 8
    assert losses["transformers"] != losses["minillava"] and losses["minillava"][-1] < losses["minillava"][0] - 0.1
    text = (tmp_path / "train_7b.md").read_text()
    assert text.count("\n| ") == 1 + len(rows) and "rehearsal" in text
    assert "lora: losses agree" in capsys.readouterr().out


@pytest.mark.slow
def test_what_cannot_run_is_named(tmp_path, capsys, monkeypatch):
    """A part that fails costs itself alone; one that has no time left is not begun; a peer that is absent is named."""
    monkeypatch.setattr(train_7b, "find_spec", lambda name: None)
    monkeypatch.setattr("bench.train_peer.find_spec", lambda name: None if name == "peft" else True)

    def broken(bench, name, **more):
        raise ValueError("broken") if name == "full" else torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(train_7b, "speed", broken)
    arguments = ["--size", "tiny", "--dtype", "float32", "--out", str(tmp_path)]
    assert main([*arguments, "--modes", "full,pretrain", "--compare", "lora", "--compare-steps", "1"]) == 1
    out = capsys.readouterr().out
    assert "not run: speed of full: ValueError: broken" in out and "speed of pretrain: OutOfMemoryError" in out
    assert "lora: no losses to compare with, as peft is not installed" in out
    assert main([*arguments, "--seconds", "0"]) == 1
    assert "not run: losses of lora: no time left" in capsys.readouterr().out


def test_goals_are_judged():
    def row(mode, who, **more):
        return {"mode": mode, "who": who, "mfu": 0.5, "peak_gb": 11.0, **more}

    speed = [
        row("lora", "minillava"),
        row("lora", "transformers", mfu=0.9),
        row("full", "minillava", mfu=0.4),
        row("full", "minillava", failed="out of memory", mfu=0.9),
        row("qlora", "minillava", long=True),
        row("lora", "minillava", long=True, peak_gb=24.5),
    ]
    said = goals({"size": "7b", "speed": speed, "losses": [{"mode": "lora", "holds": False}]})
    assert said == [
        "lora: MFU 50.0%, goal 45%: met",
        "lora: 1 x 2048 tokens peak at 24.5 GB, goal 24: missed",
        "full: MFU 40.0%, goal 45%: missed",
        "qlora: 1 x 2048 tokens peak at 11.0 GB, goal 12: met",
        "lora: losses DO NOT AGREE",
    ]
    assert {name: mode.memory_gb for name, mode in MODES.items() if mode.memory_gb} == {"lora": 24, "qlora": 12}
