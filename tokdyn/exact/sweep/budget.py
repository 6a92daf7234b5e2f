"""How a sweep shares out memory, and what it and the tangents cost: multiplications and bytes, counted before any is spent.

    sweep     W (Σ_m t_m · columns + Σ_l t_l · rows · parts) + Σ_l E(t_l) + M L · (numbers met) + passes that make the graphs
    tangents  W Σ_l t_l + Σ_l E(t_l) + 2 W L Σ_b T_b

W weights are passed for every position, t is the end of the strip a token is pulled in, T_b the length of a sequence b of the
other side, and E(t) = Σ_b min(t T_b Q, (t + T_b) W') what it takes to move Q numbers a position by W' moving weights.

A side in fewer blocks (rows, columns) is pulled fewer times, but its cotangents at the cuts leave less room for what is kept of
a segment: that is then kept in more parts, and the streamed side pulled for each.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..sides import Side
from .plan import PlannedProblem
from .strips import SAVED, SHORTEST, Budget, in_strips

CHUNK, GROUP = 32, 96
PASS = 3  # a forward pass that leaves a graph, in multiplications by its weights: with hooks, and of few positions
PIECE = 32 << 20  # on a CPU a larger tensor is asked from the system anew each time, which costs more than filling it

Block = list[tuple[int, slice]]  # which sequences of a side, and which tokens of each


class Tiling(NamedTuple):
    """Both sides in blocks: a tile is one of each, and every tile is pulled back anew."""

    kept: list[Block]
    streamed: list[Block]
    budget: Budget
    cost: float  # multiplications


@dataclass(frozen=True)
class Size:
    """The longest sequence in numbers: what a token at its end takes, and what a pull through it costs."""

    length: int
    item: int  # bytes of a number
    piece: int  # bytes of a tensor at most
    cut: int  # numbers of a cotangent between segments
    segments: list[list[int]]  # of cotangents at a module's outputs, by segment and module
    kept: list[tuple[int, int]]  # what stays of a segment: numbers of directions, and of cotangents
    written: int  # the largest direction that is written down
    weights: int  # matrices of the backbone, those that move or not
    moving: int  # numbers that move
    moved: int  # numbers at the outputs of the modules that move, a position

    @classmethod
    def of(cls, problem: PlannedProblem) -> Size:
        """Of a problem's backbone, with the rules of its modules."""
        tracer, cuts, rules = problem.tracer, problem.cuts, problem.rules
        T = max(cuts.outlines)
        outline, half = cuts.outlines[T], T // 2
        inside = [
            [(rules[outline.names[i]], sum(x.numel() for x in outline.shapes[i])) for i in of]
            for of in outline.segments(cuts.keys)
        ]
        every, numbers = [pair for of in inside for pair in of], problem.fused_plan.sizes(tracer)
        looked_up = {id(m.weight) for m in tracer.model.modules() if isinstance(m, nn.Embedding)}
        matrices = {id(x): x for x in tracer.model.parameters() if x.dim() > 1 and id(x) not in looked_up}
        readout = tracer.model.get_parameter(tracer.readout.weight_name)
        return cls(
            length=T,
            item=tracer.dtype.itemsize,
            piece=PIECE if tracer.device.type == "cpu" else sys.maxsize,
            cut=max([outline.top.numel(), *(outline.cuts[key][1].numel() for key in cuts.keys)]),
            segments=[[values for _, values in of] for of in inside],
            kept=[
                (
                    sum(rule.size for rule, _ in of if rule.prefers_direction(half)),
                    sum(values for rule, values in of if not rule.prefers_direction(half)),
                )
                for of in inside
            ],
            written=max((rule.size for rule, _ in every if rule.prefers_direction(half)), default=0),
            weights=sum(x.numel() for key, x in matrices.items() if key != id(readout)),
            moving=sum(numbers.get(name, 0) for name in rules if name != problem.plan.lookup),
            moved=sum(values * rule.modules for rule, values in every) // T,
        )

    def tiling(self, o: Side, u: Side, memory: int) -> Tiling:
        """The cheapest way to share memory: what is at hand and graphs first, then cotangents at the cuts and what is kept."""
        segment, widest = max([1, *map(sum, self.segments)]), max([1, *(x for of in self.segments for x in of)])
        alive = 2 * self.item * (self.cut + segment + self.written)  # of each cotangent in a chunk, while it is pulled
        chunk = max(1, min(CHUNK, self.piece // (self.item * widest), memory // 8 // alive))
        met = self.item * (segment + max(widest, self.written))  # of each streamed token at hand, with what it meets
        group = max(1, min(GROUP, memory // 6 // met))
        t_o, t_u = _ends(o), _ends(u)
        pull_o, pull_u = self.weights * float(t_o.sum()), self.weights * float(t_u.sum())
        kept = [float(self._keeps(t_o, of).sum()) for of in self.kept]
        E = self._moves(t_u, o) / len(o.batches)
        positions = _passed(o), _passed(u)
        whole = 21 * self.item * SAVED * sum(map(sum, self.segments)) * max(positions) // (10 * self.length)
        most = max(1, self.item * max(map(sum, self.kept)))  # bytes that a token at the end of the sequence leaves of a segment
        ways = [(math.inf, len(o), len(u), 1, memory // 20)]
        for graphs in {min(whole, memory // 2), min(whole, memory // 5), min(whole, memory // 20)}:
            passes = min(len(self.segments), -(-whole // max(1, graphs)))
            made = PASS * passes * self.weights * sum(positions)
            room = memory - chunk * alive - group * met - graphs
            for rows, columns in product(_counts(len(o)), _counts(len(u))):
                cuts = self.item * self.cut / self.length * (float(t_o.sum()) / rows + float(t_u.sum()) / columns)
                left = room - cuts
                if left > 0:
                    times = rows * sum(max(1, math.ceil(size / rows / left)) for size in kept) / len(kept)
                    again = max(rows, columns, SHORTEST * most / left)  # short strips are more of them
                    cost = pull_o * columns + pull_u * times + E * max(len(o.batches), times) + made * again
                    ways.append((cost, rows, columns, int(left), graphs))
        cost, rows, columns, left, graphs = min(ways)
        budget = Budget(chunk, group, max(1, left // most), left, graphs)
        cost += len(u) * sum(kept) / self.item
        return Tiling(_in_blocks(o, t_o, rows), _in_blocks(u, t_u, columns), budget, cost)

    def tangents(self, o: Side, u: Side) -> float:
        """Multiplications where the tokens of u are pulled and carried forward over all of o, padding included."""
        t_u, positions = _ends(u), sum(batch.ids.numel() for batch in o.batches)
        return self.weights * (float(t_u.sum()) + 2 * len(u) * positions) + self._moves(t_u, o)

    def _keeps(self, ends: Float[Tensor, " N"], of: tuple[int, int]) -> Float[Tensor, " N"]:
        """Bytes that tokens leave of a segment."""
        return self.item * (of[0] + of[1] / self.length * ends)

    def _moves(self, ends: Float[Tensor, " N"], other: Side) -> float:
        """Multiplications of E for all tokens with these ends, on all sequences of the other side."""
        T = [t for batch in other.batches for t in [batch.ids.shape[1]] * len(batch.ids)]
        return sum(float(torch.minimum(ends * (t * self.moved), (ends + t) * self.moving).sum()) for t in T)


def _passed(side: Side) -> int:
    """Positions of all strips of a side."""
    return sum(int(batch.rows[part.stop - 1]) + 1 for batch in side.batches for part in in_strips(len(batch.rows)))


def _ends(side: Side) -> Float[Tensor, " N"]:
    """Where the strips end in which the tokens of a side are pulled: the positions that each takes part in."""
    found = []
    for batch in side.batches:
        for part in in_strips(len(batch.rows)):
            found.append((batch.rows[part.stop - 1] + 1).double().expand(part.stop - part.start))
    return torch.cat(found)


def _counts(most: int) -> list[int]:
    """Some numbers of blocks, from one to as many as tokens, denser where few."""
    return sorted({min(most, x) for i in range(most.bit_length() + 1) for x in (2**i, 3 * 2**i)})


def _in_blocks(side: Side, sizes: Float[Tensor, " N"], count: int) -> list[Block]:
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
