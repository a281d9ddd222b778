"""Every decoder of the family, at tiny size: transformers' own class is built and saved, and read here.

The logits are within twice the error of transformers' float32 against float64, and 32 greedy tokens are the same; at
full width the number of parameters is what the models' cards say. Letters: T tokens, V vocabulary, D width.
"""

import dataclasses
import json

import pytest
import torch
from helpers import load_model
from safetensors.torch import load_file, save_file

from minillava.checkpoints import loading, names, tensor_files
from minillava.checkpoints.config_json import write_config
from minillava.checkpoints.config_parts import read_decoder
from minillava.checkpoints.save import save_model
from minillava.config import ChatConfig, DecoderConfig, ImageConfig, ModelConfig, RopeScaling, VisionConfig
from minillava.decoder import Decoder, Experts
from minillava.errors import UserError
from minillava.layers.cache import KVCache
from minillava.layers.linear import grouped_linear
from minillava.llava import LLaVAModel
from minillava.schema import read_json

transformers = pytest.importorskip("transformers")

SMALL = dict(
    vocab_size=120, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5,
)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILY = {
    "llama3": ("Llama", dict(rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32})),
    "linear": ("Llama", dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5})),
    "mistral": ("Mistral", dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, sliding_window=None)),
    "qwen2": ("Qwen2", dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen2-tied": ("Qwen2", dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "qwen3": ("Qwen3", dict(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 5e6})),
    "qwen3-moe": ("Qwen3Moe", dict(head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24,
                                   norm_topk_prob=True)),
    "qwen3-moe-raw": ("Qwen3Moe", dict(head_dim=16, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24,
                                       norm_topk_prob=False)),
}  # fmt: skip


def decoder_of(folder):
    """The decoder of a language model's folder, as a recipe's decoder_from takes it."""
    config = read_decoder(read_json(folder / "config.json"), str(folder))
    with torch.device("meta"):
        decoder = Decoder(config)
    empty = {f"decoder.{name}": t for name, t in decoder.state_dict().items()}
    plan = names.Plan()
    plan.add(tensor_files.inspect_folder(folder), "original")
    plan.check(str(folder), {name: tuple(t.shape) for name, t in names.unstack(empty).items()})
    state = {name.removeprefix("decoder."): t for name, t in loading.take(plan.source, empty).items()}
    decoder.load_state_dict(state, assign=True)
    return decoder.eval()


@pytest.fixture(scope="module", params=list(FAMILY))
def pair(request, tmp_path_factory):
    """(transformers' model, our decoder)."""
    kind, values = FAMILY[request.param]
    config = getattr(transformers, f"{kind}Config")(**(SMALL | values))
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    if "Moe" in kind:
        theirs.set_experts_implementation("eager")  # the grouped one has no float64
    with torch.no_grad():
        for name, p in theirs.named_parameters():  # ten times the usual spread, and biases and norms that show
            p.normal_(1 if "norm" in name else 0, 0.2)
    folder = tmp_path_factory.mktemp("decoder")
    theirs.save_pretrained(folder)
    return theirs, decoder_of(folder)


