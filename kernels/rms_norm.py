"""RMSNorm (arXiv 1910.07467) as LLaMA has it: x / rms(x) in fp32, rounded to x's dtype, and only then times the weight.

Saves x and one number a row; plain PyTorch keeps fp32 copies of x as well. The weight's gradient is summed in a fixed
order, so that two runs agree to the last bit. Letters: N rows, D width, R rows of a tile.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels import configs
from minillava.kernels.cpu import pointwise as pointwise_cpu
from minillava.kernels.frame import card_of, jit, launch, register, shapes, tl, wide

SMALL = 1 << 17  # numbers; up to here on a CPU the plain code's few calls are faster (bench/LOG.md)
BLOCK = 1 << 17  # numbers of a block of the CPU implementation: its fp32 copies stay in the cache
WIDEST = 8192  # a row is kept in registers; wider ones are the plain code's

# -- reference ---------------------------------------------------------------------------------------------------------


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same function in plain, differentiable PyTorch."""
    return F.rms_norm(x.to(wide(x)), x.shape[-1:], eps=eps).to(x.dtype) * weight


def plain_forward(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [N, D] and 1 / rms [N, 1] in fp32, by blocks of rows that fit the cache."""
    N, D = x_ND.shape
    y_ND = x_ND.new_empty(N, D)
    rstd_N1 = x_ND.new_empty(N, 1, dtype=wide(x_ND))
    for rows in _blocks(N, D):
        n_RD, rstd_R1 = x_ND[rows].to(rstd_N1.dtype, copy=True), rstd_N1[rows]
        torch.linalg.vector_norm(n_RD, dim=1, keepdim=True, out=rstd_R1)
        rstd_R1.square_().mul_(1 / D).add_(eps).rsqrt_()
        y_ND[rows].copy_(n_RD.mul_(rstd_R1)).mul_(weight_D)
    return y_ND, rstd_N1


def plain_backward(dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, rstd_N1: Tensor) -> tuple[Tensor, Tensor]:
    """dx = rstd (dn - n mean(dn n)) with n = x rstd and dn = dy weight; dweight = sum over rows of dy n."""
    N, D = x_ND.shape
    dtype = rstd_N1.dtype
    dx_ND = x_ND.new_empty(N, D)
    weight, dweight_D = weight_D.to(dtype), weight_D.new_zeros(D, dtype=dtype)
    for rows in _blocks(N, D):
        n_RD, dy_RD = x_ND[rows].to(dtype, copy=True).mul_(rstd_N1[rows]), dy_ND[rows].to(dtype)
        product_RD = dy_RD * n_RD
        dweight_D += product_RD.sum(0)
        mean_R1 = (product_RD @ weight)[:, None].mul_(1 / D)
        torch.mul(dy_RD, weight, out=product_RD)
        dx_ND[rows] = product_RD.addcmul_(n_RD, mean_R1, value=-1).mul_(rstd_N1[rows])
    return dx_ND, dweight_D.to(weight_D.dtype)


def _blocks(N: int, D: int) -> list[slice]:
    step = max(1, BLOCK // max(D, 1))
    return [slice(start, start + step) for start in range(0, N, step)]


# -- Triton ------------------------------------------------------------------------------------------------------------


@jit
def _rms_norm(x_ptr, weight_ptr, y_ptr, rstd_ptr, N, D, eps, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of whole rows a program, kept in registers: reads each number once and writes it once. fp16, bf16, fp32;
    D up to 8192."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    keep = (rows < N)[:, None] & (columns < D)[None, :]
    at = rows[:, None] * D + columns[None, :]
    x = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / D + eps)
    n = (x * rstd[:, None]).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + at, (n * weight[None, :]).to(y_ptr.dtype.element_ty), mask=keep)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)


@jit
def _rms_norm_backward(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, sums_ptr, N, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Each program takes every so many-th tile of rows and sums its share of dweight in registers; the shares are added
    afterwards in a fixed order. Reads two numbers and writes one. fp16, bf16, fp32; D up to 8192."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    share = tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(program, tl.cdiv(N, BLOCK_R), programs):
        rows = (tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        keep = (rows < N)[:, None] & (columns < D)[None, :]
        at = rows[:, None] * D + columns[None, :]
        rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)[:, None]
        n = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + at, mask=keep, other=0.0).to(tl.float32)
        share += tl.sum(dy * n, 0)
        dn = dy * weight[None, :]
        mean = tl.sum(dn * n, 1) / D
        dx = (dn - n * mean[:, None]) * rstd
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=keep)
    tl.store(sums_ptr + program.to(tl.int64) * D + columns, share, mask=columns < D)


# -- wrapper -----------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; x [..., D], weight [D].

    Operands of two dtypes and, on a CPU, few numbers take the plain code; bf16 without gradients has C code there.
    Raises ValueError with the shapes in sight when they do not fit.
    """
    if x.dim() == 0 or weight.dim() != 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"rms_norm: want x [..., D] and weight [D], got {shapes(x=x, weight=weight)}")
    if (y := pointwise_cpu.rms_norm(x, weight, eps)) is not None:
        return y
    if x.dtype != weight.dtype or (x.device.type == "cpu" and x.numel() <= SMALL):
        return reference(x, weight, eps)
    return _forward(x.reshape(-1, x.shape[-1]), weight, eps)[0].view(x.shape)


