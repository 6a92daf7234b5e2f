"""The force matrix by pulling both sides back together, segment by segment: F[m,l] = Σ_modules <Ẇ_m, P Ẇ_l>.

    Ẇ_m = Σ_t δ_{m,t} b_tᵀ,  Ẇ_l = Σ_s δ_{l,s} a_sᵀ   =>   <Ẇ_m, Ẇ_l> = Σ_t δ_{m,t}·E_l(t),   E_l(t) = Σ_s δ_{l,s} (a_s·b_t)

For one segment at a time, the kept side's cotangents δ (or directions Ẇ, where they are smaller) of all tokens are buffered,
and the other side, the streamed one, is pulled back in chunks against that buffer. Between segments only cotangents at the cut
remain. No forward derivative, no gradient of model size, no vocabulary axis. What does not fit in memory is done in tiles of
kept by streamed tokens, at the price of pulling a side back once for each tile of the other.

plan.py      which modules move and by which rule      segments.py  where the backbone can be cut
budget.py    how memory is shared out, what it costs   stacks.py    sequences of like length in one batch
kept.py      what stays of a segment                   strips.py    tokens that are pulled back in one graph
aligned.py   where cotangents stay in place            tile.py      kept by streamed tokens
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..errors import Unsupported
from ..problem import MEMORY, Coverage, Problem
from ..progress import Progress
from ..readout import readout_matrix
from .budget import Size, Tiling, Tokens
from .plan import PlannedProblem, Rules, planned
from .strips import make_strips, places
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
    if p.together:
        try:
            return _fill(p, out, closed, memory, progress)
        except Unsupported as why:  # what a batch does, or differs in: no sequence may, alone
            reason = str(why)
        p = p.apart()
        return {
            use: f"{label}, one sequence at a time ({reason})" for use, label in _fill(p, out, closed, memory, progress).items()
        }
    return _fill(p, out, closed, memory, progress)


def _fill(p: PlannedProblem, out: Tensor, closed: Tensor, memory: int, progress: Progress | None) -> Coverage:
    """The readout's own part and the backbone's into out."""
    tiling = Size.of(p).tiling(*p.singles, memory, p.together)
    sides = _side_tracers(p, tiling)
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
            part = Tile(p.fused_plan, mine, theirs, budget, p.narrow, report if progress else None).fill(p.aligned)
            (cells_o, m), (cells_u, l) = places(mine), places(theirs)  # noqa: E741
            at = m[:, None], l
            out[at] = closed[at] + part[cells_o[:, None], cells_u].to(out)
            report(STEPS, STEPS)
            done += 1
    return p.fused_plan.labels(p, rules)


def _side_tracers(p: PlannedProblem, tiling: Tiling) -> tuple[SideTracer, SideTracer]:
    """Of both sides, a batch at a time."""
    o, u = tiling.sides
    ids = o.ids(p.tracer.device), u.ids(p.tracer.device)
    return SideTracer(p.tracer, p.fused_plan, o, ids[1], used=True), SideTracer(p.tracer, p.fused_plan, u, ids[0], used=True)


def _traced(side: SideTracer, block: Tokens, with_calls: bool) -> list[tuple[TracedBatch, slice]]:
    """The batches of a block, each with its slots in the block."""
    return [(side(b, with_calls), slots) for b, slots in block]
