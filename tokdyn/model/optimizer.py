"""One step of an optimizer as a diagonal times a gradient, with its state frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SECOND_MOMENT = {"Adam": "exp_avg_sq", "AdamW": "exp_avg_sq", "RMSprop": "square_avg"}  # where each keeps it in its state


def preconditioner(optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The diagonal P of trained parameters by name, as the optimizer's state stands: the kernel K becomes J_o P J_uᵀ.

        Adam, AdamW   P = 1 / (sqrt(v / (1 - β₂^t)) + ε), v the second moment (the maximum with amsgrad)
        RMSprop       P = 1 / (sqrt(v) + ε), v minus the squared mean gradient when centered
        SGD           P = 1

    The response of one update to its gradient at frozen v. Momentum carries past gradients, which belong to no token of
    this update, and weight decay moves the weights alike for every token; both are left out.

    Raises:
        ValueError: another optimizer, or a traced parameter without state (take a step first) or not in the optimizer.
    """
    groups = _groups(optimizer)
    found: dict[str, Tensor] = {}
    for name, p in trained.items():
        if id(p) not in groups:
            raise ValueError(f"parameter {name} is trainable but the optimizer does not hold it")
        found[name] = _diagonal(optimizer, groups[id(p)], name, p)
    return found


def steps_of(optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """eta a P of trained parameters by name: what a step makes of its own gradient g, Δθ = -eta a P g + (momentum, decay).

    a = (1 - β₁)/(1 - β₁^t) for Adam, 1 - dampening for SGD with momentum (1 + μ times that with Nesterov's), else 1; t counts
    the step itself, so this is read after it.

    Raises:
        ValueError: see `preconditioner`.
    """
    P, groups = preconditioner(optimizer, trained), _groups(optimizer)
    for name, p in trained.items():
        group = groups[id(p)]
        if "betas" in group:
            beta = group["betas"][0]
            a = (1 - beta) / (1 - beta ** float(optimizer.state[p]["step"]))
        else:
            a = 1 - group.get("dampening", 0) if group.get("momentum") else 1.0
            a = 1 + group["momentum"] * a if group.get("nesterov") else a
        P[name] = float(group["lr"]) * a * (-1 if group.get("maximize") else 1) * P[name]
    return P


def _groups(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """The parameter group of each parameter, by its id."""
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def _diagonal(optimizer: torch.optim.Optimizer, group: dict[str, Any], name: str, p: Tensor) -> Tensor:
    """P of one parameter, in its shape."""
    kind, state = type(optimizer).__name__, optimizer.state.get(p, {})
    if kind == "SGD":
        return torch.ones_like(p)
    if kind not in SECOND_MOMENT:
        raise ValueError(f"optimizer must be Adam, AdamW, RMSprop or SGD, got {kind}")
    if SECOND_MOMENT[kind] not in state:
        raise ValueError(f"the optimizer has no second moment for {name} yet: take a step before asking for its forces")
    v = state["max_exp_avg_sq"] if group.get("amsgrad") else state[SECOND_MOMENT[kind]]
    if kind == "RMSprop":
        v = v - state["grad_avg"].square() if group.get("centered") else v
    else:
        v = v / (1 - group["betas"][1] ** float(state["step"]))
    return 1 / (v.sqrt() + group["eps"])
