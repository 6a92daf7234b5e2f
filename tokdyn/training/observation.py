"""What both ways of looking at one optimizer step share: what they find, and the step as a diagonal times a gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..model.optimizer import preconditioner
from ..model.trace import Readout


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


def steps_of(optimizer: torch.optim.Optimizer, tracer: Any) -> dict[str, Tensor]:
    """eta a P by parameter name: what a gradient of this step becomes in it, for Adam, AdamW, RMSprop and SGD.

    a = (1 - β₁)/(1 - β₁^t) for Adam, 1 - dampening for SGD with momentum (1 + μ times that with Nesterov's), else 1.

    Raises:
        ValueError: see `preconditioner`.
    """
    P = preconditioner(optimizer, tracer)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in tracer.model.named_parameters():
        if name in P:
            group = group_of[id(p)]
            if "betas" in group:
                beta = group["betas"][0]
                gain = (1 - beta) / (1 - beta ** float(optimizer.state[p]["step"]))
            else:
                gain = 1 - group.get("dampening", 0) if group.get("momentum") else 1.0
                gain = 1 + group["momentum"] * gain if group.get("nesterov") else gain
            P[name] = float(group["lr"]) * gain * (-1 if group.get("maximize") else 1) * P[name]
    return P


@torch.no_grad()
def through_readout(
    readout: Readout, h: Tensor, z: Tensor, force: Tensor, weight: Tensor, bias: Tensor | None
) -> Float[Tensor, " N"]:
    """<force, ż> where only W and b move: ż is slope ⊙ (Ẇ h + ḃ)."""
    pulled = readout.pull_back(z.to(force.dtype), force)
    moved = h.to(force.dtype) @ weight.to(force.dtype).T + (0 if bias is None else bias)
    return (pulled * moved).double().sum(1)
