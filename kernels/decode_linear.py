"""A linear layer of a decode step with all that is around it, one kernel: norm, product, bias, SwiGLU, residual.

y = residual + f(rms_norm(x) W^T + bias), f the identity or silu of the first half of the outputs times the second. W is
dense or in four bits. For a few rows; no gradient. Norm and sum are in fp32, so that y is nearer to float64 than the
same steps one by one. Letters: M rows, N outputs, K inputs.
"""

import torch.nn.functional as F
from torch import Tensor

from minillava.kernels import configs, nf4_matmul
from minillava.kernels.decode_tile import Around, outputs, put, wait
from minillava.kernels.frame import aligned, card_of, contiguous, jit, launch, register, shapes, tl
from minillava.kernels.nf4_dequantize import WEIGHT, check
from minillava.kernels.rms_norm import rms_norm
from minillava.kernels.swiglu import swiglu

ROWS = 16  # beyond, the library's products win

# -- reference ---------------------------------------------------------------------------------------------------------


def reference(x_MK, weight_NK, bias_N, norm_K, eps: float, gated: bool, residual) -> Tensor:
    """The same steps one by one."""
    return _after(F.linear(_before(x_MK, norm_K, eps), weight_NK, bias_N), gated, residual)


def nf4_reference(
    x_MK, packed, absmax, nested, dynamic, bias_N, norm_K, eps: float, gated: bool, residual, N: int, quant_type: str,
    blocksize: int,
) -> Tensor:  # fmt: skip
    """`reference` for W in four bits."""
    weight = packed, absmax, nested, dynamic
    y_MN = nf4_matmul.nf4_matmul(_before(x_MK, norm_K, eps), *weight, bias_N, N, quant_type, blocksize)
    return _after(y_MN, gated, residual)


def _before(x_MK: Tensor, norm_K: Tensor | None, eps: float) -> Tensor:
    return x_MK if norm_K is None else rms_norm(x_MK, norm_K, eps)


def _after(y_MN: Tensor, gated: bool, residual: Tensor | None) -> Tensor:
    y = swiglu(*y_MN.chunk(2, -1)) if gated else y_MN
    return y if residual is None else residual + y


# -- Triton ------------------------------------------------------------------------------------------------------------


@jit
def _row(
    x_ptr, norm_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, M, N, eps, K: tl.constexpr, EVEN: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of x for each program_id(1), BLOCK_N outputs a program, by multiply-adds in fp32. Moves N K numbers and,
    from the L2 cache, x; about 3 instructions a weight, where HBM leaves time for 13. The first weights are under way
    before the kernels in front are done. fp16, bf16, fp32."""
    first, place = outputs(N, BLOCK_N, GATED, EVEN)
    k = tl.arange(0, BLOCK_K)[None, :]
    w_ptr += first * K + place[:, None].to(tl.int64) * K + k
    LAST: tl.constexpr = (K - 1) // BLOCK_K * BLOCK_K
    WHOLE: tl.constexpr = K % BLOCK_K == 0
    w = tl.load(w_ptr, mask=None if WHOLE else k < K, other=None if WHOLE else 0.0)
    wait(PDL)
    x_ptr += tl.program_id(1).to(tl.int64) * K + k
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((1, BLOCK_K), tl.float32)
    for at in tl.range(0, K, BLOCK_K):
        ahead = tl.minimum(at + BLOCK_K, LAST)  # the last weights are read twice, then from cache
        w_ahead = tl.load(w_ptr + ahead, mask=None if WHOLE else ahead + k < K, other=None if WHOLE else 0.0)
        keep = None if WHOLE else at + k < K
        x = tl.load(x_ptr + at, mask=keep, other=None if WHOLE else 0.0).to(tl.float32)
        if norm_ptr is not None:
            squares += x * x
            x *= tl.load(norm_ptr + at + k, mask=keep, other=None if WHOLE else 0.0).to(tl.float32)
        acc += w.to(tl.float32) * x
        w = w_ahead
    y = tl.sum(acc, 1)[:, None]
    if norm_ptr is not None:
        y *= 1.0 / tl.sqrt_rn(tl.sum(squares) / K + eps)
    put(y, y_ptr, bias_ptr, residual_ptr, first, place, M, N, BLOCK_N, 1, GATED)


@jit
def _rows(
    x_ptr, norm_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, M, N, K, eps, EVEN: tl.constexpr, GATED: tl.constexpr,
    PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y^T = W x^T and what is around it on tensor cores, BLOCK_M rows a program: W passes through shared memory once.
    2 BLOCK_M FLOPs a weight; fp16, bf16 (fp32 in the interpreter); K a multiple of BLOCK_K."""
    first, place = outputs(N, BLOCK_N, GATED, EVEN)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_K)
    w_ptr += (first + place)[:, None] * K + depth[None, :]
    wait(PDL)
    x_ptr += columns[None, :] * K + depth[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for at in tl.range(0, K, BLOCK_K):
        w = tl.load(w_ptr + at)
        x = tl.load(x_ptr + at, mask=(columns < M)[None, :], other=0.0)
        if norm_ptr is not None:
            wide = x.to(tl.float32)
            squares += wide * wide
            x = (wide * tl.load(norm_ptr + at + depth).to(tl.float32)[:, None]).to(x_ptr.dtype.element_ty)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    if norm_ptr is not None:
        acc *= 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / K + eps)[None, :]
    put(acc, y_ptr, bias_ptr, residual_ptr, first, place, M, N, BLOCK_N, BLOCK_M, GATED)


