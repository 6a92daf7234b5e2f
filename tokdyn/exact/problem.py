"""All that any way of computing F needs, in one value: the model, what moves of it, and both sides.

    scope = Scope.named(tracer, "full")
    unscored = UnscoredProblem.about(Asked(update, observe, objective), scope)   # checked, no forward pass yet
    problem = unscored.scored()                     # both sides' logits seen, c known
    vector, problem = unscored.reduced("update")    # or scored by the reduction's own passes

An optimizer's P depends on the gradient of the update (model/optimizer.py), so it is known with c and not before: a problem
asked about under an optimizer takes one backward pass over the update more, and has its P once it is scored.

Every way to F is a function `fill(problem, out, *, memory, progress) -> Coverage`; naive.py is their specification.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..model.optimizer import preconditioner
from ..runs.tiles import KeptTiles
from .memory import MEMORY as MEMORY
from .products import jvp_scored, vjp, vjp_scored
from .progress import Progress
from .scope import Scope, select
from .sides import Asked as Asked
from .sides import Observed, ScoredSide, Side, Update, gather

Coverage = dict[str, str]  # use of a tensor -> label of the rule that covered it; where one is absent, "autograd"


@dataclass(frozen=True)
class Problem(Scope):
    """F[m,l] = <J_mᵀ Γ_m, P J_lᵀ Γ_l> of these two sides; see Scope for the model and what moves.

    Attributes:
        observed: the tokens m.
        updated: the tokens l.
        tiles: where tiles of the matrix are kept, and taken from when it is made again; None where they are not.
    """

    observed: Side
    updated: Side
    tiles: KeptTiles | None = field(default=None, kw_only=True, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(M, L)."""
        return len(self.observed), len(self.updated)

    @property
    def hidden(self) -> tuple[Float[Tensor, "M d"], Float[Tensor, "L d"]]:
        """The readout's input at the tokens of both sides: a forward pass over each."""
        return self.observed.hidden(self.tracer), self.updated.hidden(self.tracer)

    @cached_property
    def readout_is_closed(self) -> bool:
        """Whether the readout alone moves and is what its formula says (one forward pass, made once)."""
        return self.moves_readout_alone and self.tracer.readout_residual(self.observed.batches[0]) < self.tracer.readout_bound

    def transposed(self) -> Problem:
        """The problem of Fᵀ."""
        return replace(self, observed=self.updated, updated=self.observed)

    def row_blocks(self, rows: int) -> Iterator[Problem]:
        """The problems of some rows each: whole observed sequences, of about so many tokens."""
        for observed in self.observed.row_blocks(rows):
            yield Problem(self.tracer, self.uses, self.P, observed, self.updated, parts=self.parts, tiles=self.tiles)

    def tile(self, engine: str, *place: int) -> str:
        """The name of a tile of this matrix: by whom it is made, of what, and which it is."""
        of = repr((sorted(self.uses), self.shape, None if self.parts is None else self.parts.names))
        return " ".join([engine, f"{zlib.crc32(of.encode()):08x}", *map(str, place)])

    def empty(self) -> Float[Tensor, "*parts M L"]:
        """A matrix for F, or one for each part; NaN where nothing has been computed yet."""
        shape = self.shape if self.parts is None else (len(self.parts.names), *self.shape)
        return torch.full(shape, torch.nan, dtype=self.tracer.precision, device=self.tracer.device)


@dataclass(frozen=True)
class ScoredProblem(Problem):
    """A problem whose sides know their sequences and their tokens' statistics."""

    observed: ScoredSide
    updated: ScoredSide


Reduction = Literal["update", "observe", "both"]


@dataclass(frozen=True)
class UnscoredProblem(Scope):
    """A problem before any logits were seen; P is that of the optimizer's coming step on the update, once it is scored."""

    observed: Observed
    updated: Update
    optimizer: torch.optim.Optimizer | None

    @classmethod
    def about(cls, asked: Asked, scope: Scope) -> UnscoredProblem:
        """The sides of what is asked, checked and in batches.

        Raises:
            ValueError: see `gather`, `Scope.require_no_padding_row`.
        """
        for side, chis in (("update", asked.update), ("observe", asked.observe)):
            scope.require_no_padding_row(side, chis)
        observed, updated = gather(scope.tracer, asked)
        return cls(scope.tracer, scope.uses, scope.P, observed, updated, asked.optimizer, parts=scope.parts)

    def scored(self, memory: int = MEMORY) -> ScoredProblem:
        """Both sides scored, by a forward pass over each; under an optimizer with P, by a backward pass over the update.

        Raises:
            ValueError: see `preconditioner`.
        """
        if self.optimizer is None:
            return self._with(self.observed.score(self.tracer), self.updated.score(self.tracer))
        every = select(self.tracer, "full")  # the step's P is that of its whole gradient, whatever the scope
        if self.updated.is_by_batch:
            pulled, updated = vjp_scored(self.tracer, self.updated, every, memory)
        else:
            updated = self.updated.score(self.tracer)
            pulled = vjp(self.tracer, updated, every, memory)
        P = preconditioner(self.optimizer, self.tracer.trained, {name: -x for name, x in pulled.items()})
        return replace(self._with(self.observed.score(self.tracer), updated), P=P)

    def reduced(self, reduce: Reduction, memory: int = MEMORY) -> tuple[Tensor, ScoredProblem]:
        """Σ_l F[m,l] [M] or Σ_m F[m,l] [L] by a backward pass over one side and a tangent pass over the other.

        The passes score the sides on their way; only an update of several batches whose c depends on all of them is scored
        by a forward pass before. Under an optimizer both are scored first, for its P.
        """
        if self.optimizer is not None:
            problem = self.scored(memory)
            sides = (problem.updated, problem.observed)
            from_, to = sides if reduce == "update" else sides[::-1]
            return problem.jvp(to, problem.preconditioned(problem.vjp(from_, memory))), problem
        source, sink = (self.updated, self.observed) if reduce == "update" else (self.observed, self.updated)
        known = None if self.updated.is_by_batch else self.updated.score(self.tracer)
        if known is not None and source is self.updated:
            direction, pulled = self.vjp(known, memory), known
        else:
            direction, pulled = vjp_scored(self.tracer, source, self.uses, memory)
        direction = self.preconditioned(direction)
        if known is not None and sink is self.updated:
            vector, pushed = self.jvp(known, direction), known
        else:
            vector, pushed = jvp_scored(self.tracer, sink, direction, self.uses)
        return vector, self._with(pushed, pulled) if reduce == "update" else self._with(pulled, pushed)

    def _with(self, observed: ScoredSide, updated: ScoredSide) -> ScoredProblem:
        return ScoredProblem(self.tracer, self.uses, self.P, observed, updated, parts=self.parts)


@runtime_checkable
class Fill(Protocol):
    """A way to compute the matrix."""

    def __call__(
        self, problem: Problem, out: Float[Tensor, "M L"], *, memory: int = MEMORY, progress: Progress | None = None
    ) -> Coverage:
        """F [M, L] into out; returns the label of the rule that covered each use.

        Args:
            problem: the model, what moves, both sides.
            out: filled in blocks; what an interrupt leaves untouched stays as it was.
            memory: bytes to take beside the model and out.
            progress: called with (done, total).
        """
        ...
