"""Specification of tangent_attention, in plain torch, and of the attention it differentiates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ELEMENTS = 1 << 18  # most scores of all tangents at a time: a block of queries is as large as that allows
ROWS = 32  # fewest queries of a block


def on_host(x: Tensor) -> bool:
    """Whether the host can read a number of x without waiting for a device."""
    return x.device.type == "cpu"


def blocks(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float | None, n: int = 1, rows: int | None = None
) -> Iterator[tuple]:
    """Yield blocks of queries: (rows, keys, P, slope) with P [B, Hk, G, t, s] over the keys that the block can see, or all.

    A block has `rows` queries, or as many as keep the scores of n tangents below ELEMENTS.
    slope is d(capped score)/d(q·k): `scale` without a cap.
    """
    B, Hk, G, T, _ = q.shape
    S = k.shape[-2]
    step = min(T, rows or max(ROWS, ELEMENTS // max(1, n * B * Hk * G * S)))
    for start in range(0, T, step):
        queries, keys = slice(start, min(T, start + step)), slice(0, S)
        seen = None
        if mask is not None:
            seen = mask[..., queries, :]
            if on_host(seen):
                used = seen.flatten(0, -2).any(0).nonzero()
                keys = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
            seen = seen[:, :, None, :, keys]
        s = (q[..., queries, :] * scale) @ k[:, :, None, keys].mT
        slope: Tensor | float = scale
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
            slope = scale * (1 - (s / softcap).square())
        if seen is not None:
            s = s.masked_fill(~seen, torch.finfo(s.dtype).min)
        P = s.softmax(-1)
        if seen is not None and not (on_host(some := seen.any(-1, keepdim=True)) and bool(some.all())):
            P = P * some  # a query that sees no key gets 0, not a mean of all values
        yield queries, keys, P, slope


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None) -> Tensor:
    """O = softmax(cap(scale q kᵀ) where mask) v with grouped heads.

    q [B, Hk, G, T, D], k and v [B, Hk, S, D], mask [B or 1, 1, T, S] (True where a key is seen) -> [B, Hk, G, T, D].
    """
    return torch.cat([P @ v[:, :, None, keys] for _, keys, P, _ in blocks(q, k, mask, scale, softcap)], -2)


def tangent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Ȯ for n tangents; the softmax is computed once for all of them, and no [T, T] array is kept per tangent.

        Ȯ = P V̇ + (P ⊙ Ṡ) V - μ O,   Ṡ = slope ⊙ (Q̇ Kᵀ + Q K̇ᵀ),   μ = rowsum(P ⊙ Ṡ)

    dq [n, B, Hk, G, T, D], dk and dv [n, B, Hk, S, D] -> [n, B, Hk, G, T, D]. Cost 8 T² D flops per head and tangent.
    """
    B, Hk, G, T, _ = q.shape
    n, out = len(dq), []
    for rows, keys, P, slope in blocks(q, k, mask, scale, softcap, n):
        near, values = k[:, :, keys], v[:, :, keys]
        P, slope = P.flatten(2, 3), slope.flatten(2, 3) if isinstance(slope, Tensor) else slope
        x, dx = q[..., rows, :].flatten(2, 3), dq[..., rows, :].flatten(3, 4).movedim(0, 2)  # [B, Hk, n, G t, D]
        dS = (dx.flatten(2, 3) @ near.mT).unflatten(2, (n, -1)) + x[:, :, None] @ dk[..., keys, :].movedim(0, 2).mT
        W = dS * (slope * P)[:, :, None]
        moved = (P @ dv[..., keys, :].movedim(0, 3).flatten(3)).unflatten(3, (n, -1)).transpose(2, 3)
        moved = moved + (W.flatten(2, 3) @ values).unflatten(2, (n, -1)) - W.sum(-1, keepdim=True) * (P @ values)[:, :, None]
        out.append(moved.unflatten(3, (G, -1)))
    return torch.cat(out, -2).movedim(2, 0)