# -- wrapper -----------------------------------------------------------------------------------------------------------


def decode_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: Tensor | None = None, eps: float = 0.0,
    gated: bool = False, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual + f(rms_norm(x) weight^T + bias): x [M, K], weight [N, K], bias [N], norm [K], all of one dtype; result
    and residual [M, N], or [M, N / 2] with `gated`. No gradient. Raises ValueError when shapes do not fit."""
    _check(x, weight.shape, bias, norm, gated, residual)
    return _dense(x, weight, bias, norm, eps, gated, residual)


def nf4_decode_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, nested: Tensor | None, dynamic: Tensor | None, bias: Tensor | None,
    N: int, quant_type: str, blocksize: int, norm: Tensor | None = None, eps: float = 0.0, gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`decode_linear` with W in four bits, as `nf4_matmul` takes it."""
    check(packed, absmax, nested, dynamic, N, x.shape[1], quant_type, blocksize)
    _check(x, (N, x.shape[1]), bias, norm, gated, residual)
    weight = packed, absmax, nested, dynamic
    return _nf4(x, *weight, bias, norm, eps, gated, residual, N, quant_type, blocksize)


def _check(x: Tensor, shape: tuple, bias: Tensor | None, norm: Tensor | None, gated: bool, residual) -> None:
    N, K = shape
    wanted = (x, (len(x), K)), (bias, (N,)), (norm, (K,)), (residual, (len(x), N // 2 if gated else N))
    if any(t is not None and (t.shape != size or t.dtype != x.dtype) for t, size in wanted) or (gated and N % 2):
        got = shapes(x=x, bias=bias, norm=norm, residual=residual)
        raise ValueError(f"decode_linear: what goes with a weight [{N}, {K}] in {x.dtype} does not fit: {got}")


def triton_dense(x_MK, weight_NK, bias_N, norm_K, eps: float, gated: bool, residual, config: dict | None = None):
    (M, K), N, card = x_MK.shape, len(weight_NK), card_of(x_MK)
    config = config or configs.choose("decode_linear", "dense", card, M, N)
    fits = 0 < M <= ROWS and N * K and weight_NK.dtype == x_MK.dtype and weight_NK.is_contiguous()
    fits &= config["variant"] == "row" or (K % config["block_k"] == 0 and x_MK.dtype in nf4_matmul.TYPES["product"])
    if not fits or K % 8:
        return reference(x_MK, weight_NK, bias_N, norm_K, eps, gated, residual)
    y_MN = x_MK.new_empty(M, N // 2 if gated else N)
    norm_K, bias_N, residual = map(contiguous, (norm_K, bias_N, residual))
    args = aligned(x_MK), norm_K, weight_NK, bias_N, residual, y_MN, M, N
    constants = {"GATED": gated, "EVEN": N % config["block_n"] == 0}
    tiles = -(-N // config["block_n"])
    if config["variant"] == "row":
        launch(_row, (tiles, M), *args, eps, config=config, K=K, **constants)
    else:
        launch(_rows, (tiles, -(-M // config["block_m"])), *args, K, eps, config=config, **constants)
    return y_MN


def triton_nf4(
    x_MK, packed, absmax, nested, dynamic, bias_N, norm_K, eps: float, gated: bool, residual, N: int, quant_type: str,
    blocksize: int, config: dict | None = None,
) -> Tensor:  # fmt: skip
    weight, M = (packed, absmax, nested, dynamic), len(x_MK)
    config = config or configs.choose("decode_linear", "nf4", card_of(x_MK), M, N)
    if M > ROWS or not nf4_matmul.takes(x_MK, blocksize, config):
        return nf4_reference(x_MK, *weight, bias_N, norm_K, eps, gated, residual, N, quant_type, blocksize)
    if norm_K is not None or gated:  # only a whole result can be normed and gated
        config = {**config, "split_k": 1}
    around = Around(norm_K, eps, gated, residual)
    return nf4_matmul.multiply(x_MK, weight, bias_N, N, quant_type, blocksize, around, config)


AROUND = "Tensor? bias, Tensor? norm, float eps, bool gated, Tensor? residual"
_dense = register(
    f"decode_linear(Tensor x, Tensor weight, {AROUND}) -> Tensor",
    plain=reference,
    cuda=triton_dense,
    fake=lambda x, w, bias, norm, eps, gated, *_: x.new_empty(x.shape[0], w.shape[0] // (2 if gated else 1)),
)
_nf4 = register(
    f"nf4_decode_linear(Tensor x, {WEIGHT}, {AROUND}, int N, str quant_type, int blocksize) -> Tensor",
    plain=nf4_reference,
    cuda=triton_nf4,
    fake=lambda x, packed, absmax, nested, dynamic, bias, norm, eps, gated, residual, N, *_: x.new_empty(
        x.shape[0], N // 2 if gated else N
    ),
)
