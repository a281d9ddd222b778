"""Pixels: parity with transformers' image processors to the bit, RGB conversion, and every way a file can be bad."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from minillava.config import ImageConfig
from minillava.errors import UserError
from minillava.media import image as image_module
from minillava.media.image import MAX_PIXELS, MAX_SIDE, image_size, open_image, prepare

SHAPES = [(336, 336), (500, 333), (333, 500), (97, 31), (31, 97), (224, 64), (64, 64), (1, 1), (3, 300), (1000, 667)]
HALF = (0.5, 0.5, 0.5)


def picture(width, height, mode="RGB", seed=0):
    """A picture with both smooth areas and noise, so that a wrong filter or offset shows."""
    rng = np.random.default_rng((seed, width, height))
    y_HW, x_HW = np.mgrid[0:height, 0:width]
    ramp_HW = (x_HW * 255 // max(width - 1, 1) + y_HW * 3) % 256
    pixels_HWC = np.stack([ramp_HW, 255 - ramp_HW, ramp_HW // 2], axis=2) + rng.integers(-40, 40, (height, width, 3))
    return Image.fromarray(np.clip(pixels_HWC, 0, 255).astype(np.uint8)).convert(mode)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def processor(fit, size):
    """transformers' own processor on PIL (no torchvision), for one `fit`."""
    square = {"height": size, "width": size}
    if fit == "crop":
        module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
        return module.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)
    if fit == "pad":
        module = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
        return module.LlavaImageProcessorPil(size={"shortest_edge": size}, crop_size=square, do_pad=True)
    module = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    return module.SiglipImageProcessorPil(size=square)


def config_for(fit, size):
    return ImageConfig(size=size, fit=fit, mean=HALF, std=HALF) if fit == "squash" else ImageConfig(size=size, fit=fit)


@pytest.mark.parametrize("size", [336, 224, 64])
@pytest.mark.parametrize("fit", ["pad", "crop", "squash"])
def test_pixels_equal_transformers_to_the_bit(fit, size):
    theirs = processor(fit, size)
    for shape in SHAPES:
        image = picture(*shape)
        expected_CHW = theirs(image, return_tensors="pt")["pixel_values"][0]
        pixels_CHW = prepare(open_image(image), config_for(fit, size))
        assert pixels_CHW.dtype == torch.float32 and pixels_CHW.shape == (3, size, size)
        assert torch.equal(pixels_CHW, expected_CHW), (fit, size, shape)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA", "PA"])
