"""Where a backbone can be cut: tensors that everything deeper passes through, found from the autograd graph itself.

A cotangent is pulled back from cut to cut, so that of all modules only those between two cuts have theirs in memory, and of
the graph no more than that part. No architecture is assumed: a residual stream is cut before every attention and every MLP, a
parallel block once, and a model with a connection around everything not at all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ...model.calls import Call
from ...model.trace import Tracer
from ...model.unroll import Place, Unrolled
from ...sequences import Batch
from ..errors import Unsupported
from ..graph import batched_vjp, depth_of, depths, node_of

TRIED = 32  # tokens on which the cuts are tried
DIFFERENT_MODULES = "not every sequence passes through the same modules"


@dataclass(frozen=True)
class Outline:
    """A backbone unrolled on one sequence, without its tensors: what the modules return, and where it can be cut."""

    names: list[str]  # of the modules, call by call
    shapes: list[list[torch.Size]]  # of each output of each call
    depth: list[list[int | None]]  # of each output; None where nothing depends on it
    cuts: dict[Place, tuple[int, torch.Size]]
    top: torch.Size

    @classmethod
    def of(cls, h: Tensor, calls: Sequence[Call], given: Mapping[Place, Tensor]) -> Outline:
        """From what Tracer.unroll gives.

        Raises:
            Unsupported: none of the modules was called; see `require_by_sequence`.
        """
        if not h.requires_grad:
            raise Unsupported(DIFFERENT_MODULES)
        require_by_sequence(calls)
        depth, cuts = depths(h, [x for call in calls for x in call.outputs if x.is_leaf])

        at = partial(depth_of, depth)
        found = {key: (at(x), x.shape) for key, x in given.items() if x.requires_grad}
        return cls(
            [call.name for call in calls], [[x.shape for x in call.outputs] for call in calls],
            [[at(x) for x in call.outputs] for call in calls],
            {key: (d, shape) for key, (d, shape) in found.items() if d is not None and d in cuts}, h.shape,
        )  # fmt: skip

    def spans(self) -> list[tuple[int, int]]:
        """For each module from its shallowest output to its deepest one: all of them belong into one segment."""
        found: dict[str, list[int]] = {}
        for name, depth in zip(self.names, self.depth, strict=True):
            found.setdefault(name, []).extend(d for d in depth if d is not None)
        return [(min(d), max(d)) for d in found.values() if d]

    def segments(self, keys: Sequence[Place]) -> list[list[int]]:
        """Which calls lie in each segment; what lies below the deepest of them is left out."""
        ends = [self.cuts[key][0] for key in keys]
        where: list[list[int]] = [[] for _ in range(len(keys) + 1)]
        for i, depth in enumerate(self.depth):
            reached = [d for d in depth if d is not None]
            if reached:
                where[bisect_left(ends, max(reached))].append(i)
        while where and not where[-1]:
            where.pop()
        return where

    def sizes(self, keys: Sequence[Place]) -> list[list[int]]:
        """Elements of each module output, by segment."""
        return [[x.numel() for i in inside for x in self.shapes[i]] for inside in self.segments(keys)]


def require_by_sequence(calls: Sequence[Call]) -> None:
    """Raise unless every call of several sequences has a row for each of them.

    Raises:
        Unsupported: one has not (experts in a list, each called for the tokens that are given to it).
    """
    for call in calls:
        if call.sequences > 1 and not call.is_by_sequence:
            raise Unsupported(f"{call.name} does not take the sequences of a batch one by one")


def require_beginnings(tracer: Tracer, batches: Sequence[Batch]) -> None:
    """Raise unless a sequence cut behind any scored token gives the readout what the whole one gives it up to there.

    The structured engines cut sequences, and a model that selects among positions may take others of equal scores then. Cost: a
    forward pass for each token, where they take a backward pass.

    Raises:
        Unsupported: some do not.
    """
    for batch in batches:  # each a sequence
        whole = tracer.hidden(batch)
        for n in range(1, len(whole) + 1):
            cut = tracer.hidden(batch.upto(slice(0, n)))
            if not bool(((cut - whole[:n]).norm(dim=1) <= tracer.same * whole[:n].norm(dim=1)).all()):
                raise Unsupported("what it selects among positions depends on how many there are")


def common_cuts(outlines: Sequence[Outline]) -> list[Place]:
    """Cuts of every outline that separate no two calls of one module, from the readout down; of one depth, the first."""
    keys = set.intersection(*(set(outline.cuts) for outline in outlines))
    for outline in outlines:
        spans = outline.spans()
        keys = {key for key in keys if not any(low <= outline.cuts[key][0] < high for low, high in spans)}
    places: dict[int, Place] = {}
    for key, (depth, _) in outlines[0].cuts.items():
        if key in keys:
            places.setdefault(depth, key)
    found = [places[depth] for depth in sorted(places)]
    return found[: max(len(outline.segments(found)) for outline in outlines) - 1]


@dataclass(frozen=True)
class Segment:
    """The part of a graph between two cuts, with the modules that have their outputs there."""

    top: Tensor
    inside: list[tuple[Call, list[Tensor]]]
    bottom: Tensor | None

    @classmethod
    def of(cls, top: Tensor, calls: Sequence[Call], bottom: Tensor | None) -> Segment:
        """With these calls, outside the graph they were recorded in."""
        return cls(top, [(call.detached(), call.outputs) for call in calls], bottom)

    def pull(self, cotangent: Tensor) -> tuple[list[list[Tensor]], Tensor]:
        """Cotangents [b, *top] -> those at the modules' outputs, [b, *output], and at the lower cut (empty without one)."""
        outputs = [x for _, tensors in self.inside for x in tensors]
        ends = outputs if self.bottom is None else [*outputs, self.bottom]
        found = iter(batched_vjp(self.top, ends, cotangent))
        deltas = [[next(found) for _ in tensors] for _, tensors in self.inside]
        return deltas, cotangent.new_empty(0) if self.bottom is None else next(found)

    def agrees(self, other: Segment) -> bool:
        """Whether both give the same to the same cotangent."""
        if self.top.shape != other.top.shape or [c.name for c, _ in self.inside] != [c.name for c, _ in other.inside]:
            return False
        v = torch.randn(self.top.shape, generator=torch.Generator().manual_seed(0)).to(self.top)[None]
        (mine, below), (theirs, deep) = self.pull(v), other.pull(v)
        pairs = zip([below, *(x for of in mine for x in of)], [deep, *(x for of in theirs for x in of)], strict=True)
        eps = 100 * torch.finfo(v.dtype).eps
        return all(a.shape == b.shape and bool((a - b).norm() <= eps * b.norm()) for a, b in pairs)


