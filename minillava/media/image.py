"""Pixels: open a picture safely, make it RGB, fit it to the tower's square or cut it into tiles, normalise.

Follows the image processors of LLaVA v1 and 1.5 (CLIP's, after `expand2square` where image.fit is "pad"), to the bit.
Differs from the original loaders where they show the model something else than a person sees: a file's EXIF orientation
is applied (as transformers' load_image does), transparency is composited on white (as transformers 5.23 does; the
original drops alpha), and 16-bit grey keeps its high byte (a plain PIL conversion clips it to white).
Clear colours of PNGs (tRNS) are composited too, those of 2, 4 and 16 bits, which PIL leaves opaque.
Shape letters: N views, C channels (RGB), H height, W width.
"""

import contextlib
import dataclasses
import functools
import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from minillava.config import ImageConfig, ModelConfig
from minillava.errors import UserError
from minillava.visual_tokens import Span, clip_span, image_span

T = TypeVar("T")

MAX_PIXELS = 178_956_970  # of a file, and of what it is padded or resized to: PIL's own hard limit, 537 MB as RGB
MAX_SIDE = 65_535  # what JPEG can say; in longer ones no more can be seen
STRIP = 1 << 22  # pixels that are converted together, so that no mode takes much more memory than its pixels and RGB
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "MPO", "AVIF")  # others run odd parsers
# What PIL raises on damaged files, besides OSError (its UnidentifiedImageError is one).
DECODE_ERRORS: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError)
DECODE_ERRORS += (TypeError, OverflowError, struct.error, zlib.error)
EXIF_ORIENTATION = 0x0112  # Exif 2.32, table 4


def open_image(source: str | Path | bytes | Image.Image, name: str = "") -> Image.Image:
    """Open a file, the bytes of one, or a PIL image, as a decoded RGB image.

    The size in the header is checked against MAX_PIXELS and MAX_SIDE before anything is decompressed. EXIF orientation
    is applied to files and bytes; a PIL image keeps what its owner gave it. Of several frames the first is taken.
    Raises UserError that starts with `name` (by default the path) if there is nothing there or it cannot be decoded.
    """
    name = name or (str(source) if isinstance(source, str | Path) else "the image")
    if isinstance(source, Image.Image):
        with _named_errors(name):
            return _decode(source, name, orient=False)
    return _opened(source, name, functools.partial(_decode, name=name, orient=True))


def image_size(source: str | Path | bytes, name: str) -> tuple[int, int]:
    """Width and height of what `open_image` would return, from the file's header. Raises UserError."""

    def upright(image: Image.Image) -> tuple[int, int]:
        if image.format == "PNG":
            if not _names_exif(image.fp):  # type: ignore[attr-defined]  # of an ImageFile
                return image.size
            image.load()  # EXIF may come behind the pixels
        turned = False
        with contextlib.suppress(*DECODE_ERRORS):  # as in _decode
            turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned and image.format != "TIFF" else image.size  # PIL turned those

    return _opened(source, name, upright)


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Of each chunk of a PNG its kind, its place, and its bytes with length, kind and checksum."""
    at = 8
    while file.seek(at) == at and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        yield kind, at, length + 12
        at += length + 12


def _names_exif(file: BinaryIO) -> bool:
    """Whether a PNG has EXIF, in a chunk of its own or as text: PIL decodes the pixels to know."""
    back, name, found = file.tell(), b"Raw profile type exif", False
    for kind, at, _ in _chunks(file):
        file.seek(at + 8)
        found |= kind == b"eXIf" or (kind in (b"tEXt", b"zTXt") and file.read(len(name)) == name)
    file.seek(back)
    return found


def _opened(source: str | Path | bytes, name: str, use: Callable[[Image.Image], T]) -> T:
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115 closed below
    except FileNotFoundError:
        raise UserError(f"{name}: no such image file; check the path") from None
    except (OSError, ValueError, TypeError) as error:  # ValueError: a null byte in the path; TypeError: no path at all
        raise UserError(f"{name}: cannot be read ({reason(error)}); check the path and its permissions") from None
    with file, _named_errors(name):
        if file.seek(0, io.SEEK_END) == 0:
            raise UserError(f"{name}: the image file is empty (0 bytes); fetch it again")
        file.seek(0)
        Image.init()
        formats = [name for name in FORMATS if name in Image.OPEN]  # asking PIL for one that it lacks is a KeyError
        try:
            return use(Image.open(file, formats=formats))
        except ValueError as error:
            if "MAX_TEXT" not in str(error):
                raise
            return use(Image.open(_without_text(file), formats=formats))


def _without_text(file: BinaryIO) -> io.BytesIO:
    """A PNG without its comments and colour profile, which PIL refuses from a megabyte on."""
    file.seek(0)
    kept = io.BytesIO(file.read(8))
    kept.seek(0, io.SEEK_END)
    for kind, at, size in _chunks(file):
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            file.seek(at)
            kept.write(file.read(size))
    kept.seek(0)
    return kept


@contextlib.contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Turns what PIL raises into UserErrors."""
    try:
        yield
    except Image.DecompressionBombError:
        raise UserError(f"{name}: more than {MAX_PIXELS:,} pixels; scale the image down first") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: not an image that can be read here; convert it to PNG or JPEG") from None
    except DECODE_ERRORS as error:
        raise UserError(f"{name}: a damaged image ({reason(error)}); fetch or save it again") from None


