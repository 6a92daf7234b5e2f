"""Which rule a module goes by: found from what it computes, not from its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...model.calls import Call
from ..products import Direction
from .base import Rule
from .experts import Experts
from .gain import Gain, is_gain
from .linear import Linear, is_linear
from .local import Local
from .lookup import Lookup, is_lookup
from .router import Router, is_router
from .routes import Stack

SPECIAL: tuple[tuple[Callable[..., Rule], Callable[[Call], bool]], ...] = (
    (Linear, is_linear),
    (Lookup, is_lookup),
    (Gain, is_gain),
)


@torch.no_grad()
def rule_for(calls: Sequence[Call], moves: set[str], P: Direction | None = None) -> Rule:
    """The rule of a module from its calls on the observed side.

    Args:
        calls: of one module.
        moves: which of its parameters move, named from the module.
        P: their preconditioner.

    Raises:
        NotReplayable: it fits no special rule and cannot be called by itself.
    """
    for rule, fits in SPECIAL:
        if moves <= {"weight", "bias"} and isinstance(calls[0].output, Tensor) and fits(calls[0]):
            return rule(calls, moves, P)
    if (stack := Stack.seen(calls[0])) is not None and moves <= set(stack.names):
        return Experts(calls, moves, P, stack)
    return (Router if moves <= {"weight", "bias"} and is_router(calls[0]) else Local)(calls, moves, P)
