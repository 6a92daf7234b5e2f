"""Many cotangents of softmax attention on a GPU: dQ by blocks of queries, dK and dV by blocks of keys, no atomic additions.

Tiles, masks and errors are those of tangent_attention (its README.md derives both).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import adjacent, on_device_of
from ..tangent_attention.triton import (
    _capped,
    _factor,
    _scores,
    _seen,
    _span,
    _tile,
    attention_variants,
    launch_shape,
    require_attention,
    run_attention,
    spans,
)
from ..variant import Variant


@triton.jit(do_not_specialize=["n", "T", "S", "B", "H", "G"])
def _query_kernel(
    Q, K, V, DO, MASK, SPANS, PV, TOP, SUM, DELTA, DQ, n, T, S, B, H, G, scale, cap,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, do_n, do_b, do_h, do_t, m_b, m_t, m_s, s_b,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PAIR: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """DQ [n, B, H, T, D] of one cotangent, or of two with PAIR, and DELTA = rowsum(dO ⊙ O), [n, B, H, T]."""
    blocks = tl.cdiv(T, BM)
    block = blocks - 1 - tl.program_id(0) % blocks  # under a causal mask the longest rows come first
    head = (tl.program_id(0) // blocks).to(tl.int64) % (B * H)
    one = (tl.program_id(0) // blocks).to(tl.int64) // (B * H) * (2 if PAIR else 1)
    two = tl.minimum(one + 1, n - 1)  # of an odd number the last is computed twice
    b, h, first = head // H, head % H, block.to(tl.int64) * BM
    i, s, d, c = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BE)
    row = i < T - block * BM
    q_at, k_at, v_at, do_at = i * q_t, s * k_s, s * v_s, i * do_t
    Q += b * q_b + h * q_h + first * q_t
    K += b * k_b + h // G * k_h
    V += b * v_b + h // G * v_h
    DO += b * do_b + h * do_h + first * do_t
    if MASK is not None:
        MASK += b * m_b + first * m_t
        SPANS += b * s_b
    at = head * T + first + i
    size = tl.cast(B, tl.int64) * H * T
    top = tl.load(TOP + at, mask=row, other=float("inf"))
    q = _factor(Q, q_at, row, d, D, True, CHUNK, WIDE)
    o = _tile(PV, at * E, row, c, E, True, WIDE)
    do1 = _factor(DO + one * do_n, do_at, row, c, E, True, CHUNK, WIDE)
    delta1 = tl.sum(_tile(DO + one * do_n, do_at, row, c, E, True, WIDE).to(tl.float32) * o, 1)
    tl.store(DELTA + one * size + at, delta1, mask=row)
    dq1 = tl.zeros([BD, BM], tl.float32)
    if PAIR:
        do2 = _factor(DO + two * do_n, do_at, row, c, E, True, CHUNK, WIDE)
        delta2 = tl.sum(_tile(DO + two * do_n, do_at, row, c, E, True, WIDE).to(tl.float32) * o, 1)
        tl.store(DELTA + two * size + at, delta2, mask=row)
        dq2 = tl.zeros([BD, BM], tl.float32)

    low, full, rest, high = _span(SPANS, block, S, BN, SPLIT)
    for edge in tl.static_range(0 if SPLIT else 1, 2):  # first the blocks that need no mask, then the others
        for j in range(full - low + high - rest if edge else rest - full):
            start = (tl.where(j < full - low, low + j, rest - full + low + j) if edge else full + j) * BN
            near = start + s < S
            k = _factor(K + start.to(tl.int64) * k_s, k_at, near, d, D, edge, CHUNK, WIDE)
            v = _factor(V + start.to(tl.int64) * v_s, v_at, near, c, E, edge, CHUNK, WIDE)
            y, slope = _capped(_scores(tl.zeros([BM, BN], tl.float32), q, k, row, near, D, CHUNK, WIDE), scale, cap)
            e = tl.exp2(y - top[:, None])
            if edge:
                seen = _seen(MASK, start.to(tl.int64) * m_s, i[:, None], s[None, :], m_t, m_s, row[:, None] & near[None, :])
                e = tl.where(seen, e, 0.0)
            e *= slope
            left = _tile(K + start.to(tl.int64) * k_s, k_at, near, d, D, edge, WIDE) if CHUNK else k
            ds = (_scores(tl.zeros([BM, BN], tl.float32), do1, v, row, near, E, CHUNK, WIDE) - delta1[:, None]) * e
            dq1 = tl.dot(left.T, ds.to(left.dtype).T, dq1, input_precision="ieee")
            if PAIR:
                ds = (_scores(tl.zeros([BM, BN], tl.float32), do2, v, row, near, E, CHUNK, WIDE) - delta2[:, None]) * e
                dq2 = tl.dot(left.T, ds.to(left.dtype).T, dq2, input_precision="ieee")

    inside = row[None, :] & (d < D)[:, None]
    sum = tl.load(SUM + at, mask=row, other=1.0)[None, :]
    DQ += at[None, :] * D + d[:, None]
    tl.store(DQ + one * size * D, dq1 / sum, mask=inside)
    if PAIR:
        tl.store(DQ + two * size * D, dq2 / sum, mask=inside)


@triton.jit
def _pull(dk, dv, p, left, slope, v, DO, do_at, delta, inside, row, c, x, E: tl.constexpr, edge: tl.constexpr,
          CHUNK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """What a block of queries adds to dK and dV of one cotangent; p and the scores are [BN, BM]."""
    do = _tile(DO, do_at, row, c, E, edge, WIDE)
    factor = _factor(DO, do_at, row, c, E, edge, CHUNK, WIDE) if CHUNK else do
    dp = _scores(tl.zeros(p.shape, tl.float32), v, factor, inside, row, E, CHUNK, WIDE)
    ds = (dp - delta[None, :]) * (p * slope)
    dv = tl.dot(do.T, left, dv, input_precision="ieee")
    return tl.dot(x.T, ds.to(x.dtype).T, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=["n", "T", "S", "B", "H", "G"])
def _key_kernel(
    Q, K, V, DO, MASK, SPANS, TOP, SUM, DELTA, DK, DV, n, T, S, B, H, G, scale, cap,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, do_n, do_b, do_h, do_t, m_b, m_t, m_s, s_b,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PAIR: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """DK [n, B, H / G, S, D] and DV [n, B, H / G, S, E] of one cotangent or two, summed over the G heads that share k and v."""
    blocks = tl.cdiv(S, BN)
    block = tl.program_id(0) % blocks  # under a causal mask the longest columns come first
    head = (tl.program_id(0) // blocks).to(tl.int64) % (B * H // G)
    one = (tl.program_id(0) // blocks).to(tl.int64) // (B * H // G) * (2 if PAIR else 1)
    two = tl.minimum(one + 1, n - 1)
    b, h, first = head // (H // G), head % (H // G), block.to(tl.int64) * BN
    s, t, d, c = tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BE)
    inside = s < S - block * BN
    q_at, do_at = t * q_t, t * do_t
    Q += b * q_b + h * G * q_h
    DO += b * do_b + h * G * do_h
    if MASK is not None:
        MASK += b * m_b + first * m_s
        SPANS += b * s_b
    size = tl.cast(B, tl.int64) * H * T
    k = _factor(K + b * k_b + h * k_h + first * k_s, s * k_s, inside, d, D, True, CHUNK, WIDE)
    v = _factor(V + b * v_b + h * v_h + first * v_s, s * v_s, inside, c, E, True, CHUNK, WIDE)
    dk1, dv1 = tl.zeros([BD, BN], tl.float32), tl.zeros([BE, BN], tl.float32)
    if PAIR:
        dk2, dv2 = tl.zeros([BD, BN], tl.float32), tl.zeros([BE, BN], tl.float32)

    low, full, rest, high = _span(SPANS, block, T, BM, SPLIT)
    for edge in tl.static_range(0 if SPLIT else 1, 2):
        for i in range((full - low + high - rest if edge else rest - full) * G):
            j, g = i // G, i % G
            start = (tl.where(j < full - low, low + j, rest - full + low + j) if edge else full + j) * BM
            row = start + t < T
            go = start.to(tl.int64)
            at = (b * H + h * G + g) * T + go + t
            top = tl.load(TOP + at, mask=row, other=float("inf"))
            sum = tl.load(SUM + at, mask=row, other=1.0)
            x = _tile(Q + g * q_h + go * q_t, q_at, row, d, D, edge, WIDE)
            q = _factor(Q + g * q_h + go * q_t, q_at, row, d, D, edge, CHUNK, WIDE) if CHUNK else x
            y, slope = _capped(_scores(tl.zeros([BN, BM], tl.float32), k, q, inside, row, D, CHUNK, WIDE), scale, cap)
            p = tl.exp2(y - top[None, :]) / sum[None, :]
            if edge:
                seen = _seen(MASK, go * m_t, t[None, :], s[:, None], m_t, m_s, row[None, :] & inside[:, None])
                p = tl.where(seen, p, 0.0)
            left = p.to(x.dtype).T
            delta = tl.load(DELTA + one * size + at, mask=row, other=0.0)
            dk1, dv1 = _pull(
                dk1, dv1, p, left, slope, v, DO + one * do_n + g * do_h + go * do_t, do_at, delta, inside, row, c, x,
                E, edge, CHUNK, WIDE,
            )  # fmt: skip
            if PAIR:
                delta = tl.load(DELTA + two * size + at, mask=row, other=0.0)
                dk2, dv2 = _pull(
                    dk2, dv2, p, left, slope, v, DO + two * do_n + g * do_h + go * do_t, do_at, delta, inside, row, c, x,
                    E, edge, CHUNK, WIDE,
                )  # fmt: skip

    size = tl.cast(B, tl.int64) * (H // G) * S
    at = (head * S + first + s)[None, :]
    k_inside, v_inside = inside[None, :] & (d < D)[:, None], inside[None, :] & (c < E)[:, None]
    tl.store(DK + (one * size + at) * D + d[:, None], dk1, mask=k_inside)
    tl.store(DV + (one * size + at) * E + c[:, None], dv1, mask=v_inside)
    if PAIR:
        tl.store(DK + (two * size + at) * D + d[:, None], dk2, mask=k_inside)
        tl.store(DV + (two * size + at) * E + c[:, None], dv2, mask=v_inside)


def cotangent_attention(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV for n cotangents as reference.cotangent_attention defines them: one attention, then two passes for every two.

    do [n, B, Hk, G, T, E] in the dtype of q [B, Hk, G, T, D], k [B, Hk, S, D], v [B, Hk, S, E]; D and E at most 256, mask
    [B or 1, 1, T, S] -> [n, B, Hk, G, T, D], [n, B, Hk, S, D], [n, B, Hk, S, E]. There are no atomic additions: the same input
    gives the same bits. torch.compile keeps it as one node, torch.ops.tokdyn.cotangent_attention_triton.

    Raises ValueError for other shapes, dtypes or devices. Cost: 12 T S D flops per head and cotangent (8 its own, 2 for a
    product that both passes need, 2 for the shared softmax), and 4 for the attention; memory for the attention's output and,
    per row, two numbers and one for every cotangent.
    """
    return _cotangent_attention(q, k, v, do, mask, scale, softcap)


