"""Which way a matrix is computed: the one place that reads `method`, and the one that weighs the structured engines."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..model.forward_ad import without_modes
from . import ch2, divided, finite_difference, grouped, naive, per_direction, readout, sweep, tangents
from .errors import Unsupported
from .merged import Merged, of_kinds
from .problem import MEMORY, Coverage, Fill, Problem, Reduction, ScoredProblem, UnscoredProblem
from .products import way
from .progress import Progress, share
from .sides import Side
from .sweep.budget import Size
from .sweep.plan import PlannedProblem, planned

AUTOGRAD = "autograd"
FORWARD = 1.5  # cost of a jvp in units of a vjp, as benchmarks/exact_forces.py times them


def choose(problem: Problem, method: str, labels: Int[Tensor, " L"] | None = None) -> Fill:
    """The Fill of F [M, L] for this method, or of its columns summed by group [M, G]; in parts if the problem is.

    Args:
        problem: whose sizes decide, and whether its readout alone moves.
        method: "tangent", "naive" or "ch2".
        labels: the column of each update token, -1 for none.
    """
    fill: Fill
    require_whole(problem, method)
    if method == "ch2":
        fill = ch2.fill
    elif method == "naive":
        fill = naive.fill
    elif problem.readout_is_closed:
        fill = readout.fill
    else:
        fill = Merged(structured)
    if labels is not None and isinstance(fill, Merged) and not problem.tracer.why_not_tangents(problem.uses):
        if problem.parts is None:
            return OfGroups(labels)
        directions = (int(labels.max()) + 1) * len(problem.parts.names)
        if 2 * directions <= sum(problem.shape) / (1 + FORWARD):  # a vjp and a jvp each, a token of the sweep half a vjp
            return _for_parts(problem, grouped.PerGroup(labels))
    made = _for_parts(problem, fill)
    return made if labels is None else grouped.Summed(made, labels, in_blocks=fill is readout.fill)


@dataclass(frozen=True)
class OfGroups:
    """A Fill of [M, G]: a direction per group, or the token matrix with its columns added up, by the multiplications of each.

        groups   2 W (1 + FORWARD) (Σ_l T + G Σ_m T)

    W weights, T the length of a sequence: a position costs what it did where benchmarks/exact_forces.py --pairs timed both.
    For the matrix (budget.py) every token is pulled back through all weights at least, to where its text begins: where that is
    more already, nothing else is counted.
    """

    labels: Int[Tensor, " L"]  # the column of each update token, -1 for none

    def __call__(
        self, problem: Problem, out: Float[Tensor, "M G"], *, memory: int = MEMORY, progress: Progress | None = None
    ) -> Coverage:
        """See Fill."""
        each = grouped.PerGroup(self.labels)
        o, u = (sum(batch.ids.numel() for batch in side.batches) for side in (problem.observed, problem.updated))
        positions = 2 * (1 + FORWARD) * (u + out.shape[1] * o)
        fewer = of_kinds(problem)[0]
        if positions <= sum(_ends(side) for side in (fewer.observed, fewer.updated)):
            return each(problem, out, memory=memory, progress=progress)
        try:
            p = planned(fewer)
        except (Unsupported, NotImplementedError):  # a token of the matrix would cost what a group does
            return each(problem, out, memory=memory, progress=progress)
        q = p.transposed() if len(p.observed) < len(p.updated) else p  # as the engines take it
        if p.plan.moves and positions * Size.of(p).weights <= min(_costs(q, memory, p.together)):
            return each(problem, out, memory=memory, progress=progress)
        matrix = Merged(partial(_of_plan, p))
        return grouped.Summed(matrix, self.labels, in_blocks=False)(problem, out, memory=memory, progress=progress)


def _of_plan(
    p: PlannedProblem, problem: Problem, out: Float[Tensor, "M L"], *, memory: int, progress: Progress | None
) -> Coverage:
    """`structured` for a problem whose plan is there."""
    assert problem.shape == p.shape
    return structured(p, out, memory=memory, progress=progress)


def _ends(side: Side) -> int:
    """The positions of a side's tokens, each counted from where its text begins."""
    return sum(int((batch.rows % batch.ids.shape[1] + 1).sum()) for batch in side.batches)


def require_whole(problem: Problem, method: str) -> None:
    """Raise where a matrix needs the model whole on one rank, and it is spread over several.

    Raises:
        ValueError: it is, and more than the readout moves.
    """
    if problem.tracer.sharded and (method != "tangent" or not problem.readout_is_closed):
        raise ValueError(
            "the model's weights are spread over ranks (FSDP2), and no rank holds it whole: of its forces there are reductions "
            '(reduce="update" or "observe"), verify, and the readout\'s matrix by tangents (scope="readout"), not the rest'
        )


