"""Where the images and videos of a data set are: a folder, a zip read in place, or what makes them (ImageStore).

A store is opened once and used by several threads and by forked or spawned loader processes.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from minillava.config import ModelConfig, UserError
from minillava.image import MAX_PIXELS, image_size, open_image
from minillava.video import Clip, open_clip

MAX_FILE_BYTES = 4 * MAX_PIXELS  # of one image file in a zip: an uncompressed RGBA picture of the largest size


class ImageStore(ABC):
    """Where images are found by name."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is something of that name, whatever it is."""

    @abstractmethod
    def get(self, name: str, label: str) -> Path | bytes | Image.Image:
        """What is there, for `open_image` or `open_clip`; UserError that starts with `label` if it cannot be had."""


class Folder(ImageStore):
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

    def get(self, name: str, label: str) -> Path:
        return Path(self.root, name)


class Zip(ImageStore):
    """Images inside a zip file, which each process opens for itself on first use: a file offset must not be shared."""

    def __init__(self, path: Path):
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self._archive()

    def _archive(self) -> zipfile.ZipFile:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            try:
                opened = (os.getpid(), zipfile.ZipFile(self.path))
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"{self.path}: cannot be read as a zip file ({error}); fetch it again") from None
            self._opened = opened
        return opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_opened": None}

    def has(self, name: str) -> bool:
        return name in self._archive().NameToInfo

    def get(self, name: str, label: str) -> bytes:
        archive = self._archive()
        try:
            entry = archive.getinfo(name)
            if entry.file_size > MAX_FILE_BYTES:
                raise UserError(f"{label}: {entry.file_size:,} bytes unpacked; scale the image down first")
            return archive.read(entry)
        except KeyError:
            raise UserError(f"{label}: not in {self.path}; check the name") from None
        except (OSError, RuntimeError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{label}: cannot be unpacked from {self.path} ({error}); make the zip again") from None


def open_store(root: Path) -> ImageStore:
    """A folder, or a zip file read in place. Raises UserError if there is neither."""
    if root.is_dir():
        return Folder(root)
    if root.is_file():
        return Zip(root)
    raise UserError(f"{root}: no such image folder or zip; check the path")


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A picture or video by name, opened only when it is needed."""

    name: str
    store: ImageStore

    def open(self, sample: str) -> Image.Image:
        """The decoded RGB image. Raises a UserError that names sample and picture, as what follows does."""
        label = f"{sample}: {self.name}"
        return open_image(self.store.get(self.name, label), label)

    def open_clip(self, sample: str, config: ModelConfig) -> Clip:
        """The frames that a model of this config looks at."""
        label = f"{sample}: {self.name}"
        source = self.store.get(self.name, label)
        return open_clip([source] if isinstance(source, Image.Image) else source, config, label)

    def size(self, sample: str) -> tuple[int, int]:
        """Width and height of the upright image, without decoding it."""
        label = f"{sample}: {self.name}"
        source = self.store.get(self.name, label)
        return source.size if isinstance(source, Image.Image) else image_size(source, label)
