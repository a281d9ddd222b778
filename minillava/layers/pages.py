"""Memory of large pages for what a CPU reads again and again."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import nn


def to_huge_pages(module: nn.Module) -> None:
    """Move what `module` holds end to end into memory of large pages, where the system has them (Linux): reading
    gigabytes then waits less for addresses to be translated (bench/LOG.md). One tensor at a time is held twice."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    owners = [(m, name) for m in module.modules() for name in (*m._parameters, *m._buffers)]
    found = [(m, name) for m, name in owners if getattr(m, name) is not None]
    room, page = sum(-(-getattr(*owner).nbytes // 64) * 64 for owner in found), 1 << 21
    memory = mmap.mmap(-1, room + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    at = -whole.data_ptr() % page
    for m, name in found:
        tensor = getattr(m, name).detach()
        copy = whole[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        at += -(-tensor.nbytes // 64) * 64
        if name in m._buffers:
            m._buffers[name] = copy
        else:
            getattr(m, name).data = copy
