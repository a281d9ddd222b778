"""What every kernel file shares: registration with torch, Triton where it is installed, and one way to launch.

An operation is registered once with a plain PyTorch implementation (any device without one of its own), a CUDA one
(Triton and library products), a fake one (shapes only) and a backward formula; which runs is torch's dispatch by
device. A launch follows its tensors too: on CUDA it runs, on the CPU it goes through Triton's interpreter (tests), on
meta tensors it is only compiled, for the card that `tools.aot` pretends is there. Whatever depends on Triton's version
is in this file, in aot and in interpreter.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("minillava", "DEF")
HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Card:
    """The GPU that a kernel is launched on or compiled for."""

    name: str  # "NVIDIA H200"
    arch: str  # "sm_90", "gfx942"
    multiprocessors: int
    shared_bytes: int  # shared memory that one program may take

    @property
    def has_descriptors(self) -> bool:
        """Tensor memory accelerator: Hopper and data-centre Blackwell."""
        return self.arch in ("sm_90", "sm_100", "sm_103")

    @property
    def has_dependent_launch(self) -> bool:
        """Programmatic dependent launch: a kernel starts while the one in front of it still runs."""
        return self.arch.startswith("sm_") and int(self.arch.removeprefix("sm_")) >= 90

    @property
    def runs_kernels(self) -> bool:
        """Compute capability 8.0 and later: before, there is no cp.async and no bf16, and PyTorch is as good."""
        return not self.arch.startswith("sm_") or int(self.arch.removeprefix("sm_")) >= 80


# What is compiled for without a card. Shared memory per program: CUDA C++ programming guide, compute capabilities.
CARDS = {
    card.arch: card
    for card in (
        Card("NVIDIA A100-SXM4-80GB", "sm_80", 108, 166_912),
        Card("NVIDIA L40S", "sm_89", 142, 101_376),
        Card("NVIDIA H200", "sm_90", 132, 232_448),
        Card("NVIDIA B200", "sm_100", 148, 232_448),
        Card("AMD Instinct MI300X", "gfx942", 304, 65_536),
    )
}
INTERPRETED = CARDS["sm_80"]
# Set by aot.compiling: the card, and what is told of every kernel.
compiling_for: Card = CARDS["sm_90"]
on_compiled: Callable | None = None


@functools.cache
def _cuda_card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    arch = getattr(properties, "gcnArchName", "").split(":")[0] if torch.version.hip else ""
    shared = getattr(properties, "shared_memory_per_block_optin", 65_536)
    arch = arch or f"sm_{properties.major}{properties.minor}"
    return Card(properties.name, arch, properties.multi_processor_count, shared)


def card_of(x: Tensor) -> Card:
    """The card that a launch on `x` is for: its own, the interpreter's, or the one being compiled for."""
    if x.is_cuda:
        return _cuda_card(x.device.index)
    return compiling_for if x.is_meta else INTERPRETED


# -- Triton ------------------------------------------------------------------------------------------------------------

if HAS_TRITON:
    import triton
    import triton.language as tl  # type: ignore[no-redef]

    jit: Callable = triton.jit
else:  # the definitions are still read, and nothing launches them: `register` looks at HAS_TRITON
    tl = SimpleNamespace(constexpr=None)

    def jit(fn: Callable) -> Any:
        return fn


@jit
def coordinate(x):
    """`x`, at least 0, as a place in a descriptor: a value apart from the `x` that rows and columns count from.

    Where a specialised loop splits a tile between two consumers, Triton 3.6 to 3.9 adds half a tile to the coordinate
    for the second of them, and to whatever else it computes from the very same value: rows counted from it would be
    half a tile off. Every coordinate of a descriptor goes through here, and aot looks that it does.
    """
    return tl.maximum(x, 0)


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, config: dict[str, Any] | None = None, **constants: Any
) -> Any:
    """Run `kernel` over `grid` where its first argument lives; on meta tensors, compile it and run nothing.

    `config` gives warps, stages, and the constants that the kernel has under the same names in capitals. FP fusion is
    asked for by name: Triton 3.10 turns it off by default, which costs a quarter more instructions.
    """
    config = config or {}
    options = {"num_warps": config.get("warps", 4), "num_stages": config.get("stages", 3), "enable_fp_fusion": True}
    constants = {n.upper(): value for n, value in config.items() if n.upper() in kernel.arg_names} | constants
    if "PDL" in kernel.arg_names:  # the kernel waits itself for those in front of it
        constants["PDL"] = not args[0].is_cpu and card_of(args[0]).has_dependent_launch
        options |= {"launch_pdl": True} if constants["PDL"] else {}
    if args[0].is_cuda:
        # The allocator is a context variable, and autograd's backward runs in another thread's context.
        triton.set_allocator(_allocate)
        with torch.cuda.device(args[0].device):
            return kernel[grid](*args, **options, **constants)
    if args[0].is_meta:
        compiled = kernel.warmup(*args, grid=grid, **options, **constants)
        return on_compiled(kernel, compiled, options, constants) if on_compiled else None
    from minillava.kernels import interpreter

    return interpreter.run(kernel, grid, *args, **constants)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


# -- registration ------------------------------------------------------------------------------------------------------


ON_CUDA: dict[str, Callable] = {}  # operation -> what a GPU runs, for those who count launches
PLAIN: dict[str, Callable] = {}  # operation -> its plain PyTorch, for those who count memory


def register(
    schema: str,
    *,
    plain: Callable,
    cpu: Callable | None = None,
    cuda: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> Any:
    """Register `schema` as torch.ops.minillava.<name> and return the operation.

    `plain` is for every device that has no implementation of its own, those that are not known here included.
    Library.define and impl rather than custom_op or triton_op: a third of custom_op's cost per call, and triton_op
    breaks torch.compile on CPU tensors (measured in torch 2.13).
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    torch.library.register_fake(f"minillava::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    if cpu is not None:
        LIBRARY.impl(name, cpu, "CPU")
    ON_CUDA[name], PLAIN[name] = cuda, plain
    if HAS_TRITON:
        LIBRARY.impl(name, functools.partial(_on_cuda, cuda, plain), "CUDA")
    if backward is not None:
        torch.library.register_autograd(f"minillava::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return getattr(torch.ops.minillava, name).default


def _on_cuda(kernel: Callable, plain: Callable, *args: Any) -> Any:
    """The kernel, or PyTorch on a card that is too old for it."""
    card = next(card_of(x) for x in args if isinstance(x, Tensor))
    return (kernel if card.runs_kernels else plain)(*args)


def aligned(x: Tensor) -> Tensor:
    """Contiguous (gradients of a sum have zero strides) and on a 16-byte address, for vector loads and descriptors."""
    x = x.contiguous()
    return x if x.is_meta or x.data_ptr() % 16 == 0 else x.clone()


def contiguous(x: Tensor | None) -> Tensor | None:
    """As kernels read biases, norms and scales, one number behind the other; what is not there stays None."""
    return None if x is None else x.contiguous()


def wide(x: Tensor) -> torch.dtype:
    """The type to sum in: at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def shapes(**tensors: Tensor | None) -> str:
    """The text "x [2, 3], w [4, 5]" for the message of a refused call."""
    return ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items() if t is not None)
