"""Summed cross-entropy of a linear layer's logits, without ever holding all [tokens, vocabulary] logits.

Rows go through in chunks as large as a memory budget allows: a library product for the logits, one kernel that turns
them in place into loss and gradient, library products for the gradients (Liger's chunks are so small that its products
run at an eighth of the card). While everything fits in one chunk, the two gradient products wait for the backward,
where the incoming gradient scales the small [N, D] factor instead of the [V, D] result.
Letters: N rows (supervised positions), D width, V vocabulary, R rows of a chunk.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels import configs
from minillava.kernels.frame import card_of, jit, launch, register, shapes, tl, wide

# One chunk holds 4096 rows of a 128,256-word vocabulary in bf16; on a CPU, a laptop's memory is the measure.
LOGITS_BYTES = {"cpu": 256 << 20, "mps": 256 << 20, "cuda": 1100 << 20}

# On a CPU up to this many logits are done all at once by plain PyTorch, which is faster there (bench/LOG.md).
SMALL = 1 << 17

# -- reference ---------------------------------------------------------------------------------------------------------


def reference(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int = -100) -> Tensor:
    """The same function in plain, differentiable PyTorch: all the logits at once."""
    logits_NV = F.linear(hidden_ND, weight_VD)
    return F.cross_entropy(logits_NV.to(wide(logits_NV)), targets_N, ignore_index=ignore_index, reduction="sum")


def plain_loss(logits_RV: Tensor, targets_R: Tensor, ignore_index: int, gradient: bool) -> Tensor:
    """Sum of losses over the rows; with `gradient`, the logits are overwritten by its gradient.

    Works through blocks of about a million logits, so that the fp32 copies stay in the cache.
    """
    R, V = logits_RV.shape
    step = max(1, (1 << 20) // V)
    total = torch.zeros((), dtype=wide(logits_RV), device=logits_RV.device)
    for start in range(0, R, step):
        block_RV, target_R = logits_RV[start : start + step], targets_R[start : start + step]
        if not gradient:
            log_p_RV = torch.log_softmax(block_RV, 1, dtype=total.dtype)
            total += F.nll_loss(log_p_RV, target_R, ignore_index=ignore_index, reduction="sum")
            continue
        # log sum exp from the softmax itself, as a second exponential would cost as much as the first
        p_RV = torch.softmax(block_RV, 1, dtype=total.dtype)
        keep_R1 = (target_R != ignore_index).unsqueeze(1)
        index_R1 = torch.where(keep_R1, target_R.unsqueeze(1), 0)
        lse_R1 = block_RV.amax(1, keepdim=True) - p_RV.amax(1, keepdim=True).log_()
        total += (lse_R1 - block_RV.gather(1, index_R1)).mul_(keep_R1).sum()
        p_RV.scatter_add_(1, index_R1, p_RV.new_full((1, 1), -1.0).expand_as(index_R1))
        block_RV.copy_(p_RV if keep_R1.all() else p_RV.mul_(keep_R1))
    return total


# -- Triton ------------------------------------------------------------------------------------------------------------


@jit
def _loss_and_gradient(
    logits_ptr, targets_ptr, losses_ptr, V, ignore_index,
    GRADIENT: tl.constexpr, ONE_PASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss = log sum exp(x) - x[target], a row of logits a program; with GRADIENT, x becomes softmax(x) - onehot.

    Moves 2 bytes a logit in and 2 out (16-bit logits). ONE_PASS keeps the row in registers; otherwise one pass finds
    maximum and sum together and a second reads the row again, from the L2 cache. An ignored row costs no read. A
    target outside [0, V) makes the loss NaN. fp16, bf16, fp32.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    x_ptr = logits_ptr + row * V
    lanes = tl.arange(0, BLOCK)
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                tl.store(x_ptr + start + lanes, tl.zeros((BLOCK,), dtype), mask=start + lanes < V)
    else:
        known = (target >= 0) & (target < V)
        at_target = tl.load(x_ptr + target, mask=known, other=float("nan")).to(tl.float32)
        if ONE_PASS:
            x = tl.load(x_ptr + lanes, mask=lanes < V, other=-float("inf")).to(tl.float32)
            top = tl.max(x, 0)
            e = tl.exp(x - top)
            total = tl.sum(e, 0)
            if GRADIENT:
                gradient = e / total - tl.where(lanes == target, 1.0, 0.0)
                tl.store(x_ptr + lanes, gradient.to(dtype), mask=lanes < V)
        else:
            top, total = -3.4e38, 0.0  # finite: a block of -inf must not make it -inf - -inf
            for start in range(0, V, BLOCK):
                x = tl.load(x_ptr + start + lanes, mask=start + lanes < V, other=-float("inf")).to(tl.float32)
                higher = tl.maximum(top, tl.max(x, 0))
                total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
                top = higher
            if GRADIENT:
                for start in range(0, V, BLOCK):
                    columns = start + lanes
                    x = tl.load(x_ptr + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
                    p = tl.exp(x - top) / total
                    gradient = p - tl.where(columns == target, 1.0, 0.0)
                    tl.store(x_ptr + columns, gradient.to(dtype), mask=columns < V)
        tl.store(losses_ptr + row, tl.log(total) + top - at_target)


# -- wrapper -----------------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, logits_bytes: int | None = None
) -> Tensor:
    """Sum of cross-entropies of `hidden @ weight.T` against `targets`, in fp32; ignored positions contribute nothing.

    hidden [N, D], weight [V, D], targets [N] int64. `logits_bytes` bounds the logits' memory (default `LOGITS_BYTES`).
    On a GPU ignored rows cost their share of the products: pass supervised positions only. Raises ValueError with the
    shapes in sight when they do not fit.
    """
    if not (hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1] and targets.dim() == 1):
        raise ValueError(
            f"linear_cross_entropy: want hidden [N, D], weight [V, D], targets [N], got "
            f"{shapes(hidden=hidden, weight=weight, targets=targets)}"
        )
    if targets.shape[0] != hidden.shape[0]:
        raise ValueError(f"linear_cross_entropy: want a target a row, got {shapes(hidden=hidden, targets=targets)}")
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        keep_N = targets != ignore_index
        if not keep_N.all():
            hidden, targets = hidden[keep_N], targets[keep_N]
    if logits_bytes is None and hidden.device.type == "cpu" and hidden.shape[0] * weight.shape[0] <= SMALL:
        return reference(hidden, weight, targets, ignore_index)
    bound = LOGITS_BYTES.get(hidden.device.type, LOGITS_BYTES["cuda"]) if logits_bytes is None else logits_bytes
    rows = max(1, bound // (weight.shape[0] * weight.element_size()))
    grad = torch.is_grad_enabled()
    needs = [grad and hidden.requires_grad, grad and weight.requires_grad]
    return _forward(hidden, weight, targets, ignore_index, rows, needs)[0]


def _run(loss, hidden_ND, weight_VD, targets_N, ignore_index: int, rows: int, needs: list[bool]) -> tuple[Tensor, ...]:
    N = hidden_ND.shape[0]
    none = hidden_ND.new_empty(0)
    if rows >= N:
        logits_NV = hidden_ND @ weight_VD.T
        total = loss(logits_NV, targets_N, ignore_index, any(needs))
        return total, (logits_NV if any(needs) else none), none
    total = torch.zeros((), dtype=wide(hidden_ND), device=hidden_ND.device)
    grad_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if needs[0] else none
    grad_VD = torch.zeros(weight_VD.shape, dtype=total.dtype, device=weight_VD.device) if needs[1] else none
    for start in range(0, N, rows):
        chunk = slice(start, start + rows)
        logits_RV = hidden_ND[chunk] @ weight_VD.T
        total += loss(logits_RV, targets_N[chunk], ignore_index, any(needs))
        if needs[0]:
            torch.mm(logits_RV, weight_VD, out=grad_ND[chunk])
        if needs[1]:
            grad_VD += logits_RV.T @ hidden_ND[chunk]
    return total, grad_ND, grad_VD


def triton_loss(
    logits_RV: Tensor, targets_R: Tensor, ignore_index: int, gradient: bool, config: dict | None = None
) -> Tensor:
    """`plain_loss` in one launch and a sum; float64 (gradcheck) is the plain one's."""
    R, V = logits_RV.shape
    if logits_RV.dtype == torch.float64 or R == 0:
        return plain_loss(logits_RV, targets_R, ignore_index, gradient)
    config = config or configs.choose("linear_cross_entropy", "loss", card_of(logits_RV), R, V)
    losses_R = torch.empty(R, dtype=torch.float32, device=logits_RV.device)
    block = 1 << (V - 1).bit_length() if config["one_pass"] else config["block"]
    args = (logits_RV, targets_R.contiguous(), losses_R, V, ignore_index)
    launch(_loss_and_gradient, (R,), *args, config=config, GRADIENT=gradient, BLOCK=block)
    return losses_R.sum()


