"""The force matrix one direction at a time: right for every model that has both derivatives, and the way of last resort."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from .problem import MEMORY, Coverage, Problem
from .products import way
from .progress import Progress

LABEL = "one direction per token"


def fill(problem: Problem, out: Float[Tensor, "M L"], *, memory: int = MEMORY, progress: Progress | None = None) -> Coverage:
    """F [M, L] into out, one vjp and one jvp per token of the shorter side.

    Cost: a backward pass per token of the shorter side, and for each a tangent pass over the other; memory of one direction
    of the parameters, whatever `memory` says.
    """
    if len(problem.updated) > len(problem.observed):
        problem, out = problem.transposed(), out.T
    for l, direction in enumerate(problem.vjp_each(problem.updated)):  # noqa: E741
        out[:, l] = problem.jvp(problem.observed, problem.preconditioned(direction))
        if progress:
            progress(l + 1, len(problem.updated))
    return way(problem.tracer, problem.uses, LABEL)
