"""Parquet and Arrow files, as the hub's data sets are kept (pyarrow; the extra `data`).

Parquet is read by row groups, the last few of which each process keeps; Arrow files are mapped into memory. Of columns
that are JSON (datasets' way with mixed types) the values are decoded.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from minillava.data.rows import UNREAD, Rows, unreadable
from minillava.errors import UserError

CACHE_BYTES = 512 << 20  # of row groups that a process keeps
GROUP_BYTES = 1 << 30  # the largest row group that is read


def arrow() -> Any:
    """pyarrow. Raises UserError where it is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet and Arrow files are read with pyarrow: pip install 'minillava[data]'") from None
    return pyarrow


def open_columns(path: str, filesystem: Any = None) -> Rows:
    """A parquet or Arrow file, of this machine or of a remote file system. Raises UserError if it is damaged."""
    pa = arrow()
    try:
        if filesystem is not None:
            return ParquetRows(path, filesystem)
        with open(path, "rb") as file:
            parquet = file.read(4) == b"PAR1"
        return ParquetRows(path) if parquet else ArrowRows(path)
    except OSError as error:
        raise unreadable(path, error) if error.errno else damaged(path, error) from None
    except pa.ArrowException as error:
        raise damaged(path, error) from None


def damaged(path: str, error: Exception) -> UserError:
    return UserError(f"{path}: a damaged file ({' '.join(str(error).split())[:120]}); fetch it again")


class GroupCache:
    """The row groups that a process read last, up to CACHE_BYTES of them."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock, self._process = threading.Lock(), os.getpid()

    def get(self, key: tuple[str, int], read: Callable[[], Any]) -> Any:
        """The table of this key, read if it is not here."""
        if self._process != os.getpid():  # forked, perhaps while the lock was taken
            self.__init__()  # type: ignore[misc]
        with self._lock:
            if key not in self._tables:
                while len(self._tables) > 1 and sum(table.nbytes for table in self._tables.values()) > CACHE_BYTES // 2:
                    self._tables.popitem(last=False)
                self._tables[key] = read()
            self._tables.move_to_end(key)
            return self._tables[key]


_KEPT = GroupCache()  # shared by the files of a process


class ParquetRows(Rows):
    """A parquet file."""

    def __init__(self, path: str, filesystem: Any = None):
        self.path, self._filesystem = path, filesystem
        self._opened: tuple[int, Any] | None = None
        meta = self._file().metadata
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        self._starts = np.cumsum([0, *(group.num_rows for group in groups)])
        self._sizes = [group.total_byte_size for group in groups]
        if max(self._sizes, default=0) > GROUP_BYTES:
            raise UserError(
                f"{path}: a row group of {max(self._sizes) / 1e9:.1f} GB, which is read as a whole; write it again "
                "with smaller ones (row_group_size = 1000)"
            )
        self._decode = decoder(self._file().schema_arrow)
        self._unread = [path for path in picture_bytes(meta) if all_there(meta, ".".join(path))]

    def _file(self) -> Any:
        """Opened by each process for itself: a file offset must not be shared."""
        if self._opened is None or self._opened[0] != os.getpid():
            parquet = arrow().parquet
            source = self.path if self._filesystem is None else self._filesystem.open(self.path, "rb")
            self._opened = os.getpid(), parquet.ParquetFile(source)
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_opened": None, "_decode": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._decode = decoder(self._file().schema_arrow)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def groups(self) -> np.ndarray:
        return np.repeat(np.arange(len(self._starts) - 1), np.diff(self._starts))

    def group_bytes(self) -> int:
        """Of the largest, read: in the file, equal pictures are there once."""
        return self._group(int(np.argmax(self._sizes))).nbytes if self._sizes else 0

    def _group(self, group: int) -> Any:
        return _KEPT.get((self.path, group), lambda: self._file().read_row_group(group, use_threads=False))

    def __getitem__(self, number: int) -> Any:
        group = int(np.searchsorted(self._starts, number, "right")) - 1
        table = self._group(group)
        return self._decode(table.slice(number - int(self._starts[group]), 1).to_pylist()[0])

    def walk(self) -> Iterator[Any]:
        """Without the bytes of pictures, where the file's statistics say that none are missing."""
        left_out = {".".join(path) for path in self._unread}
        names = [self._file().metadata.schema.column(i).path for i in range(self._file().metadata.num_columns)]
        columns = [name for name in names if name not in left_out]
        for batch in self._file().iter_batches(256, columns=columns, use_threads=False):
            for row in batch.to_pylist():
                for path in self._unread:
                    put_unread(row, path)
                yield self._decode(row)


def picture_bytes(meta: Any) -> list[tuple[str, ...]]:
    """Columns with the bytes of pictures, beside one with paths: image.bytes, images.list.element.bytes."""
    names = {meta.schema.column(i).path for i in range(meta.num_columns)}
    found = [name for name in names if name.endswith(".bytes") and name.removesuffix("bytes") + "path" in names]
    return [tuple(name.split(".")) for name in sorted(found)]


def all_there(meta: Any, path: str) -> bool:
    """Whether the statistics of all row groups say that a column has no null, nor an empty list around it."""
    column = [meta.schema.column(i).path for i in range(meta.num_columns)].index(path)
    for group in range(meta.num_row_groups):
        statistics = meta.row_group(group).column(column).statistics
        if statistics is None or not statistics.has_null_count or statistics.null_count:
            return False
    return True


def put_unread(row: dict[str, Any], path: tuple[str, ...]) -> None:
    """UNREAD in a row where the column at this path was left out."""
    values: list[Any] = [row]
    for key in path[:-1]:
        if key in ("list", "element", "item", "array"):
            values = [v for value in values if isinstance(value, list) for v in value] if key == "list" else values
        else:
            for value in values:
                value.setdefault(key, {})
            values = [value[key] for value in values]
    for value in values:
        value["bytes"] = UNREAD


class ArrowRows(Rows):
    """An Arrow file or stream, mapped into memory."""

    def __init__(self, path: str):
        self.path = path
        self._map()

    def _map(self) -> None:
        pa = arrow()
        mapped = pa.memory_map(self.path)
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        self._table = (pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)).read_all()
        self._decode = decoder(self._table.schema)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._map()

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, number: int) -> Any:
        return self._decode(self._table.slice(number, 1).to_pylist()[0])

    def walk(self) -> Iterator[Any]:
        for batch in self._table.to_batches(64):
            yield from map(self._decode, batch.to_pylist())


def decoder(schema: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What decodes the JSON in a row of this schema."""
    columns = {field.name: undo for field in schema if (undo := undo_json(field.type)) is not None}

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        for name, undo in columns.items():
            row[name] = undo(row[name])
        return row

    return decode


def undo_json(kind: Any) -> Callable[[Any], Any] | None:
    """What decodes the JSON in a value of an Arrow type; None if there is none."""
    types = arrow().types
    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: None if value is None else json.loads(value)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = undo_json(kind.value_type)
        return None if inner is None else lambda value: value if value is None else [inner(v) for v in value]
    if types.is_struct(kind):
        fields = {field.name: undo for field in kind if (undo := undo_json(field.type)) is not None}
        if fields:
            return lambda value: value and {k: fields[k](v) if k in fields else v for k, v in value.items()}
    return None
