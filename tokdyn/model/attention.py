"""The tracing attention: softmax attention whose jvp, vjp and vmap take many tangents or cotangents at once.

Fused attention has no forward mode, and eager attention keeps T² numbers per head and tangent. This one recomputes the
softmax, once for many tangents: on a GPU tile by tile in Triton, elsewhere in blocks of queries (ops.tangent_attention,
ops.cotangent_attention). It is registered with transformers under the name ATTENTION. Transformers gives it boolean masks, so
causal, sliding-window, padded and packed inputs arrive as the model makes them. It computes grouped heads, soft-capped scores
and attention sinks (`_with_sinks`) itself. The functions here take what the operators take, hence their many parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.cotangent_attention import cpp as cotangent_cpp
from ..kernels.tangent_attention import fused
from ..kernels.tangent_attention import reference as form
from ..ops import attention, cotangent_attention, tangent_attention

ATTENTION = "tokdyn"
KNOWN = {"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"}  # tensors that say again what the mask says
SINKS = "s_aux"  # transformers' name of the option


_one_cotangent: ContextVar[bool] = ContextVar("one_cotangent", default=False)


@contextmanager
def one_cotangent() -> Iterator[None]:
    """Inside the block outputs are pulled back by one cotangent at a time, and never under a transform.

    PyTorch's fused kernel then keeps what its backward pass needs; `_Attention` makes that again for every chunk of cotangents.
    """
    before = _one_cotangent.set(True)
    try:
        yield
    finally:
        _one_cotangent.reset(before)


class NotComputed(ValueError):
    """A model asks its attention for something that the tracing attention does not compute."""


class _Tangent(torch.autograd.Function):
    """The jvp of `_Attention`: Ȯ of one tangent (dq, dk, dv), under vmap of all of them in one call."""

    @staticmethod
    def forward(q, k, v, dq, dk, dv, mask, scale, softcap):
        return tangent_attention(q, k, v, dq[None], dk[None], dv[None], mask, scale, softcap)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("a tangent of the tracing attention is not differentiated again")

    @staticmethod
    def vmap(info, in_dims, q, k, v, dq, dk, dv, mask, scale, softcap):
        if any(dim is not None for dim in in_dims[:3]):
            return _one_by_one(_Tangent, info, in_dims, (q, k, v, dq, dk, dv, mask, scale, softcap))
        dq, dk, dv = _batch_first(info, in_dims[3:6], (dq, dk, dv))
        with torch.no_grad():  # as in forward, so that the operator may take a form without gradient
            return tangent_attention(q, k, v, dq, dk, dv, mask, scale, softcap), 0


class _Cotangent(torch.autograd.Function):
    """The vjp of `_Attention`: dq, dk, dv of one cotangent do, under vmap of all of them in one call."""

    @staticmethod
    def forward(q, k, v, do, mask, scale, softcap):
        return tuple(x[0] for x in cotangent_attention(q, k, v, do[None], mask, scale, softcap))

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, _, mask, ctx.scale, ctx.softcap = inputs
        ctx.save_for_backward(q, k, v, mask)

    @staticmethod
    def backward(ctx, *grads):
        """Linear in do, its transpose is the tangent pass; derivatives in q, k and v are not made: they are NaN."""
        q, k, v, mask = ctx.saved_tensors
        along = (torch.zeros_like(x) if g is None else g for x, g in zip((q, k, v), grads, strict=True))
        unknown = (torch.full_like(x, torch.nan) for x in (q, k, v))
        return *unknown, _Tangent.apply(q, k, v, *along, mask, ctx.scale, ctx.softcap), None, None, None

    @staticmethod
    def vmap(info, in_dims, q, k, v, do, mask, scale, softcap):
        if any(dim is not None for dim in in_dims[:3]):
            return _one_by_one(_Cotangent, info, in_dims, (q, k, v, do, mask, scale, softcap))
        (do,) = _batch_first(info, in_dims[3:4], (do,))
        T, rows = q.shape[-2], _nonzero_queries(do)
        with torch.no_grad():
            rows_mask = mask if mask is None else mask[..., rows, :]
            dq, dk, dv = cotangent_attention(q[..., rows, :], k, v, do[..., rows, :], rows_mask, scale, softcap)
            if dq.shape[-2] < T:
                dq = torch.nn.functional.pad(dq, (0, 0, rows.start, T - rows.stop))
            return (dq, dk, dv), (0, 0, 0)


class _Attention(torch.autograd.Function):
    """softmax(cap(scale q kᵀ) where mask) v with q [B, Hk, G, T, D], k and v [B, Hk, S, D]: `ops.attention`."""

    @staticmethod
    def forward(q, k, v, mask, scale, softcap):
        return attention(q, k, v, mask, scale, softcap)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, mask, ctx.scale, ctx.softcap = inputs
        ctx.save_for_backward(q, k, v, mask)
        ctx.save_for_forward(q, k, v, mask)

    @staticmethod
    def backward(ctx, do):
        q, k, v, mask = ctx.saved_tensors
        return *_Cotangent.apply(q, k, v, do, mask, ctx.scale, ctx.softcap), None, None, None

    @staticmethod
    def jvp(ctx, dq, dk, dv, *_):
        q, k, v, mask = ctx.saved_tensors
        tangents = (torch.zeros_like(x) if d is None else d for x, d in ((q, dq), (k, dk), (v, dv)))
        return _Tangent.apply(q, k, v, *tangents, mask, ctx.scale, ctx.softcap)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(_Attention, info, in_dims, inputs)


def _batch_first(info: Any, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors with vmap's dimension in front; those without one are expanded."""
    n = info.batch_size
    return [x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, dims, strict=True)]


