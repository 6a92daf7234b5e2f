"""Jacobian products of a traced model: F[m,l] = <J_mᵀ Γ_m, P J_lᵀ Γ_l>, J the Jacobian of the logits by the parameters.

    vjp     forces at the logits of a side -> Σ_n J_nᵀ Γ_n, a direction of the parameters: a backward pass per batch
    jvp     a direction -> <Γ_n, J_n θ̇> of every token of a side: a tangent pass per batch

A reduction is one of each, whatever the number of tokens. Where tangents cannot be trusted (`Tracer.derivatives`) a jvp is the
transpose of the backward pass, by a second one, or real steps along its direction. The forms `_scored` take a side whose logits
nobody has seen, and return it scored beside the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp as forward_derivative

from ..model.adjoint import backward_twice
from ..model.attention import one_cotangent
from ..model.differences import slope
from ..model.sharded import move_along, pull_back
from ..model.trace import Tracer
from ..sequences import Batch
from .memory import MEMORY, fits, may_make_layers_again
from .sides import ScoredBatch, ScoredSide, Side, Unscored

Direction = dict[str, Tensor]  # by the name of the tensor
Uses = Mapping[str, str]  # name of a use of a tensor -> name of the tensor (scope.select)


def preconditioned(direction: Direction, P: Direction | None) -> Direction:
    """P ⊙ direction."""
    return direction if P is None else {name: P[name] * step for name, step in direction.items()}


def _leaves(tracer: Tracer, uses: Uses) -> dict[str, Tensor]:
    """Each moving tensor, to be differentiated.

    Raises:
        ValueError: the model is spread over ranks: no rank holds it whole.
    """
    if tracer.sharded:
        raise ValueError(
            'the model\'s weights are spread over ranks (FSDP2): of its forces there are reductions (reduce="update" or '
            '"observe"), verify, and the readout\'s matrix (scope="readout"); a gradient for each token is not made'
        )
    return {use: _leaf(tracer.params[use]) for use in uses}


def _leaf(p: Tensor) -> Tensor:
    """A parameter as a leaf of a graph of its own, without a copy where it may have one."""
    return (p.clone() if p.is_inference() else p.detach()).requires_grad_()


def _gather(grads: Sequence[Tensor | None], uses: Uses, into: Direction, params: Mapping[str, Tensor]) -> Direction:
    """Add up the gradients of all uses of a tensor."""
    for tensor, grad in zip(uses.values(), grads, strict=True):
        if grad is not None:
            into[tensor] = into[tensor] + grad if tensor in into else grad
    for use, tensor in uses.items():
        if tensor not in into:
            into[tensor] = torch.zeros_like(params[use])
    return into


@torch.enable_grad()
def _backward(
    tracer: Tracer, batches: Sequence[Batch], uses: Uses, force: Callable[[int, Tensor], Tensor], memory: int
) -> Direction:
    if tracer.sharded:
        return _backward_sharded(tracer, batches, uses, force)
    leaves, direction = _leaves(tracer, uses), Direction()
    for b, (batch, fitting) in enumerate(zip(batches, fits(tracer, uses, batches, memory), strict=True)):
        with one_cotangent():
            z = tracer.logits(batch, leaves, not fitting and may_make_layers_again(tracer))
            grads = torch.autograd.grad(z, list(leaves.values()), force(b, z.detach()).to(z), allow_unused=True)
        _gather(grads, uses, direction, tracer.params)
    return direction


def _backward_sharded(
    tracer: Tracer, batches: Sequence[Batch], uses: Uses, force: Callable[[int, Tensor], Tensor]
) -> Direction:
    """The same of a model under FSDP2, by its own backward pass.

    Raises:
        ValueError: one use of a tied tensor moves without the other: its gradient is the sum of both.
    """
    for use, tensor in tracer.owner.items():
        if tensor in uses.values() and uses.get(use) != tensor:
            raise ValueError(f'{use} is tied to {tensor}, whose uses are not told apart under FSDP2: scope="full" moves both')
    direction = {tensor: torch.zeros_like(tracer.params[tensor]) for tensor in dict.fromkeys(uses.values())}
    for b, batch in enumerate(batches):
        found = pull_back(tracer.model, partial(tracer.logits, batch), partial(force, b))
        for tensor in direction:
            if tensor in found:
                direction[tensor] = direction[tensor] + found[tensor]
    return direction


def vjp(tracer: Tracer, side: Side, uses: Uses, memory: int = MEMORY) -> Direction:
    """Σ_n J_nᵀ Γ_n over all tokens of a side, by tensor name: one backward pass per batch.

    Where a batch's graph does not fit into `memory` bytes its layers are made again in the backward pass: the same numbers, a
    forward pass more.
    """
    return _backward(tracer, side.batches, uses, side.logit_force, memory)


def vjp_scored(tracer: Tracer, side: Unscored, uses: Uses, memory: int = MEMORY) -> tuple[Direction, ScoredSide]:
    """`vjp` of a side that is scored on the way, and the side."""
    scored: list[ScoredBatch] = []

    def force(b: int, logits: Tensor) -> Tensor:
        scored.append(side.score_batch(b, logits))
        return scored[b].logit_force(logits)

    return _backward(tracer, side.batches, uses, force, memory), side.side(scored)


@torch.enable_grad()
def vjp_each(tracer: Tracer, side: Side, uses: Uses, start: int = 0, stop: int | None = None) -> Iterator[Direction]:
    """J_nᵀ Γ_n token by token, from start to stop: one backward pass each."""
    leaves, n = _leaves(tracer, uses), 0
    stop = len(side) if stop is None else stop
    for b, batch in enumerate(side.batches):
        N = len(batch.targets)
        if n + N > start and n < stop:
            z = tracer.logits(batch, leaves)
            force = side.logit_force(b, z.detach()).to(z)
            for row in range(max(0, start - n), min(N, stop - n)):
                grads = torch.autograd.grad(z[row], list(leaves.values()), force[row], retain_graph=True, allow_unused=True)
                yield _gather(grads, uses, Direction(), tracer.params)
        n += N


@torch.enable_grad()
def vjp_probes(
    tracer: Tracer, batches: Iterable[Batch], probes: Callable[[], Iterable[Tensor]], uses: Uses
) -> Iterator[Direction]:
    """J_nᵀ ε for every token n and, inside that, every cotangent ε [V] of `probes`: one backward pass each."""
    leaves = _leaves(tracer, uses)
    for batch in batches:
        z = tracer.logits(batch, leaves)
        for row in z:
            for probe in probes():
                grads = torch.autograd.grad(row, list(leaves.values()), probe.to(row), retain_graph=True, allow_unused=True)
                yield _gather(grads, uses, Direction(), tracer.params)


@torch.no_grad()
def jvp_logits(tracer: Tracer, batch: Batch, direction: Direction, uses: Uses) -> tuple[Tensor, Tensor]:
    """Logits and their velocity ż = J θ̇ [N, V] along a direction: one tangent pass, or what stands in for it (`pushes`)."""
    if tracer.why_not_tangents(uses):
        z, push = pushes(tracer, batch, uses)
        return z, push(direction)
    if tracer.sharded:
        return move_along(partial(tracer.logits, batch), {use: direction[tensor] for use, tensor in uses.items()})
    primal = {use: tracer.params[use] for use in uses}
    tangent = {use: direction[tensor] for use, tensor in uses.items()}
    logits, velocity = forward_derivative(lambda p: tracer.logits(batch, p), (primal,), (tangent,))[:2]
    return logits, velocity


def pushes(tracer: Tracer, batch: Batch, uses: Uses) -> tuple[Tensor, Callable[[Direction], Tensor]]:
    """Logits, and the map θ̇ -> J θ̇ [N, V] without tangents: by two backward passes, or by real steps where they fail."""
    primal = {use: tracer.params[use] for use in uses}
    if not tracer.derivatives(uses).twice:
        with torch.no_grad():
            return tracer.logits(batch, primal), lambda direction: real_velocities(tracer, [batch], direction, uses)[0]
    z, push = backward_twice(partial(tracer.logits, batch), primal)
    return z, lambda direction: push({use: direction[tensor] for use, tensor in uses.items()})


@torch.no_grad()
def real_velocities(tracer: Tracer, batches: Sequence[Batch], direction: Direction, uses: Uses) -> list[Float[Tensor, "N V"]]:
    """ż of every batch from real parameter steps along a direction, by central differences (`differences.slope`)."""

    def at(step: float) -> list[Tensor]:
        params = tracer.stepped(direction, uses, step)
        return [tracer.logits(batch, params) for batch in batches]

    norm = float(torch.stack([value.norm() for value in direction.values()]).norm())
    if norm == 0:
        return [torch.zeros_like(z) for z in at(0.0)]
    size = float(torch.stack([tracer.params[use].norm() for use in uses]).norm())
    return slope(at, 1e-4 * size / norm)


def way(tracer: Tracer, uses: Uses, label: str) -> dict[str, str]:
    """The rule of every use by a label, with how its jvp was made where tangents cannot be trusted."""
    why, twice = tracer.derivatives(uses)
    instead = "two backward passes" if twice else "real steps"
    return dict.fromkeys(uses, f"{label}, jvp by {instead} ({why})" if why else label)


def jvp(tracer: Tracer, side: Side, direction: Direction, uses: Uses) -> Float[Tensor, " N"]:
    """<Γ_n, ż_n> for every token of a side: the rate at which its observable moves along the direction."""
    passes = (jvp_logits(tracer, batch, direction, uses) for batch in side.batches)
    return torch.cat([side.work(b, *logits) for b, logits in enumerate(passes)])


def jvp_scored(tracer: Tracer, side: Unscored, direction: Direction, uses: Uses) -> tuple[Float[Tensor, " N"], ScoredSide]:
    """`jvp` of a side that is scored on the way, and the side."""
    parts, scored = [], list[ScoredBatch]()
    for b, batch in enumerate(side.batches):
        z, velocity = jvp_logits(tracer, batch, direction, uses)
        scored.append(side.score_batch(b, z))
        parts.append(scored[b].work(z, velocity))
    return torch.cat(parts), side.side(scored)