def triton_forward(x_ND: Tensor, weight_D: Tensor, eps: float, config: dict | None = None) -> tuple[Tensor, Tensor]:
    N, D = x_ND.shape
    if x_ND.dtype == torch.float64 or D > WIDEST or x_ND.numel() == 0:
        return plain_forward(x_ND, weight_D, eps)
    x_ND, weight_D = x_ND.contiguous(), weight_D.contiguous()
    y_ND, rstd_N1 = torch.empty_like(x_ND), x_ND.new_empty(N, 1, dtype=torch.float32)
    config = config or configs.choose("rms_norm", "forward", card_of(x_ND), N, D)
    tile = _tile(D, config)
    launch(_rms_norm, (-(-N // tile["BLOCK_R"]),), x_ND, weight_D, y_ND, rstd_N1, N, D, eps, config=config, **tile)
    return y_ND, rstd_N1


def triton_backward(
    dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, rstd_N1: Tensor, config: dict | None = None
) -> tuple[Tensor, Tensor]:
    N, D = x_ND.shape
    if x_ND.dtype == torch.float64 or D > WIDEST or x_ND.numel() == 0:
        return plain_backward(dy_ND, x_ND, weight_D, rstd_N1)
    card = card_of(x_ND)
    config = config or configs.choose("rms_norm", "backward", card, N, D)
    tile = _tile(D, config)
    programs = min(-(-N // tile["BLOCK_R"]), config["programs"] * card.multiprocessors)
    dx_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    sums_PD = x_ND.new_empty(programs, D, dtype=torch.float32)
    args = (dy_ND.contiguous(), x_ND.contiguous(), weight_D.contiguous(), rstd_N1, dx_ND, sums_PD, N, D)
    launch(_rms_norm_backward, (programs,), *args, config=config, **tile)
    return dx_ND, sums_PD.sum(0).to(weight_D.dtype)


def _tile(D: int, config: dict) -> dict[str, int]:
    block_d = 1 << (D - 1).bit_length()
    return {"BLOCK_R": max(1, config["numbers"] // block_d), "BLOCK_D": block_d}


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy_ND: Tensor | None, _) -> tuple[Tensor | None, Tensor | None, None]:
    if dy_ND is None:
        return None, None, None
    return *_backward(dy_ND, *ctx.saved_tensors), None


_backward = register(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    plain=plain_backward,
    cuda=triton_backward,
    fake=lambda dy, x, weight, rstd: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)

_forward = register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    plain=plain_forward,
    cuda=triton_forward,
    fake=lambda x, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape[0], 1, dtype=wide(x))),
    backward=_autograd,
    setup_context=_setup_context,
)
