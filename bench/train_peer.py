"""transformers' LLaVA with PEFT's adapters and bitsandbytes' 4-bit layers, trained as bench.train_7b trains ours.

The loop is the least that the HF Trainer does: padded rows, bf16 by autocast over float32 weights where they are
trained, a loss over the supervised tokens of the whole step, clipping, the same rates. Nothing here is used elsewhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.train import padded
from minillava.checkpoints.config_json import write_config
from minillava.checkpoints.names import rename
from minillava.config import IGNORE, ModelConfig
from minillava.data.batch import Batch
from minillava.layers import lora
from minillava.layers.scheme import Scheme
from minillava.recipe import StageConfig
from minillava.training.trainer import schedule


class Spec(NamedTuple):
    """What is trained, and how."""

    config: ModelConfig
    stage: StageConfig
    scheme: Scheme | None  # of 4-bit weights


def absent(spec: Spec) -> str:
    """Why this peer cannot be built, in a line; empty if it can."""
    needed = {"transformers": True, "peft": bool(spec.stage.lora)}
    needed["bitsandbytes"] = spec.scheme is not None or spec.stage.optimizer == "adamw8bit"
    return ", ".join(f"{name} is not installed" for name, wanted in needed.items() if wanted and not find_spec(name))


def ours_of(name: str) -> str:
    """Our name of a parameter of transformers' LLaVA, PEFT's wrapping included."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    layer, adapter, key = name.partition(".lora_")
    ours = rename(f"{layer}.weight" if adapter else name, "hf_new", to_ours=True)
    if ours is None:
        raise KeyError(name)
    return ours.removesuffix("weight") + f"lora_{key[0]}" if adapter else ours


class Peer:
    """A model with the weights that `draw(our name, parameter)` gives, and its optimizer."""

    def __init__(
        self, spec: Spec, steps: int, device: torch.device, dtype: torch.dtype, draw: Callable[[str, Tensor], None],
        liger: bool = False,
    ):  # fmt: skip
        import transformers

        transformers.logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=FutureWarning)  # of names that change in its version 6
        config, stage, scheme = spec
        self.stage, self.steps, self.number = stage, steps, 0
        self.device, self.dtype = device, dtype
        self.plain_rope = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
        with torch.device(device):
            model: Any = transformers.AutoModelForImageTextToText.from_config(
                transformers.LlavaConfig.from_dict(write_config(config, "bfloat16")["config.json"]),
                dtype=dtype, attn_implementation="sdpa",
            )  # fmt: skip
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                draw(ours_of(name), parameter.requires_grad_(False))
        if scheme is not None:
            in_4_bits(model, scheme, dtype)
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llava

            apply_liger_kernel_to_llava(model=model)
        self.inner = self.model = model
        if stage.lora:
            import peft

            own = stage.lora["decoder"]
            self.model = peft.get_peft_model(model, peft.LoraConfig(
                r=own.rank, lora_alpha=int(own.alpha), lora_dropout=own.dropout,
                target_modules=r".*language_model\.layers\..*_proj",
            ))  # fmt: skip
        groups: dict[str, list[Tensor]] = {}
        adapters: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            ours = ours_of(name)
            part = ours.partition(".")[0]
            if part in stage.lr and ("lora_" in ours) == (part in stage.lora):
                parameter.data = parameter.data.float()
                groups.setdefault(part, []).append(parameter.requires_grad_(True))
                adapters |= {ours: parameter} if "lora_" in ours else {}
        lora.initialise(adapters, max(stage.seed, 0))
        self.trained = [parameter for group in groups.values() for parameter in group]
        listed = [{"params": params, "lr": 0.0, "part": part} for part, params in groups.items()]
        options: dict[str, Any] = {"betas": stage.betas, "eps": stage.eps, "weight_decay": 0.0}
        if stage.optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            self.optimizer: torch.optim.Optimizer = AdamW8bit(listed, **options)
        else:
            self.optimizer = torch.optim.AdamW(listed, fused=True, **options)
        self.model.train()

    def prepare(self, checkpointing: str, compiled: bool = False) -> None:
        """Whether activations are computed again."""
        if checkpointing == "off":
            self.inner.gradient_checkpointing_disable()
        else:
            self.inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def step(self, micros: list[Batch]) -> float:
        """One optimizer step; the mean loss over its supervised tokens."""
        whole = sum(micro.supervised for micro in micros)
        total = torch.zeros((), device=self.device)
        for micro in micros:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                loss = self.model(**self.padded(micro), use_cache=False).loss * (micro.supervised / whole)
            if loss.requires_grad:
                loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.trained, self.stage.clip)
        factor = schedule(self.stage, self.number, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.lr[group["part"]] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1
        return total.item()

    def padded(self, micro: Batch) -> dict[str, Tensor]:
        rows: list[dict[str, Any]] = [
            {"input_ids": micro.ids_T[a:b].tolist(), "labels": micro.labels_T[a:b].tolist(), "pixel_values": None}
            for a, b in pairwise(micro.cu_seqlens)
        ]
        assert all(row["labels"][0] == IGNORE for row in rows)
        rows[0]["pixel_values"] = micro.pixels_NCHW  # they go to their places in the order of the placeholders
        moved = {key: value.to(self.device, non_blocking=True) for key, value in padded(rows).items()}
        if "pixel_values" in moved:
            moved["pixel_values"] = moved["pixel_values"].to(self.dtype)
        return moved

    def close(self) -> None:
        """Take back what Liger put into transformers' module for all models."""
        import transformers

        transformers.models.llama.modeling_llama.apply_rotary_pos_emb = self.plain_rope


def in_4_bits(model: nn.Module, scheme: Scheme, dtype: torch.dtype) -> None:
    """The decoder's linear layers as bitsandbytes', as transformers puts them there when it loads."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "language_model.layers" in name:
            small: Any = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, device="meta",
                compress_statistics=scheme.double, quant_type=scheme.quant_type,
            )  # fmt: skip
            weight: Any = bnb.nn.Params4bit(
                layer.weight.data, requires_grad=False, compress_statistics=scheme.double,
                quant_type=scheme.quant_type, blocksize=scheme.blocksize,
            )  # fmt: skip
            small.weight = weight.to(layer.weight.device)
            model.set_submodule(name, small)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT asks for it
