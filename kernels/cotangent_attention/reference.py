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
    n = len(do)
    dq, dk, dv = torch.zeros_like(do), k.new_zeros(n, *k.shape), v.new_zeros(n, *v.shape)
    for rows, keys, P, slope in blocks(q, k, mask, scale, softcap, n):
        near, values, g = k[:, :, None, keys], v[:, :, None, keys], do[..., rows, :]
        dv[..., keys, :] += (P.mT @ g).sum(-3)
        dS = slope * P * (g @ values.mT - (g * (P @ values)).sum(-1, keepdim=True))
        dq[..., rows, :] = dS @ near
        dk[..., keys, :] += (dS.mT @ q[..., rows, :]).sum(-3)
    return dq, dk, dv
