"""A stack of experts as a function of the tokens routed to each: its form, found by measuring, its derivative in closed form.

    h_r = W1[e_r] x_{s_r} + b1[e_r],  g_r = gate(h_r),  y_r = W2[e_r] g_r + b2[e_r],  output_s = Σ_{r of s} w_r y_r

A route r is a token s with one of the experts e chosen for it. Routes are sorted by expert, so that each expert's are rows of
one matrix product, and what a token gives or takes is gathered from them: no order of tokens is assumed, nor that they are one
sequence's. Many cotangents or tangents at once are the second axis of [R, b, width], so that an expert's rows are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations, product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...model.calls import Call
from .base import as_function, is_close, own_parameters

Gate = Callable[[Tensor], Tensor]
Span = tuple[int, slice]  # an expert that tokens were routed to, and its routes
Piece = tuple[int, int, slice]  # an expert, a sequence, and the routes from one to the other


class Given(NamedTuple):
    """What a stack is given: tokens, the experts chosen for each, and their weights."""

    x: Float[Tensor, "N d"]
    chosen: Int[Tensor, "N k"]
    weight: Float[Tensor, "N k"]

    @classmethod
    def of(cls, call: Call) -> Given | None:
        """The three tensors of a call, whatever their order."""
        chosen = [x for x in call.inputs if not x.is_floating_point() and x.dim() == 2]
        others = [x for x in call.inputs if x.is_floating_point() and x.dim() == 2]
        weights = [x for x in others if chosen and x.shape == chosen[0].shape]
        if len(call.inputs) != 3 or len(chosen) != 1 or len(others) != 2 or not weights or len(others[0]) != len(others[1]):
            return None
        (x,) = (x for x in others if x is not weights[-1])
        return cls(x, chosen[0], weights[-1])


@dataclass(frozen=True)
class Stack:
    """Which parameters of a module are W1, b1, W2 and b2, and how they are laid out.

    Attributes:
        up, up_bias, down, down_bias: names of W1 [E, h, d], b1 [E, h], W2 [E, d, g], b2 [E, d]; None where there is no bias.
        transposed: whether W1 is [E, d, h] and W2 [E, g, d].
        paired: how the numbers of h meet in the gate: "halves" (h_i and h_{g+i}), "neighbours" (h_{2i} and h_{2i+1}) or ""
            (each alone).
        gate: h -> g, on rows of any number.
    """

    up: str
    up_bias: str | None
    down: str
    down_bias: str | None
    transposed: bool
    paired: str
    gate: Gate

    @property
    def names(self) -> list[str]:
        """Of all its parameters."""
        return [name for name in (self.up, self.up_bias, self.down, self.down_bias) if name is not None]

    def to_hidden(self, g: Float[Tensor, "*n g"]) -> Float[Tensor, "*n h"]:
        """What stands at g, at every number of h that makes it."""
        if not self.paired:
            return g
        return torch.cat([g, g], -1) if self.paired == "halves" else g.repeat_interleave(2, -1)

    def from_hidden(self, h: Float[Tensor, "*n h"]) -> Float[Tensor, "*n g"]:
        """The transpose of `to_hidden`: sums over the numbers of h that make one of g."""
        if not self.paired:
            return h
        one, other = h.chunk(2, -1) if self.paired == "halves" else (h[..., ::2], h[..., 1::2])
        return one + other

    def slope(self, h: Float[Tensor, "*n h"]) -> Float[Tensor, "*n h"]:
        """∂g/∂h: each number of h acts on one number of g."""
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            return torch.autograd.grad(self.gate(h).sum(), h)[0]

    def __call__(self, call: Call) -> Tensor:
        """The call's output with its derivative by tokens and weights in closed form."""
        given = Given.of(call)
        assert given is not None
        return _Pulled.apply(given.x, given.weight, call.output.detach(), Routes.of(self, call))

    @classmethod
    def seen(cls, call: Call) -> Stack | None:
        """The form of a module, seen on its own inputs, random biases and a random cotangent; None if it is no such stack."""
        given, own = Given.of(call), own_parameters(call)
        if given is None or not isinstance(call.output, Tensor) or call.output.shape != given.x.shape or not len(given.x):
            return None
        generator = torch.Generator().manual_seed(0)
        biases = {name: torch.randn(p.shape, generator=generator).to(p) for name, p in own.items() if p.dim() < 3}
        for form in cls._candidates(call.module, own, given.x.shape[1]):
            if form._computes(call, own | biases):  # biases may be 0, as they began
                return form
        return None

    @classmethod
    def _candidates(cls, module: nn.Module, own: Mapping[str, Tensor], d: int) -> Iterator[Stack]:
        """All assignments of the module's parameters whose shapes fit."""
        stacks, biases = ([name for name, p in own.items() if p.dim() == dim] for dim in (3, 2))
        gates = [g for g in (getattr(module, name, None) for name in ("_apply_gate", "act_fn")) if callable(g)]
        if len(stacks) != 2 or len(biases) not in (0, 2) or len(own) != len(stacks) + len(biases):
            return
        forms = product(permutations(stacks), permutations(biases), (False, True), ("halves", "neighbours", ""), gates)
        for (up, down), of, transposed, paired, gate in forms:
            b1, b2 = of or (None, None)
            (E, h, p), (F, q, g) = (x.mT.shape if transposed else x.shape for x in (own[up], own[down]))
            fits = (E, p, q, h) == (F, d, d, 2 * g if paired else g)
            if fits and [own[name].shape for name in of] == [(E, h), (E, d)][: len(of)]:
                yield cls(up, b1, down, b2, transposed, paired, gate)

    @torch.no_grad()
    def _computes(self, call: Call, parameters: dict[str, Tensor]) -> bool:
        """Whether the module computes this with these parameters: its output, and its derivative by tokens and weights."""
        given = Given.of(call)
        assert given is not None
        routes = Routes.made(self, given, parameters)
        try:
            fits = routes.g.shape == (len(routes.token), routes.down.shape[2])
        except (RuntimeError, TypeError):  # a function of something else
            return False
        (expected,) = as_function(call)(parameters)
        if not fits or not is_close(routes.output().to(expected), expected):
            return False
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(expected.shape, generator=generator).to(expected)
        with torch.enable_grad():
            leaves = {id(x): x.detach().requires_grad_() for x in (given.x, given.weight)}
            (y,) = as_function(_replaced(call, leaves))(parameters)
            if not y.requires_grad:
                return False
            truth = torch.autograd.grad(y, list(leaves.values()), cotangent, materialize_grads=True)
        found = routes.pull(cotangent[None])
        return all(is_close(mine[0].to(theirs), theirs) for mine, theirs in zip(found, truth, strict=True))


