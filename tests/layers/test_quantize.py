"""Four-bit weights: bit for bit those of bitsandbytes, in memory and in files; exchanged with transformers."""

from __future__ import annotations

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
from helpers import PIXELS, REAL, TEXT, VISION, load_model, logits_here, logits_there, read_config

from minillava import LLaVA
from minillava.chat.tokenizer import load_tokenizer
from minillava.checkpoints.save import save_model
from minillava.cli import run_command
from minillava.config import ChatConfig, DecoderConfig, ImageConfig, ModelConfig, ProjectorConfig, VisionConfig
from minillava.errors import UserError
from minillava.kernels.nf4_dequantize import BLOCKSIZES, CODES
from minillava.layers import scheme
from minillava.layers.quantize import Linear4bit, chosen_layers, quant_state
from minillava.layers.scheme import Scheme
from minillava.llava import LLaVAModel
from minillava.media.image import open_image, prepare
from minillava.visual_tokens import image_span

NANO = Path(__file__).parents[2] / "minillava" / "nano"


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes, the oracle of the format, is not installed")


# ---- the format ----


def weights():
    """Shapes that are and are not multiples of the block; values of every kind."""
    torch.manual_seed(0)
    code = torch.tensor(CODES["nf4"])
    yield "random", torch.randn(300, 136)
    yield "long", torch.randn(700, 1000)
    yield "constant", torch.full((64, 64), 0.37)
    yield "zero", torch.zeros(8, 4096)
    yield "zero at the end", torch.cat((torch.randn(64), torch.zeros(8)))[None]
    yield "huge", torch.randn(64, 128) * 1e34
    yield "tiny", torch.randn(64, 128) * 1e-38
    yield "subnormal", torch.randn(64, 128) * 1e-41
    yield "mixed", torch.randn(128, 256) * torch.logspace(-30, 30, 128)[:, None]
    yield "ties", torch.cat((code, (code[1:] + code[:-1]) / 2, torch.zeros(1))).repeat(4, 64)


@pytest.mark.parametrize("quant_type", CODES)
@pytest.mark.parametrize(("kind", "weight"), weights(), ids=[kind for kind, _ in weights()])
def test_equals_bitsandbytes(bnb, kind, weight, quant_type):
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    generic = _dequantize_4bit_compute.__wrapped__  # as it stands: without a torch.compile for every variant
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    variants = [(t, b, d) for t in dtypes[: 2 if kind in ("huge", "mixed") else 3] for b in BLOCKSIZES for d in (0, 1)]
    for dtype, blocksize, double in variants:
        what = f"{dtype} {blocksize} {double}"
        given = weight.to(dtype)
        options = dict(quant_type=quant_type, blocksize=blocksize, compress_statistics=bool(double))
        packed, state = bnb.functional.quantize_4bit(given, **options)
        layer = Linear4bit.from_weight(given, scheme=Scheme(quant_type, bool(double), blocksize))
        theirs, ours = {"": packed, **state.as_dict(packed=True)}, layer.stored()
        assert theirs.keys() == ours.keys(), what
        for key in theirs:
            assert torch.equal(theirs[key], ours[key]), f"{what} {key}"
        absmax = state.absmax
        if double:
            absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
        for out in (torch.float32, torch.bfloat16):
            # bitsandbytes' AVX512 code takes a wrong block where a row is not whole blocks, so its generic one is asked
            exact = generic(packed.flatten(), absmax, state.code, blocksize, weight.shape, out)
            assert torch.equal(layer.dequantize(out), exact), f"{what} {out}"


