"""y = W2 gelu(W1 x + b1) + b2, the projector that LLaVA-1.5 made famous, forward and backward.

The forward saves only the pre-activation; the backward recomputes the activation, so the memory kept is half of
autograd's for the same three modules. GELU is exact (erf) or the tanh form, as the model says: up to 5e-4 apart.
On a GPU the first product and the product that makes the hidden gradient do the elementwise work in their epilogues;
the other products are the library's. Letters: N rows, K input width, H hidden width, O output width; inside the Triton
product, which serves both directions, M x N is the result and K the depth.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels import configs
from minillava.kernels.cpu import product
from minillava.kernels.frame import aligned, card_of, contiguous, coordinate, jit, launch, register, shapes, tl

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}

# -- reference ---------------------------------------------------------------------------------------------------------


def reference(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> Tensor:
    """The same function in plain, differentiable PyTorch."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate=APPROXIMATE[activation]), w2, b2)


def plain_forward(x_NK, w1_HK, b1_H, w2_OH, b2_O, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    pre_NH = F.linear(x_NK, w1_HK, b1_H)
    if save:
        act_NH = F.gelu(pre_NH, approximate=APPROXIMATE[activation])
        return F.linear(act_NH, w2_OH, b2_O), pre_NH
    act_NH = torch.ops.aten.gelu_(pre_NH, approximate=APPROXIMATE[activation])
    return F.linear(act_NH, w2_OH, b2_O), x_NK.new_empty(0)


def cpu_forward(x_NK, w1_HK, b1_H, w2_OH, b2_O, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    """Without gradients by the products that are fastest on this CPU."""
    if save:
        return plain_forward(x_NK, w1_HK, b1_H, w2_OH, b2_O, activation, save)
    act_NH = torch.ops.aten.gelu_(product.linear(x_NK, w1_HK, b1_H), approximate=APPROXIMATE[activation])
    return product.linear(act_NH, w2_OH, b2_O), x_NK.new_empty(0)


def plain_backward(dy_NO, x_NK, w1_HK, w2_OH, pre_NH, activation: str, needs: list[bool]) -> tuple[Tensor, ...]:
    """Gradients of x, w1, b1, w2, b2; an empty tensor where `needs` says that nobody asked."""
    need_x, need_w1, need_b1, need_w2, need_b2 = needs
    none = x_NK.new_empty(0)
    dw2_OH = dy_NO.T @ F.gelu(pre_NH, approximate=APPROXIMATE[activation]) if need_w2 else none
    db2_O = dy_NO.sum(0) if need_b2 else none
    if not (need_x or need_w1 or need_b1):
        return none, none, none, dw2_OH, db2_O
    dpre_NH = torch.ops.aten.gelu_backward(dy_NO @ w2_OH, pre_NH, approximate=APPROXIMATE[activation])
    dw1_HK = dpre_NH.T @ x_NK if need_w1 else none
    db1_H = dpre_NH.sum(0) if need_b1 else none
    dx_NK = dpre_NH @ w1_HK if need_x else none
    return dx_NK, dw1_HK, db1_H, dw2_OH, db2_O


# -- Triton ------------------------------------------------------------------------------------------------------------


@jit
def _gelu(x, ERF: tl.constexpr):
    """gelu(x) in fp32. erf after Abramowitz and Stegun 7.1.28, as an upper tail: no cancellation, one division, and few
    enough registers for a 128 x 256 epilogue, where libdevice's erf and 7.1.26 spill. Off by 8e-7 (torch: 1.2e-6).
    """
    if ERF:
        z = tl.abs(x)
        p = 1.0 + z * (
            0.04986734688
            + z * (0.02114100568 + z * (0.00327762635 + z * (3.800357e-5 + z * (4.889064e-5 + z * 5.382975e-6))))
        )
        p = p * p
        p = p * p
        p = p * p
        tail = 0.5 / (p * p)
        return x * tl.where(x >= 0, 1.0 - tail, tail)
    return x / (1.0 + tl.exp2(x * (1.0 + 0.044715 * x * x) * -2.302208198))  # 2 sqrt(2 / pi) log2(e)


@jit
def _gelu_and_slope(x, ERF: tl.constexpr):
    """gelu(x) and its derivative in fp32; erf after Abramowitz and Stegun 7.1.26: both need its exponential."""
    if ERF:
        t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))  # 0.3275911 / sqrt(2)
        bell = tl.exp2(x * x * -0.7213475204444817)  # exp(-x^2 / 2)
        tail = (
            t * bell * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
        )
        cdf = tl.where(x >= 0, 1.0 - tail, tail)
        return x * cdf, cdf + x * bell * 0.3989422804014327  # 1 / sqrt(2 pi)
    # the tanh form: the constants are 2 sqrt(2 / pi) log2(e), 2 sqrt(2 / pi), 3 * 0.044715
    cdf = 1.0 / (1.0 + tl.exp2(x * (1.0 + 0.044715 * x * x) * -2.302208198))
    return x * cdf, cdf + x * cdf * (1.0 - cdf) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@jit
