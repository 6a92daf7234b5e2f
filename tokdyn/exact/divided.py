"""F in parts [N, M, L] by engines that make one matrix: the problem of each part alone, and the rest of a tied embedding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from . import finite_difference
from .parts import Parts
from .problem import MEMORY, Coverage, Fill, Problem, Reduction
from .products import Direction, Uses, vjp
from .progress import Progress, share
from .scope import Scope
from .sides import Side


def problems(problem: Problem) -> Iterator[tuple[int, Problem]]:
    """The problem of each part that has a parameter of its own: the same tokens, fewer uses that move."""
    parts = _parts(problem)
    for n in range(len(parts.names)):
        if uses := parts.uses(n, problem.uses):
            yield n, replace(problem, uses=uses, parts=None)


def single_experts(problem: Problem) -> Iterator[tuple[list[int], Problem]]:
    """The problem in some that tell no experts of a stack apart: the rest, then of each number the experts of all layers.

    A stack is one tensor: of one expert it is moved alone by a P that is 0 for the others. Each comes with the indices of its
    parts among the problem's.
    """
    parts, stacks = _parts(problem), _parts(problem).experts
    rest = {use: tensor for use, tensor in problem.uses.items() if use not in stacks}
    if rest:
        index, own = parts.only({use: parts.of[use] for use in rest}, parts.tied)
        yield index, replace(problem, uses=rest, parts=own)
    for e in range(max(map(len, stacks.values()))):
        held = {use: problem.uses[use] for use, of in stacks.items() if e < len(of) and use in problem.uses}
        index, own = parts.only({use: stacks[use][e] for use in held})
        P = {}
        for use, tensor in held.items():
            p = problem.tracer.params[use]
            alone = torch.zeros(len(p), *[1] * (p.dim() - 1), dtype=p.dtype, device=p.device)
            alone[e] = 1
            P[tensor] = alone.expand_as(p) if problem.P is None else alone * problem.P[tensor]
        yield index, replace(problem, uses=held, P=P, parts=own, tiles=None)  # P is no part of a tile's name


def tied_uses(scope: Scope) -> tuple[dict[str, str], dict[str, str]] | None:
    """The uses of a tied embedding, as lookup and as readout, where they are in different parts; None where they are not."""
    parts, head = _parts(scope), scope.tracer.readout.weight_name
    if head not in scope.uses or parts.tied is None or parts.tied == parts.of[head]:
        return None
    readout = {head: scope.uses[head]}
    return {use: of for use, of in scope.uses.items() if of == scope.uses[head] and use != head}, readout


def steps(scope: Scope, of_use: Direction) -> Iterator[tuple[int, Uses, Direction]]:
    """Of each part what moves in its tangent pass, and along what; of_use: P's step by use, or several above one another."""
    parts = _parts(scope)
    for n in range(len(parts.names)):
        if uses := parts.uses(n, scope.uses):
            yield n, uses, _added(_of_part(scope, of_use, uses, n), uses)
    tied = tied_uses(scope)
    if tied is not None and parts.tied is not None:  # the step of each use where the other is
        direction = {"lookup": _total(of_use, tied[0]), "readout": _total(of_use, tied[1])}
        yield parts.tied, dict.fromkeys(tied[0], "readout") | dict.fromkeys(tied[1], "lookup"), direction


@dataclass(frozen=True)
class EachPart:
    """A Fill of [N, M, L] or [N, M, G]: another Fill for each part. What is tied is the tensor's force without its uses'."""

    fill: Fill

    def __call__(
        self, problem: Problem, out: Float[Tensor, "N M L"], *, memory: int = MEMORY, progress: Progress | None = None
    ) -> Coverage:
        """See Fill."""
        coverage, N = Coverage(), len(out)
        for n, part in problems(problem):
            coverage |= self.fill(part, out[n], memory=memory, progress=share(progress, n, 1, N))
        tied, parts = tied_uses(problem), _parts(problem)
        if tied is not None:
            F = [out.new_empty(out.shape[1:]) for _ in range(3)]
            for uses, of in zip((tied[0] | tied[1], *tied), F, strict=True):
                self.fill(replace(problem, uses=uses, parts=None), of, memory=memory, progress=None)
            assert parts.tied is not None
            out[parts.tied] = F[0] - F[1] - F[2]
        return coverage


