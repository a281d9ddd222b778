"""Files of tensors: safetensors and PyTorch's .bin, single and sharded; looked into unread, then read piece by piece.

Files are mapped, and mapped memory counts as used; reopening them every few megabytes gives it back.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minillava.errors import UserError
from minillava.files import refuse_pointer
from minillava.schema import read_json

CHUNK = 32 << 20  # bytes read between reopenings of a file: what is mapped counts as memory in use
SHARD = 5 << 30  # bytes a file that we write, as the hub does


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: what can be known of it without reading it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as the file spells it
    share: tuple[int, int] = 0, 1  # of the rows of the tensor in the file: which, of how many; `shape` is the share's

    @property
    def nbytes(self) -> int:
        """Of the values, from their dtype."""
        size = 8 if "64" in self.dtype else 4 if "32" in self.dtype else 1 if "8" in self.dtype else 2
        return math.prod(self.shape) * size

    def part(self, which: int, shares: int) -> Stored:
        """One of so many equal shares of the rows."""
        shape = (self.shape[0] // shares, *self.shape[1:]) if self.shape else ()
        return replace(self, shape=shape, share=(which, shares))


def _load_bin(path: Path) -> dict[str, Tensor]:
    """A .bin: a pickled dict of tensors, mapped into memory where its format allows; nothing in it is executed."""
    refuse_pointer(path)
    try:
        values = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        culprit = re.search(r"Unsupported (?:global|operand|class)[^.]*?[:\s](\S+\.\S+)|GLOBAL (\S+)", str(error))
        found = f"something other than tensors ({next(g for g in culprit.groups() if g)})" if culprit else reason
        raise UserError(f"{path}: not loaded, it holds {found}; get the checkpoint as safetensors") from None
    except Exception as error:  # noqa: BLE001 what torch.load raises of a damaged file has no common class
        raise UserError(
            f"{path}: truncated or no PyTorch file ({[*str(error).splitlines(), ''][0]}); get it again"
        ) from None
    if not isinstance(values, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) and v.layout == torch.strided and not v.is_meta
        for k, v in values.items()
    ):
        raise UserError(f"{path}: holds something other than a dict of tensors; get the checkpoint as safetensors")
    return values


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        refuse_pointer(path)
        raise UserError(f"{path}: truncated or no safetensors file ({error}); get it again") from None


def inspect(path: Path) -> dict[str, Stored]:
    """The tensors of one file, by name, without reading them."""
    if path.suffix == ".bin":
        return {k: Stored(path, k, tuple(t.shape), str(t.dtype)) for k, t in _load_bin(path).items()}
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {k: Stored(path, k, tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}


def read(tensors: Iterable[Stored]) -> Iterator[Tensor]:
    """Each tensor in turn, as stored. A tensor is valid until the next is asked for; files are mapped, not copied."""
    path: Path | None = None
    file: Any = None
    with contextlib.ExitStack() as stack:
        mapped = 0
        for stored in tensors:
            if path != stored.path or mapped > CHUNK:
                stack.close()
                file, path, mapped = None, stored.path, 0  # what was open is gone before the next file takes memory
                is_bin = path.suffix == ".bin"
                whole = is_bin and not zipfile.is_zipfile(path)  # torch's format before 1.6 cannot be mapped
                file = _load_bin(path) if is_bin else stack.enter_context(_open(path))
            mapped += 0 if whole else stored.nbytes
            tensor = file[stored.name] if is_bin else file.get_tensor(stored.name)
            which, shares = stored.share
            yield tensor.chunk(shares)[which] if shares > 1 else tensor


def read_named(tensors: Mapping[str, Stored]) -> Iterator[tuple[str, Stored, Tensor]]:
    """Name, place and values of each tensor, in the order of the files; values as `read` gives them."""
    ordered = sorted(tensors.items(), key=lambda item: (str(item[1].path), item[1].name))
    for (name, stored), tensor in zip(ordered, read(stored for _, stored in ordered)):
        yield name, stored, tensor


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; one pass, and a second only where a sum is not finite."""
    if not tensor.is_floating_point() or tensor.is_meta or tensor.element_size() == 1:
        return True
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def inspect_folder(folder: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint folder: safetensors before .bin, one file or the shards of an index; {} if none."""
    for single in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = folder / f"{single.name}.index.json"
        if single.is_file():
            return inspect(single)
        if index.is_file():
            return _inspect_shards(index, single.suffix)
    return {}


def _inspect_shards(index: Path, suffix: str) -> dict[str, Stored]:
    """The tensors of all files that an index names."""
    named = read_json(index).get("weight_map")
    shards = sorted({str(v) for v in named.values()}) if isinstance(named, dict) else []
    if not shards or any(s != Path(s).name or Path(s).suffix != suffix for s in shards):
        raise UserError(f"{index}: no weight_map, or one that names something else than {suffix} files")
    if absent := [s for s in shards if not (index.parent / s).is_file()]:
        raise UserError(f"{index.parent}: {', '.join(absent)} not found, which {index.name} names; get them again")
    found: dict[str, Stored] = {}
    for shard in shards:
        tensors = inspect(index.parent / shard)
        if twice := found.keys() & tensors.keys():
            raise UserError(f"{index.parent / shard}: holds {', '.join(sorted(twice))}, and so does another shard")
        found |= tensors
    return found


def write(state: dict[str, Tensor], folder: Path, shard_bytes: int = SHARD) -> None:
    """Write model.safetensors, or past `shard_bytes` several files and an index. UserError for values not finite."""
    if broken := [name for name, tensor in state.items() if not finite(tensor)]:
        raise UserError(
            f"{folder}: not written, {broken[0]} has values that are not finite ({len(broken)} tensors in all): the "
            "training diverged; start again, or from an earlier checkpoint, with a lower rate"
        )
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        state, max_shard_size=shard_bytes, filename_pattern="model{suffix}.safetensors"
    )
    for name, keys in split.filename_to_tensors.items():
        save({key: state[key].contiguous() for key in keys}, folder / name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError, as other files do where a disk is full."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise os_error(error, path) from None
    path.chmod(mode)  # safetensors makes files that only their owner may read


def os_error(error: Exception, path: Path) -> OSError:
    """What safetensors and torch make of an OSError, as one again."""
    code = re.search(r"os error (\d+)|Errno (\d+)", str(error))
    number = int(next(filter(None, code.groups()))) if code else errno.EIO
    return OSError(number, os.strerror(number), str(path))
