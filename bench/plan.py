"""`minillava plan` beside what PyTorch's allocator says of the same runs on this CPU: `python -m bench.plan`

Six configurations, each in a process of its own: the trainer's steps and the engine's answers on random weights, under
torch.profiler, whose memory events are those of PyTorch's allocator. It is judged against these and not against the
process's size, as they are what runs out on a GPU, and a process holds code, compiled products and fragments besides.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from minillava.config import ChatConfig, DecoderConfig, ImageConfig, LoRAConfig, ModelConfig, VisionConfig
from minillava.kernels.cpu import library
from minillava.layers.quantize import chosen_layers, quantized_layer
from minillava.layers.scheme import Scheme
from minillava.llava import LLaVAModel
from minillava.recipe import StageConfig
from minillava.training import parallel
from minillava.training.plan import PlannedTask, make_batch, plan_answer, plan_training
from minillava.training.trainer import Trainer

WITHIN = 0.07
CONFIG = ModelConfig(
    VisionConfig(384, 1536, 6, 6, 224, 14),
    decoder=DecoderConfig(8192, 768, 2048, 8, 12, 4, 64, max_positions=2048),
    image=ImageConfig(224), chat=ChatConfig(image_token_id=-200),
)  # fmt: skip
TOKENS, PROMPT, NEW = 512, 1024, 64
ALL = dict(vision=1e-4, projector=1e-3, decoder=1e-4)
LORA = dict(lr=dict(projector=1e-3, decoder=1e-4), lora={"decoder": LoRAConfig(32, 64.0)})
CASES: dict[str, dict[str, Any]] = {
    "full, float32": dict(lr=ALL, dtype="float32"),
    "full, bf16, checkpointing": dict(lr=ALL, dtype="bfloat16", checkpointing="full"),
    "LoRA, bf16": dict(LORA, dtype="bfloat16"),
    "QLoRA, bf16, checkpointing": dict(LORA, dtype="bfloat16", checkpointing="full", quantize="nf4"),
    "answer, bf16": dict(),
    "answer, nf4": dict(quantize="nf4"),
}


def stage_of(case: dict[str, Any]) -> StageConfig:
    values = {key: value for key, value in case.items() if key != "quantize"}
    return StageConfig(name="x", batch_size=4, micro_batch=2, **values)


def held(case: dict[str, Any]) -> torch.dtype:
    return torch.float32 if case.get("dtype") == "float32" else torch.bfloat16


def planned(name: str, config: ModelConfig = CONFIG) -> dict[str, int]:
    """Bytes by part."""
    case = CASES[name]
    quantize = case.get("quantize", "")
    if "lr" not in case:
        return dict(plan_answer(config, torch.bfloat16, quantize, True, PROMPT, NEW).parts)
    return dict(plan_training(config, stage_of(case), held(case), quantize, True, TOKENS).parts)


def measured(name: str, config: ModelConfig = CONFIG) -> int:
    """The most bytes that PyTorch held once the model was there; with the case alone in its process."""
    case = CASES[name]
    torch.manual_seed(0)
    for purpose in ("rows", "values", "attention"):  # what code in C keeps for itself is not planned
        library.workspace(purpose, (1 << 26,), torch.uint8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model = _model(config, case)
        run = _training(model, stage_of(case)) if "lr" in case else _answering(model)
        elsewhere = 0 if "lr" in case else _in_large_pages(model)
        with torch.profiler.record_function("run"):
            run()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    began = next(event.start_ns() for event in events if event.name() == "run")
    now = most = 0
    for event in events:
        now += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, now) if event.start_ns() >= began else 0
    return elsewhere + most


def _model(config: ModelConfig, case: dict[str, Any]) -> LLaVAModel:
    model = LLaVAModel(config)
    model.init_weights(0)
    for p in model.parameters():
        p.data = p.data.to(held(case))
    if scheme := case.get("quantize"):
        how = Scheme.parse(scheme)
        for layer in chosen_layers(model, how):
            old: Any = model.get_submodule(layer)
            model.set_submodule(layer, quantized_layer(old.weight.detach(), how, f"{layer}.weight"))
    return model


def _in_large_pages(model: LLaVAModel) -> int:
    """Bytes of the blocks, which `fuse` has moved out of the allocator's memory."""
    return sum(t.nbytes for t in (*model.decoder.blocks.parameters(), *model.decoder.blocks.buffers()))


def _training(model: LLaVAModel, stage: StageConfig) -> Any:
    device = torch.device("cpu")
    batch = make_batch(model.config, TOKENS, stage.micro, (336, 336), True)
    batch.pixels_NCHW.normal_()

    def run() -> None:
        trainer = Trainer(PlannedTask(model, stage, device), stage, device, Path("."), None, False)  # type: ignore[arg-type]
        parallel.wrap_blocks(model, stage.checkpointing, False)
        model.train()
        for _ in range(2):
            trainer.train_step([batch] * 2)

    return run


def _answering(model: LLaVAModel) -> Any:
    from minillava.chat.tokenizer import load_tokenizer
    from minillava.checkpoints.hub import NANO
    from minillava.generation.engine import Engine, Request
    from minillava.media.visual import media

    model.eval()
    model.decoder.fuse()
    engine = Engine(model, load_tokenizer(NANO))
    engine.eos_ids = frozenset()
    picture = torch.randn(3, *[model.config.vision.image_size] * 2)
    visual = model.config.vision.num_patches
    ids = [-200] * visual + [1] * (PROMPT - visual)
    return lambda: engine.generate([Request(prompt_ids=ids, media=media([picture]), max_new_tokens=NEW)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("case", nargs="?", help=f"one of: {', '.join(CASES)} (default: all)")
    parser.add_argument("--measure", action="store_true", help="measure this case here and print the bytes")
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measured(args.case)))
        return 0
    wrong = 0
    print(f"torch {torch.__version__}\n\n| | planned MiB | measured MiB | off |\n|---|---|---|---|")
    for name in [args.case] if args.case else CASES:
        command = [sys.executable, "-m", "bench.plan", name, "--measure"]
        found = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        parts = planned(name)
        off = sum(parts.values()) / found - 1
        wrong += abs(off) > WITHIN
        print(f"| {name} | {sum(parts.values()) / 2**20:.1f} | {found / 2**20:.1f} | {off:+.1%} |", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
