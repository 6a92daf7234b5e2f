"""What a pass, a reduction, a scoring and the readout's forces take at their peak, told before they are made (docs/scale.md).

A graph is not modelled: what one of 64 and one of 128 tokens keep is looked at, the rest is arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.native import ROWS
from ..kernels.readout_forces.cpp import TILE, through_weight
from ..model.layered import layers, layers_can_be_made_again
from ..model.trace import Tracer
from ..sequences import Batch

MEMORY = 4 << 30
PIECE = 64  # positions of the shorter of the two pieces; the longer has twice as many
SCORES = 3.0  # numbers a scored token and vocabulary entry that the cotangent at the logits takes beside what is kept
WORK = 3.0  # numbers a position and unit of the widest layer that its own backward pass works on
MOST = 8  # numbers a position and unit of all matrices' inputs and outputs that no graph keeps more of; else it is looked at
READOUT = 64 << 20  # most bytes of both sides' products in ops.readout_forces
CHUNK, LAST = 2048, 1024  # most tokens of a chunk, rows that it ends together

# What a tangent pass holds at its peak, fitted by benchmarks/scan.py, of the forward pass and for each direction:
LOGITS = 1.03, 3.02  # numbers a scored token and vocabulary entry
LAYERS = 3.8, 5.3  # numbers a position and unit of (hidden width + widest layer)
MASK = 0.2  # of attention: numbers for each query and key, a byte of float32
STREAM = 2.0  # numbers a position and unit of hidden width that are still there at the logits

Uses = Mapping[str, str]


def pass_bytes(tracer: Tracer, batch: Batch, G: int) -> int:
    """About what a forward pass over a batch with the tangents of G directions takes at its peak, beside model and directions.

    With G=0 it is what scoring takes (logits and ops.token_stats). The peak is in the widest layer or at the logits; within
    15 % where benchmarks/scan.py compares it.
    """
    return int(
        tracer.dtype.itemsize * pass_numbers(Widths.of(tracer), batch.ids.numel(), len(batch.targets), G, batch.ids.shape[1])
    )


class Widths(NamedTuple):
    """The sizes of a model that the memory of its passes follows from: vocabulary, hidden width, widest layer."""

    V: int
    d: int
    widest: int

    @classmethod
    def of(cls, tracer: Tracer) -> Widths:
        """Of a traced model."""
        V, d = tracer.readout.weight.shape
        return cls(V, d, layer_width(tracer))


def pass_numbers(widths: Widths, positions: int, scored: int, G: int, longest: int = 0) -> float:
    """`pass_bytes` in numbers, from sizes alone; the mask of sequences up to `longest` is there while layers run."""
    V, d, widest = widths
    logits = (LOGITS[0] + LOGITS[1] * G) * scored * V + STREAM * (1 + G) * positions * d
    return max(logits, (LAYERS[0] + LAYERS[1] * G) * positions * (d + widest) + MASK * positions * longest)


def backward_numbers(widths: Widths, positions: int, scored: int) -> float:
    """Numbers that a backward pass works on, at the logits and in a layer, beside what its graph keeps."""
    return SCORES * widths.V * scored + WORK * positions * widths.widest


def layer_width(tracer: Tracer) -> int:
    """The larger side of the widest layer's weight; embeddings do not count."""
    return max((max(shape) for shape in _matrices(tracer)), default=tracer.readout.weight.shape[1])


def _matrices(tracer: Tracer) -> list[torch.Size]:
    """The shapes of the backbone's weights."""
    tables = {f"{name}.weight" for name, module in tracer.model.named_modules() if isinstance(module, nn.Embedding)}
    tables |= {tracer.readout.weight_name}
    return [p.shape for name, p in tracer.params.items() if p.dim() > 1 and name not in tables]


