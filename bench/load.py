"""How much memory and time loading takes: a random bf16 checkpoint of real shapes, in shards, read by a fresh process.

python -m bench.load                  # LLaVA-1.5 7B: 13.2 GiB on disk, which are removed afterwards
python -m bench.load --model 0.5b     # LLaVA-OneVision's smallest decoder, read three times: the last is warm
python -m bench.load --scale 8        # all widths divided by 8, for a rehearsal
"""

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from minillava.checkpoints.config_json import write_config
from minillava.checkpoints.names import to_files
from minillava.checkpoints.tensor_files import save
from minillava.config import ChatConfig, DecoderConfig, ImageConfig, ModelConfig, VisionConfig
from minillava.layers.linear import Unallocated
from minillava.llava import LLaVAModel

QWEN = DecoderConfig(151936, 896, 4864, 24, 14, 2, 64, 1e6, qkv_bias=True, tie_embeddings=True, model_type="qwen2")
MODELS = {
    "7b": ModelConfig(VisionConfig(), chat=ChatConfig(image_token_id=31999)),
    "0.5b": ModelConfig(VisionConfig(), decoder=QWEN, chat=ChatConfig(image_token_id=151646)),
}
FRESH = """
import json, re, sys, time, torch
from minillava.checkpoints.checkpoint import Checkpoint
started = time.perf_counter()
model = Checkpoint.open(sys.argv[1]).load(torch.bfloat16)
load_s = time.perf_counter() - started
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
weights = sum(p.nbytes for p in model.parameters())
print(json.dumps({"load_s": round(load_s, 2), "peak_bytes": peak, "weights": weights}))
"""


def write(config: ModelConfig, folder: Path, shard_bytes: int) -> None:
    """Random weights, one shard in memory at a time."""
    for name, values in write_config(config, "bfloat16").items():
        (folder / name).write_text(json.dumps(values))
    (folder / "chat_template.jinja").write_text("")
    with Unallocated():
        shapes = {name: t.shape for name, t in to_files(LLaVAModel(config).state_dict(), "hf").items()}
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, str] = {}
    number = 1
    for name, shape in shapes.items():
        shards[-1][name] = torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
        weight_map[name] = f"model-{number:05d}.safetensors"
        if sum(t.nbytes for t in shards[-1].values()) > shard_bytes:
            save(shards.pop(), folder / f"model-{number:05d}.safetensors")
            shards.append({})
            number += 1
    if shards[-1]:
        save(shards[-1], folder / f"model-{number:05d}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def scaled(config: ModelConfig, by: int) -> ModelConfig:
    d = config.decoder
    smaller = dict(hidden_size=d.hidden_size // by, intermediate_size=d.intermediate_size // by)
    heads = dict(num_heads=max(2, d.num_heads // by), num_kv_heads=max(2, d.num_kv_heads // by))
    return dataclasses.replace(config, image=ImageConfig(336), decoder=dataclasses.replace(d, **smaller, **heads))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="7b")
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where the checkpoint is written (default: the temporary folder)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        started = time.perf_counter()
        write(scaled(MODELS[args.model], args.scale), Path(name), (2 << 30) // args.scale)
        print(f"written in {time.perf_counter() - started:.0f} s; torch {torch.__version__}, {platform.processor()}")
        for _ in range(3 if args.model == "0.5b" else 1):
            done = subprocess.run([sys.executable, "-c", FRESH, name], capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            peak, weights = (found[key] / 1e9 for key in ("peak_bytes", "weights"))
            print(f"weights {weights:.2f} GB, peak {peak:.2f} GB, loaded in {found['load_s']} s", flush=True)


if __name__ == "__main__":
    main()