def test_logits_and_greedy_tokens_equal_transformers(pair):
    theirs, ours = pair
    ids_T = torch.randint(0, 120, (24,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain_TV = theirs(ids_T[None]).logits[0]
        exact_TV = theirs.double()(ids_T[None]).logits[0]
        theirs.float()
        logits_TV = ours.logits(ours(ours.embed(ids_T), (0, 24)))
    error, plain = ((x - exact_TV).abs().max().item() for x in (logits_TV, plain_TV))
    assert error <= 2 * plain, (error, plain)

    expected = theirs.generate(ids_T[None], max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    cache, new_T, tokens = KVCache(ours.config, 1, 56, torch.device("cpu"), torch.float32), ids_T, []
    with torch.no_grad():
        for _ in range(32):
            new_T = ours.logits(ours(ours.embed(new_T), (0, len(new_T)), cache)[-1:]).argmax(-1)
            tokens += new_T.tolist()
    assert tokens == expected[0, 24:].tolist() and len(set(tokens)) > 3


# ---- full widths, without memory ----

# (transformers' class, D, layers, heads, key/value heads, MLP, theta, eps, vocabulary, more) -> parameters as published
WIDTHS = {
    "LLaMA-1 7B, Vicuna v1.3": ("Llama", 4096, 32, 32, 32, 11008, 1e4, 1e-6, 32003, {}, 6_738_440_192),
    "LLaMA-2-7B, Vicuna v1.5": ("Llama", 4096, 32, 32, 32, 11008, 1e4, 1e-5, 32000, {}, 6_738_415_616),
    "LLaMA-2-13B, Vicuna v1.5": ("Llama", 5120, 40, 40, 40, 13824, 1e4, 1e-5, 32000, {}, 13_015_864_320),
    "Mistral-7B-v0.2": ("Mistral", 4096, 32, 32, 8, 14336, 1e6, 1e-5, 32000, {}, 7_241_732_096),
    "Yi-34B": ("Llama", 7168, 60, 56, 8, 20480, 5e6, 1e-5, 64000, {}, 34_388_917_248),
    "Llama-3-8B": ("Llama", 4096, 32, 32, 8, 14336, 5e5, 1e-5, 128256, {}, 8_030_261_248),
    "Qwen1.5-72B": ("Qwen2", 8192, 80, 64, 64, 24576, 1e6, 1e-6, 152064, {}, 72_287_920_128),
    "Qwen1.5-110B": ("Qwen2", 8192, 80, 64, 8, 49152, 1e6, 1e-6, 152064, {}, 111_209_914_368),
    "Qwen1.5-32B": ("Qwen2", 5120, 64, 40, 8, 27392, 1e6, 1e-6, 152064, {}, 32_512_218_112),
    "Qwen1.5-0.5B": ("Qwen2", 1024, 24, 16, 16, 2816, 1e6, 1e-6, 151936, dict(tie_word_embeddings=True), 463_987_712),
    "Qwen2-0.5B": ("Qwen2", 896, 24, 14, 2, 4864, 1e6, 1e-6, 151936, dict(tie_word_embeddings=True), 494_032_768),
    "Qwen2-7B": ("Qwen2", 3584, 28, 28, 4, 18944, 1e6, 1e-6, 152064, {}, 7_615_616_512),
    "Qwen2-72B": ("Qwen2", 8192, 80, 64, 8, 29568, 1e6, 1e-6, 152064, {}, 72_706_203_648),
    "Qwen3-4B, untied": ("Qwen3", 2560, 36, 32, 8, 9728, 5e6, 1e-6, 151936, dict(head_dim=128), 4_411_424_256),
    "Qwen3-8B": ("Qwen3", 4096, 36, 32, 8, 12288, 1e6, 1e-6, 151936, dict(head_dim=128), 8_190_735_360),
    "Qwen3-30B-A3B": ("Qwen3Moe", 2048, 48, 32, 4, 6144, 1e6, 1e-6, 151936, dict(head_dim=128, norm_topk_prob=True),
                      30_532_122_624),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WIDTHS))
def test_every_width_has_the_published_number_of_parameters(name):
    kind, D, layers, heads, kv, mlp, theta, eps, vocab, more, published = WIDTHS[name]
    values = dict(
        hidden_size=D, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocab,
        intermediate_size=mlp, rms_norm_eps=eps, rope_parameters={"rope_type": "default", "rope_theta": theta}, **more,
    )  # fmt: skip
    theirs = getattr(transformers, f"{kind}Config")(**values)
    config = read_decoder(json.loads(theirs.to_json_string(use_diff=False)), name)
    assert config.head_dim == more.get("head_dim", D // heads) and config.norm_eps == eps and config.rope_theta == theta
    with torch.device("meta"):
        ours = Decoder(config)
        counterpart = getattr(transformers, f"{kind}ForCausalLM")._from_config(theirs)
    assert sum(p.numel() for p in ours.parameters()) == published == counterpart.num_parameters()


# ---- rotary scaling, experts, what is refused ----

TEXT = dict(model_type="llama", hidden_size=64, num_attention_heads=4, max_position_embeddings=4096)


def test_a_linear_scaling_widens_the_context_and_is_saved_as_it_came():
    old = read_decoder(TEXT | {"rope_scaling": {"type": "linear", "factor": 2.5}}, "x")  # before transformers 5
    assert old.rope_scaling == RopeScaling("linear", 2.5) and old.max_positions == 10240
    saved = write_config(dataclasses.replace(ModelConfig(), decoder=old), "float32")["config.json"]["text_config"]
    assert saved["max_position_embeddings"] == 4096 and read_decoder(saved, "x") == old
    three = read_decoder(TEXT | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}}, "x")
    assert three.max_positions == 4096 and three.rope_scaling.original_positions == 32
    saved = write_config(dataclasses.replace(ModelConfig(), decoder=three), "float32")["config.json"]["text_config"]
    assert read_decoder(saved, "x") == three


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0, expected a positive number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is null"),
        ({"rope_scaling": 4.0}, "rope_parameters is 4.0, expected an object"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, "mlp_only_layers"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 8}, "integer from 1 to 4"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    ],
)
def test_what_no_decoder_here_does_is_refused_by_name(values, message):
    with pytest.raises(UserError, match=message):
        read_decoder(TEXT | values, "config.json")