def prepare(image: Image.Image, config: ImageConfig, name: str = "the image") -> torch.Tensor:
    """Fit an RGB image to the tower's square and normalise it: float32 pixels_CHW, C = 3, H = W = config.size.

    Equal to transformers' CLIPImageProcessor ("crop"), LlavaImageProcessor with do_pad ("pad") and SiglipImageProcessor
    ("squash") on PIL, bit for bit. Raises UserError for a strip so long that its square would exceed MAX_PIXELS.
    """
    if config.fit not in _FITS:
        raise UserError(f"config: image.fit is '{config.fit}'; use one of {', '.join(_FITS)}")
    return _normalised(_FITS[config.fit](image, config, name), config)


def prepare_views(
    image: Image.Image, config: ModelConfig, several: bool = False, name: str = "the image"
) -> tuple[torch.Tensor, Span]:
    """The views of a picture as pixels_NCHW, and what becomes of them; `several`: there are others in its prompt.

    Of a tiled picture (AnyRes) the first is all of it, squashed; the rest are its tiles, row by row, which it
    fills with its aspect kept, centred on black. Equal to transformers' processors of LLaVA-NeXT and OneVision on PIL.
    """
    span = image_span(config, *image.size, several)
    if span.native:
        return _native_patches([image], config, span, _resized), span
    if not span.rows:
        padded = config.layout.grids and several
        fit = dataclasses.replace(config.image, fit="pad") if padded else config.image
        return prepare(image, fit, name)[None], span
    size, (width, height) = config.image.size, image.size
    across, down = span.columns * size, span.rows * size
    if across / width < down / height:
        inside = (across, min(math.ceil(height * (across / width)), down))
    else:
        inside = (min(math.ceil(width * (down / height)), across), down)
    canvas = Image.new("RGB", (across, down))
    canvas.paste(_resized(image, inside), ((across - inside[0]) // 2, (down - inside[1]) // 2))
    tiles = _normalised(canvas, config.image).unflatten(2, (span.columns, size)).unflatten(1, (span.rows, size))
    base_CHW = _normalised(_resized(image, (size, size)), config.image)
    return torch.cat([base_CHW[None], tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)]), span


def prepare_clip(
    frames: Sequence[Image.Image],
    config: ModelConfig,
    name: str = "the video",
    times: Sequence[int] = (),
    places_FP3: torch.Tensor | None = None,
    filmed: bool = False,
) -> tuple[torch.Tensor, Span]:
    """The frames of a clip as pixels_NCHW, one view each (native: all at the first one's size), and their span.

    Native: `times` says which frame of its source each is, `places_FP3` what canvases are packed with. OneVision-2's
    frames of a file (`filmed`) are resized by torch's filter, as its own code does, all others by PIL's.
    """
    if config.image.fit == "native":
        span = clip_span(config, len(frames), *frames[0].size, times, places_FP3)
        by_torch = filmed and config.layout.video_sampling == "rounded"
        return _native_patches(frames, config, span, _resized_by_torch if by_torch else _resized), span
    fit = dataclasses.replace(config.image, fit=config.layout.video_fit or config.image.fit)
    return torch.stack([prepare(frame, fit, name) for frame in frames]), clip_span(config, len(frames))


def _native_patches(
    frames: Sequence[Image.Image], config: ModelConfig, span: Span, resized: Callable[..., Image.Image]
) -> torch.Tensor:
    """Pixels [P, 3, patch, patch] of frames resized to the span's map: block by block, those of a token together.

    Equal to transformers' Qwen2VLImageProcessor on PIL, whose rows they are (temporal_patch_size 1).
    """
    side, merge = config.vision.patch_size, config.projector.merge
    size = (span.width * side, span.height * side)
    pixels_FCHW = torch.stack([_normalised(resized(frame, size), config.image) for frame in frames])
    blocks = pixels_FCHW.unflatten(3, (-1, merge, side)).unflatten(2, (-1, merge, side))
    return blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(0, 4)


def _normalised(image: Image.Image, config: ImageConfig) -> torch.Tensor:
    """By a table of the normalised value of every 8-bit level.

    Rounds where transformers' numpy path does: x * (1/255) in float64, kept as float32, (x - mean) / std in float32.
    """
    mean_C1, std_C1 = (np.array(values, dtype=np.float32)[:, None] for values in (config.mean, config.std))
    levels_CL = ((np.arange(256) * (1 / 255)).astype(np.float32) - mean_C1) / std_C1
    pixels_HWC = np.asarray(image)
    pixels_CHW = np.empty((3, *pixels_HWC.shape[:2]), dtype=np.float32)
    for channel, levels_L in enumerate(levels_CL):
        np.take(levels_L, pixels_HWC[:, :, channel], out=pixels_CHW[channel], mode="clip")
    return torch.from_numpy(pixels_CHW)


def _pad(image: Image.Image, config: ImageConfig, name: str) -> Image.Image:
    """Centre on a square of the mean colour, truncated as the original's callers of expand2square do, then resize."""
    width, height = image.size
    if width != height:
        side = max(width, height)
        _check_area(side, side, "padded to a square", name)
        square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in config.mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    return _resized(image, (config.size, config.size))


def _crop(image: Image.Image, config: ImageConfig, name: str) -> Image.Image:
    """Resize the shorter edge to `size`, the longer one in proportion (truncated), then cut out the centre."""
    size, (width, height) = config.size, image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    _check_area(width, height, f"resized to {size} pixels on its shorter edge", name)
    image = _resized(image, (width, height))
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size)) if left or top or width != height else image


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _resized_by_torch(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bicubic with antialiasing in float32, rounded at the end; PIL rounds between its passes."""
    if image.size == size:
        return image
    pixels_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    resized_CHW = F.interpolate(pixels_CHW[None], size[::-1], mode="bicubic", antialias=True)[0]
    return Image.fromarray(resized_CHW.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())


_FITS: dict[str, Callable[[Image.Image, ImageConfig, str], Image.Image]] = {
    "pad": _pad,
    "crop": _crop,
    "squash": lambda image, config, name: _resized(image, (config.size, config.size)),  # whatever the shape was
}


def _decode(image: Image.Image, name: str, orient: bool) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise UserError(f"{name}: an image of {width} x {height} pixels has no area; leave it out")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise UserError(
            f"{name}: {width} x {height} is more than {MAX_PIXELS:,} pixels, or than {MAX_SIDE:,} on a side; "
            "scale the image down first"
        )
    if image.format == "PNG" and "transparency" in image.info:
        _scale_key(image)
    image.load()
    with contextlib.suppress(*DECODE_ERRORS):  # damaged EXIF is no damaged picture
        if orient and image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            ImageOps.exif_transpose(image, in_place=True)
    return image if image.mode == "RGB" and "transparency" not in image.info else _to_rgb(image, name)


def _scale_key(image: Image.Image) -> None:
    """Give the colour that a PNG says is clear (tRNS) the depth that its pixels will have. PIL makes those 8 bits deep
    and leaves the colour as it is, so that no pixel has it. Of 16 bits of a colour PIL keeps 8 to compare."""
    key, tile = image.info["transparency"], getattr(image, "tile", None)
    if not tile:
        return
    depth = tile[0][3][0] if isinstance(tile[0][3], tuple) else tile[0][3]
    if isinstance(key, int) and depth in ("L;2", "L;4"):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[depth]
    elif isinstance(key, tuple) and depth == "RGB;16B":
        image.info["transparency"] = tuple(part >> 8 for part in key)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    convert: Callable[[Image.Image], Image.Image]
    if image.mode.startswith("I"):  # grey in 16 bits (I;16 and its byte orders) or 32
        ranges = [(np.asarray(strip).min(), np.asarray(strip).max()) for _, strip in _strips(image)]
        least, most = min(low for low, _ in ranges), max(high for _, high in ranges)
        if least < 0 or most > 65535:
            raise UserError(f"{name}: more than 16 bits a pixel; convert the image to 8 bits")
        bits = 8 if image.mode == "I" and most <= 255 else 16  # masks and labels are often saved in 32 bits
        convert = functools.partial(_of_grey, bits=bits, key=image.info.get("transparency"))
    elif image.info.get("transparency") is not None or "A" in image.getbands() or "a" in image.getbands():
        convert = _on_white
    elif image.mode == "F":
        raise UserError(f"{name}: floating-point pixels have no fixed range; convert the image to 8 bits")
    else:
        return image.convert("RGB")
    found = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        found.paste(convert(strip), (0, top))
    return found


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in pieces of all its width, each with the row where it begins."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _of_grey(strip: Image.Image, bits: int, key: object) -> Image.Image:
    """The high byte of grey in so many bits; white where it is `key`, the clear one."""
    grey_HW = np.asarray(strip)
    levels_HW = (grey_HW >> (bits - 8)).astype(np.uint8)
    if isinstance(key, int):
        levels_HW[grey_HW == key] = 255
    return Image.fromarray(levels_HW).convert("RGB")


def _on_white(strip: Image.Image) -> Image.Image:
    strip = strip.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", strip.size, (255, 255, 255, 255)), strip).convert("RGB")


def _check_area(width: int, height: int, how: str, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{name}: {how} it would be {width} x {height}, more than {MAX_PIXELS:,} pixels; crop it or scale it down"
        )


def reason(error: BaseException) -> str:
    """An exception's own words on one line."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split()) or type(error).__name__
