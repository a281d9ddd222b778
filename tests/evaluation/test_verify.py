"""`minillava verify` finds planted faults and names their stage, against transformers; and has nothing to say of models
that are right."""

import dataclasses
import gc
import json
import shutil
import weakref

import pytest
import torch
from helpers import REAL, tiny_config
from PIL import Image
from safetensors.torch import load_file, save_file

from minillava import LLaVA, decoder, llava, visual_tokens
from minillava.checkpoints.save import save_model
from minillava.cli import run_command
from minillava.config import DecoderConfig
from minillava.evaluation.references import Own, Transformers
from minillava.evaluation.verify import verify
from minillava.layers import cache, rotary

pytest.importorskip("transformers")

QUESTION = "what color is the large circle?"
QWEN2 = dict(qkv_bias=True, model_type="qwen2", max_positions=400)
MOE = dict(qk_norm=True, num_experts=4, experts_per_token=2, expert_size=24, model_type="qwen3_moe", max_positions=400)


def picture():
    generator = torch.Generator().manual_seed(5)
    small_HWC = torch.randint(0, 256, (9, 18, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(small_HWC.numpy()).resize((90, 45), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    """Two tiny models as we save them: tiles before Qwen2, one view before experts."""
    found = {}
    for name, how in (("tiles", QWEN2), ("experts", MOE)):
        decoder = DecoderConfig(tiny_tokenizer.vocab_size, 32, 48, 3, 4, 2, 8, **how)
        config = tiny_config(tiny_tokenizer, decoder, layers=4)
        grids = dict(grids=((2, 1), (3, 1)), merge="unpad", round_unpad=True) if name == "tiles" else {}
        config = dataclasses.replace(config, layout=dataclasses.replace(config.layout, **grids))
        model = llava.LLaVAModel(config).eval()
        model.init_weights(seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if p.ndim > 1:
                    p.mul_(15 if key == "decoder.embed.weight" else 4)
                elif key.endswith("bias"):
                    p.normal_(0, 0.1, generator=generator)
        found[name] = tmp_path_factory.mktemp(name)
        save_model(model, found[name], tiny_tokenizer)
    return found


def test_a_reference_frees_its_models_with_its_last_use(folders):
    """transformers' models are large: no cycle may keep one until the garbage collector comes."""
    folder = next(iter(folders.values()))
    reference = Transformers(folder, LLaVA.from_pretrained(folder).config)
    model = weakref.ref(reference.model(torch.float32))
    gc.disable()
    try:
        del reference
        assert model() is None
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def references(folders):
    return {name: Transformers(folder, LLaVA.from_pretrained(folder).config) for name, folder in folders.items()}


def with_config(subject, part, **values):
    """The model under a config of which one part has other values."""
    config = dataclasses.replace(subject.config, **{part: dataclasses.replace(getattr(subject.config, part), **values)})
    subject.model.vision.config = config.vision
    return LLaVA(subject.model.under(config), subject.tokenizer)


def edited(folder, tmp_path, *path, value):
    """A copy whose config.json says something else at this path."""
    shutil.copytree(folder, tmp_path / "copy")
    raw = json.loads((folder / "config.json").read_text())
    at = raw
    for key in path[:-1]:
        at = at[key]
    assert at[path[-1]] != value
    at[path[-1]] = value
    (tmp_path / "copy/config.json").write_text(json.dumps(raw))
    return LLaVA.from_pretrained(tmp_path / "copy", dtype="float32")


def wrong_layer(subject, *_):
    return with_config(subject, "vision", select_layers=(-3,))


def tanh_for_erf(subject, *_):
    subject.model.projector.config = dataclasses.replace(subject.config.projector, activation="gelu_tanh")


def swapped_grids(subject, *_):
    return with_config(subject, "layout", grids=tuple((h, w) for w, h in subject.config.layout.grids))


def unpad_off_by_one(subject, folder, tmp_path, patch):
    right = visual_tokens.unpadding
    patch.setattr(visual_tokens, "unpadding", lambda *args: (right(*args)[0], right(*args)[1] + 1))


def no_q_bias(subject, *_):
    subject.model.decoder.blocks[1].attn.q.bias.data.zero_()


def bf16_frequencies(subject, folder, tmp_path, patch):
    def angles(positions_T, config):
        radians_F = rotary.angles(torch.ones(1), config)[0].bfloat16().float()
        return torch.outer(positions_T.float(), radians_F)

    patch.setattr(decoder, "angles", angles)


def corrupted_tensor(subject, folder, tmp_path, patch):
    """One bit of one number."""
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy/model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("layers.2.mlp.down_proj.weight"))
    state[name].view(torch.int32)[3, 5] ^= 1 << 24
    save_file(state, path, metadata={"format": "pt"})
    return LLaVA.from_pretrained(tmp_path / "copy", dtype="float32")


def wrong_eps(subject, folder, tmp_path, patch):
    return edited(folder, tmp_path, "text_config", "rms_norm_eps", value=1e-6)


def wrong_mean(subject, *_):
    return with_config(subject, "image", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def class_token_kept(subject, *_):
    return with_config(subject, "vision", keep_class_token=True)


def swapped_experts(subject, *_):
    up_EID = subject.model.decoder.blocks[1].mlp.up.data
    up_EID[[0, 1]] = up_EID[[1, 0]]


def wrong_theta(subject, folder, tmp_path, patch):
    raw = json.loads((folder / "config.json").read_text())["text_config"]
    inner = ("rope_parameters",) if "rope_parameters" in raw else ()
    return edited(folder, tmp_path, "text_config", *inner, "rope_theta", value=11000.0)


def decode_step_forgets(subject, folder, tmp_path, patch):
    """Not one of the twelve: the newest token is hidden from a decode step."""
    right = cache.decode_attention
    patch.setattr(cache, "decode_attention", lambda q, k, v, seen: right(q, k, v, seen - 1))


FAULTS = [
    (wrong_layer, "tiles", "vision features"),
    (tanh_for_erf, "tiles", "projector"),
    (swapped_grids, "tiles", "pixels"),
    (unpad_off_by_one, "tiles", "visual tokens"),
    (no_q_bias, "tiles", "decoder layer 1"),
    (bf16_frequencies, "tiles", "rotary embedding"),
    (corrupted_tensor, "tiles", "decoder layer 2"),
    (wrong_eps, "tiles", "decoder layer 0"),
    (wrong_mean, "tiles", "pixels"),
    (class_token_kept, "experts", "vision features"),
    (swapped_experts, "experts", "decoder layer 1"),
    (wrong_theta, "experts", "rotary embedding"),
    (decode_step_forgets, "tiles", "whole model"),
]


@pytest.mark.parametrize("fault,name,stage", FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_a_planted_fault_is_found_and_its_stage_named(fault, name, stage, folders, references, tmp_path, monkeypatch):
    subject = LLaVA.from_pretrained(folders[name], dtype="float32")
    subject = fault(subject, folders[name], tmp_path, monkeypatch) or subject
    report = verify(subject, references[name], QUESTION, picture(), tokens=4)
    assert report.first is not None and report.first.name == stage, report.stages


def test_our_own_plain_code_does_not_excuse_a_decode_step(folders, tmp_path, monkeypatch):
    """Reference and model share the faulty code here; the reference's own single pass tells."""
    decode_step_forgets(None, None, tmp_path, monkeypatch)
    subject = LLaVA.from_pretrained(folders["tiles"], dtype="float32")
    report = verify(subject, Own(folders["tiles"]), QUESTION, picture(), tokens=4)
    assert report.first is not None and report.first.name == "decode steps, exactly"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiles", "experts"])
def test_a_right_model_has_a_clean_bill(name, dtype, folders, references):
    report = verify(LLaVA.from_pretrained(folders[name], dtype), references[name], QUESTION, picture(), tokens=4)
    assert report.first is None, report.stages
    names = [stage.name for stage in report.stages]
    layers = [f"decoder layer {i}" for i in range(3)]
    assert names[:3] == ["prompt", "pixels", "vision embedding"] and names[-6:] == [
        *layers, "logits", "whole model", "answer"
    ]  # fmt: skip


GOLDEN = ["onevision-1.5-golden", *(f"onevision-2-golden/{name}" for name in ("p14m2", "p16m3", "moe-p14m2")),
          *(f"originals-golden/{name}-original" for name in ("next", "onevision")),
          *(f"bnb-4bit-golden/nf4{double}" for double in ("", "-double"))]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "originals-golden").is_dir(), reason="real/originals-golden is not there")
@pytest.mark.parametrize("how", [(), ("--dtype", "bfloat16"), ("--quantize", "nf4", "--dtype", "bfloat16")], ids=str)
@pytest.mark.parametrize("folder", GOLDEN)
def test_golden_folders_have_a_clean_bill(folder, how, capsys):
    """Files of the original and of Hugging Face's layout, also put into NF4 here or stored so."""
    image = str(REAL / "llava/dog.jpg")
    status = run_command("verify", [str(REAL / folder), "--image", image, *how, "--json"])
    if "moe" in folder and "nf4" in how:
        assert status == 2 and "routed experts" in capsys.readouterr().err
        return
    report = json.loads(capsys.readouterr().out)
    assert status == 0 and report["first"] is None


def test_the_command_reports_and_draws(folders, tmp_path, capsys):
    """Weights in NF4 within half a step of the codes; another checkpoint than the right one departs, with status 1."""
    picture().save(tmp_path / "picture.png")
    given = ["--image", str(tmp_path / "picture.png"), "--tokens", "4"]
    plot = tmp_path / "errors.png"
    assert run_command("verify", [str(folders["tiles"]), "--quantize", "nf4", "--plot", str(plot), *given]) == 0
    assert "weights in few bits" in capsys.readouterr().out and Image.open(plot).size[0] > 500
    subject = LLaVA.from_pretrained(folders["tiles"], dtype="float32")
    no_q_bias(subject)
    subject.save_pretrained(tmp_path / "other")
    assert run_command("verify", [str(tmp_path / "other"), "--against", str(folders["tiles"]), "--json", *given]) == 1
    assert json.loads(capsys.readouterr().out)["first"] == "decoder layer 1"
    assert run_command("verify", [str(folders["tiles"]), "--against", "transformers", "--quantize", "nf4"]) == 2
    assert "leave one of it and --quantize out" in capsys.readouterr().err


def test_quantised_weights_that_are_not_the_files_are_found(folders):
    from minillava.evaluation.verify import Report, compare_weights

    subject = LLaVA.from_pretrained(folders["tiles"], dtype="float32", quantize="nf4")
    subject.model.decoder.blocks[2].mlp.down.absmax[3] *= 1.5
    report = Report("", "", "", "", "nf4")
    compare_weights(report, subject, folders["tiles"], None)
    assert report.first is not None and report.first.error > 0.3 > report.first.allowed
    report = verify(subject, Own(folders["tiles"], quantize="nf4"), QUESTION, picture(), tokens=2)
    assert report.first is not None and report.first.name == "decoder layer 2"


def test_four_bit_checkpoints_are_not_judged_by_transformers(folders, tmp_path, capsys):
    LLaVA.from_pretrained(folders["tiles"], dtype="float32", quantize="nf4").save_pretrained(tmp_path / "nf4")
    assert run_command("verify", [str(tmp_path / "nf4"), "--against", "transformers"]) == 2
    assert "leave --against transformers out" in capsys.readouterr().err
