"""Stacks of experts (Mixtral, Qwen-MoE, DeepSeek, gpt-oss): for each expert the outer products of the tokens routed to it.

    Ẇ1[e] = Σ δh_r x_rᵀ,  Ẇ2[e] = Σ δy_r g_rᵀ,   δy_r = w_r δ_s,  δh_r = gate'(h_r) ⊙ (W2[e]ᵀ δy_r)      over the routes r to e
    E_t = Σ w_r (Ẇ2[e] g_r + W2[e] (gate'(h_r) ⊙ Ẇ1[e] x_r))                                             over the routes r of t

Ẇ1[e] x_r = Σ_r' δh_r' (x_r'·x_r), which takes a Gram matrix of inputs for each expert. See routes.py for the letters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...model.calls import Call
from ..products import Direction, preconditioned
from .base import OuterProduct, OuterProducts, Outputs, Rule, trained_elements
from .routes import Routes, Stack

PIECE = 32 << 20  # bytes of what moves at the routes of an observed call, of so many cotangents at a time


class Experts(Rule):
    """Two matrices for each expert, with biases or without; some experts may move alone (divided.single_experts)."""

    label = "outer product by expert"
    tells_sequences = True

    def __init__(self, calls: Sequence[Call], moves: set[str], P: Direction | None, stack: Stack) -> None:
        size = trained_elements(calls[0], moves)
        self.alone = None if P is None else _alone(P)
        P = P if self.alone is None else None
        super().__init__(calls, size, scratch=0 if P is None else size)
        self.stack, self.moves, self.P = stack, moves, P
        self.observed = [Routes.of(stack, call) for call in calls]
        self.has_outer_products = P is None

    def direction(self, calls: Sequence[Call], delta: Outputs) -> Direction:
        """The step of the whole stack, [b B, E, …] by parameter, in its layout."""
        b, B = len(delta[0][0]), calls[0].sequences
        found = {name: delta[0][0].new_zeros(b, B, *self._parameter(name).shape) for name in self.moves}
        for call, (d,) in zip(calls, delta, strict=True):
            for weight, bias, left, right, routes in self._factors(call, d):
                for e, k, rows in routes.pieces:
                    if weight in found:
                        step = torch.einsum("rbq,rp->bqp", left[rows], right[rows])
                        found[weight][:, k, e] += step.mT if self.stack.transposed else step
                    if bias in found:
                        found[bias][:, k, e] += left[rows].sum(0)
        return {name: x.flatten(0, 1) for name, x in found.items()}

    def tangent(self, calls: Sequence[Call], delta: Outputs) -> Outputs:
        """See Rule."""
        if self.P is not None:
            W = preconditioned(self.direction(calls, delta), self.P)
            return self._shaped([self._returned(o, *self._along(o, W)) for o in self.observed])
        found = []
        for o in self.observed:
            of_one = calls[0].sequences * len(o.h) * (o.h.shape[1] + o.x.shape[1]) * o.h.itemsize
            parts = zip(*(d.split(max(1, PIECE // of_one)) for (d,) in delta), strict=True)
            found.append(torch.cat([self._at_output(o, calls, part) for part in parts]))
        return self._shaped(found)

    def _at_output(self, o: Routes, calls: Sequence[Call], delta: Sequence[Float[Tensor, "b ... d"]]) -> Float[Tensor, "c N d"]:
        """E [b B, N, d] at an observed call of some of the cotangents."""
        b, B = len(delta[0]), calls[0].sequences
        moved = [o.h.new_zeros(len(o.h), B, b, n) for n in (o.h.shape[1], o.x.shape[1])]
        for call, d in zip(calls, delta, strict=True):
            self._add_moved(o, call, d, moved)
        E = self._returned(o, *(x.flatten(1, 2) for x in moved))
        return E.unflatten(0, (B, b)).transpose(0, 1).flatten(0, 1)

    def _shaped(self, E: Sequence[Float[Tensor, "c N d"]]) -> Outputs:
        """As the observed calls return it."""
        return [[e.reshape(-1, *shape)] for e, (shape,) in zip(E, self.shapes, strict=True)]

    def outer_products(
        self, call: Call, delta: Sequence[Float[Tensor, "T ..."]], at: Int[Tensor, " N"], preconditioned: bool
    ) -> OuterProducts:
        """See Rule: those of each expert, between the tokens routed to it."""
        found: OuterProducts = []
        number = torch.full((len(delta[0]),), -1, dtype=torch.long, device=at.device)
        number[at] = torch.arange(len(at), device=at.device)
        for weight, bias, left, right, routes in self._factors(call, delta[0][None]):
            spans, rows = dict(routes.spans), number[routes.token]
            for e in range(len(self._parameter(weight))):
                span = spans.get(e, slice(0, 0)) if self._moves(e) else slice(0, 0)
                of = (rows[span] >= 0).nonzero().flatten() + span.start
                a, d = right[of], left[of, 0]
                pairs = ((weight, a), (bias, torch.ones_like(a[:, :1])))
                found += [OuterProduct(x, d, rows[of]) for name, x in pairs if name in self.moves]
        return found

    def _moves(self, e: int) -> bool:
        return self.alone is None or e in self.alone

    def _parameter(self, name: str) -> Tensor:
        return self.observed[0].parameters[name]

    def _factors(
        self, call: Call, delta: Float[Tensor, "b ... d"]
    ) -> Iterator[tuple[str, str | None, Float[Tensor, "R b q"], Float[Tensor, "R p"], Routes]]:
        """Of W1 and W2 with their biases: the cotangents behind and the inputs before them, at the routes of a call."""
        routes = Routes.of(self.stack, call)
        dy = routes.to_routes(delta.flatten(1, -2))
        if self.stack.up in self.moves or self.stack.up_bias in self.moves:
            yield self.stack.up, self.stack.up_bias, routes.hidden_cotangent(dy), routes.x[routes.token], routes
        if self.stack.down in self.moves or self.stack.down_bias in self.moves:
            yield self.stack.down, self.stack.down_bias, dy, routes.g, routes

    def _add_moved(self, o: Routes, call: Call, delta: Float[Tensor, "b ... d"], moved: list[Tensor]) -> None:
        """Add Ẇ x + ḃ at h and at y of the observed routes, from the cotangents at an updated call."""
        theirs = dict(o.spans)
        for weight, bias, left, right, routes in self._factors(call, delta):
            is_up = weight == self.stack.up
            inputs, out = (o.x[o.token], moved[0]) if is_up else (o.g, moved[1])
            for e, k, rows in routes.pieces:
                if e not in theirs or not self._moves(e):
                    continue
                d = left[rows].flatten(1)  # [r, b q]
                at = out[theirs[e], k].flatten(1)
                if weight in self.moves:
                    add_gram_product(at, inputs[theirs[e]], right[rows], d)
                if bias in self.moves:
                    at += d.sum(0)

    def _along(self, o: Routes, W: Direction) -> tuple[Float[Tensor, "R b h"], Float[Tensor, "R b d"]]:
        """Ẇ x + ḃ at h and at y of the observed routes, Ẇ written down."""
        found = []
        b = len(next(iter(W.values())))
        for weight, bias, x, width in (
            (self.stack.up, self.stack.up_bias, o.x[o.token], o.h.shape[1]),
            (self.stack.down, self.stack.down_bias, o.g, o.x.shape[1]),
        ):
            out = x.new_zeros(len(x), b, width)
            for e, rows in o.spans:
                if weight in W:
                    step = W[weight][:, e] if self.stack.transposed else W[weight][:, e].mT  # [b, p, q]
                    out[rows] += torch.matmul(x[rows], step).transpose(0, 1)
                if bias in W:
                    out[rows] += W[bias][:, e]
            found.append(out)
        return found[0], found[1]

    def _returned(self, o: Routes, dh: Float[Tensor, "R b h"], dy: Float[Tensor, "R b d"]) -> Float[Tensor, "b N d"]:
        """What the stack returns moves like this when h and y do."""
        dg = self.stack.from_hidden(dh.mul_(o.slope[:, None]))
        for e, rows in o.spans:
            torch.addmm(dy[rows].flatten(0, 1), dg[rows].flatten(0, 1), o.down[e].T, out=dy[rows].flatten(0, 1))
        return o.to_tokens(dy.mul_(o.weight[:, None, None]))


def _alone(P: Direction) -> frozenset[int] | None:
    """The experts that move under a P that is 1 for those and 0 for the others, expanded; None for another P."""
    if any(any(p.stride()[1:]) for p in P.values()):
        return None
    numbers = torch.stack([p.flatten(1)[:, 0] for p in P.values()])
    one = numbers[0].eq(1)
    return frozenset(one.nonzero().flatten().tolist()) if bool((numbers == one.to(numbers)).all()) else None


def add_gram_product(
    out: Float[Tensor, "N c"], x: Float[Tensor, "N p"], a: Float[Tensor, "S p"], d: Float[Tensor, "S c"]
) -> None:
    """Add (x aᵀ) d to out, in the order that takes fewer multiplications."""
    (N, p), S, c = x.shape, len(a), d.shape[1]
    if N * S * (p + c) <= p * c * (N + S):
        torch.addmm(out, x @ a.T, d, out=out)
    else:
        torch.addmm(out, x, a.T @ d, out=out)