def _tile(index, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, so that neighbours share operands in the L2 cache."""
    width = GROUP * tiles_n
    first = index // width * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    return first + index % width % rows, index % width // rows


@jit
def _descriptor(
    a_ptr, b_ptr, bias_ptr, pre_ptr, act_ptr, dpre_ptr, sums_ptr, M, N, K,
    BACKWARD: tl.constexpr, ERF: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Hopper and later: tiles through the tensor memory accelerator, programs that stay for many tiles.

    Forward, A [M, K], B [N, K]: pre = A B^T + bias, act = gelu(pre). Backward, A [M, K], B [K, N]: act = gelu(pre),
    dpre = A B * gelu'(pre), sums = column sums of dpre for each row of tiles. 2MNK FLOPs; moves A and B about once and
    4MN bytes forward, 6MN backward. SPECIALIZE splits the warps into a loader and two consumers (with 4 warps,
    descriptors made here and no column sums, else Triton cannot); PARTS = 2 halves the epilogue's registers without it.
    fp16 and bf16; N and K multiples of 8.
    """
    SUB: tl.constexpr = BLOCK_N // PARTS
    a_desc = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    if BACKWARD:
        b_desc = tl.make_tensor_descriptor(b_ptr, [K, N], [N, 1], [BLOCK_K, BLOCK_N])
    else:
        b_desc = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    pre_desc = tl.make_tensor_descriptor(pre_ptr, [M, N], [N, 1], [BLOCK_M, SUB])
    act_desc = tl.make_tensor_descriptor(act_ptr, [M, N], [N, 1], [BLOCK_M, SUB])
    dpre_desc = tl.make_tensor_descriptor(dpre_ptr, [M, N], [N, 1], [BLOCK_M, SUB])
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=SPECIALIZE, flatten=False):
        tile_m, tile_n = _tile(index, tiles_m, tiles_n, GROUP)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([coordinate(row), coordinate(k)])
            if BACKWARD:
                acc = tl.dot(a, b_desc.load([coordinate(k), coordinate(column)]), acc)
            else:
                acc = tl.dot(a, b_desc.load([coordinate(column), coordinate(k)]).T, acc)
        if PARTS == 1:
            _descriptor_epilogue(
                acc, bias_ptr, pre_desc, act_desc, dpre_desc, sums_ptr, tile_m, row, column, N, BACKWARD, ERF, SAVE, SUB
            )
        else:
            left, right = acc.reshape(BLOCK_M, 2, SUB).permute(0, 2, 1).split()
            _descriptor_epilogue(left, bias_ptr, pre_desc, act_desc, dpre_desc, sums_ptr, tile_m, row, column, N,
                                 BACKWARD, ERF, SAVE, SUB)  # fmt: skip
            column += SUB
            _descriptor_epilogue(right, bias_ptr, pre_desc, act_desc, dpre_desc, sums_ptr, tile_m, row, column, N,
                                 BACKWARD, ERF, SAVE, SUB)  # fmt: skip


