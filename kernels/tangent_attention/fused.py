"""Attention and its vjp for one cotangent by PyTorch's fused kernel, which keeps no scores: on the CPU, without a softcap."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As reference.attention; a query that sees no key gives 0.

    PyTorch's kernel takes heads of one width; of two widths (MLA, sinks) the narrower is padded, else scores would be kept.
    """
    D, E = q.shape[-1], v.shape[-1]
    q, k, v = (pad(x, (0, max(D, E) - x.shape[-1])) if D != E else x for x in (q, k, v))
    o = scaled_dot_product_attention(q.flatten(1, 2), k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return o[..., :E].unflatten(1, q.shape[1:3])


def cotangent_attention(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference of cotangent_attention, for a single cotangent do [1, B, Hk, G, T, E]."""
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        dq, dk, dv = torch.autograd.grad(attention(q, k, v, mask, scale), (q, k, v), do[0])
    return dq[None], dk[None], dv[None]
