"""Two processes that share a decoder answer as one does, to the token."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import LORA, ROOT, adapted, learn, tiny_config
from PIL import Image

from minillava import LLaVA
from minillava.checkpoints.adapters import save_peft
from minillava.checkpoints.checkpoint import Checkpoint
from minillava.checkpoints.save import save_model
from minillava.config import DecoderConfig
from minillava.errors import UserError
from minillava.layers import tensor_parallel
from minillava.layers.scheme import Scheme
from minillava.llava import LLaVAModel

FAMILIES = {
    "llama": {},
    "qwen2": {"num_kv_heads": 2, "qkv_bias": True, "model_type": "qwen2"},
    "qwen3": {"num_kv_heads": 2, "qk_norm": True, "tie_embeddings": True, "model_type": "qwen3"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    made = {}
    for name, how in FAMILIES.items():
        config = replace(DecoderConfig(tiny_tokenizer.vocab_size, 32, 48, 2, 4, 4, 8, max_positions=200), **how)
        model = LLaVAModel(tiny_config(tiny_tokenizer, config)).eval()
        model.init_weights(seed=0)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if p.ndim > 1:
                    p.mul_(8)
                elif key.endswith("bias"):
                    p.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(key)))
        made[name] = tmp_path_factory.mktemp(name) / "model"
        save_model(model, made[name], tiny_tokenizer)
    _, trained = adapted(model, "decoder")
    learn(trained)
    made["adapters"] = tmp_path_factory.mktemp("adapters") / "model"
    save_peft(made["adapters"], trained, {"decoder": LORA}, str(made[name]))
    return made


QUESTION = "what color is the large circle?"


def ask(folder, picture):
    """Output, errors and status of generate.py in two processes, with what torchrun tells them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "generate.py", "--model", str(folder), "--dtype", "float32", "--device", "cpu", "--json"]
    command += ["--prompt", QUESTION, "--image", str(picture), "--max-new-tokens", "24"]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [common | {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    started = [subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=-1, stderr=-1) for env in ranks]
    return [(*p.communicate(timeout=120), p.returncode) for p in started]


@pytest.mark.parametrize("name", FAMILIES)
def test_two_processes_give_the_tokens_of_one(folders, name, tmp_path):
    picture = tmp_path / "picture.png"
    Image.effect_noise((16, 16), 90).convert("RGB").save(picture)
    expected = LLaVA.from_pretrained(folders[name], "float32", "cpu").generate(QUESTION, [picture], 24).token_ids
    (first, errors, status), (second, _, other) = ask(folders[name], picture)
    assert (status, other) == (0, 0), errors
    assert second == ""  # rank 0 speaks
    assert json.loads(first)["token_ids"] == list(expected) and len(set(expected)) > 3


@pytest.mark.parametrize("name", [*FAMILIES, "adapters"])
def test_a_process_loads_its_part_alone(folders, name):
    """Of every weight, from the files: the parts of all, one behind the other, are the whole."""
    checkpoint = Checkpoint.open(folders[name])
    whole = checkpoint.load().state_dict()
    assert name != "adapters" or checkpoint.adapters is not None
    parts = [checkpoint.load(share=(rank, 2)).state_dict() for rank in range(2)]
    for key, tensor in whole.items():
        mine, other = (part[key] for part in parts)
        cut = next((dim for dim in range(tensor.ndim) if mine.shape[dim] != tensor.shape[dim]), None)
        assert torch.equal(mine if cut is None else torch.cat([mine, other], cut), tensor)
        assert mine.untyped_storage().nbytes() == mine.nbytes
        attends = key.startswith("decoder.blocks") and not key.endswith("norm.weight")
        assert (cut is not None) == attends, key
    part = LLaVA.from_pretrained(folders[name], share=(1, 2))
    assert 2 * part.engine.cache_bytes() == LLaVA.from_pretrained(folders[name]).engine.cache_bytes()
    with pytest.raises(UserError, match="has a part of the decoder"):
        part.save_pretrained(folders[name].with_name("copy"))
    with pytest.raises(UserError, match="few bits run in one process"):
        checkpoint.load(quantize=Scheme.parse("nf4"), share=(0, 2))


def test_heads_that_do_not_divide_are_one_line():
    config = DecoderConfig(num_heads=6, num_kv_heads=2, intermediate_size=48)
    with pytest.raises(UserError, match="4 processes cannot share 6 heads"):
        tensor_parallel.check(config, 4)