@torch.library.custom_op(
    "tokdyn::cotangent_attention_triton",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor do, Tensor? mask, float scale, float? softcap) -> (Tensor, Tensor, Tensor)",
)
def _cotangent_attention(q, k, v, do, mask, scale, softcap) -> tuple[Tensor, Tensor, Tensor]:
    op = "cotangent_attention"
    require_attention(op, q, k, v, mask, softcap)
    if do.shape[1:] != (*q.shape[:4], v.shape[3]) or do.dtype != q.dtype:
        expected = ["n", *q.shape[:4], v.shape[3]]
        raise ValueError(f"{op}: do must be {expected} in {q.dtype}, got {list(do.shape)} in {do.dtype}")
    dq, dk, dv = found = _empty_cotangents(q, k, v, do, mask, scale, softcap)
    if not (do.numel() and k.numel()):
        return dq.zero_(), dk.zero_(), dv.zero_()
    with on_device_of(op, q, k, v, do, mask):
        n, (B, Hk, G, T, _), (S, E) = len(do), q.shape, v.shape[2:]
        q, k, v, do = (adjacent(x) for x in (q.flatten(1, 2), k, v, do.flatten(2, 3)))
        o, top, sum = run_attention(q, k, v, mask, scale, softcap, q.new_empty(B, Hk * G, T, E, dtype=torch.float32))
        delta = q.new_empty(n, B, Hk * G, T, dtype=torch.float32)
        sizes = (n, T, S, B, Hk * G, G, scale, softcap)
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:4])
        shape = launch_shape("query", q, v, softcap, n)
        seen, steps = spans(mask, shape["BM"], shape["BN"])
        programs = triton.cdiv(T, shape["BM"]) * B * Hk * G * triton.cdiv(n, 2 if shape["PAIR"] else 1)
        _query_kernel[(programs,)](q, k, v, do, *seen, o, top, sum, delta, dq, *sizes, *strides, *steps, **shape)
        shape = launch_shape("key", q, v, softcap, n)
        seen, steps = spans(mask, shape["BN"], shape["BM"], by_key=True)
        programs = triton.cdiv(S, shape["BN"]) * B * Hk * triton.cdiv(n, 2 if shape["PAIR"] else 1)
        _key_kernel[(programs,)](q, k, v, do, *seen, top, sum, delta, dk, dv, *sizes, *strides, *steps, **shape)
    return found


@_cotangent_attention.register_fake
def _empty_cotangents(q, k, v, do, mask, scale, softcap) -> tuple[Tensor, Tensor, Tensor]:
    n = do.shape[0]
    return q.new_empty(n, *q.shape), k.new_empty(n, *k.shape), v.new_empty(n, *v.shape)


def variants() -> list[Variant]:
    """Both passes, for heads 64, 128 and 256 wide, as launched on either GPU."""
    return attention_variants(query=_query_kernel, key=_key_kernel)
