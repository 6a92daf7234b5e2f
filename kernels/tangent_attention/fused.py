"""Attention and its vjp for one cotangent by PyTorch's fused kernel, which keeps no scores: on the CPU, without a softcap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

BLOCK = 1 << 20  # entries of a mask that are looked at together


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As reference.attention; a query that sees no key gives 0.

    PyTorch's kernel takes heads of one width; of two widths (MLA, sinks) the narrower is padded, else scores would be kept.
    A mask becomes a float for every score there, so a causal one is named instead, and the half that it hides is left out.
    """
    D, E = q.shape[-1], v.shape[-1]
    q, k, v = (pad(x, (0, max(D, E) - x.shape[-1])) if D != E else x for x in (q, k, v))
    seen: dict[str, Any] = dict(is_causal=True) if mask is not None and is_causal(mask) else dict(attn_mask=mask)
    o = scaled_dot_product_attention(q.flatten(1, 2), k, v, scale=scale, enable_gqa=True, **seen)
    return o[..., :E].unflatten(1, q.shape[1:3])


def is_causal(mask: Tensor) -> bool:
    """Whether every query sees all keys up to its own, and no other, in every sequence."""
    T, S = mask.shape[-2:]
    keys = torch.arange(S, device=mask.device)
    blocks = torch.arange(T, device=mask.device).split(max(1, BLOCK // max(1, S)))
    return T == S and all(torch.equal(mask[..., t, :], (keys <= t[:, None]).expand_as(mask[..., t, :])) for t in blocks)


def cotangent_attention(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference of cotangent_attention, for a single cotangent do [1, B, Hk, G, T, E]."""
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        dq, dk, dv = torch.autograd.grad(attention(q, k, v, mask, scale), (q, k, v), do[0])
    return dq[None], dk[None], dv[None]
