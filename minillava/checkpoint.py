"""Checkpoints of a training run: tensors in safetensors, the rest in JSON, all or nothing.

A checkpoint is a folder step-00000123 that is written beside its place and renamed into it, so that a kill at any
moment leaves the one before. It holds trained.safetensors (float32 masters, named PART.NAME), optimizer.safetensors
(moments and random states; dropped when a stage is finished) and state.json. There is no pickle in it.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillava.config import UserError
from minillava.optim import Together

TRAINED, OPTIMIZER, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"
NAME = re.compile(r"step-(\d+)")


def write(folder: Path, step: int, files: dict[str, dict[str, Any]], keep: int) -> Path:
    """Save `files` as folder/step-N and remove all but the newest `keep`. A file is tensors or, by its name, JSON."""
    target = folder / f"step-{step:08d}"
    temporary = folder / f".{target.name}.partial"
    for stale in folder.glob(".*.partial"):  # of a run that was killed while it wrote
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)
    for name, content in files.items():
        if name.endswith(".json"):
            (temporary / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        else:
            save_file({key: tensor.detach().contiguous() for key, tensor in content.items()}, temporary / name)
        _sync(temporary / name)
    if target.exists():  # only where a run was resumed from an older one by hand
        shutil.rmtree(target)
    os.rename(temporary, target)
    _sync(folder)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = _all(folder)
    return found[-1] if found else None


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); remove {path.parent} to resume from the one before"
        ) from None


def read_state(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); remove {path.parent} to resume from the one before"
        ) from None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A JSON file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    _sync(temporary)
    os.rename(temporary, path)


def fill(parameters: dict[str, Tensor], values: dict[str, Tensor], where: Path) -> None:
    """Copy `values` into the parameters of the same names; all of them, and no others, or a UserError."""
    wrong = [name for name in parameters.keys() ^ values.keys()]
    wrong += [name for name in parameters.keys() & values.keys() if parameters[name].shape != values[name].shape]
    if wrong:
        raise UserError(f"{where}: does not fit this model: {', '.join(sorted(wrong)[:5])} ({len(wrong)} in all)")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def optimizer_tensors(optimizer: Together, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's state as 'moment/parameter' -> tensor."""
    return {
        f"{key}/{name}": value
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def fill_optimizer(optimizer: Together, named: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for key, value in values.items():
        moment, slash, name = key.partition("/")
        if slash and name in named:
            device = "cpu" if moment == "step" and not optimizer.defaults.get("fused") else named[name].device
            optimizer.state[named[name]][moment] = value.to(device)


def random_state() -> tuple[dict[str, Tensor], list[Any]]:
    """States of torch's generators, as tensors, and of Python's, as JSON."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    return tensors, [version, list(words), gauss]


def set_random_state(tensors: dict[str, Tensor], python: list[Any]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available():
        states = [tensors[name] for name in sorted(tensors) if name.startswith("random.cuda.")]
        for device, state in enumerate(states[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
    random.setstate((python[0], tuple(python[1]), python[2]))


def _all(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def _sync(path: Path) -> None:
    """Have the disk take what was written before anything is renamed: a power cut must not leave an empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
