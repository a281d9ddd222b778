"""python -m bench.bytes_a_token [FOLDER]: what a decode step of a 7B moves and launches on an H200, and what time that
would take at least by the assumptions below. A model, no measurement: no card is asked.

Bytes are those of the tensors of each operation, kernels those that the wrappers launch on meta tensors, instructions
those of the compiled loop over 4-bit weights. Activations stay in the L2 cache and are listed only.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minillava.config import DecoderConfig
from minillava.decoder import Decoder
from minillava.kernels.nf4_dequantize import code
from minillava.kernels.tools import aot
from minillava.kernels.tools.launches import Call, Launches
from minillava.layers.cache import KVCache
from minillava.layers.quantize import Linear4bit
from minillava.layers.rotary import angles, cos_sin
from minillava.layers.stack import gpu_step

BYTES_PER_S = 4.3e12  # what a copy reaches on an H200
CONTEXT = 1024  # tokens in the cache: a picture of 576 and a few turns
CLOCK_HZ = 1.755e9  # under load; up to 1.98
ISSUED = 132 * 4 * 32 * CLOCK_HZ  # instructions of a lane a second, one a scheduler and clock
BUSY = 0.9  # share of the clocks in which a scheduler finds an instruction
DEPENDENT_S, PLAIN_S = 1.0e-6, 2.0e-6  # between two kernels of a graph: start, first bytes, last ones; assumed
WEIGHTS = {"decode_linear", "nf4_decode_linear", "mm", "linear", "nf4_matmul"}


def model(bits: int) -> Decoder:
    """Vicuna-7B's decoder without memory, ready for inference; four bits with nested scales, the head in bf16."""
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig()).to(torch.bfloat16).requires_grad_(False)
    decoder.blocks.join()
    block: Any
    for block in decoder.blocks if bits == 4 else ():
        for joined in (block.attn.qkv, block.mlp.gate_up):
            joined.product = _four_bits(joined.product)
        block.attn.out, block.mlp.down = _four_bits(block.attn.out), _four_bits(block.mlp.down)
    return decoder


def _four_bits(layer: Any) -> Linear4bit:
    shape = layer.out_features, layer.in_features
    numbers = shape[0] * shape[1]
    blocks = numbers // 64
    sizes = ((numbers // 2,), torch.uint8), ((blocks,), torch.uint8), ((2, -(-blocks // 256)), torch.float32)
    parts = [torch.empty(size, dtype=dtype, device="meta") for size, dtype in (*sizes, ((256,), torch.float32))]
    return Linear4bit(tuple(parts), shape, "nf4", 64, layer.bias, torch.bfloat16)


def step(decoder: Decoder, B: int) -> list[Call]:
    """What one token for each of B sequences runs, from the embedding to the logits."""
    cache = KVCache(decoder.config, B, CONTEXT, torch.device("meta"), torch.bfloat16)
    tokens_B = torch.zeros(B, dtype=torch.int64, device="meta")
    code("nf4", tokens_B.device)
    with aot.compiling("sm_90") as found, Launches(found) as seen:
        rotary = cos_sin(angles(cache.begin(B, None), decoder.config), torch.bfloat16)
        hidden_BD = gpu_step(decoder.blocks, nn.functional.embedding(tokens_B, decoder.embed.weight[:B]), rotary, cache)
        decoder.logits(decoder.norm(hidden_BD))
        cache.advance()
    return seen.calls


def seconds(call: Call) -> float:
    """Of one operation: its bytes or its instructions, whichever take longer, and the gaps in front of its kernels."""
    moved = call.bytes / BYTES_PER_S if call.name in WEIGHTS or "attention" in call.name else 0.0
    issued = 0.0
    for row in call.compiled:
        if row.per_weight:
            issued = max(issued, call.bytes / 0.516 * row.per_weight / (ISSUED * BUSY))
    gaps = [DEPENDENT_S if row.settings.get("PDL") else PLAIN_S for row in call.compiled]
    return max(moved, issued) + (sum(gaps) if gaps else PLAIN_S * call.kernels)


def rows() -> Iterator[dict[str, Any]]:
    for bits in (16, 4):
        decoder = model(bits)
        for B in (1, 8):
            calls = step(decoder, B)
            kinds: Counter[str] = Counter()
            for call in calls:
                kinds["weights" if call.name in WEIGHTS else "cache" if "attention" in call.name else "rest"] += (
                    call.bytes
                )
            total, read = sum(map(seconds, calls)), kinds["weights"] + kinds["cache"]
            ours = sum(call.kernels for call in calls if "decode" in call.name)
            yield {
                "kind": "bf16" if bits == 16 else "NF4, nested", "rows": B, **kinds,
                "kernels": sum(call.kernels for call in calls), "a layer": ours / decoder.config.num_layers,
                "instructions a weight": max((row.per_weight for call in calls for row in call.compiled), default=0),
                "model_ms": total * 1e3, "share": read / BYTES_PER_S / total,
            }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bytes_a_token", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--keep", action="store_true", help="to bench/results, not to runs/bench")
    chosen = parser.parse_args(arguments)
    write(list(rows()), Path("bench/results" if chosen.keep else "runs/bench"))


def write(table: list[dict[str, Any]], out: Path) -> None:
    """bytes_a_token.json and bytes_a_token.md."""
    assumed = (
        f"A model of a decode step of a 7B on an H200, no measurement. {CONTEXT} tokens are in the cache. A kernel "
        f"takes its bytes at {BYTES_PER_S / 1e12} TB/s, or its instructions at {CLOCK_HZ / 1e9} GHz with {BUSY:.0%} of "
        f"the clocks used, whichever is longer; in front of it are {DEPENDENT_S * 1e6} us with dependent launch, "
        f"{PLAIN_S * 1e6} us without. Activations stay in the L2 cache, sampling is left out."
    )
    heads = "kind", "rows", "MB of weights", "of cache", "of the rest", "kernels", "a layer", "instructions a weight"
    lines = [assumed, "", f"| {' | '.join(heads)} | ms | share of 4.3 TB/s |", "|---" * 10 + "|"]
    for row in table:
        sizes = [f"{row.get(kind, 0) / 1e6:.0f}" for kind in ("weights", "cache", "rest")]
        counts = row["kernels"], f"{row['a layer']:g}", row["instructions a weight"] or ""
        cells = row["kind"], row["rows"], *sizes, *counts, f"{row['model_ms']:.2f}", f"{row['share']:.0%}"
        lines.append(f"| {' | '.join(map(str, cells))} |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "bytes_a_token.json").write_text(json.dumps(table, indent=1) + "\n")
    (out / "bytes_a_token.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
