"""Every configuration that ships for Ampere and Hopper, compiled and run on the CPU, thread by thread, against float64.

Never more than twice as far off as PyTorch in bf16. Warps go in random order, and what is asynchronous happens at once
or as late as it may, so that a race shows. Most is for `make kernels-proof`; `make test` runs one of each kind.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from checks import error, errors

from minillava.kernels import frame

if not frame.HAS_TRITON:
    pytest.skip("Triton is not installed here, so nothing can be compiled", allow_module_level=True)

import ptx
from test_decode_linear import check as check_decode

from minillava.kernels import (
    attention,
    configs,
    decode_attention,
    decode_linear,
    flash,
    flash_backward,
    fused_mlp,
    linear_cross_entropy,
    nf4_dequantize,
    nf4_matmul,
    rms_norm,
    swiglu,
)
from minillava.kernels.tools import aot, cases
from minillava.layers.quantize import quantize

FILES = flash, flash_backward, fused_mlp, linear_cross_entropy, nf4_dequantize, nf4_matmul, rms_norm, swiglu
FILES += decode_attention, decode_linear
ARCHS = "sm_80", "sm_90"


def numbers(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).bfloat16()


def doubles(*tensors):
    return [t if t is None else t.double() for t in tensors]


# -- attention ---------------------------------------------------------------------------------------------------------


def sdpa(q_THK, k_SGK, v_SGK, cu_q, cu_k, causal, window, scale):
    """PyTorch's attention, sequence by sequence."""
    out = []
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k)):
        place = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        seen = (place >= 0 if causal else place == place) & ((place < window) | (not window))
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THK[a:b], k_SGK[c:d], v_SGK[c:d]))
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)[0])
    return torch.cat(out, 1).transpose(0, 1)


def attention_inputs(K, causal, window, T):
    """Two sequences, more than two tiles of 128 and less than one of 64, two heads that share keys; without a mask more
    keys than queries."""
    cu_q, cu_k = (0, T, T + 41), (0, T, T + 41) if causal else (0, T + 13, T + 61)
    q, do = (numbers(cu_q[-1], 2, K, seed=seed) for seed in (0, 1))
    k, v = (numbers(cu_k[-1], 1, K, seed=seed) for seed in (2, 3))
    return (q, k, v), do, (cu_q, cu_k, causal, window, K**-0.5)


def prove_attention(part, K, causal, window, config=None, T=300):
    """Forward with the log sum exp, or the backward in one kernel or in the two that agree in every run."""
    qkv, do, rest = attention_inputs(K, causal, window, T)
    leaves = [x.clone().requires_grad_() for x in qkv]
    plain = sdpa(*leaves, *rest)
    exact, lse = attention.reference(*doubles(*qkv), *rest)
    if part == "forward":
        o, found = flash.forward(*qkv, *rest, config)
        torch.testing.assert_close(found.double(), lse, rtol=1e-5, atol=1e-5)
        return errors(("o",), (o,), (plain.detach(),), (exact,))
    plain.backward(do)
    found = {part: config} if config else None
    grads = flash_backward.backward(do, *qkv, exact.bfloat16(), lse.float(), *rest, found)
    wanted = attention.reference_backward(*doubles(do, *qkv), exact, lse, *rest)
    chosen = [i for i in range(3) if part == "backward" or (i == 0) == (part == "backward_queries")]
    names, plain = ("dq", "dk", "dv"), [leaf.grad for leaf in leaves]
    return errors(*([x[i] for i in chosen] for x in (names, grads, plain, wanted)))


def prove_decoding(K, window, config=None):
    """A long row and a short one, in a cache with room."""
    q, k, v = numbers(2, 4, K), numbers(2, 700, 2, K, seed=1), numbers(2, 700, 2, K, seed=2)
    lengths = torch.tensor((600, 77))
    rest = lengths, K**-0.5, window
    ours = decode_attention.triton_decode(q, k, v, *rest, config)
    plain = decode_attention.reference(q, k, v, *rest)
    return errors(("o",), (ours,), (plain,), (decode_attention.reference(*doubles(q, k, v), *rest),))


def prove_flash(part, bucket, causal=True):
    if part == "decode":
        return prove_decoding(bucket["width"], 0, bucket["config"])
    return prove_attention(part, bucket["width"], causal, 0, bucket["config"])


# -- the other kernels -------------------------------------------------------------------------------------------------


def prove_mlp(part, bucket, activation="gelu"):
    """On two multiprocessors, so that programs which stay for many tiles do."""
    N, K, H, O = (60, 192, 144, 32) if bucket.get("rows", 65) <= 64 else (300, 192, 272, 32)
    x, w1, b1, w2 = numbers(N, K), numbers(H, K, scale=K**-0.5), numbers(H), numbers(O, H, scale=H**-0.5)
    if part == "forward":
        args = x, w1, b1, w2, None
        ours = fused_mlp.triton_forward(*args, activation, True, bucket["config"])
        plain = fused_mlp.plain_forward(*args, activation, True)
        return errors(("y", "pre"), ours, plain, fused_mlp.plain_forward(*doubles(*args), activation, True))
    args = numbers(N, O), x, w1, w2, numbers(N, H, seed=5)
    needs = [True] * 5
    ours = fused_mlp.triton_backward(*args, activation, needs, bucket["config"])
    plain = fused_mlp.plain_backward(*args, activation, needs)
    exact = fused_mlp.plain_backward(*doubles(*args), activation, needs)
    return errors(("dx", "dw1", "db1", "dw2", "db2"), ours, plain, exact)


