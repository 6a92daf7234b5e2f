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

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import Unsupported
from ..problem import MEMORY, Coverage, Problem
from ..progress import Progress
from ..readout import readout_matrix
from .budget import Size, Tiling, Tokens
from .kept import parts_that_fit
from .plan import PlannedProblem, Rules, planned
from .stacks import Stacked
from .strips import Budget, Strip, cells_of, in_one_graph, make_strips
from .tile import STEPS, Tile
from .traced import SideTracer, TracedBatch

Closed = dict[int, Float[Tensor, "M L"]]  # by part


def fill(
    problem: Problem, out: Float[Tensor, "*parts M L"], *, memory: int = MEMORY, progress: Progress | None = None
) -> Coverage:
    """F [M, L] into out, tile by tile; see Fill. Of a problem in parts (Scope.parts) it is one matrix for each.

    Raises:
        Unsupported: a model, or sequences, that the structured engines do not cover.

    Cost: about a backward pass without weight gradients per token of both sides, and the inner products (budget.py counts).
    Parts take the memory of their matrices and nothing else.
    """
    p = planned(problem)
    if len(p.observed) < len(p.updated):
        p, out = p.transposed(), out.mT
    out = out if p.parts is not None else out[None]
    closed = _readout(p)
    if not p.plan.moves:
        out.copy_(_with_readout(torch.zeros_like(out), closed))
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


def _fill(
    p: PlannedProblem, out: Float[Tensor, "parts M L"], closed: Closed, memory: int, progress: Progress | None
) -> Coverage:
    """The readout's own part and the backbone's into out."""
    tiling = Size.of(p).tiling(*p.singles, max(1, memory - (out.nbytes if len(out) > 1 else 0)), p.together)
    sides, budget = _side_tracers(p, tiling), tiling.budget
    rules: Rules = {}
    tiles, done = len(tiling.kept_blocks) * len(tiling.streamed_blocks), 0

    def report(part: int, whole: int) -> None:
        if progress:
            progress(int(out.shape[2] * (done + part / whole) / tiles), out.shape[2])

    for r, rows in enumerate(tiling.kept_blocks):
        kept = _traced(p, sides[0], rows, budget, with_calls=True)
        for traced, _ in kept:
            rules |= traced.rules
        for s, columns in enumerate(tiling.streamed_blocks):
            name = p.tile("sweep", int(p.together), r, s)
            if p.tiles is not None and p.tiles.restore(name, out):
                report(STEPS, STEPS)
                done += 1
                continue
            mine = make_strips(p.cuts, kept, budget.graphs // 2, budget.strip)
            both = _strips_of_both(p, tiling, mine)
            apart = [of for of in columns if not both or of[0] >= tiling.common]
            others = _traced(p, sides[1], apart, budget, with_calls=False)
            theirs = both + make_strips(p.cuts, others, budget.graphs // 2, start=both[-1].where.stop if both else 0)
            tile = Tile(p.fused_plan, mine, theirs, budget, p.narrow, report if progress else None).fill(p.aligned)
            o, u = tiling.sides
            (m, c_m), (l, c_l) = _tokens(o, rows, mine), _tokens(u, columns, theirs)  # noqa: E741
            found = tile[:, cells_of(mine)[:, None], cells_of(theirs)].to(out) * c_m.to(out)[:, None] * c_l.to(out)
            at = m[:, None], l
            out[:, *at] = _with_readout(found, {part: F[at] for part, F in closed.items()})
            if p.tiles is not None:
                p.tiles.put(name, m, l, out[:, *at])
            report(STEPS, STEPS)
            done += 1
    return p.fused_plan.labels(p, rules)


def _strips_of_both(p: PlannedProblem, tiling: Tiling, kept: list[Strip]) -> list[Strip]:
    """The kept strips that are also streamed: of sequences on both sides, where all that is kept fits into memory at once."""
    whole = len(tiling.kept_blocks) == len(tiling.streamed_blocks) == 1 and p.P is None
    if not whole or not tiling.common:
        return []
    depths = range(p.aligned, len(p.cuts))
    if any(len(list(parts_that_fit(kept, depth, tiling.budget.kept, p.narrow))) > 1 for depth in depths):
        return []
    first = [id(strip.traced) for strip in kept]
    both = list(dict.fromkeys(first))[: tiling.common]
    return [strip for strip in kept if id(strip.traced) in both]


def _readout(p: PlannedProblem) -> Closed:
    """The readout's own force, by part: its weight and its bias may be in different ones."""
    head = (p.tracer.readout.weight_name, p.tracer.readout.bias_name)
    by_part: dict[int, dict[str, str]] = {}
    for use, tensor in p.uses.items():
        if use in head:
            by_part.setdefault(0 if p.parts is None else p.parts.of[use], {})[use] = tensor
    return {part: readout_matrix(replace(p, uses=uses)) for part, uses in by_part.items()}


def _with_readout(F: Float[Tensor, "parts M L"], closed: Closed) -> Float[Tensor, "parts M L"]:
    for part, readout in closed.items():
        F[part] += readout.to(F)
    return F


def _side_tracers(p: PlannedProblem, tiling: Tiling) -> tuple[SideTracer, SideTracer]:
    """Of both sides, a batch at a time."""
    ids = torch.cat([side.ids(p.tracer.device) for side in tiling.sides]).unique()
    o, u = (SideTracer(p.tracer, p.fused_plan, side, ids, used=True) for side in tiling.sides)
    return o, u


def _traced(
    p: PlannedProblem, side: SideTracer, block: Tokens, budget: Budget, with_calls: bool
) -> list[tuple[TracedBatch, slice]]:
    """The batches of a block, each with its slots in the block; with their graphs where `make_strips` takes those whole."""
    batches, longest = [side.side.batches[b] for b, _ in block], budget.strip if with_calls else None
    whole = all(slots == slice(0, batch.slots) for batch, (_, slots) in zip(batches, block, strict=True))
    whole = whole and in_one_graph(p.cuts, batches, p.tracer.dtype.itemsize, budget.graphs // 2, longest)
    return [(side(b, with_calls, p.cuts.keys if whole else None), slots) for b, slots in block]


def _tokens(side: Stacked, block: Tokens, strips: list[Strip]) -> tuple[Tensor, Tensor]:
    """The tokens of a block's strips: their places on the side's axis of F, and the factors of their forces."""
    batches = dict(zip(dict.fromkeys(id(strip.traced) for strip in strips), (b for b, _ in block), strict=True))
    of = [(batches[id(strip.traced)], strip.tokens.cpu()) for strip in strips]
    return torch.cat([side.where[b][n] for b, n in of]), torch.cat([side.factors[b].cpu()[n] for b, n in of])
