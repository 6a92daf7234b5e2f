"""The processes that train together, as torch.distributed has them; one where it is not set up. Nothing is launched here."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(values: Tensor) -> Tensor:
    """The sum over all processes, each of which must call this."""
    if world() > 1:
        values = values.to("cpu" if "gloo" in dist.get_backend() else torch.device("cuda"))
        dist.all_reduce(values)
    return values.cpu()


def agree(fine: bool) -> bool:
    """Whether all is well on every process, each of which must call this."""
    return bool(total(torch.tensor(float(not fine))) == 0)
