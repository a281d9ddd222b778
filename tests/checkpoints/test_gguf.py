"""Files for llama.cpp, read back with gguf: tensors, sizes, vocabulary, template. bench/gguf.py asks llama.cpp."""

import json
from dataclasses import replace

import jinja2
import pytest
import torch
from helpers import REAL, tiny_pair

from minillava.chat.tokenizer import load_tokenizer
from minillava.checkpoints import chat_files
from minillava.checkpoints.checkpoint import Checkpoint
from minillava.checkpoints.gguf_vocab import read_vocabulary
from minillava.checkpoints.hub import NANO
from minillava.cli import main
from minillava.config import ChatConfig, DecoderConfig, ModelConfig, ProjectorConfig, RopeScaling, VisionConfig
from minillava.errors import UserError
from minillava.llava import LLaVAModel

gguf = pytest.importorskip("gguf")
from minillava.checkpoints import gguf as ours  # noqa: E402


def read(path):
    """Tensors as float32 in torch's shapes, and metadata."""
    file = gguf.GGUFReader(path)
    tensors = {}
    for t in file.tensors:
        values = gguf.dequantize(t.data, t.tensor_type)
        tensors[t.name] = torch.from_numpy(values.copy()).float().reshape(tuple(reversed(t.shape.tolist())))
    return tensors, {name: field.contents() for name, field in file.fields.items()}


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    assert main(["export", "--gguf", str(folder), "--type", "Q8_0"]) == 0
    return Checkpoint.open(NANO).load(torch.float32), *map(read, sorted(folder.iterdir()))


def test_a_model_in_the_working_folder_has_that_ones_name(tmp_path, monkeypatch):
    names = []
    write = "minillava.checkpoints.gguf.export"
    monkeypatch.setattr(write, lambda model, tokenizer, folder, name, form: names.append(name) or ["a", "b"])
    monkeypatch.chdir(NANO)
    assert main(["export", "--model", ".", "--gguf", str(tmp_path)]) == 0 and names == ["nano"]


def test_the_tower_is_written_as_it_is(nano):
    model, (tensors, facts), _ = nano
    assert facts["clip.vision.feature_layer"] == [model.config.vision.layers_run]
    assert facts["clip.vision.block_count"] == model.config.vision.layers_run
    assert not facts["clip.use_gelu"] and facts["clip.projector_type"] == "mlp"
    assert torch.equal(tensors["v.patch_embd.weight"], model.vision.patch_embedding.weight.half().float())
    assert torch.equal(tensors["mm.2.weight"], model.projector.linears[1].weight.half().float())
    assert torch.equal(tensors["v.blk.0.ffn_down.bias"], model.vision.blocks[0].mlp.fc1.bias)
    assert "v.blk.3.ln1.weight" not in tensors and "v.post_ln.weight" not in tensors


