"""The processes (ranks) that train together, as torch.distributed has them: one where it is not set up. Nothing is launched."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model.unwrap import is_sharded

NOT_AVERAGED = ("tp", "tensor", "cp", "pp", "ep")  # dimensions of a device mesh whose ranks share one replica's gradient


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def averaging(model: nn.Module) -> int:
    """Over how many ranks the gradients of a model are averaged, by its device mesh or DDP's process group."""
    if world() == 1:
        return 1
    for p in model.parameters():
        if is_sharded(p):
            mesh: Any = p.device_mesh  # type: ignore[attr-defined]
            names = mesh.mesh_dim_names or ("",) * mesh.ndim
            return math.prod(mesh.size(i) for i, name in enumerate(names) if name not in NOT_AVERAGED)
    group = getattr(model, "process_group", None)
    return dist.get_world_size(group) if group is not None else 1


def total(values: Tensor) -> Tensor:
    """The sum over all processes, each of which must call this."""
    if world() > 1:
        values = values.to("cpu" if "gloo" in dist.get_backend() else torch.device("cuda"))
        dist.all_reduce(values)
    return values.cpu()


def agree(fine: bool) -> bool:
    """Whether all is well on every process, each of which must call this."""
    return bool(total(torch.tensor(float(not fine))) == 0)
