"""Samples that are read when they are asked for: what is kept of each is where it is, and a few numbers.

So 100,000 rows with their pictures cost no more memory than their places, and every loader process reads its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from minillava.chat.messages import Message
from minillava.data import columns
from minillava.data.files import open_store
from minillava.data.layouts import MARKER
from minillava.data.llava_json import Check, Report, Sample, parse
from minillava.data.pictures import Places, UrlStore
from minillava.data.rows import Rows, open_rows
from minillava.errors import UserError


@dataclass
class Source:
    """A file of a data set."""

    rows: Rows
    places: Places
    name: str  # of the data set

    def sample(self, number: int) -> Sample:
        """The sample of a row. Raises UserError."""
        return parse(self.rows[number], number, self.rows.path, self.places, Report(self.name))


PLACE = np.dtype(
    [
        ("source", np.int32),
        ("row", np.int64),  # there
        ("turn", np.int64),  # of it; -1: all turns
        ("media", bool),  # whether it has pictures or videos
        ("order", np.uint64),  # by the names of its pictures: where it stands among those of all sets over them
    ]
)


@dataclass
class Table(Sequence[Sample]):
    """Samples by their place."""

    sources: list[Source]
    place_N: np.ndarray  # of PLACE

    def __len__(self) -> int:
        return len(self.place_N)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> Table: ...
    def __getitem__(self, index: int | slice | np.ndarray) -> Sample | Table:
        if isinstance(index, slice | np.ndarray):
            return Table(self.sources, self.place_N[index])
        source, row, turn, _, _ = self.place_N[index].item()
        sample = self.sources[source].sample(row)
        return sample if turn < 0 else turns_of(sample)[turn]

    def split_turns(self) -> Table:
        """With each turn as a sample of its own."""
        turns = [range(len(turns_of(sample))) for sample in self]
        table = self[np.repeat(np.arange(len(self)), [*map(len, turns)])]
        table.place_N["turn"] = [*itertools.chain(*turns)]
        return table


MEASURED = 8  # files whose largest group is read to know its size
SCATTERED = 256  # samples in a group of those that are read one by one


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
    kept: list[tuple[int, int, int, bool, int]] = []
    for number, source in enumerate(sources):
        for row, raw in enumerate(source.rows.walk()):
            try:
                sample = parse(raw, row, source.rows.path, source.places, report, check)
            except UserError as error:
                report.problems.append(str(error))
                continue
            images, videos = len(sample.images), len(sample.videos)
            report.counts.update({"samples": 1, "text only": not sample.media, "images": images, "videos": videos})
            report.counts.update({"several images": images > 1, "turns": len(sample.messages)})
            names = " ".join(picture.name for picture in sample.images) or sample.id
            if raw.get("id") is None and all(picture.name.startswith(f"{row}#") for picture in sample.images):
                names = f"{Path(source.rows.path).name} {names}"  # which only numbers the rows of its file
            digest = hashlib.sha256(f"{seed} {names}".encode()).digest()
            kept.append((number, row, -1, bool(sample.media), int.from_bytes(digest[:8], "big")))
    if not kept and not report.problems:
        raise UserError(f"{path}: no samples in it; expected a list of conversations")
    return Table(sources, np.array(kept, PLACE)), report


def order_of_groups(samples: Sequence[Sample]) -> dict[str, Any]:
    """What an Order needs to know of samples that are read in groups: for each the number of its group, all of which is
    read at once, and how many groups fit into memory. Samples beside groups share one with others by chance."""
    if not isinstance(samples, Table):
        return {}
    in_groups = [source.rows for source in samples.sources if isinstance(source.rows, columns.ParquetRows)]
    if not in_groups:
        return {}
    rng, groups, count = np.random.default_rng(0), np.empty(len(samples), dtype=np.int64), 0
    for number, source in enumerate(samples.sources):
        mine, rows = samples.place_N["source"] == number, source.rows
        beside = max(1, len(rows) // SCATTERED)
        of_rows = rows.groups() if isinstance(rows, columns.ParquetRows) else rng.integers(beside, size=len(rows))
        groups[mine] = of_rows[samples.place_N["row"][mine]] + count
        count += int(of_rows.max(initial=0)) + 1
    largest = max(1, *(rows.group_bytes() for rows in in_groups[:: -(-len(in_groups) // MEASURED)]))
    return {"groups": groups, "window": max(2, min(64, columns.CACHE_BYTES // 2 // largest))}


def with_media(samples: Sequence[Sample]) -> np.ndarray:
    """For each sample whether it has pictures or videos."""
    if isinstance(samples, Table):
        return samples.place_N["media"]
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
