"""Engines for CPUs as peers of a LLaMA's decoder: OpenVINO GenAI, onnxruntime-genai and CTranslate2, where installed.

Each makes its own model of the same weights from a folder that transformers reads, and answers token ids alone. What is
told of each: OpenVINO and onnxruntime round activations to 8 bits too, CTranslate2 by a scale for each row; OpenVINO
keeps keys and values as KV_CACHE says. Prefix caches are off, and callers change the ids from call to call.
Versions that worked: openvino-genai 2026.4.1 with optimum-intel 2.2, onnxruntime-genai 0.18, ctranslate2 4.8.5.
"""

from __future__ import annotations

import itertools
import json
import string
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from minillava.decoder import Decoder

KV_CACHE, GROUP = "u8", "32"  # OpenVINO's precision of keys and values, and inputs that share a scale
Ask = Callable[[list[int], int, int], dict[str, float]]  # ids, rows, new tokens -> first_s, token_s, first_id
PEERS = {  # name: packages, what makes and opens it
    "OpenVINO int4": ("openvino_genai optimum.intel", lambda text: open_openvino(convert_openvino(text, "int4"))),
    "OpenVINO int8": ("openvino_genai optimum.intel", lambda text: open_openvino(convert_openvino(text, "int8"))),
    "onnxruntime-genai int4": ("onnxruntime_genai onnx_ir", lambda text: _onnxruntime(text)),
    "CTranslate2 int8": ("ctranslate2", lambda text: _ctranslate2(text)),
}


def absent(name: str) -> str | None:
    """Why this engine is not among the peers; None if it is."""
    missing = [package for package in PEERS[name][0].split() if not _there(package)]
    return f"{name} left out: {', '.join(missing)} not installed" if missing else None


def _there(package: str) -> bool:
    outer = package.partition(".")[0]
    return find_spec(outer) is not None and find_spec(package) is not None


def open_peer(name: str, text: Path) -> Ask:
    """The engine with the model in `text` (see `write_text`), made first; files go beside that folder."""
    return PEERS[name][1](text)


def write_text(decoder: Decoder, folder: Path) -> None:
    """The decoder alone as transformers' LlamaForCausalLM, with a tokenizer of made-up words that engines ask for."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    c, names = decoder.config, {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    weights = {"model.embed_tokens": decoder.embed, "model.norm": decoder.norm, "lm_head": decoder.head}
    for i, block in enumerate(decoder.blocks):
        at = f"model.layers.{i}."
        weights |= {at + theirs: getattr(block, ours) for ours, theirs in names.items()}
        weights |= {f"{at}self_attn.{part[0]}_proj": getattr(block.attn, part) for part in ("q", "k", "v", "out")}
        weights |= {f"{at}mlp.{part}_proj": getattr(block.mlp, part) for part in ("gate", "up", "down")}
    folder.mkdir(parents=True)
    tensors = {f"{name}.weight": module.weight.detach().contiguous() for name, module in weights.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_positions, rms_norm_eps=c.norm_eps, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())  # names that older readers know
    (folder / "config.json").write_text(json.dumps(values | {"rope_theta": c.rope_theta, "torch_dtype": "bfloat16"}))
    made = ("".join(word) for word in itertools.product(string.ascii_lowercase, repeat=4))
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *itertools.islice(made, c.vocab_size),
    ]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words[: c.vocab_size])}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def _result(times: list[float], first_id: int) -> dict[str, float]:
    """`times`: when the call began and when each step of tokens came."""
    return {
        "first_s": times[1] - times[0],
        "token_s": median(b - a for a, b in pairwise(times[1:])),
        "first_id": first_id,
    }


def convert_openvino(text: Path, kind: str) -> Path:
    """The folder of OpenVINO's model, made unless it is there."""
    import openvino_tokenizers
    from openvino import save_model
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    folder = text.with_name(f"openvino-{kind}")
    if (folder / "openvino_detokenizer.xml").exists():
        return folder
    how = {"int4": {"bits": 4, "sym": True, "group_size": 64}, "int8": {"bits": 8}}[kind]
    config = OVWeightQuantizationConfig(**how)
    OVModelForCausalLM.from_pretrained(text, export=True, compile=False, quantization_config=config).save_pretrained(
        folder
    )
    tokenizer = AutoTokenizer.from_pretrained(text)
    parts = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True)
    for part, name in zip(parts, ("tokenizer", "detokenizer")):
        save_model(part, folder / f"openvino_{name}.xml")
    return folder


