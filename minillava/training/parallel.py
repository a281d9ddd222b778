"""Several processes under torchrun as one run: who am I, what do we agree on, and FSDP2 over the model.

FSDP2 (torch.distributed.fsdp.fully_shard; Zhao et al. 2023, arXiv 2304.11277) splits every parameter over the ranks and
gathers a block's weights only while it computes. What is trained is float32 and gathered in the compute dtype;
its gradients are summed in float32. One process without torchrun uses nothing of this.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minillava.errors import UserError


def restarted() -> bool:
    """Whether torchrun started it again after one of the ranks had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many ranks share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def start(device: torch.device, timeout_minutes: float) -> torch.device:
    """Join the other ranks; returns this one's device. Only the first rank prints from here on.

    A collective that waits longer than `timeout_minutes` fails: some rank is dead or stands somewhere else. Only
    `barrier` waits for a day.
    """
    launched = dist.is_available() and dist.is_torchelastic_launched()
    if not launched or dist.is_initialized():
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # kernels are launched on it, and checkpoints hold its random state
        return device
    threading.Thread(target=end_with, args=(os.getppid(), timeout_minutes * 60), daemon=True).start()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    store, number, count = next(dist.rendezvous("env://", timeout=timeout))
    # Ranks that torchrun has started again find the dead ones' addresses in the store, unless they look elsewhere.
    store = dist.PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)
    patient_group()
    atexit.register(stop)
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


