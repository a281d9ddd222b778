"""Samples that are read when they are asked for: what is kept of each is where it is, and a few numbers.

So 100,000 rows with their pictures cost no more memory than their places, and every loader process reads its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from minillava.chat.messages import Message
from minillava.data import columns
from minillava.data.files import open_store
from minillava.data.layouts import MARKER
from minillava.data.llava_json import Report, Sample, parse
from minillava.data.pictures import Places, UrlStore
from minillava.data.rows import Rows, open_rows
from minillava.errors import UserError

Check = Callable[[Sample], None]  # raises UserError for a sample that cannot be trained


@dataclass
class Source:
    """A file of a data set."""

    rows: Rows
    places: Places
    name: str  # of the data set

    def sample(self, number: int) -> Sample:
        """The sample of a row. Raises UserError."""
        return parse(self.rows[number], number, self.rows.path, self.places, Report(self.name))


@dataclass
class Table(Sequence[Sample]):
    """Samples by their place: of each the source, the row there, and the turn of it, or all of them."""

    sources: list[Source]
    source_N: np.ndarray
    row_N: np.ndarray
    turn_N: np.ndarray  # -1: all turns
    media_N: np.ndarray  # whether it has pictures or videos
    place_N: np.ndarray  # by the names of its pictures: where it stands in an order that all sets over them share

    def __len__(self) -> int:
        return len(self.row_N)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Table: ...
    def __getitem__(self, index: int | slice) -> Sample | Table:
        if isinstance(index, slice):
            return self.pick(np.arange(len(self))[index])
        sample = self.sources[self.source_N[index]].sample(int(self.row_N[index]))
        turn = int(self.turn_N[index])
        return sample if turn < 0 else turns_of(sample)[turn]

    def pick(self, indices: np.ndarray) -> Table:
        """Those of these numbers, in their order."""
        arrays = (self.source_N, self.row_N, self.turn_N, self.media_N, self.place_N)
        return Table(self.sources, *(array[indices] for array in arrays))

    def split_turns(self, counts: np.ndarray) -> Table:
        """With each sample as so many of its own, one for each turn."""
        table = self.pick(np.repeat(np.arange(len(self)), counts))
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        table.turn_N = np.arange(len(table)) - starts
        return table

    def groups(self) -> tuple[np.ndarray, int] | None:
        """For each sample the number of its group, all of which is read at once, and the bytes of a large one (in a few
        of the files); None where every sample is read by itself. Beside groups, those share one with others by chance.
        """
        in_groups = [source.rows for source in self.sources if source.rows.groups() is not None]
        if not in_groups:
            return None
        rng, groups, count = np.random.default_rng(0), np.empty(len(self), dtype=np.int64), 0
        for number, source in enumerate(self.sources):
            mine = np.flatnonzero(self.source_N == number)
            of_rows = source.rows.groups()
            if of_rows is None:
                of_rows = rng.integers(max(1, len(source.rows) // SCATTERED), size=len(source.rows))
            groups[mine] = of_rows[self.row_N[mine]] + count
            count += int(of_rows.max(initial=0)) + 1
        return groups, max(rows.group_bytes() for rows in in_groups[:: -(-len(in_groups) // MEASURED)])


MEASURED = 8  # files whose largest group is read to know its size
SCATTERED = 256  # samples in a group of those that are read one by one


def joined(tables: Sequence[Table]) -> Table:
    """All their samples, one table behind the other."""
    sources: list[Source] = []
    numbers = []
    for table in tables:
        numbers.append(table.source_N + len(sources))
        sources += table.sources
    rest = ("row_N", "turn_N", "media_N", "place_N")
    arrays = [np.concatenate([getattr(t, name) for t in tables] or [np.empty(0, np.int64)]) for name in rest]
    return Table(sources, np.concatenate(numbers or [np.empty(0, np.int64)]), *arrays)


def scan(
    path: Path | str, image_root: Path | str | None, check: Check | None = None,
    fetch: str = "", stream: bool = False, seed: int = 0,
) -> tuple[Table, Report]:  # fmt: skip
    """The usable samples of a data file, a folder of them or a data set of the hub, and a report with one line for each
    sample that is not; pictures are sought in the rows and under `image_root`, a folder or a zip, and by URL where
    there is a folder to `fetch` them into.

    Raises UserError if the data or the image root as a whole cannot be read.
    """
    store = open_store(Path(image_root)) if image_root is not None else None
    places = Places(store, UrlStore(Path(fetch)) if fetch else None)
    report = Report(str(path))
    sources = [Source(rows, places, str(path)) for rows in open_rows(str(path), stream)]
    kept: list[tuple[int, int, bool, int]] = []
    for number, row, sample in walk(sources, check, report):
        names = " ".join(picture.name for picture in sample.images) or sample.id
        digest = hashlib.sha256(f"{seed} {names}".encode()).digest()
        kept.append((number, row, bool(sample.media), int.from_bytes(digest[:8], "big")))
    if not kept and not report.problems:
        raise UserError(f"{path}: no samples in it; expected a list of conversations")
    source, rows, media, place = (
        np.array(column, dtype=kind)
        for column, kind in zip(zip(*kept) if kept else [()] * 4, (np.int32, np.int64, bool, np.uint64))
    )
    return Table(sources, source, rows, np.full(len(rows), -1), media, place), report


def walk(sources: Sequence[Source], check: Check | None, report: Report) -> Iterator[tuple[int, int, Sample]]:
    """(source, row, sample) of every usable sample, counted; what cannot be used goes into the report."""
    for number, source in enumerate(sources):
        for row, raw in enumerate(source.rows.walk()):
            try:
                sample = parse(raw, row, source.rows.path, source.places, report)
                if check is not None:
                    checked(sample, row, source.rows.path, check)
            except UserError as error:
                report.problems.append(str(error))
                continue
            images, videos = len(sample.images), len(sample.videos)
            report.counts.update({"samples": 1, "text only": not sample.media, "images": images, "videos": videos})
            report.counts.update({"several images": images > 1, "turns": len(sample.messages)})
            yield number, row, sample


def checked(sample: Sample, row: int, path: str, check: Check) -> None:
    """Raises what `check` does, with the sample's name."""
    try:
        check(sample)
    except UserError as error:
        raise UserError(f"{path}: sample {sample.id!r} (number {row}): {error}") from None


def order_of_groups(samples: Sequence[Sample]) -> dict[str, Any]:
    """What an Order needs to know of samples that are read in groups: which, and how many of them fit into memory."""
    found = samples.groups() if isinstance(samples, Table) else None
    if found is None:
        return {}
    groups, largest = found
    return {"groups": groups, "window": max(2, min(64, columns.CACHE_BYTES // 2 // max(1, largest)))}


def with_media(samples: Sequence[Sample]) -> np.ndarray:
    """For each sample whether it has pictures or videos."""
    if isinstance(samples, Table):
        return samples.media_N
    return np.array([bool(sample.media) for sample in samples], dtype=bool)


def turns_of(sample: Sample) -> list[Sample]:
    """Each turn of a conversation whose pictures stand in its first question as a sample of its own."""
    system = [m for m in sample.messages if m.role == "system"]
    turns = sample.messages[len(system) :]
    first = turns[0].text
    if sum(m.text.count(MARKER) for m in turns[1:]) or not sample.images or sample.videos:
        return [sample]
    head = "\n".join([MARKER] * first.count(MARKER))
    split = []
    for at in range(0, len(turns), 2):
        asked = turns[at] if at == 0 else Message("user", f"{head}\n{turns[at].text}")
        split.append(dataclasses.replace(sample, messages=(*system, asked, turns[at + 1])))
    return split
