"""Optimizers: AdamW, with moments in float32 or in 8 bits, or Muon for the matrices and AdamW for the rest.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) orthogonalises the momentum of each matrix. Its updates are
scaled to AdamW's size (Liu et al. 2025, arXiv 2502.16982), so both take the same learning rate. On the small models of
recipe nano it needs about half of AdamW's steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minillava.device import multiplies_bf16
from minillava.errors import UserError
from minillava.layers import sharded
from minillava.recipe import StageConfig
from minillava.training import parallel

TOGETHER = 1 << 28  # bytes of matrices that a rank orthogonalises at once


class Together:
    """Several optimizers over disjoint parameters as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        self.param_groups: list[dict[str, Any]] = [group for o in optimizers for group in o.param_groups]
        self.state, self.defaults = optimizers[0].state, optimizers[0].defaults
        for optimizer in optimizers[1:]:
            optimizer.state = self.state

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's state in tensors that any number of ranks can take: of its shape, or of none."""
        state = self.state.get(parameter, {})
        return _from_8bit(parameter, state) if "absmax1" in state or isinstance(state.get("step"), int) else state

    def load_moments(self, parameter: Tensor, values: dict[str, Tensor]) -> None:
        optimizer = self.optimizers[0]
        if hasattr(optimizer, "load_moments"):
            optimizer.load_moments(parameter, values)
        else:
            self.state[parameter] = values


def make_optimizer(model: nn.Module, trained: dict[str, Tensor], stage: StageConfig) -> Together:
    """A group for each part (first word of a name) and kind; norms, biases and embeddings do not decay."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    groups: dict[tuple[str, bool, bool], list[Tensor]] = {}
    for name, parameter in trained.items():
        decays = parameter.ndim > 1 and id(parameter) not in embeddings
        muon = stage.optimizer == "muon" and decays and parameter.ndim == 2 and not name.endswith("head.weight")
        groups.setdefault((name.split(".")[0], decays, muon), []).append(parameter)

    listed: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for (part, decays, muon), params in groups.items():
        decay = stage.weight_decay * decays
        listed[muon].append({"params": params, "part": part, "lr": stage.lr[part], "weight_decay": decay})
    optimizers: list[torch.optim.Optimizer] = []
    if stage.optimizer == "adamw8bit":
        optimizers.append(_adamw_8bit(listed[False], stage))
    elif listed[False]:
        fused = next(iter(trained.values())).device.type in ("cpu", "cuda", "mps")
        optimizers.append(torch.optim.AdamW(listed[False], betas=stage.betas, eps=stage.eps, fused=fused))
    if listed[True]:
        optimizers.append(Muon(listed[True], adjust_lr_fn="match_rms_adamw"))
    return Together(*optimizers)


class Muon(torch.optim.Muon):
    """torch's, but matrices of one shape are orthogonalised together, as small ones cost calls, and whole on every
    number of ranks: products of shards in bfloat16 round otherwise. What is left of the ranks in the losses (1e-4) is
    that their gradients differ by 1e-7, which bfloat16 makes 4e-3 of an element next to one of its boundaries.
    """

    dtype: torch.dtype | None = None  # bfloat16, and float32 on CPUs that emulate it: four times as slow there

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((min(p.shape), max(p.shape)), []).append(p)
            for (A, B), params in alike.items():
                at_once = parallel.world() * max(1, TOGETHER // (2 * A * B))
                for first in range(0, len(params), at_once):
                    self._step_together(params[first : first + at_once], group)

    def _step_together(self, params: list[Tensor], group: dict[str, Any]) -> None:
        emulated = params[0].is_cpu and not multiplies_bf16(params[0].device)
        dtype = self.dtype or (torch.float32 if emulated else torch.bfloat16)
        wide = []
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            assert p.grad is not None
            state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            update = sharded.whole(p.grad.lerp(state["momentum_buffer"], group["momentum"]).to(dtype))
            wide.append(update if p.shape[0] <= p.shape[1] else update.T)
        coefficients, steps, eps = group["ns_coefficients"], group["ns_steps"], group["eps"]
        work = partial(orthogonal, coefficients=coefficients, steps=steps, eps=eps)
        split = sharded.local(params[0]) is not params[0]
        x_NAB = parallel.shared_out(work, torch.stack(wide)) if split else work(torch.stack(wide))
        for p, x_AB in zip(params, x_NAB):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            size = 0.2 * max(p.shape) ** 0.5
            x = x_AB if p.shape[0] <= p.shape[1] else x_AB.T
            p.add_(sharded.part(p, x), alpha=-group["lr"] * size)


def orthogonal(x_NAB: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz iterations on each of N matrices with A <= B, in their dtype: singular values go to about 1."""
    x_NAB = x_NAB / x_NAB.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    a, b, c = coefficients
    for _ in range(steps):
        gram_NAA = x_NAB @ x_NAB.mT
        x_NAB = torch.baddbmm(x_NAB, torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c), x_NAB, beta=a)
    return x_NAB


