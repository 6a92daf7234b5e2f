"""One pair of tokens looked at closely: its force by layer and kind, and its kernel in numbers that a person can read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .divided import by_use, inner_products
from .parts import SEPARATOR, Parts
from .problem import Problem
from .products import Direction
from .readout import readout_matrix


def layers_and_kinds(problem: Problem) -> Parts:
    """The parts that a card has: each kind of each layer."""
    return Parts.named(problem.tracer, problem.uses, "layer and kind")


def split(name: str) -> tuple[str, str]:
    """Layer and kind of a part of `layers_and_kinds`; what has no layer is called by its kind in both."""
    layer, _, kind = name.partition(SEPARATOR)
    return layer, kind or layer


def look(problem: Problem, m: int, weights: Float[Tensor, " L"]) -> dict[str, Any]:
    """Force, parts, kernel and cosine of the gradients of observed token m and the update tokens that have a weight.

    Returns force and parts under P where there is one, then also `optimizer` with the plain force; kernel {readout, cosine,
    product}: h·h and the cosine of h at m and at the first of the update tokens, and <g, γ> at the readout, summed.

    Cost: two backward passes, and one forward pass over each side.
    """
    one = torch.zeros(len(problem.observed), dtype=weights.dtype, device=weights.device)
    one[m] = 1
    o, u = problem.observed.part(one), problem.updated.part(weights)
    if not o.batches or not u.batches:
        raise ValueError("the pair has no force: the token's weight in the loss, or in what is watched, is 0")
    parts = layers_and_kinds(problem)
    divided = Problem(problem.tracer, problem.uses, problem.P, o, u, parts=parts)
    left, right = (by_use(divided, side) for side in (o, u))
    plain = inner_products(replace(divided, P=None), left, right)
    found = plain if problem.P is None else inner_products(divided, left, right)
    facts: dict[str, Any] = {
        "force": float(found.sum()),
        "parts": [(*split(name), float(x)) for name, x in zip(parts.names, found.tolist(), strict=True)],
        "kernel": _kernel(problem, m, weights),
    }
    if problem.P is not None:
        facts["optimizer"] = {"force": float(found.sum()), "plain": float(plain.sum())}
    sizes = _norm(left, problem.uses) * _norm(right, problem.uses)
    facts["gradient_cosine"] = float(plain.sum()) / sizes if sizes else None
    return facts


@torch.no_grad()
def kernels(problem: Problem, index: Int[Tensor, "K 2"]) -> Float[Tensor, "K 3"]:
    """h_m·h_l, the cosine of h_m and h_l, and <g_m, γ_l> of the forces at W h + b, for some pairs (m, l)."""
    h_o, h_u = problem.hidden
    m, l = index.to(h_o.device).unbind(1)  # noqa: E741
    head = problem.tracer.readout.weight_name
    alone = replace(problem, uses={head: problem.tracer.owner[head]}, P=None, parts=None)
    R = readout_matrix(Problem(alone.tracer, alone.uses, None, alone.observed, alone.updated))[m, l]
    dots = (h_o[m] * h_u[l]).sum(1)
    sizes = h_o[m].norm(dim=1) * h_u[l].norm(dim=1)
    return torch.stack([dots, dots / sizes, torch.where(dots == 0, 0, R / dots)], 1).cpu()


def _kernel(problem: Problem, m: int, weights: Float[Tensor, " L"]) -> dict[str, float]:
    columns = weights.nonzero().flatten().cpu()
    found = kernels(problem, torch.stack([torch.full_like(columns, m), columns], 1)).double()
    product = float(found[:, 2] @ weights[columns.to(weights.device)].cpu().double())
    return {"readout": float(found[0, 0]), "cosine": float(found[0, 1]), "product": product}


def _norm(of_use: Direction, uses: Mapping[str, str]) -> float:
    """‖gradient‖, the uses of a tensor added up."""
    total: Direction = {}
    for use, tensor in uses.items():
        total[tensor] = total[tensor] + of_use[use] if tensor in total else of_use[use]
    return float(sum(x.double().square().sum() for x in total.values())) ** 0.5
