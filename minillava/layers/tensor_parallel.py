"""A decoder over several processes: each has some heads and some channels of every MLP (Megatron, arXiv 1909.08053).

q, k, v, gate and up are cut by their outputs, what follows them by its inputs; behind those two the processes add what
they have. Embedding, norms, head and tower are whole in each, so all of them choose the same token.
"""

import re
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.config import DecoderConfig
from minillava.errors import UserError

Share = tuple[int, int]  # which process, of how many
BY_OUTPUTS = re.compile(r"decoder\.blocks\.\d+\.(attn\.[qkv]|mlp\.(gate|up))\.(weight|bias)")
BY_INPUTS = re.compile(r"decoder\.blocks\.\d+\.(attn\.out|mlp\.down)\.weight")


class Summed(nn.Module):
    """A linear layer of which each process has some of the inputs; the outputs are whole."""

    def __init__(self, weight_OD: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight_OD)
        self.bias = None

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD = F.linear(x_TD, self.weight)
        dist.all_reduce(y_TD)
        return y_TD


def check(config: DecoderConfig, ranks: int) -> None:
    """Raises UserError for a decoder that so many processes cannot share."""
    counts = {"heads": config.num_heads, "key/value heads": config.num_kv_heads, "channels": config.intermediate_size}
    for name, count in counts.items():
        if count % ranks:
            raise UserError(f"{ranks} processes cannot share {count} {name}; start as many as divide them")
    if config.num_experts:
        raise UserError("a decoder with experts runs in one process; leave out torchrun")


def part(name: str, tensor: Tensor, share: Share) -> Tensor:
    """What a process has of a weight of ours by name."""
    rank, ranks = share
    if BY_OUTPUTS.fullmatch(name):
        return tensor.chunk(ranks)[rank]
    return tensor.chunk(ranks, 1)[rank] if BY_INPUTS.fullmatch(name) else tensor


def split(decoder: Any, share: Share) -> DecoderConfig:
    """Make a decoder whose weights are not there yet one of `part`s; the config of the heads that it has.

    Raises UserError for one that cannot be shared.
    """
    config, (rank, ranks) = decoder.config, share
    check(config, ranks)
    for block in decoder.blocks:
        for module, names, last in ((block.attn, "qkv", "out"), (block.mlp, ("gate", "up"), "down")):
            for name in names:
                layer = getattr(module, name)
                setattr(module, name, layer.rows(0, layer.out_features // ranks))
            setattr(module, last, Summed(getattr(module, last).weight.detach().chunk(ranks, 1)[rank]))
    return replace(config, num_heads=config.num_heads // ranks, num_kv_heads=config.num_kv_heads // ranks)


def is_shared(decoder: Any) -> bool:
    """Whether other processes have parts of it."""
    return isinstance(decoder.blocks[0].attn.out, Summed)


def join(device: torch.device) -> int:
    """Meet the other processes; the rank of this one."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank()