@jit
def _descriptor_epilogue(
    acc, bias_ptr, pre_desc, act_desc, dpre_desc, sums_ptr, tile_m, row, column, N,
    BACKWARD: tl.constexpr, ERF: tl.constexpr, SAVE: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    columns = column + tl.arange(0, SUB)
    row, column = coordinate(row), coordinate(column)
    if BACKWARD:
        act, slope = _gelu_and_slope(pre_desc.load([row, column]).to(tl.float32), ERF)
        act_desc.store([row, column], act.to(act_desc.dtype))
        dpre = acc * slope
        dpre_desc.store([row, column], dpre.to(act_desc.dtype))
        if sums_ptr is not None:
            tl.store(sums_ptr + tile_m * N + columns, tl.sum(dpre, 0), mask=columns < N)
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        if SAVE:
            pre_desc.store([row, column], acc.to(act_desc.dtype))
        act_desc.store([row, column], _gelu(acc, ERF).to(act_desc.dtype))


@jit
def _pointer(
    a_ptr, b_ptr, bias_ptr, pre_ptr, act_ptr, dpre_ptr, sums_ptr, partial_ptr, M, N, K,
    BACKWARD: tl.constexpr, ERF: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Any card: the same two products through pointers, a tile a program, also in fp32.

    With SPLIT_K > 1 (few rows, forward only) program (i, s) leaves its share of the depth in partial [SPLIT_K, M, N],
    fp32, and `_finish` adds the shares in a fixed order.
    """
    tile_m, tile_n = _tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    in_rows, in_columns = (rows < M)[:, None], (columns < N)[None, :]
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    start = tl.program_id(1) * share
    a_ptrs = a_ptr + rows[:, None] * K + (start + depth)[None, :]
    if BACKWARD:
        b_ptrs = b_ptr + (start + depth).to(tl.int64)[:, None] * N + columns[None, :]
    else:
        b_ptrs = b_ptr + columns.to(tl.int64)[None, :] * K + (start + depth)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, tl.minimum(start + share, K), BLOCK_K):
        a = tl.load(a_ptrs, mask=in_rows & (k + depth < K)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=in_columns & (k + depth < K)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * N if BACKWARD else BLOCK_K
    inside = in_rows & in_columns
    at = rows[:, None] * N + columns[None, :]
    if SPLIT_K > 1:
        tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * M * N + at, acc, mask=inside)
    elif BACKWARD:
        pre = tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32)
        act, slope = _gelu_and_slope(pre, ERF)
        tl.store(act_ptr + at, act.to(act_ptr.dtype.element_ty), mask=inside)
        dpre = acc * slope
        tl.store(dpre_ptr + at, dpre.to(act_ptr.dtype.element_ty), mask=inside)
        if sums_ptr is not None:
            tl.store(sums_ptr + tile_m * N + columns, tl.sum(dpre, 0), mask=columns < N)
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        if SAVE:
            tl.store(pre_ptr + at, acc.to(act_ptr.dtype.element_ty), mask=inside)
        tl.store(act_ptr + at, _gelu(acc, ERF).to(act_ptr.dtype.element_ty), mask=inside)


@jit
def _finish(
    partial_ptr, bias_ptr, pre_ptr, act_ptr, M, N,
    ERF: tl.constexpr, SAVE: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """act = gelu(sum of partial [SPLIT_K, M, N] + bias), BLOCK columns of a row a program."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    at = tl.program_id(0).to(tl.int64) * N + columns
    acc = tl.zeros((BLOCK,), tl.float32)
    for share in tl.static_range(SPLIT_K):
        acc += tl.load(partial_ptr + share * M * N + at, mask=inside, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if SAVE:
        tl.store(pre_ptr + at, acc.to(act_ptr.dtype.element_ty), mask=inside)
    tl.store(act_ptr + at, _gelu(acc, ERF).to(act_ptr.dtype.element_ty), mask=inside)


# -- wrapper -----------------------------------------------------------------------------------------------------------


def fused_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str = "gelu"
) -> Tensor:
    """w2 gelu(w1 x + b1) + b2 over the last dimension of `x`; either bias may be None.

    x [..., K], w1 [H, K], b1 [H], w2 [O, H], b2 [O] -> [..., O]. `activation` is "gelu" (erf) or "gelu_tanh".
    Raises ValueError with the shapes in sight when they do not fit.
    """
    H, K = w1.shape if w1.dim() == 2 else (-1, -1)
    O = w2.shape[0]
    fits = x.dim() >= 1 and x.shape[-1] == K and w2.dim() == 2 and w2.shape[1] == H
    if not (fits and (b1 is None or b1.shape == (H,)) and (b2 is None or b2.shape == (O,))):
        raise ValueError(f"fused_mlp: shapes do not fit: {shapes(x=x, w1=w1, b1=b1, w2=w2, b2=b2)}")
    if activation not in APPROXIMATE:
        raise ValueError(f"fused_mlp: activation {activation!r} is none of {', '.join(APPROXIMATE)}")
    if not all(t is None or t.dtype == x.dtype for t in (w1, b1, w2, b2)):
        raise ValueError(f"fused_mlp: weights are {w1.dtype} and {w2.dtype}, x is {x.dtype}; one dtype is wanted")
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, b1, w2, b2))
    y_NO, _ = _forward(x.reshape(-1, K), w1, b1, w2, b2, activation, save)
    return y_NO if x.dim() == 2 else y_NO.view(*x.shape[:-1], O)


