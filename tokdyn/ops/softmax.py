"""The derivatives of log-softmax and softmax by the logits, applied to directions without being written down."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..kernels import checks
from ..kernels.apply_A import reference as _apply_A
from ..kernels.softmax_jvp import reference as _softmax_jvp
from .dispatch import adjacent, choose


def apply_A(logits: Float[Tensor, "T V"], x: Float[Tensor, "T V *k"], *, impl: str | None = None) -> Float[Tensor, "T V *k"]:
    """A x = x - (pi·x) 1: how log pi moves when the logits move by x, for one column or k.

    Args:
        logits: [T, V].
        x: [T, V] or [T, V, k].
        impl: None, "reference" or "triton" (GPU, no gradient). None takes triton where it is installed and applies.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an impl that is not built.
        RuntimeError: impl="triton" without the package triton.
    """
    _check("apply_A", logits, x)
    if choose("apply_A", impl, (logits, x), triton=adjacent(logits)) == "triton":
        from ..kernels.apply_A import triton

        return triton.apply_A(logits, x)
    return _apply_A.apply_A(logits, x)


def softmax_jvp(
    logits: Float[Tensor, "T V"], x: Float[Tensor, "T V *k"], *, impl: str | None = None
) -> Float[Tensor, "T V *k"]:
    """pi ⊙ (x - pi·x): how pi moves when the logits move by x, for one column or k; arguments and errors as in `apply_A`."""
    _check("softmax_jvp", logits, x)
    if choose("softmax_jvp", impl, (logits, x), triton=adjacent(logits)) == "triton":
        from ..kernels.softmax_jvp import triton

        return triton.softmax_jvp(logits, x)
    return _softmax_jvp.softmax_jvp(logits, x)


def _check(op: str, logits: Tensor, x: Tensor) -> None:
    checks.some(op, checks.shapes(op, dict(logits=(logits, "T V"), x=(x, "T V *k"))), "V")
    checks.floats(op, logits=logits, x=x)
