#!/usr/bin/env bash
# mistral-common 1.13.1: a picture that must be made smaller is sampled, not averaged, and thin lines of a scan are gone.
#
# Pixtral takes pictures of up to 1,024 pixels. One would guess that Mistral's own preprocessing shrinks a larger one as transformers'
# processor for the same checkpoint does, bicubic over all pixels that fall on a new one, so that a line of one pixel becomes a grey
# line. mistral-common calls cv2.resize with INTER_CUBIC, which looks at 4 x 4 pixels however far it shrinks: between two places that it
# looks at, an A4 page scanned at 300 dots per inch has rows that no new pixel sees. Of nearly half of a form's hairlines less than a
# tenth of the black is left, mostly none; others stay black, by where they lie on the page. Beside a line white is 1.11, since the curve
# overshoots and nothing clips it. Rules of tables, minus signs and underlined sums are such lines. There is no warning. cv2 is a choice
# of the package (its pull request 49 says for better results), and photographs may look right to the weights; hairlines are not there.
# Make a scan small before it is handed over (im.thumbnail((1024, 1024)) of Pillow averages): then none is lost.
# With the settings of Mistral Small 3.1 (1,540 pixels) fewer are lost, not none.
#
# Seen with opencv-python-headless 5.0.0.93, transformers 5.24.0 and pillow 13.0.0: a white page of 2480 x 3508 pixels with 99 black lines
#   Pixtral, mistral-common            47 lines lost   black to white: 0.00 to 1.11
#   Pixtral, transformers               0 lines lost   black to white: 0.71 to 1.00
#   Pixtral, thumbnail first            0 lines lost   black to white: 0.71 to 1.00
#   Mistral Small, mistral-common      21 lines lost   black to white: 0.00 to 1.11
#   Mistral Small, transformers         0 lines lost   black to white: 0.56 to 1.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile mistral-common==1.13.1 opencv-python-headless==5.0.0.93 transformers==5.24.0 \
  pillow==13.0.0 numpy==2.3.5
cat > "$folder/show.py" <<'PY'
import numpy as np
from mistral_common.protocol.instruct.chunk import ImageChunk
from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs
from PIL import Image
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

lines = np.arange(35, 3480, 35)
page = np.full((3508, 2480, 3), 255, np.uint8)
page[lines] = 0
page = Image.fromarray(page)
small = page.copy()
small.thumbnail((1024, 1024), Image.Resampling.BICUBIC)
theirs = PixtralImageProcessorPil()


def mistral(picture, longest, patch, merge):
    config = ImageConfig(image_patch_size=patch, max_image_size=longest, spatial_merge_size=merge)
    return ImageEncoder(config, SpecialImageIDs(img=10, img_break=12, img_end=13))(ImageChunk(image=picture)).image


def transformers(picture, longest, patch, merge):
    size = {"height": patch * merge, "width": patch * merge}
    return theirs(picture, size={"longest_edge": longest}, patch_size=size, return_tensors="np")["pixel_values"][0]


def show(name, pixels):
    column = pixels[0, :, 100] * theirs.image_std[0] + theirs.image_mean[0]  # 0 is black, 1 is white
    places = ((lines + 0.5) * len(column) / 3508).astype(int)
    darkest = np.array([column[max(0, y - 4) : y + 5].min() for y in places])
    levels = f"{abs(column.min()):.2f} to {column.max():.2f}"
    print(f"{name:32}  {(darkest > 0.9).sum():3} lines lost   black to white: {levels}")


pixtral, three = (1024, 16, 1), (1540, 14, 2)
show("Pixtral, mistral-common", mistral(page, *pixtral))
show("Pixtral, transformers", transformers(page, *pixtral))
show("Pixtral, thumbnail first", mistral(small, *pixtral))
show("Mistral Small, mistral-common", mistral(page, *three))
show("Mistral Small, transformers", transformers(page, *three))
PY
diff <("$folder/venv/bin/python" "$folder/show.py" 2> "$folder/errors") - <<'SEEN' || { tail -3 "$folder/errors"; exit 1; }
Pixtral, mistral-common            47 lines lost   black to white: 0.00 to 1.11
Pixtral, transformers               0 lines lost   black to white: 0.71 to 1.00
Pixtral, thumbnail first            0 lines lost   black to white: 0.71 to 1.00
Mistral Small, mistral-common      21 lines lost   black to white: 0.00 to 1.11
Mistral Small, transformers         0 lines lost   black to white: 0.56 to 1.00
SEEN
echo "as seen"