@dataclass(frozen=True)
class Cuts:
    """Where a backbone is cut. A segment's graph is made when it is wanted, by a forward pass that stops behind it."""

    unroll: Callable[..., Unrolled]  # of a batch, from one place to another
    keys: tuple[Place, ...]  # from the readout down
    tried: Batch  # a short text, on which it is seen where a graph may begin
    widths: tuple[float, ...] = ()  # by segment, elements of its modules' outputs for a position of the longest sequence
    outlines: dict[torch.Size, Outline] = field(default_factory=dict)  # by the shape of a batch
    ends: dict[int, bool] = field(default_factory=dict)  # by cut: whether a graph may end there and the next begin

    @classmethod
    def of(
        cls,
        unroll: Callable[..., Unrolled],
        batches: Sequence[Batch],
        shortest: Batch,
        outlines: dict[torch.Size, Outline] | None = None,
    ) -> Cuts:
        """The places that all these batches share; on the beginning of the shortest one it is tried where a graph may begin.

        outlines: those that are known, by shape.
        """
        whole = cls(unroll, (), tried := shortest.upto(slice(0, TRIED)), outlines=outlines or {})
        keys = common_cuts([whole.outline(batch) for batch in batches])
        longest = max(batches, key=lambda batch: batch.ids.numel())
        widths = (sum(of) / longest.ids.numel() for of in whole.outline(longest).sizes(keys))
        return cls(unroll, tuple(keys), tried, tuple(widths), whole.outlines)

    def outline(self, batch: Batch) -> Outline:
        """The outline for a batch of this shape, made once; `segments` raises if another one of that shape differs."""
        shape = batch.ids.shape
        if shape not in self.outlines:
            self.outlines[shape] = Outline.of(*self.unroll(batch))
        return self._fitting(self.outlines[shape])

    def _fitting(self, outline: Outline) -> Outline:
        if not set(self.keys) <= set(outline.cuts):
            raise Unsupported(DIFFERENT_MODULES)
        return outline

    def __len__(self) -> int:
        return len(self.keys) + 1

    def graph_end(self, start: int, at_least: int) -> int:
        """Depth at which a graph of at least so many segments ends: the next cut at which a new graph gives the same vjp."""
        return next((stop for stop in range(start + at_least, len(self)) if self._is_end(stop)), len(self))

    def _is_end(self, depth: int) -> bool:
        """Whether the segments above and below a cut, each in a graph that goes no further, are those of the whole graph."""
        if depth not in self.ends:
            whole = self._cut(self.tried, 0, len(self))[0][depth - 1 : depth + 1]
            try:
                apart = [self._cut(self.tried, 0, depth)[0][-1], self._cut(self.tried, depth, len(self))[0][0]]
                self.ends[depth] = all(a.agrees(b) for a, b in zip(apart, whole, strict=True))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, KeyError):  # a leaf changed in place, a place that the pass does not reach
                self.ends[depth] = False
        return self.ends[depth]

    def whole(self, batch: Batch) -> tuple[Outline, list[Segment]]:
        """All segments of a sequence in one graph, with their outline."""
        return self.taken(self.unroll(batch, self.keys))

    def taken(self, graph: Unrolled) -> tuple[Outline, list[Segment]]:
        """All segments of a graph that somebody has made, with their outline."""
        return self._fitting(Outline.of(*graph)), self.divided(graph)

    def divided(self, graph: Unrolled) -> list[Segment]:
        """All segments of a whole graph."""
        return self._divided(*graph, 0, len(self))[0]

    def segments(self, batch: Batch, start: int, stop: int) -> list[Segment]:
        """Some of them on a sequence, from the readout down, in one graph.

        Raises:
            Unsupported: they hold other modules than in the sequence of this length that was looked at before.
        """
        found, inside = self._cut(batch, start, stop)
        outline = self.outline(batch)
        for calls, which in zip(inside, outline.segments(self.keys)[start:], strict=False):
            foreseen = [(outline.names[i], outline.shapes[i]) for i in which]
            if [(call.name, [x.shape for x in call.outputs]) for call in calls] != foreseen:
                raise Unsupported(DIFFERENT_MODULES)
        return found

    def _cut(self, batch: Batch, start: int, stop: int) -> tuple[list[Segment], list[list[Call]]]:
        """The segments, and the calls in each."""
        top, bottom = (self.keys[i] if 0 <= i < len(self.keys) else None for i in (start - 1, stop - 1))
        end, calls, given = self.unroll(batch, self.keys[max(0, start - 1) : stop], bottom, top)
        require_by_sequence(calls)
        return self._divided(end, calls, given, start, stop)

    def _divided(
        self, end: Tensor, calls: Sequence[Call], given: Mapping[Place, Tensor], start: int, stop: int
    ) -> tuple[list[Segment], list[list[Call]]]:
        """Split an unrolled graph at the inner cuts: its segments, and the calls in each."""
        bottom = self.keys[stop - 1] if stop <= len(self.keys) else None
        inner = self.keys[start : stop - 1]
        depth = depths(end, [x for call in calls for x in call.outputs if x.is_leaf])[0]

        at = partial(depth_of, depth)
        ends = [depth[node_of(given[key])] for key in inner]
        inside: list[list[Call]] = [[] for _ in range(stop - start)]
        for call in calls:
            reached = [d for d in map(at, call.outputs) if d is not None]
            if reached:
                inside[bisect_left(ends, max(reached))].append(call)
        cut = [given[key] for key in inner]
        tops, bottoms = [end, *cut], [*cut, None if bottom is None else given[bottom]]
        return [Segment.of(*of) for of in zip(tops, inside, bottoms, strict=True)], inside
