"""The most likely tokens at each position, from logits or from the hidden states behind them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..kernels import checks
from ..kernels.topk_log_probs import cpp as _cpp
from ..kernels.topk_log_probs import cuda as _cuda
from ..kernels.topk_log_probs import reference as _reference
from .dispatch import adjacent, choose, one_dtype

TRITON_MOST_K = 128  # for more, impl=None takes the reference


def topk_log_probs(logits: Float[Tensor, "T V"], k: int, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """The k most likely tokens of every row: log-probabilities [T, k], falling, and ids [T, k].

    Args:
        logits: [T, V], fp32, bf16 or fp64.
        k: in [1, V].
        impl: as in `token_stats`.

    Raises:
        ValueError: shapes or dtypes that do not fit, a k outside [1, V], or an impl that is not built.
        RuntimeError: as in `token_stats`.
    """
    _check_k("topk_log_probs", k, checks.shapes("topk_log_probs", dict(logits=(logits, "T V")))["V"])
    checks.floats("topk_log_probs", logits=logits)
    if impl == "cuda":
        return _cuda.topk_log_probs(logits, k)
    fits = adjacent(logits)
    form = choose("topk_log_probs", impl, (logits,), triton=fits and k <= TRITON_MOST_K, cpp=fits)
    if form == "triton":
        from ..kernels.topk_log_probs import triton

        return triton.topk_log_probs(logits, k)
    computes = _cpp.topk_log_probs if form == "cpp" else _reference.topk_log_probs
    return computes(logits, k)


def linear_topk_log_probs(
    hidden: Float[Tensor, "T d"],
    weight: Float[Tensor, "V d"],
    k: int,
    *,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """topk_log_probs of softcap(scale (W h + b)), from the hidden states; arguments and errors as there, without "cuda"."""
    op = "linear_topk_log_probs"
    _check_k(op, k, checks.shapes(op, dict(hidden=(hidden, "T d"), weight=(weight, "V d"), bias=(bias, "V")))["V"])
    checks.floats(op, hidden=hidden, weight=weight, bias=bias)
    checks.finite(op, scale=scale)
    checks.above_zero(op, softcap=softcap)
    fits = k <= TRITON_MOST_K and one_dtype(hidden, weight)
    form = choose("linear_topk_log_probs", impl, (hidden, weight, bias), triton=fits, cpp=True)
    if form == "triton":
        from ..kernels.topk_log_probs import triton

        return triton.linear_topk_log_probs(hidden, weight, k, bias=bias, scale=scale, softcap=softcap)
    computes = _cpp if form == "cpp" else _reference
    return computes.linear_topk_log_probs(hidden, weight, k, bias=bias, scale=scale, softcap=softcap)


def _check_k(op: str, k: int, V: int) -> None:
    if not 1 <= k <= V:
        raise ValueError(f"{op}: k must lie in [1, V]=[1, {V}], got {k}")