def prove_loss(part, bucket):
    """Gradients in place of the logits, with a row that counts for nothing."""
    config = bucket["config"]
    logits, targets = numbers(3, 1003 if config["one_pass"] else 9001, scale=3.0), torch.tensor((5, -100, 700))
    ours, plain, exact = logits.clone(), logits.clone(), logits.double()
    losses = linear_cross_entropy.triton_loss(ours, targets, -100, True, config)
    wanted = linear_cross_entropy.plain_loss(exact, targets, -100, True)
    linear_cross_entropy.plain_loss(plain, targets, -100, True)
    assert error(losses, wanted) < 1e-6
    return errors(("dlogits",), (ours,), (plain,), (exact,))


def prove_swiglu(part, bucket):
    args = [numbers(3, 1100, seed=seed) for seed in range(3)]
    if part == "forward":
        ours, plain, exact = swiglu.triton_forward(*args[1:], bucket["config"]), *(
            swiglu.plain_forward(*x) for x in (args[1:], doubles(*args[1:])))  # fmt: skip
        return errors(("y",), (ours,), (plain,), (exact,))
    ours, plain = swiglu.triton_backward(*args, bucket["config"]), swiglu.plain_backward(*args)
    return errors(("dgate", "dup"), ours, plain, swiglu.plain_backward(*doubles(*args)))


def prove_norm(part, bucket):
    """More rows than programs, and a width that is no power of two."""
    config = bucket["config"]
    D = min(config["numbers"], 1000) - 24
    x, dy, weight = numbers(37, D, scale=3.0), numbers(37, D, seed=1), numbers(D, seed=2)
    plain = rms_norm.plain_forward(x, weight, 1e-5)
    exact = rms_norm.plain_forward(*doubles(x, weight), 1e-5)
    if part == "forward":
        ours = rms_norm.triton_forward(x, weight, 1e-5, config)
        assert error(ours[1], exact[1]) < 1e-6
        return errors(("y",), ours[:1], plain[:1], exact[:1])
    ours = rms_norm.triton_backward(dy, x, weight, exact[1].float(), config)
    plain = rms_norm.plain_backward(dy, x, weight, exact[1].float())
    return errors(("dx", "dweight"), ours, plain, rms_norm.plain_backward(*doubles(dy, x, weight), exact[1]))


def prove_nf4(part, bucket, K=0, nested=False):
    """Outputs that are no whole number of tiles; nested scales or plain ones."""
    config, rows = bucket["config"], bucket.get("rows", 1)
    N, K, M = 144, 512 if nested else 320, 1 if rows == 1 else min(rows, 80) - 3
    parts = quantize(numbers(N, K, scale=K**-0.5).float(), "nf4", 64, nested)
    if part == "dequantize":
        ours = nf4_dequantize.triton_dequantize(*parts, N, K, "nf4", 64, torch.bfloat16, config)
        exact = nf4_dequantize.plain_dequantize(*parts, N, K, "nf4", 64, torch.bfloat16)
        torch.testing.assert_close(ours, exact, rtol=0, atol=0)
        return {"W": (error(ours, exact.double()), 0.0)}
    x, weight = numbers(M, K), nf4_dequantize.plain_dequantize(*parts, N, K, "nf4", 64, torch.float64)
    ours = nf4_matmul.triton_forward(x, *parts, None, N, "nf4", 64, config)
    return errors(("y",), (ours,), (F.linear(x, weight.bfloat16()),), (F.linear(x.double(), weight),))


def prove_decode(part, bucket, K=0, nested=False):
    """As in the bucket's layers: a residual where outputs are few, else norm and SwiGLU; tiles that are not whole."""
    config, few = bucket["config"], "width" in bucket
    M, around = 1 if bucket.get("rows") == 1 else 9, {"residual"} if few else {"norm", "gated"}
    run, double = (decode_linear.triton_dense, None) if part == "dense" else (decode_linear.triton_nf4, nested)
    K = 512 if nested else 384
    return {"y": check_decode(lambda *a: run(*a, config), M, 88, K, around, torch.bfloat16, double=double)}


PROOFS = {"flash": prove_flash, "fused_mlp": prove_mlp, "linear_cross_entropy": prove_loss, "swiglu": prove_swiglu}
PROOFS |= {"rms_norm": prove_norm, "nf4_matmul": prove_nf4, "decode_linear": prove_decode}


# -- what is proved ----------------------------------------------------------------------------------------------------


def worse(found):
    """What is further off than it may be."""
    return {name: pair for name, pair in found.items() if not pair[0] <= pair[1]}


