"""Activations by the name that a config gives them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.kernels.cpu import pointwise


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation x * sigmoid(1.702 x)."""
    y = pointwise.quick_gelu(x)
    return x * torch.sigmoid(1.702 * x) if y is None else y


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
