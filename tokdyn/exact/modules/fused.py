"""Linear layers fused by one elementwise product (a gated MLP's gate and up): the product's cotangent stands for both.

    w = f(y_1, ..., y_k) elementwise, all that the y_i act on     =>     δ_{y_i} = A_i ⊙ δ_w,   A_i = ∂w/∂y_i
    what the parameters behind all y_i do to w together:                    E = Σ_i A_i ⊙ E_i

One cotangent is kept instead of several, and met once. Which layers they are is seen in a random cotangent
(tokdyn/exact/sweep/fuse.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...model.calls import Call, FusedCall
from ...model.unroll import Place
from ..products import Direction
from .base import OuterProducts, Outputs, Rule
from .linear import Linear


class Fused(Rule):
    """The layers of a fusion, each by its own rule: E_l = Σ_i A_i ⊙ E_{l,i}, E_{l,i} from δ_i = A_i ⊙ δ."""

    label = Linear.label
    tells_sequences = True

    def __init__(self, call: FusedCall, parts: Sequence[Linear]) -> None:
        super().__init__([call], size=sum(part.size for part in parts))
        self.parts, self.slopes, self.modules = parts, [A for _, A in call.parts], len(parts)
        self.has_outer_products = all(rule.has_outer_products for rule in parts)

    def direction(self, calls: Sequence[Call], delta: Outputs) -> Direction:
        """The direction of each layer's parameters, named by the layer's number."""
        (whole,), ((d,),) = calls, delta
        assert isinstance(whole, FusedCall)
        own = enumerate(zip(self.parts, whole.parts, strict=True))
        return {f"{i}.{k}": x for i, (rule, (call, A)) in own for k, x in rule.direction([call], [[A * d]]).items()}

    def tangent(self, calls: Sequence[Call], delta: Outputs) -> Outputs:
        """See Rule."""
        of = (rule.tangent(*self.of_term(i, calls, delta))[0][0] * A for i, (rule, A) in enumerate(self.terms))
        return [[sum(of, delta[0][0].new_zeros(()))]]

    @property
    def terms(self) -> Sequence[tuple[Rule, Tensor]]:
        """See Rule: the layers, with ∂w/∂y_i on the observed side."""
        return list(zip(self.parts, self.slopes, strict=True))

    def of_term(self, i: int, calls: Sequence[Call], delta: Outputs) -> tuple[Sequence[Call], Outputs]:
        """See Rule: δ_i = A_i ⊙ δ."""
        (whole,), ((d,),) = calls, delta
        assert isinstance(whole, FusedCall)
        call, A = whole.parts[i]
        return [call], [[A * d]]

    def outer_products(
        self, call: Call, delta: Sequence[Float[Tensor, "T ..."]], at: Int[Tensor, " N"], preconditioned: bool
    ) -> OuterProducts:
        """See Rule: those of all layers."""
        assert isinstance(call, FusedCall)
        own = zip(self.parts, call.parts, strict=True)
        return [x for rule, (of, A) in own for x in rule.outer_products(of, [delta[0] * A.flatten(0, -2)], at, preconditioned)]


class _Elementwise(torch.autograd.Function):
    """w as it is, with its derivative by the tensors it is made of: they and their functions are needed no more."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, slopes: tuple[Tensor, ...], *ys: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*slopes)
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return None, None, *(slope * g for slope in ctx.saved_tensors)


@dataclass(frozen=True)
class Fusion:
    """A place where a tensor w is given to a module, and the layers whose outputs y_i it is made of."""

    place: Place
    modules: tuple[str, ...]

    @property
    def name(self) -> str:
        """The layers' names, joined: the name under which their one rule is kept."""
        return " + ".join(self.modules)

    def __call__(self, w: Tensor, calls: list[Call]) -> Tensor:
        """Put one joined call into `calls` in place of the layers', and return w with its derivative in closed form.

        A graph that begins behind one of them keeps w and the calls as they are.
        """
        mine = [call for call in calls if call.name in self.modules]
        if len(mine) < len(self.modules):
            return w
        ys = [call.output for call in mine]
        slopes = torch.autograd.grad(w, ys, torch.ones_like(w))
        whole = _Elementwise.apply(w.detach().reshape(ys[0].shape), slopes, *ys)  # w may have its positions one after the other
        parts, first = tuple(zip(mine, slopes, strict=True)), mine[0]
        joined = FusedCall(self.name, first.module, (), {}, whole, first.sequences, first.length, parts)
        calls[:] = [joined if call is first else call for call in calls if call is first or call.name not in self.modules]
        return whole.view_as(w)
