"""Adapters with every option of PEFT's LoraConfig over a checkpoint: PEFT's logits, or a line that names the option."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from helpers import ROOT, load_model, logits, tiny_config

from minillava.checkpoints import adapters as peft_files
from minillava.checkpoints.checkpoint import Checkpoint
from minillava.checkpoints.save import save_model
from minillava.checkpoints.tensor_files import inspect
from minillava.config import DecoderConfig
from minillava.errors import UserError
from minillava.llava import LLaVAModel

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")
LINEARS = ["q_proj", "down_proj"]
ROWS = [45, 30, 38]  # of tokens in the prompt


@pytest.fixture(scope="module")
def bases(tiny_tokenizer, tmp_path_factory):
    """Checkpoints whose head is their own, and whose head is the embedding."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("untied", "tied"):
        sizes = (tiny_tokenizer.vocab_size, 32, 48, 2, 4, 2, 8)
        decoder = DecoderConfig(*sizes, max_positions=200, tie_embeddings=name == "tied")
        model = LLaVAModel(tiny_config(tiny_tokenizer, decoder))
        model.init_weights(seed=2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.ndim > 1 else 1)
        save_model(model, folder / name, tiny_tokenizer)
    return folder


@pytest.fixture
def both(bases, tmp_path, prompt):
    """What PEFT's logits are with such adapters, their folder written; what ours are."""
    import transformers

    ids, pixels = prompt

    def there(base="untied", name="default", **options):
        theirs = transformers.LlavaForConditionalGeneration.from_pretrained(bases / base, dtype=torch.float32)
        torch.manual_seed(0)
        options = {"r": 4, "target_modules": LINEARS, "init_lora_weights": False} | options
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(**options), adapter_name=name).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in (p for p in theirs.parameters() if p.requires_grad):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        theirs.save_pretrained(tmp_path / "adapter")
        with torch.no_grad():
            return theirs(input_ids=ids[None], pixel_values=pixels).logits[0], theirs

    def here(folder, base=None):
        return logits(load_model(folder, base=base), prompt)

    return there, here, tmp_path / "adapter"