@dataclass(frozen=True)
class Graph:
    """What the graph of a backward pass keeps, of any batch.

    Attributes:
        tracer, uses: the model, and what moves of it.
        each: bytes a position.
        pair: bytes a position and position of its sequence (a mask; attention that keeps its scores).
    """

    tracer: Tracer
    uses: Uses
    each: float
    pair: float

    @classmethod
    def of(cls, tracer: Tracer, uses: Uses, longest: int) -> Graph:
        """From the graphs of two short sequences, no longer than the longest there is. Cost: a forward pass of each."""
        T = max(4, min(2 * PIECE, longest)) // 2
        one, two = (kept_bytes(tracer, uses, n * T) for n in (1, 2))
        pair = max(0.0, (two - 2 * one) / (2 * T**2))
        return cls(tracer, uses, (one - pair * T**2) / T, pair)

    def bytes(self, batch: Batch) -> int:
        """Of a batch's backward pass: what is kept, what it works on at the logits and in a layer, the readout's gradient."""
        head = self.uses.get(self.tracer.readout.weight_name)
        gradient = 0 if head is None else self.tracer.params[head].nbytes
        return self._kept(batch, self.each) + self._work(batch) + gradient

    def bytes_again(self, batch: Batch) -> int:
        """The same where layers are made again: what enters each, and the graph of one; in the end that and the gradients.

        Those of the last layer itself are left out: they come while its graph goes.
        """
        inputs = len(found := layers(self.tracer.model)) * self.tracer.readout.weight.shape[1] * self.tracer.dtype.itemsize
        entering, graph = self._kept(batch, inputs), self._kept(batch, self.each / max(1, len(found))) + self._work(batch)
        return graph + max(entering, self._gradients)

    @cached_property
    def _gradients(self) -> int:
        """Bytes of the gradients of all uses but those of one layer."""
        found = layers(self.tracer.model)
        own = {id(p) for layer in found for p in layer.parameters()}
        inside = {name for name, p in self.tracer.model.named_parameters() if id(p) in own}
        size = {use: self.tracer.params[use].nbytes for use in self.uses}
        return sum(size.values()) - sum(n for use, n in size.items() if use in inside) // max(1, len(found))

    def _kept(self, batch: Batch, each: float) -> int:
        return int(batch.ids.numel() * (each + self.pair * batch.ids.shape[1]))

    def _work(self, batch: Batch) -> int:
        numbers = backward_numbers(Widths.of(self.tracer), batch.ids.numel(), len(batch.targets))
        return int(self.tracer.dtype.itemsize * numbers)


def fits(tracer: Tracer, uses: Uses, batches: Sequence[Batch], memory: int) -> list[bool]:
    """Of each batch, whether the graph of its backward pass fits; looked at where it is not plain from the sizes alone."""
    sides, item = sum(sum(shape[-2:]) for shape in _matrices(tracer)), tracer.dtype.itemsize
    heads = getattr(getattr(tracer.model, "config", None), "num_attention_heads", 1) if tracer.found.attention == "eager" else 1
    V, graph, found = len(tracer.readout.weight), None, []
    for batch in batches:
        n, T = batch.ids.numel(), batch.ids.shape[1]
        most = item * (MOST * n * sides + (SCORES + 1) * V * len(batch.targets) + MOST * n * T * heads)
        if most > memory and graph is None:
            graph = Graph.of(tracer, uses, max(batch.ids.shape[1] for batch in batches))
        found.append(most <= memory or graph is None or graph.bytes(batch) <= memory)
    return found


def may_make_layers_again(tracer: Tracer) -> bool:
    """Whether the model has layers whose graphs a backward pass may make again, to the same gradients; looked at once."""
    if tracer.found.layers_again is None:
        piece, params = _piece(tracer, 8), {name: tracer.params[name] for name in tracer.trainable}
        same = layers_can_be_made_again(lambda leaves, again: tracer.logits(piece, leaves, again), params, tracer.same)
        tracer.found.layers_again = bool(layers(tracer.model)) and same
    return tracer.found.layers_again


