"""Softmax attention, its tangents (jvp) and its cotangents (vjp), for many of either at once."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..kernels import checks
from ..kernels.cotangent_attention import cpp as _cotangent_cpp
from ..kernels.cotangent_attention import reference as _cotangent
from ..kernels.tangent_attention import fused as _fused
from ..kernels.tangent_attention import reference as _tangent
from .dispatch import choose, one_dtype

TRITON_WIDEST_HEAD = 256  # for wider ones, impl=None takes another form


def attention(
    q: Float[Tensor, "B Hk G T D"],
    k: Float[Tensor, "B Hk S D"],
    v: Float[Tensor, "B Hk S E"],
    mask: Bool[Tensor, "#B 1 T S"] | None,
    scale: float,
    softcap: float | None = None,
    *,
    impl: str | None = None,
) -> Float[Tensor, "B Hk G T E"]:
    """softmax(cap(scale q kᵀ) where mask) v, G heads of queries to every head of keys; a row that sees nothing gives 0.

    Args:
        q, k, v: queries, keys and values.
        mask: True where a key is seen, for every sequence or once for all; None sees everything.
        scale, softcap: scores are cap(x) = softcap tanh(x / softcap) of x = scale q·k, x itself without softcap.
        impl: None, "reference" or "triton" (GPU, heads up to 256 wide, no gradient). None takes triton where it is installed
            and applies, and on the CPU without softcap PyTorch's fused kernel.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown impl.
        RuntimeError: impl="triton" without the package triton.
    """
    sizes = _check("attention", q, k, v, mask, scale, softcap)
    if 0 in sizes.values():
        return q.new_zeros(*q.shape[:-1], v.shape[-1])
    form = choose("attention", impl, (q, k, v), triton=_fits_triton(q, k, v))
    if form == "triton":
        from ..kernels.tangent_attention import triton

        return triton.attention(q, k, v, mask, scale, softcap)
    if impl is None and softcap is None and q.device.type == "cpu":
        return _fused.attention(q, k, v, mask, scale)
    return _tangent.attention(q, k, v, mask, scale, softcap)


def tangent_attention(
    q: Float[Tensor, "B Hk G T D"],
    k: Float[Tensor, "B Hk S D"],
    v: Float[Tensor, "B Hk S E"],
    dq: Float[Tensor, "n B Hk G T D"],
    dk: Float[Tensor, "n B Hk S D"],
    dv: Float[Tensor, "n B Hk S E"],
    mask: Bool[Tensor, "#B 1 T S"] | None,
    scale: float,
    softcap: float | None = None,
    *,
    impl: str | None = None,
) -> Float[Tensor, "n B Hk G T E"]:
    """How `attention` moves along n tangents (dq, dk, dv), nothing of size T x T kept for any of them.

    Arguments and errors as in `attention`. Cost: 8 T S D flops a head and tangent, and the softmax recomputed.
    """
    moved = dict(dq=(dq, "n B Hk G T D"), dk=(dk, "n B Hk S D"), dv=(dv, "n B Hk S E"))
    sizes = _check("tangent_attention", q, k, v, mask, scale, softcap, **moved)
    if 0 in sizes.values():
        return q.new_zeros(len(dq), *q.shape[:-1], v.shape[-1])
    given = (q, k, v, dq, dk, dv)
    if choose("tangent_attention", impl, given, triton=_fits_triton(*given)) == "triton":
        from ..kernels.tangent_attention import triton

        return triton.tangent_attention(q, k, v, dq, dk, dv, mask, scale, softcap)
    return _tangent.tangent_attention(q, k, v, dq, dk, dv, mask, scale, softcap)


def cotangent_attention(
    q: Float[Tensor, "B Hk G T D"],
    k: Float[Tensor, "B Hk S D"],
    v: Float[Tensor, "B Hk S E"],
    do: Float[Tensor, "n B Hk G T E"],
    mask: Bool[Tensor, "#B 1 T S"] | None,
    scale: float,
    softcap: float | None = None,
    *,
    impl: str | None = None,
) -> tuple[Float[Tensor, "n B Hk G T D"], Float[Tensor, "n B Hk S D"], Float[Tensor, "n B Hk S E"]]:
    """n cotangents `do` of `attention` pulled back to q, k and v; the fused kernel takes one of them.

    Arguments and errors as in `attention`. Cost: 8 T S D flops a head and cotangent, and the softmax recomputed.
    """
    sizes = _check("cotangent_attention", q, k, v, mask, scale, softcap, do=(do, "n B Hk G T E"))
    if 0 in sizes.values():
        dq, dk, dv = (x.new_zeros(len(do), *x.shape) for x in (q, k, v))
        return dq, dk, dv
    given = (q, k, v, do)
    form = choose("cotangent_attention", impl, given, triton=_fits_triton(*given), cpp=_cotangent_cpp.takes(*given))
    if form == "triton":
        from ..kernels.cotangent_attention import triton

        return triton.cotangent_attention(q, k, v, do, mask, scale, softcap)
    if impl is None and softcap is None and len(do) == 1 and q.device.type == "cpu":
        return _fused.cotangent_attention(q, k, v, do, mask, scale)
    computes = _cotangent_cpp.cotangent_attention if form == "cpp" else _cotangent.cotangent_attention
    return computes(q, k, v, do, mask, scale, softcap)


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, **more: checks.Given
) -> dict[str, int]:
    """Shapes, dtypes and numbers of an attention, `more` its tangents or cotangents; returns its sizes."""
    sizes = checks.shapes(op, dict(q=(q, "B Hk G T D"), k=(k, "B Hk S D"), v=(v, "B Hk S E"), mask=(mask, "#B 1 T S"), **more))
    checks.one_kind(op, q=q, k=k, v=v, **{name: tensor for name, (tensor, _) in more.items()})
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask must be of dtype bool, True where a key is seen, got {mask.dtype}")
    checks.some(op, sizes, "S")
    checks.finite(op, scale=scale)
    checks.above_zero(op, softcap=softcap)
    return sizes


def _fits_triton(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> bool:
    """One dtype, and heads that are not too wide."""
    return max(q.shape[-1], v.shape[-1]) <= TRITON_WIDEST_HEAD and one_dtype(q, k, v, *others)
