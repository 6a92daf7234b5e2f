"""Tokens of one side with the same context and target, as one: their gradients are multiples of one another.

    Γ_l = c_l (e_y - π)  at the same logits, with the same Jacobian    =>    F[:, l] = c_l F'[:, j(l)]

The prefix that the answers of a pair or of a group share, sequences that come twice. A token whose force has an entropy's or a
uniform part, or further targets, stays by itself. A problem is solved for one token of each kind, and its matrix spread.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .contexts import only
from .problem import MEMORY, Coverage, Fill, Problem
from .progress import Progress
from .sides import Side

BLOCK = 1 << 22  # numbers of F that are spread at a time


@dataclass(frozen=True)
class Kinds:
    """A side with one token of each kind.

    Attributes:
        side: those tokens, each with the force of c = 1 where it stands for others as well.
        index: the kind of every token of the larger side.
        scale: its c, or 1 where it stands by itself.
    """

    side: Side
    index: Int[Tensor, " N"]
    scale: Float[Tensor, " N"]


@dataclass(frozen=True)
class Merged:
    """A Fill of [M, L], also in parts: another Fill on one token of each kind, on either side."""

    token_fill: Fill

    def __call__(
        self, problem: Problem, out: Float[Tensor, "*parts M L"], *, memory: int = MEMORY, progress: Progress | None = None
    ) -> Coverage:
        """See Fill."""
        fewer, o, u = of_kinds(problem)
        if fewer is problem:
            return self.token_fill(problem, out, memory=memory, progress=progress)
        F = fewer.empty().to(out)
        try:
            return self.token_fill(fewer, F, memory=memory, progress=progress)
        finally:  # after an interrupt what is done
            for part, whole in [(F, out)] if problem.parts is None else zip(F, out, strict=True):
                spread(part, o, u, whole)


def of_kinds(problem: Problem) -> tuple[Problem, Kinds | None, Kinds | None]:
    """The problem of one token of each kind, and the kinds of either side; None where no two of its tokens are of one kind."""
    o, u = kinds(problem.observed), kinds(problem.updated)
    if o is None and u is None:
        return problem, o, u
    sides = problem.observed if o is None else o.side, problem.updated if u is None else u.side
    return Problem(problem.tracer, problem.uses, problem.P, *sides, parts=problem.parts, tiles=problem.tiles), o, u


def spread(F: Float[Tensor, "m l"], o: Kinds | None, u: Kinds | None, out: Float[Tensor, "M L"]) -> None:
    """F of the kinds as F of the tokens, some rows at a time."""
    for rows in torch.arange(len(out), device=out.device).split(max(1, BLOCK // out.shape[1])):
        block = F[rows if o is None else o.index[rows]]
        if o is not None:
            block = block * o.scale[rows, None].to(block)
        out[rows] = block if u is None else block[:, u.index] * u.scale.to(block)


def kinds(side: Side) -> Kinds | None:
    """The tokens of a side, one of each kind; None where no two are of one kind.

    Cost: a dictionary entry for each distinct prefix.
    """
    number = dict[Hashable, int]()
    index = [number.setdefault(key, len(number)) for key in _keys(side)]
    if len(number) == len(index):
        return None
    batches, terms, scales, seen, start = [], [], [], 0, 0
    size = torch.bincount(torch.tensor(index))
    for batch, term in zip(side.batches, side.terms, strict=True):
        own = index[start : start + len(batch.targets)]
        start += len(own)
        stands = (size[own] > 1).to(term.c.device)  # for others too: plain tokens alone do
        scales.append(torch.where(stands, term.own_c, torch.ones_like(term.own_c)))
        first = {kind: i for i, kind in reversed(list(enumerate(own))) if kind >= seen}
        if first:
            at = torch.tensor([first[kind] for kind in sorted(first)])
            chosen = term.rows(at.to(term.c.device))
            c = torch.where(stands[at.to(stands.device)].view(-1, *(1,) * (chosen.c.dim() - 1)), 1.0, chosen.c)
            batches.append(only(batch, at))
            terms.append(replace(chosen, c=c.to(chosen.c)))
            seen += len(first)
    device = side.terms[0].c.device
    return Kinds(Side(batches, terms), torch.tensor(index, device=device), torch.cat(scales))


def _keys(side: Side) -> Iterator[Hashable]:
    """What tells kinds of tokens apart, in the order of the side's tokens."""
    children = dict[tuple[int, int, int], int]()
    for n, (batch, term) in enumerate(zip(side.batches, side.terms, strict=True)):
        T, prefixes = batch.ids.shape[1], dict[int, list[int]]()
        alone = torch.zeros(len(batch.targets), dtype=torch.bool)
        for part in (term.v, term.uniform):
            alone |= False if part is None else part.ne(0).cpu()
        several = term.targets.dim() > 1
        for i, (row, target) in enumerate(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True)):
            b, t = divmod(row, T)
            if b not in prefixes:
                prefixes[b] = _prefixes(batch.ids[b], None if batch.position_ids is None else batch.position_ids[b], children)
            yield (n, i) if several or bool(alone[i]) else (prefixes[b][t], target, term.temperature)


def _prefixes(ids: Tensor, positions: Tensor | None, children: dict[tuple[int, int, int], int]) -> list[int]:
    """The number of the prefix that ends with each position, the same for the same ids at the same positions."""
    found, prefix = list[int](), 0
    for token, position in zip(ids.tolist(), range(len(ids)) if positions is None else positions.tolist(), strict=True):
        prefix = children.setdefault((prefix, token, position), len(children) + 1)
        found.append(prefix)
    return found
