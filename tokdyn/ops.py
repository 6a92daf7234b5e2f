"""The operators, one dispatcher each: shapes are the contract, `impl` says who computes.

impl=None takes the fastest form that is built for the tensors' device; "reference" the plain torch specification in
kernels/<op>/reference.py. A name given explicitly never falls back: it raises where it cannot run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import _native
from .kernels.apply_A import reference as _apply_A
from .kernels.dual_gram import reference as _dual_gram
from .kernels.linear_token_stats import reference as _linear_token_stats
from .kernels.readout_forces import reference as _readout_forces
from .kernels.softmax_jvp import reference as _softmax_jvp
from .kernels.token_stats import cpp as _token_stats_cpp
from .kernels.token_stats import reference as _token_stats
from .kernels.topk_log_probs import reference as _topk_log_probs


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


def _require_reference(op: str, impl: str | None) -> None:
    if impl not in (None, "reference"):
        raise ValueError(f'{op}: impl={impl!r} is not built; this version has "reference"')


def token_stats(logits: Float[Tensor, "T V"], targets: Int[Tensor, " T"], *, impl: str | None = None) -> TokenStats:
    """Log-sum-exp, target log-prob, entropy, collision ‖pi‖², ‖pi - e_y‖, rank and argmax of every row.

    Args:
        logits: [T, V], fp32, bf16 or fp64.
        targets: [T], in [0, V).
        impl: None, "reference" or "cpp" (CPU, fp32 and bf16, no gradient). None takes cpp where it is built and applies.

    Raises:
        ValueError: a target outside the vocabulary, or an impl that is not built.
    """
    _check_targets(targets, logits.shape[-1])
    if impl == "cpp" or (impl is None and _takes_cpp(logits)):
        return TokenStats(*_token_stats_cpp.token_stats(logits, targets))
    _require_reference("token_stats", impl)
    return TokenStats(*_token_stats.token_stats(logits, targets))


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
    """token_stats of softcap(scale (W h + b)) / temperature; the [T, V] logits never exist as a whole."""
    _check_targets(targets, weight.shape[0])
    _require_reference("linear_token_stats", impl)
    return TokenStats(
        *_linear_token_stats.linear_token_stats(
            hidden, weight, targets, bias=bias, scale=scale, softcap=softcap, temperature=temperature
        )
    )


def topk_log_probs(logits: Float[Tensor, "T V"], k: int, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """The k most likely tokens of every row: log-probabilities [T, k], falling, and ids [T, k]."""
    _check_k(k, logits.shape[-1])
    _require_reference("topk_log_probs", impl)
    return _topk_log_probs.topk_log_probs(logits, k)


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
    """topk_log_probs of softcap(scale (W h + b)), from the hidden states."""
    _check_k(k, weight.shape[0])
    _require_reference("linear_topk_log_probs", impl)
    return _topk_log_probs.linear_topk_log_probs(hidden, weight, k, bias=bias, scale=scale, softcap=softcap)


def apply_A(logits: Float[Tensor, "T V"], x: Float[Tensor, "T V *k"], *, impl: str | None = None) -> Float[Tensor, "T V *k"]:
    """A x = x - (pi·x) 1: how log pi moves when the logits move by x, for one column or k."""
    _require_reference("apply_A", impl)
    return _apply_A.apply_A(logits, x)


def softmax_jvp(
    logits: Float[Tensor, "T V"], x: Float[Tensor, "T V *k"], *, impl: str | None = None
) -> Float[Tensor, "T V *k"]:
    """pi ⊙ (x - pi·x): how pi moves when the logits move by x, for one column or k."""
    _require_reference("softmax_jvp", impl)
    return _softmax_jvp.softmax_jvp(logits, x)


def readout_forces(
    h_o: Float[Tensor, "M d"],
    y_o: Int[Tensor, " M"],
    h_u: Float[Tensor, "L d"],
    targets_u: Int[Tensor, " L"] | Int[Tensor, "L K"],
    c: Float[Tensor, " L"] | Float[Tensor, "L K"],
    weight: Float[Tensor, "V d"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    v: Float[Tensor, " L"] | None = None,
    uniform: Float[Tensor, " L"] | None = None,
    train_bias: bool = False,
    reduce: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """F[m,l] = (h_m·h_l) <g_m, Γ_l>, the force through the readout weight: [M, L], or [M] or [L] with reduce.

    Args:
        h_o, y_o: inputs of the readout at the observed tokens and those tokens.
        h_u, targets_u, c, v, uniform: the same of the update, with its GTerm (objectives.GTerm).
        weight, bias, scale, softcap: z = softcap(scale (W h + b)).
        train_bias: the bias moves as well (adds 1 to h_m·h_l).
        reduce: None, "update" (sum over l) or "observe" (sum over m).
        impl: None or "reference".

    Raises:
        ValueError: shapes that do not fit, or an unknown reduce or impl.

    Cost: O((M + L) V d + M L (V + d)) flops; the reference holds [M, V] and [L, V].
    """
    if c.shape != targets_u.shape:
        raise ValueError(f"c must have the shape of targets_u={list(targets_u.shape)}, got {list(c.shape)}")
    if reduce not in (None, "update", "observe"):
        raise ValueError(f'reduce must be None, "update" or "observe", got {reduce!r}')
    _require_reference("readout_forces", impl)
    return _readout_forces.readout_forces(
        h_o, y_o, h_u, targets_u, c, weight,
        bias=bias, scale=scale, softcap=softcap, v=v, uniform=uniform, train_bias=train_bias, reduce=reduce,
    )  # fmt: skip


def dual_gram(
    a1: Float[Tensor, "M p"],
    a2: Float[Tensor, "L p"],
    d1: Float[Tensor, "M q"],
    d2: Float[Tensor, "L q"],
    *,
    out: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    impl: str | None = None,
) -> Tensor:
    """out += (a1 a2ᵀ) ⊙ (d1 d2ᵀ), [M, L], or summed over pairs of segments, [S_o, S_u]."""
    _require_reference("dual_gram", impl)
    return _dual_gram.dual_gram(a1, a2, d1, d2, out=out, segments=segments)


def _takes_cpp(x: Tensor) -> bool:
    plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.stride(-1) == 1
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return plain and not x.requires_grad and not wrapped and _native.load()[0] is not None


def _check_targets(targets: Tensor, V: int) -> None:
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= V):
        raise ValueError(f"targets must lie in [0, V)=[0, {V}), got {int(targets.min())} to {int(targets.max())}")


def _check_k(k: int, V: int) -> None:
    if not 1 <= k <= V:
        raise ValueError(f"k must lie in [1, V]=[1, {V}], got {k}")
