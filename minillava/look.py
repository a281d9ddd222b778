"""What a person sees of a run: its samples before it, what is trained in colour, and its answers after it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minillava.config import UserError
from minillava.data import IGNORE, Example, Sample, marked
from minillava.loader import Dataset, spread, survey
from minillava.tokenizer import StreamDecoder

SURVEYED = 1000  # samples that the report is about
GREEN = "\033[32m", "\033[0m"
PLAIN = "«", "»"  # around what is trained where there are no colours


def show(dataset: Dataset, number: int) -> None:
    """Print `number` samples as the model will see them, then what is in the data by file.

    Raises UserError where a sample among those tried cannot be used or has nothing to learn.
    """
    colours = GREEN if sys.stdout.isatty() and "NO_COLOR" not in os.environ else PLAIN
    for index in spread(len(dataset), number):
        print(describe(dataset.samples[index], dataset[index], dataset, colours))
    found = survey(dataset, SURVEYED)
    for source, counts in found.sources.items():
        n, pictures = counts["samples"], counts["pictures"]
        seen = f"; {pictures:,} pictures of {counts['visual'] / pictures:,.0f} tokens" if pictures else ""
        print(
            f"  {source}: {n:,} tried, {counts['tokens'] / n:,.0f} tokens each, {counts['trained'] / n:,.0f} of them "
            f"trained{seen}; {counts['cut']:,} ({counts['cut'] / n:.1%}) longer than {dataset.max_tokens:,} and cut"
        )
    if found.failures:
        raise UserError(
            f"{len(found.failures)} of {found.total('samples') + len(found.failures)} samples tried cannot be used, "
            f"the first: {found.failures[0]}"
        )


def describe(sample: Sample, example: Example, dataset: Dataset, colours: tuple[str, str]) -> str:
    """A sample in a paragraph: where it is from, its tokens, and its text, what is trained of it between `colours`."""
    trained = sum(label != IGNORE for label in example.labels)
    head = f"{sample.name}: {len(example.ids):,} tokens, {trained:,} trained"
    head += f", {example.cut:,} cut off" if example.cut else ""
    text = "".join(f"{colours[0]}{t}{colours[1]}" if learned else t for t, learned in pieces(example, dataset))
    return f"{head}\n{text}\n"


def pieces(example: Example, dataset: Dataset) -> Iterator[tuple[str, bool]]:
    """The text in runs of trained or untrained tokens; a picture or clip is its number of views and tokens."""
    markers = set(dataset.config.chat.markers.values())
    decoder, spans = StreamDecoder(dataset.tokenizer, skip_special=False), iter(example.spans)
    run, learned, at = "", False, 0
    while at < len(example.ids):
        if example.ids[at] in markers:
            span = next(spans)
            many = f"{span.views} {'frames' if span.clip else 'views'}, " if span.views > 1 else ""
            run += f"[{'clip' if span.clip else 'picture'}: {many}{span.tokens:,} tokens]"
            at += span.tokens
            continue
        if (example.labels[at] != IGNORE) != learned:
            if run:
                yield run, learned
            run, learned = "", not learned
        run += decoder.push(example.ids[at])
        at += 1
    yield run + decoder.flush(), learned


def write_answers(model: Path, samples: list[Sample], path: Path, device: torch.device) -> None:
    """Ask an exported model the first question of each sample and write what it says as JSON lines."""
    from minillava.engine import Engine, Request
    from minillava.tokenizer import load_tokenizer
    from minillava.weights import load_model

    engine = Engine(load_model(model).to(device), load_tokenizer(model))
    chat = engine.model.config.chat
    requests, rows = [], []
    for sample in samples:
        messages = marked(sample, chat)
        first = next(i for i, message in enumerate(messages) if message.role == "assistant")
        images = [ref.open(sample.name) for ref in sample.images]
        videos: list[Any] = [ref.store.get(ref.name, sample.name) for ref in sample.videos]
        requests.append(Request(messages[:first], images, max_new_tokens=64, name=sample.name, videos=videos))
        rows.append({"id": sample.id, "source": sample.source, "question": sample.messages[first - 1].text,
                     "expected": sample.messages[first].text})  # fmt: skip
    answers = engine.generate(requests)
    lines = (json.dumps({**row, "answer": answer.text}, ensure_ascii=False) for row, answer in zip(rows, answers))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
