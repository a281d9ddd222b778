"""Canvases: a video as `cv-preinfer` of PyPI's codec-video-prep packs it for OneVision-2 and Mage-VL.

A canvas is a picture of patches of many frames, those on which the video codec spent bits. Beside the canvases
(canvas_*.jpg, or .png) lie src_patch_position.npy, frame, row and column of every patch (row by row, canvas by canvas;
-1 where a canvas is padding), and meta.json with "fps". Making them takes that program; reading them takes nothing.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minillava.errors import UserError
from minillava.media.image import open_image
from minillava.media.video import Clip
from minillava.schema import Fields, read_json

POSITIONS = "src_patch_position.npy"


def is_canvases(folder: Path) -> bool:
    """Whether a folder of pictures holds canvases, not frames."""
    return (folder / POSITIONS).is_file() or any(folder.glob("canvas_*"))


def open_canvases(folder: Path) -> Clip:
    """The canvases of a folder as a clip whose frames they are. Raises UserError that names the file."""
    if not (folder / POSITIONS).is_file() or not (folder / "meta.json").is_file():
        raise UserError(
            f"{folder}: canvases without {POSITIONS} and meta.json; pack the video with cv-preinfer (pip install "
            "codec-video-prep, on Linux) and keep all that it writes, or give the video itself"
        )
    raw = read_json(folder / "meta.json")
    meta = Fields(raw, str(folder / "meta.json"))
    rate, decimals = meta.number("fps"), meta.integer("decimals", 1, 9)
    files = _files(folder, raw.get("canvas_files"))
    places_FP3 = _places(folder / POSITIONS, len(files))
    padding_F = (places_FP3[:, :, 0] < 0).all(1)
    if (places_FP3[~padding_F, :, 0] < 0).any():
        raise UserError(f"{folder / POSITIONS}: a canvas that is padding in part; pack the video again")
    pictures = tuple(open_image(file) for file, padding in zip(files, padding_F.tolist()) if not padding)
    if not pictures:
        raise UserError(f"{folder}: all canvases are padding; pack the video again")
    if len({picture.size for picture in pictures}) > 1:
        raise UserError(f"{folder}: canvases of unequal sizes; pack the video again")
    places_FP3 = places_FP3[~padding_F]
    last = int(places_FP3[:, :, 0].max())
    times_s = tuple((places_FP3[:, 0, 0] / rate).tolist())
    return Clip(pictures, times_s, (last + 1) / rate, rate=rate, places_FP3=places_FP3, decimals=decimals)


def _files(folder: Path, listed: Any) -> list[Path]:
    """The canvases in the order of meta.json's canvas_files, or of the numbers in their names."""
    if listed is not None and not (isinstance(listed, list) and all(isinstance(name, str) for name in listed)):
        raise UserError(f"{folder / 'meta.json'}: canvas_files is {listed!r}, expected a list of names")
    if listed:
        return [folder / re.split(r"[/\\]", name)[-1] for name in listed]  # some writers name their own folder
    found = [path for path in folder.glob("canvas_*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    return sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.stem)])


def _places(path: Path, canvases: int) -> torch.Tensor:
    """Frame, row and column of every patch, [canvases, patches, 3]."""
    try:
        places = np.load(path, mmap_mode="r", allow_pickle=False)  # memory for what is there, not for what it claims
        if not isinstance(places, np.ndarray):
            raise ValueError("an archive of several")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: is no array that NumPy reads ({error}); pack the video again") from None
    if places.dtype.kind not in "iu" or places.shape[-1:] != (3,) or not canvases or places.size % (3 * canvases):
        raise UserError(
            f"{path}: {places.dtype} of shape {[*places.shape]} for {canvases} canvases, expected frame, row and "
            "column of as many patches on each; pack the video again"
        )
    return torch.from_numpy(places.astype(np.int64)).view(canvases, -1, 3)
