"""Specification of token_stats, in plain torch: any device, any float dtype, differentiable except for ranks and argmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def token_stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Statistics of softmax(logits) at the targets; half-precision logits are computed in float32.

    logits [T, V], targets [T] -> (logsumexp, log_prob, entropy, collision, g_norm, rank, argmax, argmax_log_prob), each [T]:

        logsumexp = log Σ_v e^{z_v}            log_prob = log pi_y
        entropy   = -Σ_v pi_v log pi_v         collision = Σ_v pi_v²
        g_norm    = ‖pi - e_y‖                 rank = #{v : z_v > z_y, or z_v = z_y and v < y}

    No result is a difference of two nearly equal numbers, so that peaked rows keep their digits: with S = 1 + R the sum
    of e^{z-max}, R over all but the argmax, log S is log1p(R), entropy is log S - Σ e^{z-max}(z-max)/S, and g_norm² is
    Σ_{v≠y} pi_v² + (1-pi_y)² with 1-pi_y = Σ_{v≠y} pi_v. A row without a softmax (NaN, inf, or -inf alone) gives NaN; where one
    of its logits is NaN, rank 0 and argmax -1.
    """
    z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    T, V = z.shape
    if T == 0:
        real, whole = z.new_zeros(0), targets.new_zeros(0)
        return real, real, real, real, real, whole, whole, real
    broken = z.isnan().any(1)
    y = targets[:, None]
    column = torch.arange(V, device=z.device)
    top = z.max(1, keepdim=True).values
    argmax = torch.where(z == top, column, V - 1).min(1).values
    shifted = z - top
    e = shifted.exp()
    rest = e.scatter(1, argmax[:, None], 0.0).sum(1)
    rest = torch.where(top.squeeze(1).isfinite(), rest, math.nan)
    S, log_S = 1 + rest, rest.log1p()
    weighted = torch.where(e > 0, e * shifted, torch.zeros_like(e)).sum(1)  # 0 · -inf is 0 here
    others = e.scatter(1, y, 0.0)
    z_y = z.gather(1, y)
    rank = ((z > z_y) | ((z == z_y) & (column < y))).sum(1)
    argmax = torch.where(broken, torch.full_like(argmax, -1), argmax)
    return (
        top.squeeze(1) + log_S,
        (z_y - top).squeeze(1) - log_S,
        log_S - weighted / S,
        (e / S[:, None]).square().sum(1),
        ((others / S[:, None]).square().sum(1) + (others.sum(1) / S).square()).sqrt(),
        torch.where(broken, torch.zeros_like(rank), rank),
        argmax,
        -log_S,
    )
