"""Checkpoints of a training run: tensors in safetensors, the rest in JSON, all or nothing.

A checkpoint is a folder step-00000123 that is written beside its place and renamed into it, so that a kill at any
moment leaves the one before. It holds trained/ (float32 masters, named PART.NAME), optimizer/ (moments and random
states; dropped when a stage is finished) and state.json. There is no pickle in it. torch.distributed.checkpoint writes
the tensors: every rank its own shards, in the background; any number of ranks reads them back.
"""

from __future__ import annotations

import json
import os
import random
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from minillava import files
from minillava.checkpoints.tensor_files import os_error
from minillava.errors import UserError
from minillava.training import parallel
from minillava.training.optim import Together

TRAINED, OPTIMIZER, STATE, SUMS = "trained", "optimizer", "state.json", "crc32"
AT_ONCE = 1 << 28  # parameters whose moments are read together


class Saver:
    """Writes checkpoints into `folder`, one at a time and beside the training, and keeps the newest `keep`."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.pending: Future[None] | None = None
        self.group = parallel.host_group()

    def save(
        self, step: int, trained: dict[str, Tensor], optimizer: Iterable[tuple[str, Tensor]], state: dict[str, Any]
    ) -> None:
        """Copy all to the host's memory, one tensor after the other, and write folder/step-N in the background."""
        self.wait()
        target = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{target.name}.partial"
        with parallel.main_first():
            if parallel.is_main():
                files.sweep(self.folder)
                temporary.mkdir(parents=True)
        stager = _dcp().staging.BlockingAsyncStager()
        tensors = {TRAINED: ((name, t.detach()) for name, t in trained.items()), OPTIMIZER: optimizer}
        staged = {
            part: {name: stager.stage({name: tensor})[name] for name, tensor in values}
            for part, values in tensors.items()
        }
        pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending = pool.submit(self._write, temporary, target, staged, state)
        pool.shutdown(wait=False)  # the thread ends with the write, not with the interpreter (see parallel.leave)

    def wait(self) -> None:
        """Until the last one is on the disk. Raises what went wrong with it."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            try:
                pending.result()
            except (SafetensorError, _dcp().CheckpointException) as error:
                raise os_error(error, self.folder) from error

    def _write(self, temporary: Path, target: Path, staged: dict[str, Any], state: dict[str, Any]) -> None:
        dcp = _dcp()
        for part, tensors in staged.items():  # returns on the first rank when all ranks have written
            writer = dcp.HuggingFaceStorageWriter(str(temporary / part), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=parallel.world() == 1)
        if parallel.is_main():
            state = state | {SUMS: checksums(temporary) | {STATE: zlib.crc32(json.dumps(state).encode())}}
            files.write_whole(temporary / STATE, json.dumps(state, indent=1) + "\n")
            if target.exists():  # only where a run was resumed from an older one by hand
                files.remove(target)
            os.rename(temporary, target)
            files.sync(self.folder)
            for old in _all(self.folder)[: -self.keep]:
                files.remove(old)


def keep_weights(folder: Path) -> None:
    """At the end of a stage: only the newest checkpoint, without what only a continuation would need."""
    files.sweep(folder)
    for path in _all(folder)[:-1]:
        files.remove(path)
    for path in _all(folder):
        files.sweep(path)
        if (path / OPTIMIZER).is_dir():
            files.remove(path / OPTIMIZER)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    return max(_all(folder), default=None)


def checksums(path: Path) -> dict[str, int]:
    """CRC-32 of each file of tensors in a checkpoint."""
    sums = {}
    for part in (TRAINED, OPTIMIZER):
        for name in sorted((path / part).iterdir()) if (path / part).is_dir() else ():
            value = 0
            with name.open("rb") as file:
                while piece := file.read(1 << 24):
                    value = zlib.crc32(piece, value)
            sums[f"{part}/{name.name}"] = value
    return sums


def read_state(path: Path) -> dict[str, Any]:
    """What state.json of a checkpoint holds. Raises UserError where it, or a file of tensors beside it, is not what was
    written; a part that was dropped since is not missed, and checkpoints of before there were checksums are read."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        sums = state.pop(SUMS, None)
        if sums is None:
            return state
        found = checksums(path) | {STATE: zlib.crc32(json.dumps(state).encode())}
        wrong = [n for n, value in sums.items() if (path / n).parent.is_dir() and found.get(n) != value]
    except (OSError, ValueError, RecursionError, TypeError, AttributeError) as error:
        raise UserError(f"{path / STATE}: cannot be read ({error}); {_remedy(path)}") from None
    if wrong:
        raise UserError(f"{path / wrong[0]}: is not what was written there (its checksum differs); {_remedy(path)}")
    return state


