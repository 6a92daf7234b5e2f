"""Many small updates against one observed side: a direction for each group of observed tokens, then a pass a batch.

    F[g,l] = <Σ_{m in g} J_mᵀ Γ_m, P J_lᵀ Γ_l> = <Γ_l, J_l (P ⊙ D_g)>

D_g is a vjp, made once for each group; the update's tokens then take one forward pass and one tangent pass for each group, in
batches of whole rows. Nothing grows with the number of rows, and no [M, L] exists. In parts (Scope.parts) it is a forward and
tangent passes for each.

    pulled = Pulled.of(scope, {"chosen": chis, …})
    for update in packed(tracer, rows, objective):
        F, scored = pulled.forces(update, memory=…)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp as forward_derivative
from torch.func import vmap

from ..model.optimizer import preconditioner
from ..model.trace import Tracer
from ..objective import GTerm, Objective, Scores
from ..observables import LogProb, Observable
from ..ops import TokenStats
from ..ops.rows import blocks
from ..sequences import Batch, Chi
from .divided import steps
from .memory import MEMORY, pass_bytes
from .products import Direction, Uses, pushes, vjp, vjp_scored
from .scope import Scope, select
from .sides import BATCH, Observed, ScoredBatch, ScoredSide, Unscored, Update


@dataclass(frozen=True)
class Row:
    """One example of the data: the sequences that its loss reads, and where it stands ("pairs.jsonl line 3")."""

    where: str
    chis: Sequence[Chi]

    @property
    def length(self) -> int:
        """Positions of its longest sequence."""
        return max(chi.ids.numel() for chi in self.chis)


@dataclass(frozen=True)
class RowUpdate(Update):
    """An update of several rows, each with a loss of its own: no row's c depends on another's, whatever the objective.

    Attributes:
        rows: the rows, whose sequences one after the other are `chis`.
    """

    rows: Sequence[Row]

    @property
    def is_by_batch(self) -> bool:
        """Whether every row lies in one batch, or has a loss by sequence."""
        ends = {batch.sequence.max().item() + 1 for batch in self.batches}
        return self.objective.by_sequence or ends <= set(self._ends)

    @property
    def _ends(self) -> list[int]:
        ends, n = [], 0
        for row in self.rows:
            n += len(row.chis)
            ends.append(n)
        return ends

    def row_of(self) -> Tensor:
        """The number of the row that each token belongs to, [L]."""
        counts = torch.tensor([sum(len(chi) for chi in row.chis) for row in self.rows])
        return torch.arange(len(self.rows)).repeat_interleave(counts)

    def _ask(self, which: Sequence[int], stats: TokenStats, scores: Scores) -> GTerm:
        """The objective is asked row by row."""
        sequence = torch.cat([self.batches[b].sequence for b in which])
        terms, start = [], 0
        for row, end in zip(self.rows, self._ends, strict=True):
            own = ((sequence >= start) & (sequence < end)).nonzero().flatten()
            start = end
            if len(own):
                present = [self.chis[s] for s in sequence[own].unique().tolist()]
                terms.append(self._of_row(row, present, stats.log_prob[own.to(stats.log_prob.device)], scores.rows(own)))
        return GTerm.joined(terms)

    def _of_row(self, row: Row, present: Sequence[Chi], log_probs: Tensor, scores: Scores) -> GTerm:
        try:
            term = self.objective.g_terms(log_probs, present, scores)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None
        if not bool(term.c.isfinite().all()):
            raise ValueError(
                f"{row.where}: {type(self.objective).__name__} gives a weight c that is not finite: its constants, its "
                "advantage, or its reference or old log-probs are far out of range"
            )
        return term


def packed(tracer: Tracer, rows: Sequence[Row], objective: Objective, positions: int = BATCH) -> RowUpdate:
    """Rows as one update in batches of rows of like length, at most `positions` padded positions each (one row at least).

    Rows are put in the order of their longest sequence, so that little is padded; `RowUpdate.rows` has that order. A row that
    is larger than a batch takes several, and is scored by a forward pass of its own where its sequences meet in the loss.

    Raises:
        ValueError: a row without a scored token; see `Tracer.batches`.
    """
    for row in rows:
        if not row.chis or not all(len(chi) for chi in row.chis):
            raise ValueError(f"{row.where} holds a sequence without a scored token: leave it out")
    ordered = sorted(rows, key=lambda row: row.length)
    batches, first, start = list[Batch](), 0, 0
    while start < len(ordered):
        stop, sequences = start, 0
        while stop < len(ordered):
            sequences += len(ordered[stop].chis)
            if stop > start and ordered[stop].length * sequences > positions:
                break
            stop += 1
        chis = [chi for row in ordered[start:stop] for chi in row.chis]
        together = tracer.batches(chis, positions if stop - start == 1 else len(chis) * ordered[stop - 1].length)
        batches += [batch.numbered_from(first) for batch in together]
        first, start = first + len(chis), stop
    return RowUpdate(batches, [chi for row in ordered for chi in row.chis], objective, ordered)


@dataclass(frozen=True)
class Pulled(Scope):
    """What a step along the parameters does to each group of observed tokens: D_g, one above the other.

    Attributes:
        names: of the groups.
        sizes: how many tokens each has.
        directions: D [G, *shape] by tensor; by use where the scope is divided into parts.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    directions: Direction

    @classmethod
    def of(
        cls,
        scope: Scope,
        groups: Mapping[str, Sequence[Chi]],
        observable: Observable = LogProb(),  # noqa: B008
        memory: int = MEMORY,
    ) -> Pulled:
        """Pull each group back, by what is watched at its tokens: one backward pass over all of them.

        Raises:
            ValueError: no group, or one without a scored token; ids outside the vocabulary; NaN logits.
        """
        if not groups:
            raise ValueError("there is no group to observe: give at least one, as {name: sequences}")
        stacked, sizes, uses = Direction(), list[int](), scope.uses if scope.parts is None else {use: use for use in scope.uses}
        for g, (name, chis) in enumerate(groups.items()):
            if not chis or not all(len(chi) for chi in chis):
                raise ValueError(f"group {name!r} holds no sequence, or one without a scored token: leave that out")
            direction, side = vjp_scored(scope.tracer, Observed.of(scope.tracer, chis, observable), uses, memory)
            sizes.append(len(side))
            for tensor, x in direction.items():
                stacked.setdefault(tensor, x.new_empty(len(groups), *x.shape))[g] = x
        return cls(scope.tracer, scope.uses, scope.P, tuple(groups), tuple(sizes), stacked, parts=scope.parts)

    @torch.no_grad()
    def forces(
        self, update: Unscored, optimizer: torch.optim.Optimizer | None = None, memory: int = MEMORY
    ) -> tuple[Float[Tensor, "*parts G L"], ScoredSide]:
        """Force of every token of an update on every group, for each part where there are some, and the update scored.

        Args:
            update: in batches. It is scored on the way; where c depends on several batches, or under an optimizer, before.
            optimizer: P is then that of its coming step on the mean of the update's rows (`preconditioner`).
            memory: bytes for the logits' tangents of the groups that are moved along together, and for a step's graph.
        """
        directions, known = self.directions, None
        if optimizer is not None:
            P, known = self._step(update, optimizer, memory)
            tensor_of = self.uses if self.parts is not None else {tensor: tensor for tensor in directions}
            directions = {name: P[tensor_of[name]] * stacked for name, stacked in directions.items()}
        elif not update.is_by_batch:
            known = update.score(self.tracer)
        passes = [(0, self.uses, directions)] if self.parts is None else list(steps(self, directions))
        scored, found = list[ScoredBatch](), list[Tensor]()
        for b, batch in enumerate(update.batches):
            term = None if known is None else known.terms[b]
            rates: list[list[Tensor]] = [[] for _ in (self.parts.names if self.parts is not None else "F")]
            for part, uses, along in passes:
                for z, velocities in jvp_logits_each(self.tracer, batch, along, uses, memory):
                    if term is None:
                        scored.append(update.score_batch(b, z))
                        term = scored[b].term
                    rates[part].append(work_each(term, z, velocities))
            found.append(torch.stack([torch.cat(of) for of in rates]))
        F = torch.cat(found, 2)
        return F if self.parts is not None else F[0], update.side(scored) if known is None else known

    def _step(self, update: Unscored, optimizer: torch.optim.Optimizer, memory: int) -> tuple[Direction, ScoredSide]:
        """P of the coming step on the mean of the rows' losses, whatever the scope, and the update scored."""
        every = select(self.tracer, "full")
        if update.is_by_batch:
            pulled, scored = vjp_scored(self.tracer, update, every, memory)
        else:
            scored = update.score(self.tracer)
            pulled = vjp(self.tracer, scored, every, memory)
        n = len(update.rows) if isinstance(update, RowUpdate) else 1
        return preconditioner(optimizer, self.tracer.trained, {name: -x / n for name, x in pulled.items()}), scored


