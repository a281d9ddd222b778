"""Rows of data files. What a file holds is found by its first bytes, and a row is read when it is asked for.

JSON (a list, or an object a line) is here; parquet and Arrow are in `columns`, tars in `webdataset`, the hub in `hub`.
"""

from __future__ import annotations

import glob
import json
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from minillava.errors import UserError

T = TypeVar("T")
HUB = "hf://datasets/"
BOM = b"\xef\xbb\xbf"
COLUMNAR = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")  # parquet, Arrow's file and its stream
TAR = b"ustar"  # from byte 257
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zX": "xz", b"PK\x03\x04": "zip"}
IGNORED = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what datasets writes beside
UNREAD = b"bytes that were not read"  # stands for those of pictures while rows are only checked


class Rows(ABC):
    """The rows of one file."""

    path: str

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def __getitem__(self, number: int) -> Any:
        """A row as plain Python."""

    def walk(self) -> Iterator[Any]:
        """All rows in order, to be checked: bytes of pictures that are there may be UNREAD, errors are values."""
        for number in range(len(self)):
            try:
                yield self[number]
            except UserError as error:
                yield error


class PerProcess(Generic[T]):
    """What each process opens for itself when it first needs it: a file's offset, a map, a lock must not be shared."""

    def __init__(self, opened: Callable[[], T]):
        self._open, self._process = opened, 0

    def __call__(self) -> T:
        if self._process != os.getpid():
            self._opened, self._process = self._open(), os.getpid()
        return self._opened

    def __reduce__(self) -> Any:
        return PerProcess, (self._open,)


class JsonRows(Rows):
    """A JSON list or JSON lines: the text stays bytes, and where each sample begins and ends is known."""

    def __init__(self, path: str):
        self.path = path
        self._text: Callable[[], Any] = PerProcess(partial(mapped, path))
        head = bytes(self._text()[:4096]).removeprefix(BOM).lstrip()
        if head[:1] == b"[" and not path.endswith(".jsonl"):
            elements, self.spans = split_list(path)
            self._text = partial(bytes, elements)  # bytes of bytes are no copy
        else:
            self.spans = lines_in(self._text(), path)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, number: int) -> Any:
        start, end = self.spans[number]
        return json.loads(self._text()[start:end])


def mapped(path: str) -> Any:
    """The bytes of a file, mapped into memory."""
    try:
        with open(path, "rb") as file:
            empty = os.fstat(file.fileno()).st_size == 0
            return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise unreadable(path, error) from None


def lines_in(text: Any, path: str) -> np.ndarray:
    """[N, 2]: where each line that is not blank begins and ends."""
    spans, start, size = [], len(BOM) if text[:3] == BOM else 0, len(text)
    number = 0
    while start < size:
        number += 1
        end = text.find(b"\n", start)
        end = size if end < 0 else end
        line = text[start:end]
        if line.strip():
            check_json(line, path, number, start)
            spans.append((start, end))
        start = end + 1
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def check_json(line: bytes, path: str, number: int, start: int) -> None:
    """Raises UserError that names the line unless it is JSON."""
    try:
        json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {start + error.start}); save it as UTF-8 JSON") from None
    except (ValueError, RecursionError) as error:
        raise not_json(path, error, number) from None


def split_list(path: str) -> tuple[bytes, np.ndarray]:
    """The elements of a JSON list as UTF-8 end to end, and where each begins and ends."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8 JSON") from None
    scan, space = json.JSONDecoder().raw_decode, json.decoder.WHITESPACE.match  # type: ignore[attr-defined]
    parts, at = [], text.index("[") + 1
    try:
        at = space(text, at).end()
        while text[at : at + 1] != "]":
            _, end = scan(text, at)
            parts.append(text[at:end].encode("utf-8", "surrogatepass"))
            at = space(text, end).end()
            if text[at : at + 1] == ",":
                at = space(text, at + 1).end()
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, at + 1)
    except (ValueError, RecursionError) as error:
        raise not_json(path, error) from None
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return b"".join(parts), np.stack([ends - [len(part) for part in parts], ends], 1).astype(np.int64)


def not_json(path: str, error: Exception, line: int = 0) -> UserError:
    """A JSONDecodeError, Python's refusal of a number of thousands of digits, or of lists in lists in lists."""
    if isinstance(error, RecursionError):
        return UserError(f"{path}: nested too deeply to be a list of samples; check the file")
    at, why = (error.lineno, error.msg) if isinstance(error, json.JSONDecodeError) else (1, str(error))
    return UserError(f"{path}: not JSON at line {line or at} ({why}); expected a list of samples, or one a line")


def unreadable(path: str, error: OSError) -> UserError:
    """What is said of a file that cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such file; check the path")
    return UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions")


def open_rows(path: str, stream: bool = False) -> list[Rows]:
    """The files at a path: one, a folder of them, those that a pattern with * matches, or a data set of the hub, which
    is fetched first, or with `stream` read where it is. Raises UserError if there is nothing that can be read."""
    if path.startswith(HUB) or (path.count("/") == 1 and not Path(path).exists() and not Path(path).suffix):
        from minillava.data.hub import open_hub

        return open_hub(path if path.startswith(HUB) else HUB + path, stream)
    return [open_file(file) for file in files_at(path)]


def files_at(path: str) -> list[str]:
    """The data files at a path, in the order of their names: of a folder those with columns, or tars, else JSON."""
    if glob.has_magic(path) and not Path(path).exists():
        found = sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())
        if not found:
            raise UserError(f"{path}: no file matches; check the pattern")
        return found
    if not Path(path).is_dir():
        return [path]
    files = [file for file in sorted(Path(path).rglob("*")) if file.is_file() and not file.name.startswith("cache-")]
    binary = [file for file in files if kind_of(str(file)) != "json"]
    chosen = binary or [f for f in files if f.suffix in (".json", ".jsonl") and f.name not in IGNORED]
    if not chosen:
        raise UserError(f"{path}: no parquet, Arrow, tar or JSON files in this folder; check the path")
    return [str(file) for file in chosen]


def kind_of(path: str) -> str:
    """columns, tar or json, by the first bytes."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise unreadable(path, error) from None
    return "columns" if head.startswith(COLUMNAR) else "tar" if head[257:262] == TAR else "json"


def open_file(path: str) -> Rows:
    """The rows of one file, by its content. Raises UserError if it is none of those that can be read."""
    kind = kind_of(path)
    if kind == "columns":
        from minillava.data.columns import open_columns

        return open_columns(path)
    if kind == "tar":
        from minillava.data.webdataset import TarRows

        return TarRows(path)
    with open(path, "rb") as file:
        head = file.read(8)
    for magic, name in PACKED.items():
        if head.startswith(magic):
            raise UserError(f"{path}: packed with {name}; unpack it, or give a folder, parquet, a tar or JSON")
    return JsonRows(path)
