#!/usr/bin/env bash
# transformers 5.24.0: frames that its video processors take by default never come from the last part of a video.
#
# `default_sample_indices_fn`, which every video processor without a rule of its own uses, says that it samples uniformly between 0 and
# the number of frames. One would guess first and last frame and what lies between, as LLaVA's, LLaVA-NeXT's and decord users' linspace
# takes them (0, 33, 66, 99). It takes i * total // n: of 100 frames in 4 the last is 75, so a quarter of the video is not looked at,
# and of 2 frames half of it. What happens at the end of a clip is asked of a model that has not been shown it.
#
# Seen with transformers 5.24.0:
#   2 of 100: [0, 50]    4 of 100: [0, 25, 50, 75]    8 of 100: [0, 12, 25, 37, 50, 62, 75, 87]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 numpy
cat > "$folder/show.py" <<'PY'
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

video = VideoMetadata(total_num_frames=100, fps=10.0, duration=10.0)
for count in (2, 4, 8):
    print(f"{count} of 100:", [int(number) for number in default_sample_indices_fn(video, num_frames=count)])
PY
diff <("$folder/venv/bin/python" "$folder/show.py" 2> /dev/null) - <<'SEEN'
2 of 100: [0, 50]
4 of 100: [0, 25, 50, 75]
8 of 100: [0, 12, 25, 37, 50, 62, 75, 87]
SEEN
echo "as seen"
