"""apply_A and softmax_jvp on a GPU: a pass over the row for pi·x, then one that writes; lanes are reduced once per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import DTYPES, on_device_of, require_logits
from ..token_stats.triton import _exp, _finite_or_zero
from ..variant import Variant

COLUMNS = 32  # most columns of x per thread block
TILE = 8192  # elements of x in a tile


@triton.jit
def _jacobian_kernel(
    Z, X, OUT, V, k, z_t, x_t, x_v, x_k, PI: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """OUT [T, V, k] = x - pi·x for BK columns of one row, multiplied by pi if PI."""
    parts = tl.cdiv(k, BK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    columns = (tl.program_id(0) % parts * BK + tl.arange(0, BK)).to(tl.int64)
    used = columns < k
    Z += row * z_t
    x_at = X + row * x_t + (columns * x_k)[None, :]
    out_at = OUT + row * V * k + columns[None, :]
    m = tl.full([BV], -float("inf"), tl.float32)
    s = tl.zeros([BV], tl.float32)
    mean = tl.zeros([BV, BK], tl.float32)
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        inside = (v < V)[:, None] & used[None, :]
        z = tl.load(Z + v, mask=v < V, other=-float("inf"), eviction_policy="evict_first").to(tl.float32)
        x = tl.load(x_at + (v.to(tl.int64) * x_v)[:, None], mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        higher = tl.maximum(m, z)
        base = _finite_or_zero(higher)
        f = _exp(m - base)
        e = _exp(z - base)
        m = higher
        s = f * s + e
        mean = f[:, None] * mean + e[:, None] * x
    M = tl.max(m, 0)
    base = _finite_or_zero(M)
    f = _exp(m - base)
    S = tl.sum(f * s, 0)
    mean = tl.sum(f[:, None] * mean, 0) / S  # [BK]
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        inside = (v < V)[:, None] & used[None, :]
        x = tl.load(x_at + (v.to(tl.int64) * x_v)[:, None], mask=inside, other=0.0, eviction_policy="evict_first").to(
            tl.float32
        )
        y = x - mean[None, :]
        if PI:
            z = tl.load(Z + v, mask=v < V, other=-float("inf"), eviction_policy="evict_first").to(tl.float32)
            y *= (_exp(z - base) / S)[:, None]
        tl.store(out_at + (v.to(tl.int64) * k)[:, None], y, mask=inside)


def apply_A(logits: Tensor, x: Tensor) -> Tensor:
    """A x = x - (pi·x) 1 as reference.apply_A defines it, for one column or k of them.

    logits [T, V] with adjacent columns, x [T, V] or [T, V, k] with any strides, each float32, bfloat16 or float16 -> like x, in
    the wider of both types; sums are float32. A row with a NaN becomes NaN, other rows are not affected. It has no derivative.
    torch.compile keeps it as one node, torch.ops.tokdyn.apply_A_triton.

    Raises ValueError for another dtype, device or shape. Cost: logits read once, x twice, the result written once.
    """
    return _apply_A(logits, x)


@torch.library.custom_op("tokdyn::apply_A_triton", mutates_args=(), schema="(Tensor logits, Tensor x) -> Tensor")
def _apply_A(logits: Tensor, x: Tensor) -> Tensor:
    return jacobian("apply_A", logits, x, pi=False)


@_apply_A.register_fake
def empty_like_both(logits: Tensor, x: Tensor) -> Tensor:
    """Return an uninitialised, contiguous result: the shape of x, the wider dtype of both."""
    return x.new_empty(x.shape, dtype=torch.promote_types(logits.dtype, x.dtype))


def jacobian(op: str, logits: Tensor, x: Tensor, *, pi: bool) -> Tensor:
    """Return x - pi·x (apply_A), multiplied by pi if `pi` (softmax_jvp)."""
    require_logits(op, logits)
    if x.dim() not in (2, 3) or x.shape[:2] != logits.shape or x.dtype not in DTYPES:
        raise ValueError(
            f"{op}: x must be [T, V] or [T, V, k] with [T, V]={list(logits.shape)}, in float32, bfloat16 or float16, "
            f"got {x.dtype} {list(x.shape)}"
        )
    out = empty_like_both(logits, x)
    if x.numel():
        columns = x if x.dim() == 3 else x[:, :, None]
        (T, V), k = logits.shape, columns.shape[2]
        shape = _shape(k)
        with on_device_of(op, logits, x):
            _jacobian_kernel[(T * triton.cdiv(k, shape["BK"]),)](
                logits, columns, out, V, k, logits.stride(0), *columns.stride(), PI=pi, **shape
            )
    return out


def _shape(k: int) -> dict[str, int]:
    """Constants of the launch: large tiles of one row, so that few rows are in flight and the second read of x hits L2."""
    BK = min(COLUMNS, triton.next_power_of_2(k))
    return dict(BV=TILE // BK, BK=BK, num_warps=16, num_stages=1)


def variants() -> list[Variant]:
    """The kernel of apply_A for one column and for eight."""
    return jacobian_variants("apply_A", pi=False)


def jacobian_variants(op: str, *, pi: bool) -> list[Variant]:
    """Variants for x [T, V] and [T, V, 8], contiguous, with V a multiple of 16."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        name = DTYPES[dtype]
        for k in (1, 8):
            shape = _shape(k)
            warps, stages = shape.pop("num_warps"), shape.pop("num_stages")
            signature = dict(
                Z=f"*{name}:16", X=f"*{name}:16", OUT=f"*{name}:16", V="i32:16", k="i32", z_t="i32:16", x_t="i32:16"
            )
            strides = dict(x_v=1, x_k=1, k=1) if k == 1 else dict(x_k=1)
            signature = signature if k == 1 else signature | dict(x_v="i32")
            found.append(
                Variant(f"{op} {name} k={k}", _jacobian_kernel, {n: t for n, t in signature.items() if n not in strides},
                        dict(PI=pi) | shape | strides, warps, stages, elements=TILE, budget=20.0 if k == 1 else 40.0)
            )  # fmt: skip
    return found
