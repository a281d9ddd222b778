#!/bin/bash
# torch 2.13.0 (CPU), torch.nn.functional.interpolate(mode="bicubic", antialias=True) of a uint8 picture.
#
# A uint8 tensor is resized as it is, in two passes (across, then down), each of which rounds and clips to 0..255, as PIL
# does; a float32 tensor of the same values is rounded once, by whoever asked. One would expect the two to differ by half a
# level of rounding. Where the first pass overshoots black or white, the clip is lost to the second. Seen: a drawn pattern
# differs in 36 % of its values, by up to 10 levels; a smooth picture with some noise in 14 %, by one. So where a video
# processor casts, before or behind the resize, decides what a vision tower sees: LLaVA-OneVision-2's frames of a file are
# resized in float32, and uint8 (or PIL) in its place moves logits of a tiny model by 0.04 that else agree within 1e-5.
# uint8 and PIL differ in 0.3 % of the values.
#
# Exits 0 while this is so, non-zero when the behaviour has changed.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 pillow==12.0.0 numpy
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

how = dict(size=(210, 280), mode="bicubic", antialias=True)
rng = np.random.default_rng(0)
y, x = np.mgrid[:480, :640]
smooth = 128 + 90 * np.sin(x / 37) * np.cos(y / 29) + rng.normal(0, 12, (480, 640))
pattern = 255.0 * (((x // 7) + (y // 5)) % 2)
for name, drawn, least in (("smooth", smooth, 1), ("pattern", pattern, 5)):
    pixels = torch.from_numpy(drawn.clip(0, 255).astype(np.uint8))[None, None].repeat(1, 3, 1, 1)
    uint8 = F.interpolate(pixels, **how)[0].int()
    cast = F.interpolate(pixels.float(), **how)[0].round().clamp(0, 255).int()
    pil = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).resize((280, 210), Image.BICUBIC)
    pil = torch.from_numpy(np.array(pil)).permute(2, 0, 1).int()
    for pair, a, b in (("uint8 and float32", uint8, cast), ("uint8 and PIL", uint8, pil)):
        apart = (a - b).abs()
        print(f"{name}: {pair} differ in {(apart > 0).float().mean():.1%} of the values, by up to {apart.max()}")
    share = ((uint8 - cast) != 0).float().mean()
    assert (uint8 - cast).abs().max() >= least and share > 0.05, "the behaviour has changed"
    assert ((uint8 - pil) != 0).float().mean() < 0.01, "the behaviour has changed"
PY
