"""Specification of apply_A, in plain torch."""

from __future__ import annotations

from torch import Tensor


def apply_A(logits: Tensor, x: Tensor) -> Tensor:
    """A x = x - (pi·x) 1, the log-softmax Jacobian A = I - 1 piᵀ on one column or k of them.

    logits [T, V], x [T, V] or [T, V, k] -> like x. If z changes by x, log pi changes by A x to first order.
    """
    pi = logits.softmax(-1)
    if x.dim() == pi.dim():
        return x - (pi * x).sum(-1, keepdim=True)
    return x - (pi[..., None] * x).sum(-2, keepdim=True)
