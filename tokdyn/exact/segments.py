"""Where a backbone can be cut: tensors that everything deeper passes through, found from the autograd graph itself.

A cotangent is pulled back from cut to cut, so that of all modules only those between two cuts have theirs in memory. No
architecture is assumed: a residual stream is cut before every attention and every MLP, a parallel block once, and a model
with a connection around everything not at all.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from ..trace import Call

Key = tuple[Any, ...]  # which tensor of which call: the same for every sequence


def depths(h: Tensor, leaves: Sequence[Tensor]) -> tuple[dict[Any, int], set[int]]:
    """The nodes between h and the leaves with their depth, and the depths of those through which all deeper ones are reached.

    Nodes come up in an order in which each is before all that it was made from; one that comes up when no other is waiting
    is a cut.
    """
    wanted = {id(x) for x in leaves}

    def order(node: Any) -> int:
        return -1 if hasattr(node, "variable") else node._sequence_nr()

    first = torch.autograd.graph.get_gradient_edge(h).node
    waiting, seen = [(-order(first), 0, first)], {first}
    depth: dict[Any, int] = {}
    cuts = set()
    while waiting:
        node = heapq.heappop(waiting)[2]
        depth[node] = len(depth)
        if not waiting and len(node._input_metadata) == 1:
            cuts.add(depth[node])
        for deeper, _ in node.next_functions:
            if deeper is not None and deeper not in seen and (not hasattr(deeper, "variable") or id(deeper.variable) in wanted):
                seen.add(deeper)
                heapq.heappush(waiting, (-order(deeper), len(seen), deeper))
    return depth, cuts


@dataclass(frozen=True)
class Unrolled:
    """A backbone unrolled on one sequence: its calls with the depth of each output, and the tensors where it can be cut."""

    h: Tensor
    calls: list[Call]
    depth: list[list[int | None]]  # of each output of each call; None where nothing depends on it
    cuts: dict[Key, tuple[int, Tensor]]

    @classmethod
    def of(cls, h: Tensor, calls: list[Call], tensors: Mapping[Key, Tensor]) -> Unrolled:
        """From what Tracer.unroll gives."""
        leaves = [x for call in calls for x in call.outputs if x.is_leaf]
        depth, cuts = depths(h, leaves)

        def at(x: Tensor) -> int | None:
            return depth.get(torch.autograd.graph.get_gradient_edge(x).node)

        found = {key: (at(x), x) for key, x in tensors.items() if x.requires_grad}
        return cls(h, calls, [[at(x) for x in call.outputs] for call in calls],
                   {key: (d, x) for key, (d, x) in found.items() if d is not None and d in cuts})  # fmt: skip

    def spans(self) -> list[tuple[int, int]]:
        """For each module from its shallowest output to its deepest one: all of them belong into one segment."""
        found: dict[str, list[int]] = {}
        for call, depth in zip(self.calls, self.depth, strict=True):
            found.setdefault(call.name, []).extend(d for d in depth if d is not None)
        return [(min(d), max(d)) for d in found.values() if d]


def common_cuts(graphs: Sequence[Unrolled]) -> list[Key]:
    """The cuts that all graphs share and that divide no module's calls, from the readout down, one for each place."""
    keys = set.intersection(*(set(graph.cuts) for graph in graphs))
    for graph in graphs:
        spans = graph.spans()
        keys = {key for key in keys if not any(low <= graph.cuts[key][0] < high for low, high in spans)}
    first = graphs[0].cuts
    places = {first[key][0]: key for key in sorted(keys, key=repr)}
    return [places[depth] for depth in sorted(places)]


@dataclass(frozen=True)
class Segment:
    """The part of a graph between two cuts, with the modules that have their outputs there."""

    top: Tensor
    inside: list[tuple[Call, list[Tensor]]]
    bottom: Tensor | None

    def pull(self, cotangent: Tensor) -> tuple[list[list[Tensor]], Tensor]:
        """Cotangents [b, *top] -> those at the modules' outputs, [b, *output], and at the lower cut (empty without one)."""
        outputs = [x for _, tensors in self.inside for x in tensors]
        ends = outputs if self.bottom is None else [*outputs, self.bottom]

        def back(v: Tensor) -> tuple[Tensor, ...]:
            grads = torch.autograd.grad(self.top, ends, v, retain_graph=True, allow_unused=True)
            return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, ends, strict=True))

        found = iter(vmap(back)(cotangent))
        deltas = [[next(found) for _ in tensors] for _, tensors in self.inside]
        return deltas, cotangent.new_empty(0) if self.bottom is None else next(found)


def segments(graph: Unrolled, keys: Sequence[Key]) -> list[Segment]:
    """The graph cut at the keys; what lies below the deepest module is left out."""
    ends = [graph.cuts[key] for key in keys]
    where: list[list[tuple[Call, list[Tensor]]]] = [[] for _ in range(len(keys) + 1)]
    for call, depth in zip(graph.calls, graph.depth, strict=True):
        reached = [d for d in depth if d is not None]
        if reached:
            where[bisect_left([d for d, _ in ends], max(reached))].append((call.detached(), call.outputs))
    tops, bottoms = [graph.h, *(x for _, x in ends)], [*(x for _, x in ends), None]
    last = max((i for i, inside in enumerate(where) if inside), default=-1)
    return [
        Segment(top, inside, bottom if i < last else None)
        for i, (top, inside, bottom) in enumerate(zip(tops, where, bottoms, strict=True))
        if i <= last
    ]
