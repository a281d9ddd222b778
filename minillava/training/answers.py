"""What a run's exported model answers, for a person to read."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from minillava.data.llava_json import Sample
from minillava.files import write_whole
from minillava.processor import markers_in


def write_answers(model: Path, samples: list[Sample], path: Path, device: torch.device) -> None:
    """Ask an exported model the first question of each sample and write what it says as JSON lines."""
    from minillava.checkpoints.checkpoint import Checkpoint
    from minillava.generation.engine import Engine, Request

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
