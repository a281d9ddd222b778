"""Data sets of the Hugging Face hub: hf://datasets/OWNER/NAME[@REVISION][/FOLDER or pattern].

Their files are fetched into the hub's own cache, or parquet is read over the network, a row group at a time.
"""

from __future__ import annotations

import fnmatch
from typing import Any

from minillava.data.columns import open_columns
from minillava.data.rows import HUB, IGNORED, Rows, open_file
from minillava.errors import UserError
from minillava.files import answered_soon

ENDINGS = ("parquet", "arrow", "tar", "jsonl", "json")  # the first of which there are files is taken


def filesystem(place: str) -> Any:
    """The hub as a file system, asked first whether the data set is there: a file system says less about why not."""
    from huggingface_hub import HfApi, HfFileSystem

    repo, revision, _ = split_place(place)
    HfApi().dataset_info(repo, revision=revision)
    return HfFileSystem()


def open_hub(source: str, stream: bool) -> list[Rows]:
    """The files of a data set; of one with splits those of "train", unless a folder or pattern names others.

    Raises UserError where the hub or the data set cannot be reached.
    """
    place = source.removeprefix("hf://").rstrip("/")
    try:
        with answered_soon():
            hub = filesystem(place)
            files = find(hub, place)
            if stream:
                if other := [file for file in files if not file.endswith(".parquet")]:
                    raise UserError(f"hf://{other[0]}: only parquet is read over the network; leave stream out")
                return [open_columns(file, hub) for file in files]
            return [open_file(fetched(file)) for file in files]
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 what the hub's client and its transports raise has no common class
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{source}: cannot be had from the hub ({why}); check the id and the network") from None


def find(hub: Any, place: str) -> list[str]:
    """The data files at a place on the hub, in the order of their names."""
    _, _, folder = split_place(place)
    names = sorted(hub.find(place.removesuffix(folder).rstrip("/") if "*" in folder else place))
    names = [name for name in names if name.rpartition("/")[2] not in IGNORED]
    if "*" in folder:
        found = [name for name in names if fnmatch.fnmatch(name, place)]
    else:
        kinds = [[name for name in names if name.endswith(f".{ending}")] for ending in ENDINGS]
        found = next(filter(None, kinds), [])
        if not folder:
            train = [name for name in found if "train" in name.rpartition("/")[2]]
            found = train or [name for name in found if "/train/" in name] or found
    if not found:
        raise UserError(f"hf://{place}: no parquet, Arrow, tar or JSON files there; check the id and the folder")
    return found


def split_place(place: str) -> tuple[str, str | None, str]:
    """OWNER/NAME, the revision (None: none is named) and what is behind, of datasets/OWNER/NAME[@REVISION][/...]."""
    parts = place.split("/", 3)
    if len(parts) < 3:
        raise UserError(f"hf://{place}: expected {HUB}OWNER/NAME")
    name, _, revision = parts[2].partition("@")
    return f"{parts[1]}/{name}", revision.replace("%2F", "/") or None, "".join(parts[3:])


def fetched(name: str) -> str:
    """Where a file of the hub lies on this machine, fetched if it is not there yet."""
    from huggingface_hub import hf_hub_download

    repo, revision, path = split_place(name)
    return hf_hub_download(repo, path, repo_type="dataset", revision=revision)