def _fake_forward(x_NK, w1_HK, b1_H, w2_OH, b2_O, activation, save):
    pre = x_NK.new_empty(x_NK.shape[0], w1_HK.shape[0]) if save else x_NK.new_empty(0)
    return x_NK.new_empty(x_NK.shape[0], w2_OH.shape[0]), pre


def _fake_backward(dy_NO, x_NK, w1_HK, w2_OH, pre_NH, activation, needs):
    like = (x_NK.shape, w1_HK.shape, w1_HK.shape[:1], w2_OH.shape, w2_OH.shape[:1])
    return tuple(x_NK.new_empty(shape) if need else x_NK.new_empty(0) for shape, need in zip(like, needs))


def _setup_context(ctx, inputs, output) -> None:
    x_NK, w1_HK, _, w2_OH, _, ctx.activation, _ = inputs
    ctx.save_for_backward(x_NK, w1_HK, w2_OH, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy_NO, _):
    needs = list(ctx.needs_input_grad[:5])
    if dy_NO is None or not any(needs):
        return (None,) * 7
    grads = _backward(dy_NO, *ctx.saved_tensors, ctx.activation, needs)
    return *(grad if need else None for grad, need in zip(grads, needs)), None, None


def triton_forward(x_NK, w1_HK, b1_H, w2_OH, b2_O, activation: str, save: bool, config: dict | None = None):
    """`plain_forward` with the bias, the GELU and the stores inside the first product."""
    N, H = x_NK.shape[0], w1_HK.shape[0]
    config = config or configs.choose("fused_mlp", "forward", card_of(x_NK), N, H)
    if not _takes(config, x_NK, w1_HK, w2_OH):
        return plain_forward(x_NK, w1_HK, b1_H, w2_OH, b2_O, activation, save)
    act_NH = x_NK.new_empty(N, H)
    pre_NH = torch.empty_like(act_NH) if save else x_NK.new_empty(0)
    x_NK, w1_HK = aligned(x_NK), aligned(w1_HK)
    # Without `save` the kernel never touches pre, but a descriptor wants an address of the right shape.
    outputs = (pre_NH if save else act_NH, act_NH, act_NH)
    _product(x_NK, w1_HK, b1_H, *outputs, None, activation, False, save, config)
    return F.linear(act_NH, w2_OH, b2_O), pre_NH


