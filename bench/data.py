"""Samples a second on one core: parquet with JPEG pictures of 640 x 480, read, decoded, prepared and tokenised.

Ours beside `datasets` with transformers' LlavaProcessor, in one process, interleaved, with the same pixels and ids:
python -m bench.data [--samples N] [--rounds R]. Appends to data.jsonl in bench/results/<device>.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import minillava
from bench import machine
from minillava.chat.templates import TEMPLATES
from minillava.checkpoints.checkpoint import Checkpoint
from minillava.config import ChatConfig, ImageConfig, ModelConfig
from minillava.data.columns import arrow
from minillava.data.dataset import Dataset
from minillava.data.table import scan

ROUNDS, SAMPLES = 5, 60
NANO = Path(minillava.__file__).parent / "nano"
PROMPT = TEMPLATES[ChatConfig().template].system + " USER: <image>\n{question} ASSISTANT: {answer}</s>"


def jpeg(seed: int) -> bytes:
    """A picture with some texture, as a photograph's size is (about 70 KB)."""
    rng = random.Random(seed)
    small = Image.frombytes("RGB", (160, 120), rng.randbytes(160 * 120 * 3))
    file = io.BytesIO()
    small.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return file.getvalue()


def write(path: Path, count: int) -> None:
    """Rows in the layout of LLaVA-OneVision-Data."""
    pa = arrow()
    rows = []
    for i in range(count):
        turns = [
            ("human", "<image>\nWhat is in the picture, and where is it?"),
            ("gpt", "A red disc at the left. " * 12),
        ]
        rows.append({
            "id": str(i), "image": {"bytes": jpeg(i), "path": None},
            "conversations": [{"from": who, "value": text} for who, text in turns],
        })  # fmt: skip
    pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)


def theirs(path: Path, fit: str) -> Any:
    """Sample i of datasets and transformers."""
    import datasets
    from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(NANO / "tokenizer.json"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    pictures = LlavaImageProcessorPil(do_pad=True, **size) if fit == "pad" else CLIPImageProcessorPil(**size)
    processor = LlavaProcessor(pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1)  # fmt: skip
    data = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))
    data = data.cast_column("image", datasets.Image())

    def sample(i: int) -> Any:
        row = data[i]
        question, answer = (turn["value"] for turn in row["conversations"])
        text = PROMPT.format(question=question.removeprefix("<image>\n"), answer=answer)
        made = processor(images=row["image"], text=text, return_tensors="pt")
        return made["input_ids"][0], made["pixel_values"]

    return sample


def main(arguments: list[str] | None = None) -> None:
    """Print a line, and append it to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--fit", choices=["pad", "crop"], default="pad", help="pad: as LLaVA-1.5 was trained")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    machine.add_out(parser)
    args = parser.parse_args(arguments)
    machine.need("datasets", "transformers")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.parquet")
        write(path, args.samples)
        tokenizer = Checkpoint.open(str(NANO)).tokenizer()
        chat = ChatConfig(image_token_id=tokenizer.token_id("<image>"), bos_id=tokenizer.bos_id)
        config = ModelConfig(image=ImageConfig(fit=args.fit), chat=chat)
        ours, peer = Dataset(scan(path, None)[0], config, tokenizer, 4096), theirs(path, args.fit)
        apart = (ours[0].pixels_NCHW - peer(0)[1]).abs().max().item()
        sides = {"minillava": lambda i: ours[i], "datasets + transformers": peer}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, sample in sides.items():
                began_s = time.process_time()
                for i in range(args.samples):
                    sample(i)
                times[name].append((time.process_time() - began_s) / args.samples)
    result: dict[str, Any] = {f"{name}, ms": round(1e3 * statistics.median(t), 2) for name, t in times.items()}
    mine, other = (statistics.median(t) for t in times.values())
    result |= {
        "fit": args.fit,
        "times as fast": round(other / mine, 2),
        "spread": [round(max(t) / min(t), 2) for t in times.values()],
        "pixels apart": apart,
        "ids": [len(ours[0].ids), len(peer(0)[0])],
        "samples": args.samples,
        **machine.facts("cpu"),
    }
    print(json.dumps(result))
    with (machine.out(args, "cpu") / "data.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
