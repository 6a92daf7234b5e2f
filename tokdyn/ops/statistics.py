"""Statistics of pi at each position, from logits or from the hidden states behind them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..kernels import checks
from ..kernels.linear_token_stats import cpp as _linear_cpp
from ..kernels.linear_token_stats import reference as _linear_reference
from ..kernels.token_stats import cpp as _cpp
from ..kernels.token_stats import cuda as _cuda
from ..kernels.token_stats import reference as _reference
from .dispatch import adjacent, choose, one_dtype


class TokenStats(NamedTuple):
    """Statistics of pi at each position, each [T]; nats, probabilities and counts."""

    logsumexp: Tensor
    log_prob: Tensor
    entropy: Tensor
    collision: Tensor
    g_norm: Tensor
    rank: Tensor
    argmax: Tensor
    argmax_log_prob: Tensor

    @classmethod
    def joined(cls, parts: Iterable[TokenStats]) -> TokenStats:
        """The positions of several, one after the other."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))


def token_stats(logits: Float[Tensor, "T V"], targets: Int[Tensor, " T"], *, impl: str | None = None) -> TokenStats:
    """Log-sum-exp, target log-prob, entropy, collision ‖pi‖², ‖pi - e_y‖, rank and argmax of every row.

    Args:
        logits: [T, V], fp32, bf16 or fp64.
        targets: [T], in [0, V).
        impl: None, "reference", "cpp" (CPU, fp32 and bf16, no gradient), "triton" (GPU, also fp16, no gradient) or "cuda"
            (GPU, fp32 and bf16, no gradient). None takes cpp or triton, by the tensors' device, where it is there and applies.

    Raises:
        ValueError: shapes or dtypes that do not fit, an impl that is not built, a target outside the vocabulary; Triton, which
            does not wait for the GPU to look at targets, gives NaN, rank 0 and argmax -1 for such a row, and so does cuda.
        RuntimeError: impl="triton" without the package triton, impl="cuda" where the CUDA part was not built.
    """
    checks.some("token_stats", checks.shapes("token_stats", dict(logits=(logits, "T V"), targets=(targets, "T"))), "V")
    checks.floats("token_stats", logits=logits)
    checks.ids("token_stats", targets=targets)
    if impl == "cuda":
        return TokenStats(*_cuda.token_stats(logits, targets))
    form = choose("token_stats", impl, (logits,), triton=adjacent(logits), cpp=adjacent(logits))
    if form == "triton":
        from ..kernels.token_stats import triton

        return TokenStats(*triton.token_stats(logits, targets))
    checks.within("token_stats", logits.shape[-1], targets=targets)
    computes = _cpp.token_stats if form == "cpp" else _reference.token_stats
    return TokenStats(*computes(logits, targets))


def linear_token_stats(
    hidden: Float[Tensor, "T d"],
    weight: Float[Tensor, "V d"],
    targets: Int[Tensor, " T"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: str | None = None,
) -> TokenStats:
    """token_stats of softcap(scale (W h + b)) / temperature; the [T, V] logits never exist as a whole.

    Args:
        hidden, weight, targets: h, W and the tokens.
        bias, scale, softcap, temperature: of the readout; without softcap the logits are scale (W h + b) / temperature.
        impl: as in `token_stats`, without "cuda".

    Raises:
        ValueError, RuntimeError: as in `token_stats`.
    """
    op = "linear_token_stats"
    given = dict(hidden=(hidden, "T d"), weight=(weight, "V d"), targets=(targets, "T"), bias=(bias, "V"))
    checks.some(op, checks.shapes(op, given), "V")
    checks.floats(op, hidden=hidden, weight=weight, bias=bias)
    checks.ids(op, targets=targets)
    checks.finite(op, scale=scale)
    checks.above_zero(op, softcap=softcap, temperature=temperature)
    form = choose("linear_token_stats", impl, (hidden, weight, bias), triton=one_dtype(hidden, weight), cpp=True)
    options: dict[str, Any] = dict(bias=bias, scale=scale, softcap=softcap, temperature=temperature)
    if form == "triton":
        from ..kernels.linear_token_stats import triton

        return TokenStats(*triton.linear_token_stats(hidden, weight, targets, **options))
    checks.within(op, weight.shape[0], targets=targets)
    computes = _linear_cpp.linear_token_stats if form == "cpp" else _linear_reference.linear_token_stats
    return TokenStats(*computes(hidden, weight, targets, **options))
