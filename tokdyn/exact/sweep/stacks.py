"""Sequences of like length side by side: one padded batch, one graph, one set of rules.

A cotangent of such a batch carries one token of every sequence at once, those of one slot: slot i holds the i-th scored token
of each. Sequences do not meet in a model, so that what reaches a sequence is its own token's. Where one has fewer tokens than
another its last slots are empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    factors: by batch, what was taken out of its tokens' forces.
    """

    places: Sequence[Tensor]
    factors: Sequence[Tensor]

    @property
    def where(self) -> list[Int[Tensor, " N"]]:
        """See Side."""
        return list(self.places)

    def of(self, which: slice) -> Stacked:
        """Some of the batches, on the same axis."""
        return Stacked(self.batches[which], self.terms[which], self.places[which], self.factors[which])

    def and_then(self, other: Stacked) -> Stacked:
        """These batches and others, on the same axis."""
        fields = ("batches", "terms", "places", "factors")
        return Stacked(*([*getattr(self, name), *getattr(other, name)] for name in fields))


def on_both_sides(o: Side, u: Side) -> tuple[Stacked, Stacked, int]:
    """Both sides with the sequences that are on both of them in front, and how many they are: those are pulled back once.

    Their scored tokens are the same and their forces plain, c (e_y - pi), of which c is taken out: one cotangent serves both.

    Args:
        o, u: the sides, one sequence a batch.
    """
    known: dict[Any, list[int]] = {}
    for b, (batch, term) in enumerate(zip(o.batches, o.terms, strict=True)):
        if term.is_plain:
            known.setdefault(_tokens(batch), []).append(b)
    pairs = []
    for b, (batch, term) in enumerate(zip(u.batches, u.terms, strict=True)):
        if term.is_plain and (same := known.get(_tokens(batch))):
            pairs.append((same.pop(0), b))
    mine, theirs = ([pair[i] for pair in pairs] for i in (0, 1))
    return _with_in_front(o, mine), _with_in_front(u, theirs), len(pairs)


def _tokens(batch: Batch) -> Any:
    """What makes a batch of one sequence the same as another."""
    positions = () if batch.position_ids is None else tuple(batch.position_ids.flatten().tolist())
    return tuple(batch.ids.flatten().tolist()), positions, tuple(batch.rows.tolist()), tuple(batch.targets.tolist())


def _with_in_front(side: Side, first: Sequence[int]) -> Stacked:
    """A side with some of its batches in front and c of their forces taken out."""
    order = [*first, *(b for b in range(len(side.batches)) if b not in set(first))]
    terms, where, factors = [], side.where, []
    for n, b in enumerate(order):
        term = side.terms[b]
        ones = torch.ones(len(side.batches[b].rows), dtype=term.c.dtype, device=term.c.device)
        terms.append(replace(term, c=ones) if n < len(first) else term)
        factors.append(term.c if n < len(first) else ones)
    return Stacked([side.batches[b] for b in order], terms, [where[b] for b in order], factors)


def side_by_side(side: Stacked, most: int, overhead: float) -> Stacked:
    """Sequences in batches, by length: together where padding costs less than a batch of its own.

    Args:
        side: one sequence a batch.
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
        [torch.cat([side.factors[b] for b in run]) for run in runs],
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
