"""Files of OneVision-1.5, OneVision-2 and Mage-VL under all their names, and models from their parts."""

import dataclasses
import json

import pytest
import torch
from onevision import DENSE, MOE, TOWER, config, drawn, fill, make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from minillava import LLaVA
from minillava.checkpoints.config_json import write_config
from minillava.checkpoints.names import rename, to_files
from minillava.config import LayoutConfig
from minillava.errors import UserError
from minillava.llava import LLaVAModel
from minillava.media.visual import Media
from minillava.recipe import ModelRecipe
from minillava.training.build import new_config, new_model
from minillava.visual_tokens import Span, patch_positions


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def made(folder, form="", **parts):
    """A tiny model and its folder."""
    return make_model(folder, form, **parts), folder / "saved"


# ---- files ----


def logits(model):
    pictures = [Media(drawn(60, 130)), Media([drawn(60, 60, i) for i in range(3)], True)]
    prompt = model.engine.processor("What happens?<|image_pad|>Is<|video_pad|>this", pictures)
    with torch.no_grad():
        return model.model(torch.tensor(prompt.ids), prompt.pixels_NCHW, spans=prompt.spans)


@pytest.mark.parametrize("decoder", [DENSE, MOE, dataclasses.replace(DENSE, tie_embeddings=True)],
                         ids=["dense", "moe", "tied"])  # fmt: skip
def test_saved_as_vllm_reads_it_and_loaded_to_the_bit(decoder, tmp_path):
    ours, folder = made(
        tmp_path, decoder=decoder, vision=dataclasses.replace(TOWER, final_norm=decoder is MOE, window=0)
    )
    state, raw = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    assert raw["architectures"] == ["LlavaOnevision2ForConditionalGeneration"]
    assert raw["model_type"] == "llava_onevision2" + "_moe" * (decoder is MOE)
    assert raw["vision_config"]["model_type"] == "onevision_encoder" and raw["vision_config"]["frame_windows_size"] == 0
    assert state["model.visual.encoder.layers.0.self_attn.qkv.weight"].shape == (192, 64)
    assert torch.equal(state["model.visual.encoder.layers.1.self_attn.qkv.bias"][64:128],
                       ours.model.vision.blocks[1].attn.k.bias)  # fmt: skip
    assert ("lm_head.weight" in state) != decoder.tie_embeddings
    ours.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert state.keys() == again.keys() and all(torch.equal(t, again[name]) for name, t in state.items())
    assert LLaVA.from_pretrained(tmp_path / "again").config == ours.config


