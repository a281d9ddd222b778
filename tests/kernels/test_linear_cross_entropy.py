"""The chunked loss against plain PyTorch on all logits, both against float64."""

from __future__ import annotations

import pytest
import torch
from checks import assert_no_worse, error, needs_compiler, needs_gpu, needs_triton

from minillava.kernels.frame import PLAIN
from minillava.kernels.linear_cross_entropy import (
    LOGITS_BYTES,
    linear_cross_entropy,
    plain_loss,
    reference,
    triton_loss,
)

ROWS = (1, 7, 576, 577, 729, 4608)


def inputs(N, D, V, dtype, device="cpu", ignored=0.3):
    torch.manual_seed(N)
    hidden, weight = torch.randn(N, D, device=device).to(dtype), torch.randn(V, D, device=device).mul(D**-0.5).to(dtype)
    targets = torch.randint(0, V, (N,), device=device)
    targets[torch.rand(N, device=device) < ignored] = -100
    return hidden, weight, targets


def run(function, hidden, weight, targets, **options):
    """Loss and both gradients, for an incoming gradient that is no power of two."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    loss = function(*leaves, targets, **options)
    return [loss.detach(), *torch.autograd.grad(loss / 7, leaves)]


def assert_error_is_small(hidden, weight, targets, **options):
    ours, plain = run(linear_cross_entropy, hidden, weight, targets, **options), run(reference, hidden, weight, targets)
    exact = run(reference, hidden.double(), weight.double(), targets)
    assert_no_worse(("dhidden", "dweight"), ours[1:], plain[1:], exact[1:])
    assert ours[0].dtype == torch.float32
    # the loss is one number, which plain PyTorch may hit by luck: its last bits in fp32 are always allowed
    assert error(ours[0], exact[0]) <= max(2 * error(plain[0], exact[0]), 3e-7)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("chunks", (1, 3))
@pytest.mark.parametrize("rows", ROWS)
def test_error_at_every_row_count(rows, chunks, dtype):
    hidden, weight, targets = inputs(rows, 32, 200, dtype)
    kept = max(1, int((targets != -100).sum()))
    assert_error_is_small(hidden, weight, targets, logits_bytes=-(-kept // chunks) * 200 * weight.element_size())


@needs_gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("shape", ((577, 4096, 32000), (729, 896, 151936), (4608, 4096, 32000), (1, 4096, 32064)))
def test_error_on_gpu(shape, dtype):
    hidden, weight, targets = inputs(*shape, dtype, "cuda")
    assert_error_is_small(hidden, weight, targets)
    assert_error_is_small(hidden, weight, targets, logits_bytes=-(-shape[0] // 3) * shape[2] * weight.element_size())


@needs_triton
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize(
    "config", ({"one_pass": True}, {"one_pass": False, "block": 64}), ids=("one pass", "two passes")
)
@pytest.mark.parametrize("vocabulary", (64, 200, 1000))
def test_triton_kernel_in_the_interpreter(vocabulary, config, dtype):
    config = {"warps": 4, "stages": 2, **config}
    torch.manual_seed(0)
    logits = torch.randn(40, vocabulary).mul(2).to(dtype)
    targets = torch.randint(0, vocabulary, (40,))
    targets[:3] = torch.tensor((-100, 0, vocabulary - 1))
    exact, plain, ours = logits.double(), logits.clone(), logits.clone()
    exact_loss = plain_loss(exact, targets, -100, True)
    plain_loss_, our_loss = plain_loss(plain, targets, -100, True), triton_loss(ours, targets, -100, True, config)
    assert error(ours, exact) <= 2 * error(plain, exact)
    assert error(our_loss, exact_loss) <= max(2 * error(plain_loss_, exact_loss), 3e-7)
    assert torch.equal(ours[0], torch.zeros(vocabulary, dtype=dtype))
    assert torch.equal(triton_loss(logits.clone(), targets, -100, False, config), our_loss)


@needs_triton
def test_a_target_outside_the_vocabulary_is_loud():
    hidden, weight, targets = inputs(4, 8, 16, torch.float32, ignored=0)
    targets[1] = 16
    loss = triton_loss(hidden @ weight.T, targets, -100, False, {"one_pass": True, "warps": 4, "stages": 2})
    assert loss.isnan()
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, targets)


def test_ignored_positions_contribute_nothing():
    hidden, weight, targets = inputs(50, 16, 40, torch.float32)
    keep = targets != -100
    hidden[~keep] = float("nan")
    loss, dhidden, dweight = run(linear_cross_entropy, hidden, weight, targets, logits_bytes=1 << 20)
    alone = run(linear_cross_entropy, hidden[keep], weight, targets[keep], logits_bytes=1 << 20)
    assert torch.equal(loss, alone[0]) and torch.equal(dhidden[keep], alone[1]) and torch.equal(dweight, alone[2])
    assert torch.equal(dhidden[~keep], torch.zeros_like(dhidden[~keep]))
    nothing = run(linear_cross_entropy, hidden, weight, torch.full_like(targets, -100))
    assert nothing[0] == 0 and not nothing[1].any() and not nothing[2].any()
    assert linear_cross_entropy(hidden[:0], weight, targets[:0]) == 0


def test_gradcheck_and_opcheck():
    hidden, weight, targets = inputs(7, 4, 9, torch.float64, ignored=0.2)
    hidden.requires_grad_(), weight.requires_grad_()
    for logits_bytes, rows in ((100 * 9 * 8, 100), (2 * 9 * 8, 2)):
        function = lambda h, w, b=logits_bytes: linear_cross_entropy(h, w, targets, logits_bytes=b)  # noqa: E731
        assert torch.autograd.gradcheck(function, (hidden, weight))
        args = (hidden, weight, targets, -100, rows, [True, True])
        torch.library.opcheck(torch.ops.minillava.linear_cross_entropy.default, args)


@needs_triton
def test_logits_of_minus_infinity_in_the_interpreter():
    """A block of nothing else, as masked words give: the first of the row, the middle, the last."""
    config = {"one_pass": False, "block": 16, "warps": 4, "stages": 2}
    logits, targets = torch.randn(3, 48), torch.tensor([40, 3, 5])
    for row, start in enumerate((0, 16, 32)):
        logits[row, start : start + 16] = float("-inf")
    leaf = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(leaf, targets, reduction="sum")
    exact.backward()
    torch.testing.assert_close(triton_loss(logits, targets, -100, True, config).double(), exact.detach())
    torch.testing.assert_close(logits.double(), leaf.grad)


@needs_compiler
@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compiles_in_one_graph(backend):
    hidden, weight, targets = inputs(20, 16, 40, torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend)
    for a, b in zip(
        run(compiled, hidden, weight, targets, logits_bytes=1 << 20), run(reference, hidden, weight, targets)
    ):
        torch.testing.assert_close(a, b)


class _Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else (made,):
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return made


def test_all_logits_are_never_there_at_once():
    """4096 rows of a 128,256-word vocabulary scaled by 1/8 and 1/32: nothing above the budget but the gradients."""
    hidden, weight, targets = inputs(512, 8, 4008, torch.bfloat16, ignored=0)
    budget = 64 * 4008 * 2
    loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets, logits_bytes=budget)
    with _Peak() as peak:
        PLAIN["linear_cross_entropy"](hidden.detach(), weight.detach(), targets, -100, 64, [True, True])
    assert peak.bytes <= 2 * budget < 512 * 4008 * 2  # a chunk, or its block in fp32
    loss.backward()
    assert 4096 * 128256 * 2 <= LOGITS_BYTES["cuda"] < 1.5e9


@needs_gpu
def test_peak_memory_on_gpu():
    hidden, weight, targets = inputs(4096, 4096, 128256, torch.bfloat16, "cuda", ignored=0)
    hidden.requires_grad_(), weight.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, targets).backward()
    gradients = 2 * (hidden.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before - gradients < 1.5e9


def test_misshapen_input_is_refused_with_the_shapes():
    hidden, weight, targets = inputs(5, 8, 16, torch.float32)
    with pytest.raises(ValueError, match=r"hidden \[5, 7\], weight \[16, 8\], targets \[5\]"):
        linear_cross_entropy(hidden[:, :7], weight, targets)
    with pytest.raises(ValueError, match=r"hidden \[5, 8\], targets \[4\]"):
        linear_cross_entropy(hidden, weight, targets[:4])


def test_few_logits_on_a_cpu_take_the_plain_way():
    hidden, weight, targets = inputs(20, 16, 40, torch.bfloat16)
    for a, b in zip(run(linear_cross_entropy, hidden, weight, targets), run(reference, hidden, weight, targets)):
        torch.testing.assert_close(a, b)
