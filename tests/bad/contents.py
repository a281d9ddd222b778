"""What bad inputs are made of: files that are broken, and the small model that ships, changed."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from minillava.checkpoints.hub import NANO


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line in a folder that holds these files."""

    name: str
    words: tuple[str, ...]
    names: tuple[str, ...]  # patterns that the message must hold
    files: dict[str, Any] = dataclasses.field(default_factory=dict)  # bytes, text, what writes it, or JSON, by path


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4711\n"
NO_JSON = {
    "empty": b"",
    "cut": b'{"a": [1, ',
    "list": b"[1, 2]",
    "null": b"null",
    "number": b"7",
    "text": b'"config"',
    "bytes": bytes(range(256)),
    "latin-1": '{"a": "é"}'.encode("latin-1"),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "page": b"<!DOCTYPE html><html>404</html>",
    "LFS pointer": LFS.encode(),
    "two": b"{} {}",
    "long number": b'{"a": ' + b"9" * 5000 + b"}",
}


def picture(kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    data = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(0).randbytes(3 * size[0] * size[1])).save(data, kind)
    return data.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(data)) + png_chunk(b"IEND", b"")


def zipped(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return data.getvalue()


PICTURES = {  # that are none, by the name of the file
    "empty.png": b"",
    "text.jpg": b"I am no picture\n",
    "page.png": b"<!DOCTYPE html><html>404</html>",
    "pointer.jpg": LFS.encode(),
    "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "paper.pdf": b"%PDF-1.7\n",
    "cut.png": picture()[:700],
    "cut.jpg": picture("JPEG", (200, 200))[:2000],
    "cut.webp": picture("WEBP")[:300],
    "cut.gif": picture("GIF")[:200],
    "cut.bmp": picture("BMP")[:300],
    "cut.tif": picture("TIFF")[:200],
    "head.png": picture()[:8],
    "head.jpg": b"\xff\xd8\xff\xe0",
    "head.gif": b"GIF89a",
    "head.webp": b"RIFF\0\0\0\0WEBP",
    "flat.png": png_of(0, 0),
    "large.png": png_of(60_000, 60_000),
    "wide.png": png_of(2**31 - 1, 1),
    "nothing.png": png_of(20, 20),
    "zip.png": zipped({"a": b"b"}),
    "ones.jpg": b"\xff" * 5000,
    "zeros.png": bytes(5000),
    "sound.wav": b"RIFF\x24\0\0\0WAVEfmt ",
    "heic.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "flipped.png": picture()[:60] + b"\0" * 500,
}


def checkpoint(*edits: Callable[[Path], None]) -> Callable[[Path], None]:
    """Writes the small model that ships, changed."""

    def copy(folder: Path) -> None:
        shutil.copytree(NANO, folder)
        for edit in edits:
            edit(folder)

    return copy


def put(name: str, content: Any) -> Callable[[Path], None]:
    return lambda folder: write(folder / name, content)


def change(name: str, keys: str, value: Any) -> Callable[[Path], None]:
    """Sets a value of a JSON file; keys are joined by dots."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        *path, last = keys.split(".")
        inner = values
        for key in path:
            inner = inner[key]
        inner[last] = value
        write(folder / name, values)

    return edit


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def tensors(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes the dict of the model's tensors."""

    def copy(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        values = load_file(folder / "model.safetensors")
        edit(values)
        save_file(values, folder / "model.safetensors")

    return copy