def rewritten(folder, target, change):
    """A copy of a checkpoint with another config.json."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    raw = json.loads((target / "config.json").read_text())
    change(raw)
    (target / "config.json").write_text(json.dumps(raw))
    return target


def test_the_top_level_ties_the_head(tmp_path):
    _, folder = made(tmp_path)
    apart = rewritten(folder, tmp_path / "apart", lambda raw: raw["text_config"].update(tie_word_embeddings=True))
    assert not LLaVA.from_pretrained(apart).config.decoder.tie_embeddings
    tied = rewritten(folder, tmp_path / "tied", lambda raw: raw.update(tie_word_embeddings=True))
    with pytest.raises(UserError, match=r"differs from the embedding, but config.json ties the two"):
        LLaVA.from_pretrained(tied)


def test_the_image_processor_of_the_processors_file_is_checked_and_named(tmp_path):
    _, folder = made(tmp_path)
    pixels = json.loads((folder / "preprocessor_config.json").read_text())
    path = folder / "processor_config.json"
    path.write_text(json.dumps({"image_processor": pixels | {"resample": 2}}))
    with pytest.raises(UserError, match=r"/processor_config\.json: resample 2"):
        LLaVA.from_pretrained(folder)
    path.write_text(json.dumps({"image_processor": "x"}))
    assert LLaVA.from_pretrained(folder).config.image.fit == "native"


def test_mage_vl_is_the_same_under_other_names(tmp_path):
    """Names of microsoft/Mage-VL, as vLLM and mlx-vlm read them; its gate for streams is a file that is not read."""
    ours, folder = made(tmp_path)

    def rename(raw):
        raw.update(model_type="mage_vl", architectures=["MageVLForConditionalGeneration"])
        raw["vision_config"].update(model_type="mage_vl_vision", use_patch_position_encoding=False)
        del raw["minillava"]

    mage = rewritten(folder, tmp_path / "mage", rename)
    (mage / "model.safetensors").rename(mage / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(mage / "model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors")
    (mage / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    save_file({"gate.weight": torch.zeros(2)}, mage / "streammind_gate.safetensors")
    theirs = LLaVA.from_pretrained(mage, dtype="float32")
    assert theirs.config.vision == ours.config.vision and theirs.config.layout == ours.config.layout
    assert torch.equal(logits(theirs), logits(ours))
    rewritten(mage, tmp_path / "places", lambda raw: raw["vision_config"].update(use_patch_position_encoding=True))
    with pytest.raises(UserError, match="use_patch_position_encoding true is not supported"):
        LLaVA.from_pretrained(tmp_path / "places")


def test_onevision_15_as_transformers_names_it(tmp_path):
    """huggingface/transformers 48896, state of September 2026: the class token and its angles are embeddings there."""
    rice = dataclasses.replace(
        TOWER, class_token=True, rotary_shares=(0, 1, 1), rotary_pairs=False, norm_eps=1e-5, window=1
    )
    plain, folder = made(tmp_path / "plain", vision=rice, layout=LayoutConfig())
    native, theirs = made(tmp_path / "native", form="onevision_1_5_native", vision=rice, layout=LayoutConfig())
    state, raw = load_file(theirs / "model.safetensors"), json.loads((theirs / "config.json").read_text())
    assert raw["model_type"] == "llava_onevision1_5" and raw["text_config"]["model_type"] == "qwen3"
    assert raw["vision_config"]["model_type"] == "llava_onevision1_5_vision"
    assert raw["vision_config"]["out_hidden_size"] == 32 and "temporal_patch_size" not in raw["vision_config"]
    assert state["model.visual.class_embedding.weight"].shape == (1, 64)
    assert state["model.visual.class_pos_emb.weight"].shape == (1, 16)
    assert "model.language_model.embed_tokens.weight" in state and "model.visual.merger.mlp.2.bias" in state
    assert torch.equal(logits(native), logits(plain))
    native.save_pretrained(tmp_path / "back")
    ours, back = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert ours.keys() == back.keys() and all(torch.equal(t, back[name]) for name, t in ours.items())
    with pytest.raises(UserError, match="llava_onevision1_5 has a tower of type rice_vit"):
        made(tmp_path / "two")[0].save_pretrained(tmp_path / "other", "onevision_1_5_native")
    with pytest.raises(UserError, match=r"no format 'onevision_1_5_nativ' .*did you mean"):
        native.save_pretrained(tmp_path / "other", "onevision_1_5_nativ")


# ---- from parts ----


def save_part(folder, tensors, config):
    folder.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def qwen3(tokenizer, folder):
    """A language model on its own that ties its head."""
    made = fill(LLaVAModel(config(dataclasses.replace(DENSE, vocab_size=tokenizer.vocab_size, tie_embeddings=True))))
    tensors = {
        rename(n, "original", to_ours=False): t for n, t in made.state_dict().items() if n.startswith("decoder.")
    }
    text = write_config(made.config, "float32")["config.json"]["text_config"]
    save_part(folder, tensors, text | {"tie_word_embeddings": True})
    tokenizer.save(folder)
    return folder


def stage_0(tower, decoder, tokenizer, **tables):
    chat = {"template": "onevision_1_5", "split_at_image": False, "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>"}  # fmt: skip
    tables |= {"decoder": {"tie_embeddings": False}, "chat": chat}
    wanted = ModelRecipe(vision_from=str(tower), decoder_from=str(decoder), **tables)
    made = new_config(wanted, tokenizer)
    return new_model(wanted, made, seed=0).float().eval()


def test_onevision_15_from_its_parts(tokenizer, tmp_path):
    """RICE as the hub has it, an MLCDVisionModel of transformers, and Qwen3 with a head of its own, which
    ds/merge_model.py puts together; the features are those of MLCD."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, patch_size=14)
    rice = transformers.MLCDVisionConfig(**sizes, image_size=56, hidden_act="gelu", num_key_value_groups=1)
    theirs = fill(transformers.MLCDVisionModel(rice))
    theirs.save_pretrained(tmp_path / "rice")
    made = stage_0(tmp_path / "rice", qwen3(tokenizer, tmp_path / "qwen3"), tokenizer)
    assert made.config.image.fit == "native" and made.config.image.max_pixels == 2_560_000
    assert (made.config.chat.image_token_id, made.config.chat.video_token_id) == (5, 6)
    assert torch.equal(made.decoder.head.weight, made.decoder.embed.weight) and made.projector.config.merge == 2
    pixels_CHW = torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(4))
    span = Span(4, 16, height=4, width=4, native=True, times=(0,))
    at_P3 = patch_positions(span, 2)
    patches = torch.stack([pixels_CHW[:, 14 * r : 14 * r + 14, 14 * c : 14 * c + 14] for _, r, c in at_P3.tolist()])
    with torch.no_grad():
        found_PD = made.vision(patches, at_P3, [16])[:, 0]
        expected_PD = theirs(pixels_CHW[None], output_hidden_states=True).hidden_states[-1][0, 1:]
    order = at_P3 @ torch.tensor([0, 4, 1])
    assert (found_PD - expected_PD[order]).abs().max() < 1e-4 * expected_PD.abs().max()
    LLaVA(made, tokenizer).save_pretrained(tmp_path / "stage0")
    assert LLaVA.from_pretrained(tmp_path / "stage0").config.vision == made.config.vision


