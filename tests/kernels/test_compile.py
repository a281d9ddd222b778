"""Every shipped configuration compiled without a card: no spills, shared memory that fits, the right instructions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillava.kernels import configs, flash_backward, frame

if not frame.HAS_TRITON:
    pytest.skip("Triton is not installed here, so nothing can be compiled", allow_module_level=True)

from minillava.kernels.tools import aot, cases, tune

TABLE = Path(__file__).parents[2] / "bench" / "results" / "compile.json"


def key(row):
    settings = {name: value for name, value in row["settings"].items()}
    return row["kernel"], row["arch"], json.dumps(settings, sort_keys=True)


# `make compile-table` compiles for all cards; CI for the two whose code differs most, and AMD's.
OFTEN = ("sm_80", "sm_90", "gfx942")


@pytest.mark.parametrize("arch", [pytest.param(a, marks=[pytest.mark.slow] * (a not in OFTEN)) for a in frame.CARDS])
def test_shipped_configurations(arch):
    rows = list(aot.shipped(arch))
    wrong = {f"{row.kernel} {row.settings}": row.complaints() for row in rows if row.complaints()}
    assert not wrong
    assert any(row.settings.get("SPECIALIZE") for row in rows) == (arch == "sm_90")
    listed = {key(row) for row in json.loads(TABLE.read_text())["rows"] if row["arch"] == arch}
    assert {key(vars(row)) for row in rows} == listed, (
        "bench/results is old: python -m minillava.kernels.tools.aot bench/results"
    )


def test_the_table_lists_nothing_that_spills():
    rows = [aot.Compiled(**row) for row in json.loads(TABLE.read_text())["rows"]]
    assert {row.arch for row in rows} == set(frame.CARDS)
    assert {row.kernel for row in rows} == {
        "_pointer",
        "_descriptor",
        "_finish",
        "_loss_and_gradient",
        "_swiglu",
        "_swiglu_backward",
        "_rms_norm",
        "_rms_norm_backward",
        "_flash_forward",
        "_flash_backward_keys",
        "_flash_backward_queries",
        "_delta",
        "_decode_split",
        "_decode_combine",
        "_gemv",
        "_product",
        "_add",
        "_dequantize",
        "_row",
        "_rows",
    }
    assert not [row for row in rows if row.complaints()]


def test_instructions_a_weight_are_counted():
    """Of the loop that decodes 4-bit weights, plain and nested scales; one that takes more is caught."""
    rows = [aot.Compiled(**row) for row in json.loads(TABLE.read_text())["rows"] if row["kernel"] == "_gemv"]
    shipped = [row for row in rows if row.arch.startswith("sm_")]
    assert len(shipped) >= 16 and {row.settings["WIDTH"] for row in shipped} == {64, 172}
    assert all(2.5 < row.per_weight <= 4.1 for row in shipped)  # Blackwell adds two products at once
    few = {"variant": "gemv", "block_n": 4, "blocks": 16, "warps": 4}  # four rows share what a thread reads of x
    (row,) = aot.compile_case("sm_90", "nf4_matmul", "forward", {"rows": 1}, few, K=11008, nested=True)
    assert row.per_weight > 4.1 and any("instructions a weight" in text for text in row.complaints())


@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_100"))
def test_one_row_in_fp32(arch):
    """Its configuration is that of 16 bits; its x takes twice the registers."""
    words, scales = torch.empty(2048 * 4096, dtype=torch.uint8, device="meta"), torch.empty(64 * 4096, device="meta")
    with aot.compiling(arch) as found:
        x = torch.empty(1, 4096, device="meta")
        y = aot.nf4_matmul.triton_forward(x, words, scales, None, None, None, 4096, "nf4", 64)
    assert y.dtype == torch.float32 and [row.kernel for row in found] == ["_gemv"]
    assert found[0].per_weight > 2.5 and not found[0].complaints()


def test_a_configuration_that_spills_is_caught():
    """128 x 256 in four warps without specialisation: known to spill in Triton 3.6 and 3.9."""
    config = {"variant": "descriptor", "block_m": 128, "block_n": 256, "block_k": 64, "group": 8, "parts": 1}
    config |= {"specialize": False, "warps": 4, "stages": 2}
    (row,) = aot.compile_case("sm_90", "fused_mlp", "forward", {}, config, activation="gelu")
    assert row.spill_bytes > 0 and any("spills" in text for text in row.complaints())


def test_too_much_shared_memory_is_caught():
    config = configs.choose("fused_mlp", "forward", frame.CARDS["sm_90"], 36864, 4096)
    (row,) = aot.compile_case("sm_90", "fused_mlp", "forward", {}, {**config, "stages": 4}, activation="gelu_tanh")
    assert any("shared memory" in text for text in row.complaints())


@pytest.mark.parametrize("rows", (1, 577, 4609))
def test_odd_sizes_compile_without_spills(rows):
    """Rows that Triton specialises on, widths that are multiples of 8 and not of 16, a missing bias."""
    x, w1, w2 = (cases.numbers("meta", *shape) for shape in ((rows, 1144), (5128, 1144), (888, 5128)))
    with aot.compiling("sm_90") as found:
        y, pre = aot.fused_mlp.triton_forward(x, w1, None, w2, None, "gelu", True)
        aot.fused_mlp.triton_backward(y, x, w1, w2, pre, "gelu", [True] * 5)
    assert y.shape == (rows, 888) and pre.shape == (rows, 5128)
    assert [row.kernel for row in found].count("_descriptor") == {1: 0, 577: 0, 4609: 2}[rows]
    assert not [row.complaints() for row in found if row.complaints()]


def test_the_deterministic_backward_adds_nothing_in_memory():
    """As a recipe's `deterministic` asks for: two kernels, each result written once."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        q = cases.numbers("meta", 300, 2, 64)
        lse = torch.empty(2, 300, device="meta")
        with aot.compiling("sm_90") as found:
            flash_backward.backward(q, q, q, q, q, lse, (0, 300), (0, 300), True, 0, 0.1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [row.kernel for row in found] == ["_delta", "_flash_backward_keys", "_flash_backward_queries"]
    assert not found[1].settings["REDUCE"] and not [row.complaints() for row in found if row.complaints()]
    assert not any("tma reduce" in row.instructions for row in found)


def test_compiling_leaves_no_trace():
    with aot.compiling("sm_80"):
        assert frame.card_of(torch.empty(1, device="meta")).arch == "sm_80"
    assert frame.card_of(torch.empty(1, device="meta")).arch == "sm_90" and frame.on_compiled is None


def test_every_card_finds_a_configuration():
    unknown = frame.Card("NVIDIA GeForce RTX 5090", "sm_120", 170, 101_376)
    thor = frame.Card("NVIDIA B300", "sm_103", 148, 232_448)
    for card in (*frame.CARDS.values(), unknown, thor):
        for rows in (1, 64, 576, 4608, 10**6):
            for part in ("forward", "backward"):
                assert configs.choose("fused_mlp", part, card, rows, 4096)["warps"] in (4, 8)
            assert configs.choose("linear_cross_entropy", "loss", card, rows, 152064)["block"] > 0
    assert configs.choose("fused_mlp", "forward", unknown, 4608, 4096)["variant"] == "pointer"
    assert configs.choose("fused_mlp", "forward", thor, 4608, 4096)["variant"] == "descriptor"


@pytest.mark.parametrize("arch", frame.CARDS)
def test_tuning_offers_what_ships(arch):
    """Every shipped configuration has the settings of one that `tune` would time in its place."""
    for kernel in cases.CASES:
        for part, cards in configs.table(kernel).items():
            for bucket in cards[configs.entry(cards, frame.CARDS[arch])]:
                offered = list(tune.CANDIDATES[kernel](frame.CARDS[arch], part, bucket))
                assert bucket["config"].keys() in [config.keys() for config in offered], (kernel, part, bucket)
                assert len({json.dumps(config) for config in offered}) == len(offered)


@pytest.mark.parametrize("kernel", (kernel for kernel in cases.CASES if kernel != "linear_cross_entropy"))
def test_tuning_compares_with_the_same_results(kernel):
    """In number, shape and type, seen on meta tensors; the loss's plain code looks at numbers."""
    for part, cards in configs.table(kernel).items():
        bucket = {"width": 64, **cards["sm_80"][0]} if kernel == "flash" else cards["sm_80"][0]
        run = cases.CASES[kernel](part, bucket, "meta")
        with aot.compiling("sm_80"):
            got, expected = (torch.utils._pytree.tree_leaves(run(config)) for config in (bucket["config"], None))
        assert [x.shape for x in got] == [x.shape for x in expected], part


def test_tuning_leaves_out_what_is_wrong_or_dies(monkeypatch, capsys):
    right = torch.randn(100).bfloat16()
    tune.compare(lambda config: (right, right * (1.001 if config else 1)), {"warps": 4})
    for wrong in (right.roll(1), right * float("nan")):
        with pytest.raises(ValueError, match="is off by"):
            tune.compare(lambda config, wrong=wrong: (right, wrong if config else right), {"warps": 4})
    bucket = configs.table("swiglu")["forward"]["sm_80"][0]
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(tune.sys, "executable", shutil.which("false"))
    assert tune.try_out("swiglu", "forward", bucket, bucket["config"], 1) == float("inf")
    real = subprocess.run
    monkeypatch.setattr(tune.subprocess, "run", lambda _, **o: real([sys.executable, "-c", killed], **o))
    monkeypatch.setattr(tune.sys, "executable", shutil.which("python3"))
    kept = tune.tune("swiglu", frame.CARDS["sm_80"], "forward", bucket, 1)
    assert kept == bucket and "ended with status -11" in capsys.readouterr().out


def test_tuned_files_are_written_as_they_are_shipped(monkeypatch, tmp_path):
    shipped = {kernel: (configs.FOLDER / f"{kernel}.json").read_text() for kernel in cases.CASES}
    tables = {kernel: configs.table(kernel) for kernel in cases.CASES}
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    for kernel, text in shipped.items():
        tune.write(kernel, tables[kernel])
        assert (tmp_path / f"{kernel}.json").read_text() == text


def test_importing_the_kernels_is_light():
    code = "import sys, minillava.kernels; sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_kernels_run_where_triton_is_not_installed():
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch
from minillava.kernels.attention import attention
from minillava.kernels.decode_attention import decode_attention
from minillava.kernels.fused_mlp import fused_mlp
from minillava.kernels.linear_cross_entropy import linear_cross_entropy
assert not any(name.startswith("minillava.kernels.tools.aot") for name in sys.modules)
x = torch.randn(3, 8, requires_grad=True)
y = fused_mlp(x, torch.randn(16, 8), None, torch.randn(8, 16), None)
linear_cross_entropy(y, torch.randn(9, 8), torch.tensor([0, 1, 8])).backward()
assert x.grad.shape == x.shape
q, lengths = torch.randn(1, 3, 2, 16), torch.tensor([3])
last = attention(q[0], q[0], q[0], (0, 3), causal=True)[None, -1]
torch.testing.assert_close(decode_attention(q[:, -1], q, q, lengths), last)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
