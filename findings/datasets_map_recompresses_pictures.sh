#!/usr/bin/env bash
# datasets 5.2.0: a `map` that only looks at a JPEG writes it anew at quality 75, each time.
#
# Pictures of a hub data set lie in the table as the bytes of their files. A function given to `map` that reads row["image"], say for
# its width, and returns a new column leaves the picture alone, one would guess. But `map` takes every column that was read as a
# result: the decoded picture is encoded again with its `format` and Pillow's defaults (image_to_bytes), so a JPEG of quality 95
# becomes one of 75 and WebP one of 80, without a word; the next map does it again, and to_parquet or push_to_hub ships that.
# Small print is what suffers. `filter` keeps the bytes, as does a map that does not read the column, or whose column was cast
# to Image(decode=False) before; a picture of another kind of file object (resized, say) becomes a PNG.
#
# Seen with datasets 5.2.0, pyarrow 26.0.1 and pillow 13.0.0, a drawn picture of 128 x 128:
#   as read from parquet:  quality 95
#   width noted by map:    quality 75, values differ by up to 33 of 255, 4.5 in the mean
#   four maps:             quality 75, values differ by up to 55 of 255, 7.3 in the mean
#   filter on the width:   the same bytes
#   map of another column: the same bytes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile datasets==5.2.0 pyarrow==26.0.1 pillow==13.0.0 numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import io
import sys

import numpy as np
from datasets import Dataset, Features, Image, disable_progress_bars, load_dataset
from PIL import Image as Pictures

disable_progress_bars()
drawn = Pictures.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((128, 128))
drawn.save(file := io.BytesIO(), "JPEG", quality=95)
rows = [{"image": {"bytes": file.getvalue(), "path": None}}]
Dataset.from_list(rows, features=Features({"image": Image()})).to_parquet(f"{sys.argv[1]}/rows.parquet")
rows = load_dataset("parquet", data_files=f"{sys.argv[1]}/rows.parquet", cache_dir=sys.argv[1], split="train")


def stored(data):
    return data.cast_column("image", Image(decode=False))[0]["image"]["bytes"]


def quality(data):
    """The quality that Pillow's own tables have for the first number of this file's."""
    return {2: 95, 8: 75}[Pictures.open(io.BytesIO(stored(data))).quantization[0][0]]


def compare(data):
    if stored(data) == stored(rows):
        return "the same bytes"
    away = np.abs(np.asarray(data[0]["image"]).astype(int) - np.asarray(rows[0]["image"]))
    return f"quality {quality(data)}, values differ by up to {away.max()} of 255, {away.mean():.1f} in the mean"


once = four = rows.map(lambda row: {"width": row["image"].width})
for _ in range(3):
    four = four.map(lambda row: {"width": row["image"].width})
print("as read from parquet:  quality", quality(rows))
print("width noted by map:   ", compare(once))
print("four maps:            ", compare(four))
print("filter on the width:  ", compare(rows.filter(lambda row: row["image"].width > 1)))
print("map of another column:", compare(rows.map(lambda row: {"question": "What is it?"})))
PY
diff <(HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py" "$folder") - <<'SEEN'
as read from parquet:  quality 95
width noted by map:    quality 75, values differ by up to 33 of 255, 4.5 in the mean
four maps:             quality 75, values differ by up to 55 of 255, 7.3 in the mean
filter on the width:   the same bytes
map of another column: the same bytes
SEEN
echo "as seen"
