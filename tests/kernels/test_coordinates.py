"""A specialised loop's tile is split between two consumers; no coordinate of a descriptor may count rows as well."""

import pytest
import torch

from minillava.kernels import frame
from minillava.kernels.frame import coordinate, jit, launch, tl

if not frame.HAS_TRITON:
    pytest.skip("Triton is not installed here, so nothing can be compiled", allow_module_level=True)

from minillava.kernels.tools import aot


@jit
def _rows(a_ptr, b_ptr, c_ptr, row_ptr, M, N, K, APART: tl.constexpr, BLOCK: tl.constexpr):
    """c = a b^T for the tile of rows that program (i) finds in row_ptr, and the number of every row in row_ptr."""
    row = tl.load(row_ptr + tl.program_id(0))
    at = coordinate(row) if APART else row
    a_desc = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK, 64])
    b_desc = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [BLOCK, 64])
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in tl.range(0, K, 64, warp_specialize=True):
        acc = tl.dot(a_desc.load([at, coordinate(k)]), b_desc.load([0, coordinate(k)]).T, acc)
    rows = row + tl.arange(0, BLOCK)
    tl.store(c_ptr + rows[:, None] * N + tl.arange(0, BLOCK)[None, :], acc, mask=(rows < M)[:, None])


@pytest.mark.parametrize("apart", (True, False))
def test_a_coordinate_that_counts_rows_is_caught(apart):
    a, b = (torch.empty(256, 256, dtype=torch.bfloat16, device="meta") for _ in range(2))
    c, row = torch.empty(256, 256, device="meta"), torch.empty(2, dtype=torch.int32, device="meta")
    config = {"block": 128, "warps": 4, "stages": 2}
    with aot.compiling("sm_90") as found:
        launch(_rows, (2,), a, b, c, row, 256, 256, 256, config=config, APART=apart)
    assert "setmaxnreg" in found[0].instructions
    assert bool(found[0].shared_coordinates) != apart
    assert any("counts rows from" in text for text in found[0].complaints()) != apart
