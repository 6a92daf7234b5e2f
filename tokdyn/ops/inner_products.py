"""Inner products of gradients that are outer products, from the factors alone: <δ aᵀ, δ' a'ᵀ> = (a·a') (δ·δ')."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..kernels import checks
from ..kernels.dual_gram import cpp as _dual_gram_cpp
from ..kernels.dual_gram import reference as _dual_gram_reference
from ..kernels.readout_forces import cpp as _readout_cpp
from ..kernels.readout_forces import reference as _readout_reference
from .dispatch import adjacent, choose, one_dtype


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
        h_u, targets_u, c, v, uniform: the same of the update, with its GTerm (objective.GTerm).
        weight, bias, scale, softcap: z = softcap(scale (W h + b)).
        train_bias: the bias moves as well (adds 1 to h_m·h_l).
        reduce: None, "update" (sum over l) or "observe" (sum over m).
        impl: None, "reference", "cpp" (CPU, fp32 and bf16, no gradient) or "triton" (GPU, also fp16, no gradient). None takes
            the form of the tensors' device where it is installed and applies.

    Raises:
        ValueError: shapes that do not fit, or an unknown reduce or impl.
        RuntimeError: impl="triton" without the package triton.

    Cost: O((M + L) V d + M L (V + d)) flops; the reference holds [M, V] and [L, V], the others stream over V.
    """
    op, of_targets = "readout_forces", "L K" if targets_u.dim() == 2 else "L"
    given = dict(
        h_o=(h_o, "M d"), y_o=(y_o, "M"), h_u=(h_u, "L d"), targets_u=(targets_u, of_targets), c=(c, of_targets),
        weight=(weight, "V d"), bias=(bias, "V"), v=(v, "L"), uniform=(uniform, "L"),
    )  # fmt: skip
    sizes = checks.shapes(op, given)
    checks.some(op, sizes, "V")
    checks.floats(op, h_o=h_o, h_u=h_u, c=c, weight=weight, bias=bias, v=v, uniform=uniform)
    checks.ids(op, y_o=y_o, targets_u=targets_u)
    checks.finite(op, scale=scale)
    checks.above_zero(op, softcap=softcap)
    if reduce not in (None, "update", "observe"):
        raise ValueError(f'reduce must be None, "update" or "observe", got {reduce!r}')
    tensors = (h_o, h_u, weight, bias, c, v, uniform)
    form = choose("readout_forces", impl, tensors, triton=one_dtype(h_o, h_u, weight), cpp=True)
    if form == "triton":
        from ..kernels.readout_forces import triton as computes
    else:
        checks.within(op, sizes["V"], y_o=y_o, targets_u=targets_u)
        computes = _readout_cpp if form == "cpp" else _readout_reference
    return computes.readout_forces(
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
    """out += (a1 a2ᵀ) ⊙ (d1 d2ᵀ), [M, L], or summed over pairs of segments, [S_o, S_u].

    Args:
        a1, a2, d1, d2: what enters a linear layer at the observed and updated positions, and what its output is to move by.
        out: added to instead of a new tensor; float32 where impl is not "reference".
        segments: ids of the observed [M] and updated [L] positions.
        impl: None, "reference", "cpp" (CPU) or "triton" (GPU); the last two sum in float32 and have no gradient. None takes the
            form of the tensors' device where it is installed and applies.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown impl.
        RuntimeError: impl="triton" without the package triton.
    """
    op, kept = "dual_gram", "M L" if segments is None else "S_o S_u"
    given = dict(a1=(a1, "M p"), a2=(a2, "L p"), d1=(d1, "M q"), d2=(d2, "L q"), out=(out, kept))
    if segments is not None:
        given |= {"segments[0]": (segments[0], "M"), "segments[1]": (segments[1], "L")}
        checks.ids(op, **{"segments[0]": segments[0], "segments[1]": segments[1]})
    sizes = checks.shapes(op, given)
    if segments is not None and out is None:
        checks.some(op, sizes, "M", "L")
    checks.one_kind(op, a1=a1, a2=a2, d1=d1, d2=d2)
    checks.floats(op, out=out)
    factors = (a1, a2, d1, d2)
    fits = one_dtype(*factors) and (out is None or out.dtype == torch.float32)
    form = choose("dual_gram", impl, (*factors, out), triton=fits, cpp=adjacent(out))
    if form == "triton":
        from ..kernels.dual_gram import triton as computes
    else:
        computes = _dual_gram_cpp if form == "cpp" else _dual_gram_reference
    return computes.dual_gram(*factors, out=out, segments=segments)
