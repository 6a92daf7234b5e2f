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
    cost = 0.0
    for b in sorted(range(len(sizes)), key=sizes.__getitem__):
        length, alone = sizes[b][0], sizes[b][0] * sizes[b][1] + overhead
        slots = max(sizes[b][1], *(sizes[of][1] for of in runs[-1])) if runs else 0
        together = runs and length * slots * (len(runs[-1]) + 1) + overhead
        if runs and length * (len(runs[-1]) + 1) <= most and together <= cost + alone:
            runs[-1].append(b)
            cost = together
        else:
            runs.append([b])
            cost = alone
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

    ids, positions = [batch.ids for batch in batches], [batch.position_ids for batch in batches]
    return Batch(
        padded(ids),
        torch.cat([b * T + batch.rows for b, batch in enumerate(batches)]),
        *(torch.cat([getattr(batch, name) for batch in batches]) for name in ("targets", "sequence", "position")),
        None if positions[0] is None else padded([x for x in positions if x is not None]),
    )