# ---- 8 bits ----

SLOTS = (("exp_avg", "state1", "absmax1", "qmap1"), ("exp_avg_sq", "state2", "absmax2", "qmap2"))
BLOCK = 256  # of bitsandbytes' 8-bit states


def _adamw_8bit(groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with moments in 8 bits (arXiv 2110.02861), on each rank's own part of sharded parameters.

    Moments of fewer than 4096 numbers stay in float32. A checkpoint holds all of them in float32, because blocks end
    elsewhere on another number of ranks; with their scales, which it holds too, they become what they were in 8 bits.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError('optimizer = "adamw8bit" needs bitsandbytes: pip install bitsandbytes') from None

    class Local(AdamW8bit):
        def init_state(self, group: Any, p: Tensor, *at: int) -> None:
            self._as_local(p, lambda own: AdamW8bit.init_state(self, group, own, *at))

        def update_step(self, group: Any, p: Tensor, *at: int) -> None:
            if sharded.local(p).numel():
                self._as_local(p, lambda own: AdamW8bit.update_step(self, group, own, *at))

        def _as_local(self, p: Tensor, work: Any) -> None:
            own = nn.Parameter(sharded.local(p.detach()))
            own.grad = None if p.grad is None else sharded.local(p.grad)
            self.state[own] = self.state[p]
            work(own)
            self.state[p] = self.state.pop(own)

        def load_moments(self, p: Tensor, values: dict[str, Tensor]) -> None:
            index = next((g, k) for g, group in enumerate(self.param_groups)
                         for k, other in enumerate(group["params"]) if other is p)  # fmt: skip
            # bitsandbytes lays its state out; then each moment is put into it.
            self.state[p] = {}
            self.init_state(self.param_groups[index[0]], p, *index)
            state = self.state[p]
            state["step"] = int(values["step"])
            for name, slot, absmax, qmap in SLOTS:
                value = sharded.local(values[name]).contiguous()
                if absmax in state:
                    scales = values.get(f"{absmax}@{parallel.rank()}")
                    if scales is None or scales.shape != state[absmax].shape:  # of another number of ranks
                        blocks = nn.functional.pad(value.flatten(), (0, -value.numel() % BLOCK)).view(-1, BLOCK)
                        scales = blocks.abs().amax(1)
                    state[absmax] = scales.to(value.device)
                    # The nearest of the 256 values that a code stands for, times the scale of its block.
                    each = state[absmax].clamp(min=1e-38).repeat_interleave(BLOCK)[: value.numel()]
                    code = state[qmap]
                    codes = torch.bucketize(value.flatten() / each, (code[1:] + code[:-1]) / 2)
                    state[slot] = codes.to(torch.uint8).view(value.shape)
                else:
                    state[slot].copy_(value)

    return Local(groups, betas=stage.betas, eps=stage.eps)


def _from_8bit(parameter: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
    values = {"step": torch.tensor(float(state["step"]))}
    for name, slot, absmax, qmap in SLOTS:
        value = state[slot]
        if absmax in state:
            from bitsandbytes.functional import dequantize_blockwise

            values[f"{absmax}@{parallel.rank()}"] = state[absmax]
            value = dequantize_blockwise(value, absmax=state[absmax], code=state[qmap], blocksize=BLOCK)
        values[name] = sharded.like(parameter, value.view(sharded.local(parameter).shape))
    return values