def _for_parts(problem: Problem, fill: Fill) -> Fill:
    """A Fill of the whole as one of the problem's parts, where it has some."""
    if problem.parts is None:
        return fill
    each: Fill = in_parts if isinstance(fill, Merged) else divided.EachPart(fill)
    each = divided.ByExpert(each) if problem.parts.experts else each
    return Merged(each) if isinstance(fill, Merged) else each


def reduce(
    unscored: UnscoredProblem, method: str, over: Reduction, *, memory: int = MEMORY, progress: Progress | None = None
) -> tuple[Tensor, ScoredProblem, Coverage]:
    """Σ_l F [M] ("update"), Σ_m F [L] ("observe") or Σ_m Σ_l F [] ("both"), the problem scored, and the rule of each use.

    method: "tangent" is a vjp and a jvp ("fd" with real steps for the jvp, as where tangents cannot be trusted), which score
    both sides on their way, or the closed form of a readout that moves alone; "both" is two vjps. A backward pass whose graph
    does not fit into `memory` makes its layers again. "naive" and "ch2" add up the matrix, in `memory` bytes beside it. Of a
    problem in parts it is [N, ...], a jvp for each part.
    """
    if unscored.tracer.sharded and (over == "both" or unscored.parts is not None):
        raise ValueError(
            'under FSDP2 a reduction is over one side, and of the whole: reduce="update" or "observe", without by='
        )
    if method in ("tangent", "fd") and (over == "both" or unscored.parts is not None):
        problem = unscored.scored(memory)
        made = divided.both(problem, memory) if over == "both" else divided.reduced(problem, over, method, memory)
        found = made if problem.parts is not None else made.sum(0)
        return found, problem, way(problem.tracer, problem.uses, AUTOGRAD)
    if method == "tangent" and (unscored.optimizer is not None or not unscored.moves_readout_alone):
        rules = way(unscored.tracer, unscored.uses, AUTOGRAD)
        return *unscored.reduced(over, memory), rules
    problem = unscored.scored()
    if method in ("tangent", "fd"):
        if method == "tangent" and problem.readout_is_closed:
            return readout.readout_matrix(problem, over), problem, dict.fromkeys(problem.uses, readout.LABEL)
        source, sink = (problem.updated, problem.observed) if over == "update" else (problem.observed, problem.updated)
        direction = problem.preconditioned(problem.vjp(source, memory))
        if method == "fd":
            return finite_difference.jvp(problem, sink, direction), problem, {}
        return problem.jvp(sink, direction), problem, way(problem.tracer, problem.uses, AUTOGRAD)
    F = problem.empty()
    coverage = choose(problem, method)(problem, F, memory=memory, progress=progress)
    axes = {"update": (-1,), "observe": (-2,), "both": (-2, -1)}
    return F.sum(axes[over]), problem, coverage


@without_modes()
def structured(
    problem: Problem, out: Float[Tensor, "M L"], *, memory: int = MEMORY, progress: Progress | None = None
) -> Coverage:
    """F [M, L] into out: the readout in closed form, the backbone by the cheaper of sweep and tangents; see Fill.

    Where a module is beyond the rules it is one vjp and one jvp per token, where a jvp would be real steps, or fails, one
    gradient per token of both sides; the coverage says why. Where tangents cannot be trusted it is the sweep, whose sum is then
    compared with two backward passes.
    """
    why, twice = problem.tracer.derivatives(problem.uses)
    doubtful = bool(why)
    try:
        p, F = planned(problem), out
        if len(p.observed) < len(p.updated):  # as both engines take it; weighed as they take it
            p, F = p.transposed(), out.T
        if not doubtful:
            return _cheaper(p, memory)(p, F, memory=memory, progress=progress)
        coverage = sweep.fill(p, F, memory=memory, progress=progress)
        _require_sum(problem, out)
        return coverage
    except (Unsupported, NotImplementedError) as error:
        reason = _first_line(error)
    try:
        one = naive if doubtful and not twice else per_direction
        coverage = one.fill(problem, out, memory=memory, progress=progress)
    except NotImplementedError as error:
        coverage, reason = naive.fill(problem, out, memory=memory, progress=progress), _first_line(error)
    return {use: f"{label} ({reason})" for use, label in coverage.items()}


