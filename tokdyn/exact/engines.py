"""The full force matrix: the readout in closed form, the backbone by the cheaper of two exact ways."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..model.trace import Tracer
from . import tangents
from .modules.rules import Unsupported
from .naive import tangent_matrix
from .products import Direction, Progress, Side, pull, push_all, scaled
from .readout import readout_matrix
from .sweep import tile as sweep
from .sweep.budget import Block, Size, Tiling
from .sweep.plan import Plan, Watched, ids_of, one_by_one, plan, watch
from .sweep.segments import Cuts

FORWARD = 1.5  # a tangent pass against a pull, as benchmarks/exact_forces.py times them
MEMORY = 2 << 30


def matrix(
    tracer: Tracer,
    o: Side,
    u: Side,
    uses: dict[str, str],
    P: Direction | None,
    out: Float[Tensor, "M L"],
    progress: Progress | None = None,
    memory: int = MEMORY,
    engine: str | None = None,
) -> dict[str, str]:
    """F [M, L] into out; returns the rule that each parameter took part by.

    Args:
        tracer, o, u: the model and both sides.
        uses: what moves (motions.select).
        P: preconditioner by tensor, or None.
        out: filled in blocks of columns or of tiles; what an interrupt leaves untouched stays as it was.
        progress: called with (tokens done, tokens in all).
        memory: bytes that cotangents and tangents may take.
        engine: "sweep", "tangents", or None for the cheaper one.

    Where a module is beyond the rules it is one pull and one push per token, and the rule says why.
    """
    try:
        p = plan(tracer, uses, P, [*o.batches, *u.batches])
        _nothing_unseen(tracer, p, o, uses)
        closed = readout_matrix(tracer, o, u, uses, P)
        if p.moves:
            labels = _backbone(tracer, p, o, u, closed, out, progress, memory, engine)
        else:
            labels = dict[str, str]()
            out.copy_(closed)
        return p.labels(tracer, uses, labels)
    except Unsupported as reason:
        tangent_matrix(tracer, o, u, uses, P, out, progress)
        return dict.fromkeys(uses, f"one direction per token ({reason})")


def _nothing_unseen(tracer: Tracer, p: Plan, side: Side, uses: dict[str, str]) -> None:
    """See that what no module uses in the forward pass has no gradient either.

    Raises:
        Unsupported: it has; a kernel of somebody's own may take its weights out of sight.
    """
    unseen = {use: tensor for use, tensor in uses.items() if p.is_unseen(tracer, use)}
    moved = {tensor for tensor, step in pull(tracer, side, unseen).items() if bool(step.any())} if unseen else set[str]()
    if moved:
        raise Unsupported(f"no module was seen to use {' and '.join(use for use in unseen if unseen[use] in moved)}")


def grouped_matrix(
    tracer: Tracer,
    o: Side,
    u: Side,
    uses: dict[str, str],
    P: Direction | None,
    labels: Int[Tensor, " L"],
    out: Float[Tensor, "M G"],
    progress: Progress | None = None,
    memory: int = MEMORY,
) -> dict[str, str]:
    """Columns of F summed over groups of update tokens (-1 takes no part), into out; returns each parameter's rule.

    A group is one direction, pulled and pushed at once. Where there are about as many groups as tokens the token matrix is
    the cheaper way, and its columns are added up.
    """
    G = out.shape[1]
    if 2 * G > (len(o) + len(u)) / (1 + FORWARD):
        F = torch.zeros(len(o), len(u), dtype=out.dtype, device=out.device)
        rules = matrix(tracer, o, u, uses, P, F, progress, memory)
        member = labels >= 0
        out.zero_().index_add_(1, labels[member].to(out.device), F[:, member.to(out.device)])
        return rules
    for g in range(G):
        direction = scaled(pull(tracer, u.part((labels == g).to(out)), uses), P)
        out[:, g] = push_all(tracer, o, direction, uses)
        if progress:
            progress(g + 1, G)
    return dict.fromkeys(uses, "one direction per group")


def size_in_bytes(memory: int | str) -> int:
    """Bytes of 4294967296, "4GiB", "512 MiB" or "2GB".

    Raises:
        ValueError: no such size, or not positive.
    """
    units = {"": 1, "b": 1, **{x + y: b ** (i + 1) for y, b in (("b", 1000), ("ib", 1024)) for i, x in enumerate("kmgt")}}
    found = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", str(memory))
    if found is None or found[2].lower() not in units or found[1].count(".") > 1 or float(found[1]) <= 0:
        raise ValueError(f'memory must be a number of bytes or a size such as "2GiB" or "500MB", got {memory!r}')
    return int(float(found[1]) * units[found[2].lower()])


def _backbone(
    tracer: Tracer,
    p: Plan,
    o: Side,
    u: Side,
    closed: Tensor,
    out: Tensor,
    progress: Progress | None,
    memory: int,
    engine: str | None,
) -> dict[str, str]:
    """The closed part and the backbone's into out, looped over the side with fewer tokens; returns each module's rule."""
    if len(o) < len(u):
        o, u, closed, out = u, o, closed.T, out.T
    alone = [one_by_one(side) for side in (o, u)]
    longest = max([*alone[0].batches, *alone[1].batches], key=lambda batch: batch.ids.shape[1]).upto(slice(-1, None))
    joined = p.joined(tracer, longest)
    cuts = Cuts.of(partial(joined.unroll, tracer), [*alone[0].batches, *alone[1].batches])
    size = Size.of(tracer, joined, cuts, joined.rules(joined.record(tracer, longest)[1]))
    tiling = size.tiling(alone[0], alone[1], memory)
    if engine is None:
        engine = "sweep" if tiling.cost <= size.tangents(o, alone[1]) else "tangents"
    if engine == "sweep":
        return _sweep(tracer, joined, cuts, alone, tiling, closed, out, progress)
    return _tangents(tracer, p, o, u, closed, out, progress, memory)


def _places(side: Side) -> list[int]:
    """Where each batch begins on the axis of F."""
    sizes = [len(batch.targets) for batch in side.batches]
    return [sum(sizes[:b]) for b in range(len(sizes))]


def _sweep(
    tracer: Tracer,
    p: Plan,
    cuts: Cuts,
    sides: list[Side],
    tiling: Tiling,
    closed: Tensor,
    out: Tensor,
    progress: Progress | None,
) -> dict[str, str]:
    """Tile by tile."""
    budget = tiling.budget
    ids = [ids_of(side, tracer) for side in sides]
    at = [_places(side) for side in sides]
    labels: dict[str, str] = {}
    joined = {joint.name: joint.modules for joint in p.joints}
    clock = _Clock(progress, len(tiling.kept) * len(tiling.streamed), out.shape[1])

    def watched(which: int, block: Block) -> list[tuple[Watched, slice]]:
        return [(watch(tracer, p, sides[which], b, at[which][b], ids[1 - which], calls=which == 0), rows) for b, rows in block]

    def place(which: int, block: Block) -> slice:
        (first, a), (last, z) = block[0], block[-1]
        return slice(at[which][first] + a.start, at[which][last] + z.stop)

    for rows in tiling.kept:
        kept = watched(0, rows)
        rules = {id(w): p.rules(w.calls) for w, _ in kept}
        labels |= {
            module: rule.label for of in rules.values() for name, rule in of.items() for module in joined.get(name, (name,))
        }
        for columns in tiling.streamed:
            mine = sweep.strips(cuts, kept, budget.graphs // 2, budget.strip)
            theirs = sweep.strips(cuts, watched(1, columns), budget.graphs // 2)
            tile = sweep.tile(p, mine, theirs, rules, budget, clock.tick)
            where = place(0, rows), place(1, columns)
            out[where] = closed[where] + tile.to(out)
            clock.done()
    return labels


@dataclass
class _Clock:
    """Progress over tiles as a number of tokens."""

    progress: Progress | None
    tiles: int
    total: int
    finished: int = 0

    def tick(self, part: float) -> None:
        if self.progress:
            self.progress(int(self.total * (self.finished + part) / self.tiles), self.total)

    def done(self) -> None:
        self.finished += 1
        self.tick(0.0)


def _tangents(
    tracer: Tracer, p: Plan, o: Side, u: Side, closed: Tensor, out: Tensor, progress: Progress | None, memory: int
) -> dict[str, str]:
    """Column by column."""
    looped = one_by_one(u)
    ids = ids_of(o, tracer), ids_of(looped, tracer)
    others = [watch(tracer, p, o, b, start, ids[1]) for b, start in enumerate(_places(o))]
    pairs = [(w, p.rules(w.calls)) for w in others]
    done = 0
    for b, start in enumerate(_places(looped)):
        source = watch(tracer, p, looped, b, start, ids[0])
        chunk = min(32, memory // max(1, max(tangents.token_bytes(w, rules, source) for w, rules in pairs)))
        for rows, blocks in tangents.columns(tracer, p, pairs, source, max(1, chunk)):
            columns = slice(start + rows.start, start + rows.stop)
            for (w, _), block in zip(pairs, blocks, strict=True):
                out[w.columns, columns] = closed[w.columns, columns] + block.to(out)
            done += rows.stop - rows.start
            if progress:
                progress(done, out.shape[1])
    return {name: rule.label for _, rules in pairs for name, rule in rules.items()}
