"""python -m bench.gguf: models exported for llama.cpp, answered there and here; needs llama-cpp-python and gguf.

The model that ships is asked about drawn scenes through llama-cpp-python's multimodal handler, in each form. Random
models of LLaVA's layouts (336 pixels in patches of 14, SigLIP, one linear layer, Qwen's decoders) are asked through
mtmd's functions, and their tokens compared. LLAMA_CPP_LIB_PATH and MTMD_CPP_LIB name libraries of another build.
JSON and a table go to bench/results/cpu, as gguf.json and gguf.md.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench import ggml, machine
from minillava import LLaVA
from minillava.checkpoints import gguf
from minillava.checkpoints.hub import NANO
from minillava.config import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from minillava.llava import LLaVAModel
from minillava.synthetic.task import ask

CLIP = VisionConfig(64, 128, 3, 2, 336, 14)
SIGLIP = VisionConfig(64, 96, 3, 2, 336, 14, "gelu_tanh", 1e-6, False, False, True, (-1,))
LLAMA = DecoderConfig(448, 64, 96, 2, 4, 4, 16, max_positions=1024)
QWEN2 = replace(LLAMA, num_kv_heads=2, qkv_bias=True, tie_embeddings=True, model_type="qwen2")
QWEN3 = replace(LLAMA, num_kv_heads=2, head_dim=32, qk_norm=True, model_type="qwen3")
LAYOUTS = {
    "CLIP, LLaMA": (CLIP, 2, LLAMA),
    "CLIP, one linear layer, LLaMA": (CLIP, 1, LLAMA),
    "CLIP, Mistral": (CLIP, 2, replace(LLAMA, num_kv_heads=2, rope_theta=1e6, model_type="mistral")),
    "SigLIP, Qwen2": (SIGLIP, 2, QWEN2),
    "SigLIP, Qwen3": (SIGLIP, 2, QWEN3),
}
QUESTION = "What is there?"


def scenes(form: str, count: int, folder: Path) -> dict[str, float]:
    """Shares of scenes where llama.cpp's answer is ours, and is right, and ours is right."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import MTMDChatHandler

    ours = LLaVA.from_pretrained(NANO, "float32", "cpu")
    decoder, mmproj = gguf.export(ours.model, ours.tokenizer, folder, "nano", form)
    theirs = Llama(str(decoder), chat_handler=MTMDChatHandler(str(mmproj), verbose=False), n_ctx=512, verbose=False)
    hits = {"same": 0, "llama.cpp right": 0, "ours right": 0}
    asked = list({id(scene): (scene, question) for scene, question in ask("unseen", count, seed=3)}.values())
    for scene, question in asked:
        file = io.BytesIO()
        scene.image().save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}]
        messages: Any = [{"role": "user", "content": parts}]
        reply: Any = theirs.create_chat_completion(messages, temperature=0.0, repeat_penalty=1.0, max_tokens=48)
        text = reply["choices"][0]["message"]["content"].strip()
        answer = str(ours.generate(question.text, [scene.image()], max_new_tokens=48)).strip()
        hits["same"] += text == answer
        hits["llama.cpp right"] += text == question.answer
        hits["ours right"] += answer == question.answer
    return {name: count / len(asked) for name, count in hits.items()}


def random_model(vision: VisionConfig, layers: int, decoder: DecoderConfig) -> LLaVA:
    """Weights that F16 holds, so large that an answer hangs on the whole prompt and is decisive."""
    nano = LLaVA.from_pretrained(NANO, "float32", "cpu")
    image = replace(nano.config.image, size=vision.image_size, fit="pad")
    model = LLaVAModel(ModelConfig(vision, ProjectorConfig(layers), decoder, image, chat=nano.config.chat)).eval()
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.mul_(15 if name == "decoder.embed.weight" else 4)
            elif name.endswith("bias"):
                p.normal_(0, 0.1, generator=generator)
            p.copy_(p.half())
    return LLaVA(model, nano.tokenizer)


def tokens(name: str, folder: Path, new: int = 24) -> dict[str, Any]:
    """Visual tokens of a picture there, and how many of the greedy tokens there are ours before the first other."""
    ours = random_model(*LAYOUTS[name])
    side = ours.config.vision.image_size
    files = gguf.export(ours.model, ours.tokenizer, folder, "random", "F16")
    noise = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    expected = ours.generate(QUESTION, [Image.fromarray(noise.numpy())], max_new_tokens=new).token_ids
    model = ggml.Model(files[0], 1024, files[1])
    found = model.answer(f"USER: {ggml.MARKER}\n{QUESTION} ASSISTANT:", noise.numpy(), len(expected))
    same = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), len(expected))
    return {"visual tokens": model.visual_tokens, "same": same, "of": len(expected), "different": len(set(expected))}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"{report['scenes']} drawn scenes, the model that ships. llama.cpp: {report['library']}. "
             f"{machine.made_of(report['machine'])}", "",
             "| form | llama.cpp answers as we do | llama.cpp right | ours right |", "|---|---|---|---|"]  # fmt: skip
    for form, row in report["forms"].items():
        lines.append(f"| {form} | {row['same']:.1%} | {row['llama.cpp right']:.1%} | {row['ours right']:.1%} |")
    lines += ["", "| random model | visual tokens | greedy tokens that are ours |", "|---|---|---|"]
    for name, row in report["layouts"].items():
        lines.append(f"| {name} | {row['visual tokens']} | {row['same']} of {row['of']} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--forms", nargs="*", default=list(gguf.FORMS), choices=gguf.FORMS)
    parser.add_argument("--library", default="as installed", help="what the llama.cpp in use is, for the table")
    machine.add_out(parser)
    args = parser.parse_args(arguments)
    if reason := ggml.absent("gguf"):
        print(reason)
        return 1
    report: dict[str, Any] = {"scenes": args.scenes, "library": args.library, "machine": machine.facts("cpu")}
    with tempfile.TemporaryDirectory() as folder:
        report["layouts"] = {name: tokens(name, Path(folder) / str(i)) for i, name in enumerate(LAYOUTS)}
        report["forms"] = {form: scenes(form, args.scenes, Path(folder)) for form in args.forms}
    out = machine.out(args, "cpu")
    (out / "gguf.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gguf.md").write_text(table(report))
    print(table(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
