"""Damaged checkpoints and adapters, file by file and key by key."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bad.contents import LFS, NO_JSON, Case, change, checkpoint, put, tensors, without
from bad.flags import FILES
from minillava.checkpoints.hub import NANO

MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
WRONG_NUMBERS = ("x", -1, 0, 1.5, [], {}, True, 10**30)
CONFIG_VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            f"text_config.{key}"
            for key in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
            )
        ),
        WRONG_NUMBERS,
    ),
    **dict.fromkeys(
        (
            f"vision_config.{key}"
            for key in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "image_size",
                "patch_size",
            )
        ),
        WRONG_NUMBERS,
    ),
    "text_config.rms_norm_eps": ("x", -1, 0, [], True, float("nan")),
    "vision_config.layer_norm_eps": ("x", -1, 0, [], True),
    "text_config.rope_parameters": (
        "x",
        7,
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_theta": "x"},
        {"rope_theta": -1},
    ),
    "text_config.model_type": ("gpt2", 7, []),
    "vision_config.model_type": ("vit_mae", 7, []),
    "text_config.hidden_act": ("relu", 7, []),
    "vision_config.hidden_act": ("relu", 7, []),
    "model_type": ("bert", 7, None, []),
    "text_config": ("x", 7, []),
    "vision_config": ("x", 7, []),
    "vision_feature_layer": ("x", 99, -99, 1.5, {}),
    "vision_feature_select_strategy": ("best", 7, []),
    "projector_hidden_act": ("relu", 7),
    "multimodal_projector_bias": ("x", 7),
    "minillava": (
        "x",
        7,
        [],
        {"chat": 7},
        {"chat": {"template": "vicunna"}},
        {"layout": {"merge": "best"}},
        {"layout": []},
    ),
    "quantization_config": (
        "nf4",
        7,
        [1],
        {"quant_method": "gptq"},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes"},
    ),
}
PIXEL_VALUES: dict[str, tuple[Any, ...]] = {
    "image_mean": ("x", 0.5, [0.5], ["x"] * 3),
    "image_std": ("x", 7, ["x"] * 3, [1, 1]),
    "size": ("x", [], {"shortest_edge": 0}, {"shortest_edge": "x"}, {"height": 64, "width": 32}),
    "crop_size": ("x", {"height": 32, "width": 32}),
    "rescale_factor": ("x", 1, 0),
    "image_processor_type": (7,),
    "resample": ("x", 99),
}


def checkpoints() -> Iterator[Case]:
    def case(name: str, names: tuple[str, ...], *edits: Callable[[Path], None], words: tuple[str, ...] = ()) -> Case:
        words = words or ("ask", "--model", "m", "--prompt", "What?", "--max-new-tokens", "1")
        return Case(f"model {name}", words, names, {"m": checkpoint(*edits)})

    for file in MODEL_FILES:
        for kind, data in NO_JSON.items():
            yield case(f"{file} {kind}", (file,), put(file, data))
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        yield case(f"without {file}", (file.split(".")[0],), without(file))
        yield case(f"{file} is a folder", (file,), without(file), lambda folder, file=file: (folder / file).mkdir())
    for key, values in CONFIG_VALUES.items():
        for value in values:
            named = "|".join((key.split(".")[-1], *(value if isinstance(value, dict) else ())))
            yield case(f"config.json {key} {value!r:.40}", (named,), change("config.json", key, value))
    for key, values in PIXEL_VALUES.items():
        for value in values:
            named = ("m", f"{key}|{key.removeprefix('image_')}|size|image processor")
            yield case(
                f"preprocessor_config.json {key} {value!r:.20}", named, change("preprocessor_config.json", key, value)
            )
    for kind, data in {
        "empty": b"",
        "pointer": LFS.encode(),
        "page": b"<!DOCTYPE html>",
        "header too long": struct.pack("<Q", 2**60) + b"{}",
        "header no JSON": struct.pack("<Q", 4) + b"{{{{",
        "cut": (NANO / "model.safetensors").read_bytes()[:100_000],
        "zeros": bytes(1000),
    }.items():
        yield case(f"weights {kind}", ("model.safetensors",), put("model.safetensors", data))
    name = "language_model.model.norm.weight"
    for kind, edit in {
        "missing": lambda t: t.pop(name),
        "of another shape": lambda t: t.update({name: t[name][:5].clone()}),
        "of another name": lambda t: t.update({"odd.weight": t[name].clone()}),
        "of whole numbers": lambda t: t.update({name: t[name].int()}),
        "not finite": lambda t: t[name].fill_(float("nan")),
    }.items():
        yield case(f"tensor {kind}", ("odd.weight" if "name" in kind else "norm",), tensors(edit))
    for kind, text in {
        "cut": "{% if x",
        "raises": "{{ raise_exception('no') }}",
        "unknown filter": "{{ x | f }}",
    }.items():
        jinja = change("config.json", "minillava.chat", {"template": "jinja"})
        yield case(f"chat template {kind}", ("template",), put("chat_template.jinja", text), jinja)
    for kind, data in NO_JSON.items():
        yield Case(
            f"adapter_config.json {kind}",
            ("ask", "--model", "a", "--base", "nano", "--prompt", "x"),
            ("adapter_config.json|a: ",),
            {"a/adapter_config.json": data, "a/adapter_model.safetensors": b""},
        )
    lora = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "nano",
    }
    for key, value in (
        ("r", 0),
        ("r", "x"),
        ("lora_alpha", "x"),
        ("peft_type", "IA3"),
        ("target_modules", 7),
        ("r", None),
        ("lora_alpha", -1),
    ):
        yield Case(
            f"adapter {key} {value!r}",
            ("ask", "--model", "a", "--base", "nano", "--prompt", "x"),
            (f"{key}|LORA|adapter_model",),
            {"a/adapter_config.json": lora | {key: value}, "a/adapter_model.safetensors": b""},
        )
    yield Case(
        "adapter weights missing",
        ("ask", "--model", "a", "--base", "nano", "--prompt", "x"),
        ("a",),
        {"a/adapter_config.json": lora},
    )
    for kind, words in {
        "inspect": ("inspect", "m"),
        "verify": ("verify", "m"),
        "serve": ("serve", "--model", "m"),
        "plan": ("plan", "m"),
        "export": ("export", "--model", "m", "--gguf", "out"),
        "jobs": ("jobs", "rows.jsonl", "out.jsonl", "--model", "m"),
        "chat": ("chat", "--model", "m"),
    }.items():
        for what, data in {"a file": b"weights", "empty": None}.items():
            files = FILES["rows"] | {"m": data if data else lambda path: path.mkdir()}
            yield Case(f"model {what} {kind}", words, ("m",), files)
        if kind != "inspect":  # which says so and goes on
            files = FILES["rows"] | {"m": checkpoint(put("config.json", b"{"))}
            yield Case(f"model config {kind}", words, ("config.json",), files)
