#!/usr/bin/env bash
# mlx 0.32.4: `mx.load` of a GGUF file ends at the first tensor of a type it does not know, and returns what stood before as the file.
#
# Types newer than BF16 are such: MXFP4 (experts of gpt-oss, and of any model quantised as llama.cpp's MXFP4_MOE), NVFP4, the ternary
# TQ1_0 and TQ2_0, Q1_0. Of older types that it knows and cannot unpack (Q5_0, Q3_K, IQ4_XS) mx.load says so with an error, and its
# text promises that formats it does not support are cast to float16. So one would guess an error here too, or numbers. But the function
# that it calls for the next tensor answers 0 at the end of the file and also at a type number that is not in its table, and mx.load takes
# both for the end. Gone are the tensor and all behind it, whatever their types; nothing is raised or printed. Who then fills a model with
# load_weights(..., strict=False) has random weights in it, and a count of parameters or bytes from that dictionary is too small.
# Compare the names with those of gguf.GGUFReader, or the number of tensors in the header (8 bytes at offset 8).
#
# Seen with gguf 0.19.0 and mlx 0.32.4 (Linux, CPU), files of three tensors, the second of the type named:
#   BF16   first second third
#   Q5_0   [load_gguf] gguf_tensor_to_f16 failed
#   MXFP4  first
#   NVFP4  first
#   TQ2_0  first
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile "mlx[cpu]==0.32.4" gguf==0.19.0
cat > "$folder/show.py" <<'PY'
import sys

import gguf
import mlx.core as mx
import numpy as np

whole = np.ones((2, 256), np.float32)
for kind in ("BF16", "Q5_0", "MXFP4", "NVFP4", "TQ2_0"):
    kind = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    packed = np.zeros((2, 256 // values * size), np.uint8)  # all zeros is a tensor of every type
    file = gguf.GGUFWriter(sys.argv[1], "llama")
    file.add_tensor("first", whole)
    file.add_tensor("second", packed, raw_dtype=kind)
    file.add_tensor("third", whole)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    assert len(gguf.GGUFReader(sys.argv[1]).tensors) == 3
    try:
        found = " ".join(sorted(mx.load(sys.argv[1])))
    except RuntimeError as error:
        found = str(error)
    print(f"{kind.name:5}  {found}")
PY
diff <("$folder/venv/bin/python" "$folder/show.py" "$folder/three.gguf" 2>&1) - <<'SEEN'
BF16   first second third
Q5_0   [load_gguf] gguf_tensor_to_f16 failed
MXFP4  first
NVFP4  first
TQ2_0  first
SEEN
echo "as seen"
