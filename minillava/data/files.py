"""Where the pictures and videos of a data set are: a folder, a zip read in place, or what makes them (MediaStore).

A store is opened once and used by several threads and by forked or spawned loader processes.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from minillava.data.rows import PerProcess
from minillava.errors import UserError
from minillava.media.image import MAX_PIXELS
from minillava.media.visual import Media

MAX_FILE_BYTES = 4 * MAX_PIXELS  # of one image file in a zip: an uncompressed RGBA picture of the largest size


class MediaStore(ABC):
    """Where pictures and videos are found by name."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is something of that name, whatever it is."""

    @abstractmethod
    def get(self, name: str) -> Path | bytes | Image.Image:
        """What is there, as a `Media.source`. Raises UserError that starts with the name if it cannot be had."""


class Folder(MediaStore):
    """Images as files, by path relative to `root`."""

    def __init__(self, root: Path):
        self.root = root
        self._listings: dict[str, frozenset[str]] = {}

    def has(self, name: str) -> bool:
        """Asks for one listing a directory, not for one file status an image (slow on network disks)."""
        parent, base = os.path.split(os.path.join(self.root, name))
        if parent not in self._listings:
            try:
                self._listings[parent] = frozenset(os.listdir(parent))
            except (OSError, ValueError):
                self._listings[parent] = frozenset()
        return base in self._listings[parent]

    def get(self, name: str) -> Path:
        return Path(self.root, name)


class Zip(MediaStore):
    """Images inside a zip file."""

    def __init__(self, path: Path):
        self.path, self._archive = path, PerProcess(partial(open_zip, path))
        self._archive()

    def has(self, name: str) -> bool:
        return name in self._archive().NameToInfo

    def get(self, name: str) -> bytes:
        archive = self._archive()
        try:
            entry = archive.getinfo(name)
            if entry.file_size > MAX_FILE_BYTES:
                raise UserError(f"{name}: {entry.file_size:,} bytes unpacked; scale the image down first")
            return archive.read(entry)
        except KeyError:
            raise UserError(f"{name}: not in {self.path}; check the name") from None
        except (OSError, RuntimeError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{name}: cannot be unpacked from {self.path} ({error}); make the zip again") from None


def open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as a zip file ({error}); fetch it again") from None


def open_store(root: Path) -> MediaStore:
    """A folder, or a zip file read in place. Raises UserError if there is neither."""
    if root.is_dir():
        return Folder(root)
    if root.is_file():
        return Zip(root)
    raise UserError(f"{root}: no such image folder or zip; check the path")


@dataclass(frozen=True, slots=True)
class StoredMedia(Media):
    """A picture or video by its name in a store, which is its `source`."""

    def read(self) -> Path | bytes | Image.Image:
        """What is in the store. Raises UserError that starts with the name."""
        return self.source.get(self.name)
