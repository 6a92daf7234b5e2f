"""What a reduction takes at its peak: a forward pass on a short piece is looked at, the rest is arithmetic (docs/scale.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.trace import Tracer
from ..sequences import Batch
from .scanning import layer_width, pass_bytes
from .scope import Scope

PIECE = 64  # positions of the shorter of the two pieces; the longer has twice as many
SCORES = 3.0  # numbers a scored token and vocabulary entry that the cotangent at the logits takes beside what is kept
WORK = 3.0  # numbers a position and unit of the widest layer that its own backward pass works on


def reduction_bytes(scope: Scope, source: Sequence[Batch], sink: Sequence[Batch]) -> dict[str, int]:
    """Bytes that a reduction takes at its peak beside the model, by what holds them; they are not all held at once.

    Args:
        scope: what moves.
        source, sink: batches of the side that is pulled back, and of the one that is moved along.

    Returns:
        direction: a copy of what moves; backward: what a batch's graph keeps for its backward pass, what that works on at the
        logits and in a layer, and the readout's gradient; gradients: those of all uses, and the sums of tied ones; tangents: a
        tangent pass over a batch. The peak is `peak` of these.

    Cost: two forward passes of 64 and 128 tokens.
    """
    tracer, V = scope.tracer, len(scope.tracer.readout.weight)
    item = tracer.dtype.itemsize
    size = {tensor: tracer.params[tensor].nbytes for tensor in scope.uses.values()}
    tied = [tensor for tensor in size if list(scope.uses.values()).count(tensor) > 1]
    head = size.get(scope.uses.get(tracer.readout.weight_name, ""), 0)
    (linear, square), w = _kept(scope), layer_width(tracer)
    backward = []
    for batch in source:
        n, T = batch.ids.numel(), batch.ids.shape[1]
        kept = linear * n + square * n * T
        backward.append(kept + item * (SCORES * V * len(batch.targets) + WORK * n * w) + head)
    return {
        "direction": sum(size.values()),
        "backward": int(max(backward)),
        "gradients": sum(size[tensor] for tensor in scope.uses.values()) + sum(size[tensor] for tensor in tied),
        "tangents": max(pass_bytes(tracer, batch, 1) for batch in sink),
    }


def peak(parts: dict[str, int]) -> int:
    """The most that is held at once: a graph and the gradients that its backward pass leaves take turns."""
    return max(parts["backward"], parts["gradients"], parts["direction"] + parts["tangents"])


def _kept(scope: Scope) -> tuple[float, float]:
    """What a graph keeps: bytes a position, and bytes a position and position behind it (attention that keeps its scores)."""
    one, two = (kept_bytes(scope, T) for T in (PIECE, 2 * PIECE))
    square = max(0.0, (two - 2 * one) / (2 * PIECE**2))
    return (one - square * PIECE**2) / PIECE, square if square * PIECE > 0.01 * one / PIECE else 0.0


def kept_bytes(scope: Scope, T: int) -> int:
    """What the graph of a sequence of T tokens keeps for its backward pass, one of them scored; parameters do not count."""
    tracer, kept = scope.tracer, dict[int, int]()
    leaves = {use: tracer.params[use].detach().requires_grad_() for use in scope.uses}
    own = {p.untyped_storage().data_ptr() for p in tracer.params.values()}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        z = tracer.logits(_piece(tracer, T), leaves)
    del z
    return sum(kept.values())


def _piece(tracer: Tracer, T: int) -> Batch:
    """A sequence of T tokens whose last is scored."""
    ids = torch.arange(T)[None] % tracer.vocabulary
    last = torch.tensor([T - 2])
    return Batch(ids, last, ids[0, -1:], torch.zeros_like(last), last + 1)
