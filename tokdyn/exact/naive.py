"""The full force matrix one token at a time: the oracle, and the way of last resort."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..model.trace import Tracer
from .products import Direction, Progress, Side, pull_each, push_all, scaled


def tangent_matrix(
    tracer: Tracer, o: Side, u: Side, uses: dict[str, str], P: Direction | None, out: Tensor, progress: Progress | None = None
) -> None:
    """F [M, L] into out, one pull and one push per token of the shorter side; memory of one parameter direction."""
    columns = len(u) <= len(o)
    looped, other = (u, o) if columns else (o, u)
    for n, direction in enumerate(pull_each(tracer, looped, uses)):
        work = push_all(tracer, other, scaled(direction, P), uses)
        if columns:
            out[:, n] = work
        else:
            out[n] = work
        if progress:
            progress(n + 1, len(looped))


def naive_matrix(
    tracer: Tracer,
    o: Side,
    u: Side,
    uses: dict[str, str],
    P: Direction | None,
    out: Tensor,
    progress: Progress | None = None,
    memory: int = 4 << 30,
) -> None:
    """F [M, L] into out: one backward pass per token per side, then the Gram matrix of the gradients. The oracle.

    All gradients are kept where `memory` bytes hold them. Otherwise as many of the observed ones as fit, and the updated ones
    stream past in blocks of 16, made again for each part.
    """
    tensors = dict.fromkeys(uses.values())
    P_all = sum(tracer.params[name].numel() for name in tensors)
    size = P_all * out.element_size()
    block = len(u) if memory // size >= len(o) + len(u) else min(16, len(u))
    rows = max(1, min(len(o), memory // size - block))
    passes = -(-len(o) // rows)
    done, total = 0, len(o) + passes * len(u)

    def flat(side: Side, start: int, stop: int, precondition: Direction | None) -> Tensor:
        nonlocal done
        J = torch.empty(min(stop, len(side)) - start, P_all, dtype=out.dtype, device=tracer.device)
        for i, direction in enumerate(pull_each(tracer, side, uses, start, stop)):
            whole = scaled(direction, precondition)
            torch.cat([whole[name].reshape(-1).to(out.dtype) for name in tensors], out=J[i])
            done += 1
            if progress:
                progress(done, total)
        return J

    for m in range(0, len(o), rows):
        J_o = flat(o, m, m + rows, None)
        for l in range(0, len(u), block):  # noqa: E741
            out[m : m + rows, l : l + block] = gram(J_o, flat(u, l, l + block, P))
        del J_o


def gram(a: Float[Tensor, "M P"], b: Float[Tensor, "L P"], block: int = 1 << 10) -> Float[Tensor, "M L"]:
    """A bᵀ, summed in float64 over blocks of P: a float32 sum of 2^14 squares was 8e-6 off, one of 2^10 is 2e-7 off."""
    out = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for x, y in zip(a.split(block, 1), b.split(block, 1), strict=True):
        out += x @ y.T
    return out