def end_with(launcher: int, most_s: float) -> None:
    """Wait until the process that started this one is dead, then end: as after SIGTERM, on which a run saves and stops,
    and after `most_s` in any case. A killed torchrun cannot end its ranks, which would go on by themselves."""
    while os.getppid() == launcher:
        time.sleep(1)
    print(f"rank {rank()}: what started it (process {launcher}) is gone; saving and stopping", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(most_s)
    os._exit(1)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave() -> None:
    """End the process of a run that is done, all ranks together, without the interpreter's own end.

    There a thread that is still on its way out and frees a tensor aborts the process ("terminate called without an
    active exception": pytorch issues 117762 and 190489, open), which on a busy machine a rank did that had written
    everything. It was seen once, and not again in 160 ends on purpose.
    """
    if world() > 1:
        barrier()
        stop()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@cache
def patient_group() -> Any:
    """A group for waits while the first rank works alone: lengths of millions of samples, or a model's file, may take
    longer than a step may. If it dies, torchrun ends the others."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))


def barrier() -> None:
    if world() > 1:
        dist.barrier(patient_group())


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The first rank goes through the block before the others do: it writes what they read."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def agree(numbers: list[int]) -> list[int]:
    """The largest of all ranks' numbers, one by one. Lists must be equally long."""
    if world() == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def summed(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def gathered(value: Any) -> list[Any]:
    """Every rank's value (of plain Python types), in the order of ranks."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


@cache
def host_group() -> Any:
    """A group for what background threads exchange, so that it never mixes with the steps' collectives; None alone."""
    return dist.new_group(backend="gloo") if world() > 1 else None


class Watch:
    """Writes where every rank stands, thread by thread, before a step has lasted `minutes` and collectives give up.

    The dumps are stacks-RANK.txt in the run's folder, each headed by the step; a run that ends leaves none.
    """

    def __init__(self, folder: Path, minutes: float):
        self.seconds = 0.9 * minutes * 60
        self.path = folder / f"stacks-{rank()}.txt"
        folder.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("w", encoding="utf-8") if world() > 1 else None

    def step(self, where: str) -> None:
        if self.file is not None:
            self.file.seek(0)
            self.file.truncate()
            self.file.write(f"rank {rank()} of {world()}, {where}\n")
            self.file.flush()
            faulthandler.dump_traceback_later(self.seconds, file=self.file)

    def close(self, failed: bool) -> None:
        if self.file is not None:
            faulthandler.cancel_dump_traceback_later()
            self.file.close()
            if not failed:
                self.path.unlink(missing_ok=True)


# ---- the model over the ranks ----


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks inside a model: what is gathered, recomputed and compiled as one."""
    return [block for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) for block in m
            if any(True for _ in block.children())]  # fmt: skip


def shard(model: nn.Module, dtype: torch.dtype, ranks: int, offload: bool, device: torch.device) -> None:
    """Split the model's parameters over the ranks, in place; a block is gathered in `dtype` while it computes.

    `ranks` share one copy of the model (0: all of them); with fewer than all, each group of so many holds one and
    gradients are summed over the groups (HSDP: shard inside a node, replicate over nodes). Parameters may be on meta.
    Buffers, which 4-bit weights are, stay whole on every rank.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    ranks = ranks or world()
    if world() % ranks:
        raise UserError(f"shard = {ranks}: does not divide the {world()} ranks; choose a divisor, or 0 for all")
    if ranks == world():
        mesh = init_device_mesh(device.type, (ranks,))
    else:
        mesh = init_device_mesh(device.type, (world() // ranks, ranks), mesh_dim_names=("replicate", "shard"))
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offloads = CPUOffloadPolicy(device.type == "cuda") if offload else OffloadPolicy()
    for module in [*blocks_of(model), model]:
        fully_shard(module, mesh=mesh, mp_policy=mixed, offload_policy=offloads)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums: the loss is divided once, by what all ranks learned
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard(model: nn.Module) -> None:
    """Let go of weights that were gathered for a forward pass that had no backward pass."""
    getattr(model, "reshard", lambda: None)()


def shared_out(work: Callable[[Tensor], Tensor], x_N: Tensor) -> Tensor:
    """work(x), of which every rank does its share of the first dimension; what comes out has the shape of x."""
    per = -(-len(x_N) // world())
    share = x_N.new_zeros(per, *x_N.shape[1:])
    mine = x_N[rank() * per : (rank() + 1) * per]
    share[: len(mine)] = mine
    all_N = x_N.new_empty(world() * per, *x_N.shape[1:])
    dist.all_gather_into_tensor(all_N, work(share))
    return all_N[: len(x_N)]


# ---- memory against time, block by block ----


def passing_through(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Make a model on the host ready for one forward pass on the device: a block is there while it is called."""

    def bring(block: nn.Module, args: Any) -> None:
        block.to(device, dtype)

    def drop(block: nn.Module, args: Any, result: Any) -> None:
        block.to("meta")

    blocks = blocks_of(model)
    for block in blocks:
        block.register_forward_pre_hook(bring)
        block.register_forward_hook(drop)
    inside = {id(p) for block in blocks for p in block.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.to(device, dtype)


def wrap_blocks(model: nn.Module, checkpointing: str, compiled: bool) -> Callable[[], None]:
    """Recompute activations in the backward pass, and compile, block by block; the returned call undoes both.

    full: a block keeps only its input. selective: it also keeps attention and every product that is no wider than its
    input, so that what is computed again is the wide half of the MLP and all that is cheap.
    Compiled is what is before and after attention: the boundaries of packed rows are new in every step, and code that
    is compiled for some of them would be compiled again for others, until torch gave up.
    """
    changed: list[tuple[Any, str]] = []

    def put(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        setattr(module, name, function)
        changed.append((module, name))

    for block in blocks_of(model):
        others = len(changed)
        for module in block.modules() if compiled else ():
            for name in {"before", "after"} & set(dir(module)):
                put(module, name, torch.compile(getattr(module, name), dynamic=True))
        if compiled and len(changed) == others:
            raise RuntimeError(f"{type(block).__name__}: nothing has the names of what is compiled, before and after")
        if checkpointing != "off":
            selective = partial(create_selective_checkpoint_contexts, _keep)
            context: dict[str, Any] = {"context_fn": selective} if checkpointing == "selective" else {}
            put(block, "forward", partial(checkpoint, block.forward, use_reentrant=False, **context))

    def undo() -> None:
        for module, name in changed:
            delattr(module, name)

    return undo


def _keep(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name()
    narrow = False
    if name in ("aten::mm", "aten::addmm"):
        x, weight = args[-2:]
        narrow = weight.shape[1] <= x.shape[1]
    keep = narrow or "attention" in name
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
