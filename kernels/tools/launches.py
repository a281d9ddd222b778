"""Count the kernels that a GPU would run, on meta tensors: views and allocations are none, an operation of PyTorch is
one, an operation of ours is what its wrapper launches, compiled for the card that `aot.compiling` names.

    with aot.compiling("sm_90") as found, Launches(found) as seen: model(...)   # on meta tensors
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillava.kernels import frame

FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view"}


@dataclass
class Call:
    """One operation: how many kernels it took, and the bytes of its tensors, read or written."""

    name: str
    kernels: int
    bytes: int
    compiled: list[Any]


class Launches(TorchDispatchMode):
    """What ran within, one entry an operation."""

    def __init__(self, found: list[Any]) -> None:
        super().__init__()
        self.found = found
        self.calls: list[Call] = []

    @property
    def kernels(self) -> int:
        return sum(call.kernels for call in self.calls)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        space, name = operation.namespace, operation._schema.name.split("::")[1]
        if space == "minillava":
            return self._ours(name, args)
        result = operation(*args, **(kwargs or {}))
        if not operation.is_view and name not in FREE:
            self.calls.append(Call(name, 1, _bytes(args, result), []))
        return result

    def _ours(self, name: str, args: tuple) -> Any:
        before = len(self.found)
        with self:  # what a wrapper leaves to PyTorch is counted too
            result = frame.ON_CUDA[name](*args)
        compiled = self.found[before:]
        self.calls.append(Call(name, len(compiled), _bytes(args, result), compiled))
        return result


def _bytes(args: Any, result: Any) -> int:
    tensors = {id(t): t for t in tree_leaves((args, result)) if isinstance(t, Tensor)}
    return sum(t.numel() * t.itemsize for t in tensors.values())
