"""Which rule a module goes by: found from what it computes, not from its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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


Kind = Callable[[Sequence[Call], set[str], Direction | None], Rule]  # from a module's calls, what moves of it, and P


@torch.no_grad()
def kind_of(calls: Sequence[Call], moves: set[str]) -> Kind:
    """The kind of a module's rule from its calls: what it computes on random parameters, which is looked at once.

    Args:
        calls: of one module.
        moves: which of its parameters move, named from the module.
    """
    for rule, fits in SPECIAL:
        if moves <= {"weight", "bias"} and isinstance(calls[0].output, Tensor) and fits(calls[0]):
            return rule
    if (stack := Stack.seen(calls[0])) is not None and moves <= set(stack.names):
        return partial(Experts, stack=stack)
    return Router if moves <= {"weight", "bias"} and is_router(calls[0]) else Local


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
    return kind_of(calls, moves)(calls, moves, P)
