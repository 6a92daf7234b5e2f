"""Linear layers y = W a + bias (nn.Linear, Conv1D, …): E_l = δ_lᵀ S, S[s,t] = a_s·a'_t (+ 1 if the bias is trained).

a are the inputs on the updated side, a' those on the observed side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...model.calls import Call
from ..products import Direction, preconditioned
from .base import (
    OuterProduct,
    OuterProducts,
    Outputs,
    Rule,
    as_function,
    flat_cotangents,
    flat_inputs,
    is_close,
    own_parameters,
    trained_elements,
)


class Linear(Rule):
    """A matrix and a bias, one of them or both moving."""

    label = "outer product"
    tells_sequences = True

    def __init__(self, calls: Sequence[Call], moves: set[str], P: Direction | None = None) -> None:
        size = trained_elements(calls[0], moves)
        super().__init__(calls, size, scratch=0 if P is None else size)
        self.observed_inputs = [call.inputs[0].flatten(0, -2) for call in calls]
        self.moves, self.P = moves, P
        self.is_transposed = type(calls[0].module) is not nn.Linear and P is not None and _is_transposed(calls[0])
        self.can_fuse = self.has_outer_products = P is None  # a preconditioner couples a and δ

    def prefers_direction(self, narrow: float) -> bool:
        """See Rule."""
        return self.P is not None or "weight" not in self.moves or self.observed_inputs[0].shape[1] < narrow

    def direction(self, calls: Sequence[Call], delta: Outputs) -> Direction:
        """Σ_s δ_s a_sᵀ and Σ_s δ_s, in the layout of the parameters."""
        a, d = flat_inputs(calls), flat_cotangents(calls, delta)
        found = {}
        if "weight" in self.moves:
            W = d.new_empty(*d.shape[:2], *self._shape(a, d))
            self._weight_into(a, d, W)
            found["weight"] = W.flatten(0, 1)
        if "bias" in self.moves:
            found["bias"] = d.sum(2).flatten(0, 1)
        return found

    def direction_into(self, calls: Sequence[Call], delta: Outputs, out: Float[Tensor, "c size"]) -> None:
        """See Rule."""
        a, d = flat_inputs(calls), flat_cotangents(calls, delta)
        if a.dtype != out.dtype or d.dtype != out.dtype:
            return super().direction_into(calls, delta, out)
        rows, start = out.unflatten(0, d.shape[:2]), 0
        if "bias" in self.moves:  # the first in alphabetic order
            torch.sum(d, 2, out=rows[..., : (start := d.shape[3])])
        if "weight" in self.moves:
            self._weight_into(a, d, rows[..., start:].unflatten(-1, self._shape(a, d)))

    def _shape(self, a: Float[Tensor, "B S p"], d: Float[Tensor, "b B S q"]) -> tuple[int, int]:
        """Of the weight."""
        return (a.shape[2], d.shape[3]) if self.is_transposed else (d.shape[3], a.shape[2])

    def _weight_into(self, a: Float[Tensor, "B S p"], d: Float[Tensor, "b B S q"], W: Float[Tensor, "b B ..."]) -> None:
        """Σ_s δ_s a_sᵀ of each token."""
        for k, x in enumerate(a):  # a batched product of one factor expanded over b would copy it
            x = x.expand(len(d), *x.shape)
            left, right = (x.mT, d[:, k]) if self.is_transposed else (d[:, k].mT, x)
            torch.bmm(left, right, out=W[:, k])

    def tangent(self, calls: Sequence[Call], delta: Outputs) -> Outputs:
        """See Rule."""
        if self.P is not None:
            W = preconditioned(self.direction(calls, delta), self.P)
            E = [delta[0][0].new_zeros(()) for _ in self.observed_inputs]
            if "weight" in W:
                E = [torch.matmul(x, W["weight"] if self.is_transposed else W["weight"].mT) for x in self.observed_inputs]
            if "bias" in W:
                E = [e + W["bias"][:, None] for e in E]
        else:
            a, d = flat_inputs(calls), flat_cotangents(calls, delta)
            E = [self._moved(a, d, x) for x in self.observed_inputs]
        return [
            [e.expand(-1, len(x), -1).reshape(-1, *shape)]
            for e, x, (shape,) in zip(E, self.observed_inputs, self.shapes, strict=True)
        ]

    def tangent_into(self, calls: Sequence[Call], delta: Outputs, outs: Outputs) -> None:
        """See Rule: E = δᵀ S in one product a sequence into `outs`, where the weight moves without a preconditioner."""
        # a head may be wider than its body
        other = any(out.dtype != x.dtype for x, (out,) in zip(self.observed_inputs, outs, strict=True))
        if self.P is not None or "weight" not in self.moves or other:
            return super().tangent_into(calls, delta, outs)
        a, d = flat_inputs(calls), flat_cotangents(calls, delta)
        for x, (out,) in zip(self.observed_inputs, outs, strict=True):
            for k, inputs in enumerate(a):
                torch.bmm(self._gram(x, inputs).expand(len(d), -1, -1), d[:, k], out=out.view(*d.shape[:2], len(x), -1)[:, k])

    def outer_products(
        self, call: Call, delta: Sequence[Float[Tensor, "T ..."]], at: Int[Tensor, " N"], preconditioned: bool
    ) -> OuterProducts:
        """See Rule."""
        a, d = call.inputs[0].flatten(0, -2)[at], delta[0][at]
        return [OuterProduct(x, d) for name, x in (("weight", a), ("bias", torch.ones_like(a[:, :1]))) if name in self.moves]

    def _moved(self, a: Float[Tensor, "B S p"], d: Float[Tensor, "b B S q"], x: Float[Tensor, "N p"]) -> Tensor:
        (_, S, p), N = a.shape, len(x)
        if "weight" not in self.moves:
            return d.sum(2).flatten(0, 1)[:, None]
        if S * N <= 3 * (S + N) * p:  # S costs (p + b q) S N; a written direction b p q (S + N)
            E = d.new_empty(*d.shape[:2], N, d.shape[3])
            for k, inputs in enumerate(a):
                torch.bmm(self._gram(x, inputs).expand(len(d), -1, -1), d[:, k], out=E[:, k])
            return E.flatten(0, 1)
        moved = torch.matmul(x, torch.matmul(a.mT, d)).flatten(0, 1)
        return moved + d.sum(2).flatten(0, 1)[:, None] if "bias" in self.moves else moved

    def _gram(self, x: Float[Tensor, "N p"], a: Float[Tensor, "S p"]) -> Float[Tensor, "N S"]:
        gram = x @ a.T
        return gram + 1 if "bias" in self.moves else gram


def is_linear(call: Call) -> bool:
    """Whether output = W a + b or Wᵀ a + b, seen on random parameters."""
    if type(call.module) is nn.Linear:
        return True
    own, a = random_parameters(call), call.inputs[0]
    W = own.get("weight")
    if W is None or W.dim() != 2 or set(own) - {"weight", "bias"} or not a.is_floating_point() or a.shape[-1] not in W.shape:
        return False
    (output,) = as_function(call)(own)
    bias = own.get("bias", torch.zeros(()).to(a))
    return any(a.shape[-1] == X.shape[0] and is_close(output, a @ X + bias) for X in (W.T, W))


def _is_transposed(call: Call) -> bool:
    """Whether a linear module computes a W rather than a Wᵀ."""
    own, a = random_parameters(call), call.inputs[0]
    (output,) = as_function(call)(own)
    W = own["weight"]
    return a.shape[-1] == W.shape[0] and is_close(output, a @ W + own.get("bias", torch.zeros(()).to(a)))


def random_parameters(call: Call) -> dict[str, Tensor]:
    """Random numbers in place of a module's own parameters, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(p.shape, generator=generator).to(p) for name, p in own_parameters(call).items()}
