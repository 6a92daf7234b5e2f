"""Strips: consecutive tokens of sequences side by side, pulled back together from the readout down, segment by segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...model.calls import Call
from ...sequences import Batch
from ..modules.base import Outputs
from .segments import Cuts, Outline, Segment
from .traced import TracedBatch

Found = dict[str, tuple[list[Call], Outputs]]  # module -> its calls and the cotangents at their outputs
SAVED = 2  # what a segment's graph keeps for its backward pass beside the outputs of its modules
SHORTEST = 64
LENGTHS = 8  # a sequence is unrolled at so many lengths, more where memory is short: a token needs nothing behind itself


class Budget(NamedTuple):
    """How much is done at a time."""

    chunk: int  # cotangents pulled together, one for each sequence
    group: int  # streamed tokens that meet the kept ones together
    strip: int  # kept slots that are pulled in one graph: a part of the kept ones is whole strips
    kept: int  # bytes of what is kept of a segment; what does not fit is done in parts, the streamed side pulled for each
    graphs: int  # bytes of graphs: so many segments are made in one forward pass, of all sequences of both sides


@dataclass(eq=False)
class Strip:
    """Consecutive slots of a batch, on its sequences truncated after the last token of these.

    A cell is one slot of one sequence, [slots, sequences] in that order; a cell in which a sequence has no token is empty.
    Mutable: each `pull` replaces the cotangents by those at the next cut.

    Attributes:
        traced: the whole batch.
        slots: which of its slots.
        where: the cells on the tile's axis.
        batch: the sequences up to the last of their tokens.
        tokens, cells: of each token, its place among the whole batch's, and its cell.
        cuts, outline: where the backbone is cut, and what lies between on a batch of this shape.
        aligned: the tokens' cotangents at the current cut in one tensor, while each stays at its own position.
        at_once: how many segments are made in one graph.
        made: segments whose graph exists, by depth.
        cotangents: of each chunk of slots, [b, *cut], once they have spread over positions.
    """

    traced: TracedBatch
    slots: slice
    where: slice
    batch: Batch
    tokens: Int[Tensor, " N"]
    cells: Int[Tensor, " N"]
    cuts: Cuts
    outline: Outline
    aligned: Tensor
    at_once: int
    made: dict[int, Segment]
    cotangents: list[Tensor] = field(default_factory=list)

    @property
    def sequences(self) -> int:
        """How many there are."""
        return len(self.batch.ids)

    @property
    def positions(self) -> Int[Tensor, " N"]:
        """Where the tokens are scored, among the positions of all sequences."""
        return self.batch.rows.to(self.traced.cotangent.device)

    def by_cell(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "C ..."]:
        """What there is for each token, for each cell; 0 for the empty ones."""
        return x.new_zeros(self.where.stop - self.where.start, *x.shape[1:]).index_copy_(0, self.cells, x)

    def segment(self, depth: int) -> Segment:
        """A segment of the backbone on these sequences, its graph made now if it is not there."""
        if depth not in self.made:
            stop = self.cuts.graph_end(depth, self.at_once)
            self.made.update(enumerate(self.cuts.segments(self.batch, depth, stop), depth))
        return self.made[depth]

    def release(self, depth: int) -> None:
        """Let go of a segment's graph."""
        self.made.pop(depth, None)

    def shapes(self, depth: int) -> list[tuple[str, list[torch.Size]]]:
        """The modules in a segment, call by call, and the shapes of what they return."""
        return [(self.outline.names[i], self.outline.shapes[i]) for i in self.outline.segments(self.cuts.keys)[depth]]

    def pull_aligned(self, depth: int) -> Found:
        """The vjp of a position-wise segment, with all tokens superposed in one cotangent."""
        segment = self.segment(depth)
        deltas, below = segment.pull(self.aligned[None])
        self.aligned = below[0]
        self.release(depth)
        return _by_module(segment, deltas)

    def spread(self, chunk: int) -> None:
        """From one cotangent for all tokens to one for each slot, at most `chunk` times a sequence of them in one tensor."""
        whole, slot = self.aligned, self.batch.slot
        # before the first segment there are only the tokens
        where = torch.arange(len(slot)) if whole.dim() == 2 else self.batch.rows
        order, count = slot.argsort(stable=True), self.slots.stop - self.slots.start
        first = torch.searchsorted(slot[order], torch.arange(count + 1)).tolist()  # in that order, of each slot
        parts = -(-count // max(1, chunk // self.sequences))
        for a, z in pairwise(count * i // parts for i in range(parts + 1)):
            mine = order[first[a] : first[z]]
            at, rows = (x.to(whole.device) for x in (where[mine], slot[mine] - a))
            alone = whole.new_zeros(z - a, *whole.shape)
            alone.flatten(1, -2)[rows, at] = whole.flatten(0, -2)[at]
            self.cotangents.append(alone)
        self.aligned = whole.new_empty(0)

    def pull(self, depth: int, last: bool = True) -> Iterator[tuple[slice, Found]]:
        """The vjp of every chunk through a segment: its cells on the tile's axis, and the cotangents at the modules.

        `last` moves the strip's own cotangents down; without it the segment can be pulled again.
        """
        start, segment = self.where.start, self.segment(depth)
        for i, cotangent in enumerate(self.cotangents):
            deltas, below = segment.pull(cotangent)
            if last:
                self.cotangents[i] = below
            stop = start + len(cotangent) * self.sequences
            yield slice(start, stop), _by_module(segment, deltas)
            start = stop
        if last:
            self.release(depth)


def cells_of(strips: Sequence[Strip]) -> Int[Tensor, " N"]:
    """The cells of strips' tokens on the tile's axis."""
    return torch.cat([strip.where.start + strip.cells for strip in strips])


def _by_module(segment: Segment, deltas: list[list[Tensor]]) -> Found:
    found: Found = {}
    for (call, _), delta in zip(segment.inside, deltas, strict=True):
        calls, all_deltas = found.setdefault(call.name, ([], []))
        calls.append(call)
        all_deltas.append(delta)
    return found


def in_strips(slots: int, longest: int | None = None) -> list[slice]:
    """The slots of a batch in runs of about the same length, at most `longest` of them in one."""
    count = max(1, min(LENGTHS, slots // SHORTEST), -(-slots // (longest or slots)))
    length = -(-slots // count)
    return [slice(a, min(a + length, slots)) for a in range(0, slots, length)]


def in_one_graph(cuts: Cuts, batches: Sequence[Batch], item: int, graphs: int, longest: int | None = None) -> bool:
    """Whether each of the batches is one strip, and the graphs of all fit into so many bytes (`make_strips`)."""
    return _bytes_of_graphs(cuts, batches, item, sum) <= graphs and all(
        len(in_strips(batch.slots, longest)) == 1 for batch in batches
    )


def _bytes_of_graphs(cuts: Cuts, batches: Sequence[Batch], item: int, how: Callable[[tuple[float, ...]], float]) -> float:
    """Of the segments of all the batches together."""
    return SAVED * item * sum(batch.ids.numel() for batch in batches) * how(cuts.widths)


def make_strips(
    cuts: Cuts, blocks: Sequence[tuple[TracedBatch, slice]], graphs: int, longest: int | None = None, start: int = 0
) -> list[Strip]:
    """The tokens of one side of a tile as strips, with their cotangents at the input of the readout.

    Args:
        cuts: where the backbone is cut.
        blocks: batches and which slots of each.
        graphs: bytes their graphs may take: made once where all fit, else some segments at a time when those are wanted.
        longest: most slots of a strip.
        start: their first cell on the tile's axis.
    """
    cut: list[tuple[TracedBatch, slice, Batch]] = []
    for traced, slots in blocks:
        a = slots.start
        parts = [slice(a + of.start, a + of.stop) for of in in_strips(slots.stop - a, longest)]
        cut += [(traced, part, traced.batch.upto(part)) for part in parts]

    item = blocks[0][0].dtype.itemsize if blocks else 1
    fit = _bytes_of_graphs(cuts, [batch for _, _, batch in cut], item, sum) <= graphs
    at_once = max(1, graphs // max(1, int(_bytes_of_graphs(cuts, [batch for _, _, batch in cut], item, max))))
    found = []
    for traced, part, batch in cut:
        device, B = traced.cotangent.device, len(batch.ids)
        where = slice(start, start + (part.stop - part.start) * B)
        tokens = ((traced.batch.slot >= part.start) & (traced.batch.slot < part.stop)).nonzero().squeeze(1)
        cells = (traced.batch.slot[tokens] - part.start) * B + batch.rows // batch.ids.shape[1]
        if fit and traced.graph and batch.ids.shape == traced.batch.ids.shape:
            outline, made = cuts.taken(traced.graph.pop())
        else:
            outline, made = cuts.whole(batch) if fit else (cuts.outline(batch), [])
        aligned = traced.cotangent[tokens].to(traced.dtype)
        found.append(
            Strip(
                traced, part, where, batch, tokens.to(device), cells.to(device), cuts, outline, aligned, at_once,
                dict(enumerate(made)),
            )
        )  # fmt: skip
        start = where.stop
    return found
