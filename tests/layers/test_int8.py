"""Eight-bit weights: bitsandbytes' own bytes and scales, in memory and in files, as transformers has them."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import PIXELS, load_model, logits_here, logits_there

from minillava.checkpoints.save import save_model
from minillava.errors import UserError
from minillava.layers.int8 import Linear8bit
from minillava.layers.quantize import Linear4bit
from minillava.layers.scheme import Scheme


def test_bytes_and_scales_are_those_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    for weight in (torch.randn(300, 136), torch.randn(40, 1000) * torch.logspace(-6, 4, 40)[:, None]):
        theirs, absmax, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        ours = Linear8bit.from_weight(weight.half())
        assert torch.equal(ours.absmax, absmax.flatten()) and (ours.weight - theirs).abs().max() <= 1
        assert (ours.weight != theirs).float().mean() < 1e-3  # ties of a division that rounds otherwise
        assert torch.equal(Linear8bit.from_weight(torch.zeros(2, 4)).weight, torch.zeros(2, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="not finite"):
        Linear8bit.from_weight(torch.tensor([[1.0, float("inf")]]))


@pytest.mark.parametrize("damage", [lambda w, s: (w, s[:-1]), lambda w, s: (w[:-1], s), lambda w, s: (w.float(), s),
                                    lambda w, s: (w, s * torch.nan), lambda w, s: (w, s[:0])])  # fmt: skip
def test_parts_that_do_not_fit(damage):
    layer = Linear8bit.from_weight(torch.randn(8, 16))
    weight, scales = damage(layer.weight, layer.absmax)
    with pytest.raises(ValueError, match=r"scales \(SCB\), expected int8 and a finite scale for each row"):
        Linear8bit.from_stored(weight, {"SCB": scales})


def test_the_layer():
    torch.manual_seed(0)
    layer = Linear8bit.from_weight(torch.randn(40, 96), torch.randn(40))
    exact = layer.dequantize(torch.float64)
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        x = torch.randn(2, 5, 96).to(dtype)
        want = x.double() @ exact.T + layer.bias.double()
        with torch.no_grad():
            assert ((layer(x).double() - want).norm() / want.norm()) < allowed
    x.requires_grad_()
    layer(x).sum().backward()
    assert ((x.grad.double() - exact.sum(0)).norm() / x.grad.double().norm()) < 0.01
    assert layer.to(torch.bfloat16).absmax.dtype == torch.float32
    parts = [layer.rows(0, 16), layer.rows(16, 40)]
    assert torch.equal(Linear8bit.joined(parts).dequantize(), layer.dequantize())


def test_a_checkpoint_of_transformers_and_bitsandbytes_loads(tiny, exam, tmp_path):
    pytest.importorskip("bitsandbytes")
    import transformers

    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    there = load(tiny, device_map="cpu", dtype=torch.float32, quantization_config=config)
    there.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    stated = json.loads((tmp_path / "config.json").read_text())
    del stated["quantization_config"]["quant_method"]  # which the first of such files did not have
    (tmp_path / "config.json").write_text(json.dumps(stated))
    model = load_model(tmp_path, torch.float32)
    eight = [m for m in model.modules() if isinstance(m, Linear8bit)]
    theirs = {n: m for n, m in there.named_modules() if type(m).__name__ == "Linear8bitLt"}
    assert len(eight) == len(theirs) == 2 * 7 + 3 * 6 + 2
    plain = load(tiny, device_map="cpu", dtype=torch.float32).eval()
    for name, module in theirs.items():
        plain.get_submodule(name).weight.data = module.weight.float() * module.state_dict()["SCB"][:, None] / 127
    torch.testing.assert_close(logits_here(model, *exam), logits_there(plain, *exam), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ("int8", "int8:decoder,vision,projector,head"))
def test_saved_and_read_to_the_bit_here_and_there(tiny, exam, tmp_path, text):
    pytest.importorskip("bitsandbytes")
    import transformers

    model = load_model(tiny, torch.float32, quantize=Scheme.parse(text))
    before = logits_here(model, *exam)
    save_model(model, tmp_path / "ours")
    assert torch.equal(logits_here(load_model(tmp_path / "ours", torch.float32), *exam), before)
    load = transformers.AutoModelForImageTextToText.from_pretrained
    there = load(tmp_path / "ours", device_map="cpu", dtype=torch.float32)
    found = {n: m for n, m in there.named_modules() if type(m).__name__ == "Linear8bitLt"}
    ours = [m for m in model.modules() if isinstance(m, Linear8bit)]
    assert len(found) == len(ours) > 0
    assert {m.weight.double().sum().item() for m in found.values()} == {m.weight.double().sum().item() for m in ours}


def test_four_and_eight_bits(tiny, exam, tmp_path):
    """The head may have a type of its own, in memory: no file holds both."""
    scheme = Scheme.parse("nf4-exact:decoder,head=int8")
    assert scheme.exact and scheme.type_of("decoder.head.weight") == "int8"
    assert scheme.type_of("decoder.blocks.0.attn.q.weight") == "nf4"
    model = load_model(tiny, torch.float32, quantize=scheme)
    assert isinstance(model.decoder.head, Linear8bit) and isinstance(model.decoder.blocks[1].mlp.down, Linear4bit)
    assert model.decoder.blocks[1].mlp.down.exact
    only_nf4 = load_model(tiny, torch.float32, quantize=Scheme.parse("nf4"))
    a, b = logits_here(model, *exam), logits_here(only_nf4, *exam)
    assert 0 < (a - b).norm() < 0.02 * b.norm()
    with pytest.raises(UserError, match="in 4 bits and in 8"):
        save_model(model, tmp_path / "both")
    for wrong in ("int8-64", "int8:decoder,head=nf5", "int8:decodr"):
        with pytest.raises(UserError):
            Scheme.parse(wrong)
