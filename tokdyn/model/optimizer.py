"""The diagonal P of an optimizer, frozen for one step: under it the kernel K becomes J_o P J_uᵀ."""

from __future__ import annotations

import torch
from torch import Tensor

from .trace import Tracer


def preconditioner(optimizer: torch.optim.Optimizer, tracer: Tracer) -> dict[str, Tensor]:
    """P of Adam, AdamW, RMSprop or SGD, by parameter name, as its state stands.

        Adam, AdamW   P = 1 / (sqrt(v / (1 - β₂^t)) + ε), v the second moment (the maximum with amsgrad)
        RMSprop       P = 1 / (sqrt(v) + ε), v minus the squared mean gradient when centered
        SGD           P = 1

    The response of one update to its gradient at frozen v. Momentum carries past gradients, which belong to no token of
    this update, and weight decay moves the weights alike for every token; both are left out.

    Raises:
        ValueError: another optimizer, or a traced parameter without state (take a step first) or not in the optimizer.
    """
    kind = type(optimizer).__name__
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found: dict[str, Tensor] = {}
    for name, p in tracer.model.named_parameters():
        if name not in tracer.trainable:
            continue
        if id(p) not in group_of:
            raise ValueError(f"parameter {name} is trainable but the optimizer does not hold it")
        group, state = group_of[id(p)], optimizer.state.get(p, {})
        if kind == "SGD":
            found[name] = torch.ones_like(p)
            continue
        key = {"Adam": "exp_avg_sq", "AdamW": "exp_avg_sq", "RMSprop": "square_avg"}.get(kind)
        if key is None:
            raise ValueError(f"optimizer must be Adam, AdamW, RMSprop or SGD, got {kind}")
        if key not in state:
            raise ValueError(f"the optimizer has no second moment for {name} yet: take a step before asking for its forces")
        v = state["max_exp_avg_sq"] if group.get("amsgrad") else state[key]
        if kind == "RMSprop":
            v = v - state["grad_avg"].square() if group.get("centered") else v
        else:
            v = v / (1 - group["betas"][1] ** float(state["step"]))
        found[name] = 1 / (v.sqrt() + group["eps"])
    return found
