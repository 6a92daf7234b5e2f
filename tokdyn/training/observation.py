"""What one optimizer step did to a probe, as both probe.py and probe_sharded.py find it, and what both compute it from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..model.readout import Readout
from .forward import Forward


@dataclass(frozen=True)
class Update:
    """What a step was made of.

    Args:
        forwards: the captured passes of its loss.
        optimizer: what made the step of their gradient.
        scale: brings their c to the units of the step.
        first: see `steps_of`.
    """

    forwards: Sequence[Forward]
    optimizer: torch.optim.Optimizer
    scale: float
    first: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Blame:
    """Which tokens of an update moved a probe, in nats.

    Args:
        forces: by group of the probe, what each token of this rank did to it, [L]; before gradients are clipped.
        total: Σ of the forces on the first group, over all ranks once they were asked.
        rounding: √P eps Σ|forces| on the first group, over all ranks: an inner product over P parameters is off by √P eps of
            the terms that cancel in it. What is smaller is no movement.
        own: what the step's own gradient did to that group, clipped as it was. carried: what momentum and weight decay did.
            None where they are not known.
    """

    forces: Mapping[str, Tensor]
    total: float = 0.0
    rounding: float = 0.0
    own: float | None = None
    carried: float | None = None


@dataclass(frozen=True)
class Observation:
    """What a step did to the M tokens of a probe.

    Args:
        table: the tokens, a row each (pyarrow).
        before, after: their log-probs, or what else is watched, [M]. predicted: the change to first order, [M].
        readout: the part of it that went through the readout's weights, [M]; None where they did not move.
        blame: which tokens of the update did it. problem: why that is not known, or only in part.
    """

    table: Any
    before: Tensor
    after: Tensor
    predicted: Tensor
    readout: Tensor | None = None
    blame: Blame | None = None
    problem: str = ""


@torch.no_grad()
def through_readout(
    readout: Readout, h: Tensor, z: Tensor, force: Tensor, weight: Tensor, bias: Tensor | None
) -> Float[Tensor, " N"]:
    """<force, ż> where only W and b of the readout move, along `weight` [V, d] and `bias` [V]: ż is slope ⊙ (Ẇ h + ḃ).

    Six arguments, as the formula has them.
    """
    pulled = readout.pull_back(z.to(force.dtype), force)
    moved = h.to(force.dtype) @ weight.to(force.dtype).T + (0 if bias is None else bias)
    return (pulled * moved).double().sum(1)