def triton_backward(dy_NO, x_NK, w1_HK, w2_OH, pre_NH, activation: str, needs: list[bool], config: dict | None = None):
    """`plain_backward` with the recomputed GELU, its derivative and the bias gradient inside the product dY W2."""
    need_x, need_w1, need_b1, need_w2, need_b2 = needs
    N, H = pre_NH.shape
    config = config or configs.choose("fused_mlp", "backward", card_of(x_NK), N, H)
    if not (_takes(config, x_NK, w2_OH, w1_HK) and (need_x or need_w1 or need_b1)):
        return plain_backward(dy_NO, x_NK, w1_HK, w2_OH, pre_NH, activation, needs)
    none = x_NK.new_empty(0)
    act_NH, dpre_NH = torch.empty_like(pre_NH), torch.empty_like(pre_NH)
    fused_sums = need_b1 and not config.get("specialize", False)
    tiles = -(-N // config["block_m"])
    sums_TH = torch.empty(tiles, H, dtype=torch.float32, device=x_NK.device) if fused_sums else None
    dy_NO = aligned(dy_NO)
    _product(dy_NO, aligned(w2_OH), None, pre_NH, act_NH, dpre_NH, sums_TH, activation, True, False, config)
    if sums_TH is not None:
        db1_H = sums_TH.sum(0).to(x_NK.dtype)
    else:
        db1_H = dpre_NH.sum(0) if need_b1 else none
    return (
        dpre_NH @ w1_HK if need_x else none,
        dpre_NH.T @ x_NK if need_w1 else none,
        db1_H,
        dy_NO.T @ act_NH if need_w2 else none,
        dy_NO.sum(0) if need_b2 else none,
    )


def _takes(config: dict, x_NK: Tensor, own: Tensor, other: Tensor) -> bool:
    """Whether the kernel runs this, `own` being its product's weight: 16-bit types, widths of whole 16-byte vectors.

    On a GPU fp32 is the library's, as Triton's products run at FMA speed or in tf32, which is the caller's choice to
    make; the interpreter takes it. So are widths that pointers read element by element: Triton sees alignment in
    multiples of 16 only, and spills without it.
    """
    dtypes = (torch.float16, torch.bfloat16) if x_NK.is_cuda else (torch.float16, torch.bfloat16, torch.float32)
    scalar = config["variant"] == "pointer" and not x_NK.is_cpu and any(n % 16 for n in own.shape)
    whole = not scalar and not any(n % 8 for n in (*own.shape, *other.shape))
    return whole and x_NK.dtype in dtypes and x_NK.shape[0] > 0


def _product(a, b, bias, pre, act, dpre, sums, activation: str, backward: bool, save: bool, config: dict) -> None:
    """Launch one of the two products on [M, K] and [N, K] (forward) or [K, N] (backward)."""
    M, K = a.shape
    N = act.shape[1]
    tiles = -(-M // config["block_m"]) * -(-N // config["block_n"])
    bias, gelu = contiguous(bias), {"ERF": activation == "gelu", "SAVE": save}
    args = a, b, bias, pre, act, dpre, sums
    if config["variant"] == "descriptor":
        programs = min(tiles, card_of(a).multiprocessors)
        launch(_descriptor, (programs,), *args, M, N, K, config=config, BACKWARD=backward, **gelu)
        return
    shares = config["split_k"]
    partial = torch.empty(shares, M, N, dtype=torch.float32, device=a.device) if shares > 1 else None
    launch(_pointer, (tiles, shares), *args, partial, M, N, K, config=config, BACKWARD=backward, **gelu)
    if shares > 1:
        launch(_finish, (M, -(-N // 1024)), partial, bias, pre, act, M, N, SPLIT_K=shares, BLOCK=1024, **gelu)


_forward = register(
    "fused_mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, bool save) -> (Tensor, Tensor)",
    plain=plain_forward,
    cpu=cpu_forward,
    cuda=triton_forward,
    fake=_fake_forward,
    backward=_autograd,
    setup_context=_setup_context,
)
_backward = register(
    "fused_mlp_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor pre, str activation, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    plain=plain_backward,
    cuda=triton_backward,
    fake=_fake_backward,
)