def test_a_window_bounds_the_context():
    """LLaVA's Mistrals state null; saying nothing means transformers' 4096, within which attention is full."""
    mistral = TEXT | {"model_type": "mistral", "max_position_embeddings": 32768, "num_key_value_heads": 4}
    assert read_decoder(mistral | {"sliding_window": None}, "x").max_positions == 32768
    assert read_decoder(mistral, "x").max_positions == 4096


EXPERTS = DecoderConfig(
    97, 32, 48, 2, 4, 2, 8, qk_norm=True, num_experts=6, experts_per_token=2, expert_size=24, model_type="qwen3_moe"
)


def test_experts_equal_all_of_them_weighted_gradients_too():
    """Every expert on every token, in float64, weighted by what the router gives its two likeliest."""
    torch.manual_seed(0)
    layer = Experts(EXPERTS).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    x_TD = torch.randn(11, 32, dtype=torch.float64, requires_grad=True)
    probability_TE = (x_TD @ layer.router.weight.T).softmax(-1)
    least_T1 = probability_TE.topk(2).values[:, 1:]
    share_TE = torch.where(probability_TE >= least_T1, probability_TE, 0)
    share_TE = share_TE / share_TE.sum(-1, keepdim=True)
    hidden_ETI = torch.nn.functional.silu(x_TD @ layer.gate.mT) * (x_TD @ layer.up.mT)
    expected_TD = torch.einsum("te,etd->td", share_TE, hidden_ETI @ layer.down.mT)
    weight_TD = torch.randn_like(expected_TD)
    parameters = [x_TD, *layer.parameters()]
    expected = torch.autograd.grad((expected_TD * weight_TD).sum(), parameters)
    out_TD = layer(x_TD)
    found = torch.autograd.grad((out_TD * weight_TD).sum(), parameters)
    # The shares are float32's, as in transformers.
    torch.testing.assert_close(out_TD, expected_TD, rtol=1e-6, atol=1e-5)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_the_grouped_product_of_a_gpu_is_the_same():
    """Also where experts at the ends and in the middle have no token."""
    torch.manual_seed(0)
    x_SD, weight_EOD = torch.randn(9, 16, dtype=torch.bfloat16), torch.randn(5, 24, 16, dtype=torch.bfloat16)
    ends_E = torch.tensor([0, 4, 4, 9, 9], dtype=torch.int32)
    grouped_SO = torch.nn.functional.grouped_mm(x_SD, weight_EOD.mT, offs=ends_E)
    torch.testing.assert_close(grouped_SO, grouped_linear(x_SD, weight_EOD, ends_E))


def test_experts_are_saved_under_transformers_names(tmp_path):
    """Ours to a folder: the same logits from transformers' Qwen3-MoE inside its LLaVA, and the same bits back here."""
    vision = VisionConfig(16, 32, 2, 2, 28, 14)
    config = ModelConfig(vision, decoder=EXPERTS, image=ImageConfig(28), chat=ChatConfig(image_token_id=96))
    model = LLaVAModel(config).eval()
    model.init_weights(0)
    save_model(model, tmp_path / "saved")
    names = tensor_files.inspect_folder(tmp_path / "saved")
    assert names["language_model.model.layers.1.mlp.experts.5.down_proj.weight"].shape == (32, 24)
    back = load_model(tmp_path / "saved")
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in model.state_dict().items())
    assert back.config.decoder == EXPERTS
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    ids_T = torch.tensor([1, 7, *[96] * 4, 9, 5, 33])
    pixels_NCSS = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        expected_TV = theirs(input_ids=ids_T[None], pixel_values=pixels_NCSS).logits[0]
        torch.testing.assert_close(model(ids_T, pixels_NCSS), expected_TV, rtol=1e-5, atol=1e-5)


def test_a_missing_expert_is_named(tmp_path):
    values = FAMILY["qwen3-moe"][1]
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**(SMALL | values))).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.experts.4.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing: .*layers\.1\.mlp\.experts\.4\.up"):
        decoder_of(tmp_path)
