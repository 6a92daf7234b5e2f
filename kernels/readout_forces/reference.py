"""Specification of readout_forces, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def readout_logits(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """z = softcap(scale · (W h + b)) with softcap(x) = s tanh(x/s); hidden [.., d], weight [V, d] -> [.., V].

    Half-precision inputs give float32 logits: rounding the logits to 8 bits would be a further error.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    hidden, weight, bias = hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    z = scale * torch.nn.functional.linear(hidden, weight, bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def logit_force(logits: Tensor, targets: Tensor, c: Tensor, v: Tensor | None = None, uniform: Tensor | None = None) -> Tensor:
    """Γ = -G, minus the gradient of a loss at the logits, from its GTerm (tokdyn/objective.py).

    Γ_l = Σ_k c_lk (e_{targets_lk} - pi_l) + v_l pi_l ⊙ (log pi_l + H_l) + u_l (1/V - pi_l)

    logits [L, V], targets and c [L] or [L, K], v and uniform [L] -> [L, V]; half precision is computed in float32.

    The entropy's part is v pi ⊙ (E_pi[d] - d) with d_j = max z - z_j ≥ 0: log pi + H loses the digits of a peaked row.
    A target's own column is computed as C (1 - pi_y) + (Σ of its c) - C, with C = Σ_k c_k and 1 - pi_y summed over the other
    tokens: with one target no digits are lost as pi_y goes to 1.
    """
    z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    pi = z.softmax(-1)
    y, c = (targets[:, None], c[:, None]) if targets.dim() == 1 else (targets, c)
    c = c.to(pi.dtype)
    total = c.sum(1, keepdim=True)
    own = torch.zeros_like(pi).scatter_add(1, y, c).gather(1, y) - total
    rest = torch.stack([pi.scatter(1, y[:, k : k + 1], 0.0).sum(1) for k in range(y.shape[1])], 1)
    force = (-total * pi).scatter(1, y, own + total * rest)
    if v is not None:
        below = torch.where(pi > 0, z.max(1, keepdim=True).values - z, torch.zeros_like(z))
        mean = (pi * below).sum(1, keepdim=True)
        force = force + v.to(pi.dtype)[:, None] * pi * (mean - below)
    if uniform is not None:
        force = force + uniform.to(pi.dtype)[:, None] * (1 / pi.shape[1] - pi)
    return force


def readout_forces(
    h_o: Tensor,
    y_o: Tensor,
    h_u: Tensor,
    targets_u: Tensor,
    c: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    v: Tensor | None = None,
    uniform: Tensor | None = None,
    train_bias: bool = False,
    reduce: str | None = None,
) -> Tensor:
    """F if only the readout's weight moves (docs/theory.md, The kernel; NTHR is its sum over observed tokens).

    F[m, l] = (h_m·h_l [+ 1 where the bias moves too]) <g_m, γ_l>

    with g = e_y - pi at the observed token and γ = Γ at the update token, each pulled back through softcap and scale.

    h_o [M, d], y_o [M], h_u [L, d], targets_u and c [L] or [L, K], weight [V, d]
    -> [M, L]; reduce="update" sums over l -> [M]; reduce="observe" sums over m -> [L].
    """
    z_o = readout_logits(h_o, weight, bias=bias, scale=scale, softcap=softcap)
    z_u = readout_logits(h_u, weight, bias=bias, scale=scale, softcap=softcap)
    ones = torch.ones(len(y_o), dtype=z_o.dtype, device=z_o.device)
    g = logit_force(z_o, y_o, ones) * scale
    gamma = logit_force(z_u, targets_u, c, v, uniform) * scale
    if softcap is not None:
        g, gamma = g * (1 - (z_o / softcap).square()), gamma * (1 - (z_u / softcap).square())
    F = (h_o @ h_u.T + float(train_bias)) * (g @ gamma.T)
    return F if reduce is None else F.sum({"update": 1, "observe": 0}[reduce])
