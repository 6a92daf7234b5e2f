"""What a module rule is: what one module's own parameters do to its output on the observed side.

The update token l moves a module's parameters by the direction Ẇ_l = Σ_s (∂output_s/∂θ)ᵀ δ_{l,s}, δ_{l,s} the cotangent at the
module's output at position s of the updated sequence. A rule holds the module's calls on the observed side and answers

    tangent          E_l = ∂output/∂θ · P Ẇ_l at the observed calls' outputs, without writing Ẇ_l down where it need not be
    direction        Ẇ_l itself, for a module with few parameters: <Ẇ_m, P Ẇ_l> is then an inner product of directions
    outer_products   Ẇ_l as one outer product a δᵀ, for a token whose cotangent is at its own position alone

Calls may be of several sequences side by side (`Call.sequences`, B of them). Cotangents [b, ...] then carry b tokens of each
sequence, and answers have a row for every token: b B of them, those of one cotangent next to each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call

from ...model.calls import Call, floats
from ...model.forward_ad import with_modes
from ..products import Direction

Outputs = list[list[Tensor]]  # per call, per tensor it returns: [b, *shape]


class OuterProduct(NamedTuple):
    """A direction a δᵀ of some tokens each.

    Attributes:
        a, delta: the factors, a row for each token.
        tokens: which tokens these are; None for all.
    """

    a: Float[Tensor, "N p"]
    delta: Float[Tensor, "N q"]
    tokens: Int[Tensor, " N"] | None = None

    @classmethod
    def joined(cls, parts: Sequence[OuterProduct]) -> OuterProduct:
        """Those of several runs of tokens as one."""
        a, delta, tokens = zip(*parts, strict=True)
        return cls(torch.cat(a), torch.cat(delta), None if tokens[0] is None else torch.cat(tokens))


OuterProducts = list[OuterProduct]


class Rule(ABC):
    """A module's rule from its calls on the observed side; the defaults are those of a module of no special kind.

    Attributes:
        label: what a result's coverage calls it.
        shapes: of each tensor that each observed call returns.
        size: elements of a parameter direction.
        scratch: elements of a direction that `tangent` materialises, else 0.
        modules: how many modules it stands for.
        can_fuse: whether the module may be one of several that are fused (fused.py).
        has_outer_products: whether `outer_products` gives anything.
        tells_sequences: whether it tells the sequences of a batch apart; else it is given calls of one sequence alone.
    """

    label = ""
    modules = 1
    can_fuse = False
    has_outer_products = False
    tells_sequences = False

    def __init__(self, calls: Sequence[Call], size: int, scratch: int = 0) -> None:
        self.shapes = [[x.shape for x in call.outputs] for call in calls]
        self.size, self.scratch = size, scratch

    def prefers_direction(self, narrow: float) -> bool:
        """Whether to work with directions rather than cotangents, for a matrix if it has fewer inputs than `narrow`."""
        return False

    @abstractmethod
    def direction(self, calls: Sequence[Call], delta: Outputs) -> Direction:
        """Ẇ of each token, [b B, *parameter] by parameter, without P."""

    @abstractmethod
    def tangent(self, calls: Sequence[Call], delta: Outputs) -> Outputs:
        """E [b B, *output] at the output of each observed call, from the updated calls and the cotangents at their outputs."""

    def direction_into(self, calls: Sequence[Call], delta: Outputs, out: Float[Tensor, "c size"]) -> None:
        """`direction` written where it is wanted, as `flat` lays it out."""
        out.copy_(flat(self.direction(calls, delta)))

    def tangent_into(self, calls: Sequence[Call], delta: Outputs, outs: Outputs) -> None:
        """`tangent` written where it is wanted."""
        for tangents, of in zip(self.tangent(calls, delta), outs, strict=True):
            for tangent, out in zip(tangents, of, strict=True):
                out.copy_(tangent)

    @property
    def terms(self) -> Sequence[tuple[Rule, Tensor | None]]:
        """Rules and slopes A_i (None for 1) with E = Σ_i A_i ⊙ E_i. <δ, A ⊙ E> = <A ⊙ δ, E>, and there are fewer δ than E."""
        return [(self, None)]

    def of_term(self, i: int, calls: Sequence[Call], delta: Outputs) -> tuple[Sequence[Call], Outputs]:
        """What the rule of term i takes E_i from."""
        return calls, delta

    def outer_products(
        self, call: Call, delta: Sequence[Float[Tensor, "T ..."]], at: Int[Tensor, " N"], preconditioned: bool
    ) -> OuterProducts:
        """Of tokens with a cotangent at their own position alone: <Ẇ_m, P Ẇ_l> = Σ over the list of (a_m·a_l) (δ_m·δ_l).

        Args:
            call: of the side that the tokens are on.
            delta: the cotangents at each of its outputs, all positions one after the other.
            at: the tokens' positions.
            preconditioned: whether these are P Ẇ_l.
        """
        return []


def flat(direction: Direction) -> Float[Tensor, "n K"]:
    """The numbers of a batch of directions, parameters side by side in alphabetic order."""
    return cat([direction[name].flatten(1) for name in sorted(direction)], 1)


def own_parameters(call: Call) -> dict[str, Tensor]:
    """The parameters that belong to a call's module itself."""
    return {name: p.detach() for name, p in call.module.named_parameters(recurse=False)}


def trained_elements(call: Call, moves: set[str]) -> int:
    """Elements of a module that are trained."""
    return sum(call.module.get_parameter(name).numel() for name in moves)


def as_function(call: Call) -> Callable[[dict[str, Tensor]], tuple[Tensor, ...]]:
    """What a call returns as a function of the module's parameters, named from the module."""

    def returned(own: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with with_modes():
            found = floats(functional_call(call.module, own, call.args, call.kwargs))
        return tuple(call.for_each_of(x, like=y) for x, y in zip(found, call.outputs, strict=True))

    return returned


def flat_inputs(calls: Sequence[Call]) -> Float[Tensor, "B S p"]:
    """The first input of every call, all positions of a sequence one after the other."""
    return cat([call.by_sequence(call.inputs[0]) for call in calls], 1)


def flat_cotangents(calls: Sequence[Call], delta: Outputs) -> Float[Tensor, "b B S q"]:
    """The cotangents at the one output of every call, all positions of a sequence one after the other."""
    return cat([x.reshape(len(x), call.sequences, -1, x.shape[-1]) for call, (x,) in zip(calls, delta, strict=True)], 2)


def cat(parts: list[Tensor], dim: int) -> Tensor:
    """torch.cat, which copies even a single tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def is_close(value: Tensor, expected: Tensor, relative: float = 1e-3) -> bool:
    """Whether two outputs agree to `relative`, or to a few roundings where that is more."""
    relative = max(relative, 10 * torch.finfo(expected.dtype).eps)
    return value.shape == expected.shape and float((value - expected).norm()) <= relative * float(expected.norm()) + 1e-12