def test_modes_equal_transformers_to_the_bit(mode):
    """Opaque pictures of every mode; what transparency does changed between transformers' versions (next test)."""
    image = picture(50, 33, mode)
    expected_CHW = processor("pad", 64)(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(prepare(open_image(image), ImageConfig(size=64)), expected_CHW)


def test_transparency_shows_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 128))
    assert list(open_image(image).getdata()) == [(255, 255, 255), (255, 127, 127)]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    assert open_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(Image.new("LA", (1, 1), (0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_grey_keeps_its_high_byte():
    grey_HW = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    assert np.asarray(open_image(encoded(Image.fromarray(grey_HW))))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    with pytest.raises(UserError, match="more than 16 bits"):
        open_image(Image.fromarray(np.array([[70000]], dtype=np.int32)))
    with pytest.raises(UserError, match="floating-point"):
        open_image(Image.fromarray(np.ones((2, 2), dtype=np.float32)))


def test_exif_orientation_is_applied_to_files_but_not_to_pil_images():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show upright
    data = encoded(picture(40, 20), "JPEG", exif=exif)
    assert open_image(data).size == (20, 40)
    assert open_image(Image.open(io.BytesIO(data))).size == (40, 20)


def test_path_bytes_and_pil_give_the_same(tmp_path):
    data = encoded(picture(40, 20))
    (tmp_path / "a.png").write_bytes(data)
    pixels = [np.asarray(open_image(source)) for source in (tmp_path / "a.png", str(tmp_path / "a.png"), data)]
    assert all(np.array_equal(p, np.asarray(picture(40, 20))) for p in pixels)


def png_bomb(width=30000, height=30000):
    """A valid PNG of width x height black pixels in about 100 KB."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(1 + width // 8)) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def bad_files():
    jpeg = encoded(picture(200, 200), "JPEG")
    png = encoded(picture(100, 100))
    zero = bytearray(png)
    zero[16:24] = bytes(8)  # width and height
    zero[29:33] = struct.pack(">I", zlib.crc32(bytes(zero[12:29])))
    corrupt = bytearray(png)
    corrupt[len(png) // 2] ^= 0xFF
    return {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "damaged image .*truncated"),
        "header-only.jpg": (jpeg[:20], "image"),
        "text.png": (b"This is not a picture.\n", "not an image that can be read here; convert it to PNG or JPEG"),
        "empty.png": (b"", "empty"),
        "zero.png": (bytes(zero), "image"),
        "corrupt.png": (bytes(corrupt), "damaged image"),
        "cut.png": (png[:40], "damaged image|not an image"),
        "bomb.png": (png_bomb(), r"more than 178,956,970 pixels; scale the image down"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    }


@pytest.mark.parametrize("kind", list(bad_files()))
def test_bad_files_are_one_line_that_names_the_file(tmp_path, kind):
    data, words = bad_files()[kind]
    (tmp_path / kind).write_bytes(data)
    for source, name in ((tmp_path / kind, ""), (data, f"data.json: sample '7': {kind}")):
        with pytest.raises(UserError, match=words) as caught:
            open_image(source, name)
        message = str(caught.value)
        assert kind in message and "\n" not in message and ";" in message


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jpg: no such image file; check the path"):
        open_image(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match="cannot be read"):
        open_image(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        open_image("a\0b.png")


def test_the_bound_holds_before_decompression(monkeypatch):
    """Neither PIL's check nor ours may come after the pixels: loading is made to fail the test."""
    bomb = png_bomb()

    def no_load(*_):
        raise AssertionError("decompressed")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", no_load)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # PIL's own check may have been switched off
    with pytest.raises(UserError, match=r"30000 x 30000 is more than"):
        open_image(bomb)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM", "GIF"])
def test_a_side_past_the_bound_is_refused_before_decompression(monkeypatch, kind):
    """A picture of 1 x 170,000,000 has few enough pixels, and took 1.3 GB of memory until its square was refused."""
    side = 65_535 if kind == "GIF" else 65_536  # all that GIF can say
    data = encoded(Image.new("L", (1, side)), kind)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: 1 / 0)
    monkeypatch.setattr(image_module, "MAX_SIDE", 65_534 if kind == "GIF" else MAX_SIDE)
    with pytest.raises(UserError, match=rf"1 x {side} is more than .* on a side; scale the image down"):
        open_image(data)


@pytest.mark.parametrize(
    "kind", ["I;16", "I;16B", "I", "I of 8", "RGBA", "LA", "PA", "P clear", "RGB clear", "L clear"]
)
def test_strips_give_what_the_whole_gives(monkeypatch, kind):
    """So a mode of four bytes a pixel costs its pixels and RGB, not three copies more."""
    mode, _, how = kind.partition(" ")
    pixels_HW = np.random.default_rng(0).integers(0, 250 if how == "of" else 60_000, (37, 23))
    if mode.startswith("I"):
        dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
        picture = Image.frombytes(mode, (23, 37), pixels_HW.astype(dtype).tobytes())
    else:
        coloured = Image.fromarray((pixels_HW % 256).astype(np.uint8)).convert("RGBA")
        coloured.putalpha(Image.fromarray((pixels_HW // 256).astype(np.uint8)))
        picture = coloured.convert("LA").convert(mode) if mode in ("LA", "PA") else coloured.convert(mode)
    if how == "clear":
        picture.info["transparency"] = picture.getpixel((3, 3))
    whole = image_module._to_rgb(picture, "x")
    for pixels in (1, 60, 23 * 37 - 1):
        monkeypatch.setattr(image_module, "STRIP", pixels)
        assert image_module._to_rgb(picture, "x").tobytes() == whole.tobytes()
    assert len(set(whole.getdata())) > 20


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_a_strip_cannot_grow_past_the_bound(fit):
    side = 40000
    assert side <= MAX_PIXELS < side * side
    strip = Image.new("RGB", (side, 1 if fit == "crop" else 10))
    with pytest.raises(UserError, match=r"strip\.png: .*crop it or scale it down"):
        prepare(strip, ImageConfig(size=336, fit=fit), "strip.png")


def test_unknown_fit():
    with pytest.raises(UserError, match="use one of pad, crop, squash"):
        prepare(picture(4, 4), ImageConfig(fit="stretch"))


# ---- files as they are found ----


def _png(width, depth, colour, row, *chunks, after=()):
    """A PNG of one row; chunks (kind, bytes) before its pixels and behind them."""
    head = (b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    parts = (head, *chunks, (b"IDAT", zlib.compress(b"\0" + row)), *after, (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


W = 255
KEYED = {  # depth, colour type, pixels, clear colour, wanted
    "grey, 1 bit": (1, 0, bytes([0b01000000]), [0], [[W, W, W], [W, W, W]]),
    "grey, 2 bits": (2, 0, bytes([0b01100000]), [1], [[W, W, W], [170, 170, 170]]),
    "grey, 4 bits": (4, 0, bytes([0x3A]), [3], [[W, W, W], [170, 170, 170]]),
    "grey, 8 bits": (8, 0, bytes([58, 5]), [5], [[58, 58, 58], [W, W, W]]),
    "grey, 16 bits": (16, 0, struct.pack(">2H", 0x1234, 0x1235), [0x1234], [[W, W, W], [0x12, 0x12, 0x12]]),
    "grey, 16 bits, of no pixel": (16, 0, struct.pack(">2H", 0x1234, 0x8000), [65535], [[0x12] * 3, [0x80] * 3]),
    "colour, 8 bits": (8, 2, bytes([1, 2, 3, 4, 5, 6]), [1, 2, 3], [[W, W, W], [4, 5, 6]]),
    "colour, 16 bits": (16, 2, struct.pack(">6H", 256, 512, 768, 1024, 1280, 1536), [256, 512, 768],
                        [[W] * 3, [4, 5, 6]]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KEYED)
def test_a_clear_colour_of_any_depth_is_white(kind):
    depth, colour, row, key, wanted = KEYED[kind]
    data = _png(2, depth, colour, row, (b"tRNS", struct.pack(f">{len(key)}H", *key)))
    assert np.asarray(open_image(data))[0].tolist() == wanted


@pytest.mark.parametrize("most", [1, 255])
def test_eight_bits_in_thirty_two_stay_as_they_are(most):
    grey = np.linspace(0, most, 64).astype(np.int32).reshape(8, 8)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "TIFF")
    for source in (file.getvalue(), Image.fromarray(grey)):
        assert np.array_equal(np.asarray(open_image(source))[:, :, 0], grey)
    assert np.asarray(open_image(Image.fromarray(grey * 257)))[:, :, 0].max() == most


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_in_the_header_is_that_of_the_picture(kind, orientation):
    Image.init()
    if kind not in Image.OPEN:
        pytest.skip(f"this PIL has no {kind}")
    exif, file = Image.Exif(), io.BytesIO()
    exif[image_module.EXIF_ORIENTATION] = orientation
    Image.new("RGB", (64, 16), "red").save(file, kind, exif=exif)
    size = (16, 64) if orientation > 4 else (64, 16)
    assert image_size(file.getvalue(), "x") == open_image(file.getvalue()).size == size


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(("chunk", "data"), [
    (b"zTXt", b"note\0\0" + zlib.compress(bytes(2_000_000))),
    (b"iTXt", b"note\0\1\0\0\0" + zlib.compress(b"a" * 2_000_000)),
    (b"iCCP", b"icc\0\0" + zlib.compress(bytes(2_000_000))),
    (b"tEXt", b"note\0" + b"a" * 70_000_000),
])  # fmt: skip
def test_much_metadata_is_no_damage(chunk, data, behind):
    around = {"after": [(chunk, data)]} if behind else {}
    picture = _png(1, 8, 2, b"\xff\0\0", *([] if behind else [(chunk, data)]), **around)
    assert open_image(picture).getpixel((0, 0)) == (255, 0, 0) and image_size(picture, "x") == (1, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0no EXIF at all", b"Exif\0\0II*\0\x08\0\0\0\x05\0"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_damaged_picture(kind, exif):
    file = io.BytesIO()
    Image.new("RGB", (64, 16), "red").save(file, kind, exif=exif)
    assert image_size(file.getvalue(), "x") == open_image(file.getvalue()).size == (64, 16)


def test_the_size_of_a_png_takes_no_pixels():
    data = encoded(picture(100, 80))
    assert image_size(data[: len(data) // 2], "x") == (100, 80)