@dataclass(frozen=True)
class ByExpert:
    """A Fill of parts some of which are experts of a stack: another Fill once for the rest, and once for each number of one."""

    fill: Fill

    def __call__(
        self, problem: Problem, out: Float[Tensor, "N M L"], *, memory: int = MEMORY, progress: Progress | None = None
    ) -> Coverage:
        """See Fill."""
        coverage, each = Coverage(), list(single_experts(problem))
        for k, (index, some) in enumerate(each):
            F = out.new_empty(len(index), *out.shape[1:])
            coverage |= self.fill(some, F, memory=memory, progress=share(progress, k, 1, len(each)))
            out[index] = F
        return coverage


def reduced(problem: Problem, over: Reduction, method: str, memory: int = MEMORY) -> Tensor:
    """Σ_l F of each part [N, M] ("update") or Σ_m F [N, L] ("observe"): a vjp of one side, a jvp over the other for each part.

    method: "tangent", or "fd" with real steps for the jvp.
    """
    source, sink = (problem.updated, problem.observed) if over == "update" else (problem.observed, problem.updated)
    of_use = by_use(problem, source, memory)
    if problem.P is not None:
        of_use = {use: problem.P[problem.uses[use]] * step for use, step in of_use.items()}
    jvp = finite_difference.jvp if method == "fd" else Problem.jvp
    found = problem.tracer.readout.weight.new_zeros(_count(problem), len(sink), dtype=problem.tracer.precision)
    for n, uses, direction in steps(problem, of_use):
        found[n] = jvp(replace(problem, uses=dict(uses), P=None, parts=None), sink, direction)
    return found


def both(problem: Problem, memory: int = MEMORY) -> Tensor:
    """Σ_m Σ_l F of each part [N]: <Σ_m J_mᵀ Γ_m, P Σ_l J_lᵀ Γ_l> over the part's parameters, two vjps in all."""
    return inner_products(problem, by_use(problem, problem.observed, memory), by_use(problem, problem.updated, memory))


def inner_products(problem: Problem, o: Direction, u: Direction) -> Tensor:
    """<o, P u> of each part [N], from two directions by use."""
    u = u if problem.P is None else {use: problem.P[problem.uses[use]] * step for use, step in u.items()}
    found = problem.tracer.readout.weight.new_zeros(_count(problem), dtype=problem.tracer.precision)
    whole = [(0, problem)] if problem.parts is None else problems(problem)
    for n, part in whole:
        mine = o if problem.parts is None else _of_part(problem, o, part.uses, n)
        a, b = _added(mine, part.uses), _added(u, part.uses)
        found[n] = sum(_inner(a[tensor], b[tensor]) for tensor in a)
    if problem.parts is not None and (tied := tied_uses(problem)) is not None:
        (lookup_o, lookup_u), (head_o, head_u) = ([_total(of, uses) for of in (o, u)] for uses in tied)
        found[_parts(problem).tied] = _inner(lookup_o, head_u) + _inner(head_o, lookup_u)
    return found


def by_use(problem: Problem, side: Side, memory: int = MEMORY) -> Direction:
    """Σ_n J_nᵀ Γ_n of a side, of each use of a tensor by itself, without P."""
    return vjp(problem.tracer, side, {use: use for use in problem.uses}, memory)


def _added(of_use: Direction, uses: Uses) -> Direction:
    """By tensor: the sum over its uses."""
    tensors: dict[str, dict[str, str]] = {}
    for use, tensor in uses.items():
        tensors.setdefault(tensor, {})[use] = tensor
    return {tensor: _total(of_use, of) for tensor, of in tensors.items()}


def _total(of_use: Direction, uses: Iterable[str]) -> Tensor:
    return sum((of_use[use] for use in list(uses)[1:]), of_use[next(iter(uses))])


def _inner(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def _count(problem: Problem) -> int:
    return 1 if problem.parts is None else len(problem.parts.names)


def _of_part(scope: Scope, of_use: Direction, uses: Uses, n: int) -> Direction:
    """The steps of the uses of a part: of a stack of experts that of its own expert alone."""
    found, experts = {use: of_use[use] for use in uses}, _parts(scope).experts
    for use in uses:
        if use in experts:
            x = found[use]
            axis, e = x.dim() - scope.tracer.params[use].dim(), experts[use].index(n)
            found[use] = torch.zeros_like(x)
            found[use].select(axis, e).copy_(x.select(axis, e))
    return found


def _parts(scope: Scope) -> Parts:
    assert scope.parts is not None
    return scope.parts
