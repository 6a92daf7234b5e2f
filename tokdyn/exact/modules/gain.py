"""A norm's elementwise gain (weight, or 1 + weight) and shift: E_l = (Σ_s δ_{l,s} ⊙ â_s) ⊙ b̂ + Σ_s δ_{l,s}."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...model.calls import Call
from ..products import Direction
from ..products import preconditioned as under
from .base import OuterProduct, OuterProducts, Outputs, Rule, as_function, cat, is_close, own_parameters, trained_elements
from .linear import random_parameters


class Gain(Rule):
    """A vector that multiplies the normalised input â, and one that is added."""

    label = "elementwise gain"
    tells_sequences = True

    def __init__(self, calls: Sequence[Call], moves: set[str], P: Direction | None = None) -> None:
        super().__init__(calls, trained_elements(calls[0], moves))
        self.moves, self.P, self.calls = moves, P, calls
        self.weight_shape = own_parameters(calls[0])["weight"].shape
        self.has_outer_products = len(self.weight_shape) == 1  # a vector as wide as the output

    def prefers_direction(self, narrow: float) -> bool:
        """See Rule: always, a vector."""
        return True

    def direction(self, calls: Sequence[Call], delta: Outputs) -> Direction:
        """Σ_s δ_s ⊙ â_s and Σ_s δ_s."""
        wide = self.weight_shape
        d = cat([x.reshape(len(x), call.sequences, -1, *wide) for call, (x,) in zip(calls, delta, strict=True)], 2)
        found = {}
        if "weight" in self.moves:
            a = cat([_normalised(call).reshape(call.sequences, -1, *wide) for call in calls], 1)
            found["weight"] = (d * a).sum(2).flatten(0, 1)
        if "bias" in self.moves:
            found["bias"] = d.sum(2).flatten(0, 1)
        return found

    def tangent(self, calls: Sequence[Call], delta: Outputs) -> Outputs:
        """See Rule."""
        moved = under(self.direction(calls, delta), self.P)
        E = []
        for call in self.calls:
            x = _normalised(call)
            wide = (-1, *(1,) * (x.dim() - len(self.weight_shape)), *self.weight_shape)
            e = moved["weight"].view(wide) * x if "weight" in moved else torch.zeros_like(x)
            e = e + moved["bias"].view(wide) if "bias" in moved else e
            E.append([e])
        return E

    def outer_products(
        self, call: Call, delta: Sequence[Float[Tensor, "T ..."]], at: Int[Tensor, " N"], preconditioned: bool
    ) -> OuterProducts:
        """See Rule: as outer products with the scalar a = 1."""
        d = delta[0][at]
        one = torch.ones_like(d[:, :1])
        found = {"weight": d * _normalised(call).reshape(-1, *self.weight_shape)[at], "bias": d}
        found = {name: x for name, x in found.items() if name in self.moves}
        return [OuterProduct(one, x) for x in under(found, self.P if preconditioned else None).values()]


@torch.no_grad()
def _normalised(call: Call) -> Tensor:
    """∂output/∂weight of a module that is elementwise affine in its weight, in the layout of its output: f(1) - f(0)."""
    if "normalised" not in call.memo:
        f, nothing = as_function(call), {name: torch.zeros_like(p) for name, p in own_parameters(call).items()}
        call.memo["normalised"] = f(nothing | {"weight": torch.ones_like(nothing["weight"])})[0] - f(nothing)[0]
    return call.memo["normalised"]  # type: ignore[no-any-return]


def is_gain(call: Call) -> bool:
    """Whether output = n(x) ⊙ (weight or 1 + weight) + bias, n independent of both."""
    own = own_parameters(call)
    if "weight" not in own or set(own) - {"weight", "bias"} or call.output.shape[-own["weight"].dim() :] != own["weight"].shape:
        return False
    f, n, shift = as_function(call), _normalised(call), random_parameters(call)
    moved = f({name: p + shift[name] for name, p in own.items()})[0] - f(own)[0]
    return is_close(moved, n * shift["weight"] + shift.get("bias", torch.zeros_like(shift["weight"])))