def reduction_bytes(
    tracer: Tracer, uses: Uses, source: Sequence[Batch], sink: Sequence[Batch], memory: int = MEMORY
) -> dict[str, int]:
    """Bytes that a reduction takes at its peak beside the model, by what holds them; they are not all held at once.

    Args:
        tracer, uses: the model, and what moves of it.
        source, sink: batches of the side that is pulled back, and of the one that is moved along.
        memory: layers are made again in the backward pass of a batch whose graph does not fit.

    Returns:
        direction: a copy of what moves; backward: a batch's graph and what its backward pass works on; gradients: those of all
        uses, and the sums of tied ones; tangents: a tangent pass over a batch. The peak is `peak` of these.

    Cost: two forward passes of 64 and 128 tokens.
    """
    size = {tensor: tracer.params[tensor].nbytes for tensor in uses.values()}
    tied = [tensor for tensor in size if list(uses.values()).count(tensor) > 1]
    graph = Graph.of(tracer, uses, max(batch.ids.shape[1] for batch in source))
    plain = [graph.bytes(batch) for batch in source]
    again = [graph.bytes_again(batch) for batch in source]
    return {
        "direction": sum(size.values()),
        "backward": max(b if a > memory else a for a, b in zip(plain, again, strict=True)),
        "gradients": sum(size[tensor] for tensor in uses.values()) + sum(size[tensor] for tensor in tied),
        "tangents": max(pass_bytes(tracer, batch, 1) for batch in sink),
    }


def scoring_bytes(tracer: Tracer, batches: Sequence[Batch]) -> dict[str, int]:
    """The same of scoring a side: the logits of one batch at a time and their statistics."""
    return {"scoring": max(pass_bytes(tracer, batch, 0) for batch in batches)}


def readout_bytes(
    tracer: Tracer, observed: Sequence[Batch], updated: Sequence[Batch], reduce: Literal["update", "observe"] | None = None
) -> dict[str, int]:
    """The same of the readout's forces in closed form (ops.readout_forces): the matrix, or a reduction, which has none.

    Returns:
        scoring: as `scoring_bytes`, of both sides; hidden: what enters the readout at all tokens; matrix: the operator's
        result and where it is copied to, or the tile of a reduction that goes by tiles; products: what the operator works on.
    """
    V, d = tracer.readout.weight.shape
    M, L = (sum(len(batch.targets) for batch in side) for side in (observed, updated))
    item = tracer.precision.itemsize
    found = scoring_bytes(tracer, [*observed, *updated]) | {"hidden": item * (M + L) * d}
    if reduce and through_weight(M, L, d):
        rows = columns = min(ROWS, max(M, L))
    else:
        rows, columns = (min(M, TILE), min(L, TILE)) if reduce else (M, L)
    chunk = min(V, max(256, min(READOUT // (item * (rows + columns)), CHUNK)))
    if reduce and through_weight(M, L, d):
        return found | {"products": item * chunk * (rows + columns + d)}
    targets, ends = 2 * min(V, rows + columns) * d, 2 * min(rows, LAST) * columns
    return found | {
        "matrix": item * rows * columns * (1 if reduce else 2),
        "products": item * ((rows + columns) * chunk + targets + ends),
    }


def peak(parts: Mapping[str, int]) -> int:
    """The most that is held at once: a graph, the gradients that its backward pass leaves and a scoring take turns."""
    at = parts.get
    return max(
        at("scoring", 0),
        at("backward", 0),
        at("gradients", 0),
        at("direction", 0) + at("tangents", 0),
        at("hidden", 0) + at("matrix", 0) + at("products", 0),
    )


def kept_bytes(tracer: Tracer, uses: Uses, T: int) -> int:
    """What the graph of a sequence of T tokens keeps for its backward pass, one of them scored; parameters do not count."""
    kept: dict[int, int] = {}
    leaves = {use: tracer.params[use].detach().requires_grad_() for use in uses}
    own = {p.untyped_storage().data_ptr() for p in tracer.params.values()}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # itself it may be a node's own output, and the two would keep each other for ever

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        z = tracer.logits(_piece(tracer, T), leaves)
    del z
    return sum(kept.values())


def _piece(tracer: Tracer, T: int) -> Batch:
    """A sequence of T tokens whose last is scored."""
    ids = torch.arange(T)[None] % tracer.vocabulary
    last = torch.tensor([T - 2])
    return Batch(ids, last, ids[0, -1:], torch.zeros_like(last), last + 1)
