"""A checkpoint is resolved, read and built once."""

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
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
