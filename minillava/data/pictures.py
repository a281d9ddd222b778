"""Pictures and videos as rows have them: bytes, {bytes, path}, base64, data: URLs, names in a store, files, URLs."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillava.data.files import MAX_FILE_BYTES, MediaStore, StoredMedia
from minillava.data.layouts import Counted
from minillava.errors import UserError
from minillava.files import short
from minillava.media.visual import Media

# How base64 of JPEG, PNG, GIF, WebP (RIFF), BMP and TIFF begins; a path of 64 characters that does is taken for a name
# if there is such a file.
BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkqAA", "TU0AK")
BASE64_LENGTH = 64
TIMEOUT_S, TRIES = 20, 3
CACHE_BYTES = 200 << 30  # of all pictures that are fetched


class UrlStore(MediaStore):
    """Pictures by URL, each fetched once into a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def has(self, name: str) -> bool:
        return True  # as far as can be said without asking

    def get(self, name: str) -> Path:
        path = self.folder / hashlib.sha256(name.encode()).hexdigest()
        if not path.is_file():
            data = fetch(name)
            try:
                self._keep(name, data, path)
            except OSError as error:
                why = (error.strerror or str(error)).lower()
                raise UserError(f"{name}: cannot be kept in {self.folder} ({why}); make room there") from None
        return path

    def _keep(self, name: str, data: bytes, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        held = len(data)
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # another process has just renamed it
                held += entry.stat().st_size
        if held > CACHE_BYTES:
            raise UserError(f"{name}: {self.folder} holds {CACHE_BYTES >> 30} GB of pictures; make room there")
        partial = path.with_name(f".{os.getpid()}.{path.name}")
        partial.write_bytes(data)
        partial.rename(path)


def fetch(url: str) -> bytes:
    """What is at an http(s) URL, up to MAX_FILE_BYTES. Raises UserError that starts with the URL."""
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(urllib.request.Request(url), timeout=TIMEOUT_S) as answer:
                if urllib.parse.urlsplit(answer.url).scheme not in ("http", "https"):
                    raise UserError(f"{url}: leads away from the web; leave it out")
                data = answer.read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                raise UserError(f"{url}: more than {MAX_FILE_BYTES:,} bytes; scale the image down first")
            return data
        except (OSError, ValueError) as error:  # URLError and time-outs are OSErrors
            busy = not isinstance(error, urllib.error.HTTPError) or error.code == 429 or error.code >= 500
            if isinstance(error, ValueError) or not busy or attempt == TRIES - 1:
                why = " ".join(str(error).split())
                raise UserError(f"{url}: cannot be fetched ({why}); fetch it by hand or leave it out") from None
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class Places:
    """Where the pictures and videos of a data set are, besides in its rows."""

    store: MediaStore | None = None  # by name
    urls: UrlStore | None = None

    def media(self, value: Any, video: bool, name: str) -> Media:
        """A picture or video as a row has it; `name` is for one that has none.

        Raises UserError, which starts with the picture's name, for one that is missing or is nothing of the kind.
        """
        kind = "video" if video else "image"
        if isinstance(value, bytes | bytearray):
            return Media(bytes(value), video, name)
        if isinstance(value, dict):
            return self._of_object(value, video, name)
        if not isinstance(value, str) or not value:
            raise UserError(f"'{kind}' must be a path or a list of paths; correct it")
        if value.startswith("data:"):
            head, _, body = value.partition(",")
            if not head.endswith(";base64"):
                raise UserError(f"{kind} {head[:60]},... is a data: URL without ;base64; write the bytes as base64")
            return Media(decoded(body, kind), video, name)
        if value.startswith(("http://", "https://")):
            if self.urls is None:
                raise UserError(f"{kind} {value} is a URL; set fetch to the folder that such pictures are fetched into")
            return StoredMedia(self.urls, video, value)
        return self._of_name(value, video, name)

    def _of_name(self, value: str, video: bool, name: str) -> Media:
        kind = "video" if video else "image"
        if len(value) >= BASE64_LENGTH and value.startswith(BASE64) and not (self.store and self.store.has(value)):
            return Media(decoded(value, kind), video, name)
        if os.path.isabs(value) and "\0" not in value and os.path.exists(value):
            return Media(Path(value), video, value)
        if self.store is None:
            raise UserError(f"has an {kind} but no image folder was given; set one")
        if not self.store.has(value):
            raise Counted("missing images", f"{kind} {short(value)} is missing; add it or remove the sample")
        return StoredMedia(self.store, video, value)

    def _of_object(self, value: dict[str, Any], video: bool, name: str) -> Media:
        """{bytes, path} as datasets writes it, or {url} as messages have it."""
        kind = "video" if video else "image"
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes | bytearray | str) and data:
            return Media(decoded(data, kind) if isinstance(data, str) else bytes(data), video, str(path or name))
        if path and (self.store is None or not self.store.has(path)) and not os.path.exists(path):
            raise Counted(
                "missing images",
                f"{kind} {short(path)} is missing: whoever wrote the file kept paths and no bytes (datasets' "
                "to_parquet does, for pictures opened from files); set images to their folder, or write the bytes",
            )
        if path or isinstance(value.get("url"), str):
            return self.media(os.path.abspath(path) if path and not self.store else path or value["url"], video, name)
        raise UserError(
            f"'{kind}' has neither bytes nor path (keys {', '.join(map(str, value)) or 'none'}); correct it"
        )


def decoded(text: str, kind: str) -> bytes:
    """The bytes of base64 text. Raises UserError."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{kind} {text[:20]}... is not base64; give a path, or bytes as base64") from None
