"""One step of an optimizer as a diagonal times a gradient."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

SECOND_MOMENT = {"Adam": "exp_avg_sq", "AdamW": "exp_avg_sq", "RMSprop": "square_avg"}  # where each keeps it in its state


def preconditioner(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor], gradient: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The diagonal P of the coming step on a gradient g, by name: Δθ = -lr P ⊙ g + (momentum, decay); the kernel is J_o P J_uᵀ.

        Adam, AdamW   P = a ρ / (sqrt(v' / (1 - β₂^t)) + ε),  v' = β₂ v + (1 - β₂) g²,  a = (1 - β₁)/(1 - β₁^t)
        RMSprop       P = ρ / (sqrt(v') + ε),  v' = α v + (1 - α) g², minus the squared mean gradient when centered
        SGD           P = a ρ,  a = 1, with momentum 1 - dampening (1 in its first step), with Nesterov's 1 + μ a

    lr is `learning_rate`, ρ a group's own over lr, t the number of the coming step. amsgrad takes the larger of v' and the past
    maximum. g counts as the step counts it: negated under maximize (and P with it), and plus λθ in v' where decay is a part of
    the gradient. P depends on the update through v', and is held fixed when its tokens are told apart. Momentum carries past
    gradients, and decay the weights: they belong to no token of the update and are left out. No state is needed: v is 0 before
    a parameter's first step. Gradient clipping is not the optimizer's: give the clipped gradient.

    Args:
        optimizer: an Adam, AdamW, RMSprop or SGD before the step; nothing is written to it.
        trained: the parameters by name.
        gradient: ∇L of the whole update, by the same names; one that is absent is 0.

    Raises:
        ValueError: another optimizer, or it does not hold one of the parameters.
    """
    groups, lr = _groups(optimizer, trained), learning_rate(optimizer, trained)
    found: dict[str, Tensor] = {}
    for name, p in trained.items():
        group, state = groups[name], optimizer.state.get(p, {})
        share = float(group["lr"]) / lr if lr else 1.0
        wide = torch.promote_types(p.dtype, torch.float32)
        g = gradient[name].to(p.device, wide) if name in gradient else torch.zeros_like(p, dtype=wide)
        D = _diagonal(optimizer, group, _after(optimizer, group, state, _counted(optimizer, group, p, g)), p)
        D = share * _gain(group, state, int(state.get("step", 0)) + 1) * D
        limit = torch.finfo(p.dtype).max  # 1/ε of what nothing has pulled exceeds float16, and inf · 0 is NaN
        found[name] = D.clamp(-limit, limit).to(p.dtype)
    return found


def learning_rate(optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor]) -> float:
    """The largest learning rate of the groups that hold these parameters: the unit in which `preconditioner` is.

    Raises:
        ValueError: the optimizer does not hold one of the parameters.
    """
    return max((float(group["lr"]) for group in _groups(optimizer, trained).values()), default=0.0)


def without_buffer(optimizer: torch.optim.Optimizer) -> frozenset[int]:
    """The ids of the parameters that have no momentum buffer: before a step, those whose gradient it takes undampened."""
    every = (p for group in optimizer.param_groups for p in group["params"])
    return frozenset(id(p) for p in every if optimizer.state.get(p, {}).get("momentum_buffer") is None)


def steps_of(optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor], first: Collection[int] = ()) -> dict[str, Tensor]:
    """eta a P of the step just taken, by name: what it made of its own gradient g, Δθ = -eta a P g + (momentum, decay).

    The state after a step holds v' and t of that step. a and P are as in `preconditioner`, eta is each group's own.

    Args:
        optimizer: an Adam, AdamW, RMSprop or SGD after the step.
        trained: the parameters by name.
        first: the ids of those that took their first step (`without_buffer` before it), which SGD does not dampen: the state
            after a step does not tell.

    Raises:
        ValueError: another optimizer, it does not hold one of the parameters, or has not stepped on one of them.
    """
    groups = _groups(optimizer, trained)
    found: dict[str, Tensor] = {}
    for name, p in trained.items():
        group, state = groups[name], optimizer.state.get(p, {})
        kept = SECOND_MOMENT.get(_kind(optimizer))
        if kept is not None and kept not in state:
            raise ValueError(f"the optimizer has no second moment for {name} yet: this reads what a step has left")
        gain = _gain(group, {} if id(p) in first else state, int(state.get("step", 0)))
        found[name] = float(group["lr"]) * gain * _diagonal(optimizer, group, state, p)
    return found


def _groups(optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The parameter group of each parameter, by its name."""
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in trained.items():
        if id(p) not in held:
            raise ValueError(f"parameter {name} is trainable but the optimizer does not hold it")
    return {name: held[id(p)] for name, p in trained.items()}


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """Which of the optimizers that have a diagonal this is."""
    kind = type(optimizer).__name__
    if kind != "SGD" and kind not in SECOND_MOMENT:
        raise ValueError(f"optimizer must be Adam, AdamW, RMSprop or SGD, got {kind}")
    return kind


def _counted(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], p: Tensor, g: Tensor) -> Tensor:
    """The gradient as the moments count it: negated under maximize, and with decay where that is not decoupled from it."""
    g = -g if group.get("maximize") else g
    decoupled = group.get("decoupled_weight_decay") or _kind(optimizer) == "AdamW"
    return g if decoupled or not group.get("weight_decay") else g + float(group["weight_decay"]) * p.detach().to(g)


def _after(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], g: Tensor) -> dict[str, Any]:
    """What `_diagonal` reads of the state that a step on g will leave; the state itself is not written to."""
    kind = _kind(optimizer)
    if kind == "SGD":
        return {}
    keep, zero = group["alpha"] if kind == "RMSprop" else group["betas"][1], torch.zeros_like(g)

    def past(name: str) -> Tensor:
        return state[name].to(g) if name in state else zero

    v = keep * past(SECOND_MOMENT[kind]) + (1 - keep) * g.square()
    after = {SECOND_MOMENT[kind]: v, "step": int(state.get("step", 0)) + 1}
    if group.get("amsgrad"):
        after["max_exp_avg_sq"] = torch.maximum(past("max_exp_avg_sq"), v)
    if group.get("centered"):
        after["grad_avg"] = keep * past("grad_avg") + (1 - keep) * g
    return after


def _diagonal(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], p: Tensor) -> Tensor:
    """1 / (sqrt(v) + ε) of one parameter from the state that a step leaves, in its shape; 1 for SGD."""
    kind = _kind(optimizer)
    if kind == "SGD":
        return torch.ones_like(p)
    v = state["max_exp_avg_sq"] if group.get("amsgrad") else state[SECOND_MOMENT[kind]]
    if kind == "RMSprop":
        v = v - state["grad_avg"].square() if group.get("centered") else v
    else:
        v = v / (1 - group["betas"][1] ** float(state["step"]))
    return 1 / (v.sqrt() + group["eps"])


def _gain(group: Mapping[str, Any], state: Mapping[str, Any], step: int) -> float:
    """How much of its own gradient a step takes: a of `preconditioner`, and its sign under maximize.

    Of the state only whether SGD has a momentum buffer counts: torch fills it with the first gradient, undampened.
    """
    if "betas" in group:
        beta = float(group["betas"][0])
        gain = (1 - beta) / (1 - beta**step)
    else:
        buffered = state.get("momentum_buffer") is not None
        gain = 1 - float(group.get("dampening", 0)) if group.get("momentum") and buffered else 1.0
        gain = 1 + float(group["momentum"]) * gain if group.get("nesterov") else gain
    return -gain if group.get("maximize") else gain
