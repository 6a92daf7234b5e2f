"""The same products by real parameter steps: right for any attention and any custom kernel, in float32 to four digits or so."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .products import Direction
from .scope import Scope
from .sides import Side


@torch.no_grad()
def jvp(scope: Scope, side: Side, direction: Direction, move: float = 0.05) -> Float[Tensor, " N"]:
    """<Γ_n, ż_n> from real parameter steps: central differences at two step sizes, extrapolated (Richardson), error O(h⁴).

    The step is chosen so that the largest logit change is about `move`, far above rounding and far below curvature.
    """
    tracer, uses = scope.tracer, scope.uses

    def at(h: float) -> list[Tensor]:
        params = tracer.stepped(direction, uses, h)
        return [tracer.logits(batch, params) for batch in side.batches]

    still = at(0.0)
    norm = float(torch.stack([value.norm() for value in direction.values()]).norm())
    if norm == 0:
        return torch.zeros(len(side), dtype=tracer.precision, device=tracer.device)
    size = float(torch.stack([tracer.params[use].norm() for use in uses]).norm())
    h = 1e-4 * size / norm
    for _ in range(8):  # until the measured change is of the wanted size
        change = max(float((a - b).abs().max()) for a, b in zip(at(h), still, strict=True))
        if change == 0:
            h *= 100
        elif 0.5 * move <= change <= 2 * move:
            break
        else:
            h *= min(100.0, max(0.01, move / change))

    def slope(step: float) -> Tensor:
        plus, minus = at(step), at(-step)
        work = [side.work(b, z, p - q) for b, (z, p, q) in enumerate(zip(still, plus, minus, strict=True))]
        return torch.cat(work) / (2 * step)

    return (4 * slope(h / 2) - slope(h)) / 3