def test_a_row_of_siglip_and_bitsandbytes_own_kernel(bnb):
    """K = 4304 ends in a quarter of a block, so blocks run across rows; and its fast kernel agrees where K is whole."""
    for K in (4304, 1152):
        weight = torch.randn(6, K, generator=torch.Generator().manual_seed(K))
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
        layer = Linear4bit.from_weight(weight)
        assert torch.equal(layer.weight, packed.flatten()) and torch.equal(layer.absmax, state.absmax)
        if K == 1152:
            assert torch.equal(layer.dequantize(), bnb.functional.dequantize_4bit(packed, state))
        x = torch.randn(3, K, dtype=torch.float64)
        torch.testing.assert_close(layer(x), x @ layer.dequantize(torch.float64).T)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        Linear4bit.from_weight(torch.tensor([[1.0] * 63 + [float("nan")]]))


# ---- the layer ----


def layers(double, sizes=(192, 64, 64), K=128, bias=True, blocksize=64):
    torch.manual_seed(1)
    scheme = Scheme(double=double, blocksize=blocksize)
    scaled = [torch.randn(n, K) * torch.rand(n, 1) for n in sizes]
    return [Linear4bit.from_weight(w, torch.randn(len(w)) if bias else None, scheme) for w in scaled]


@pytest.mark.parametrize("sizes", ((192, 64, 64), (512, 512, 7)))
@pytest.mark.parametrize("double", (False, True))
def test_joined_layers_hold_the_same_values(double, sizes):
    """Scales of scales stay where each part has whole groups of 256 blocks; else they become plain ones."""
    parts = layers(double, sizes)
    joined = Linear4bit.joined(parts)
    assert (joined.nested is not None) == (double and sizes[0] == 512)
    assert torch.equal(joined.dequantize(torch.float32), torch.cat([p.dequantize(torch.float32) for p in parts]))
    x = torch.randn(5, 128)
    torch.testing.assert_close(joined(x), torch.cat([p(x) for p in parts], 1))
    start = 0
    for part in parts:
        again = joined.rows(start, start + part.out_features)
        assert again.weight.data_ptr() == joined.weight[start * 64 :].data_ptr()
        assert torch.equal(again.dequantize(torch.float32), part.dequantize(torch.float32))
        assert torch.equal(again.bias, part.bias) and again.for_cpu().fits() == part.for_cpu().fits()
        if joined.nested is not None:
            assert all(torch.equal(again.stored()[key], value) for key, value in part.stored().items())
        start += part.out_features
    odd = joined.rows(64, 128) if sizes[0] == 192 else joined.rows(2, 512)
    assert torch.equal(odd.dequantize(torch.float32), joined.dequantize(torch.float32)[64 : 128][: len(odd.bias)]
                       if sizes[0] == 192 else joined.dequantize(torch.float32)[2:512])  # fmt: skip
    if joined.nested is not None:  # two offsets: one file entry cannot hold them, plain scales can
        stored = joined.stored()
        assert stored["absmax"].dtype == torch.float32 and "nested_absmax" not in stored
        copy = Linear4bit.from_stored(stored.pop(""), stored)
        assert torch.equal(copy.dequantize(torch.float32), joined.dequantize(torch.float32))


def test_what_cannot_be_joined_or_cut_is_refused():
    a, b = layers(False, (3, 64), K=96)
    with pytest.raises(ValueError, match="cannot be joined"):
        Linear4bit.joined([a, b])
    with pytest.raises(ValueError, match="blocks of 64"):
        b.rows(1, 3)


