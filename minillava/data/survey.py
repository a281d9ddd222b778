"""What is in a run's data, seen before it starts: samples as the model will see them, and counts by file."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from minillava.chat.tokenizer import StreamDecoder
from minillava.config import IGNORE
from minillava.data.dataset import Dataset, SampleError
from minillava.errors import UserError
from minillava.processor import Example

GREEN = "\033[32m", "\033[0m"
PLAIN = "«", "»"  # around what is trained where there are no colours


@dataclass
class Survey:
    """What was found in samples at equal distances."""

    max_tokens: int
    failures: list[str] = field(default_factory=list)  # why a sample cannot be used, "nothing to learn" among it
    files: dict[str, Counter[str]] = field(default_factory=dict)  # of each, what `survey` counts
    trained_text: str = ""  # of one sample

    @property
    def total(self) -> Counter[str]:
        """The counts of all files together."""
        return sum(self.files.values(), Counter())

    def check(self, allowed: float) -> None:
        """Raises UserError if more than this share of the samples cannot be used."""
        tried = self.total["samples"] + len(self.failures)
        if len(self.failures) > allowed * tried:
            raise UserError(
                f"{len(self.failures)} of {tried} samples tried cannot be used, the first: {self.failures[0]}"
            )

    def __str__(self) -> str:
        total = self.total
        cut = f", {total['cut']} are cut" if total["cut"] else ""
        cut += f", {total['empty']} have an empty answer" if total["empty"] else ""
        return (
            f"{total['trained']:,} of {total['tokens']:,} tokens of {total['samples'] + len(self.failures)} samples "
            f"are supervised{cut}, such as {self.trained_text!r}"
        )

    def by_file(self) -> str:
        """A line for each file."""
        lines = []
        for file, counts in self.files.items():
            n, pictures = counts["samples"], counts["pictures"]
            seen = f"; {pictures:,} pictures of {counts['visual'] / pictures:,.0f} tokens" if pictures else ""
            lines.append(
                f"  {file}: {n:,} tried, {counts['tokens'] / n:,.0f} tokens each, {counts['trained'] / n:,.0f} of them "
                f"trained{seen}; {counts['cut']:,} ({counts['cut'] / n:.1%}) longer than {self.max_tokens:,} and cut"
                + (f"; {counts['empty']:,} have an empty answer" if counts["empty"] else "")
            )
        return "\n".join(lines)


def survey(dataset: Dataset, wanted: int) -> Survey:
    """Encode `wanted` samples, spread over the data, and count what is in them."""
    found = Survey(dataset.max_tokens)
    for index in spread(len(dataset), wanted):
        try:
            example = dataset[index]
        except SampleError as error:
            found.failures.append(str(error))
            continue
        trained = [label for label in example.labels if label != IGNORE]
        counts = found.files.setdefault(dataset.samples[index].source, Counter())
        counts.update(samples=1, tokens=len(example.ids), trained=len(trained), cut=bool(example.cut))
        answers = [message.text for message in dataset.samples[index].messages if message.role == "assistant"]
        counts.update(empty=not all(text.strip() for text in answers))
        counts.update(pictures=len(example.spans), visual=sum(span.tokens for span in example.spans))
        found.trained_text = found.trained_text or dataset.tokenizer.decode(trained, skip_special=False)
    return found


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices, or all, at equal distances."""
    return [i * count // min(count, wanted) for i in range(min(count, wanted))]


def show_samples(dataset: Dataset, number: int) -> None:
    """Print `number` samples, spread over the data, as the model will see them."""
    colours = GREEN if sys.stdout.isatty() and "NO_COLOR" not in os.environ else PLAIN
    for index in spread(len(dataset), number):
        print(describe(dataset, index, colours))


def describe(dataset: Dataset, index: int, colours: tuple[str, str]) -> str:
    """A sample in a paragraph: where it is from, its tokens, and its text, what is trained of it between `colours`."""
    example = dataset[index]
    trained = sum(label != IGNORE for label in example.labels)
    cut = f", {example.cut:,} cut off" if example.cut else ""
    text = "".join(f"{colours[0]}{t}{colours[1]}" if learned else t for t, learned in passages(dataset, example))
    return f"{dataset.samples[index].name}: {len(example.ids):,} tokens, {trained:,} trained{cut}\n{text}\n"


def passages(dataset: Dataset, example: Example) -> Iterator[tuple[str, bool]]:
    """The text of trained and untrained tokens in turn; a picture or clip is its number of views and tokens."""
    decoder = StreamDecoder(dataset.tokenizer, skip_special=False)
    runs = iter([(visual.span, count) for visual in example.visuals for count in visual.counts])
    passage, learned, at = "", False, 0
    while at < len(example.ids):
        if example.ids[at] in dataset.processor.placeholders:
            span, count = next(runs)
            number = span.frames[0] if span.native else span.views
            views = f"{number} {'frames' if span.clip else 'views'}, " if number > 1 and count == span.tokens else ""
            passage += f"[{'clip' if span.clip else 'picture'}: {views}{count:,} tokens]"
            at += count
            continue
        if (example.labels[at] != IGNORE) != learned:
            if passage:
                yield passage, learned
            passage, learned = "", not learned
        passage += decoder.push(example.ids[at])
        at += 1
    yield passage + decoder.push(None), learned
