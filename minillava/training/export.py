"""What comes out of a stage: the model in Hugging Face's layout, adapters in PEFT's files, and answers to read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from minillava.checkpoints import original_llava
from minillava.checkpoints.adapters import save_peft
from minillava.checkpoints.checkpoint import Checkpoint, without_memory
from minillava.checkpoints.save import save_model
from minillava.data.llava_json import Sample
from minillava.files import write_whole
from minillava.generation.engine import Engine, Request
from minillava.layers import lora
from minillava.processor import markers_in
from minillava.recipe import StageConfig
from minillava.training import parallel
from minillava.training.task import Run


def export(run: Run, folder: Path) -> None:
    """The run's model as a Hugging Face folder, all of it in one dtype (masters are float32 while they are trained)."""
    # Every rank goes through all weights, because it holds its part of each; the first keeps and writes them.
    tensors = ((name, t.to("cpu", run.save_dtype)) for name, t in lora.merged_weights(run.model))
    state = {name: tensor for name, tensor in tensors if parallel.is_main()}
    if parallel.is_main():
        model = without_memory(run.config)
        model.load_state_dict(state, assign=True)
        save_model(model, folder, run.tokenizer)


def export_adapters(run: Run, folder: Path, trained: dict[str, Tensor], stage: StageConfig) -> None:
    """What a stage trained beside the run's base in PEFT's files, and in the original repository's where that has them.

    Where earlier stages changed what this one did not train whole, its base is the model that the last of them left.
    """
    wanted = run.recipe.model
    base, original = wanted.base, original_llava.write(run.config, wanted.vision_from, wanted.decoder_from)
    changed = {part for before in run.finished for part in before.lr} & {"vision", "projector", "decoder"}
    if wanted.adapter or changed - (stage.lr.keys() - stage.lora.keys()):
        left = [run.folder / before.name / "model" for before in run.finished[-1:]]
        base, original = next((str(path.resolve()) for path in left if path.is_dir()), ""), None
        if not base:
            why = "other adapters, or a stage without an export, are in them"
            print(f"  {folder}: adapts weights that no folder has ({why}); use the exported model", file=sys.stderr)
    save_peft(folder, trained, stage.lora, base, original)


def write_answers(model: Path, samples: list[Sample], path: Path, device: torch.device) -> None:
    """Ask an exported model the first question of each sample and write what it says as JSON lines."""
    checkpoint = Checkpoint.open(model)
    engine = Engine(checkpoint.load().to(device), checkpoint.tokenizer())
    chat = engine.model.config.chat
    requests, rows = [], []
    for sample in samples:
        first = next(i for i, message in enumerate(sample.messages) if message.role == "assistant")
        asked = sample.written_for(chat)[:first]
        media = sample.media[: len(markers_in(chat, (message.text for message in asked)))]
        requests.append(Request(asked, media, max_new_tokens=64, name=sample.name))
        rows.append({"id": sample.id, "source": sample.source, "question": sample.messages[first - 1].text,
                     "expected": sample.messages[first].text})  # fmt: skip
    answers = engine.generate(requests)
    lines = (json.dumps({**row, "answer": answer.text}, ensure_ascii=False) for row, answer in zip(rows, answers))
    write_whole(path, "\n".join(lines) + "\n")
