"""Specification of softmax_jvp, in plain torch."""

from __future__ import annotations

from torch import Tensor

from ..apply_A.reference import apply_A


def softmax_jvp(logits: Tensor, x: Tensor) -> Tensor:
    """pi ⊙ (x - pi·x): how pi changes, to first order, if z changes by x. logits [T, V], x [T, V] or [T, V, k] -> like x."""
    pi = logits.softmax(-1)
    return (pi if x.dim() == pi.dim() else pi[..., None]) * apply_A(logits, x)