def _nonzero_queries(do: Tensor) -> slice:
    """From the first to the last query at which some cotangent is not zero, one query at least.

    A model's last attention has cotangents at the scored tokens alone. Where the host would have to wait for the answer, it is
    all of them.
    """
    if not form.on_host(do):
        return slice(0, do.shape[-2])
    others = [dim for dim in range(do.dim()) if dim != do.dim() - 2]
    nonzero = (do.amax(others).ne(0) | do.amin(others).ne(0)).nonzero()
    return slice(int(nonzero[0]), int(nonzero[-1]) + 1) if len(nonzero) else slice(0, 1)


def _one_by_one(function: Any, info: Any, dims: Any, inputs: tuple[Any, ...]) -> Any:
    """The vmap rule for a batch of primals (rules.Local on an attention block): one call after the other."""
    rows = []
    for i in range(info.batch_size):
        row = [x if dim is None else x.select(dim, i) for x, dim in zip(inputs, dims, strict=True)]
        rows.append(function.apply(*row))
    if isinstance(rows[0], tuple):
        return tuple(torch.stack(part) for part in zip(*rows, strict=True)), tuple(0 for _ in rows[0])
    return torch.stack(rows), 0


def tracing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`_Attention` in transformers' signature: query [B, H, T, D], key and value [B, Hk, S, D] -> ([B, T, H, D], None).

    Raises:
        NotComputed: a bias of positions or other tensors, sinks beside a softcap, a mask that differs between heads or adds to
            the scores.
    """
    B, H, T, D = query.shape
    Hk, S = key.shape[1], key.shape[2]
    mask = attention_mask
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)[None, None]
    elif mask.dtype != torch.bool and attention_mask is not None:
        mask = mask == 0
        if not bool((mask | (attention_mask <= torch.finfo(attention_mask.dtype).min / 2)).all()):
            raise NotComputed("a mask that adds to the scores")
    if mask.shape[1] != 1:
        raise NotComputed("a mask of its own for every head")
    if more := sorted(name for name, value in options.items() if isinstance(value, Tensor) and name not in KNOWN | {SINKS}):
        raise NotComputed(f"attention with {', '.join(more)}")
    q, mask, scale = query.reshape(B, Hk, H // Hk, T, D), mask[..., :S], D**-0.5 if scaling is None else float(scaling)
    if (sinks := options.get(SINKS)) is not None:
        if softcap is not None:
            raise NotComputed("sinks beside soft-capped scores")
        q, key, value, mask = _with_sinks(q, key, value, mask, sinks.reshape(Hk, -1) / scale)
    if _one_cotangent.get() and softcap is None and form.on_host(q):
        out = fused.attention(q, key, value, mask, scale)
    else:
        out = _Attention.apply(q, key, value, mask, scale, softcap)
    return out.reshape(B, H, T, -1).transpose(1, 2), None


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention with sinks [Hk, G], as attention without: one more key, seen by every query, scores the sink and has value 0.

    Heads of queries and keys get columns in which queries hold the sink and that key alone holds a one; LANES of them, the
    width that the C++ kernel takes. The key comes first, so that a block of queries still ends at its last key.
    """
    wide, (B, Hk, _, T, _) = cotangent_cpp.LANES, q.shape
    one = torch.zeros(wide, dtype=q.dtype, device=q.device)
    one[0] = 1
    q = torch.cat([q, (sinks[..., None].to(q) * one)[None, :, :, None].expand(B, -1, -1, T, -1)], -1)
    key = torch.cat([k.new_zeros(k.shape[-1]), one]).expand(B, Hk, 1, -1)
    k = torch.cat([key, torch.nn.functional.pad(k, (0, wide))], -2)
    return q, k, torch.nn.functional.pad(v, (0, 0, 1, 0)), torch.nn.functional.pad(mask, (1, 0), value=True)


def register() -> None:
    """Register the attention with transformers under ATTENTION, with boolean masks that are always written out."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def written_out(*args: Any, allow_is_causal_skip: bool = False, **kwargs: Any) -> Tensor | None:
        return sdpa_mask(*args, allow_is_causal_skip=False, **kwargs)

    AttentionInterface.register(ATTENTION, tracing_attention)
    AttentionMaskInterface.register(ATTENTION, written_out)
