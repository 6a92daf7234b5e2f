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

from ..modules.fused import Fused
from ..modules.gain import Gain
from ..modules.linear import Linear
from ..modules.lookup import Lookup
from ..sides import Side
from .plan import PlannedProblem
from .stacks import Stacked, on_both_sides, side_by_side
from .strips import SAVED, SHORTEST, Budget, in_strips

CHUNK, GROUP = 32, 96  # cotangents per vjp, streamed tokens per product, where memory allows
BATCH = 1024  # padded positions of sequences side by side
LAUNCH = 2e7  # multiplications in the time that it takes to come to a module at all
PASS = 3  # cost of a graph-building forward pass in weights x positions: hooks and short inputs make it 3 rather than 1
PIECE = 32 << 20  # on a CPU a larger tensor is mapped afresh each time, and faulting its pages costs more than filling them
IN_FLIGHT = 8  # 1/8 of memory at most for the chunk of cotangents in a vjp
AT_HAND = 6  # 1/6 at most for the group of streamed tokens in a product
GRAPHS = (2, 5, 20)  # 1/2, 1/5 or 1/20 of memory for autograd graphs, whichever is cheapest
GRAPH_SLACK = 2.1  # both sides' graphs beside the larger one's, with a twentieth for what is not counted

Tokens = list[tuple[int, slice]]  # which batches of a side, and which slots of each


class Tiling(NamedTuple):
    """Both sides in batches and blocks: a tile is a block of each, and every tile is pulled back anew."""

    sides: tuple[Stacked, Stacked]
    common: int  # so many batches in front are on both sides
    kept_blocks: list[Tokens]
    streamed_blocks: list[Tokens]
    budget: Budget
    bytes: int  # about what is taken at the peak: in flight, at hand, graphs, cotangents at the cuts, the kept side
    products: float  # multiplications of the pulls, of E and directions, and of their inner products
    cost: float  # with the passes that make the graphs


class _Candidate(NamedTuple):
    """One way to share memory out; the least cost is taken."""

    cost: float  # multiplications
    products: float
    rows: int  # blocks of the kept side
    columns: int  # blocks of the streamed side
    kept_bytes: int
    graph_bytes: int


