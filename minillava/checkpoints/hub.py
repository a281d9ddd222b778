"""Where a checkpoint is: a folder, or a hub id that is downloaded or taken from the local cache."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

from minillava.errors import UserError
from minillava.files import answered_soon

NANO = Path(__file__).resolve().parents[1] / "nano"  # the model that ships


def resolve(source: Path | str, weights: bool = True) -> Path:
    """A checkpoint folder as it is, "nano" (the model that ships), or a hub id ('owner/name') downloaded or cached;
    without `weights` its small files alone."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if str(source) == "nano":
        return NANO
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith((".", "/")):
        what = "is a file, not a folder" if path.is_file() else "no such folder"
        raise UserError(f"{source}: {what}; give a checkpoint's folder, or a hub id as OWNER/NAME")
    from huggingface_hub import HfApi, snapshot_download

    fetch = functools.partial(snapshot_download, str(source))
    try:
        with answered_soon():
            HfApi().model_info(str(source))
            return _fetched(fetch, weights)
    except Exception as error:  # noqa: BLE001 what the hub's client and its transports raise has no common class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    try:
        return _fetched(functools.partial(fetch, local_files_only=True), weights)
    except Exception:  # noqa: BLE001
        raise UserError(
            f"{source}: no such folder here, not in the local Hugging Face cache, and not downloaded ({reason}); "
            f"fetch it where there is a network ('hf download {source}') or give a folder"
        ) from None


def _fetched(fetch: Callable[..., str], weights: bool) -> Path:
    # The last two are original LLaVA's, which stand beside adapters in either format.
    small = ["*.json", "*.jinja", "*.model", "*.txt", *["non_lora_trainables.bin", "mm_projector.bin"] * weights]
    found = Path(fetch(allow_patterns=[*small, *["*.safetensors"] * weights]))
    if weights and not any(found.glob("*.safetensors")):  # older checkpoints
        found = Path(fetch(allow_patterns=[*small, "*.bin"]))
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