def test_scales_stay_float32_whatever_the_module_becomes():
    (layer,) = layers(True, (64,))
    before = layer.dequantize(torch.float32)
    model = torch.nn.Sequential(layer).to(torch.bfloat16).half()
    assert model[0].bias.dtype == torch.float16 and torch.equal(model[0].dequantize(torch.float32), before)
    assert not any(p.requires_grad for p in model.parameters())
    assert model(torch.randn(2, 128).bfloat16()).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused_by_name():
    (layer,) = layers(True, (64,))
    stored = layer.stored()
    weight = stored.pop("")

    def state(**fields):
        text = json.dumps({**quant_state(stored), **fields}).encode()
        return {**stored, "quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8)}

    cases = {
        "int3": state(quant_type="int3"),
        "'blocksize': 96": state(blocksize=96),
        "damaged": {**stored, "quant_state.bitsandbytes__nf4": torch.tensor([123], dtype=torch.uint8)},
        "no quant_state": {k: v for k, v in stored.items() if not k.startswith("quant_state")},
        "has no nested_absmax": {k: v for k, v in stored.items() if k != "nested_absmax"},
        "quant_map that is not nf4's": {**stored, "quant_map": stored["quant_map"] * 2},
        "do not make a weight": state(shape=[65, 128]),
        "do not make a weight .* in blocks": {**stored, "absmax": stored["absmax"][:-1]},
        "not finite as nested_absmax": {**stored, "nested_absmax": stored["nested_absmax"] * math.nan},
        "'shape': .64, -128.": state(shape=[64, -128]),
        "'blocksize': 64.0": state(blocksize=64.0),
        "'nested_offset': nan": state(nested_offset=math.nan),
        "damaged quant_state .*real number": state(nested_offset="x"),
        "damaged quant_state .*recursion": {
            **stored, "quant_state.bitsandbytes__nf4": torch.tensor(list(b"[" * 99_999), dtype=torch.uint8)},
    }  # fmt: skip
    for message, companions in cases.items():
        with pytest.raises(ValueError, match=message):
            Linear4bit.from_stored(weight, companions)
    with pytest.raises(ValueError, match="do not make a weight"):
        Linear4bit.from_stored(weight[:-1], stored)


def test_schemes():
    assert (tuple(CODES), BLOCKSIZES) == (scheme.FOUR_BITS, scheme.BLOCKSIZES)
    assert Scheme.parse("nf4") == Scheme()
    assert Scheme.parse("fp4-double-128:vision,head") == Scheme("fp4", True, 128, ("vision", "head"))
    for text, message in {
        "nf5": r"type 'nf5' is unknown \(did you mean 'nf4'",
        "nf4-65": "'65' is unknown",
        "nf4:decoders": "part 'decoders' is unknown .did you mean 'decoder'",
        "": "type '' is unknown",
    }.items():
        with pytest.raises(UserError, match=message):
            Scheme.parse(text)


# ---- files ----


def load_there(folder, **options):
    """transformers' model with bitsandbytes layers, and the same one with exactly dequantised weights: on a CPU
    bitsandbytes multiplies in bf16 whatever is asked for."""
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, device_map="cpu", dtype=torch.float32, **options
    )
    names = {name: module for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    packed = {name: module.weight.data.flatten().clone() for name, module in names.items()}
    return packed, model.dequantize().eval()


@pytest.mark.parametrize("double", (False, True))
def test_a_checkpoint_of_transformers_and_bitsandbytes_loads(bnb, tiny, exam, tmp_path, double):
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    load(tiny, device_map="cpu", dtype=torch.float32, quantization_config=config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    packed, there = load_there(tmp_path)
    model = load_model(tmp_path)
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if hasattr(m, "in_features")}
    assert len(packed) == sum(kind == "Linear4bit" for kind in kinds.values()) == 2 * 7 + 3 * 6 + 2
    assert kinds["decoder.head"] == "Linear"
    torch.testing.assert_close(logits_here(model, *exam), logits_there(there, *exam), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "count"), (("nf4", 14), ("nf4-double:decoder,vision,projector", 34), ("fp4-32:head,decoder", 15))
)
def test_what_is_saved_here_loads_in_transformers(bnb, tiny, exam, tmp_path, text, count):
    """Quantised at load: transformers' own codes; saved, loaded there: the same logits; saved by it, loaded here."""
    import transformers

    scheme = Scheme.parse(text)
    model = load_model(tiny, quantize=scheme)
    before = logits_here(model, *exam)
    save_model(model, tmp_path / "ours")
    packed, there = load_there(tmp_path / "ours")
    assert len(packed) == count
    torch.testing.assert_close(before, logits_there(there, *exam), rtol=1e-4, atol=1e-4)
    again = load_model(tmp_path / "ours")
    assert torch.equal(logits_here(again, *exam), before)

    if "head" not in scheme.parts:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=scheme.quant_type, bnb_4bit_use_double_quant=scheme.double
        )
        direct, _ = load_there(tiny, quantization_config=config)
        assert all(torch.equal(direct[name], packed[name]) for name in packed)


