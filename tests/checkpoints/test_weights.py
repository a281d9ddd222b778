"""Checkpoints: tiny models made by transformers, re-keyed to every layout, loaded here, saved here, loaded there."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import REAL, encode, load_model, pieces, read_config
from safetensors.torch import load_file, save_file

from minillava.chat.messages import Message
from minillava.chat.templates import TEMPLATES
from minillava.chat.tokenizer import load_tokenizer
from minillava.checkpoints.chat_files import jinja_of
from minillava.checkpoints.checkpoint import Checkpoint
from minillava.checkpoints.config_parts import read_decoder, read_vision
from minillava.checkpoints.gguf_vocab import read_vocabulary
from minillava.checkpoints.names import LAYOUTS, kinds, rename
from minillava.checkpoints.save import save_model
from minillava.checkpoints.tensor_files import inspect_folder
from minillava.checkpoints.tokenizer_files import write_tokenizer_json
from minillava.cli import run_command
from minillava.config import ChatConfig
from minillava.errors import UserError
from minillava.synthetic.train_tokenizer import train_small_tokenizer

transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
DECODERS = {
    "llama": dict(max_position_embeddings=128, rms_norm_eps=1e-5),
    "llama_gqa": dict(num_key_value_heads=2, rope_theta=5e5, head_dim=16),
    "mistral": dict(num_key_value_heads=2, sliding_window=None, rope_theta=1e6),
    "qwen2_tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": dict(num_key_value_heads=2, head_dim=16),
}
TREES = {  # the prefixes of the four module trees that have been on the hub: vision, projector, decoder, head
    "hf": ("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head."),
    "hf_old": (
        "vision_tower.vision_model.",
        "multi_modal_projector.",
        "language_model.model.",
        "language_model.lm_head.",
    ),
    "hf_new": ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head."),
    "hf_4.52": (
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
        "model.language_model.",
        "lm_head.",
    ),
    "original": ("model.vision_tower.vision_tower.vision_model.", "model.mm_projector.", "model.", "lm_head."),
}
CHAT = "{% for m in messages %}{{ m['role'].upper() }}: {{ m['content'] }} {% endfor %}ASSISTANT:"


def _model(decoder: str = "llama_gqa", tower: str = "clip", **fields):
    kind = decoder.split("_")[0]
    text = transformers.AutoConfig.for_model(kind, **SMALL | DECODERS[decoder])
    sizes = dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, image_size=30, patch_size=14
    )
    vision = transformers.AutoConfig.for_model(f"{tower}_vision_model", **sizes)
    full = {"vision_feature_select_strategy": "full"} if tower == "siglip" else {}
    if tower == "siglip":
        vision.vision_use_head = False
    torch.manual_seed(0)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, **full | fields)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for p in model.parameters():  # norms and biases too: ones and zeros would hide a mix-up
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_small_tokenizer(["USER: what is this? ASSISTANT: a red circle"] * 3, folder, vocab_size=300)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_folder) -> Path:
    """A LLaVA as transformers saves it, with its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    _model().save_pretrained(folder)
    _processor(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint without its weights."""
    return _copy(checkpoint, tmp_path / "m", weights=False)


@pytest.fixture
def tensors(checkpoint) -> dict:
    """The checkpoint's weights."""
    return load_file(checkpoint / "model.safetensors")


def _processor(tokenizer_folder: Path, **pixels):
    sizes = dict(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}) | pixels
    return transformers.LlavaProcessor(
        image_processor=transformers.LlavaImageProcessorPil(**sizes),
        tokenizer=transformers.AutoTokenizer.from_pretrained(tokenizer_folder),
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT,
    )  # fmt: skip


def _copy(source: Path, target: Path, weights: bool = True) -> Path:
    ignore = shutil.ignore_patterns() if weights else shutil.ignore_patterns("model*.safetensors*")
    shutil.copytree(source, target, ignore=ignore)
    return target


def _rekeyed(tensors: dict, tree: str) -> dict:
    """What transformers writes today, under the names of another tree."""
    indices = {"linear_1": "0", "linear_2": "2"} if tree == "original" else {}
    result = {}
    for name, tensor in tensors.items():
        for old, new in zip(TREES["hf"], TREES[tree]):
            if name.startswith(old):
                rest = name.removeprefix(old)
                head, _, tail = rest.partition(".")
                result[new + (f"{indices[head]}.{tail}" if head in indices else rest)] = tensor
    assert len(result) == len(tensors)
    return result


def _edit(folder: Path, file: str = "config.json", drop=(), **values) -> None:
    config = json.loads((folder / file).read_text())
    config = {k: v for k, v in (config | values).items() if k not in drop}
    (folder / file).write_text(json.dumps(config))


def _assert_same(model, tensors: dict) -> None:
    """`model` holds every tensor of a transformers state, once and to the bit, and nothing else."""
    state = model.state_dict()
    named = {rename(k, "hf", True): t for k, t in tensors.items()}
    assert named.keys() == state.keys() and len(named) == len(tensors)
    for name, tensor in named.items():
        assert torch.equal(state[name], tensor), name
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])


# ---- reading ----


@pytest.mark.parametrize("tree", [t for t in TREES if t != "original"])
def test_every_hf_tree_loads(folder, tensors, tree):
    save_file(_rekeyed(tensors, tree), folder / "model.safetensors")
    _assert_same(load_model(folder), tensors)


UNUSUAL = dict(
    multimodal_projector_bias=False, vision_feature_layer=[1, -1], vision_feature_select_strategy="full",
    projector_hidden_act="gelu_pytorch_tanh",
)  # fmt: skip


