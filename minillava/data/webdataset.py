"""Webdataset tars: files of one name in a row are a sample, what follows the name's first dot says what each holds.

A sample's JSON is its row; its pictures are those of the row, in the order of their names; a text beside pictures is
their caption. Extensions are lower-cased and "1.5.jpg" belongs to sample "1", as in webdataset. Of names with numbers
2.jpg comes before 10.jpg.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from functools import partial
from typing import Any

import numpy as np

from minillava.data.files import MAX_FILE_BYTES
from minillava.data.rows import PerProcess, Rows, unreadable
from minillava.errors import UserError

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif")
VIDEOS = ("mp4", "webm", "mkv", "mov", "avi")


class TarRows(Rows):
    """A tar, read in place: where each member begins is found once."""

    def __init__(self, path: str):
        self.path = path
        self._file = PerProcess(partial(os.open, path, os.O_RDONLY))
        self._names: list[str] = []
        places: list[tuple[int, int]] = []
        first: list[int] = []  # member of each sample
        key = None
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    if split_name(member.name)[0] != key:
                        key = split_name(member.name)[0]
                        first.append(len(places))
                    self._names.append(member.name)
                    places.append((member.offset_data, member.size))
                    archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every member otherwise
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{path}: cannot be read as a tar ({error}); fetch it again") from None
        self._places = np.array(places, dtype=np.int64).reshape(-1, 2)
        self._first = np.array([*first, len(places)])

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, number: int) -> Any:
        members = range(self._first[number], self._first[number + 1])
        files = {split_name(self._names[at])[1]: at for at in members}
        key = split_name(self._names[members[0]])[0]
        if len(files) < len(members):
            raise UserError(f"{self.path}: two files of one name in sample {key!r}; make the tar again")
        raw: dict[str, Any] = {}
        if "json" in files:
            raw = self._object(files["json"])
        if "txt" in files:
            text = self._read(files["txt"]).decode(errors="replace")
            raw["caption"] = text if raw.get("caption") is None else raw["caption"]
        raw.setdefault("id", key)
        for column, kinds in (("images", PICTURES), ("videos", VIDEOS)):
            found = sorted((name for name in files if name.rsplit(".", 1)[-1] in kinds), key=by_numbers)
            if found:
                raw.pop(column.removesuffix("s"), None)
                raw[column] = [{"bytes": self._read(files[name]), "path": self._names[files[name]]} for name in found]
        return raw

    def _object(self, member: int) -> dict[str, Any]:
        try:
            value = json.loads(self._read(member))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: {self._names[member]} is not JSON ({error}); correct it") from None
        if not isinstance(value, dict):
            raise UserError(f"{self.path}: {self._names[member]} is no JSON object; correct it")
        return value

    def _read(self, member: int) -> bytes:
        """A member's bytes, by position: threads share no offset."""
        offset, size = self._places[member].tolist()
        if size > MAX_FILE_BYTES:
            raise UserError(f"{self._names[member]}: {size:,} bytes in {self.path}; scale the image down first")
        try:
            return os.pread(self._file(), size, offset)
        except OSError as error:
            raise unreadable(self.path, error) from None


def by_numbers(name: str) -> list[tuple[int, str]]:
    """What sorts names with numbers in them as people count."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def split_name(name: str) -> tuple[str, str]:
    """Sample and extension of a member: split at the first dot behind the last slash."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()
