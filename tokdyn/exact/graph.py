"""An autograd graph as data: depth of its nodes, the nodes that everything deeper passes through, many cotangents at once."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

Node = Any  # torch.autograd.graph.Node, which torch does not type


def node_of(x: Tensor) -> Node:
    """The node that made a tensor, or that accumulates its gradient."""
    return torch.autograd.graph.get_gradient_edge(x).node


def depths(h: Tensor, leaves: Sequence[Tensor]) -> tuple[dict[Node, int], set[int]]:
    """The nodes between h and the leaves with their depth, and the depths of those through which all deeper ones are reached.

    Nodes are visited in reverse topological order. A node visited while the queue is otherwise empty dominates everything
    deeper: it is a cut.
    """
    wanted = {id(x) for x in leaves}

    def order(node: Node) -> int:
        return -1 if hasattr(node, "variable") else node._sequence_nr()

    first = node_of(h)
    waiting, seen = [(-order(first), 0, first)], {first}
    depth: dict[Node, int] = {}
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


def depth_of(depth: Mapping[Node, int], x: Tensor) -> int | None:
    """Depth of the node that made a tensor; None where nothing depends on it."""
    return depth.get(node_of(x))


def batched_vjp(top: Tensor, ends: Sequence[Tensor], cotangents: Tensor) -> list[Tensor]:
    """Jᵀv of many cotangents in one backward pass: [b, *top] -> [b, *end] for each end, zero where top does not depend on it.

    The graph is kept.
    """

    def one(v: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(top, ends, v, retain_graph=True, allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, ends, strict=True))

    return list(vmap(one)(cotangents))