@pytest.mark.parametrize(
    ("decoder", "tower", "fields"),
    [*((d, "clip", {}) for d in DECODERS), ("llama", "siglip", {}), ("llama", "clip", UNUSUAL)],
    ids=[*DECODERS, "siglip", "unusual"],
)
def test_round_trip_with_transformers(checkpoint, tmp_path, decoder, tower, fields):
    """transformers -> here -> transformers: same tensors, none missing, none unexpected, same logits to the bit."""
    theirs = _model(decoder, tower, **fields)
    folder = _copy(checkpoint, tmp_path / "in", weights=False)
    theirs.save_pretrained(folder)
    ours = load_model(folder)
    _assert_same(ours, load_file(folder / "model.safetensors"))
    save_model(ours, tmp_path / "out", load_tokenizer(folder))
    assert load_model(tmp_path / "out").config == ours.config

    back, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    for (name, a), (other, b) in zip(theirs.state_dict().items(), back.state_dict().items()):
        assert name == other and torch.equal(a, b), name
    vision = ours.config.vision
    image_tokens = vision.num_patches + vision.keep_class_token
    ids = torch.tensor([[1] + [3] * image_tokens + [7, 8, 9]])
    inputs = dict(input_ids=ids, pixel_values=torch.randn(1, 3, 30, 30))
    with torch.no_grad():
        wanted = theirs(**inputs).logits
        assert torch.equal(wanted, back(**inputs).logits)
        assert torch.allclose(wanted[0], ours(ids, inputs["pixel_values"]), atol=1e-4 * wanted.abs().max())


def _stripped(config) -> dict:
    """A sub-config as old hub files hold it: without what equals the class default."""
    default = type(config)().to_dict()
    return {k: v for k, v in config.to_dict().items() if k == "model_type" or v != default.get(k)}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("changes", [{}, {"num_attention_heads": 64}, {"hidden_size": 2048, "num_key_value_heads": 4}])
def test_omitted_decoder_fields_are_the_class_defaults(kind, changes):
    config = transformers.AutoConfig.for_model(kind, **changes)
    full, stripped = (read_decoder(values, "text_config") for values in (config.to_dict(), _stripped(config)))
    assert full == stripped
    assert read_decoder({"model_type": kind, **changes}, "text_config") == full


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_omitted_tower_fields_are_the_class_defaults(kind):
    config = transformers.AutoConfig.for_model(kind, num_hidden_layers=5)
    full, stripped = (read_vision(v, "vision_config", -2, False) for v in (config.to_dict(), _stripped(config)))
    assert full == stripped and full.num_layers == 5


def test_absent_sub_configs_are_llava_15(folder):
    """The smallest config.json of the hub: LlavaConfig's own defaults."""
    (folder / "config.json").write_text('{"model_type": "llava", "text_config": {"max_position_embeddings": 4096}}')
    _edit(folder, "processor_config.json", drop=["image_processor"])
    pixels = {"size": 336, "crop_size": 336, "image_processor_type": "CLIPImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    config = read_config(folder)
    theirs = transformers.LlavaConfig()
    assert config.vision == read_vision(theirs.vision_config.to_dict(), "", -2, False)
    assert config.vision.num_patches == 576 and config.decoder.num_layers == 32
    assert config.image.fit == "crop" and config.chat.image_token_id == theirs.image_token_index


def test_old_and_new_spellings_agree(checkpoint, folder):
    new = read_config(checkpoint)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    _edit(folder, text_config=text | {"rope_scaling": None}, image_token_id=config["image_token_index"],
          drop=["image_token_index"])  # fmt: skip
    processor = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(processor.pop("image_processor")))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").rename(folder / "was.jinja")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    assert read_config(folder) == new
    (folder / "chat_template.json").unlink()
    _edit(folder, "tokenizer_config.json", chat_template=[{"name": "default", "template": CHAT}])
    assert read_config(folder) == new and new.chat.jinja == CHAT and new.decoder.rope_theta == 5e5


def test_the_config_is_read_without_the_vocabulary(folder):
    """Which has up to 20 MB, where the small files tell its special tokens; and with it to the same."""
    whole = read_config(folder).chat
    known = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    assert whole.eos_ids[-1] in [token["id"] for token in known]
    decoder = {str(token["id"]): {"content": token["content"]} for token in known}
    _edit(folder, "tokenizer_config.json", added_tokens_decoder=decoder)
    (folder / "tokenizer.json").write_text("not read")
    assert read_config(folder).chat == whole


def test_sliding_window_bounds_the_context():
    """Inside its window attention is full, so a model with a window is exact up to there."""
    assert read_decoder({"model_type": "mistral"}, "").max_positions == 4096
    assert read_decoder({"model_type": "mistral", "sliding_window": None}, "").max_positions == 131072
    assert read_decoder({"model_type": "qwen2", "sliding_window": 9}, "").max_positions == 32768


@pytest.mark.parametrize(
    "pixels", [{}, {"do_pad": True}, {"size": {"height": 30, "width": 30}, "do_center_crop": False}]
)
def test_processor_reads_back_in_transformers(checkpoint, tokenizer_folder, tmp_path, pixels):
    """Pixels and ids of the processor that loads from our save are those of the one that was read."""
    from PIL import Image

    folder = _copy(checkpoint, tmp_path / "in")
    theirs = _processor(tokenizer_folder, **pixels)
    theirs.save_pretrained(folder)
    ours = load_model(folder)
    assert ours.config.image.fit == ("pad" if "do_pad" in pixels else "squash" if pixels else "crop")
    save_model(ours, tmp_path / "out", load_tokenizer(folder))
    back = transformers.AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")  # torchvision rounds otherwise
    picture = Image.effect_noise((61, 40), 90).convert("RGB")
    a, b = (p(images=picture, text="USER: <image>\nwhat?", return_tensors="pt") for p in (theirs, back))
    assert torch.equal(a["pixel_values"], b["pixel_values"]) and torch.equal(a["input_ids"], b["input_ids"])
    assert back.chat_template == CHAT
    assert read_config(tmp_path / "out") == ours.config


