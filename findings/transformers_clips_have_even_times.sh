#!/usr/bin/env bash
# transformers 5.24.0: "one frame a second" of a clip with uneven frames takes nearly all from where frames are dense.
#
# Screen recordings, phones and web streams write a frame when something moves, each with its own time. One would guess that
# load_video(fps=1) gives the picture at 0 s, 1 s, 2 s, as ffmpeg's fps filter does, and that metadata.timestamps, from which processors
# of Qwen3-VL and others write "<2.0 seconds>" into the prompt, are the times in the file. Neither is: frames are numbers in a row at
# the mean rate, and times are number / mean rate; the times that PyAV decoded are not looked at. A question about the first five
# seconds below is asked of a model that saw one picture of them, with five others labelled as theirs. No error, no line.
#
# Seen with transformers 5.24.0 and av 18.1.0, a clip of one frame a second for 5 s, then 50 in the 6th:
#   fps=1         said: 0.0 1.0 2.0 3.0 3.9 4.9
#                 true: 0.0 5.1 5.3 5.4 5.6 5.8
#   num_frames=4  said: 0.0 1.4 3.0 4.5
#                 true: 0.0 5.2 5.4 5.7
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile transformers==5.24.0 av==18.1.0 pillow==13.0.0 numpy==2.4.6 requests
cat > "$folder/show.py" <<'PY'
import sys
from fractions import Fraction

import av
import numpy as np
from transformers.video_utils import load_video

path, thousandth = f"{sys.argv[1]}/clip.mp4", Fraction(1, 1000)
with av.open(path, "w") as clip:
    stream = clip.add_stream("mpeg4", rate=30)
    stream.width, stream.height, stream.pix_fmt, stream.codec_context.time_base = 64, 64, "yuv420p", thousandth
    for time in (*range(0, 5000, 1000), *range(5000, 6000, 20)):
        frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), time // 30, np.uint8), format="rgb24")
        frame.pts, frame.time_base = time, thousandth
        clip.mux(stream.encode(frame))
    clip.mux(stream.encode(None))
with av.open(path) as clip:
    true = [frame.time for frame in clip.decode(video=0)]
for name, much in {"fps": 1, "num_frames": 4}.items():
    metadata = load_video(path, backend="pyav", **{name: much})[1]
    print(f"{name}={much}".ljust(13), "said:", *(f"{time:.1f}" for time in metadata.timestamps))
    print(" " * 13, "true:", *(f"{true[number]:.1f}" for number in metadata.frames_indices))
PY
diff <("$folder/venv/bin/python" "$folder/show.py" "$folder" 2> "$folder/errors") - <<'SEEN' || { tail -3 "$folder/errors"; exit 1; }
fps=1         said: 0.0 1.0 2.0 3.0 3.9 4.9
              true: 0.0 5.1 5.3 5.4 5.6 5.8
num_frames=4  said: 0.0 1.4 3.0 4.5
              true: 0.0 5.2 5.4 5.7
SEEN
echo "as seen"
