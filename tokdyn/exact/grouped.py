"""Columns of F summed over groups of update tokens: a force is linear in the update."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from .problem import MEMORY, Coverage, Fill, Problem
from .products import way
from .progress import Progress, share

LABEL = "one direction per group"


@dataclass(frozen=True)
class PerGroup:
    """A Fill of [M, G]: one vjp and one jvp per group."""

    labels: Int[Tensor, " L"]  # the column of each update token, -1 for none

    def __call__(
        self, problem: Problem, out: Float[Tensor, "M G"], *, memory: int = MEMORY, progress: Progress | None = None
    ) -> Coverage:
        """See Fill."""
        for g in range(out.shape[1]):
            direction = problem.vjp(problem.updated.part((self.labels == g).to(out)))
            out[:, g] = problem.jvp(problem.observed, problem.preconditioned(direction))
            if progress:
                progress(g + 1, out.shape[1])
        return way(problem.tracer, problem.uses, LABEL)


@dataclass(frozen=True)
class Summed:
    """A Fill of [M, G], also in parts: the token matrix by another Fill, its columns added up by group.

    in_blocks makes it in blocks of rows that `memory` holds, for a Fill that does not cost more in parts.
    """

    token_fill: Fill
    labels: Int[Tensor, " L"]
    in_blocks: bool

    def __call__(
        self, problem: Problem, out: Float[Tensor, "*parts M G"], *, memory: int = MEMORY, progress: Progress | None = None
    ) -> Coverage:
        """See Fill."""
        M, L = problem.shape
        parts = 1 if problem.parts is None else len(problem.parts.names)
        rows = max(1, memory // 4 // (L * parts * out.element_size())) if self.in_blocks else M
        member = (self.labels >= 0).to(out.device)
        labels, coverage, start = self.labels.to(out.device)[member], Coverage(), 0
        for part in problem.row_blocks(rows) if rows < M else [problem]:
            F, n = part.empty().to(out), part.shape[0]
            coverage |= self.token_fill(part, F, memory=memory, progress=share(progress, start, n, M))
            out[..., start : start + n, :] = 0
            out[..., start : start + n, :].index_add_(-1, labels, F[..., member])
            start += n
        return coverage
