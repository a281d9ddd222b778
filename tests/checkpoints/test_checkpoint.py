"""A checkpoint is resolved, read and built once."""

import copy
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minillava import LLaVA
from minillava.checkpoints import checkpoint as module
from minillava.checkpoints.checkpoint import Checkpoint
from minillava.checkpoints.hub import NANO, resolve
from minillava.checkpoints.save import save_model
from minillava.errors import UserError
from minillava.llava import LLaVAModel


def test_from_pretrained_resolves_reads_and_builds_once(monkeypatch):
    """However often the config, the number of parameters, the tokenizer and the weights are asked for."""
    calls: Counter[str] = Counter()
    read_bytes, built = Path.read_bytes, LLaVAModel.__init__

    def reading(path, *args, **kwargs):
        calls[path.name] += 1
        return read_bytes(path, *args, **kwargs)

    def building(model, config):
        calls["network"] += 1
        built(model, config)

    def resolving(source):
        calls["resolve"] += 1
        return resolve(source)

    monkeypatch.setattr(Path, "read_bytes", reading)
    monkeypatch.setattr(LLaVAModel, "__init__", building)
    monkeypatch.setattr(module, "resolve", resolving)
    model = LLaVA.from_pretrained(NANO)
    assert model.config == model.model.config
    assert {key: calls[key] for key in ("resolve", "config.json", "network")} == {
        "resolve": 1, "config.json": 1, "network": 1,
    }  # fmt: skip


def functions_called(work):
    """The functions of the package that `work` passes through, by file and name; lambdas and comprehensions are parts
    of theirs."""
    root, found = f"{Path(__file__).parents[2]}{os.sep}", set()

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root) and not code.co_name.startswith("<"):
            found.add((code.co_filename.removeprefix(root), code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return {name for name in found if name[0].startswith(("minillava", "kernels"))}


def test_a_reader_of_one_answer_meets_few_functions():
    """Of nano's, on a CPU, once C code is there: what is loaded in passing, and what generate goes through."""
    model, picture = LLaVA.from_pretrained(NANO), Image.new("RGB", (64, 48))
    model.generate("What is this?", picture)
    loading = functions_called(lambda: LLaVA.from_pretrained(NANO))
    answering = functions_called(lambda: model.generate("What is this?", picture))
    assert len(answering) <= 155, sorted(answering)
    assert len(loading) <= 116, sorted(loading)


def test_a_checkpoint_loads_as_often_as_it_is_asked():
    """Two models of one checkpoint share nothing, and a second load builds a second network."""
    opened = module.Checkpoint.open(NANO)
    first, second = opened.load(), opened.load()
    assert first is not second and opened.parameters == sum(p.numel() for p in first.parameters())
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values()):
        assert a.equal(b) and a.data_ptr() != b.data_ptr(), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_model_that_is_not_finite_is_neither_written_nor_loaded(tiny_model, tmp_path, value):
    model = copy.deepcopy(tiny_model)
    save_model(model, tmp_path / "model")
    with torch.no_grad():
        model.decoder.norm.weight[3] = value
    with pytest.raises(
        UserError, match=r"not written, language_model\.model\.norm\.weight has values that are not fin"
    ):
        save_model(model, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["language_model.model.norm.weight"][3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"model\.safetensors: language_model\.model\.norm\.weight has values that are not"
    ):
        Checkpoint.open(tmp_path / "model").load()


def test_what_a_dtype_does_not_hold_is_said_and_large_sums_are_no_fault(tiny_model, tmp_path):
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.decoder.blocks[0].mlp.down.weight.fill_(3e38)  # whose sum is infinite
    save_model(model, tmp_path / "model")
    loaded = Checkpoint.open(tmp_path / "model").load()
    assert torch.equal(loaded.decoder.blocks[0].mlp.down.weight, model.decoder.blocks[0].mlp.down.weight)
    with pytest.raises(UserError, match=r"down_proj\.weight has values past what torch\.float16 holds; use bfloat16"):
        Checkpoint.open(tmp_path / "model").load(torch.float16)