@dataclass(frozen=True)
class Size:
    """Element counts for the longest sequence, from which memory and multiplications of every tiling are estimated.

    Attributes:
        length: its positions.
        item: bytes per element.
        piece: largest tensor to allocate at once, bytes.
        cut: elements of one token's cotangent at the widest cut.
        segments: elements of each module's outputs, by segment.
        stored: per segment, elements stored for one token as parameter directions and as cotangents.
        written: elements of the largest direction that is materialised.
        weights: elements of all backbone matrices, trained or frozen.
        pulled: those through which every token is pulled by itself: not where cotangents stay at their own positions.
        made, inputs: widths of the outputs for which E is made there, and of the modules' inputs.
        directions: elements of the matrices of which directions are kept there.
        tied: width of the lookup that is tied to the readout, if both move; else 0.
        moving: trained elements of the backbone, the tied lookup left out.
        moved: elements at the trained modules' outputs, per position.
    """

    length: int
    item: int
    piece: int
    cut: int
    segments: list[list[int]]
    stored: list[tuple[int, int]]
    written: int
    weights: int
    pulled: int
    made: int
    inputs: int
    directions: int
    tied: int
    moving: int
    moved: int

    @classmethod
    def of(cls, problem: PlannedProblem) -> Size:
        """The counts for a problem's backbone, under the rules of its modules."""
        tracer, cuts, rules = problem.tracer, problem.cuts, problem.rules
        T = problem.longest.ids.shape[1]
        outline, narrow = cuts.outline(problem.longest), problem.narrow
        inside = [
            [(rules[outline.names[i]], sum(x.numel() for x in outline.shapes[i])) for i in of]
            for of in outline.segments(cuts.keys)
        ]
        every, numbers = [pair for of in inside for pair in of], problem.fused_plan.sizes(tracer)
        parts = inside[: problem.aligned], inside[problem.aligned :]
        at_once, each = ([pair for of in part for pair in of] for part in parts)
        linear = [(rule, values // T) for rule, values in each if not isinstance(rule, Lookup | Gain)]
        looked_up = {id(m.weight) for m in tracer.model.modules() if isinstance(m, nn.Embedding)}
        matrices = {id(x): x for x in tracer.model.parameters() if x.dim() > 1 and id(x) not in looked_up}
        readout = tracer.model.get_parameter(tracer.readout.weight_name)
        return cls(
            length=T,
            item=tracer.dtype.itemsize,
            piece=PIECE if tracer.device.type == "cpu" else sys.maxsize,
            cut=max([outline.top.numel(), *(outline.cuts[key][1].numel() for key in cuts.keys)]),
            segments=[[values for _, values in of] for of in inside],
            stored=[
                (
                    sum(rule.size for rule, _ in of if rule.prefers_direction(narrow)),
                    sum(values for rule, values in of if not rule.prefers_direction(narrow)),
                )
                for of in inside[problem.aligned :]
            ]
            or [(0, 0)],
            written=max((rule.size for rule, _ in every if rule.prefers_direction(narrow)), default=0),
            weights=(weights := sum(x.numel() for key, x in matrices.items() if key != id(readout))),
            pulled=weights - sum(rule.size for rule, _ in at_once if isinstance(rule, Linear | Fused)),
            made=sum(q * rule.modules for rule, q in linear if not rule.prefers_direction(narrow)),
            inputs=sum(rule.size // q for rule, q in linear if not rule.prefers_direction(narrow)),
            directions=sum(rule.size for rule, _ in linear if rule.prefers_direction(narrow)),
            tied=sum(values // T for rule, values in each if isinstance(rule, Lookup)) if problem.plan.lookup else 0,
            moving=sum(numbers.get(name, 0) for name in rules if name != problem.plan.lookup),
            moved=sum(values * rule.modules for rule, values in every) // T,
        )

    def tiling(self, o: Side, u: Side, memory: int, together: bool = True) -> Tiling:
        """The tiling with the fewest multiplications that fits in `memory` bytes.

        Reserved first: the chunk of cotangents in flight, the group of streamed tokens, the autograd graphs. The rest is split
        between cotangents at the cuts and the kept side's buffer.

        Args:
            o, u: both sides, one sequence a batch.
            memory: bytes.
            together: whether sequences of like length may go into one batch.
        """
        segment, widest = max([1, *map(sum, self.segments)]), max([1, *(x for of in self.segments for x in of)])
        per_cotangent = 2 * self.item * (self.cut + segment + self.written)
        chunk = max(1, min(CHUNK, self.piece // (self.item * widest), memory // IN_FLIGHT // per_cotangent))
        most = min(BATCH, memory // IN_FLIGHT // per_cotangent * self.length) if together else 0
        overhead = LAUNCH * sum(map(len, self.segments)) / max(1, self.weights)
        *ordered, n = on_both_sides(o, u)
        parts = [[side_by_side(side.of(of), most, overhead) for of in (slice(n), slice(n, None))] for side in ordered]
        sides = parts[0][0].and_then(parts[0][1]), parts[1][0].and_then(parts[1][1])
        per_streamed = self.item * (segment + max(widest * max(len(b.ids) for b in sides[0].batches), self.written))
        group = max(1, min(GROUP, memory // AT_HAND // per_streamed))
        slots = _Slots.of(sides[0]), _Slots.of(sides[1])
        common = len(parts[0][0].batches)
        best = self._cheapest(sides, slots, common, memory, memory - chunk * per_cotangent - group * per_streamed)
        kept_bytes_per_slot = max(1, self.item * max(map(sum, self.stored)) * int(slots[0].sequences.max()))
        budget = Budget(chunk, group, max(1, best.kept_bytes // kept_bytes_per_slot), best.kept_bytes, best.graph_bytes)
        counts = (best.rows, best.columns)
        rows, columns = (_in_blocks(side, of.positions, n) for side, of, n in zip(sides, slots, counts, strict=True))
        at_cuts = (
            self.item * self.cut / self.length * sum(float(of.positions.sum()) / n for of, n in zip(slots, counts, strict=True))
        )
        kept = min(best.kept_bytes, max(float(self._stored_bytes(slots[0], of).sum()) / best.rows for of in self.stored))
        at_once = [min(n, len(of.reach)) for n, of in zip((chunk, group), (slots[0], slots[1]), strict=True)]
        taken = int(at_once[0] * per_cotangent + at_once[1] * per_streamed + best.graph_bytes + at_cuts + kept)
        return Tiling(sides, common, rows, columns, budget, taken, best.products, best.cost)

    def _cheapest(
        self, sides: tuple[Stacked, Stacked], slots: tuple[_Slots, _Slots], common: int, memory: int, unreserved: int
    ) -> _Candidate:
        """The candidate with the fewest multiplications."""
        (o, u), (n_o, n_u) = sides, (len(of.reach) for of in slots)
        every_o, every_u = (float(of.positions.sum()) for of in slots)
        once = every_u - float(_Slots.of(u.of(slice(common, None))).positions.sum()) if common < len(u.batches) else every_u
        stored = [float(self._stored_bytes(slots[0], of).sum()) for of in self.stored]
        visits, positions_o = len(o.batches), sum(batch.ids.numel() for batch in o.batches)
        grams = sum(-(-batch.slots * len(batch.ids) // GROUP) * batch.ids.numel() for batch in u.batches)
        made = positions_o * (every_u * self.made + grams * self.inputs)
        E = made + visits * every_u * self.directions
        positions = _graph_positions(o), _graph_positions(u)
        all_graphs = int(GRAPH_SLACK * self.item * SAVED * sum(map(sum, self.segments)) * max(positions)) // self.length
        met = float(slots[1].sequences.sum()) * sum(stored) / self.item + self.tied * len(o) * every_u
        mirrored = _mirrored(o, u, common)
        kept_bytes_per_slot = max(1, self.item * max(map(sum, self.stored)) * int(slots[0].sequences.max()))
        candidates = [_Candidate(math.inf, math.inf, n_o, n_u, 1, memory // GRAPHS[-1])]
        for graphs in sorted({min(all_graphs, memory // share) for share in GRAPHS}, reverse=True):
            passes = min(len(self.segments), -(-all_graphs // max(1, graphs)))
            graph_cost = PASS * passes * self.weights * sum(positions)
            for rows, columns in product(_counts(n_o), _counts(n_u)):
                cut = [float(of.positions.sum()) / n for of, n in zip(slots, (rows, columns), strict=True)]
                left = unreserved - graphs - self.item * self.cut / self.length * sum(cut)
                if left <= 0:
                    continue
                pulls = (
                    rows * sum(max(1, math.ceil(size / rows / left)) for size in stored) / len(stored)
                )  # of the streamed side
                spared = once if common and pulls == columns == 1 else 0.0
                products = self.pulled * (every_o * columns + every_u * pulls - spared) + E * max(1, pulls / visits)
                products += self.directions * (every_o * columns - spared * visits)
                products += (self.weights - self.pulled) * (positions[0] * columns + positions[1] * rows) + met
                products -= mirrored * (made + met) if spared else 0.0
                rebuilds = max(rows, columns, SHORTEST * kept_bytes_per_slot / left)  # short strips are more of them
                found = _Candidate(products + graph_cost * rebuilds, products, rows, columns, int(left), graphs)
                if pulls == columns == passes == rebuilds == 1:  # nothing is done twice
                    return found
                candidates.append(found)
        return min(candidates)

    def tangents(self, o: Side, u: Side) -> float:
        """Multiplications of the tangents engine: u's tokens pulled back, one sequence a batch, and carried over o."""
        slots, positions = _Slots.of(u), sum(batch.ids.numel() for batch in o.batches)
        return self.weights * (float(slots.positions.sum()) + 2 * len(u) * positions) + self._tangent_cost(slots, o)

    def _stored_bytes(self, slots: _Slots, of: tuple[int, int]) -> Float[Tensor, " n"]:
        """Bytes that each of the slots leaves of a segment."""
        return self.item * slots.sequences * (of[0] + of[1] / self.length * slots.reach)

    def _tangent_cost(self, slots: _Slots, other: Side) -> float:
        """Multiplications of E for all tokens of the slots, on all sequences of the other side."""
        T = [t for batch in other.batches for t in [batch.ids.shape[1]] * len(batch.ids)]
        reach, n = slots
        return sum(float((n * torch.minimum(reach * (t * self.moved), (reach + t) * self.moving)).sum()) for t in T)


class _Slots(NamedTuple):
    """The slots of a side, one after the other."""

    reach: Float[Tensor, " n"]  # positions of the strip that each is pulled in
    sequences: Float[Tensor, " n"]  # of its batch

    @classmethod
    def of(cls, side: Side) -> _Slots:
        """Those of all batches."""
        found: list[tuple[int, int]] = []
        for batch in side.batches:
            slot, at = batch.slot, batch.rows % batch.ids.shape[1]
            for part in in_strips(batch.slots):
                T = int(at[(slot >= part.start) & (slot < part.stop)].max()) + 1
                found += [(T, len(batch.ids))] * (part.stop - part.start)
        return cls(*torch.tensor(found, dtype=torch.float64).T)

    @property
    def positions(self) -> Float[Tensor, " n"]:
        """That the cotangents of each take, those of all sequences."""
        return self.reach * self.sequences


def _mirrored(o: Stacked, u: Stacked, common: int) -> float:
    """The share of both sides' blocks that are taken from their mirror images: an earlier kept and a later streamed batch."""
    kept, streamed = ([batch.slots * batch.ids.numel() for batch in side.batches] for side in (o, u))
    return sum(streamed[a] * kept[k] for a in range(common) for k in range(a)) / max(1, sum(kept) * sum(streamed))


def _graph_positions(side: Side) -> int:
    """Positions of the graphs of all strips of a side."""
    return sum(batch.upto(part).ids.numel() for batch in side.batches for part in in_strips(batch.slots))


def _counts(most: int) -> list[int]:
    """Some numbers of blocks, from one to as many as tokens, denser where few."""
    return sorted({min(most, x) for i in range(most.bit_length() + 1) for x in (2**i, 3 * 2**i)})


def _in_blocks(side: Side, sizes: Float[Tensor, " n"], count: int) -> list[Tokens]:
    """A side's slots in consecutive blocks of about the same size."""
    number = ((sizes.cumsum(0) - sizes / 2) * (count / sizes.sum())).long().clamp(max=count - 1).tolist()
    blocks: list[Tokens] = []
    start = 0
    for b, batch in enumerate(side.batches):
        N = batch.slots
        of = number[start : start + N]
        begins = [n for n in range(N) if n == 0 or of[n] != of[n - 1]]
        for i, (a, z) in enumerate(pairwise([*begins, N])):
            if i == 0 and start and of[0] == number[start - 1]:
                blocks[-1].append((b, slice(a, z)))
            else:
                blocks.append([(b, slice(a, z))])
        start += N
    return blocks