@pytest.mark.parametrize("kind", ["safetensors", "bin", "legacy_bin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_files_single_and_sharded(folder, tensors, kind, sharded):
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names = list(tensors)
    parts = [names[::2], names[1::2]] if sharded else [names]
    files = [f"{stem}-{i}-of-2.{suffix}" if sharded else f"{stem}.{suffix}" for i in range(len(parts))]
    for file, part in zip(files, parts):
        shard = {name: tensors[name] for name in part}
        if kind == "safetensors":
            save_file(shard, folder / file)
        else:
            torch.save(shard, folder / file, _use_new_zipfile_serialization=kind == "bin")
    if sharded:
        index = {"weight_map": {name: file for file, part in zip(files, parts) for name in part}}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    _assert_same(load_model(folder), tensors)


def test_our_shards_load_everywhere(checkpoint, tensors, tmp_path):
    model = load_model(checkpoint)
    save_model(model, tmp_path / "out", load_tokenizer(checkpoint), shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    _assert_same(load_model(tmp_path / "out"), tensors)
    _, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info


def test_dtype_is_the_files_or_the_one_asked_for(checkpoint, tensors, tmp_path):
    assert {p.dtype for p in load_model(checkpoint).parameters()} == {torch.float32}
    half = load_model(checkpoint, torch.bfloat16)
    _assert_same(half, {k: t.bfloat16() for k, t in tensors.items()})
    save_model(half, tmp_path / "out")
    assert {s.dtype for s in inspect_folder(tmp_path / "out").values()} == {"BF16"}
    assert {p.dtype for p in load_model(tmp_path / "out").parameters()} == {torch.bfloat16}
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16


def test_known_extras_are_passed_over_and_nothing_else(folder, tensors):
    buffers = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(5),
    }
    save_file(tensors | buffers, folder / "model.safetensors")
    _assert_same(load_model(folder), tensors)
    save_file(tensors | {"vision_tower.embeddings.position_id": torch.arange(5)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"extra: vision_tower\.embeddings\.position_id$"):
        load_model(folder)


def test_unused_post_layernorm_may_be_absent(folder, tensors):
    kept = {k: t for k, t in tensors.items() if "post_layernorm" not in k}
    save_file(kept, folder / "model.safetensors")
    model = load_model(folder)
    filled = {"vision_tower.post_layernorm.weight": torch.ones(24), "vision_tower.post_layernorm.bias": torch.zeros(24)}
    _assert_same(model, kept | filled)


def test_tied_head_may_be_stored_if_it_is_the_embedding(folder):
    _model("qwen2_tied").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["language_model.model.embed_tokens.weight"].clone()
    save_file(tensors | {"language_model.lm_head.weight": head}, folder / "model.safetensors")
    _assert_same(load_model(folder), tensors)
    head[0, 0] += 1
    save_file(tensors | {"language_model.lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding"):
        load_model(folder)


def test_tables_are_one_to_one(checkpoint):
    """Every name of ours has one foreign name in a layout, and comes back from it."""
    names = list(load_model(checkpoint).state_dict())
    for layout in (*kinds("hf", "hf_new", "original"), "tower"):
        foreign = {rename(n, layout, to_ours=False): n for n in names if layout != "tower" or n.startswith("vision.")}
        assert all(rename(f, layout, to_ours=True) == n for f, n in foreign.items())
        assert len(foreign) == (sum(n.startswith("vision.") for n in names) if layout == "tower" else len(names))


def spelled(template, choice):
    """A name of a table's row, with the n-th of every choice."""
    parts = [part.split("|") for part in re.findall(r"<(.*?)>", template)]
    values = iter({"n": "7", "p": ("weight", "bias")[choice % 2]}.get(p[0], p[choice % len(p)]) for p in parts)
    return re.sub("<.*?>", lambda _: next(values), template)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_of_every_table_goes_there_and_back(layout):
    """With what some writers leave out and without; no two rows are one name on either side."""
    for theirs, ours in LAYOUTS[layout]:
        for choice in range(4):
            name = spelled(ours, choice).replace("[", "").replace("]", "")
            for foreign in (
                spelled(re.sub(r"\[.*?\]", "", theirs), choice),
                spelled(re.sub(r"[\[\]]", "", theirs), choice),
            ):
                assert rename(foreign, layout, to_ours=True) == name
            assert rename(rename(name, layout, to_ours=False), layout, to_ours=True) == name
    known = [row for side in zip(*LAYOUTS[layout]) for row in {*side}]
    assert len(known) == 2 * len(LAYOUTS[layout])


# ---- the original layout ----


def _original(checkpoint: Path, folder: Path, tower: str | None = "tower", inside: bool = False, **fields) -> dict:
    """The checkpoint in the layout of the original code, its tower in a folder of its own. Returns the tensors."""
    tensors = _rekeyed(load_file(checkpoint / "model.safetensors"), "original")
    config = json.loads((checkpoint / "config.json").read_text())
    mm = dict(
        model_type="llava_llama", mm_vision_tower=tower, mm_vision_select_layer=-2, mm_vision_select_feature="patch",
        mm_projector_type="mlp2x_gelu", mm_hidden_size=24, image_aspect_ratio="pad", mm_use_im_start_end=False,
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config["text_config"] | mm | fields))
    vision = {k: t for k, t in tensors.items() if "vision_tower" in k}
    save_file({k: t for k, t in tensors.items() if inside or k not in vision}, folder / "model.safetensors")
    if tower is not None:
        (folder / tower).mkdir()
        (folder / tower / "config.json").write_text(json.dumps(config["vision_config"]))
        stripped = {k.removeprefix("model.vision_tower.vision_tower."): t for k, t in vision.items()}
        save_file(stripped, folder / tower / "model.safetensors")
    return tensors


def test_original_layout_with_tower_folder(checkpoint, tensors, tmp_path):
    _original(checkpoint, tmp_path / "m")
    model = load_model(tmp_path / "m")
    _assert_same(model, tensors)
    c = model.config
    assert (c.image.fit, c.chat.template, c.chat.image_token_id) == ("pad", "vicuna_v1", -200) and c.chat.split_at_image
    assert c.vision == read_config(checkpoint).vision and c.decoder == read_config(checkpoint).decoder


def test_original_layout_with_tower_elsewhere(checkpoint, tmp_path, monkeypatch):
    """An absolute path, and a whole CLIP (both towers in one .bin) as openai's repositories hold it."""
    _original(checkpoint, tmp_path / "m")
    text = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
    )
    vision = transformers.CLIPVisionConfig(**json.loads((tmp_path / "m/tower/config.json").read_text()))
    torch.manual_seed(5)
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    clip.save_pretrained(tmp_path / "clip")
    tensors = load_file(tmp_path / "clip/model.safetensors")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(5)
    torch.save(tensors, tmp_path / "clip/pytorch_model.bin")
    (tmp_path / "clip/model.safetensors").unlink()
    _edit(tmp_path / "m", mm_vision_tower=str(tmp_path / "clip"))
    state = load_model(tmp_path / "m").state_dict()
    wanted = {k: t for k, t in tensors.items() if k.startswith("vision_model.") and "position_ids" not in k}
    assert all(torch.equal(state[rename(k, "tower", True)], t) for k, t in wanted.items())
    assert len(wanted) == sum(k.startswith("vision.") for k in state)


def test_tower_inside_the_checkpoint_wins(checkpoint, tensors, tmp_path):
    _original(checkpoint, tmp_path / "m", inside=True)
    save_file({"other": torch.zeros(1)}, tmp_path / "m/tower/model.safetensors")  # not even looked at
    _assert_same(load_model(tmp_path / "m"), tensors)


def test_missing_tower_says_where_it_looked(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _original(checkpoint, tmp_path / "m")
    shutil.rmtree(tmp_path / "m/tower")
    with pytest.raises(UserError, match=rf"vision tower.*{re.escape(str(tmp_path / 'm' / 'tower'))}"):
        load_model(tmp_path / "m")
    (tmp_path / "m/tower").mkdir()
    (tmp_path / "m/tower/config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(UserError, match=r"tower/config\.json.*'llava' is not supported"):
        load_model(tmp_path / "m")
    (tmp_path / "m/tower/config.json").write_text("{}")
    with pytest.raises(UserError, match="tower: no weights"):
        load_model(tmp_path / "m")


def _v1(checkpoint: Path, folder: Path, **fields) -> dict:
    """LLaVA v1: one linear layer, no mm_projector_type, the odd ids of its day. Returns its own-named projector."""
    tensors = _original(checkpoint, folder, **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1} | fields)
    _edit(folder, drop=["mm_projector_type", "image_aspect_ratio"], model_type="llava")
    kept = {k: t for k, t in tensors.items() if "vision_tower" not in k and "mm_projector.2" not in k}
    renamed = {k.replace("mm_projector.0.", "mm_projector."): t for k, t in kept.items()}
    save_file(renamed, folder / "model.safetensors")
    return renamed


def test_llava_v1_loads_and_survives_its_save(checkpoint, tmp_path):
    tensors = _v1(checkpoint, tmp_path / "m", mm_use_im_start_end=True)
    model = load_model(tmp_path / "m")
    c = model.config
    assert (c.projector.layers, c.image.fit, c.chat.template, c.chat.image_start_end) == (1, "crop", "llava_v1", True)
    assert (c.chat.bos_id, c.chat.eos_ids, c.chat.pad_id) == (1, (2,), None)
    assert torch.equal(model.projector.linears[0].weight, tensors["model.mm_projector.weight"])
    save_model(model, tmp_path / "out")
    back = load_model(tmp_path / "out")
    assert back.config.projector == c.projector and back.config.image == c.image and back.config.chat == c.chat
    assert all(torch.equal(t, back.state_dict()[k]) for k, t in model.state_dict().items())
    with pytest.raises(ValueError, match="minillava"):  # never a second layer of random numbers
        transformers.AutoConfig.from_pretrained(tmp_path / "out")


def test_template_of_an_original_checkpoint_can_be_stated(checkpoint, tmp_path):
    chat = {"template": "llava_v0", "stop_strings": ["###"]}
    _v1(checkpoint, tmp_path / "m", minillava={"chat": chat})
    config = read_config(tmp_path / "m").chat
    assert config.template == "llava_v0" and config.stop_strings == ("###",)
    _edit(tmp_path / "m", minillava={"chat": {"tempalte": "llava_v0"}})
    with pytest.raises(UserError, match="did you mean 'template'"):
        read_config(tmp_path / "m")


@pytest.mark.parametrize("with_embeddings", [False, True])
@pytest.mark.parametrize("how", ["beside", "argument", "config"])
def test_projector_file_over_a_base(checkpoint, tmp_path, how, with_embeddings):
    """Stage 1 of the original code leaves mm_projector.bin; the language model lies beside it, or elsewhere."""
    tensors = _original(checkpoint, tmp_path / "m")
    projector = {k: t for k, t in tensors.items() if "mm_projector" in k}
    embed = "model.embed_tokens.weight"
    base = tmp_path / "m" if how == "beside" else tmp_path / "base"
    base.mkdir(exist_ok=True)
    (tmp_path / "m/model.safetensors").unlink()
    language = {k: t for k, t in tensors.items() if k not in projector and "vision_tower" not in k}
    if with_embeddings:
        projector[embed] = language[embed].clone()
        language[embed] = language[embed] + 1
    save_file(language, base / "model.safetensors")
    torch.save(projector, tmp_path / "m/mm_projector.bin")
    if how == "config":
        _edit(tmp_path / "m", _name_or_path=str(base))
    _assert_same(
        load_model(tmp_path / "m", base=base if how == "argument" else None),
        load_file(checkpoint / "model.safetensors"),
    )
    (base / "tokenizer.json").write_text('{"added_tokens": [{"id": 7, "content": "<|im_start|>"}]}')
    opened = Checkpoint.open(tmp_path / "m", base if how == "argument" else None)
    assert opened.config.chat.template == "chatml_direct"  # told by the base's tokenizer
    shutil.copy(checkpoint / "tokenizer.json", base)
    assert opened.tokenizer().vocab_size
    if how == "argument":
        with pytest.raises(UserError, match="holds a projector only"):
            load_model(tmp_path / "m")


def test_stage_1_projector_beside_a_full_model_is_superseded(checkpoint, tmp_path):
    tensors = _original(checkpoint, tmp_path / "m")
    torch.save({k: t + 1 for k, t in tensors.items() if "mm_projector" in k}, tmp_path / "m/mm_projector.bin")
    _assert_same(load_model(tmp_path / "m"), load_file(checkpoint / "model.safetensors"))


def test_delta_is_added_to_its_base(checkpoint, tmp_path):
    """target = delta + base in float16, over the rows that the base has; the projector is not a difference."""
    half = {k: t.half() for k, t in _original(checkpoint, tmp_path / "m").items() if "vision_tower" not in k}
    save_file(half, tmp_path / "m/model.safetensors")
    language = {k: t for k, t in half.items() if "mm_projector" not in k}
    (tmp_path / "base").mkdir()
    rows = ("model.embed_tokens.weight", "lm_head.weight")
    base = {k: (torch.randn_like(t.float()).half())[: 317 if k in rows else None] for k, t in language.items()}
    save_file({k: t.contiguous() for k, t in base.items()}, tmp_path / "base/model.safetensors")
    state = load_model(tmp_path / "m", base=tmp_path / "base", dtype=torch.float32).state_dict()
    for name, delta in half.items():
        wanted = delta.clone()
        if name in base:
            wanted[: len(base[name])] += base[name]
        assert torch.equal(state[rename(name, "original", True)], wanted.float()), name
    save_file({k: t for k, t in base.items() if "norm" not in k or "layers" in k}, tmp_path / "base/model.safetensors")
    with pytest.raises(UserError, match=r"base: .*missing: model\.norm\.weight$"):
        load_model(tmp_path / "m", base=tmp_path / "base")
    with pytest.raises(UserError, match="complete in itself"):
        load_model(checkpoint, base=tmp_path / "base")


def _lora(checkpoint: Path, folder: Path, **config) -> dict:
    """A LoRA folder as original LLaVA writes it, over a language model with a tokenizer in folder/base; all tensors."""
    tensors = _original(checkpoint, folder)
    (folder / "model.safetensors").unlink()
    (folder / "base").mkdir()
    language = {k: t for k, t in tensors.items() if "vision_tower" not in k and "mm_projector" not in k}
    save_file(language, folder / "base/model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, folder / "base" / name)
    whole = {f"base_model.model.{k}": t for k, t in tensors.items() if "mm_projector" in k}
    torch.save(whole, folder / "non_lora_trainables.bin")
    adapters = {}
    for name, weight in language.items():
        if "layers" in name and weight.ndim == 2:
            out, inside = weight.shape
            module = f"base_model.model.{name.removesuffix('.weight')}"
            adapters |= {
                f"{module}.lora_A.weight": torch.randn(4, inside),
                f"{module}.lora_B.weight": torch.randn(out, 4),
            }
    torch.save(adapters, folder / "adapter_model.bin")
    said = dict(peft_type="LORA", r=4, lora_alpha=8, bias="none", base_model_name_or_path="base") | config
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return tensors | adapters


@pytest.mark.parametrize(
    ("config", "scale"), [({}, 2.0), ({"use_rslora": True}, 4.0), ({"alpha_pattern": {"mlp.up_proj": 2}}, None)]
)
def test_lora_folder_is_merged_into_its_base(checkpoint, tmp_path, config, scale):
    """W + alpha / r * B A in float32, the projector from non_lora_trainables, the tower from its folder."""
    tensors = _lora(checkpoint, tmp_path / "m", **config)
    state = load_model(tmp_path / "m", torch.float32).state_dict()
    for name in (n for n in tensors if "lora" not in n):
        wanted, module = tensors[name], f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in tensors:
            s = scale or (0.5 if "mlp.up_proj" in name else 2.0)
            wanted = wanted + s * (tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"])
        assert torch.equal(state[rename(name, "original", True)], wanted), name
    from minillava import LLaVA

    (tmp_path / "m/base/generation_config.json").write_text('{"num_beams": 4}')
    shutil.copytree(tmp_path / "m", tmp_path / "bare", ignore=shutil.ignore_patterns("config.json"))
    assert "num_beams 4" in Checkpoint.open(tmp_path / "bare").notes[0]
    assert LLaVA.from_pretrained(tmp_path / "m").tokenizer.vocab_size  # the base's
    (tmp_path / "m/base").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"the base \(base_model_name_or_path\) is not in"):
        load_model(tmp_path / "m")
    again = load_model(tmp_path / "m", torch.float32, base=tmp_path / "elsewhere").state_dict()
    assert all(torch.equal(t, again[name]) for name, t in state.items())


def test_what_is_no_plain_lora_is_refused(checkpoint, tmp_path):
    _lora(checkpoint, tmp_path / "m")
    adapters = torch.load(tmp_path / "m/adapter_model.bin", weights_only=True)
    name = next(n for n in adapters if "lora_A" in n)
    for changed, message in (
        ({k: t for k, t in adapters.items() if k != name}, "has no partner"),
        (adapters | {name: adapters[name][:, :-1].clone()}, "do not fit decoder.blocks.0"),
        (adapters | {"base_model.model.model.visual.x": torch.ones(1)}, "extra: model.visual.x"),
    ):
        torch.save(changed, tmp_path / "m/adapter_model.bin")
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / "m")
    _edit(tmp_path / "m", "adapter_config.json", init_lora_weights="pissa")
    with pytest.raises(UserError, match="is not plain LoRA: init_lora_weights 'pissa'"):
        load_model(tmp_path / "m")


# ---- bad input ----


def test_everything_that_does_not_fit_is_listed_in_one_line(folder, tensors):
    for i in range(3):
        del tensors[f"language_model.model.layers.{i}.mlp.up_proj.weight"]
    del tensors["vision_tower.embeddings.class_embedding"]
    tensors["model.image_newline"] = torch.zeros(4)
    tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(7, 24)
    tensors["vision_tower.vision_model.pre_layrnorm.bias"] = torch.zeros(24)
    tensors["language_model.model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_model(folder)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(folder))
    for part in (
        "missing: language_model.model.layers.{0-2}.mlp.up_proj.weight, vision_tower.",
        "extra: model.image_newline;",
        "misshapen: multi_modal_projector.linear_1.weight is [7, 24], config.json makes it [32, 24]",
        "pre_layrnorm.bias",
        "not floating point: language_model.model.norm.weight is I8",
    ):
        assert part in text, (part, text)


def test_shapes_are_compared_before_memory_is_taken(checkpoint, tmp_path):
    folder = _copy(checkpoint, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    _edit(folder, text_config=config["text_config"] | {"vocab_size": 1 << 24, "hidden_size": 1 << 20, "head_dim": None})
    with pytest.raises(
        UserError, match=r"embed_tokens.weight is \[320, 32\], config.json makes it \[16777216, 1048576\]"
    ):
        load_model(folder)


@pytest.mark.parametrize("cut", [0, 4, 100, None], ids=["empty", "4 bytes", "100 bytes", "half"])
def test_truncated_files_are_named(checkpoint, tmp_path, cut):
    folder = _copy(checkpoint, tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    for file in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 if cut is None else cut])
        with pytest.raises(UserError, match=rf"^{re.escape(str(file))}: truncated") as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)
        file.unlink()


@pytest.mark.parametrize("damage", [
    lambda whole: b"junk",
    lambda whole: re.sub(rb"\d{9,}", lambda key: key[0][::-1], whole, count=1),  # a storage that is not in the file
    lambda whole: whole.replace(b"_rebuild_tensor_v2", b"_rebuild_parameter"),
], ids=["four letters", "storage", "function"])  # fmt: skip
def test_whatever_torch_says_of_a_damaged_file_is_a_line(tmp_path, damage):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: truncated or no PyTorch file .*; get it again$"):
        inspect_folder(tmp_path)


class _Call:
    """Pickles as a call of a function, as a hostile file does."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize("payload", ["function", "module", "list", "sparse", "numbered", "some numbered", "empty"])
def test_bin_with_anything_but_tensors_is_refused(folder, tmp_path, payload):
    values = {
        "function": {"a": torch.zeros(2), "b": _Call(tmp_path / "called")},
        "module": torch.nn.Linear(2, 2),
        "list": [torch.zeros(2)],
        "sparse": {"a": torch.eye(3).to_sparse()},
        "numbered": {0: torch.zeros(2)},
        "some numbered": {"a": torch.zeros(2), (1, 2): torch.zeros(2)},
        "empty": {"a": torch.zeros(2, device="meta")},
    }[payload]
    torch.save(values, folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=rf"^{re.escape(str(folder))}/pytorch_model.bin: .*something other than"
    ) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "called").exists()


def test_missing_shard_and_bad_index_are_named(checkpoint, tmp_path):
    save_model(load_model(checkpoint), tmp_path / "m", shard_bytes=40_000)
    first, second, *_ = sorted((tmp_path / "m").glob("model-*.safetensors"))
    first.unlink()
    second.unlink()
    with pytest.raises(UserError, match=f"{first.name}, {second.name} not found"):
        load_model(tmp_path / "m")
    _edit(tmp_path / "m", "model.safetensors.index.json", weight_map={"a": "../../secret.safetensors"})
    with pytest.raises(UserError, match="weight_map"):
        load_model(tmp_path / "m")
    (tmp_path / "m/model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_model(tmp_path / "m")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 14483464192\n"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "config.json", "tokenizer.json",
             "processor_config.json", "generation_config.json", "chat_template.jinja", "tokenizer.model"],
)  # fmt: skip
def test_pointers_of_git_lfs_are_called_that(checkpoint, tmp_path, name):
    folder = _copy(checkpoint, tmp_path / "m")
    if name != "model.safetensors" and name.startswith(("model", "pytorch")):
        (folder / "model.safetensors").unlink()
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"{re.escape(name)}: is a pointer of Git LFS.* 'git lfs pull'"):
        opened = Checkpoint.open(folder)
        opened.load(), opened.tokenizer()


@pytest.mark.parametrize("found", [[], None, "x", 3, {"a": 1}, {"a": ["model.safetensors"]}, {"a": None}, {}])
def test_an_index_that_is_no_table(checkpoint, tmp_path, found):
    folder = _copy(checkpoint, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": found}))
    with pytest.raises(UserError, match=r"index\.json: no weight_map, or one that names something else") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("processor_config.json", "image_mean", [math.nan] * 3, "mean .* are no statistics of pixels"),
        ("processor_config.json", "image_mean", [1e300] * 3, "are no statistics"),
        ("processor_config.json", "image_std", [0.0, 0.5, 0.5], "are no statistics"),
        ("processor_config.json", "image_std", [-0.5, 0.5, 0.5], "are no statistics"),
        ("processor_config.json", "image_std", [math.inf] * 3, "are no statistics"),
        ("processor_config.json", "image_std", [1e-320] * 3, "are no statistics"),
        ("config.json", "quantization_config", "nf4", "quantization_config is 'nf4', expected an object"),
        ("tokenizer_config.json", "chat_template", {"a": 1}, "chat_template is {'a': 1}, expected text"),
        ("tokenizer_config.json", "chat_template", [1, {"name": "default"}], "chat_template is None, expected text"),
        ("tokenizer_config.json", "chat_template", 5, "chat_template is 5, expected text"),
        ("generation_config.json", "eos_token_id", "x", "eos_token_id is 'x', expected an integer"),
        ("generation_config.json", "eos_token_id", [2, None, [3]], "eos_token_id is .*, expected an integer"),
        ("generation_config.json", "bos_token_id", 1.5, "bos_token_id is 1.5, expected an integer"),
        ("generation_config.json", "pad_token_id", True, "pad_token_id is True, expected an integer"),
        ("generation_config.json", "eos_token_id", 10**9, "eos_token_id is 1000000000, expected an integer"),
    ],
)
def test_values_that_no_checkpoint_has(checkpoint, tmp_path, file, key, value, said):
    folder = _copy(checkpoint, tmp_path / "m")
    path = folder / file
    values = json.loads(path.read_text())
    values.get("image_processor", values)[key] = value
    path.write_text(json.dumps(values))
    if key == "chat_template":
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match=said) as caught:
        read_config(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_template_that_is_no_text(checkpoint, tmp_path):
    folder = _copy(checkpoint, tmp_path / "m")
    (folder / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    with pytest.raises(UserError, match=r"chat_template\.jinja: is not UTF-8 text"):
        read_config(folder)


UNSUPPORTED = {
    "config.json": [
        ({"model_type": "vipllava"}, "model_type 'vipllava' is not supported .*llava, llava_next"),
        ({"model_type": "llava_next"}, r"image_grid_pinpoints has \[336, 672\], expected two multiples of 30 pixels"),
        ({"model_type": "llava_next", "image_grid_pinpoints": [[60, 3030]]}, "more than 144 tiles"),
        ({"model_type": "llava_onevision", "image_grid_pinpoints": [[30, 30]], "vision_aspect_ratio": "anyres"},
         "vision_aspect_ratio 'anyres' is not supported"),
        ({"model_type": "llava_next_video", "image_grid_pinpoints": [[30, 30]], "spatial_pool_mode": "conv"},
         "spatial_pool_mode 'conv' is not supported"),
        ({"minillava": {"layout": {"merge": "best"}}}, r"layout: merge is 'best' \(known: flat, spatial"),
        ({"minillava": {"layout": {"newline": 1}}}, "unknown key 'newline'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised by 'awq'"),
        ({"text_config": {"model_type": "gpt2"}}, "text_config: model_type 'gpt2' is not supported .*llama"),
        ({"text_config": {"rope_scaling": {"type": "yarn", "factor": 2.5}}}, "rope_type 'yarn'"),
        ({"text_config": {"attention_bias": True}}, "attention_bias true"),
        ({"text_config": {"hidden_size": -3}}, "hidden_size is -3"),
        ({"text_config": {"num_key_value_heads": 3}}, "3 key/value heads"),
        ({"text_config": [1]}, r"text_config is \[1\], expected an object"),
        ({"vision_config": {"model_type": "dinov2"}}, "vision_config: model_type 'dinov2'"),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act 'relu' is not supported"),
        ({"vision_feature_layer": 77}, "vision_feature_layer .* is 77"),
        ({"projector_hidden_act": "silu"}, "projector_hidden_act 'silu'"),
        ({"minillava": []}, "minillava is"),
        ({"image_token_index": "x"}, "image_token_id: expected a whole number"),
    ],
    "processor_config.json": [  # of its image_processor
        ({"size": {"shortest_edge": 28}}, "differ from the tower's 30 pixels"),
        ({"image_processor_type": "LlavaNextImageProcessor"},
         "LlavaNextImageProcessor cuts pictures into tiles; not supported for llava"),
        ({"do_center_crop": False}, "neither padded"),
        ({"resample": 2}, "resample 2"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"image_mean": [0.5]}, "mean: expected 3 values"),
        ({"do_normalize": False}, "do_normalize false"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "change", "message"), [(f, *case) for f, cases in UNSUPPORTED.items() for case in cases]
)
def test_what_is_not_supported_is_refused_by_name(folder, file, change, message):
    if file == "processor_config.json":
        change = {"image_processor": json.loads((folder / file).read_text())["image_processor"] | change}
    _edit(folder, file, **change)
    with pytest.raises(UserError, match=rf"^{re.escape(str(folder))}/{file}: .*{message}"):
        read_config(folder)


def test_unreadable_json_is_named(folder):
    for content in (b"{", b"\xff\xfe", b"[]"):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"config.json: (cannot be read|is not UTF-8|holds a list)"):
            read_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: not found"):
        read_config(folder)


# ---- saving ----


def test_save_replaces_only_what_it_wrote(checkpoint, tmp_path):
    model = load_model(checkpoint)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(UserError, match="choose another folder"):
        save_model(model, tmp_path / "mine")
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"
    save_model(model, tmp_path / "out", shard_bytes=40_000)
    save_model(model, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    (tmp_path / "link").symlink_to(tmp_path / "out")
    save_model(model, tmp_path / "link", shard_bytes=40_000)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "out/model.safetensors.index.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "mine", "out"]


def test_failed_save_leaves_the_old_one(checkpoint, tmp_path, monkeypatch):
    import minillava.checkpoints.save

    model = load_model(checkpoint)
    save_model(model, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(minillava.checkpoints.save, "write", full)
    with pytest.raises(OSError, match="no space"):
        save_model(model, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("start_end", [False, True])
def test_built_in_templates_are_exported_with_the_same_strings(name, start_end):
    """What transformers renders from our chat_template.jinja is what we tokenise."""
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = ChatConfig(template=name, image_start_end=start_end)
    one = [Message("user", '<image>\nWhat is "this"?\\n'), Message("assistant", "A dog.")]
    more = [
        Message("user", "is {it} big? <image>"),
        Message("assistant", "yes"),
        Message("user", "<image> or <image>?"),
    ]
    talks = [one, one[:1]] if name == "plain" else [one, one[:1], one + more]
    talks += [[Message("system", "S <s>"), *one]] if "{system}" in TEMPLATES[name].first else []
    for talk in talks:
        wanted = "".join(text for text, _ in pieces(chat, talk, generate=talk[-1].role == "user"))
        plain = [{"role": m.role, "content": m.text} for m in talk]
        parts = [
            {"role": m.role, "content": [{"type": "image"} if p == "<image>" else {"type": "text", "text": p}
                                         for p in re.split("(<image>)", m.text) if p]}
            for m in talk
        ]  # fmt: skip
        for turns in (plain, parts):
            rendered, _ = render_jinja_template(conversations=[turns], chat_template=jinja_of(chat))
            assert rendered[0] == wanted


def test_original_checkpoint_is_exported_with_an_image_token(checkpoint, tokenizer_folder, tmp_path):
    """Original LLaVA has no <image> in its vocabulary, transformers needs one: a row is added, the answers stay."""
    _original(checkpoint, tmp_path / "m", image_aspect_ratio="square", vocab_size=320)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, tmp_path / "m")
    backend = json.loads((tmp_path / "m/tokenizer.json").read_text())
    assert backend["added_tokens"][-1]["content"] == "<image>"
    ours = load_model(tmp_path / "m")
    save_model(ours, tmp_path / "out", load_tokenizer(tmp_path / "m"))
    config = read_config(tmp_path / "out")
    assert config.chat.image_token_id == backend["added_tokens"][-1]["id"]
    assert config == dataclasses.replace(ours.config, chat=dataclasses.replace(ours.config.chat, image_token_id=3))


def _real(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip(f"{REAL / name} is not at hand")
    return REAL / name


def test_llama_vocabulary_is_exported_with_an_image_token(tmp_path):
    """The same with LLaMA's own tokenizer.model, of 32000 rows: transformers gets 32064, as its conversion does."""
    from PIL import Image

    model = _real("llava/llama_tokenizer.model")
    theirs = _model("llama")
    theirs.resize_token_embeddings(32000)
    theirs.config.image_token_index = 31999
    theirs.save_pretrained(tmp_path / "hf")
    _original(tmp_path / "hf", tmp_path / "m")
    shutil.copy(model, tmp_path / "m/tokenizer.model")
    ours = load_model(tmp_path / "m")
    save_model(ours, tmp_path / "out", load_tokenizer(tmp_path / "m"))
    back = load_model(tmp_path / "out")
    assert back.config.decoder.vocab_size == 32064 and back.config.chat.image_token_id == 32000
    assert back.config.chat.split_at_image and back.config.chat.template == "vicuna_v1"
    assert torch.equal(back.decoder.head.weight[:32000], ours.decoder.head.weight)
    assert torch.allclose(back.decoder.head.weight[32000:], ours.decoder.head.weight.mean(0), atol=1e-6)

    hf, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhat?"}]}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    inputs = processor(images=Image.new("RGB", (40, 20), "red"), text=text, return_tensors="pt")
    before, after = load_tokenizer(tmp_path / "m"), load_tokenizer(tmp_path / "out")
    unsplit = dataclasses.replace(back.config.chat, split_at_image=False)
    messages = [Message("user", "<image>\nwhat?")]
    assert inputs["input_ids"].tolist()[0] == encode(unsplit, after, messages, [4], generate=True)[0]
    assert encode(back.config.chat, after, messages, [4], generate=True)[0] == [
        32000 if id == -200 else id for id in encode(ours.config.chat, before, messages, [4], generate=True)[0]
    ]
    readme = (_real("README.md")).read_text()
    blanks = [" " * n + word for n in range(40) for word in ("", "x")]
    for text in [*blanks, *readme.splitlines(), readme, "  two  blanks \n\n\t", "é漢字🙂\x00</s>USER: <unk><s> x", ""]:
        for first in (True, False):
            assert before.encode(text, first) == after.encode(text, first), text
        assert processor.tokenizer(text).input_ids == [1, *after.encode(text, True)]
        assert before.decode(before.encode(text, True)) == after.decode(after.encode(text, True))
    with torch.no_grad():
        logits = hf(**inputs).logits[0, :, :32000]
        wanted = ours(inputs["input_ids"][0].masked_fill(inputs["input_ids"][0] == 32000, -200), inputs["pixel_values"])
    assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_pieces_that_sentencepiece_finds_first_are_exported_as_such(tmp_path):
    """Yi's <|im_start|>, which no file beside the model lists: whole in tokenizer.json, user-defined in a GGUF."""
    import sentencepiece
    import tokenizers

    words, given = ["user asks what color it is", "a red circle<|im_start|>user"] * 9, ["<|im_start|>", "<|im_sep|>"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False, user_defined_symbols=given,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    ours = load_tokenizer(tmp_path)
    vocabulary = read_vocabulary(ours, 300)
    assert [vocabulary.tokens[id] for id, kind in enumerate(vocabulary.kinds) if kind == 4] == given
    write_tokenizer_json(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("<|im_start|>user\nwhat<|im_sep|> is", "a<|im_start|> red  circle"):
        ids = ours.encode(text, True)
        assert ids.count(ours.token_id("<|im_start|>")) == 1 and theirs.encode(text).ids == [1, *ids]


def test_unigram_vocabulary_is_not_exported_as_bpe(checkpoint, tmp_path):
    import sentencepiece

    _original(checkpoint, tmp_path / "m")
    words = iter(["a red circle and a blue square", "what is this?", "the square is left of the circle"] * 9)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words, model_prefix=str(tmp_path / "m/tokenizer"), vocab_size=28, model_type="unigram",
        minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"tokenizer\.model: only a BPE"):
        save_model(load_model(tmp_path / "m"), tmp_path / "out", load_tokenizer(tmp_path / "m"))
    assert not (tmp_path / "out").exists()


# ---- memory ----

_PEAK = """
import re, sys, torch
from minillava.checkpoints.checkpoint import Checkpoint
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
model = Checkpoint.open(sys.argv[1]).load(getattr(torch, sys.argv[2]))
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""  # not ru_maxrss, which a child process inherits


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(("kind", "dtype"), [("safetensors", "bfloat16"), ("bin", "float32")])
def test_loading_peaks_at_about_one_copy(folder, kind, dtype):
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] | dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, head_dim=64,
                                        num_attention_heads=16, num_key_value_heads=16)  # fmt: skip
    _edit(folder, text_config=text)
    from minillava.llava import LLaVAModel

    with torch.device("meta"):
        empty = LLaVAModel(read_config(folder)).state_dict()
    tensors = {rename(k, "hf", False): torch.ones(t.shape, dtype=torch.bfloat16) for k, t in empty.items()}
    assert sum(t.nbytes for t in tensors.values()) > 200 << 20
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    del tensors
    command = [sys.executable, "-c", _PEAK, str(folder), dtype]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"peak over one copy: {ratio:.2f}")
    assert 0.9 < ratio < 1.3


# ---- what is this folder? ----


def _inspected(folder) -> dict[str, str]:
    return {line[:10].strip(): line[11:] for line in Checkpoint.open(folder).describe()}


def test_inspect_says_what_a_folder_is(checkpoint, tmp_path, capsys):
    found = _inspected(checkpoint)
    assert found["is"] == "a LLaVA in Hugging Face's layout (model_type llava)" and found["loads"] == "yes"
    vision = sum(p.numel() for p in load_model(checkpoint).vision.parameters())
    assert found["vision"] == f"{vision:,} numbers, {vision * 4 / 2**20:,.1f} MiB, F32, in model.safetensors"
    assert found["prompt"].startswith("jinja, <image>, stops at") and "unknown" not in found and "ignored" not in found

    tensors = _original(checkpoint, tmp_path / "m")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(3)} | {
        "what": torch.ones(1)
    }
    save_file({k: t for k, t in tensors.items() if "vision_tower" not in k} | extra, tmp_path / "m/model.safetensors")
    found = _inspected(tmp_path / "m")
    assert found["is"] == "a LLaVA in the original layout (model_type llava_llama)" and "vision" not in found
    assert found["ignored"] == "3 tensors: model.layers.{0-2}.self_attn.rotary_emb.inv_freq"
    assert found["unknown"] == "1 tensors: what"
    assert found["loads"].startswith("no: ") and "extra: what" in found["loads"]
    assert _inspected(tmp_path / "m/tower")["is"].startswith("a vision tower")

    _lora(checkpoint, tmp_path / "lora")
    found = _inspected(tmp_path / "lora")
    assert found["is"].startswith("LoRA adapters") and found["adapters"] == "on 21 weights of base"
    assert found["loads"] == "yes" and found["projector"].endswith("float32, in non_lora_trainables.bin")
    assert run_command("inspect", [str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no weights here")
    assert run_command("inspect", [str(checkpoint)]) == 0
    assert capsys.readouterr().out.startswith("is         a LLaVA in Hugging Face's layout")
