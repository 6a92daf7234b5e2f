"""Exact forces over all chosen parameters: F[m,l] = <J_mᵀ g_m, P J_lᵀ Γ_l>, J the Jacobian of the logits.

A side (observed or updated tokens) carries the force Γ at the logits of each of its tokens. Two motions do everything:
`pull` brings forces at the logits back to a direction in parameter space (one backward pass), `push` carries a direction
forward to a velocity of the logits (one tangent pass). A reduction is one pull and one push, whatever the number of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp

from ..model.trace import Tracer
from ..objective import GTerm
from ..ops.rows import blocks
from ..sequences import Batch

Direction = dict[str, Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Side:
    """Tokens with a force at their logits: batches and, for each, the GTerm of its tokens."""

    batches: list[Batch]
    terms: list[GTerm]

    def __len__(self) -> int:
        return sum(len(batch.targets) for batch in self.batches)

    def part(self, weights: Float[Tensor, " N"]) -> Side:
        """The tokens with their forces times a weight each; batches of which all weights are 0 are left out."""
        batches, terms = [], []
        sizes = [len(batch.targets) for batch in self.batches]
        for batch, term, w in zip(self.batches, self.terms, weights.split(sizes), strict=True):
            if bool(w.any()):
                batches.append(batch)
                terms.append(term.times(w))
        return Side(batches, terms)

    def force(self, b: int, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Γ of the tokens of batch b, in float32 at least."""
        out = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
        for rows in blocks(logits):
            out[rows] = self.terms[b].rows(rows).force(logits[rows])
        return out

    def work(self, b: int, logits: Float[Tensor, "N V"], velocity: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """<Γ_n, ż_n> of the tokens of batch b; their Γ are never held at once."""
        term = self.terms[b]
        return torch.cat([(term.rows(rows).force(logits[rows]) * velocity[rows]).sum(1) for rows in blocks(logits)])


def select(tracer: Tracer, scope: str) -> dict[str, str]:
    """Which uses of which tensors a scope moves: name of the use -> name of the tensor.

    "full" is every trainable tensor at all its uses; "readout" the output embedding where it makes logits; "backbone" all
    uses before it (a tied embedding as lookup). A regular expression takes the tensors that it finds under any of their
    names, at all their uses.

    Raises:
        ValueError: the expression is not valid or nothing trainable is in the scope.
    """
    uses = {use: tensor for use, tensor in tracer.owner.items() if tensor in tracer.trainable}
    head = {tracer.readout.weight_name, tracer.readout.bias_name}
    if scope == "readout":
        uses = {use: tensor for use, tensor in uses.items() if use in head}
    elif scope == "backbone":
        uses = {use: tensor for use, tensor in uses.items() if use not in head}
    elif scope != "full":
        try:
            pattern = re.compile(scope)
        except re.error as error:
            raise ValueError(
                f'scope must be "full", "readout", "backbone" or a regular expression, got {scope!r}: {error}'
            ) from None
        wanted = {tensor for use, tensor in uses.items() if pattern.search(use)}
        uses = {use: tensor for use, tensor in uses.items() if tensor in wanted}
    if not uses:
        some = ", ".join(list(tracer.owner)[:3])
        raise ValueError(f"scope {scope!r} holds no trainable parameter; the model's are named like {some}, …")
    return uses


def _leaves(tracer: Tracer, uses: dict[str, str]) -> dict[str, Tensor]:
    return {use: tracer.params[use].clone().requires_grad_() for use in uses}


def _gather(grads: tuple[Tensor | None, ...], uses: dict[str, str], into: Direction, params: dict[str, Tensor]) -> Direction:
    """Sum the gradients of all uses of a tensor."""
    for tensor, grad in zip(uses.values(), grads, strict=True):
        if grad is not None:
            into[tensor] = into[tensor] + grad if tensor in into else grad
    for use, tensor in uses.items():
        if tensor not in into:
            into[tensor] = torch.zeros_like(params[use])
    return into


def scaled(direction: Direction, P: Direction | None) -> Direction:
    """P ⊙ direction."""
    return direction if P is None else {name: P[name] * value for name, value in direction.items()}


@torch.enable_grad()
def pull(tracer: Tracer, side: Side, uses: dict[str, str]) -> Direction:
    """Σ_n J_nᵀ Γ_n over all tokens of a side, by tensor name: one backward pass per batch."""
    leaves, direction = _leaves(tracer, uses), Direction()
    for b, batch in enumerate(side.batches):
        z = tracer.logits(batch, leaves)
        grads = torch.autograd.grad(z, list(leaves.values()), side.force(b, z.detach()).to(z), allow_unused=True)
        _gather(grads, uses, direction, tracer.params)
    return direction


@torch.enable_grad()
def pull_each(tracer: Tracer, side: Side, uses: dict[str, str], start: int = 0, stop: int | None = None) -> Iterator[Direction]:
    """J_nᵀ Γ_n token by token, from start to stop: one backward pass each."""
    leaves, n = _leaves(tracer, uses), 0
    stop = len(side) if stop is None else stop
    for b, batch in enumerate(side.batches):
        N = len(batch.targets)
        if n + N > start and n < stop:
            z = tracer.logits(batch, leaves)
            force = side.force(b, z.detach()).to(z)
            for row in range(max(0, start - n), min(N, stop - n)):
                grads = torch.autograd.grad(z[row], list(leaves.values()), force[row], retain_graph=True, allow_unused=True)
                yield _gather(grads, uses, Direction(), tracer.params)
        n += N


@torch.enable_grad()
def pull_probes(
    tracer: Tracer, batches: Iterable[Batch], probes: Callable[[], Iterable[Tensor]], uses: dict[str, str]
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
def push(tracer: Tracer, batch: Batch, direction: Direction, uses: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Logits and their velocity ż = J θ̇ [N, V] along a direction: one tangent pass."""
    primal = {use: tracer.params[use] for use in uses}
    tangent = {use: direction[tensor] for use, tensor in uses.items()}
    logits, velocity = jvp(lambda p: tracer.logits(batch, p), (primal,), (tangent,))[:2]
    return logits, velocity


def push_all(tracer: Tracer, side: Side, direction: Direction, uses: dict[str, str]) -> Float[Tensor, " N"]:
    """<Γ_n, ż_n> for every token of a side: along the direction, the rate at which each token's own force does work."""
    parts = []
    for b, batch in enumerate(side.batches):
        z, velocity = push(tracer, batch, direction, uses)
        parts.append(side.work(b, z, velocity))
    return torch.cat(parts)


@torch.no_grad()
def finite_difference(
    tracer: Tracer, side: Side, direction: Direction, uses: dict[str, str], move: float = 0.05
) -> Float[Tensor, " N"]:
    """<Γ_n, ż_n> from real parameter steps: central differences at two step sizes, extrapolated (Richardson), error O(h⁴).

    The step is chosen so that the largest logit change is about `move`, far above rounding and far below curvature.
    """

    def at(h: float) -> list[Tensor]:
        params = tracer.stepped(direction, uses, h)
        return [tracer.logits(batch, params) for batch in side.batches]

    still = at(0.0)
    norm = float(torch.stack([value.norm() for value in direction.values()]).norm())
    if norm == 0:
        return torch.zeros(len(side), dtype=tracer.precision, device=tracer.device)
    size = float(torch.stack([tracer.params[use].norm() for use in uses]).norm())
    h = 1e-4 * size / norm
    for _ in range(8):  # until the measured change is of the wanted size
        change = max(float((a - b).abs().max()) for a, b in zip(at(h), still, strict=True))
        if change == 0:
            h *= 100
        elif 0.5 * move <= change <= 2 * move:
            break
        else:
            h *= min(100.0, max(0.01, move / change))

    def slope(step: float) -> Tensor:
        plus, minus = at(step), at(-step)
        work = [side.work(b, z, p - q) for b, (z, p, q) in enumerate(zip(still, plus, minus, strict=True))]
        return torch.cat(work) / (2 * step)

    return (4 * slope(h / 2) - slope(h)) / 3