def test_quantised_at_load_equals_dequantised_weights(tiny, exam):
    """The exam of every layer at once: 4-bit logits are those of a plain model with the dequantised weights."""
    model, plain = load_model(tiny, quantize=Scheme.parse("nf4:decoder,vision,projector,head")), load_model(tiny)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            plain.get_submodule(name).weight.data = module.dequantize(torch.float32)
            assert module.nested is None and module.weight.numel() * 2 == module.in_features * module.out_features
    torch.testing.assert_close(logits_here(model, *exam), logits_here(plain, *exam), rtol=1e-5, atol=1e-5)
    labels = exam[0].clone()
    torch.testing.assert_close(*(m(exam[0], images=exam[1], labels=labels) for m in (model, plain)))


def test_fused_layers_answer_and_save_the_same(tiny, exam, tmp_path):
    model = load_model(tiny, torch.bfloat16, quantize=Scheme.parse("nf4-double"))
    before = logits_here(model, *exam)
    save_model(model, tmp_path / "apart")
    model.decoder.blocks.join()
    assert isinstance(model.decoder.blocks[0].attn.qkv.product, Linear4bit)
    torch.testing.assert_close(logits_here(model, *exam), before, rtol=0.02, atol=0.02)
    save_model(model, tmp_path / "fused")
    for name in ("apart", "fused"):
        again = load_model(tmp_path / name)
        assert torch.equal(logits_here(again, *exam), before), name


def test_damaged_and_foreign_quantised_files_are_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    save_model(load_model(tiny, quantize=Scheme()), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("down_proj.weight.absmax"))
    save_file({k: v for k, v in tensors.items() if k != key}, path)
    with pytest.raises(UserError, match=r"down_proj\.weight has no absmax"):
        load_model(tmp_path / "m")
    save_file({k: v for k, v in tensors.items() if not k.startswith(key.removesuffix("absmax"))}, path)
    with pytest.raises(UserError, match=r"not floating point: \S+down_proj\.weight is U8"):
        load_model(tmp_path / "m")
    bad = load_file(tiny / "model.safetensors")
    name = next(k for k in bad if k.endswith("up_proj.weight"))
    bad[name][3, 3] = float("inf")
    (tmp_path / "n").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "n" / name).write_text((tiny / name).read_text())
    save_file(bad, tmp_path / "n" / "model.safetensors")
    with pytest.raises(UserError, match=r"up_proj\.weight holds values that are not finite"):
        load_model(tmp_path / "n", quantize=Scheme())