def open_openvino(folder: Path) -> Ask:
    """LLMPipeline on what `convert_openvino` made, with its prefix cache off."""
    import openvino_genai as genai
    from openvino import Tensor

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens, scheduler.cache_size = False, 8192, 1
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "KV_CACHE_PRECISION": KV_CACHE}
    options |= {"DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP, "scheduler_config": scheduler}
    pipeline = genai.LLMPipeline(str(folder), "CPU", **options)

    def generate(ids: list[int], rows: int, tokens: int) -> tuple[float, int]:
        import numpy as np

        x = np.array([ids] * rows, dtype=np.int64)
        wanted = genai.GenerationConfig(
            max_new_tokens=tokens, ignore_eos=True, do_sample=False, apply_chat_template=False
        )
        began = time.perf_counter()
        found = pipeline.generate(genai.TokenizedInputs(Tensor(x), Tensor(np.ones_like(x))), wanted)
        return time.perf_counter() - began, int(found.tokens[0][0])

    def ask(ids: list[int], rows: int, tokens: int) -> dict[str, float]:
        first_s, first_id = generate(ids, rows, 1)  # with a streamer only one row could be asked
        total_s, _ = generate(ids[1:] + ids[:1], rows, tokens) if tokens > 1 else (first_s, 0)
        return {"first_s": first_s, "token_s": (total_s - first_s) / max(tokens - 1, 1), "first_id": first_id}

    return ask


def _build_onnxruntime(text: Path, folder: Path) -> None:
    options = ["int4_block_size=32", "int4_accuracy_level=4"]
    words = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(text), "-o", str(folder), "-p", "int4"]
    more = ["-e", "cpu", "-c", str(text.with_name("onnxruntime-cache")), "--extra_options", *options]
    subprocess.run([*words, *more], check=True, capture_output=True)


def _onnxruntime(text: Path) -> Ask:
    import onnxruntime_genai as genai

    folder = text.with_name("onnxruntime-int4")
    if not folder.exists():
        _build_onnxruntime(text, folder)
    model = genai.Model(str(folder))

    def ask(ids: list[int], rows: int, tokens: int) -> dict[str, float]:
        import numpy as np

        length, times = len(ids) + tokens, [time.perf_counter()]
        wanted = genai.GeneratorParams(model)
        wanted.set_search_options(max_length=length, min_length=length, batch_size=rows, do_sample=False)
        generator = genai.Generator(model, wanted)
        generator.append_tokens(np.array([ids] * rows, dtype=np.int32))
        for _ in range(tokens):
            generator.generate_next_token()
            times.append(time.perf_counter())
        return _result(times, int(generator.get_sequence(0)[len(ids)]))

    return ask


def _ctranslate2(text: Path) -> Ask:
    import ctranslate2

    folder = text.with_name("ctranslate2-int8")
    if not folder.exists():
        ctranslate2.converters.TransformersConverter(str(text)).convert(str(folder), quantization="int8")
    threads = torch.get_num_threads()
    generator = ctranslate2.Generator(str(folder), device="cpu", compute_type="int8", intra_threads=threads)
    vocabulary: list[str] = json.loads((folder / "vocabulary.json").read_text())

    def ask(ids: list[int], rows: int, tokens: int) -> dict[str, float]:
        times, found = [time.perf_counter()], list[int]()

        def hear(step: Any) -> bool:
            if step.batch_id == 0:
                times.append(time.perf_counter())
                found.append(step.token_id)
            return False

        prompts = [[vocabulary[i] for i in ids]] * rows
        limits = {"max_length": tokens, "min_length": tokens, "include_prompt_in_result": False}
        generator.generate_batch(prompts, sampling_topk=1, callback=hear, **limits)
        return _result(times, found[0])

    return ask
