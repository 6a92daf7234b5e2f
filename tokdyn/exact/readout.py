"""The readout's part of the force matrix: what its own weight and bias do at the logits. No backbone takes part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import ops
from ..model.trace import Tracer
from ..objective import GTerm
from .problem import MEMORY, Coverage, Problem, Reduction
from .progress import Progress
from .sides import Side

LABEL = "readout in closed form"
ELEMENTS = 1 << 26  # of logits held at a time


def fill(problem: Problem, out: Float[Tensor, "M L"], *, memory: int = MEMORY, progress: Progress | None = None) -> Coverage:
    """F [M, L] into out where the readout alone moves: see `readout_matrix`."""
    out.copy_(readout_matrix(problem))
    return dict.fromkeys(problem.uses, LABEL)


@torch.no_grad()
def readout_matrix(problem: Problem, reduce: Reduction | None = None) -> Tensor:
    """F_readout[m,l] = (h_m·h_l [+ 1]) <Γ_m, Γ_l>, Γ pulled back through softcap and scale.

    Zero if neither weight nor bias is in scope.

    With a preconditioner Σ_{v,d} Γ_m[v] h_m[d] P[v,d] Γ_l[v] h_l[d], at 2 M L V d flops.

    Args:
        problem: of what moves only the readout's weight and bias count.
        reduce: "update" sums over l -> [M], "observe" sums over m -> [L]; without a preconditioner nothing of size M L is made.
    """
    tracer, o, u = problem.tracer, problem.observed, problem.updated
    head = tracer.readout
    weight, bias = head.weight_name in problem.uses, head.bias_name in problem.uses
    if not weight and not bias:
        sizes = {None: problem.shape, "update": problem.shape[:1], "observe": problem.shape[1:]}
        return torch.zeros(sizes[reduce], dtype=tracer.precision, device=tracer.device)
    operators = problem.P is None and weight and all(of.is_closed and of.temperature == 1 for of in (*o.terms, *u.terms))
    if operators and all(of.is_plain for of in u.terms) and not all(of.is_plain for of in o.terms):
        over: dict[Reduction, Reduction] = {"update": "observe", "observe": "update"}
        F = readout_matrix(problem.transposed(), None if reduce is None else over[reduce])
        return F.T if reduce is None else F
    if operators and all(of.is_plain for of in o.terms):
        term = GTerm.joined(u.terms).to(tracer.device)
        y, c = (torch.cat(of).to(tracer.device) for of in zip(*((of.targets, of.c) for of in o.terms), strict=True))
        h_o, h_u = problem.hidden

        def forces(rows: slice | Tensor, reduce: str | None) -> Tensor:
            return ops.readout_forces(
                h_o[rows], y[rows], h_u, term.targets, term.c, head.weight, v=term.v, uniform=term.uniform,
                train_bias=bias, reduce=reduce, **head.options,
            )  # fmt: skip

        if reduce != "observe":
            return forces(slice(None), reduce) * (c if reduce else c[:, None])
        if bool((c == 1).all()):
            return forces(slice(None), reduce)
        some = torch.arange(len(c), device=c.device).split(max(1, ELEMENTS // len(term.targets)))
        return torch.stack([c[rows] @ forces(rows, None) for rows in some]).sum(0)
    F = torch.cat([torch.cat([_dense(problem, x, y) for y in _rows(tracer, u)], 1) for x in _rows(tracer, o)])
    return F if reduce is None else F.sum({"update": 1, "observe": 0}[reduce])


class Rows(NamedTuple):
    """Some tokens of a batch."""

    rows: Tensor  # among the batch's tokens
    h: Float[Tensor, "n d"]
    pulled: Float[Tensor, "n V"]  # Γ at W h + b


def forces_at_readout(tracer: Tracer, h: Float[Tensor, "N d"], term: GTerm) -> Iterator[Rows]:
    """Γ of a batch's tokens as a force at W h + b, through softcap and scale; logits exist for some rows at a time."""
    for rows in torch.arange(len(h), device=h.device).split(max(1, ELEMENTS // len(tracer.readout.weight))):
        z = tracer.readout.logits(h[rows])
        yield Rows(rows, h[rows], tracer.readout.pull_back(z, term.rows(rows).logit_force(z)))


def _rows(tracer: Tracer, side: Side) -> Iterator[Rows]:
    for batch, term in zip(side.batches, side.terms, strict=True):
        yield from forces_at_readout(tracer, tracer.hidden(batch), term)


def _dense(problem: Problem, x: Rows, y: Rows) -> Float[Tensor, "m l"]:
    """F_readout of some observed and some updated tokens from their Γ, with a preconditioner or any form of force."""
    head, uses, P, wide = problem.tracer.readout, problem.uses, problem.P, problem.tracer.precision
    h_o, h_u = x.h.to(wide), y.h.to(wide)
    F = torch.zeros(len(h_o), len(h_u), dtype=x.pulled.dtype, device=x.pulled.device)
    if head.bias_name in uses:
        F += x.pulled @ (y.pulled if P is None else y.pulled * P[uses[head.bias_name]]).T
    if head.weight_name in uses and P is None:
        F += (h_o @ h_u.T) * (x.pulled @ y.pulled.T)
    elif head.weight_name in uses and P is not None:
        scale = P[uses[head.weight_name]]
        for column in range(len(h_u)):  # the direction of one token at a time, written down
            moved = torch.outer(y.pulled[column], h_u[column]) * scale
            F[:, column] += ((h_o @ moved.T) * x.pulled).sum(1)
    return F
