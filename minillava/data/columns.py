"""Parquet and Arrow files, as the hub's data sets are kept (pyarrow; the extra `data`).

Parquet is read by row groups, the last few of which each process keeps; Arrow files are mapped into memory. Of columns
that are JSON (datasets' way with mixed types) the values are decoded.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from minillava.data.rows import UNREAD, PerProcess, Rows, unreadable
from minillava.errors import UserError

Decoder = Callable[[dict[str, Any]], dict[str, Any]]  # a row with the values of its JSON in place of the texts
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
    with reading(path):
        if filesystem is not None:
            return ParquetRows(path, filesystem)
        with open(path, "rb") as file:
            parquet = file.read(4) == b"PAR1"
        return ParquetRows(path) if parquet else ArrowRows(path)


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Errors that name the file: one that cannot be read, or is damaged, if only in a page that is read much later."""
    pa = arrow()
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno:
            raise unreadable(path, error) from None
        why = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: a damaged file ({why}); fetch it again") from None


class GroupCache:
    """The row groups that a process read last, up to CACHE_BYTES of them."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int], read: Callable[[], Any]) -> Any:
        """The table of this key, read if it is not here."""
        with self._lock:
            if key not in self._tables:
                while len(self._tables) > 1 and sum(table.nbytes for table in self._tables.values()) > CACHE_BYTES // 2:
                    self._tables.popitem(last=False)
                self._tables[key] = read()
            self._tables.move_to_end(key)
            return self._tables[key]


_kept = PerProcess(GroupCache)  # shared by the files of a process


class ParquetRows(Rows):
    """A parquet file, whose rows are read in groups."""

    def __init__(self, path: str, filesystem: Any = None):
        self.path, self._opened = path, PerProcess(partial(open_parquet, path, filesystem))
        meta = self._opened()[0].metadata
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        self._starts = np.cumsum([0, *(group.num_rows for group in groups)])
        self._sizes = [group.total_byte_size for group in groups]
        if max(self._sizes, default=0) > GROUP_BYTES:
            raise UserError(
                f"{path}: a row group of {max(self._sizes) / 1e9:.1f} GB, which is read as a whole; write it again "
                "with smaller ones (row_group_size = 1000)"
            )
        self._unread = bytes_beside_paths(meta)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def groups(self) -> np.ndarray:
        """For each row the number of its group."""
        return np.repeat(np.arange(len(self._starts) - 1), np.diff(self._starts))

    def group_bytes(self) -> int:
        """Of the largest, read: in the file, equal pictures are there once."""
        return self._group(int(np.argmax(self._sizes))).nbytes if self._sizes else 0

    def _group(self, group: int) -> Any:
        with reading(self.path):
            return _kept().get((self.path, group), lambda: self._opened()[0].read_row_group(group, use_threads=False))

    def __getitem__(self, number: int) -> Any:
        group = int(np.searchsorted(self._starts, number, "right")) - 1
        table = self._group(group)
        return self._opened()[1](table.slice(number - int(self._starts[group]), 1).to_pylist()[0])

    def walk(self) -> Iterator[Any]:
        """Without the bytes of pictures, where the file's statistics say that none are missing."""
        file, decode = self._opened()
        columns = [name for name in columns_of(file.metadata) if name not in self._unread]
        batches = file.iter_batches(256, columns=columns, use_threads=False)
        while True:
            with reading(self.path):
                batch = next(batches, None)
            if batch is None:
                return
            for row in batch.to_pylist():
                for name in self._unread:
                    put_unread(row, name)
                yield decode(row)


def open_parquet(path: str, filesystem: Any) -> tuple[Any, Decoder]:
    """The file, and what decodes its rows."""
    parquet = arrow().parquet
    file = parquet.ParquetFile(path if filesystem is None else filesystem.open(path, "rb"))
    return file, decoder(file.schema_arrow)


def columns_of(meta: Any) -> list[str]:
    """The columns of a parquet file: image.bytes, images.list.element.bytes."""
    return [meta.schema.column(i).path for i in range(meta.num_columns)]


def bytes_beside_paths(meta: Any) -> list[str]:
    """Columns with the bytes of pictures, beside one with paths, that have no null by the statistics of all groups."""
    names = columns_of(meta)

    def all_there(column: int) -> bool:
        groups = (meta.row_group(group).column(column).statistics for group in range(meta.num_row_groups))
        return all(found is not None and found.has_null_count and not found.null_count for found in groups)

    paired = {name.removesuffix("path") + "bytes" for name in names if name.endswith(".path")}
    return sorted(name for at, name in enumerate(names) if name in paired and all_there(at))


def put_unread(row: dict[str, Any], column: str) -> None:
    """UNREAD in a row where a column was left out."""
    values: list[Any] = [row]
    for key in column.split(".")[:-1]:
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
        self.path, pa = path, arrow()
        mapped = pa.memory_map(path)
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        self._table = (pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)).read_all()
        self._decode = decoder(self._table.schema)

    def __reduce__(self) -> Any:
        return ArrowRows, (self.path,)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, number: int) -> Any:
        return self._decode(self._table.slice(number, 1).to_pylist()[0])

    def walk(self) -> Iterator[Any]:
        for batch in self._table.to_batches(64):
            yield from map(self._decode, batch.to_pylist())


def decoder(schema: Any) -> Decoder:
    """What decodes the JSON in a row of this schema."""
    return undo_json(arrow().struct(list(schema))) or (lambda row: row)


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