def shapes(folder: Path) -> dict[str, torch.Size]:
    """The tensors that the files of a folder hold together, and how large they are."""
    try:
        found = _dcp().HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: cannot be read ({error}); {_remedy(folder.parent)}") from None
    if not found:
        raise UserError(f"{folder}: holds no tensors; {_remedy(folder.parent)}")
    return {name: value.size for name, value in found.items()}  # type: ignore[union-attr]


def load(folder: Path, tensors: dict[str, Tensor], strict: bool = True) -> None:
    """Read into tensors, whole or sharded, by name: all that there are and no others (unless not `strict`).

    Raises UserError for what is missing, left over, misshapen or unreadable. Every rank must call it.
    """
    found = shapes(folder)
    wrong = list(tensors.keys() ^ found.keys() if strict else tensors.keys() - found.keys())
    wrong += [name for name in tensors.keys() & found.keys() if tensors[name].shape != found[name]]
    if wrong:
        raise UserError(f"{folder}: does not fit this model: {', '.join(sorted(wrong)[:5])} ({len(wrong)} in all)")
    if tensors:
        dcp = _dcp()
        try:
            reader = dcp.HuggingFaceStorageReader(str(folder))
            values = {name: tensor.detach() for name, tensor in tensors.items()}
            dcp.load(values, storage_reader=reader, no_dist=parallel.world() == 1)
        except (SafetensorError, OSError, dcp.CheckpointException) as error:
            raise UserError(f"{folder}: cannot be read ({error}); {_remedy(folder.parent)}") from None


def read(folder: Path, names: list[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a folder, whole, on the host; all of them where none are named. Every rank must call it."""
    found = shapes(folder)
    values = {name: torch.empty(found[name]) for name in (found if names is None else names)}
    load(folder, values, strict=False)
    return values


def optimizer_tensors(optimizer: Together, named: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's state as 'moment/parameter' and tensor; moments in 8 bits are made float32 one by one."""
    for name, parameter in named.items():
        for key, value in optimizer.moments(parameter).items():
            yield f"{key}/{name}", value


def load_optimizer(folder: Path, optimizer: Together, named: dict[str, Tensor]) -> None:
    """Some parameters at a time: moments that are in memory in 8 bits come in float32."""
    stored: dict[str, list[tuple[str, torch.Size]]] = {}
    for key, shape in shapes(folder).items():
        moment, slash, name = key.partition("/")
        if slash and moment.partition("@")[2] in ("", str(parallel.rank())):  # X@2 is of the third rank alone
            if name not in named:
                raise UserError(f"{folder}: does not fit this model: {key}")
            stored.setdefault(name, []).append((moment, shape))
    values: dict[str, dict[str, Tensor]] = {}

    def load_these() -> None:
        tensors = {f"{moment}/{n}": t for n, moments in values.items() for moment, t in moments.items()}
        load(folder, tensors, strict=False)
        for name, moments in values.items():
            optimizer.load_moments(named[name], moments)
        values.clear()

    for name, moments in sorted(stored.items()):
        parameter = named[name]
        values[name] = {}
        for moment, shape in moments:
            device = parameter.device if shape or optimizer.defaults.get("fused") else "cpu"
            whole = shape == parameter.shape and shape
            values[name][moment] = torch.zeros_like(parameter) if whole else torch.zeros(shape, device=device)
        if sum(named[n].numel() for n in values) >= AT_ONCE:
            load_these()
    load_these()


def random_state() -> tuple[dict[str, Tensor], list[Any]]:
    """States of this rank's torch generators, as tensors, and of Python's, as JSON."""
    tensors = {f"random.cpu.{parallel.rank()}": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[f"random.cuda.{parallel.rank()}"] = torch.cuda.get_rng_state()
    version, words, gauss = random.getstate()
    return tensors, [version, list(words), gauss]


def load_random_state(folder: Path, python: list[Any]) -> None:
    """Take the states back; a rank that was not there when they were saved keeps its own."""
    tensors, _ = random_state()
    tensors = {name: tensor for name, tensor in tensors.items() if name in shapes(folder)}
    load(folder, tensors, strict=False)
    for name, state in tensors.items():
        (torch.set_rng_state if name.startswith("random.cpu") else torch.cuda.set_rng_state)(state)
    random.setstate((python[0], tuple(python[1]), python[2]))


def _dcp() -> Any:
    """torch.distributed.checkpoint, whose import takes seconds."""
    import torch.distributed.checkpoint as dcp

    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant then
    return dcp


def _all(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()  # glob finds nothing where a folder cannot be read
    return sorted(path for path in found if re.fullmatch(r"step-\d+", path.name))


def _remedy(path: Path) -> str:
    return f"remove {path} to resume from the one before"
