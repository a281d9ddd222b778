"""Adapters: nothing changes before they learn, merged they say the same, and PEFT's files go in and out."""

import copy
import dataclasses
import json

import pytest
import torch

from minillava import lora
from minillava.config import LayoutConfig, UserError, VisionConfig
from minillava.hf_export import to_hf, to_original
from minillava.llava import LLaVA
from minillava.names import rename
from minillava.quantize import Scheme
from minillava.recipe import LoRAConfig
from minillava.weights import load_model, read_config, save_model

CONFIG = LoRAConfig(rank=4, alpha=8.0, dropout=0.05)


@pytest.fixture
def prompt(tiny_model):
    ids = [1, *[tiny_model.config.chat.image_token_id] * 4, *range(20, 60)]
    generator = torch.Generator().manual_seed(3)
    return torch.tensor(ids), torch.randn(1, 3, 16, 16, generator=generator)


def adapted(tiny_model, *parts):
    """A copy of the model with adapters that have learned something, and what was trained, by name."""
    model = copy.deepcopy(tiny_model).eval()
    trained = {}
    for part in parts:
        trained |= lora.attach(getattr(model, part), part, CONFIG)
    lora.initialise(trained, seed=1)
    return model, trained


def learn(trained):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in trained.items():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.3, generator=generator)


@torch.no_grad()
def logits(model, prompt):
    return model(prompt[0], prompt[1])


def close(a, b):
    """Within what float32 leaves of two orders of summation behind this model's large weights."""
    return (a - b).abs().max() <= 1e-4 * b.abs().max()


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
    merged = LLaVA(tiny_model.config).eval()
    merged.load_state_dict(dict(lora.weights(model)))
    assert close(logits(merged, prompt), after)
    scales = lora.scales_of(trained, {"decoder": CONFIG, "vision": CONFIG})
    adapters = lora.detach(model)
    assert torch.equal(logits(model, prompt), before)
    lora.add(dict(model.named_parameters()), adapters, scales)
    assert close(logits(model, prompt), after)


def test_the_start_depends_on_seed_and_name_alone(tiny_model):
    _, a = adapted(tiny_model, "decoder", "vision")
    _, b = adapted(tiny_model, "decoder")
    assert all(torch.equal(a[name], b[name]) for name in b)
    q, k = (b[f"decoder.blocks.0.attn.{n}.lora_A"] for n in "qk")
    assert not torch.equal(q, k) and q.abs().max() <= 32**-0.5


def test_adapters_over_four_bits_merge_into_what_they_mean(tiny_model, tmp_path, prompt):
    save_model(tiny_model, tmp_path / "base")
    model = load_model(tmp_path / "base", torch.float32, quantize=Scheme())
    trained = lora.attach(model.decoder, "decoder", CONFIG)
    lora.initialise(trained, seed=1)
    learn(trained)
    merged = LLaVA(tiny_model.config).eval()
    merged.load_state_dict(dict(lora.weights(model)))
    assert close(logits(merged, prompt), logits(model, prompt))
    with pytest.raises(UserError, match="in 4 bits"):
        lora.add(dict(model.named_parameters()), trained, lora.scales_of(trained, {"decoder": CONFIG}))


def test_targets_are_layers_that_are_there(tiny_model):
    model = copy.deepcopy(tiny_model)
    trained = lora.attach(model.decoder, "decoder", LoRAConfig(4, 8.0, 0.0, ("q", "v")))
    assert len(trained) == 2 * 2 * 3 and all(".q." in name or ".v." in name for name in trained)
    with pytest.raises(UserError, match=r"lora.decoder: no layer 'q_proj'; there are down, gate"):
        lora.attach(model.decoder, "decoder", LoRAConfig(4, 8.0, 0.0, ("q_proj",)))


def learned(tiny_model, *parts):
    """An adapted model whose projector has been trained too, and all that was."""
    model, trained = adapted(tiny_model, *parts)
    learn(trained)
    with torch.no_grad():
        for name, parameter in model.projector.named_parameters():
            trained[f"projector.{name}"] = parameter.mul_(1.1)
    return model, {name: parameter.detach() for name, parameter in trained.items()}


