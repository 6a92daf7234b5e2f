"""Strips: consecutive tokens of a sequence that are pulled back together, from the readout down, segment by segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Int
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

    chunk: int  # cotangents pulled together
    group: int  # streamed tokens that meet the kept ones together
    strip: int  # kept tokens that are pulled in one graph: a part of the kept ones is whole strips
    kept: int  # bytes of what is kept of a segment; what does not fit is done in parts, the streamed side pulled for each
    graphs: int  # bytes of graphs: so many segments are made in one forward pass, of all sequences of both sides


@dataclass(eq=False)
class Strip:
    """A run of consecutive scored tokens, on the sequence truncated after the last one.

    Mutable: each `pull` replaces its cotangents by those at the next cut.

    Attributes:
        traced: the whole sequence.
        rows: the tokens among the sequence's.
        where: the tokens on the tile's axis.
        batch: the sequence up to the last of them.
        cuts, outline: where the backbone is cut, and what lies between on a sequence of this length.
        aligned: the tokens' cotangents at the current cut in one tensor, while each stays at its own position.
        at_once: how many segments are made in one graph.
        made: segments whose graph exists, by depth.
        cotangents: of each chunk of tokens, [b, *cut], once they have spread over positions.
    """

    traced: TracedBatch
    rows: slice
    where: slice
    batch: Batch
    cuts: Cuts
    outline: Outline
    aligned: Tensor
    at_once: int
    made: dict[int, Segment]
    cotangents: list[Tensor] = field(default_factory=list)

    @property
    def positions(self) -> Int[Tensor, " N"]:
        """Where the tokens are scored."""
        return self.batch.rows.to(self.traced.cotangent.device)

    @property
    def half(self) -> int:
        """Half of the whole sequence: about how many positions a token's cotangents take."""
        return self.traced.batch.ids.shape[1] // 2

    def segment(self, depth: int) -> Segment:
        """A segment of the backbone on this sequence, its graph made now if it is not there."""
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
        """From one cotangent for all tokens to one for each of them, in chunks."""
        whole = self.aligned
        every = torch.arange(len(self.positions), device=whole.device)
        where = every if whole.dim() == 2 else self.positions  # before the first segment there are only the tokens
        for part in every.tensor_split(-(-len(every) // chunk)):
            alone = whole.new_zeros(len(part), *whole.shape)
            alone.flatten(1, -2)[every[: len(part)], where[part]] = whole.flatten(0, -2)[where[part]]
            self.cotangents.append(alone)
        self.aligned = whole.new_empty(0)

    def pull(self, depth: int, last: bool = True) -> Iterator[tuple[slice, Found]]:
        """The vjp of every chunk through a segment: its columns on the tile's axis, and the cotangents at the modules.

        `last` moves the strip's own cotangents down; without it the segment can be pulled again.
        """
        start, segment = self.where.start, self.segment(depth)
        for i, cotangent in enumerate(self.cotangents):
            deltas, below = segment.pull(cotangent)
            if last:
                self.cotangents[i] = below
            yield slice(start, start + len(cotangent)), _by_module(segment, deltas)
            start += len(cotangent)
        if last:
            self.release(depth)


def _by_module(segment: Segment, deltas: list[list[Tensor]]) -> Found:
    found: Found = {}
    for (call, _), delta in zip(segment.inside, deltas, strict=True):
        calls, all_deltas = found.setdefault(call.name, ([], []))
        calls.append(call)
        all_deltas.append(delta)
    return found


def in_strips(tokens: int, longest: int | None = None) -> list[slice]:
    """The tokens of a sequence in runs of about the same length, at most `longest` of them in one."""
    count = max(1, min(LENGTHS, tokens // SHORTEST), -(-tokens // (longest or tokens)))
    length = -(-tokens // count)
    return [slice(a, min(a + length, tokens)) for a in range(0, tokens, length)]


def make_strips(
    cuts: Cuts, tokens: Sequence[tuple[TracedBatch, slice]], graphs: int, longest: int | None = None
) -> list[Strip]:
    """The tokens of one side of a tile as strips, with their cotangents at the input of the readout.

    Args:
        cuts: where the backbone is cut.
        tokens: sequences and which tokens of each.
        graphs: bytes their graphs may take: made once where all fit, else some segments at a time when those are wanted.
        longest: most tokens of a strip.
    """
    cut: list[tuple[TracedBatch, slice, Batch]] = []
    for traced, rows in tokens:
        a = rows.start
        parts = [slice(a + of.start, a + of.stop) for of in in_strips(rows.stop - a, longest)]
        cut += [(traced, part, traced.batch.upto(part)) for part in parts]

    def size(traced: TracedBatch, batch: Batch, how: Callable[[list[int]], int]) -> int:
        values = how([sum(of) for of in cuts.outline(traced.batch).sizes(cuts.keys)])
        return SAVED * traced.dtype.itemsize * values * batch.ids.shape[1] // traced.batch.ids.shape[1]

    fit = sum(size(traced, batch, sum) for traced, _, batch in cut) <= graphs
    at_once = max(1, graphs // max(1, sum(size(traced, batch, max) for traced, _, batch in cut)))
    found, start = [], 0
    for traced, part, batch in cut:
        where = slice(start, start + len(batch.rows))
        outline, made = cuts.whole(batch) if fit else (cuts.outline(batch), [])
        aligned = traced.cotangent[part].to(traced.dtype)
        found.append(Strip(traced, part, where, batch, cuts, outline, aligned, at_once, dict(enumerate(made))))
        start = where.stop
    return found
