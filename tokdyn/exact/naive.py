"""The specification of every way to F: one gradient per token per side, and their Gram matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .problem import MEMORY, Coverage, Problem
from .products import Direction, preconditioned
from .progress import Progress
from .sides import Side

BLOCK = 16  # updated tokens whose gradients are made together where not all fit


def fill(problem: Problem, out: Float[Tensor, "M L"], *, memory: int = MEMORY, progress: Progress | None = None) -> Coverage:
    """F [M, L] into out: one backward pass per token per side, then the Gram matrix of the gradients. The oracle.

    All gradients are kept where `memory` bytes hold them. Otherwise as many of the observed ones as fit, and the updated ones
    stream past in blocks, made again for each part.

    Cost: M + L backward passes (M + L M/rows where memory is short) and 2·M·L·P flops; memory of M + L gradients.
    """
    o, u = problem.observed, problem.updated
    tensors = dict.fromkeys(problem.uses.values())
    n_params = sum(problem.tracer.params[name].numel() for name in tensors)
    size = n_params * out.element_size()
    block = len(u) if memory // size >= len(o) + len(u) else min(BLOCK, len(u))
    rows = max(1, min(len(o), memory // size - block))
    passes = -(-len(o) // rows)
    done, total = 0, len(o) + passes * len(u)

    def flat(side: Side, start: int, stop: int, P: Direction | None) -> Tensor:
        nonlocal done
        J = torch.empty(min(stop, len(side)) - start, n_params, dtype=out.dtype, device=out.device)
        for i, direction in enumerate(problem.vjp_each(side, start, stop)):
            whole = preconditioned(direction, P)
            torch.cat([whole[name].reshape(-1).to(out.dtype) for name in tensors], out=J[i])
            done += 1
            if progress:
                progress(done, total)
        return J

    for m in range(0, len(o), rows):
        J_o = flat(o, m, m + rows, None)
        for l in range(0, len(u), block):  # noqa: E741
            out[m : m + rows, l : l + block] = gram(J_o, flat(u, l, l + block, problem.P))
        del J_o
    return dict.fromkeys(problem.uses, "autograd")


def gram(a: Float[Tensor, "M P"], b: Float[Tensor, "L P"], block: int = 1 << 10) -> Float[Tensor, "M L"]:
    """A bᵀ, summed in float64 over blocks of P: a float32 sum of 2^14 squares was 8e-6 off, one of 2^10 is 2e-7 off."""
    out = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for x, y in zip(a.split(block, 1), b.split(block, 1), strict=True):
        out += x @ y.T
    return out
