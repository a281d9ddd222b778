"""Activations by the name that a config gives them."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from minillava.kernels.cpu.pointwise import quick_gelu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
