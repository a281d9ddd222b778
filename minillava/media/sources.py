"""Where pictures come from. A client's: data: URLs, and if the server's owner says so a folder, or hosts by name; those
of who runs the program (`OwnSources`): any file, and what Python holds.

A host is looked up once, every address of it has to be public, and the connection goes to the address that was checked:
a name that changes its address in between (DNS rebinding) gains nothing. Redirects are not followed.
"""

import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote_to_bytes, urlsplit

from PIL import Image
from torch import Tensor

from minillava.errors import UserError
from minillava.media.visual import Media

FETCH_S = 20.0  # for one picture, from the look-up of its host to its last byte
PICTURE_BYTES = 32 << 20  # of one picture's file
IN_URLS = "!#$%&'()*+,/:;=?@[]~"  # besides letters, digits, _, . and -; the rest is sent as %XX (RFC 3986)


@dataclass(frozen=True)
class Sources:
    """What may be read for a client."""

    hosts: Sequence[str] = ()  # names, or ".example.org" for all below it
    folder: Path | None = None
    NOT_LISTED: ClassVar[str] = "is not on this server's list"

    def open(self, url: object, video: bool, number: int) -> Media:
        """A picture by its URL. Raises UserError for what may not be read, or cannot."""
        name = f"picture {number}"
        if video:
            raise UserError(f"{name}: clips are not served; send frames as pictures")
        if not isinstance(url, str):
            raise UserError(f"{name}: want a URL")
        scheme = url.partition(":")[0].lower() if ":" in url[:12] else ""
        if scheme == "data":
            return Media(decode_data_url(url, name), name=name)
        if scheme in ("http", "https"):
            return Media(self._fetch(url, name), name=name)
        if scheme:
            raise UserError(f"{name}: '{scheme}:' is not read; send the picture as a data: URL")
        return Media(self._file(url, name), name=name)

    def _file(self, path: str, name: str) -> Path:
        if self.folder is None:
            raise UserError(f"{name}: want a data: URL (files are read only from a folder the server was started with)")
        root = self.folder.resolve()
        try:
            found = (root / path).resolve()
            inside = found.is_relative_to(root) and found.is_file()
        except (OSError, ValueError):
            inside = False
        if not inside:
            raise UserError(f"{name}: no such picture in the server's folder")
        return found

    def _fetch(self, url: str, name: str) -> bytes:
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").rstrip(".")
        except ValueError as error:
            raise UserError(f"{name}: is no URL ({error}); correct it") from None
        if not any(host == h or (h.startswith(".") and host.endswith(h)) for h in map(str.lower, self.hosts)):
            raise UserError(f"{name}: host '{host}' {self.NOT_LISTED}; send the picture as a data: URL")
        if parts.username is not None or parts.password is not None:
            raise UserError(f"{name}: a URL with a password is not fetched")
        try:
            path = quote(f"{parts.path or '/'}?{parts.query}".rstrip("?"), IN_URLS)
            return _get(parts.scheme, host, parts.port, path, name)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(f"{name}: cannot be fetched from {host} ({type(error).__name__})") from None


@dataclass(frozen=True)
class OwnSources(Sources):
    """What the user of this process may name: files, relative to `folder` or to where it was started; data: URLs; http
    ones of `hosts`; pictures as PIL, numpy or an open file has them."""

    NOT_LISTED: ClassVar[str] = "is not named by `fetch`"

    def open(self, source: Any, video: bool, number: int) -> Media:
        """A picture or clip. Raises UserError for what is none."""
        name = f"{'video' if video else 'picture'} {number}"
        if video and isinstance(source, list | tuple):
            return Media([self.open(frame, False, n).source for n, frame in enumerate(source, 1)], video, name)
        if not video and isinstance(source, str) and source.partition(":")[0].lower() in ("data", "http", "https"):
            return super().open(source, video, number)
        if isinstance(source, str | Path):
            return Media(self.folder / source if self.folder else source, video)
        if isinstance(source, bytes | Image.Image) or (isinstance(source, Tensor) and not video):
            return Media(source, video)
        if hasattr(source, "read"):
            return Media(source.read(), video, name)
        if hasattr(source, "__array_interface__") and not video:
            return Media(_of_array(source, name))
        forms = "a folder of frames or a list of pictures" if video else "a PIL image or an array"
        raise UserError(f"{name}: cannot be a {type(source).__name__}; give a file, bytes, {forms}")


def one_or_more(given: Any) -> Sequence[Any]:
    """A picture (or clip) by itself is one of one."""
    if given is None:
        return ()
    return given if isinstance(given, list | tuple) else [given]


def _of_array(array: Any, name: str) -> Image.Image:
    """Pixels [H, W] or [H, W, 3 or 4] of numpy, 0 to 255."""
    if array.dtype.name != "uint8" or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise UserError(
            f"{name}: an array of {array.dtype.name} with shape {array.shape}; want uint8 of [height, width, 3]"
        )
    return Image.fromarray(array)


def decode_data_url(url: str, name: str) -> bytes:
    """The bytes of a data: URL (RFC 2397). Raises UserError for one that is none."""
    head, comma, data = url.partition(",")
    if not comma:
        raise UserError(f"{name}: a data: URL without a comma; write data:image/png;base64,...")
    try:
        if head.lower().endswith(";base64"):
            return base64.b64decode("".join(data.split()), validate=True)
        return unquote_to_bytes(data)
    except (binascii.Error, ValueError):
        raise UserError(f"{name}: its base64 is damaged; encode the file again") from None


def public_address(host: str, port: int, name: str) -> str:
    """An address of this host. Raises UserError if any of its addresses is not a public one."""
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
        if not (address.is_global and mapped.is_global) or address.is_multicast:
            raise UserError(f"{name}: {host} is at an address that is not public")
    return found[0]


def _get(scheme: str, host: str, port: int | None, path: str, name: str) -> bytes:
    until = time.monotonic() + FETCH_S
    port = port or (443 if scheme == "https" else 80)
    connection = http.client.HTTPConnection(host, port, timeout=FETCH_S)
    connection.sock = socket.create_connection((public_address(host, port, name), port), timeout=FETCH_S / 2)
    try:
        if scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
        connection.request("GET", path, headers={"User-Agent": "minillava", "Accept": "image/*"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise UserError(f"{name}: {host} answers {answer.status}")
        found = bytearray()
        while piece := answer.read1(1 << 16):
            found += piece
            if len(found) > PICTURE_BYTES or time.monotonic() > until:
                raise UserError(f"{name}: more than {PICTURE_BYTES >> 20} MB or {FETCH_S:.0f} s")
        return bytes(found)
    finally:
        connection.close()