SIDE, GRIDS = 28, [[28, 56], [56, 28], [56, 56]]
# name: class of transformers, language model, tower
FAMILIES = {
    "llava-clip-llama": ("Llava", "llama", "clip_vision_model"),
    "llava-siglip-qwen3": ("Llava", "qwen3", "siglip_vision_model"),
    "next-clip-mistral": ("LlavaNext", "mistral", "clip_vision_model"),
    "onevision-siglip-qwen2": ("LlavaOnevision", "qwen2", "siglip_vision_model"),
}
EVERYWHERE = "decoder,vision,projector"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exchanged_with_all_its_parts_in_four_bits(bnb, family, tmp_path):
    """Tower, projector and decoder: transformers' own codes, its logits with their values, and back to the bit."""
    transformers = pytest.importorskip("transformers")
    kind, text, tower = FAMILIES[family]
    torch.manual_seed(0)
    text = transformers.AutoConfig.for_model(text, **TEXT, num_key_value_heads=2, head_dim=16)
    vision = transformers.AutoConfig.for_model(tower, **VISION | {"intermediate_size": 100}, vision_use_head=False)
    tiled = {} if kind == "Llava" else {"image_grid_pinpoints": GRIDS}
    tiled |= {"vision_aspect_ratio": "anyres_max_9"} if kind == "LlavaOnevision" else {}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, image_token_index=7, **tiled
    )
    plain = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    for name, p in plain.named_parameters():
        p.data.mul_(4 if p.ndim > 1 and "embed" not in name else 1)
    plain.save_pretrained(tmp_path / "plain")
    pixels = {**PIXELS, "image_processor_type": f"{kind}ImageProcessor"} if tiled else PIXELS
    pixels |= {"size": {"height": SIDE, "width": SIDE}} if kind == "LlavaOnevision" else {}
    (tmp_path / "plain" / "preprocessor_config.json").write_text(json.dumps(pixels))

    model = load_model(tmp_path / "plain", quantize=Scheme.parse(f"nf4:{EVERYWHERE}"))
    small = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(small) == 2 * 7 + 3 * 6 + 2
    width, height = 50, 27
    span = image_span(model.config, width, height)
    ids = torch.tensor([1, *[7] * span.tokens, *range(10, 20)])
    views = torch.randn(span.views, 3, SIDE, SIDE)
    with torch.no_grad():
        before = model(ids, images=views, spans=[span])
        save_model(model, tmp_path / "ours")
        given = {"pixel_values": views[None] if tiled else views}
        given |= {"image_sizes": torch.tensor([[height, width]])} if tiled else {}
        packed, there = load_there(tmp_path / "ours")
        torch.testing.assert_close(before, there(input_ids=ids[None], **given).logits[0], rtol=1e-4, atol=1e-4)
        options = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        direct, _ = load_there(tmp_path / "plain", quantization_config=options)
        assert direct.keys() == packed.keys() and all(torch.equal(direct[name], packed[name]) for name in packed)
        assert torch.equal(load_model(tmp_path / "ours")(ids, images=views, spans=[span]), before)


@pytest.fixture(scope="module")
def onevision15(tmp_path_factory):
    """RICE's tower, merger and Qwen3, which transformers does not have, in float32; and its exam."""
    rice = VisionConfig(64, 100, 2, 4, 14, 14, activation="gelu", rotary=True, select_layers=(-1,))
    dense = DecoderConfig(320, 64, 128, 2, 4, 2, 16, qk_norm=True, model_type="qwen3")
    chat = ChatConfig("onevision_1_5", "", False, False, "<|image_pad|>", 5, "<|video_pad|>", 6, None, (2,))
    network = LLaVAModel(ModelConfig(rice, ProjectorConfig(merge=2), dense, ImageConfig(14, "native"), chat=chat))
    generator = torch.Generator().manual_seed(1)
    for name, p in network.named_parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.2 + ("norm" in name and name.endswith("weight"))
    folder = tmp_path_factory.mktemp("rice")
    save_model(network, folder)
    span = image_span(network.config, 84, 56)
    ids = torch.tensor([1, *[5] * span.tokens, *range(10, 20)])
    patches = torch.randn(span.height * span.width, 3, 14, 14, generator=generator)
    return folder, dict(input_ids=ids, images=patches, spans=[span])


@pytest.mark.parametrize("double", ("", "-double"))
def test_onevision_15_in_four_bits_is_saved_and_read_to_the_bit(onevision15, tmp_path, double):
    folder, exam = onevision15
    model = load_model(folder, quantize=Scheme.parse(f"nf4{double}:{EVERYWHERE}"))
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if hasattr(m, "in_features")}
    assert [name for name, kind in kinds.items() if kind != "Linear4bit"] == ["decoder.head"] and len(kinds) > 28
    with torch.no_grad():
        before = model(**exam)
        save_model(model, tmp_path / "ours")
        again = load_model(tmp_path / "ours")
        assert torch.equal(again(**exam), before)
        again.decoder.fuse()
        save_model(again, tmp_path / "fused")
        assert torch.equal(load_model(tmp_path / "fused")(**exam), before)


