#!/usr/bin/env bash
# safetensors 0.8.0: `safetensors.numpy` writes a transposed array with the new shape and the old order of values.
#
# Kernels of JAX checkpoints (big_vision's SigLIP, PaliGemma) are (in, out) and a linear layer's weight is (out, in), so a converter
# writes kernel.T. One would guess that the file holds what the array shows, as it did up to 0.7.0, or that it is refused, as
# safetensors.torch refuses a tensor that is not contiguous. 0.8.0 copies as many bytes as the array has from where its memory starts,
# without looking at strides: the values of a transposed array are shuffled, and of every second row, or of some columns, others are
# taken. Shape and dtype are right, the file loads, and nothing warns. Write np.ascontiguousarray(kernel.T); np.copy keeps the order.
#
# Seen with numpy 2.4.6, a kernel [[0, 1, 2], [3, 4, 5]]:
#   safetensors 0.7.0  kernel.T: [[0, 3], [1, 4], [2, 5]]   kernel[:, :2]: [[0, 1], [3, 4]]
#   safetensors 0.8.0  kernel.T: [[0, 1], [2, 3], [4, 5]]   kernel[:, :2]: [[0, 1], [2, 3]]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/show.py" <<'PY'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
save_file({"kernel.T": kernel.T, "kernel[:, :2]": kernel[:, :2]}, sys.argv[1])
found = load_file(sys.argv[1])
print(f"safetensors {safetensors.__version__} ", "   ".join(f"{n}: {found[n].astype(int).tolist()}" for n in sorted(found)))
PY
for version in 0.7.0 0.8.0; do
  "${PYTHON:-python3}" -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q --no-compile safetensors==$version numpy==2.4.6
  "$folder/$version/bin/python" "$folder/show.py" "$folder/$version.safetensors"
done > "$folder/seen"
diff "$folder/seen" - <<'SEEN'
safetensors 0.7.0  kernel.T: [[0, 3], [1, 4], [2, 5]]   kernel[:, :2]: [[0, 1], [3, 4]]
safetensors 0.8.0  kernel.T: [[0, 1], [2, 3], [4, 5]]   kernel[:, :2]: [[0, 1], [2, 3]]
SEEN
echo "as seen"