def test_rice_under_its_own_names(tokenizer, tmp_path):
    """As the tower of a whole OneVision-1.5 is called, q, k and v joined."""
    rice = dataclasses.replace(
        TOWER, class_token=True, rotary_shares=(0, 1, 1), rotary_pairs=False, norm_eps=1e-5, window=1
    )
    vision = fill(LLaVAModel(config(dataclasses.replace(DENSE, vocab_size=8), rice)).vision)
    tensors = to_files({f"vision.{name}": t for name, t in vision.state_dict().items()}, "tower/rice_vit")
    assert tensors["blocks.1.attn.qkv.weight"].shape == (192, 64) and "class_pos_emb" in tensors
    sizes = dict(model_type="rice_vit", depth=2, hidden_size=64, intermediate_size=96, num_heads=2)
    tower = save_part(tmp_path / "rice", tensors, sizes)
    made = stage_0(tower, qwen3(tokenizer, tmp_path / "qwen3"), tokenizer)
    assert made.config.vision == rice
    assert all(torch.equal(t, made.vision.state_dict()[name]) for name, t in vision.state_dict().items())


def test_onevision_2_from_its_parts(tokenizer, tmp_path):
    """OneVision-Encoder on its own, with q, k and v apart, its end and a head that no whole model has; merge 3."""
    vision = fill(LLaVAModel(config(dataclasses.replace(DENSE, vocab_size=8)))).vision
    layout = "tower/onevision_encoder"
    tensors = {rename(f"vision.{n}", layout, to_ours=False): t for n, t in vision.state_dict().items()}
    assert "encoder.layers.1.self_attn.q_proj.weight" in tensors and "layernorm_pre.bias" in tensors
    tensors |= {"layernorm_post.weight": torch.ones(64), "layernorm_post.bias": torch.zeros(64)}
    tensors |= {"head.probe": torch.zeros(1, 1, 64), "video_rope.inv_freq_t": torch.zeros(4)}
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, patch_size=14)
    alone = dict(model_type="onevision_encoder", image_size=448, hidden_act="gelu", layer_norm_eps=1e-6)
    tower = save_part(tmp_path / "encoder", tensors, sizes | alone | {"use_head": True})
    made = stage_0(tower, qwen3(tokenizer, tmp_path / "qwen3"), tokenizer, projector={"merge": 3})
    assert made.config.vision == TOWER and made.config.image.max_pixels == 4_000_000
    assert all(torch.equal(t, made.vision.state_dict()[name]) for name, t in vision.state_dict().items())
    assert made.projector.linears[0].weight.shape == (576, 576) and made.projector.norm.eps == 1e-6
    LLaVA(made, tokenizer).save_pretrained(tmp_path / "stage0")
    saved = LLaVA.from_pretrained(tmp_path / "stage0")
    assert saved.config.projector.merge == 3 and not saved.config.decoder.tie_embeddings
    assert json.loads((tmp_path / "stage0/config.json").read_text())["vision_config"]["spatial_merge_size"] == 3