@without_modes()
def matrix_bytes(problem: Problem, memory: int = MEMORY) -> int:
    """About what `structured` takes at its peak beside the model: the result, its readout's part, and what the sweep counts.

    `memory` where another engine computes it, which takes no more. Cost: what a matrix costs before its first product, forward
    passes over both sides.
    """
    result = 4 * math.prod(problem.shape)
    if problem.readout_is_closed:
        return 2 * result + memory
    try:
        p = planned(of_kinds(problem)[0])
        p = p.transposed() if len(p.observed) < len(p.updated) else p
        if not p.plan.moves or not _sweeps(p, memory):
            return 2 * result + memory
        return 2 * result + Size.of(p).tiling(*p.singles, memory, p.together).bytes
    except (Unsupported, NotImplementedError):
        return 2 * result + memory


@without_modes()
def in_parts(
    problem: Problem, out: Float[Tensor, "N M L"], *, memory: int = MEMORY, progress: Progress | None = None
) -> Coverage:
    """F of each part [N, M, L] into out: one sweep for all, two where a module holds two parts; else `structured` for each.

    The sweep meets the two sides module by module, so a part costs it nothing but its matrix; by tangents, or by one direction
    a token, each part is a matrix of its own.
    """
    parts, doubtful = problem.parts, bool(problem.tracer.why_not_tangents(problem.uses))
    assert parts is not None
    try:
        p, F = planned(replace(problem, parts=None)), out
        rounds = list(parts.rounds(problem.uses, p.plan.module))
        if len(rounds) == 1:
            p = replace(p, plan=p.plan.divided(parts), parts=parts)
        if len(p.observed) < len(p.updated):  # as both engines take it; weighed as they take it
            p, F = p.transposed(), out.mT
        if doubtful or _sweeps(p, memory, len(rounds) / len(out)):
            if len(rounds) == 1:
                coverage = sweep.fill(p, F, memory=memory, progress=progress)
            else:
                coverage = _in_rounds(problem, out, rounds, memory=memory, progress=progress)
            if doubtful:
                _require_sum(replace(problem, parts=None), out.sum(0))
            return coverage
    except (Unsupported, NotImplementedError):
        pass  # `structured` says why of each part
    return divided.EachPart(structured)(problem, out, memory=memory, progress=progress)


def _in_rounds(
    problem: Problem, out: Float[Tensor, "N M L"], rounds: list[dict[str, str]], *, memory: int, progress: Progress | None
) -> Coverage:
    """Parts of which some share a module: a sweep for each set of uses (Parts.rounds), added up."""
    coverage = Coverage()
    for n, uses in enumerate(rounds):
        F = torch.zeros_like(out) if n else out
        of = share(progress, n, 1, len(rounds))
        coverage |= sweep.fill(replace(problem, uses=uses), F, memory=memory, progress=of)
        if n:
            out += F
    return coverage


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]


def _require_sum(problem: Problem, F: Float[Tensor, "M L"]) -> None:
    """Raise unless aᵀ F b, for random signs a and b, is the product of two backward passes.

    Raises:
        Unsupported: it is not: a module's rule takes tangents that are wrong.
    """
    a, b = (torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(n)).to(F) * 2 - 1 for n in problem.shape)
    o, u = problem.vjp(problem.observed.part(a)), problem.preconditioned(problem.vjp(problem.updated.part(b)))
    truth = sum(float((o[name].double() * u[name].double()).sum()) for name in o)
    apart = abs(float(a.double() @ F.double() @ b.double()) - truth)
    if not apart <= problem.tracer.readout_bound * float(F.double().norm()):  # |aᵀFb| is about ‖F‖, and keeps half its digits
        raise Unsupported("a rule takes tangents, which cannot be trusted here")


def _cheaper(p: PlannedProblem, memory: int) -> Fill:
    """The structured engine that takes fewer multiplications for this problem in this memory, without padding."""
    return sweep.fill if _sweeps(p, memory) else tangents.fill


def _sweeps(p: PlannedProblem, memory: int, times: float = 1.0) -> bool:
    """Whether so many sweeps take no more multiplications than the tangents once."""
    if not p.plan.moves:
        return True
    swept, carried = _costs(p, memory, together=False)
    return swept * times <= carried


def _costs(p: PlannedProblem, memory: int, together: bool) -> tuple[float, float]:
    """Multiplications of the sweep in this memory, with sequences side by side or not, and of the tangents."""
    size, (o, u) = Size.of(p), p.singles
    return size.tiling(o, u, memory, together).cost, size.tangents(p.observed, u)