@pytest.mark.parametrize("options", ({}, {"compress_statistics": True}, {"blocksize": 4096}), ids=str)
def test_onevision_15_as_bitsandbytes_quantises_it(bnb, onevision15, tmp_path, options):
    """q, k and v of the tower as the one layer of its files: read, taken apart, saved again as they were; refused where
    a block has some of both."""
    from safetensors.torch import load_file, save_file

    folder, exam = onevision15
    shutil.copytree(folder, tmp_path / "theirs")
    tensors, layers = load_file(folder / "model.safetensors"), 0
    for name in [n for n, t in tensors.items() if t.ndim == 2 and not re.search("embed|lm_head|class_pos", n)]:
        packed, state = bnb.functional.quantize_4bit(tensors[name], quant_type="nf4", **{"blocksize": 64, **options})
        tensors |= {name: packed} | {f"{name}.{part}": t for part, t in state.as_dict(packed=True).items()}
        layers += 1
    assert layers == 2 * 4 + 2 + 2 * 7
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    if "blocksize" in options:
        with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv\.weight: its q, k and v cannot be taken apart"):
            load_model(tmp_path / "theirs")
        return
    model = load_model(tmp_path / "theirs")
    with torch.no_grad():
        before, plain = model(**exam), load_model(folder)
        for name, module in model.named_modules():
            if isinstance(module, Linear4bit):
                plain.get_submodule(name).weight.data = module.dequantize(torch.float32)
        torch.testing.assert_close(before, plain(**exam), rtol=1e-4, atol=1e-4)
        save_model(model, tmp_path / "ours")
        assert torch.equal(load_model(tmp_path / "ours")(**exam), before)
    if options:  # scales of scales, 256 a group, that q, k and v share: they become plain ones
        return
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == tensors.keys() and all(torch.equal(ours[name], tensors[name]) for name in ours)


def test_experts_and_a_tower_whose_files_join_q_k_and_v_are_refused_in_a_line(tmp_path):
    experts = DecoderConfig(64, 32, 48, 1, 2, 2, 16, num_experts=4, experts_per_token=2, expert_size=32)
    with pytest.raises(UserError, match=r"^quantize: .*routed experts share one tensor; leave 'decoder' out of it$"):
        chosen_layers(LLaVAModel(ModelConfig(decoder=experts)), Scheme())
    rice = VisionConfig(64, 128, 1, 4, 14, 14, activation="gelu", rotary=True, select_layers=(-1,))
    dense = dataclasses.replace(experts, num_experts=0, qk_norm=True, model_type="qwen3")
    model = LLaVAModel(ModelConfig(rice, ProjectorConfig(merge=2), dense, ImageConfig(14, "native")))
    q = model.vision.blocks[0].attn.q
    model.vision.blocks[0].attn.q = Linear4bit.from_weight(q.weight, q.bias)
    with pytest.raises(UserError, match=r"attn\.q is in few bits, but files have q, k and v as one; keep 'vision'"):
        save_model(model, tmp_path / "m")
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(not (REAL / "bnb-4bit-golden").is_dir(), reason="no real files beside the repo (MINILLAVA_REAL)")
@pytest.mark.parametrize("name", ("nf4", "nf4-double"))
def test_golden_checkpoint_to_the_token(name):
    folder = REAL / "bnb-4bit-golden" / name
    model = LLaVA.from_pretrained(folder, dtype="float32")
    model.engine.eos_ids = frozenset()  # the exam was written past the end of the answer
    for case in json.loads((folder / "exam.json").read_text()):
        images = [REAL / "llava" / image for image in case["images"]]
        answer = model.generate(case["prompt"], images, max_new_tokens=len(case["greedy"]), raw=True)
        assert answer.token_ids == case["greedy"] and answer.prompt_tokens == len(case["prompt_ids_expanded"])
        pixels = torch.stack([prepare(open_image(image), model.config.image) for image in images]) if images else None
        ids = torch.tensor(case["prompt_ids_expanded"])
        got = logits_here(model.model, ids, pixels)[-1]
        torch.testing.assert_close(got, torch.tensor(case["first_logits"]), rtol=0, atol=1e-4)


