"""The force matrix by structured tangents: one side pulled back, the other moved along, forward.

    F[m,l] = F_readout[m,l] + <u_m, ḣ_{m,l}>,    u_m = ∂log pi(y_m)/∂h_m

For a chunk of tokens of the looped side, one batched backward pass gives the cotangents δ at every module's output; a rule per
module (modules/) turns them into what that module's parameters do to its output on the other side; one batched tangent pass
carries all of them to ḣ. Cost per looped token about 4·P·T flops, memory chunk · T · Σ module widths; the other side is never
pulled back token by token, which pays where it has many more tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp, vmap

from ..model.calls import Call
from ..model.trace import Tracer
from .graph import batched_vjp
from .modules.base import Outputs
from .modules.lookup import tied_force
from .problem import MEMORY, Coverage, Problem
from .progress import Progress
from .readout import readout_matrix
from .sweep.plan import Plan, Rules, planned
from .sweep.traced import SideTracer, TracedBatch

CHUNK = 32  # looped tokens at a time

Deltas = dict[str, tuple[list[Call], Outputs]]  # by module: its calls, and the cotangents at their outputs


def fill(problem: Problem, out: Float[Tensor, "M L"], *, memory: int = MEMORY, progress: Progress | None = None) -> Coverage:
    """F [M, L] into out, column by column, looped over the side with fewer tokens; see Fill.

    Raises:
        Unsupported: a model that the structured engines do not cover.
    """
    p = planned(problem)
    if len(p.observed) < len(p.updated):
        p, out = p.transposed(), out.T
    closed = readout_matrix(p)
    if not p.plan.moves:
        out.copy_(closed)
        return p.plan.labels(p, {})
    looped = p.singles[1]
    ids = p.observed.ids(p.tracer.device), looped.ids(p.tracer.device)
    tracer_o, tracer_u = SideTracer(p.tracer, p.plan, p.observed, ids[1]), SideTracer(p.tracer, p.plan, looped, ids[0])
    tangents = _TangentPass(p.tracer, p.plan, [tracer_o(b, with_calls=True) for b in range(len(p.observed.batches))])
    done, rules = 0, Rules()
    for b in range(len(looped.batches)):
        source = tracer_u(b, with_calls=False)  # its calls are recorded in the graph of each chunk
        for rows in tangents.chunks(source, memory):
            name = p.tile("tangents", b, rows.start, rows.stop)
            if p.tiles is None or not p.tiles.restore(name, out[None]):
                for other, block in zip(tangents.others, tangents.columns(source, rows), strict=True):
                    at = other.where[:, None], source.where[rows]
                    out[at] = closed[at] + block.to(out)
                if p.tiles is not None:
                    columns = source.where[rows]
                    p.tiles.put(name, torch.arange(len(out)), columns, out[None, :, columns])
            done += rows.stop - rows.start
            if progress:
                progress(done, out.shape[1])
    for other in tangents.others:
        rules |= other.rules
    return p.plan.labels(p, rules)


@dataclass(frozen=True)
class _TangentPass:
    """Batched jvps of one side's hidden states along the parameter directions of the other side's tokens."""

    tracer: Tracer
    plan: Plan
    others: list[TracedBatch]

    def chunks(self, source: TracedBatch, memory: int) -> Iterator[slice]:
        """Which tokens of a looped sequence are taken together."""
        chunk = max(1, min(CHUNK, memory // max(1, max(_token_bytes(other, source) for other in self.others))))
        for n in range(0, len(source.h), chunk):
            yield slice(n, min(n + chunk, len(source.h)))

    def columns(self, source: TracedBatch, rows: slice) -> list[Float[Tensor, "M b"]]:
        """The backbone's part of F for some tokens of a looped sequence: a block for each other batch."""
        deltas = self._cotangents(source, rows)
        return [self._move(other, source, rows, deltas) for other in self.others]

    def _cotangents(self, source: TracedBatch, rows: slice) -> Deltas:
        """The calls of every moving module for a chunk of tokens, and δ [b, ...] at each of their outputs.

        The sequence is cut behind the chunk's last token: nothing later takes part.
        """
        h, calls, _ = self.plan.unroll(self.tracer, source.batch.upto(rows))
        b, d = h.shape
        cotangent = torch.zeros(b, b, d, dtype=h.dtype, device=h.device)
        index = torch.arange(b, device=h.device)
        cotangent[index, index] = source.cotangent[rows].to(h.dtype)
        deltas = iter(batched_vjp(h, [x for call in calls for x in call.outputs], cotangent))
        found: Deltas = {}
        for call in calls:
            mine, delta = found.setdefault(call.name, ([], []))
            mine.append(call.detached())
            delta.append([next(deltas) for _ in call.outputs])
        return found

    @torch.no_grad()
    def _move(self, other: TracedBatch, source: TracedBatch, rows: slice, deltas: Deltas) -> Float[Tensor, "M b"]:
        """F_backbone [M, b] between one observed batch and a chunk of b looped tokens: one batched jvp."""
        b = rows.stop - rows.start
        waiting = {name: iter(rule.tangent(*deltas[name])) for name, rule in other.rules.items() if name in deltas}
        tangents, F = list[Tensor](), torch.zeros(len(other.h), b, dtype=other.h.dtype, device=other.h.device)
        rule = self.plan.tied_lookup(other.rules)
        if rule is not None and self.plan.lookup is not None:  # the lookup moves the readout, and the readout the lookup
            (ids,), d = rule.rows(*deltas[self.plan.lookup])
            F += tied_force(other.h, other.residual_at(ids), d[:, 0]).T
            moved = iter([rule.looked_up(source.residual_at(ids)[rows], source.h[rows], ids) for ids in rule.o_ids])
        for call in other.calls:
            E = next(waiting[call.name]) if call.name in waiting else [x.new_zeros(b, *x.shape) for x in call.outputs]
            if call.name == self.plan.lookup:
                E = [E[0] + next(moved).reshape_as(E[0])]
            tangents.extend(e.to(x.dtype) for e, x in zip(E, call.outputs, strict=True))
        zeros = tuple(torch.zeros_like(x) for call in other.calls for x in call.outputs)

        def forward(e: tuple[Tensor, ...]) -> Tensor:
            return jvp(lambda *x: self.tracer.steer(other.batch, self.plan.names, x), zeros, e)[1]

        h_dot = vmap(forward)(tuple(tangents))
        return F + torch.einsum("bmd,md->mb", h_dot.to(other.cotangent.dtype), other.cotangent)


def _token_bytes(other: TracedBatch, source: TracedBatch) -> int:
    """Bytes that one looped token takes: its cotangents, its tangents, what is written of directions."""
    tangents = sum(x.numel() for call in other.calls for x in call.outputs)
    width = tangents / other.batch.ids.numel()
    written = max((rule.scratch for rule in other.rules.values()), default=0)
    return int(other.cotangent.element_size() * (width * source.batch.ids.numel() + 3 * tangents + 2 * written))