def test_peft_reads_ours(tiny_model, tiny_tokenizer, tmp_path, prompt):
    peft = pytest.importorskip("peft")
    import transformers

    save_model(tiny_model, tmp_path / "base", tiny_tokenizer)
    model, trained = learned(tiny_model, "decoder", "vision")
    configs = {"decoder": CONFIG, "vision": CONFIG}
    lora.save_peft(tmp_path / "adapter", trained, configs, str(tmp_path / "base"))
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        answer = theirs(input_ids=prompt[0][None], pixel_values=prompt[1]).logits[0]
    assert close(logits(model, prompt), answer)


def test_we_read_pefts(tiny_model, tiny_tokenizer, tmp_path, prompt):
    peft = pytest.importorskip("peft")
    import transformers

    save_model(tiny_model, tmp_path / "base", tiny_tokenizer)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=r".*language_model.*\.(q_proj|down_proj)", alpha_pattern={"down_proj": 16},
        modules_to_save=["multi_modal_projector"], init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.1)
        answer = theirs(input_ids=prompt[0][None], pixel_values=prompt[1]).logits[0]
    theirs.save_pretrained(tmp_path / "adapter")
    model = copy.deepcopy(tiny_model)
    assert not close(logits(model, prompt), answer)
    lora.merge_peft(model, tmp_path / "adapter")
    assert close(logits(model, prompt), answer)


def test_the_original_repositorys_files(tiny_model, tmp_path, prompt):
    """haotian-liu/LLaVA's: we read what we write, PEFT puts the adapters on transformers' lone language model, and
    config.json says of tower, projector and decoder what they are."""
    peft = pytest.importorskip("peft")
    import transformers

    model, trained = learned(tiny_model, "decoder")
    config, files = tiny_model.config, to_hf(tiny_model.config, "float32")
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(json.dumps(files["config.json"]["vision_config"]))
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(files["preprocessor_config.json"]))
    folder, original = tmp_path / "original", to_original(config, str(tmp_path / "tower"), "vicuna")
    lora.save_peft(tmp_path, trained, {"decoder": CONFIG}, "", original)
    others = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    projector = ("0.weight", "0.bias", "2.weight", "2.bias")
    assert others.keys() == {f"base_model.model.model.mm_projector.{name}" for name in projector}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "vicuna"
    merged = copy.deepcopy(tiny_model)
    lora.merge_peft(merged, folder)
    assert close(logits(merged, prompt), logits(model, prompt))
    read = read_config(folder)
    assert (read.vision, read.projector, read.decoder) == (config.vision, config.projector, config.decoder)
    assert read.image == config.image and not read.layout.grids

    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**files["config.json"]["text_config"]))
    weights = {n: t for n, t in tiny_model.state_dict().items() if n.startswith("decoder.")}
    theirs.load_state_dict({rename(n, "original", to_ours=False): t for n, t in weights.items()})
    theirs = peft.PeftModel.from_pretrained(theirs.float(), folder).eval()
    text = prompt[0][prompt[0] != config.chat.image_token_id]
    with torch.no_grad():
        assert close(model(text), theirs(input_ids=text[None]).logits[0])
        assert not close(tiny_model(text), theirs(input_ids=text[None]).logits[0])


def test_what_the_original_has_no_name_for_is_not_written(tiny_model, tmp_path):
    config = tiny_model.config
    tiles = dataclasses.replace(config, layout=LayoutConfig(grids=((1, 2), (2, 1)), merge="unpad"))
    assert to_original(config, "", "vicuna") is None and to_original(tiles, "tower", "vicuna") is None
    clip = dataclasses.replace(config, vision=VisionConfig())
    assert to_original(clip, "", "vicuna")["mm_vision_tower"] == "openai/clip-vit-large-patch14-336"
    _, trained = learned(tiny_model, "decoder", "vision")
    configs = {"decoder": CONFIG, "vision": CONFIG}
    lora.save_peft(tmp_path, trained, configs, "", to_original(config, "tower", "vicuna"))
    assert not (tmp_path / "original").exists()


def test_other_files_are_refused(tiny_model, tmp_path):
    _, trained = learned(tiny_model, "decoder")
    lora.save_peft(tmp_path, trained, {"decoder": CONFIG}, "vicuna")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(UserError, match=r"is not plain LoRA \(use_dora"):
        lora.merge_peft(copy.deepcopy(tiny_model), tmp_path)
    lora.save_peft(tmp_path, {**trained, "decoder.strange": torch.zeros(1)}, {"decoder": CONFIG}, "vicuna")
    with pytest.raises(UserError, match=r"does not fit this model: decoder\.strange"):
        lora.merge_peft(copy.deepcopy(tiny_model), tmp_path)
