"""Which settings fit into so much memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from minillava.checkpoints.checkpoint import Checkpoint
from minillava.checkpoints.hub import NANO, resolve
from minillava.config import DecoderConfig, ImageConfig, LoRAConfig, ModelConfig, VisionConfig
from minillava.recipe import Recipe, StageConfig, with_tables
from minillava.training.build import TOKENIZERS, new_config
from minillava.training.cards import Card
from minillava.training.plan import Plan

SIZES = (16, 24, 40, 80, 141)  # GB of the cards that people have


# Parts that the recipes download, so that a recipe can be planned before they are there.
KNOWN: dict[str, Any] = {
    "openai/clip-vit-large-patch14-336": (VisionConfig(), ImageConfig()),
    "openai/clip-vit-large-patch14": (VisionConfig(image_size=224), ImageConfig(224)),
    **{f"lmsys/vicuna-7b-v1.{n}": DecoderConfig() for n in (3, 5)},
    **{f"lmsys/vicuna-13b-v1.{n}": DecoderConfig(32000, 5120, 13824, 40, 40, 40) for n in (3, 5)},
}


def recipe_model(recipe: Recipe, find: Callable[[str], Recipe]) -> tuple[ModelConfig, torch.dtype]:
    """The config of a recipe's model and the dtype that its run starts in, from config.json alone.

    A base in the folder of a run that was not made yet is what that recipe (`find` by its name) makes. Raises UserError
    for parts that are not there and not known.
    """
    wanted = recipe.model
    if wanted.base:
        parts = Path(wanted.base).parts
        if not Path(wanted.base).is_dir() and parts[:1] == ("runs",):
            return recipe_model(find(parts[1]), find)[0], torch.bfloat16
        checkpoint = Checkpoint(resolve(wanted.base, weights=False))
        raws = (checkpoint.raw, checkpoint.raw.get("text_config") or {})
        name = next((raw[key] for raw in raws for key in ("dtype", "torch_dtype") if raw.get(key)), "")
        held = torch.float32 if name == "float32" else torch.bfloat16  # also for one in other 16 bits
        return with_tables(checkpoint.config, wanted.tables, "model"), held
    named = {"vision_from": wanted.vision_from, "decoder_from": wanted.decoder_from}
    known = {key: KNOWN[name] for key, name in named.items() if name in KNOWN}
    usual = Checkpoint(NANO).config if wanted.tokenizer in TOKENIZERS else ModelConfig()
    vocab = usual.decoder.vocab_size
    tokenizer: Any = SimpleNamespace(vocab_size=vocab, token_id=lambda _: None, bos_id=1, eos_id=2, pad_id=None)
    tables = {name: dict(table) for name, table in wanted.tables.items()}
    if "vision_from" in known:
        vision, image = (dataclasses.asdict(part) for part in known["vision_from"])
        tables |= {"vision": vision | tables["vision"], "image": image | tables["image"]}
    if "decoder_from" in known:
        tables["decoder"] = dataclasses.asdict(known["decoder_from"]) | tables["decoder"]
    for name in [name for key, name in named.items() if name and key not in known]:
        resolve(name, weights=False)
    rest = replace(wanted, **tables, **dict.fromkeys(known, ""))  # type: ignore[arg-type]
    return new_config(rest, tokenizer), torch.bfloat16 if any(named.values()) else torch.float32


# ---- what fits ----


def settings(stage: StageConfig, quantize: str) -> Iterator[tuple[str, StageConfig, str]]:
    """Ways to train a stage, each with less memory than the one before: (what changes, stage, quantize)."""
    yield "as it is", stage, quantize
    if stage.checkpointing != "full":
        stage = replace(stage, checkpointing="full")
        yield "checkpointing full", stage, quantize
    if stage.optimizer == "adamw" and "decoder" in stage.lr and "decoder" not in stage.lora:
        yield "checkpointing full, adamw8bit", replace(stage, optimizer="adamw8bit"), quantize
    if "decoder" in stage.lr:
        if "decoder" not in stage.lora:
            stage = replace(stage, lora={**stage.lora, "decoder": LoRAConfig()})
            yield "checkpointing full, LoRA of rank 128", stage, quantize
        if not quantize:
            yield "checkpointing full, LoRA, nf4-double", stage, "nf4-double"
    elif not quantize and "vision" not in stage.lr:
        yield "checkpointing full, nf4-double", stage, "nf4-double"


def fit_training(
    plan: Callable[[StageConfig, str], Plan], stage: StageConfig, quantize: str
) -> Iterator[tuple[int, str, int, Plan | None]]:
    """For each of SIZES (GB, settings, micro-batch, its plan): the first settings that fit, "" where none do."""
    ways = list(settings(stage, quantize))

    @functools.cache
    def planned(way: int, micro: int) -> Plan:
        _, changed, bits = ways[way]
        return plan(replace(changed, micro_batch=micro), bits)

    for size in SIZES:
        room = Card("", size, 0, 0).usable
        way = next((n for n in range(len(ways)) if planned(n, 1).peak <= room), None)
        if way is None:
            yield size, "", 0, None
            continue
        micro = 1
        while 2 * micro <= stage.batch_size and planned(way, 2 * micro).peak <= room:
            micro *= 2
        yield size, ways[way][0], micro, planned(way, micro)


def fit_answer(plan: Callable[[str, int], Plan]) -> Iterator[tuple[int, str, int, Plan | None]]:
    """For each of SIZES the widest weights that fit, and how many answers at a time."""
    found = {(bits, rows): plan(bits, rows) for bits in ("", "int8", "nf4") for rows in (1, 2)}
    for size in SIZES:
        room = Card("", size, 0, 0).usable
        bits = next((b for b in ("", "int8", "nf4") if found[b, 1].peak <= room), None)
        if bits is None:
            yield size, "", 0, None
            continue
        each = max(1, found[bits, 2].peak - found[bits, 1].peak)
        yield size, bits or "16 bits", 1 + int((room - found[bits, 1].peak) // each), found[bits, 1]
