#!/bin/bash
# triton 3.9.0 (3.6.0, 3.7.1 and 3.8.0 too), tl.range(..., warp_specialize=True), compiled for sm_90, 4 warps.
#
# A specialised loop splits a tile of 128 rows between two consumers. If the scalar from which a kernel counts its rows
# is also a coordinate of a tensor descriptor, the compiler adds half a tile to that scalar for the second consumer, and
# to everything else computed from it, on top of the half tile that tl.arange is cut by: the second consumer loads rows
# row + 64.. and writes its results (masks, bounds, log sums ...) to rows row + 128.. . Nothing warns; the interpreter is
# right; a program_id times BLOCK is hit as a loaded number is. A value apart, as tl.maximum(row, 0), is left alone.
# Seen in Triton's intermediate code, no card needed: with the shared value the second consumer counts from row + 64 a
# range that starts at 64; with a value apart it counts that range from row.
#
# Exits 0 while this is so, non-zero when the behaviour has changed.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check triton==3.9.0
cat > "$folder/shift.py" <<'PY'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def kernel(a_ptr, b_ptr, c_ptr, row_ptr, M, N, K, APART: tl.constexpr):
    """c[row + i] = a[row + i] b^T for 128 rows from row_ptr on."""
    row = tl.load(row_ptr + tl.program_id(0))
    place = tl.maximum(row, 0) if APART else row
    a = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [128, 64])
    b = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [128, 64])
    acc = tl.zeros((128, 128), tl.float32)
    for k in tl.range(0, K, 64, warp_specialize=True):
        acc = tl.dot(a.load([place, k]), b.load([0, k]).T, acc)
    rows = row + tl.arange(0, 128)
    tl.store(c_ptr + rows[:, None] * N + tl.arange(0, 128)[None, :], acc, mask=(rows < M)[:, None])


def ttgir(apart):
    pointers = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "row_ptr": "*i32"}
    signature = pointers | dict.fromkeys("MNK", "i32") | {"APART": "constexpr"}
    attrs = {(i,): [["tt.divisibility", 16]] for i in range(7)}
    source = ASTSource(kernel, signature, {"APART": apart}, attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2}).asm["ttgir"]


def first_rows(text):
    """For each consumer: the row, counted from `row`, of its first row of results."""
    found = []
    for part in re.split(r"(?m)^ *partition\d+\(", text)[1:]:
        values = dict(re.findall(r"(%\w+) = (.*)", part))
        ranges = {name: int(re.search(r"start = (\d+)", v)[1]) for name, v in values.items()
                  if "tt.make_range" in v and "tensor<64xi32" in v}
        for name, value in values.items():
            operands = re.findall(r"%\w+", value)
            if value.startswith("arith.addi") and "tensor<64xi32" in value and set(operands) & ranges.keys():
                start = ranges[next(o for o in operands if o in ranges)]
                of = re.search(r"%\w+", values[next(o for o in operands if o not in ranges)])[0]  # tt.splat %of
                moved = values.get(of, "").startswith("arith.addi")
                found.append((start, moved))
    return found


print("triton", triton.__version__)
shared, apart = first_rows(ttgir(False)), first_rows(ttgir(True))
print("coordinate and rows share a value: (first row, half a tile added to `row` as well)", shared)
print("coordinate is tl.maximum(row, 0):  (first row, half a tile added to `row` as well)", apart)
wrong = (64, True) in shared and not any(moved for _, moved in apart) and apart
sys.exit(0 if wrong else 1)
PY
cd "$folder"
TRITON_CACHE_DIR="$folder/cache" TRITON_DEFAULT_FP_FUSION=1 "$folder/venv/bin/python" shift.py
