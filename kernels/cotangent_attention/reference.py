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
    n = len(do)
    dq = q.new_zeros(B, Hk, n, G, T, k.shape[-1])  # n beside the heads that share k and v: products of many rows, no copies
    dk, dv = k.new_zeros(B, Hk, n, *k.shape[2:]), v.new_zeros(B, Hk, n, *v.shape[2:])
    for rows, keys, P, slope in blocks(q, k, mask, scale, softcap, n):
        if not bool(do[..., rows, :].any()):
            continue  # of the last attention of a model every token's cotangent is at its own query
        near, values = k[:, :, keys], v[:, :, keys]
        P, slope = P.flatten(2, 3), slope.flatten(2, 3) if isinstance(slope, Tensor) else slope
        x, g = q[..., rows, :].flatten(2, 3), do[..., rows, :].flatten(3, 4).movedim(0, 2)  # [B, Hk, n, G t, D]
        dv[..., keys, :] += (P.mT @ g.transpose(2, 3).flatten(3)).unflatten(3, (n, -1)).transpose(2, 3)
        mean = (g * (P @ values)[:, :, None]).sum(-1, keepdim=True)
        ones = torch.ones_like(values[..., :1])  # g Vᵀ - mean in one product
        dP = torch.cat([g, -mean], -1).flatten(2, 3) @ torch.cat([values, ones], -1).mT
        dS = dP.unflatten(2, (n, -1)) * (slope * P)[:, :, None]
        dq[..., rows, :] = (dS.flatten(2, 3) @ near).unflatten(2, (n, G, -1))
        dk[..., keys, :] += dS.mT @ x[:, :, None]
    return dq.movedim(2, 0), dk.movedim(2, 0), dv.movedim(2, 0)