LOADS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"alpha_pattern": {"down_proj": 16}, "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2}},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": r".*vision_tower.*"},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "dropout": {"lora_dropout": 0.1},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "dora": {"use_dora": True},
    "dora everywhere": {"use_dora": True, "target_modules": "all-linear"},
    "lora bias": {"lora_bias": True, "target_modules": ["fc1", "linear_1"]},
    "all biases": {"bias": "all", "target_modules": ["fc1", "q_proj", "linear_1"]},
    "biases of adapted": {"bias": "lora_only", "target_modules": ["fc2", "linear_2"]},
    "projector whole": {"modules_to_save": ["multi_modal_projector"]},
    "embedding and head whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "a linear layer whole": {"modules_to_save": ["linear_1"]},
    "norms whole": {"modules_to_save": ["input_layernorm", "layer_norm2", "norm"]},
    "tower whole": {"modules_to_save": ["vision_tower"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "patches": {"target_modules": ["patch_embedding", "q_proj"]},
    "dora of patches": {"target_modules": ["patch_embedding"], "use_dora": True},
    "tokens": {"trainable_token_indices": ROWS},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": [50, 30]}},
    "an own name": {"name": "helper", "modules_to_save": ["linear_2"]},
    "tied: tokens": {"base": "tied", "trainable_token_indices": ROWS},
    "tied: the rest": {"base": "tied", "modules_to_save": ["multi_modal_projector"], "use_dora": True},
    "tied on purpose": {"base": "tied", "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", LOADS)
def test_the_logits_are_pefts(both, bases, prompt, kind):
    there, here, folder = both
    wanted, _ = there(**LOADS[kind])
    if name := LOADS[kind].get("name"):  # PEFT keeps it in a folder of that name
        folder = folder / name
    assert (here(folder) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    base = bases / LOADS[kind].get("base", "untied")
    plain = logits(load_model(base), prompt)
    assert (plain - wanted).abs().max() > 0.02 * wanted.abs().max()  # it makes a difference
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone"}))
    with pytest.raises(UserError, match="gone"):
        here(folder)
    shown = "\n".join(Checkpoint.open(folder).describe())
    assert "is         LoRA adapters of a LLaVA\n" in shown and "loads      no: " in shown
    assert "loads      yes" in "\n".join(Checkpoint.open(folder, base).describe())
    assert (here(folder, base) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_names_that_a_user_chose(both):
    """A state dict saved by hand has the adapter's name in its names."""
    there, here, folder = both
    wanted, theirs = there(name="helper", modules_to_save=["multi_modal_projector"], trainable_token_indices=ROWS)
    state = {n: t.contiguous() for n, t in theirs.state_dict().items() if "helper" in n}
    shutil.copy(folder / "helper" / "adapter_config.json", folder)
    safetensors.save_file(state, folder / "adapter_model.safetensors")
    assert (here(folder) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    other = {n.replace("helper", "second"): t.clone() for n, t in state.items()}
    safetensors.save_file(state | other, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds the adapters helper and second; keep one"):
        here(folder)


@pytest.mark.parametrize("start", ["pissa", "olora", "mica"])
def test_what_belongs_to_another_base_is_refused(both, start):
    there, here, folder = both
    there(init_lora_weights=start)
    with pytest.raises(UserError, match=f"is not plain LoRA: init_lora_weights '{start}' changed the base"):
        here(folder)


REFUSED = {
    "init_lora_weights": ("pissa_niter_4", "corda", "loftq", "lora_ga", 1, ["gaussian"]),
    "peft_type": ("LOHA", "VERA", "PROMPT_TUNING", None),
    "lora_alpha": ("8", float("nan"), None, True),
    "alora_invocation_tokens": ([5, 6],),
    "layer_replication": ([[0, 2], [1, 3]],),
    "target_parameters": (["mlp.experts.gate_up_proj"],),
    "use_qalora": (True,),
    "use_bdlora": ({"nblocks": 2},),
    "arrow_config": ({"top_k": 3},),
    "kasa_config": ({"beta": 1.0},),
    "velora_config": ({"num_groups": 4},),
    "monteclora_config": ({"num_samples": 2},),
    "megatron_config": ({"tensor_parallel": 2},),
    "an_option_of_tomorrow": (True, 3, "x"),
}


def test_options_that_change_more_are_refused_by_name(both):
    there, here, folder = both
    there()
    config = json.loads((folder / "adapter_config.json").read_text())
    for option, values in REFUSED.items():
        for value in values:
            (folder / "adapter_config.json").write_text(json.dumps(config | {option: value}))
            with pytest.raises(UserError, match=option.removeprefix("lora_")) as error:
                here(folder)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(("options", "message"), [
    ({"modules_to_save": ["embed_tokens"]}, "trains decoder.embed.weight apart from the head"),
    ({"target_modules": ["embed_tokens"]}, "trains decoder.embed.weight apart from the head"),
    ({"target_modules": ["lm_head"]}, "decoder.head.weight, which this model does not have"),
    ({"modules_to_save": ["lm_head"]}, "trains decoder.head.weight apart from"),
])  # fmt: skip
def test_a_head_that_is_the_embedding_does_not_learn_apart(both, options, message):
    there, here, folder = both
    there("tied", **options)
    with pytest.raises(UserError, match=message):
        here(folder)


def test_every_tensor_is_used_or_refused(both):
    there, here, folder = both
    there(use_dora=True)
    file = folder / "adapter_model.safetensors"
    state = safetensors.load_file(file)
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    for broken, message in (
        (state | {"base_model.model.model.strange.weight": torch.ones(2)}, "extra: model.strange.weight"),
        ({n: t for n, t in state.items() if n != f"{name}.lora_A.weight"}, "q_proj has no partner"),
        ({n: t for n, t in state.items() if n != f"{name}.lora_magnitude_vector"}, "has no lora_magnitude_vector"),
        (state | {f"{name}.lora_magnitude_vector": torch.ones(3)}, r"do not fit decoder\.blocks\.0\.attn\.q"),
        (state | {f"{name}.lora_A.weight": torch.ones(5, 32)}, r"do not fit decoder\.blocks\.0\.attn\.q"),
        (state | {f"{name}.lora_A.weight": torch.full((4, 32), torch.nan)}, "values that are not finite"),
        (state | {f"{name}.lora_A.default.weight": torch.ones(4, 32)}, "A twice"),
        (state | {f"{name}.lora_B.bias": torch.ones(32)}, r"adapts decoder\.blocks\.0\.attn\.q\.bias"),
        (state | {"base_model.model.lm_head.token_adapter.trainable_tokens_delta": torch.ones(1, 32)}, "which rows"),
    ):
        safetensors.save_file(broken, file)
        with pytest.raises(UserError, match=message):
            here(folder)


def test_q_k_and_v_that_files_have_as_one(tmp_path):
    """Each of RICE's three gets its share of the adapter of their common layer."""
    found = peft_files.Adapters(tmp_path, "", "onevision_1_5_tree", {}, {})
    A, B = torch.randn(2, 6), torch.randn(12, 2)
    safetensors.save_file({"A": A, "B": B}, tmp_path / "t.safetensors")
    peft_files._add_pair(found, "vision.blocks.0.attn.qkv.weight", inspect(tmp_path / "t.safetensors"), 0.5)
    weights = {f"vision.blocks.0.attn.{part}.weight": torch.ones(4, 6) for part in "qkv"}
    found.check({name: (4, 6) for name in weights}, False)
    joined = torch.cat([dict(found.changed(weights))[name] for name in weights])
    torch.testing.assert_close(joined, 1 + 0.5 * (B @ A))


def test_the_table_has_every_option():
    """docs/adapters.md says of each field of LoraConfig what becomes of it, and says it as the code does."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (loads|refused)", (ROOT / "docs" / "adapters.md").read_text(), re.M))
    assert rows.keys() == {field.name for field in dataclasses.fields(peft.LoraConfig)}
    read = {*peft_files.READ, *peft_files.SILENT}
    assert {name for name, what in rows.items() if what == "loads"} == read & rows.keys() == read