def jvp_logits_each(
    tracer: Tracer, batch: Batch, directions: Direction, uses: Uses, memory: int = MEMORY
) -> Iterator[tuple[Float[Tensor, "N V"], Float[Tensor, "g N V"]]]:
    """Logits and their velocities along several directions [G, ...], as many at a time as `memory` holds.

    One forward pass for all that are moved along together, and a tangent pass for each. To be called without gradients.
    """
    primal = {use: tracer.params[use] for use in uses}
    G = len(next(iter(directions.values())))
    if tracer.why_not_tangents(uses):
        z, push = pushes(tracer, batch, uses)
        for g in range(G):
            yield z, push({tensor: x[g] for tensor, x in directions.items()})[None]
        return
    at_once = directions_at_once(tracer, batch, G, memory)
    for start in range(0, G, at_once):
        some = {use: directions[tensor][start : start + at_once] for use, tensor in uses.items()}

        def along(tangent: Direction) -> tuple[Tensor, Tensor]:
            return forward_derivative(lambda p: tracer.logits(batch, p), (primal,), (tangent,))[:2]

        if len(next(iter(some.values()))) == 1:
            z, velocity = along({use: x[0] for use, x in some.items()})
            yield z, velocity[None]
        else:
            yield vmap(along, out_dims=(None, 0))(some)  # type: ignore[arg-type]


def directions_at_once(tracer: Tracer, batch: Batch, G: int, memory: int) -> int:
    """How many of G directions a tangent pass over a batch may move along together; one at least."""
    return next((n for n in range(G, 1, -1) if pass_bytes(tracer, batch, n) <= memory), 1)


def work_each(term: GTerm, logits: Float[Tensor, "N V"], velocities: Float[Tensor, "G N V"]) -> Float[Tensor, "G N"]:
    """<Γ_n, ż_gn> of every token along every direction; the tokens' Γ are made once and never held together."""
    parts = []
    for rows in blocks(logits):
        force = term.rows(rows).logit_force(logits[rows])
        parts.append(torch.stack([(force * velocity[rows]).sum(1) for velocity in velocities]))
    return torch.cat(parts, 1)