def test_the_decoder_is_written_with_neighbours_turning_together(nano):
    model, _, (tensors, facts) = nano
    c, q = model.config.decoder, model.decoder.blocks[1].attn.q.weight
    written = tensors["blk.1.attn_q.weight"]
    for head in range(c.num_heads):
        rows = written[head * c.head_dim : (head + 1) * c.head_dim]
        theirs = torch.cat([rows[0::2], rows[1::2]])  # what turns together is half a head apart here
        part = q[head * c.head_dim : (head + 1) * c.head_dim]
        assert (theirs - part).abs().max() <= part.abs().max() / 127
    assert facts["llama.block_count"] == c.num_layers and facts["llama.rope.dimension_count"] == c.head_dim
    assert "output.weight" not in tensors  # tied


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_decoders_have_the_names_and_shapes_of_llama_cpps_converter(family, tiny_tokenizer, tmp_path):
    """Every tensor of transformers' own under the name that gguf's table has for it, with its values, and no other."""
    theirs, engine = tiny_pair(family, tiny_tokenizer, tmp_path / "model")
    c = engine.config.decoder
    assert (c.num_heads * c.head_dim != c.hidden_size) == (family == "qwen3")  # whose heads have a width of their own
    path, _ = ours.export(engine.model, engine.tokenizer, tmp_path, "tiny", "F16")
    tensors, facts = read(path)
    arch = "llama" if family == "mistral" else family
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], c.num_layers)
    expected = {}
    for name, p in theirs.state_dict().items():
        if "language_model" not in name and "lm_head" not in name:
            continue
        name = name.replace("language_model.model.", "").replace("language_model.", "")
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):  # the converter's permute
            p = p.view(-1, 2, c.head_dim // 2, p.shape[1]).swapaxes(1, 2).reshape(p.shape)
        expected[names.get_name(name, (".weight", ".bias"))] = p.half().float() if p.ndim > 1 else p
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], p) for name, p in expected.items())
    assert facts["general.architecture"] == arch
    sizes = {"attention.head_count": c.num_heads, "attention.head_count_kv": 2, "attention.key_length": c.head_dim,
             "attention.value_length": c.head_dim, "rope.dimension_count": c.head_dim}  # fmt: skip
    assert {name: facts[f"{arch}.{name}"] for name in sizes} == sizes
    assert facts[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(c.norm_eps)


def test_the_vocabulary_is_the_tokenizers(nano):
    _, _, (_, facts) = nano
    tokenizer = json.loads((NANO / "tokenizer.json").read_text())
    tokens = facts["tokenizer.ggml.tokens"]
    assert {token: tokens.index(token) for token in tokenizer["model"]["vocab"]} == tokenizer["model"]["vocab"]
    assert len(tokens) == 448 and facts["tokenizer.ggml.token_type"][:4] == [3] * 4
    assert len(facts["tokenizer.ggml.merges"]) == len(tokenizer["model"]["merges"])
    ids = [facts[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert ids == [0, 1, 2] and facts["tokenizer.ggml.add_bos_token"]


@pytest.mark.parametrize("marker", ["<__media__>", "<__media_aB3x__>"])
def test_the_template_puts_llama_cpps_marker_where_the_placeholder_goes(marker):
    chat = ChatConfig(template="vicuna_v1")
    ours_, theirs = (jinja2.Environment().from_string(chat_files.jinja_of(chat, there)) for there in (False, True))

    def written(template, picture):
        turns = [f"{picture}What is it?", "A cat.", "Sure?"]
        roles = ("user", "assistant", "user")
        return template.render(messages=[{"role": r, "content": t} for r, t in zip(roles, turns)])

    assert written(theirs, marker) == written(ours_, "<image>").replace("<image>", marker)


def test_one_linear_layer_is_written_as_two_that_do_the_same():
    model = LLaVAModel(ModelConfig(VisionConfig(16, 32, 2, 2, 16, 8), ProjectorConfig(1), DecoderConfig(64, 8, 16, 1)))
    model.init_weights(0)
    parts = {name: values() for name, values, _ in ours._projector_parts(model)}
    x = torch.randn(5, 16)
    hidden = torch.nn.functional.gelu(x @ parts["mm.0.weight"].T + parts["mm.0.bias"], approximate="tanh")
    assert torch.allclose(hidden @ parts["mm.2.weight"].T + parts["mm.2.bias"], model.projector(x), atol=1e-6)


def test_what_llama_cpp_cannot_run_is_refused_before_anything_is_written():
    config = ModelConfig()
    for broken in (
        replace(config, vision=replace(config.vision, rotary=True)),
        replace(config, vision=replace(config.vision, keep_class_token=True)),
        replace(config, vision=replace(config.vision, select_layers=(-2, -4))),
        replace(config, projector=ProjectorConfig(3)),
        replace(config, decoder=replace(config.decoder, num_experts=8)),
        replace(config, decoder=replace(config.decoder, qkv_bias=True, head_dim=64)),
        replace(config, decoder=replace(config.decoder, qkv_bias=True, qk_norm=True)),
        replace(config, decoder=replace(config.decoder, qk_norm=True, rope_scaling=RopeScaling("llama3"))),
    ):
        with pytest.raises(UserError, match="does not run"):
            ours.check(broken)
    for whole in ({}, {"qkv_bias": True}, {"qk_norm": True, "head_dim": 64}, {"head_dim": 64}):
        ours.check(replace(config, decoder=replace(config.decoder, **whole)))


def test_tiles_and_the_class_token_are_said_to_differ():
    config = Checkpoint.open(NANO).config
    tiled = replace(config, layout=replace(config.layout, grids=((1, 2),), merge="unpad"))
    lines = ours.differences(tiled, Checkpoint.open(NANO).tokenizer())
    assert any("25844" in line for line in lines) and any("no tiles" in line for line in lines)


def test_a_sentencepiece_vocabulary_keeps_its_scores(tmp_path):
    path = REAL / "llava" / "llama_tokenizer.model"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    vocabulary = read_vocabulary(load_tokenizer(tmp_path), 32064)
    assert vocabulary.model == "llama" and len(vocabulary.tokens) == len(vocabulary.scores) == 32064
    assert vocabulary.kinds[:4] == [2, 3, 3, 6] and vocabulary.tokens[259] == "▁▁"
