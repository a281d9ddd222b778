"""Adapters on layers: nothing changes before they learn, and merged they say the same."""

import copy

import pytest
import torch
from helpers import LORA, adapted, close, learn, load_model, logits

from minillava.checkpoints.save import save_model
from minillava.config import LoRAConfig
from minillava.errors import UserError
from minillava.layers import lora
from minillava.layers.scheme import Scheme
from minillava.llava import LLaVAModel


def test_adapters_start_at_nothing_and_merge_to_the_same(tiny_model, prompt):
    before = logits(tiny_model, prompt)
    model, trained = adapted(tiny_model, "decoder", "vision")
    assert torch.equal(logits(model, prompt), before)
    names = {name.split(".")[-2] for name in trained}
    assert names == {"q", "k", "v", "out", "gate", "up", "down", "fc1", "fc2"}  # neither head nor embedding
    size = sum(p.numel() for p in model.decoder.parameters()) - sum(p.numel() for p in tiny_model.decoder.parameters())
    linear = [m for n, m in tiny_model.decoder.named_modules() if isinstance(m, torch.nn.Linear) and n != "head"]
    assert size == sum(4 * (m.in_features + m.out_features) for m in linear)
    learn(trained)
    after = logits(model, prompt)
    assert not close(after, before)
    merged = LLaVAModel(tiny_model.config).eval()
    merged.load_state_dict(dict(lora.merged_weights(model)))
    assert close(logits(merged, prompt), after)
    adapters = lora.detach(model)
    assert torch.equal(logits(model, prompt), before)
    lora.merge(dict(model.named_parameters()), adapters, {"decoder": LORA, "vision": LORA})
    assert close(logits(model, prompt), after)


def test_every_adapter_is_in_the_loss_and_in_the_merged_model(tiny_model, prompt):
    """Also those of the projector, whose two products are one operation without them."""
    model, trained = adapted(tiny_model, "projector", "decoder")
    learn(trained)
    model(prompt[0], prompt[1], labels=prompt[0]).backward()
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    merged = LLaVAModel(tiny_model.config).eval()
    merged.load_state_dict(dict(lora.merged_weights(model)))
    assert close(logits(merged, prompt), logits(model, prompt))
    with lora.off(model):
        assert close(logits(model, prompt), logits(tiny_model, prompt))


def test_the_start_depends_on_seed_and_name_alone(tiny_model):
    _, a = adapted(tiny_model, "decoder", "vision")
    _, b = adapted(tiny_model, "decoder")
    assert all(torch.equal(a[name], b[name]) for name in b)
    q, k = (b[f"decoder.blocks.0.attn.{n}.lora_A"] for n in "qk")
    assert not torch.equal(q, k) and q.abs().max() <= 32**-0.5


def test_adapters_over_four_bits_merge_into_what_they_mean(tiny_model, tmp_path, prompt):
    save_model(tiny_model, tmp_path / "base")
    model = load_model(tmp_path / "base", torch.float32, quantize=Scheme())
    trained = lora.attach(model.decoder, "decoder", LORA)
    lora.initialise(trained, seed=1)
    learn(trained)
    merged = LLaVAModel(tiny_model.config).eval()
    merged.load_state_dict(dict(lora.merged_weights(model)))
    assert close(logits(merged, prompt), logits(model, prompt))
    with pytest.raises(UserError, match="in 4 bits"):
        lora.merge(dict(model.named_parameters()), trained, {"decoder": LORA})


def test_targets_are_layers_that_are_there(tiny_model):
    model = copy.deepcopy(tiny_model)
    trained = lora.attach(model.decoder, "decoder", LoRAConfig(4, 8.0, 0.0, ("q", "v")))
    assert len(trained) == 2 * 2 * 3 and all(".q." in name or ".v." in name for name in trained)
    with pytest.raises(UserError, match=r"lora.decoder: no layer 'q_proj'; there are down, gate"):
        lora.attach(model.decoder, "decoder", LoRAConfig(4, 8.0, 0.0, ("q_proj",)))
    with pytest.raises(UserError, match=r"lora.decoder: no layer 'head'"):  # the loss takes its weight, past the hook
        lora.attach(model.decoder, "decoder", LoRAConfig(4, 8.0, 0.0, ("q", "head")))
