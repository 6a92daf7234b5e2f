"""Sequences of like length side by side: one padded batch, one graph, one set of rules.

A cotangent of such a batch carries one token of every sequence at once, those of one slot: slot i holds the i-th scored token
of each. Sequences do not meet in a model, so that what reaches a sequence is its own token's. Where one has fewer tokens than
another its last slots are empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from ...objective import GTerm
from ...sequences import Batch
from ..sides import Side


@dataclass(frozen=True)
class Stacked(Side):
    """A side whose batches were chosen by length.

    places: by batch, the places of its tokens on the side's axis of F.
    """

    places: Sequence[Int[Tensor, " N"]]

    @property
    def where(self) -> list[Int[Tensor, " N"]]:
        """See Side."""
        return list(self.places)


def side_by_side(side: Side, most: int, overhead: float) -> Stacked:
    """Sequences in batches, by length: together where padding costs less than a batch of its own.

    Args:
        side: one sequence a batch (`Side.one_by_one`).
        most: padded positions of a batch.
        overhead: what a batch costs beside its slots times its positions, in the same unit.
    """
    sizes = [(batch.ids.shape[1], len(batch.rows)) for batch in side.batches]
    runs: list[list[int]] = []
    cost = slots = 0.0
    for b in sorted(range(len(sizes)), key=sizes.__getitem__):
        length, own = sizes[b]
        count = len(runs[-1]) + 1 if runs else 1
        together, alone = length * max(slots, own) * count + overhead, length * own + overhead
        if count > 1 and length * count <= most and together <= cost + alone:
            runs[-1].append(b)
            cost, slots = together, max(slots, own)
        else:
            runs.append([b])
            cost, slots = alone, own
    runs = sorted(map(sorted, runs))
    where = side.where
    return Stacked(
        [_stack([side.batches[b] for b in run]) for run in runs],
        [GTerm.joined([side.terms[b] for b in run]) for run in runs],
        [torch.cat([where[b] for b in run]) for run in runs],
    )


def _stack(batches: Sequence[Batch]) -> Batch:
    """Batches of one sequence as one batch, padded on the right."""
    if len(batches) == 1:
        return batches[0]
    T = max(batch.ids.shape[1] for batch in batches)

    def padded(xs: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad(x, (0, T - x.shape[1])) for x in xs])

    tokens = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in ("targets", "sequence", "position")}
    rows = torch.cat([b * T + batch.rows for b, batch in enumerate(batches)])
    positions = [batch.position_ids for batch in batches if batch.position_ids is not None]
    return Batch(
        padded([batch.ids for batch in batches]), rows, **tokens, position_ids=padded(positions) if positions else None
    )
