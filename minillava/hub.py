"""Where a checkpoint is: a folder, or a hub id that is downloaded or taken from the local cache."""

from __future__ import annotations

import re
from pathlib import Path

from minillava.config import UserError


def resolve(source: Path | str) -> Path:
    """A checkpoint folder as it is, or a hub id ('owner/name') downloaded or taken from the local cache."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith((".", "/")):
        raise UserError(f"{source}: no such folder")
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.jinja", "*.model", "*.txt"]
    try:
        found = Path(snapshot_download(str(source), allow_patterns=[*small, "*.safetensors"]))
        if not any(found.glob("*.safetensors")):  # older checkpoints
            found = Path(snapshot_download(str(source), allow_patterns=[*small, "*.bin"]))
    except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{source}: no such folder here, not in the local Hugging Face cache, and not downloaded ({reason}); "
            f"fetch it where there is a network ('hf download {source}') or give a folder"
        ) from None
    return found


def find(name: str, checkpoint: Path, what: str) -> Path:
    """A folder that a checkpoint's config.json names: relative to the checkpoint, as it stands, or a hub id."""
    for candidate in (checkpoint / name, Path(name)):
        if candidate.is_dir():
            return candidate
    try:
        return resolve(name)
    except UserError as error:
        raise UserError(f"{checkpoint}: {what} is not in {checkpoint / name}; {error}") from None