def _replaced(call: Call, others: Mapping[int, Tensor]) -> Call:
    """The call with other tensors in place of those with these ids."""
    args = tuple(others.get(id(x), x) for x in call.args)
    return replace(call, args=args, kwargs={name: others.get(id(x), x) for name, x in call.kwargs.items()})


@dataclass(frozen=True)
class Routes:
    """A call of a stack by its routes, sorted by expert; one to no expert of the stack has weight 0 and stands at the end.

    Attributes:
        stack: its form.
        parameters: its parameters.
        x: the tokens.
        token: of each route, [R].
        place: of each token's routes among the sorted ones, [N, k].
        pieces: the experts with tokens of each sequence, and their routes.
        weight: of each route, [R].
    """

    stack: Stack
    parameters: Mapping[str, Tensor]
    x: Float[Tensor, "N d"]
    token: Int[Tensor, " R"]
    place: Int[Tensor, "N k"]
    pieces: tuple[Piece, ...]
    weight: Float[Tensor, " R"]

    @classmethod
    def of(cls, stack: Stack, call: Call) -> Routes:
        """The routes of a call, with the module's own parameters."""
        if "routes" not in call.memo:
            given = Given.of(call)
            assert given is not None
            call.memo["routes"] = cls.made(stack, given, own_parameters(call), call.sequences)
        return call.memo["routes"]  # type: ignore[no-any-return]

    @classmethod
    @torch.no_grad()
    def made(cls, stack: Stack, given: Given, parameters: Mapping[str, Tensor], sequences: int = 1) -> Routes:
        """The routes of these tokens with these parameters, sequence after sequence."""
        (N, k), E = given.chosen.shape, len(parameters[stack.up])
        chosen, x = given.chosen.flatten(), given.x.detach()
        order = chosen.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(N * k, device=order.device)
        of = chosen.clamp(max=E) * sequences + torch.arange(N * k, device=order.device) // (N * k // sequences)
        pieces, start = list[Piece](), 0
        for n, count in enumerate(torch.bincount(of, minlength=(E + 1) * sequences)[: E * sequences].tolist()):
            if count:
                pieces.append((*divmod(n, sequences), slice(start, start + count)))
            start += count
        weight = given.weight.detach().flatten().masked_fill(chosen >= E, 0)[order]
        return cls(stack, parameters, x, order // k, place.view(N, k), tuple(pieces), weight)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The experts with tokens, and the routes of each."""
        found: dict[int, slice] = {}
        for e, _, rows in self.pieces:
            found[e] = slice(found[e].start if e in found else rows.start, rows.stop)
        return tuple(found.items())

    @property
    def up(self) -> Float[Tensor, "E h d"]:
        """W1, a row for each number of h."""
        W = self.parameters[self.stack.up]
        return W.mT if self.stack.transposed else W

    @property
    def down(self) -> Float[Tensor, "E d g"]:
        """W2, a row for each number of y."""
        W = self.parameters[self.stack.down]
        return W.mT if self.stack.transposed else W

    @cached_property
    def h(self) -> Float[Tensor, "R h"]:
        """Behind the first matrix."""
        return self.times(self.up, self.x[self.token][:, None], self.stack.up_bias)[:, 0]

    @cached_property
    def g(self) -> Float[Tensor, "R g"]:
        """Behind the gate."""
        return self.stack.gate(self.h)

    @cached_property
    def slope(self) -> Float[Tensor, "R h"]:
        """∂g/∂h."""
        return self.stack.slope(self.h)

    @cached_property
    def y(self) -> Float[Tensor, "R d"]:
        """What each expert makes of its tokens."""
        return self.times(self.down, self.g[:, None], self.stack.down_bias)[:, 0]

    def times(self, W: Float[Tensor, "E q p"], x: Float[Tensor, "R b p"], bias: str | None = None) -> Float[Tensor, "R b q"]:
        """W[e] x (+ bias[e]) of every route; 0 for one to no expert."""
        out = x.new_empty(*x.shape[:2], W.shape[1])
        for e, rows in self.spans:
            torch.mm(x[rows].flatten(0, 1), W[e].T, out=out[rows].flatten(0, 1))
            if bias is not None:
                out[rows] += self.parameters[bias][e]
        out[self.spans[-1][1].stop if self.spans else 0 :] = 0
        return out

    def to_routes(self, at_tokens: Float[Tensor, "b N d"]) -> Float[Tensor, "R b d"]:
        """What stands at the tokens, at their routes, times the routes' weights."""
        found = at_tokens.transpose(0, 1).index_select(0, self.token)
        return found.mul_(self.weight[:, None, None]).to(self.x.dtype)

    def to_tokens(self, at_routes: Float[Tensor, "R b d"]) -> Float[Tensor, "b N d"]:
        """The sum over the routes of each token."""
        N, k = self.place.shape
        return at_routes.index_select(0, self.place.flatten()).view(N, k, *at_routes.shape[1:]).sum(1).transpose(0, 1)

    def output(self) -> Float[Tensor, "N d"]:
        """What the stack returns."""
        return self.to_tokens((self.y * self.weight[:, None])[:, None])[0]

    def hidden_cotangent(self, dy: Float[Tensor, "R b d"]) -> Float[Tensor, "R b h"]:
        """The cotangent at h of one at y."""
        return self.stack.to_hidden(self.times(self.down.mT, dy)).mul_(self.slope[:, None])

    def pull(self, delta: Float[Tensor, "b N d"]) -> tuple[Float[Tensor, "b N d"], Float[Tensor, "b N k"]]:
        """The cotangents at tokens and weights of cotangents at the output."""
        dx = self.to_tokens(self.times(self.up.mT, self.hidden_cotangent(self.to_routes(delta))))
        y = self.y[self.place].to(delta.dtype)  # [N, k, d]
        return dx.to(delta.dtype), torch.einsum("bnd,nkd->bnk", delta, y)


class _Pull(torch.autograd.Function):
    """`Routes.pull` of one cotangent, under vmap of all of them in one call."""

    @staticmethod
    def forward(delta: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        dx, dw = routes.pull(delta[None])
        return dx[0], dw[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        raise RuntimeError("a cotangent of a stack of experts is not differentiated again")

    @staticmethod
    def vmap(info: Any, in_dims: Any, delta: Tensor, routes: Routes) -> Any:
        with torch.no_grad():
            return routes.pull(delta.movedim(in_dims[0], 0)), (0, 0)


class _Pulled(torch.autograd.Function):
    """The output as it is, with its derivative by tokens and weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, output: Tensor, routes: Routes) -> Tensor:  # type: ignore[override]
        ctx.routes = routes
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:  # type: ignore[override]
        dx, dw = _Pull.apply(delta, ctx.routes)
        return dx, dw.to(ctx.routes.weight.dtype), None, None
