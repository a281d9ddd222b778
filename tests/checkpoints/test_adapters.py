"""PEFT's files, and the original repository's, go in and out."""

import copy
import dataclasses
import json

import pytest
import torch
from helpers import LORA, adapted, close, learn, logits, read_config

from minillava.checkpoints import adapters as peft_files
from minillava.checkpoints import original_llava
from minillava.checkpoints.config_json import write_config
from minillava.checkpoints.names import rename
from minillava.checkpoints.save import save_model
from minillava.config import LayoutConfig, VisionConfig
from minillava.errors import UserError


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
    configs = {"decoder": LORA, "vision": LORA}
    peft_files.save_peft(tmp_path / "adapter", trained, configs, str(tmp_path / "base"))
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
    torch.manual_seed(0)  # of the adapters
    theirs = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.1)
        answer = theirs(input_ids=prompt[0][None], pixel_values=prompt[1]).logits[0]
    theirs.save_pretrained(tmp_path / "adapter")
    model = copy.deepcopy(tiny_model)
    assert not close(logits(model, prompt), answer)
    peft_files.merge_peft(model, tmp_path / "adapter")
    assert close(logits(model, prompt), answer)


def test_the_original_repositorys_files(tiny_model, tmp_path, prompt):
    """haotian-liu/LLaVA's: we read what we write, PEFT puts the adapters on transformers' lone language model, and
    config.json says of tower, projector and decoder what they are."""
    peft = pytest.importorskip("peft")
    import transformers

    model, trained = learned(tiny_model, "decoder")
    config, files = tiny_model.config, write_config(tiny_model.config, "float32")
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(json.dumps(files["config.json"]["vision_config"]))
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(files["preprocessor_config.json"]))
    folder, original = tmp_path / "original", original_llava.write(config, str(tmp_path / "tower"), "vicuna")
    peft_files.save_peft(tmp_path, trained, {"decoder": LORA}, "", original)
    others = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    projector = ("0.weight", "0.bias", "2.weight", "2.bias")
    assert others.keys() == {f"base_model.model.model.mm_projector.{name}" for name in projector}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "vicuna"
    merged = copy.deepcopy(tiny_model)
    peft_files.merge_peft(merged, folder)
    assert close(logits(merged, prompt), logits(model, prompt))
    (folder / "vicuna").mkdir()  # whose tokenizer tells the template
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
    assert original_llava.write(config, "", "vicuna") is None and original_llava.write(tiles, "tower", "vicuna") is None
    clip = dataclasses.replace(config, vision=VisionConfig())
    assert original_llava.write(clip, "", "vicuna")["mm_vision_tower"] == "openai/clip-vit-large-patch14-336"
    _, trained = learned(tiny_model, "decoder", "vision")
    configs = {"decoder": LORA, "vision": LORA}
    peft_files.save_peft(tmp_path, trained, configs, "", original_llava.write(config, "tower", "vicuna"))
    assert not (tmp_path / "original").exists()


def test_other_files_are_refused(tiny_model, tmp_path):
    _, trained = learned(tiny_model, "decoder")
    peft_files.save_peft(tmp_path, trained, {"decoder": LORA}, "vicuna")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(UserError, match="is DoRA's, but has no lora_magnitude_vector"):
        peft_files.merge_peft(copy.deepcopy(tiny_model), tmp_path)
    peft_files.save_peft(tmp_path, {**trained, "decoder.strange": torch.zeros(1)}, {"decoder": LORA}, "vicuna")
    with pytest.raises(UserError, match=r"does not fit this model: decoder\.strange"):
        peft_files.merge_peft(copy.deepcopy(tiny_model), tmp_path)
