"""The same calls for a weight that is whole and for one that is split over the ranks (a DTensor)."""

import torch
from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one, which every rank must ask for."""
    return getattr(tensor, "full_tensor", lambda: tensor)()


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or this rank's part of a sharded one."""
    return getattr(tensor, "to_local", lambda: tensor)()


def like(parameter: Tensor, own: Tensor) -> Tensor:
    """This rank's part of a tensor that is sharded as `parameter` is; the part itself where that is whole."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return own
    from torch.distributed.tensor import DTensor

    placements, shape, stride = getattr(parameter, "placements", None), parameter.shape, parameter.stride()
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=shape, stride=stride)


def part(parameter: Tensor, values: Tensor) -> Tensor:
    """Whole `values` as `parameter` is held: as they are, or this rank's part of them. No rank is asked."""
    mesh = getattr(parameter, "device_mesh", None)
    values = values.to(parameter.device, parameter.dtype)
    if mesh is None:
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, mesh, getattr(parameter, "placements", None), src_data_rank=None)


def assign(parameter: Tensor, values: Tensor) -> None:
    """Copy whole `values` into a parameter, or this rank's part of them into a sharded one. No rank is asked."""
    with torch.no_grad():
        parameter.copy_(part(parameter, values))
