"""The same products by real parameter steps: right for any attention and any custom kernel, in float32 to four digits or so."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .products import Direction, real_velocities
from .scope import Scope
from .sides import Side


@torch.no_grad()
def jvp(scope: Scope, side: Side, direction: Direction) -> Float[Tensor, " N"]:
    """<Γ_n, ż_n> from real parameter steps (model/differences.py)."""
    velocities = real_velocities(scope.tracer, side.batches, direction, scope.uses)
    still = (scope.tracer.logits(batch) for batch in side.batches)
    return torch.cat([side.work(b, z, velocity) for b, (z, velocity) in enumerate(zip(still, velocities, strict=True))])
