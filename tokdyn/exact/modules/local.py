"""Any other module: its vjp in its moving parameters, then its jvp along the direction found. Exact, slower."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.func import jvp, vjp, vmap

from ...model.calls import Call
from ..errors import NotReplayable
from ..products import Direction, preconditioned
from .base import Outputs, Rule, as_function, is_close


class Local(Rule):
    """A module called again by itself, in its moving parameters alone (convolutions, expert stacks, state-space parameters).

    Raises:
        NotReplayable: called again with the same inputs, the module returns something else.
    """

    label = "module-local"

    def __init__(self, calls: Sequence[Call], moves: set[str], P: Direction | None = None) -> None:
        self.own = {name: calls[0].module.get_parameter(name).detach() for name in sorted(moves)}
        size = sum(p.numel() for p in self.own.values())
        super().__init__(calls, size, scratch=size)
        self.calls, self.P = calls, P
        for call in calls:
            for now, then in zip(as_function(call)(self.own), call.outputs, strict=True):
                if not is_close(now, then, relative=0.0):
                    raise NotReplayable(call.name)

    def prefers_direction(self, narrow: float) -> bool:
        """See Rule: where the module's parameters are few beside what it returns."""
        return self.size <= 2 * sum(x.numel() for call in self.calls for x in call.outputs)

    def direction(self, calls: Sequence[Call], delta: Outputs) -> Direction:
        """The module's vjp."""
        found: Direction = {}
        for call, cotangent in zip(calls, delta, strict=True):
            (part,) = vmap(vjp(as_function(call), self.own)[1])(tuple(cotangent))
            found = {name: found[name] + part[name] if found else part[name] for name in part}
        return found

    def tangent(self, calls: Sequence[Call], delta: Outputs) -> Outputs:
        """See Rule: the module's jvp along its direction."""
        moved = preconditioned(self.direction(calls, delta), self.P)

        def along(call: Call) -> list[Tensor]:
            return list(vmap(lambda d: jvp(as_function(call), (self.own,), (d,))[1])(moved))

        return [along(call) for call in self.calls]