# ---- the model that ships ----


def test_nano_in_four_bits_answers_as_well_as_in_sixteen():
    """Exact answers about scenes, and about pairs of color and shape, that it never saw: within two points."""
    from minillava.synthetic import task as shapes_task

    tokenizer = load_tokenizer(NANO)
    models = [load_model(NANO, torch.bfloat16, quantize=scheme) for scheme in (None, Scheme())]
    for split, least in (("unseen", 0.85), ("held_out", 0.75)):
        asked = shapes_task.ask(split, 100, seed=3)
        with torch.inference_mode():
            right = [shapes_task.answered(model, model, tokenizer, asked) for model in models]
        sixteen, four = (sum(answers) / len(answers) for answers in right)
        assert four >= sixteen - 0.02 and sixteen > least, (split, sixteen, four)


def test_command_line(capsys):
    assert run_command("ask", ["--quantize", "nf4", "--dtype", "bfloat16", "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["text"] and fields["peak_bytes"] > 0
    assert run_command("ask", ["--quantize", "nf3"]) == 2
    assert "type 'nf3' is unknown" in capsys.readouterr().err


# ---- a model of real size ----


def random_checkpoint(folder: Path, layers: int) -> int:
    """LLaVA-1.5 7B's shapes with so many blocks, random bf16, in shards of half a GB (the
    child's peak starts from this process's); NANO's tokenizer. Returns bytes."""
    from safetensors.torch import save_file

    from minillava.checkpoints.config_json import write_config
    from minillava.checkpoints.names import to_files

    shipped = read_config(NANO)
    decoder = dataclasses.replace(DecoderConfig(), num_layers=layers)
    config = ModelConfig(decoder=decoder, chat=shipped.chat)
    with torch.device("meta"):
        shapes = to_files(dict(LLaVAModel(config).state_dict()), "hf")
    for name, values in write_config(config, "bfloat16").items():
        (folder / name).write_text(json.dumps(values))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(NANO / name, folder / name)
    pool = torch.randn(1 << 24).mul_(0.02).bfloat16()
    index, shard, size, total = {}, {}, 0, 0
    for number, (name, like) in enumerate(shapes.items()):
        n = like.numel()
        shard[name] = (
            pool.repeat(-(-n // len(pool)))[:n].view(like.shape)
            if n > len(pool)
            else pool[:n].reshape(like.shape).clone()
        )
        size += shard[name].nbytes
        if size > 5e8 or number == len(shapes) - 1:
            file = f"model-{len(set(index.values())):05d}.safetensors"
            save_file(shard, folder / file)
            index |= dict.fromkeys(shard, file)
            shard, size, total = {}, 0, total + size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


@pytest.mark.skipif("MINILLAVA_BIG" not in os.environ, reason="writes 13.5 GB: MINILLAVA_BIG=FOLDER[:BLOCKS] runs it")
def test_seven_billion_weights_load_in_less_than_six_gigabytes(tmp_path):
    """In a process of its own, peak memory by the system's count: everything in it, torch included."""
    where, _, blocks = os.environ["MINILLAVA_BIG"].partition(":")
    folder = Path(where) / "minillava-7b"
    folder.mkdir(parents=True)
    layers = int(blocks or 32)
    try:
        total = random_checkpoint(folder, layers)
        command = [sys.executable, "generate.py", "--model", folder, "--quantize", "nf4", "--dtype", "bfloat16"]
        command += ["--prompt", "what is it?", "--max-new-tokens", "1", "--json"]
        done = subprocess.run(command, cwd=NANO.parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        fields = json.loads(done.stdout)
        print(f"{layers} blocks, {total / 1e9:.2f} GB on disk: peak {fields['peak_bytes'] / 1e9:.2f} GB, {fields}")
        assert fields["peak_bytes"] < 6e9
        assert layers < 32 or total > 13e9
    finally:
        shutil.rmtree(folder)
