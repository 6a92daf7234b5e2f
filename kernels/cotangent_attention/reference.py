"""Specification of cotangent_attention, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tangent_attention.reference import blocks


def cotangent_attention(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV for n cotangents of the output, the softmax computed once for all of them.

        dV = Pᵀ dO,   dS = slope ⊙ P ⊙ (dO Vᵀ - rowsum(dO ⊙ O)),   dQ = dS K,   dK = dSᵀ Q   (summed over a group's heads)

    q [B, Hk, G, T, D], k and v [B, Hk, S, D], do [n, B, Hk, G, T, D] -> like dq, dk, dv of tangent_attention.
    """
    B, Hk, G, T, D = q.shape
    n, S, E = len(do), *v.shape[2:]
    # a head's results lie as [queries, n, width], so that each product below is a single matrix product
    dq, dk = q.new_zeros(B, Hk, G, T, n, D), k.new_zeros(B, Hk, n, S, D)
    dv = v.new_zeros(B, Hk, S, n, E + 1)
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # dO Vᵀ - rowsum(dO ⊙ O) in one product
    for rows, keys, P, slope in blocks(q, k, mask, scale, softcap, n):
        P, slope = P.flatten(2, 3), slope.flatten(2, 3) if isinstance(slope, Tensor) else slope
        x, near = q[..., rows, :].flatten(2, 3), k[:, :, keys]
        g = do.new_empty(B, Hk, G, x.shape[2] // G, n, E + 1)
        g[..., :E] = do[..., rows, :].movedim(0, -2)
        g = g.flatten(2, 3)
        g[..., E] = (g[..., :E] * (P @ -v[:, :, keys])[..., None, :]).sum(-1)
        dv[:, :, keys] += (P.mT @ g.flatten(3)).unflatten(3, (n, -1))
        dS = (g.flatten(2, 3) @ values[:, :, keys].mT).unflatten(2, (-1, n))
        dS *= (slope * P)[..., None, :]
        dq[..., rows, :, :] = (dS.flatten(2, 3) @ near).unflatten(2, (G, -1, n))
        dk[..., keys, :] += (dS.flatten(3).mT @ x).unflatten(2, (n, -1))
    return dq.movedim(-2, 0), dk.movedim(2, 0), dv[..., :E].movedim(-2, 0)
