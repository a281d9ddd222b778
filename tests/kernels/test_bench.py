"""The benches rehearsed on a CPU at tiny sizes: every file written, every peer in its row, goals judged as stated."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import report as reporting
from bench.cases import HEADS, PROJECTORS

ROOT = Path(__file__).parents[2]


def test_the_report_is_written(tmp_path, capsys):
    arguments = ["--device", "cpu", "--no-compile", "--rounds", "2", "--out", str(tmp_path)]
    assert reporting.main(arguments) == 0
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert {(row["kernel"], row["direction"]) for row in report["rows"]} == {
        ("fused_mlp", "forward"),
        ("fused_mlp", "forward+backward"),
        ("linear_cross_entropy", "forward+backward"),
        ("rms_norm", "forward"),
        ("rms_norm", "forward+backward"),
        ("swiglu", "forward"),
        ("swiglu", "forward+backward"),
        ("attention", "forward"),
        ("decode_attention", "forward"),
        ("nf4_matmul", "forward"),
    }
    for row in report["rows"]:
        more = {"products only"} if row["kernel"] in ("fused_mlp", "linear_cross_entropy") else set()
        more |= {"transformers"} if row["kernel"].endswith("attention") else set()
        if row["kernel"] == "nf4_matmul":
            optional = {"bitsandbytes": "bitsandbytes", "llama.cpp Q4_0": "llama_cpp"}
            more |= {"16 bits"} | {peer for peer, package in optional.items() if find_spec(package)}
        assert {"ours", "eager"} | more == set(row["peers"]) and row["flop_per_s"] > 0
    assert report["facts"]["versions"]["torch"] and report["limits"]["copy_bytes_per_s"] > 0
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "kernels.md").read_text()
    assert text.count("\n| ") == 1 + len(report["rows"]) and "rehearsal" in text


def row(rows, eager, products, kernel="fused_mlp", direction="forward", share=0.95):
    ratios = {"eager": eager, "products only": products}
    return {
        "kernel": kernel,
        "direction": direction,
        "shape": f"{rows} x",
        "ratios": ratios,
        "share_of_roofline": share,
    }


@pytest.mark.parametrize(
    ("measured", "count"),
    (
        (row(4608, 1.06, 1.01), 0),
        (row(4608, 1.04, 0.99), 2),
        (row(576, 1.06, 0.90), 0),  # against bare products only from 4608 rows on
        (row(576, 1.04, 0.90), 1),
        (row(4608, 1.04, 0.5, direction="forward+backward"), 1),
        (row(4096, 0.5, 0.5, kernel="linear_cross_entropy", share=0.91), 0),
        (row(4096, 2.0, 2.0, kernel="linear_cross_entropy", share=0.89), 1),
        (row(8192, 0.5, 0.5, kernel="rms_norm", share=0.91), 0),
        (row(8192, 2.0, 2.0, kernel="rms_norm", share=0.89), 1),
        (row(8192, 0.5, 0.5, kernel="swiglu", share=0.5), 0),
    ),
)
def test_goals(measured, count):
    assert len(reporting.missed(measured)) == count


@pytest.mark.parametrize(
    ("label", "kernel", "shape", "direction", "tflops", "ratios", "share", "count"),
    (
        ("decoder", "attention", "4 x 4096", "forward", 560, {"SDPA cuDNN": 1.01}, 0.7, 0),
        ("decoder", "attention", "4 x 4096", "forward", 540, {"SDPA cuDNN": 0.99}, 0.7, 2),
        ("decoder", "attention", "4 x 4096", "forward+backward", 460, {"SDPA cuDNN": 1.0}, 0.6, 0),
        ("CLIP-L", "attention", "1 x 577", "forward", 1, {"eager": 2.0, "SDPA flash": 1.1}, 0.1, 1),
        ("SigLIP", "attention", "64 x 729", "forward", 1, {"eager": 1.3, "SDPA flash": 1.25}, 0.1, 0),
        ("packed", "attention", "20 rows", "forward+backward", 1, {"eager": 1.2}, 0.1, 1),
        ("7B", "decode_attention", "1 x 4096", "forward", 1, {"eager": 1.2}, 0.84, 1),
        ("7B", "decode_attention", "32 x 4096", "forward", 1, {"eager": 1.2}, 0.5, 0),
    ),
)
def test_goals_of_attention(label, kernel, shape, direction, tflops, ratios, share, count):
    measured = {"label": label, "kernel": kernel, "shape": shape, "direction": direction, "ratios": ratios}
    assert len(reporting.missed({**measured, "flop_per_s": tflops * 1e12, "share_of_roofline": share})) == count


def test_the_real_shapes_are_those_of_the_models():
    widths = {(K, H, O) for _, K, H, O, _ in PROJECTORS}
    assert widths == {(1024, 4096, 4096), (1024, 5120, 5120), (1152, 896, 896), (1152, 3584, 3584)}
    assert (4096, 128256, 4096) in {(D, V, rows) for _, D, V, rows in HEADS}


BARE = """
import importlib.abc, runpy, sys
ABSENT = {"transformers", "matplotlib", "bitsandbytes", "liger_kernel", "datasets", "peft", "pytest", "llama_cpp"}
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.partition(".")[0] in ABSENT else find_spec(name, *more)
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
name, *sys.argv = sys.argv[1:]
sys.argv.insert(0, name)
runpy.run_module(name, run_name="__main__")
"""


def bare(folder, *words):
    """A bench started in another folder, with the packages of `make demo` alone."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BARE, *words]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


def test_one_kernel_without_any_peer_leaves_the_tracked_results_alone(tmp_path):
    tracked = {path: path.stat().st_mtime_ns for path in (ROOT / "bench" / "results").rglob("*")}
    done = bare(tmp_path, "bench.report", "swiglu", "--no-compile", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    assert "without a column: Liger-Kernel, transformers, bitsandbytes" in done.stdout
    assert "a plot needs matplotlib" in done.stdout
    rows = json.loads((tmp_path / "runs" / "bench" / "cpu" / "kernels.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} == {"swiglu"}
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "bench" / "results").rglob("*")} == tracked


def test_a_kernel_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        reporting.main(["swigul"])
    message = capsys.readouterr().err
    assert ended.value.code == 2 and "no kernel 'swigul' (did you mean 'swiglu'?)" in message
    assert "fused_mlp, linear_cross_entropy" in message


def test_what_needs_a_peer_says_so(tmp_path):
    done = bare(tmp_path, "bench.data")
    assert done.returncode == 2 and "needs datasets, transformers; pip install" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "bench").glob("*.py") if "__main__" in p.read_text()))
def test_every_bench_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"bench.{name}").main(["--help"])
    assert ended.value.code == 0 and "usage" in capsys.readouterr().out
