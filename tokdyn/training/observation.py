"""What both ways of looking at one optimizer step share: what they find, and what the readout alone does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..model.readout import Readout


@dataclass
class Seen:
    """What was found at one step: log-probs before and after, first-order changes, each [M] in float64; forces [L] by group."""

    table: Any
    before: Tensor
    after: Tensor
    predicted: Tensor
    readout: Tensor | None
    forces: dict[str, Tensor] = field(default_factory=dict)
    carried: float | None = None
    own: float | None = None
    total: float = 0.0
    problem: str = ""


@torch.no_grad()
def through_readout(
    readout: Readout, h: Tensor, z: Tensor, force: Tensor, weight: Tensor, bias: Tensor | None
) -> Float[Tensor, " N"]:
    """<force, ż> where only W and b move: ż is slope ⊙ (Ẇ h + ḃ)."""
    pulled = readout.pull_back(z.to(force.dtype), force)
    moved = h.to(force.dtype) @ weight.to(force.dtype).T + (0 if bias is None else bias)
    return (pulled * moved).double().sum(1)
