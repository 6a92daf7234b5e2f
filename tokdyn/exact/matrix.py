"""The full force matrix: the readout in closed form, the backbone by the cheaper of two exact ways."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..sequences import Batch
from ..trace import Tracer
from . import sweep, tangents
from .motions import Direction, Progress, Side, pull, push_all, scaled
from .naive import tangent_matrix
from .plan import Plan, Watched, ids_of, one_by_one, plan, watch
from .readout import readout_matrix
from .rules import Unsupported
from .segments import Cuts

FORWARD = 1.5  # a structured tangent against a cotangent with its inner products, as benchmarks/exact_forces.py times them
TANGENTS = 5  # a token of the looped side, in pulls of a token through the backbone: the same benchmark by both engines
MEMORY = 2 << 30
CHUNK, GROUP = 32, 96
PIECE = 32 << 20  # a tensor larger than this is asked from the system anew each time, which costs more than filling it


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
    longest = _longest([*o.batches, *u.batches])
    joined = p.joined(tracer, longest)
    alone = [one_by_one(side) for side in (o, u)]
    cuts = Cuts.of(partial(joined.unroll, tracer), [*alone[0].batches, *alone[1].batches])
    size = _Size.of(cuts, joined.numbers(tracer), tracer.dtype.itemsize)
    tiling = size.tiling(alone[0], alone[1], memory)
    if engine is None:
        engine = "sweep" if tiling.cost <= TANGENTS * len(u) else "tangents"
    if engine == "sweep":
        return _sweep(tracer, joined, cuts, alone, tiling, closed, out, progress)
    return _tangents(tracer, p, o, u, closed, out, progress, memory)


Block = list[tuple[int, slice]]  # which sequences of a side, and which tokens of each


class _Tiling(NamedTuple):
    """Both sides in blocks: a tile is one of each, and every tile is pulled back anew."""

    kept: list[Block]
    streamed: list[Block]
    budget: sweep.Budget
    cost: float  # in pulls of one token through the backbone


@dataclass(frozen=True)
class _Size:
    """What one token takes that stands at the end of the longest sequence."""

    length: int  # of that sequence
    cut: int  # bytes of its cotangent between segments
    segment: int  # bytes of its cotangents at all outputs of the largest segment
    kept: int  # bytes of these, or of the directions where they are smaller
    widest: int  # bytes of the largest of all of them
    graph: int  # bytes of the whole sequence's graph
    meeting: float  # an inner product of two tokens, in pulls of one

    @classmethod
    def of(cls, cuts: Cuts, moving: dict[str, int], item: int) -> _Size:
        """Of a backbone with so many numbers moving in each module."""
        T = max(cuts.outlines)
        outline = cuts.outlines[T]
        tops = [outline.top.numel(), *(outline.cuts[key][1].numel() for key in cuts.keys)]
        outputs = [x for of in outline.values(cuts.keys) for x in of]
        inside = [
            [(sum(x.numel() for x in outline.shapes[i]), moving[outline.names[i]]) for i in of]
            for of in outline.segments(cuts.keys)
        ]
        met = sum(min(values // 2, numbers) for of in inside for values, numbers in of)
        return cls(
            length=T,
            cut=item * max(tops),
            segment=item * max(sum(values for values, _ in of) for of in inside),
            kept=item * max(sum(map(min, of)) for of in inside),
            widest=item * max(outputs),
            graph=item * sweep.SAVED * sum(outputs),
            meeting=2 * met / (T * sum(numbers for of in inside for _, numbers in of)),
        )

    def tiling(self, o: Side, u: Side, memory: int) -> _Tiling:
        """The cheapest way to share memory among what is at hand, graphs, cotangents at the cuts and what is kept of a segment.

        A tile pulls the kept side once, and the streamed one, with as much again for E, once for each part of the kept one
        that fits. Fewer tiles leave less room and so more parts.
        """
        alive = 2 * (self.cut + self.segment)  # of each cotangent in a chunk, while it is pulled through a segment
        chunk = max(1, min(CHUNK, PIECE // self.widest, memory // 8 // alive))
        met = self.segment + self.widest  # of each streamed token at hand, with its E at one module
        group = max(1, min(GROUP, memory // 6 // met))
        graphs = 2 * max(self._graphs(o), self._graphs(u))
        graphs = graphs if graphs <= memory // 5 else memory // 20  # else made again for every segment, for a forward pass each
        room = memory - chunk * alive - group * met - graphs
        M, L = self._ends(o), self._ends(u)
        ways = [(math.inf, len(o), len(u), 1)]
        for rows, columns in product(_counts(len(o)), _counts(len(u))):
            tokens = float(M.sum()) / rows
            left = room - self.cut * (tokens + float(L.sum()) / columns)
            if left > 0:
                parts = math.ceil(self.kept * tokens / left)
                ways.append((len(o) * columns + 2 * len(u) * rows * parts, rows, columns, int(left)))
        cost, rows, columns, left = min(ways)
        budget = sweep.Budget(chunk, group, max(1, left // self.segment), left, graphs)
        cost += len(o) * len(u) * self.meeting
        return _Tiling(_in_blocks(o, M, rows), _in_blocks(u, L, columns), budget, cost)

    def _graphs(self, side: Side) -> int:
        """Bytes of the graphs of all strips of a side, about, were they made at once."""
        strips = [(len(batch.rows), sweep.strips_of(len(batch.rows)), batch.ids.shape[1]) for batch in side.batches]
        return int(sum(self.graph * n * (T - (N - N / n) / 2) for N, n, T in strips) / self.length)

    def _ends(self, side: Side) -> Tensor:
        """Where the strips end in which the tokens of a side are pulled, about, as a part of the longest sequence."""
        ends = [
            (batch.rows + 1 + len(batch.rows) / (2 * sweep.LENGTHS)).clamp(max=batch.ids.shape[1]) for batch in side.batches
        ]
        return torch.cat(ends).double() / self.length


def _counts(most: int) -> list[int]:
    """Some numbers of blocks, from one to as many as tokens, denser where few."""
    return sorted({min(most, x) for i in range(most.bit_length() + 1) for x in (2**i, 3 * 2**i)})


def _in_blocks(side: Side, sizes: Tensor, count: int) -> list[Block]:
    """A side's tokens in consecutive blocks of about the same size."""
    number = ((sizes.cumsum(0) - sizes / 2) * (count / sizes.sum())).long().clamp(max=count - 1).tolist()
    blocks: list[Block] = []
    start = 0
    for b, batch in enumerate(side.batches):
        N = len(batch.targets)
        of = number[start : start + N]
        begins = [n for n in range(N) if n == 0 or of[n] != of[n - 1]]
        for i, (a, z) in enumerate(pairwise([*begins, N])):
            if i == 0 and start and of[0] == number[start - 1]:
                blocks[-1].append((b, slice(a, z)))
            else:
                blocks.append([(b, slice(a, z))])
        start += N
    return blocks


def _longest(batches: Sequence[Batch]) -> Batch:
    """The longest sequence, with its last token."""
    ids = max(batches, key=lambda batch: batch.ids.shape[1]).ids[:1]
    last = torch.tensor([ids.shape[1] - 1])
    return Batch(ids, last, ids[0, -1:], last * 0, last)


def _places(side: Side) -> list[int]:
    """Where each batch begins on the axis of F."""
    sizes = [len(batch.targets) for batch in side.batches]
    return [sum(sizes[:b]) for b in range(len(sizes))]


def _sweep(
    tracer: Tracer,
    p: Plan,
    cuts: Cuts,
    sides: list[Side],
    tiling: _Tiling,
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