def every_configuration():
    """One of each kind for `make test`: the first of a kernel's part and variant on Hopper."""
    kinds = set()
    for arch in reversed(ARCHS):
        for kernel, part, bucket, options in aot.configurations(arch):
            config = bucket["config"]
            kind = kernel, part, config.get("variant"), config.get("specialize")
            seen, _ = kind in kinds or kernel == "flash", kinds.add(kind)
            marks = [pytest.mark.slow] if seen else []
            name = "-".join(f"{v}" for v in (arch, kernel, part, *config.values(), *options.values()))
            name = f"{name}-{bucket['width']}" if kernel == "flash" else name
            yield pytest.param(arch, kernel, part, bucket, options, marks=marks, id=name)


def every_attention():
    """All head sizes with what they meet; of which `make test` runs what is specialised or sums in memory, at 64."""
    for arch in ARCHS:
        for K in (64, 72, 80, 128, 256):
            for part in ("forward", "backward", "backward_keys"):
                for causal, window in ((True, 0), (False, 0), *(((True, 50),) if K in (64, 128) else ())):
                    quick = (K == 64 and causal and not window) and (arch == "sm_90" or part == "forward")
                    marks = (
                        [] if quick or (arch, K, part, window) == ("sm_90", 128, "forward", 50) else [pytest.mark.slow]
                    )
                    yield pytest.param(arch, part, K, causal, window, marks=marks)


@pytest.fixture(params=(1,))
def run_on(request, monkeypatch):
    """A function of an architecture: kernels run compiled for it, on two multiprocessors, in a random order."""
    return partial(ptx.card, monkeypatch, seed=request.param, multiprocessors=2)


@pytest.mark.parametrize("arch, kernel, part, bucket, options", every_configuration())
def test_what_ships(run_on, arch, kernel, part, bucket, options):
    run_on(arch, *FILES)
    found = PROOFS[kernel](part, bucket, **options)
    assert found and not worse(found)


@pytest.mark.parametrize("arch, part, K, causal, window", every_attention())
def test_attention(run_on, arch, part, K, causal, window):
    """As the wrappers choose; the two kernels of the deterministic backward count as one part here."""
    run_on(arch, *FILES)
    torch.use_deterministic_algorithms(part == "backward_keys")
    try:
        found = prove_attention("backward" if part != "forward" else part, K, causal, window)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found and not worse(found)


@pytest.mark.parametrize("K, window", ((64, 0), pytest.param(128, 50, marks=pytest.mark.slow)))
@pytest.mark.parametrize("arch", ARCHS)
def test_decoding(run_on, arch, K, window):
    run_on(arch, *FILES)
    found = prove_decoding(K, window)
    assert found and not worse(found)


@pytest.mark.slow
@pytest.mark.parametrize("part", ("forward", "backward_keys", "backward"))
def test_a_long_sequence(run_on, part):
    """A loader that goes around its places in shared memory three times."""
    run_on("sm_90", *FILES)
    config = configs.choose("flash", part, frame.CARDS["sm_90"], 800, 64)
    found = prove_attention(part, 64, True, 0, config, T=800)
    assert found and not worse(found)


# What a compiler (or a kernel) could leave out of the compiled forward, and nothing but a race would tell.
WEAKENED = {
    "products": ("sm_90", r"wgmma\.wait_group\.sync\.aligned 0", "wgmma.wait_group.sync.aligned 1"),
    "tiles": ("sm_90", r"mbarrier\.try_wait\S+ (\w+), [^;]*;", r"setp.eq.b32 \1, 0, 0;"),
    "places": ("sm_90", r"@%p\d+ mbarrier\.arrive\.shared::cta[^;]*;", ""),
    "stores": ("sm_90", r"cp\.async\.bulk\.wait_group\s+0", "cp.async.bulk.wait_group 1"),
    "fences": ("sm_90", r"fence\.proxy\.async\.shared::cta;", ""),
    "roles": ("sm_90", r"bar\.sync\s+\d+, 128;", ""),
    "copies": ("sm_80", r"cp\.async\.wait_group\s+\d", "cp.async.wait_group 9"),
    "warps": ("sm_80", r"bar\.sync\s+0;", ""),
}
QUICK = "places", "warps"


@pytest.mark.parametrize("left_out", (pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in WEAKENED))
def test_nobody_waits_in_vain(run_on, monkeypatch, left_out):
    """The forward does not survive without what it waits for: the machine would see a race."""
    arch, old, new = WEAKENED[left_out]
    run, changed = ptx.run, []

    def weakened(text, *args):
        text, count = re.subn(old, new, text)
        changed.append(count)
        run(text, *args)

    monkeypatch.setattr(ptx, "run", weakened)
    run_on(arch, *FILES)
    with pytest.raises(AssertionError):
        assert not worse(prove_attention("forward", 64, True, 0))
    assert sum(changed)


def test_every_kernel_has_a_proof():
    assert PROOFS.keys() == cases.CASES.keys()
