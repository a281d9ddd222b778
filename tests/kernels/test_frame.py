"""Which implementation of an operation runs where."""

from __future__ import annotations

import pytest
import torch
from checks import needs_triton

from minillava.kernels import attention, decode_attention, frame, fused_mlp, linear_cross_entropy, nf4_matmul, rms_norm
from minillava.kernels.swiglu import swiglu

OPERATIONS = [*torch.ops.minillava]


@pytest.mark.parametrize("device", ("CPU", "MPS", "XPU", "HPU", "PrivateUse1"))
def test_every_operation_has_an_implementation_on_every_device(device):
    modules = attention, decode_attention, fused_mlp, linear_cross_entropy, nf4_matmul, rms_norm
    assert len(OPERATIONS) >= 2 * len(modules)
    for name in OPERATIONS:
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"minillava::{name}", device), name


@needs_triton
def test_cards_before_compute_capability_8_get_pytorch(monkeypatch):
    """Chosen by the card of the tensors; here that of meta tensors."""
    x = torch.empty(2, device="meta")
    for arch, expected in (("sm_75", "plain"), ("sm_80", "kernel"), ("sm_120", "kernel"), ("gfx942", "kernel")):
        monkeypatch.setattr(frame, "compiling_for", frame.Card("", arch, 1, 65_536))
        assert frame._on_cuda(lambda *_: "kernel", lambda *_: "plain", None, x) == expected


def test_fake_tensors_know_shapes():
    x = torch.empty(3, 4, device="meta", dtype=torch.bfloat16)
    assert swiglu(x, x).shape == (3, 4)
