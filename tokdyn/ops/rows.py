"""Logits in blocks of rows: the several [N, V] intermediates behind one number a row stay in a CPU's caches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

CACHED, LARGE = 2**18, 2**26  # entries of a block, on a CPU and on a GPU


def at_once(V: int, device: torch.device) -> int:
    """How many rows of logits make a block."""
    return max(1, (CACHED if device.type == "cpu" else LARGE) // max(1, V))


def blocks(z: Float[Tensor, "N V"]) -> Iterator[slice]:
    """Slices that together cover the rows of z, in order; one empty slice where there are none."""
    n = at_once(z.shape[1], z.device)
    return (slice(start, start + n) for start in range(0, max(1, len(z)), n))


@torch.no_grad()
def log_probs(z: Float[Tensor, "N V"], y: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """log pi(y_n) in float64, for differences of it over one small step; no gradient."""
    y = y.to(z.device)[:, None]
    return torch.cat([z[rows].double().log_softmax(1).gather(1, y[rows]).squeeze(1) for rows in blocks(z)])