def _fake(hidden_ND, weight_VD, targets_N, ignore_index, rows, needs):
    none, total = hidden_ND.new_empty(0), hidden_ND.new_empty((), dtype=wide(hidden_ND))
    if hidden_ND.shape[0] <= rows:
        return total, hidden_ND.new_empty(hidden_ND.shape[0], weight_VD.shape[0]) if any(needs) else none, none
    grad_ND = hidden_ND.new_empty(hidden_ND.shape) if needs[0] else none
    return total, grad_ND, weight_VD.new_empty(weight_VD.shape, dtype=total.dtype) if needs[1] else none


def _setup_context(ctx, inputs, output) -> None:
    hidden_ND, weight_VD, _, _, rows, _ = inputs
    ctx.one_chunk = hidden_ND.shape[0] <= rows
    ctx.save_for_backward(hidden_ND, weight_VD, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, _1, _2):
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    if grad is None:
        return (None,) * 6
    hidden_ND, weight_VD, first, second = ctx.saved_tensors
    dtype = hidden_ND.dtype
    if not ctx.one_chunk:
        grad_ND = (first * grad).to(dtype) if need_hidden else None
        return grad_ND, (second * grad).to(dtype) if need_weight else None, None, None, None, None
    grad_ND = ((first @ weight_VD) * grad).to(dtype) if need_hidden else None
    grad_VD = first.T @ (hidden_ND * grad).to(dtype) if need_weight else None
    return grad_ND, grad_VD, None, None, None, None


_forward = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, SymInt rows, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
    plain=partial(_run, plain_loss),
    cuda=partial(_run, triton_loss),
    fake=_fake,
    backward=_autograd,
    setup_context=_setup_context,
)
