"""The readout's part of the force matrix: what its own weight and bias do at the logits. No backbone takes part."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from .. import ops
from ..model.trace import Tracer
from ..objective import GTerm
from .products import Direction, Side
from .sweep.plan import BLOCK, residual_of


@torch.no_grad()
def readout_matrix(
    tracer: Tracer, o: Side, u: Side, uses: dict[str, str], P: Direction | None, reduce: str | None = None
) -> Tensor:
    """F_readout[m,l] = (h_m·h_l [+ 1]) <Γ_m, Γ_l>, Γ pulled back through softcap and scale; zero where the readout is still.

    With a preconditioner Σ_{v,d} Γ_m[v] h_m[d] P[v,d] Γ_l[v] h_l[d], at 2 M L V d flops.

    Args:
        tracer, o, u: the model and both sides.
        uses: what moves; of these only the readout's weight and bias count.
        P: preconditioner by tensor, or None.
        reduce: "update" sums over l -> [M], "observe" sums over m -> [L]; without a preconditioner nothing of size M L is made.
    """
    head = tracer.readout
    weight, bias = head.weight_name in uses, head.bias_name in uses
    if not weight and not bias:
        sizes = {None: (len(o), len(u)), "update": (len(o),), "observe": (len(u),)}
        return torch.zeros(sizes[reduce], dtype=tracer.precision, device=tracer.device)
    one = all(term.is_plain for term in o.terms) and all(term.temperature == 1 for term in u.terms)
    if P is None and weight and one:
        term = GTerm.joined(u.terms).to(tracer.device)
        y = torch.cat([batch.targets for batch in o.batches]).to(tracer.device)
        c = torch.cat([t.c for t in o.terms])
        h_o, h_u = hidden(tracer, o), hidden(tracer, u)

        def forces(rows: slice | Tensor, reduce: str | None) -> Tensor:
            return ops.readout_forces(
                h_o[rows], y[rows], h_u, term.targets, term.c, head.weight, v=term.v, uniform=term.uniform,
                train_bias=bias, reduce=reduce, **head.options,
            )  # fmt: skip

        if reduce != "observe":
            return forces(slice(None), reduce) * (c if reduce else c[:, None])
        if bool((c == 1).all()):
            return forces(slice(None), reduce)
        some = torch.arange(len(c), device=c.device).split(max(1, BLOCK // len(term.targets)))
        return torch.stack([c[rows] @ forces(rows, None) for rows in some]).sum(0)
    F = torch.cat([torch.cat([_dense(tracer, x, y, uses, P) for y in _residuals(tracer, u)], 1) for x in _residuals(tracer, o)])
    return F if reduce is None else F.sum({"update": 1, "observe": 0}[reduce])


def hidden(tracer: Tracer, side: Side) -> Float[Tensor, "N d"]:
    """The readout's input at all tokens of a side."""
    return torch.cat([tracer.hidden(batch) for batch in side.batches]).to(tracer.precision)


def _residuals(tracer: Tracer, side: Side) -> Iterator[tuple[Tensor, Tensor]]:
    """h [n, d] and Γ [n, V] of a few tokens at a time."""
    for batch, term in zip(side.batches, side.terms, strict=True):
        h = tracer.hidden(batch)
        for rows in torch.arange(len(h), device=h.device).split(max(1, BLOCK // len(tracer.readout.weight))):
            yield h[rows].to(tracer.precision), residual_of(tracer, h[rows], term, rows)


def _dense(
    tracer: Tracer, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], uses: dict[str, str], P: Direction | None
) -> Float[Tensor, "m l"]:
    (h_o, g_o), (h_u, g_u) = x, y
    head = tracer.readout
    F = torch.zeros(len(h_o), len(h_u), dtype=g_o.dtype, device=g_o.device)
    if head.bias_name in uses:
        F += g_o @ (g_u if P is None else g_u * P[uses[head.bias_name]]).T
    if head.weight_name in uses and P is None:
        F += (h_o @ h_u.T) * (g_o @ g_u.T)
    elif head.weight_name in uses and P is not None:
        scale = P[uses[head.weight_name]]
        for column in range(len(h_u)):  # the direction of one token at a time, written down
            moved = torch.outer(g_u[column], h_u[column]) * scale
            F[:, column] += ((h_o @ moved.T) * g_o).sum(1)
    return F
