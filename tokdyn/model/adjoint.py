"""Whether forward and backward mode derive one function, and what stands in for tangents where they do not.

<w, J d> = <Jᵀ w, d> for random w and d, on a short piece: where a tangent pass fails it, the backward pass u -> Jᵀ u is derived
once more (`backward_twice`), which needs no forward derivative of anything; where that fails it too, real steps are left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jvp

from .differences import slope

NUMBERS = 1 << 20  # of the parameters that are moved here, smallest tensors first: the sweep has no room for all

Parameters = Mapping[str, Tensor]
Logits = Callable[[Parameters], Float[Tensor, "N V"]]


class Derivatives(NamedTuple):
    """How the velocities J d of a scope's logits are made.

    Attributes:
        why_not_tangents: why not by a tangent pass; "" where by one.
        twice: whether by two backward passes where not by tangents; else by real steps.
    """

    why_not_tangents: str = ""
    twice: bool = False


@torch.enable_grad()
def backward_twice(logits: Logits, params: Parameters) -> tuple[Float[Tensor, "N V"], Logits]:
    """Logits, and the map d -> J d: the backward pass u -> Jᵀ u is linear in u, and its transpose is J.

    Cost: a forward pass and a backward pass whose graph is kept; for each d, a backward pass through both.
    """
    leaves = {name: (p.clone() if p.is_inference() else p.detach()).requires_grad_() for name, p in params.items()}
    z = logits(leaves)
    u = torch.zeros_like(z).requires_grad_()  # any would do
    grads = torch.autograd.grad(z, list(leaves.values()), u, create_graph=True, allow_unused=True) if z.requires_grad else ()
    pulled = {name: g for name, g in zip(leaves, grads, strict=False) if g is not None and g.requires_grad}

    def push(d: Parameters) -> Float[Tensor, "N V"]:
        along = [d[name].to(g) for name, g in pulled.items()]
        (moved,) = torch.autograd.grad(list(pulled.values()), u, along, retain_graph=True) if pulled else (None,)
        return torch.zeros_like(u) if moved is None else moved

    return z.detach(), push


def derivatives(
    model: nn.Module,
    logits: Logits,
    params: Parameters,
    stepped: Callable[[Parameters, float], Parameters],
    eps: float,
    most: float,
) -> Derivatives:
    """By what the velocities of these parameters are made: the first that is the transpose of the backward pass.

    <w, J d> against <Jᵀ w, d> by a backward pass, w standard normal in all logits, d in as many of the parameters as make
    `NUMBERS`. Where a tangent pass differs, real steps along d decide whether the backward pass is right.

    Args:
        model: named in errors.
        logits: parameters -> logits of a piece.
        params: those that move.
        stepped: a direction and a step size -> parameters there, in float32 at least.
        eps: what the model's numbers are rounded by (`checks.roundoff`).
        most: how far rounding may move <w, J d>, relative to ‖J d‖ (`checks.bound`).

    Raises:
        ValueError: real steps do not bear out the backward pass.
    """
    generator = torch.Generator().manual_seed(1)
    moved = smallest(params)
    d = {name: (0.02 * torch.randn(p.shape, generator=generator)).to(p) for name, p in moved.items()}
    with torch.enable_grad():
        leaves = {name: p.clone().requires_grad_() for name, p in moved.items()}
        z = logits(leaves)
        if not bool(z.isfinite().all()):  # scoring names where
            return Derivatives()
        w = torch.randn(z.shape, generator=generator).to(z)
        grads = torch.autograd.grad(z, list(leaves.values()), w, allow_unused=True) if z.requires_grad else ()
    pulled = sum(float((g.double() * x.double()).sum()) for g, x in zip(grads, d.values(), strict=False) if g is not None)

    def work(velocity: Tensor) -> tuple[float, float]:
        return float((w.double() * velocity.double()).sum()), float(velocity.double().norm())

    try:
        with torch.no_grad():
            pushed, size = work(jvp(logits, (dict(moved),), (d,))[1])
        why = f"<w, J d> is {pushed:.4g} forward and {pulled:.4g} backward"
    except (RuntimeError, NotImplementedError) as error:
        pushed, size, why = float("nan"), float("nan"), f"forward mode fails: {str(error).splitlines()[0][:120]}"
    if abs(pushed - pulled) <= most * size:
        return Derivatives()
    with torch.no_grad():
        (real,) = slope(lambda h: [logits(stepped(d, h))], 1e-2)
    truth, scale = work(real)
    if not abs(pulled - truth) <= max(10 * eps**0.5, 1e-3) * scale or abs(pushed - truth) <= abs(pulled - truth):
        raise ValueError(
            f"the backward pass of {type(model).__name__} is not the derivative of its forward pass: {why}, by real steps "
            f"{truth:.4g}. Part of the model runs under torch.no_grad, detached, or with a gradient of its own "
            "(straight-through), so that its gradients do not predict what a step does. method='naive' gives the products of "
            "these gradients as they are, method='fd' with reduce='update' what a real step along them does"
        )
    try:
        again, size = work(backward_twice(logits, moved)[1](d))
    except (RuntimeError, TypeError):  # a backward pass that cannot be derived
        return Derivatives(why)
    return Derivatives(why, twice=abs(again - pulled) <= most * size)


def smallest(params: Parameters) -> dict[str, Tensor]:
    """As many of the tensors as have `NUMBERS` entries together, the smallest first, one at least; in their own order."""
    chosen, total = set[str](), 0
    for name, p in sorted(params.items(), key=lambda item: item[1].numel()):
        total += p.numel()
        if chosen and total > NUMBERS:
            break
        chosen.add(name)
    return {name: p for name, p in params.items() if name in chosen}
