"""The force matrix by pulling both sides back together, segment by segment: F[m,l] = Σ_modules <Ẇ_m, P Ẇ_l>.

    Ẇ_m = Σ_t δ_{m,t} b_tᵀ,  Ẇ_l = Σ_s δ_{l,s} a_sᵀ   =>   <Ẇ_m, Ẇ_l> = Σ_t δ_{m,t}·E_l(t),   E_l(t) = Σ_s δ_{l,s} (a_s·b_t)

For one segment at a time, the kept side's cotangents δ (or directions Ẇ, where they are smaller) of all tokens are buffered,
and the other side, the streamed one, is pulled back in chunks against that buffer. Between segments only cotangents at the cut
remain. No forward derivative, no gradient of model size, no vocabulary axis. What does not fit in memory is done in tiles of
kept by streamed tokens, at the price of pulling a side back once for each tile of the other.

plan.py      which modules move and by which rule      segments.py  where the backbone can be cut
budget.py    how memory is shared out, what it costs   strips.py    tokens that are pulled back in one graph
kept.py      what stays of a segment                   tile.py      kept by streamed tokens
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..problem import MEMORY, Coverage, Problem
from ..progress import Progress
from ..readout import readout_matrix
from .budget import Size, Tokens
from .plan import PlannedProblem, Rules, planned
from .strips import make_strips
from .tile import STEPS, Tile
from .traced import SideTracer, TracedBatch


def fill(problem: Problem, out: Float[Tensor, "M L"], *, memory: int = MEMORY, progress: Progress | None = None) -> Coverage:
    """F [M, L] into out, tile by tile; see Fill.

    Raises:
        Unsupported: a model, or sequences, that the structured engines do not cover.

    Cost: about a backward pass without weight gradients per token of both sides, and the inner products (budget.py counts).
    """
    p = planned(problem)
    if len(p.observed) < len(p.updated):
        p, out = p.transposed(), out.T
    closed = readout_matrix(p)
    if not p.plan.moves:
        out.copy_(closed)
        return p.plan.labels(p, {})
    tiling = Size.of(p).tiling(p.singles[0], p.singles[1], memory)
    sides = _side_tracers(p)
    rules: Rules = {}
    tiles, done = len(tiling.kept_blocks) * len(tiling.streamed_blocks), 0

    def report(part: int, whole: int) -> None:
        if progress:
            progress(int(out.shape[1] * (done + part / whole) / tiles), out.shape[1])

    for rows in tiling.kept_blocks:
        kept = _traced(sides[0], rows, with_calls=True)
        for traced, _ in kept:
            rules |= traced.rules
        for columns in tiling.streamed_blocks:
            budget = tiling.budget
            mine = make_strips(p.cuts, kept, budget.graphs // 2, budget.strip)
            theirs = make_strips(p.cuts, _traced(sides[1], columns, with_calls=False), budget.graphs // 2)
            part = Tile(p.fused_plan, mine, theirs, budget, report if progress else None).fill()
            where = _tokens(sides[0], rows), _tokens(sides[1], columns)
            out[where] = closed[where] + part.to(out)
            report(STEPS, STEPS)
            done += 1
    return p.fused_plan.labels(p, rules)


def _side_tracers(p: PlannedProblem) -> tuple[SideTracer, SideTracer]:
    """Of both sides, one sequence at a time."""
    o, u = p.singles
    ids = o.ids(p.tracer.device), u.ids(p.tracer.device)
    return SideTracer(p.tracer, p.fused_plan, o, ids[1], used=True), SideTracer(p.tracer, p.fused_plan, u, ids[0], used=True)


def _traced(side: SideTracer, block: Tokens, with_calls: bool) -> list[tuple[TracedBatch, slice]]:
    """The sequences of a block, each with its tokens in the block."""
    return [(side(b, with_calls), rows) for b, rows in block]


def _tokens(side: SideTracer, block: Tokens) -> slice:
    """A block's tokens on its side's axis of F."""
    (first, a), (last, z) = block[0], block[-1]
    return slice(side.starts[first] + a.start, side.starts[last] + z.stop)
