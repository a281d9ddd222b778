"""python -m bench.decode: answers about a picture, ours beside its peers, with random weights of real shapes.

A checkpoint of the shape is written once and every peer loads it. Each round asks every peer once, in turn, for the
same prompt: time to the first token, of it the picture's, and the median time of a later token. Ours runs in bf16 and
NF4, with --compiled also with the step under torch.compile; the peers are transformers in bf16, transformers with
bitsandbytes NF4, on a GPU transformers with its static cache under torch.compile, and on a CPU, for a LLaMA, the
engines of cpu_peers.py and llama.cpp in bf16, Q4_0 and Q8_0, whose prompt is as long but has no picture. On a CPU
ours runs in int8 and fp32 too, and in NF4 without rounding inputs. The copy bandwidth is measured first. JSON and a
table go to bench/results/<device>.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from bench import cpu_peers, ggml, machine
from minillava.checkpoints.checkpoint import Checkpoint
from minillava.checkpoints.save import save_model
from minillava.config import ChatConfig, DecoderConfig, ImageConfig, ModelConfig, VisionConfig
from minillava.decoder import Decoder
from minillava.generation.engine import Engine, Request
from minillava.generation.slots import Slots
from minillava.layers.scheme import Scheme
from minillava.llava import LLaVAModel
from minillava.media.visual import Media
from minillava.visual_tokens import image_span

TINYLLAMA = DecoderConfig(32000, 2048, 5632, 22, 32, 4, 64, max_positions=2048)
QWEN2 = DecoderConfig(
    151936,
    896,
    4864,
    24,
    14,
    2,
    64,
    rope_theta=1e6,
    norm_eps=1e-6,
    max_positions=32768,
    qkv_bias=True,
    tie_embeddings=True,
    model_type="qwen2",
)
CLIP_L, CLIP_TINY = VisionConfig(), VisionConfig(64, 128, 3, 2, 56, 14)
# name: decoder, vision tower, words beside the picture, batch sizes
SHAPES: dict[str, tuple[DecoderConfig, VisionConfig, int, tuple[int, ...]]] = {
    "tiny": (DecoderConfig(1000, 256, 704, 4, 8, 2, 32), CLIP_TINY, 16, (1, 2)),
    "a": (TINYLLAMA, CLIP_L, 64, (1,)),  # TinyLlama behind CLIP-L/336: 640 tokens
    "b": (QWEN2, CLIP_L, 64, (1,)),  # Qwen2-0.5B behind CLIP-L/336
    "7b": (DecoderConfig(), CLIP_L, 64, (1, 8, 32)),  # LLaVA-1.5-7B
}
NAMES = {
    "a": "TinyLlama's decoder behind CLIP-L/336",
    "b": "Qwen2-0.5B behind CLIP-L/336",
    "7b": "LLaVA-1.5-7B",
}
ROUND = dict[str, float]  # vision_s, first_s (vision included), token_s


class NoText:
    """In place of a tokenizer: random answers have no text."""

    special_ids = range(1 << 30)
    _strip_first_space = False

    def token_id(self, token: str) -> None:
        return None


def build(name: str) -> LLaVAModel:
    """Random weights of a shape, in bf16."""
    decoder, vision, _, _ = SHAPES[name]
    chat = ChatConfig(image_token_id=decoder.vocab_size - 1, bos_id=1, eos_ids=(2,))
    config = ModelConfig(vision=vision, decoder=decoder, image=ImageConfig(vision.image_size), chat=chat)
    with torch.device("meta"):
        model = LLaVAModel(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for weight_name, p in model.named_parameters():
        with torch.no_grad():
            p.fill_(1.0) if "norm" in weight_name and weight_name.endswith("weight") else p.normal_(
                0.0, 0.02, generator=generator
            )
    return model


def prompt(config: ModelConfig, words: int, picture: bool = True) -> tuple[list[int], torch.Tensor | None]:
    """Ids, and the pixels of a picture among them."""
    generator = torch.Generator().manual_seed(0)
    size = config.vision.image_size
    visual = [config.chat.image_token_id] * image_span(config, size, size).tokens
    text = torch.randint(3, config.decoder.vocab_size - 1, (words,), generator=generator).tolist()
    if not picture:
        return text, None
    return text[:5] + visual + text[5:], torch.randn(3, size, size, generator=generator)


def ours(
    folder: Path,
    device: str,
    quantize: Scheme | None = None,
    compiled: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Engine, Callable[..., ROUND]]:
    model = Checkpoint.open(folder).load(dtype, torch.device(device), quantize)
    model.decoder.fuse()
    engine = Engine(model, NoText())  # type: ignore[arg-type]
    engine.eos_ids = frozenset()
    if compiled:
        make = engine.new_slots

        def new_slots(rows: int, capacity: int) -> Slots:
            slots = make(rows, capacity)
            slots.step = torch.compile(slots.step)  # type: ignore[method-assign]
            return slots

        engine.new_slots = new_slots  # type: ignore[method-assign]

    def ask(ids: list[int], pixels: torch.Tensor | None, batch: int, tokens: int) -> ROUND:
        media = [[] if pixels is None else [Media(pixels.clone())] for _ in range(batch)]  # each its own
        began = time.perf_counter()
        answers = engine.generate([Request(prompt_ids=ids, media=m, max_new_tokens=tokens) for m in media])
        total_s, answer = time.perf_counter() - began, answers[0]
        assert answer.token_s is not None and all(len(a.token_ids) == tokens for a in answers)
        return {"vision_s": answer.vision_s, "first_s": total_s - answer.decode_s, "token_s": answer.token_s}

    return engine, ask


def theirs(folder: Path, device: str, kind: str) -> Callable[..., ROUND]:
    """transformers: "" as it comes, "nf4" with bitsandbytes, "static" with a compiled static cache."""
    import transformers as hf

    quantization: dict[str, Any] = {}
    if kind == "nf4":
        skipped = ["vision_tower", "multi_modal_projector", "lm_head"]
        quantization["quantization_config"] = hf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=skipped,
        )  # fmt: skip
    if kind == "nf4":
        quantization["device_map"] = device
    model = hf.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, **quantization)
    model = model if kind == "nf4" else model.to(device)
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    seen: list[float] = []
    see = model.model.get_image_features

    @functools.wraps(see)
    def timed_see(*args: Any, **more: Any) -> Any:
        sync()
        began = time.perf_counter()
        features = see(*args, **more)
        sync()
        seen.append(time.perf_counter() - began)
        return features

    model.model.get_image_features = timed_see
    options: dict[str, Any] = {"cache_implementation": "static"} if kind == "static" else {}

    class Clock(hf.StoppingCriteria):
        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
            sync()
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @torch.inference_mode()
    def ask(ids: list[int], pixels: torch.Tensor | None, batch: int, tokens: int) -> ROUND:
        clock, began = Clock(), time.perf_counter()
        ids_BT = torch.tensor([ids] * batch, device=device)
        seen_too: dict[str, Any] = {}
        if pixels is not None:
            seen_too["pixel_values"] = torch.stack([pixels] * batch).to(device, torch.bfloat16)
        config = hf.GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **options
        )
        out = model.generate(
            input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=config,
            stopping_criteria=hf.StoppingCriteriaList([clock]), **seen_too,
        )  # fmt: skip
        assert out.shape[1] == len(ids) + tokens == len(ids) + len(clock.times)
        token_s = median(b - a for a, b in pairwise(clock.times))
        return {"vision_s": seen.pop() if seen else 0.0, "first_s": clock.times[0] - began, "token_s": token_s}

    return ask


def openers(built: LLaVAModel, folder: Path, device: str, compiled: bool, capacity: int, rows: int) -> dict[str, Any]:
    """What opens each peer that can be measured here: ours returns its engine too. Says who is left out, and why."""
    kinds: dict[str, tuple] = {"ours bf16": (None,), "ours NF4": (Scheme(),)}
    if device == "cpu":
        kinds |= {"ours NF4, exact": (Scheme(exact=True),), "ours int8": (Scheme("int8"),)}
        kinds["ours NF4, head too"] = (Scheme.parse("nf4:decoder,head"),)
        kinds["ours fp32"] = None, False, torch.float32
    if compiled:
        kinds["ours bf16, compiled"] = None, True
    found: dict[str, Any] = {kind: functools.partial(ours, folder, device, *how) for kind, how in kinds.items()}
    found["transformers bf16"] = functools.partial(theirs, folder, device, "")
    if find_spec("bitsandbytes") and find_spec("accelerate"):
        found["transformers NF4 (bitsandbytes)"] = functools.partial(theirs, folder, device, "nf4")
    if device == "cuda":
        found["transformers bf16, static, compiled"] = functools.partial(theirs, folder, device, "static")
    if device == "cuda" or built.config.decoder.model_type != "llama" or folder.name == "tiny":
        return found
    reasons = {f"llama.cpp {kind}": ggml.absent("gguf") for kind in ("BF16", "Q4_0", "Q8_0")}
    reasons |= {name: cpu_peers.absent(name) for name in cpu_peers.PEERS}
    for name, reason in reasons.items():
        if reason:
            print(reason)
        elif name.startswith("llama.cpp"):
            found[name] = functools.partial(_llama_cpp, built.decoder, folder, name.split()[-1], capacity, rows)
        else:
            found[name] = functools.partial(_text_peer, built.decoder, folder, name)
    return found


def _llama_cpp(decoder: Decoder, folder: Path, kind: str, capacity: int, rows: int) -> Callable[..., ROUND]:
    path = folder.with_name(f"{folder.name}-{kind}.gguf")
    if not path.exists():
        ggml.write(decoder, path, kind)
    return ggml.Model(path, capacity, sequences=rows).ask


def _text_peer(decoder: Decoder, folder: Path, name: str) -> Callable[..., ROUND]:
    """An engine of cpu_peers, asked for ids that no cache of its has seen. Its first token has to be one that
    `decoder`, of the same weights, finds likely: a peer that computes something else is not measured."""
    text = folder.with_name(f"{folder.name}-text") / "text"
    if not text.exists():
        cpu_peers.write_text(decoder, text)
    return functools.partial(_ask_text, name, cpu_peers.open_peer(name, text), decoder, itertools.count())


@torch.inference_mode()
def _ask_text(name: str, peer: cpu_peers.Ask, ours: Decoder, calls: Any, ids: list[int], _: Any, rows: int, new: int):
    turn = next(calls) % len(ids)
    ids = ids[turn:] + ids[:turn]
    times = peer(ids, rows, new)
    token = int(times.pop("first_id"))
    if turn == 0:
        hidden = ours(ours.embed.weight[ids], [0, len(ids)], keep_S=torch.tensor([len(ids) - 1]))
        logits_V = ours.logits(hidden)[0].float()
        rank = int((logits_V > logits_V[token]).sum())
        if rank > len(logits_V) / 50:
            raise RuntimeError(f"{name} answers with a token that is {rank} of {len(logits_V)} here")
    return {"vision_s": 0.0, **times}


def measure(name: str, device: str, limits: dict[str, float], chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one shape, one for each batch size."""
    batches, tokens, rounds = chosen.rows or SHAPES[name][3], chosen.tokens, chosen.rounds
    with tempfile.TemporaryDirectory() as temporary:
        folder = (chosen.folder or Path(temporary)) / name
        built = build(name)
        if not folder.exists():
            save_model(built, folder)
        ids, pixels = prompt(built.config, SHAPES[name][2], not chosen.text)
        engines, peers = {}, {}
        capacity = len(ids) + tokens
        for peer, open_ in openers(built, folder, device, chosen.compiled, capacity, max(batches)).items():
            if not chosen.only or any(part in peer for part in chosen.only):
                opened = open_()
                engines[peer], peers[peer] = opened if isinstance(opened, tuple) else (None, opened)
    rows = []
    for batch in batches:
        results: dict[str, list[ROUND]] = {peer: [] for peer in peers}
        for round in range(rounds + 1):  # the first warms up
            for peer, ask in peers.items():
                result = ask(ids, pixels, batch, tokens)
                if round:
                    results[peer].append({**result, "prefill_s": result["first_s"] - result["vision_s"]})
        summary = {peer: _summary(found, len(ids), batch) for peer, found in results.items() if found}
        for peer, engine in engines.items():
            if engine is None:
                continue
            rate = engine.step_bytes(batch * (len(ids) + tokens // 2)) / summary[peer]["token_s"]["median"]
            summary[peer]["share_of_copy_bandwidth"] = rate / limits["copy_bytes_per_s"]
        rows.append({"shape": name, "batch": batch, "prompt": len(ids), "new": tokens, "peers": summary})
        print(table(rows[-1:]), flush=True)
    return rows


def _summary(found: list[ROUND], prompt: int, batch: int) -> dict[str, Any]:
    """Median and quartiles of every time, and the rates that follow."""
    times = {key: [result[key] for result in found] for key in found[0]}
    out: dict[str, Any] = {
        key: dict(
            zip(
                ("low", "median", "high"), quantiles(values if len(values) > 1 else values * 2, n=4, method="inclusive")
            )
        )
        for key, values in times.items()
    }
    out["decode_tok_per_s"] = batch / out["token_s"]["median"]
    out["prefill_tok_per_s"] = batch * prompt / out["prefill_s"]["median"]
    return out


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        lines.append(f"shape {row['shape']}, batch {row['batch']}, {row['prompt']} tokens and {row['new']} new")
        for peer, s in row["peers"].items():
            times = "  ".join(
                f"{key} {s[key]['median']:.4f} ({s[key]['low']:.4f}-{s[key]['high']:.4f})"
                for key in ("vision_s", "prefill_s", "first_s", "token_s")
            )
            share = s.get("share_of_copy_bandwidth")
            lines.append(
                f"  {peer:32} {s['decode_tok_per_s']:8.2f} tok/s  prefill {s['prefill_tok_per_s']:8.1f} tok/s  {times}"
                + (f"  {share:.0%} of copy bandwidth" if share else "")
            )
    return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
    """A table for each shape and batch size."""
    facts, limits = report["facts"], report["limits"]
    lines = [
        f"# Answers about a picture on {facts['device']}, {facts['threads']} threads",
        "",
        f"{machine.made_of(facts)}; random weights; medians of {report['rounds']} rounds, all in turn.",
        f"Measured: copy {limits['copy_bytes_per_s'] / 1e9:.1f} GB/s, matmul {limits['matmul_flop_per_s'] / 1e12:.2f} "
        "TFLOP/s.",
    ]
    for row in report["rows"]:
        shape, several = NAMES.get(row["shape"], row["shape"]), f"{row['batch']} rows of " if row["batch"] > 1 else ""
        lines += ["", f"{shape}, {several}{row['prompt']} tokens of prompt and {row['new']} new ones:", ""]
        lines += ["| | tokens/s | s to the first token | tokens/s of the prompt |", "|---|---|---|---|"]
        for peer, s in row["peers"].items():
            first = f"{s['first_s']['median']:.2f}" if s["vision_s"]["median"] else "no picture"
            lines.append(f"| {peer} | {s['decode_tok_per_s']:.1f} | {first} | {s['prefill_tok_per_s']:.0f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="a and b (CPU), a, b and 7b (GPU)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--compiled", action="store_true", help="also ours with the step compiled (a minute)")
    parser.add_argument("--rows", type=int, action="append", default=[], help="batch sizes (those of the shape)")
    parser.add_argument("--text", action="store_true", help="a prompt of words alone, without a picture")
    parser.add_argument("--only", action="append", help="peers whose names hold this; may be given several times")
    parser.add_argument("--folder", type=Path, help="where models are kept for the next run (default: nowhere)")
    parser.add_argument("--name", default="decode", help="of the result's files (default: decode)")
    machine.add_out(parser)
    chosen = parser.parse_args(arguments)
    machine.need("transformers")
    device, shapes = chosen.device, chosen.shape or (["a", "b", "7b"] if chosen.device == "cuda" else ["a", "b"])
    limits = machine.limits(device, torch.bfloat16, shapes == ["tiny"])
    print(f"copy {limits['copy_bytes_per_s'] / 1e9:.1f} GB/s, matmul {limits['matmul_flop_per_s'] / 1e12:.2f} TFLOP/s")
    rows = [row for name in shapes for row in measure(name, device, limits, chosen)]
    folder = machine.out(chosen, device)
    report = {"facts": machine.facts(device), "limits": limits, "rounds": chosen.rounds, "rows": rows}
    (folder / f"{chosen.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{chosen.name}.md").write_text(markdown(report))
    print(f"wrote {folder}/{chosen.name}.json and {chosen.name}.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
