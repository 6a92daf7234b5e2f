"""Softmax attention and its jvp for many tangents on a GPU, recomputing the softmax tile by tile (README.md derives it).

A program owns BM queries of a head and loops over blocks of BN keys. Scores are [BM, BN], accumulators transposed, [D, BM]: a
factor that was computed in registers is then always the right one of a dot, which Hopper's matrix units read from shared
memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import DTYPES, adjacent, on_device_of
from ..variant import Variant

LOG2E = tl.constexpr(1.4426950408889634)
WIDEST = 256  # largest head width

# (queries, keys, CHUNK or 0, PAIR, warps, stages) for heads up to 64, 128 and 256 wide: the largest tried that spill no
# register with any mask and softcap. CHUNK: columns of a factor read at a time; PAIR: two tangents per program. Not measured
# on a GPU.
SHAPES = {
    "sm_90": {
        "attention": ((64, 64, 0, 0, 4, 3), (128, 32, 0, 0, 8, 2), (128, 16, 0, 0, 8, 2)),
        "tangent": ((64, 32, 0, 1, 4, 3), (128, 32, 0, 0, 8, 2), (64, 16, 64, 0, 8, 2)),
        "query": ((64, 32, 0, 1, 4, 3), (128, 32, 0, 1, 8, 2), (32, 16, 64, 0, 8, 2)),
        "key": ((32, 64, 0, 1, 8, 2), (32, 64, 0, 0, 8, 2), (16, 16, 64, 0, 4, 2)),
    },
    "sm_80": {
        "attention": ((64, 32, 0, 0, 4, 2), (32, 32, 0, 0, 4, 2), (64, 32, 64, 0, 8, 2)),
        "tangent": ((64, 32, 0, 0, 4, 2), (32, 16, 0, 0, 4, 2), (32, 32, 64, 0, 8, 2)),
        "query": ((64, 32, 0, 1, 4, 2), (32, 32, 64, 0, 4, 2), (16, 32, 64, 0, 4, 2)),
        "key": ((32, 64, 0, 0, 4, 2), (32, 32, 64, 0, 4, 2), (16, 16, 64, 0, 4, 2)),
    },
    "float32": {
        "attention": ((32, 16, 16, 0, 4, 1), (32, 16, 16, 0, 8, 1), (16, 16, 16, 0, 8, 1)),
        "tangent": ((64, 16, 16, 0, 8, 1), (32, 16, 16, 0, 8, 1), (16, 16, 16, 0, 8, 1)),
        "query": ((64, 16, 16, 0, 4, 1), (64, 16, 16, 0, 8, 1), (32, 16, 16, 0, 8, 1)),
        "key": ((16, 64, 16, 0, 4, 1), (16, 64, 16, 0, 8, 1), (16, 16, 16, 0, 8, 1)),
    },
    "interpreted": dict.fromkeys(("attention", "tangent", "query", "key"), 3 * ((16, 16, 0, 1, 4, 1),)),
}


@triton.jit
def _tile(X, rows, inside, d, D: tl.constexpr, GUARD: tl.constexpr, WIDE: tl.constexpr):
    """Load rows at offsets `rows`, [R, BD]; zero beyond column D and, with GUARD, in rows that are not `inside`."""
    at = X + rows[:, None] + d[None, :]
    if GUARD and D == d.shape[0]:
        x = tl.load(at, mask=inside[:, None], other=0.0)
    elif GUARD:
        x = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    elif D == d.shape[0]:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(d < D)[None, :], other=0.0)
    return x.to(tl.float32) if WIDE else x


@triton.jit
def _factor(X, rows, inside, d, D: tl.constexpr, GUARD: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """A factor for _scores: the loaded tile, or with CHUNK pointers to the beginnings of its rows."""
    if CHUNK:
        x = X + rows[:, None]
    else:
        x = _tile(X, rows, inside, d, D, GUARD, WIDE)
    return x


@triton.jit
def _scores(x, a, b, a_inside, b_inside, D: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """Return x + a bᵀ; with CHUNK both factors are read CHUNK columns at a time, to fit float32 into the registers."""
    if CHUNK:
        c = tl.arange(0, CHUNK)
        for first in range(0, D, CHUNK):
            inside = (first + c < D)[None, :]
            p = tl.load(a + (first + c)[None, :], mask=a_inside[:, None] & inside, other=0.0)
            r = tl.load(b + (first + c)[None, :], mask=b_inside[:, None] & inside, other=0.0)
            if WIDE:
                p, r = p.to(tl.float32), r.to(tl.float32)
            x = tl.dot(p, r.T, x, input_precision="ieee")
    else:
        x = tl.dot(a, b.T, x, input_precision="ieee")
    return x


@triton.jit
def _capped(x, scale, cap):
    """For a score x = q·k return y log2(e), y = scale x or cap tanh(scale x / cap), and the slope dy/dx."""
    if cap is None:
        y = x * (scale * LOG2E)
        slope = scale
    else:
        u = x * (scale / cap)
        e = tl.exp2(tl.abs(u) * (-2.0 * LOG2E))
        r = 1.0 / (1.0 + e)
        far = (1.0 - e) * r
        u2 = u * u
        near = u + u * u2 * (-1 / 3 + u2 * (2 / 15 + u2 * (-17 / 315 + u2 * (62 / 2835))))  # where 1 - e would cancel
        y = tl.where(tl.abs(u) < 0.3, near, tl.where(u < 0, -far, far)) * (cap * LOG2E)
        slope = scale * 4.0 * e * (r * r)
    return y, slope


@triton.jit
def _span(SPANS, block, count, BLOCK: tl.constexpr, SPLIT: tl.constexpr):
    """Blocks [low, high) in which anything is seen, and [full, rest) among them that need no mask (empty without SPLIT)."""
    if SPANS is None:
        low = 0
        full = 0
        rest = count // BLOCK
        high = tl.cdiv(count, BLOCK)
    else:
        low = tl.load(SPANS + block * 4)
        full = tl.load(SPANS + block * 4 + 1)
        rest = tl.load(SPANS + block * 4 + 2)
        high = tl.load(SPANS + block * 4 + 3)
    if not SPLIT:
        full = low
        rest = low
    return low, full, rest, high


@triton.jit
def _seen(MASK, corner, i, j, m_i, m_j, inside):
    """Return which pairs of a tile are `inside` and, if there is a mask, allowed by it."""
    if MASK is not None:
        inside = tl.load(MASK + corner + (i * m_i + j * m_j), mask=inside, other=0) != 0
    return inside


@triton.jit(do_not_specialize=["R", "C", "blocks"])
def _blocks_kernel(MASK, KINDS, R, C, blocks, m_b, m_r, m_c, BR: tl.constexpr, BC: tl.constexpr):
    """KINDS [B, R / BR, C / BC] of the mask's blocks: 0 if nothing in a block is seen, 2 if everything is, else 1."""
    i = tl.program_id(0).to(tl.int64)
    row = i // blocks % tl.cdiv(R, BR) * BR + tl.arange(0, BR)
    column = i % blocks * BC + tl.arange(0, BC)
    MASK += i // blocks // tl.cdiv(R, BR) * m_b
    rows = (row < R)[:, None]
    at = MASK + row[:, None] * m_r + column[None, :] * m_c  # [BR, BC]
    seen = tl.load(at, mask=rows & (column < C)[None, :], other=0).to(tl.int32)
    some = tl.max(tl.max(seen, 1), 0)
    every = tl.min(tl.min(tl.where(rows, seen, 1), 1), 0)
    tl.store(KINDS + i, (some + every).to(tl.uint8))


@triton.jit(do_not_specialize=["blocks"])
def _spans_kernel(KINDS, SPANS, blocks, N: tl.constexpr):
    """The four numbers of _span for every row of KINDS; [full, rest) is the first of several wholly seen runs."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, N)
    kind = tl.load(KINDS + i * blocks + j, mask=j < blocks, other=0)
    low = tl.min(tl.where(kind > 0, j, N), 0)
    high = tl.max(tl.where(kind > 0, j + 1, 0), 0)
    full = tl.min(tl.where(kind == 2, j, high), 0)
    rest = tl.min(tl.where((kind != 2) & (j > full), j, high), 0)
    tl.store(SPANS + i * 4, tl.minimum(low, high))
    tl.store(SPANS + i * 4 + 1, full)
    tl.store(SPANS + i * 4 + 2, rest)
    tl.store(SPANS + i * 4 + 3, high)


@triton.jit(do_not_specialize=["T", "S", "H", "G"])
def _attention_kernel(
    Q, K, V, MASK, SPANS, PV, TOP, SUM, T, S, H, G, scale, cap, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, m_b, m_t, m_s, s_b,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """PV [B, H, T, E], and every row's largest base-2 exponent (inf if it sees nothing) and sum of exponentials, [B, H, T]."""
    blocks = tl.cdiv(T, BM)
    block = blocks - 1 - tl.program_id(0) % blocks  # under a causal mask the longest rows come first
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h, first = head // H, head % H, block.to(tl.int64) * BM
    i, s, d, c = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BE)
    row = i < T - block * BM
    Q += b * q_b + h * q_h + first * q_t
    K += b * k_b + h // G * k_h
    V += b * v_b + h // G * v_h
    if MASK is not None:
        MASK += b * m_b + first * m_t
        SPANS += b * s_b
    q = _factor(Q, i * q_t, row, d, D, True, CHUNK, WIDE)

    top = tl.full([BM], -float("inf"), tl.float32)
    sum = tl.zeros([BM], tl.float32)
    o = tl.zeros([BE, BM], tl.float32)
    low, full, rest, high = _span(SPANS, block, S, BN, SPLIT)
    for edge in tl.static_range(0 if SPLIT else 1, 2):  # first the blocks that need no mask, then the others
        for j in range(full - low + high - rest if edge else rest - full):
            start = (tl.where(j < full - low, low + j, rest - full + low + j) if edge else full + j) * BN
            near = start + s < S
            k = _factor(K + start.to(tl.int64) * k_s, s * k_s, near, d, D, edge, CHUNK, WIDE)
            v = _tile(V + start.to(tl.int64) * v_s, s * v_s, near, c, E, edge, WIDE)
            y, _ = _capped(_scores(tl.zeros([BM, BN], tl.float32), q, k, row, near, D, CHUNK, WIDE), scale, cap)
            if edge:
                seen = _seen(MASK, start.to(tl.int64) * m_s, i[:, None], s[None, :], m_t, m_s, row[:, None] & near[None, :])
                y = tl.where(seen, y, -float("inf"))
            higher = tl.maximum(top, tl.max(y, 1))
            base = tl.where(higher == -float("inf"), 0.0, higher)
            e = tl.exp2(y - base[:, None])
            f = tl.exp2(top - base)
            sum = sum * f + tl.sum(e, 1)
            o = tl.dot(v.T, e.to(v.dtype).T, o * f[None, :], input_precision="ieee")
            top = higher

    empty = top == -float("inf")
    sum = tl.where(empty, 1.0, sum)
    at = head * T + first + i
    tl.store(TOP + at, tl.where(empty, float("inf"), top), mask=row)
    tl.store(SUM + at, sum, mask=row)
    tl.store(PV + at[None, :] * E + c[:, None], o / sum[None, :], mask=row[None, :] & (c < E)[:, None])


@triton.jit
def _move(
    out, mean, e, right, q, q_dot, k, v, K_DOT, V_DOT, k_at, v_at, row, near, d, c,
    D: tl.constexpr, E: tl.constexpr, edge: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add a block of keys to out = Σ e (v̇ + ṡ v) and mean = Σ e ṡ of one tangent, given right = eᵀ and e times the slope."""
    k_dot = _factor(K_DOT, k_at, near, d, D, edge, CHUNK, WIDE)
    v_dot = _tile(V_DOT, v_at, near, c, E, edge, WIDE)
    w = _scores(tl.zeros(e.shape, tl.float32), q_dot, k, row, near, D, CHUNK, WIDE)
    w = _scores(w, q, k_dot, row, near, D, CHUNK, WIDE) * e
    out = tl.dot(v_dot.T, right, out, input_precision="ieee")
    return tl.dot(v.T, w.to(v.dtype).T, out, input_precision="ieee"), mean + tl.sum(w, 1)


@triton.jit(do_not_specialize=["n", "T", "S", "B", "H", "G"])
def _tangent_kernel(
    Q, K, V, Q_DOT, K_DOT, V_DOT, MASK, SPANS, PV, TOP, SUM, OUT, n, T, S, B, H, G, scale, cap,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, dq_n, dq_b, dq_h, dk_n, dk_b, dk_h, dv_n, dv_b, dv_h, m_b, m_t, m_s, s_b,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PAIR: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """OUT [n, B, H, T, E] of one tangent, or with PAIR of two that share the recomputed softmax.

    A tangent has the row strides of its primal.
    """
    blocks = tl.cdiv(T, BM)
    block = blocks - 1 - tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks).to(tl.int64) % (B * H)
    one = (tl.program_id(0) // blocks).to(tl.int64) // (B * H) * (2 if PAIR else 1)
    two = tl.minimum(one + 1, n - 1)  # of an odd number the last is computed twice
    b, h, first = head // H, head % H, block.to(tl.int64) * BM
    i, s, d, c = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BE)
    row = i < T - block * BM
    q_at, k_at, v_at = i * q_t, s * k_s, s * v_s
    Q += b * q_b + h * q_h + first * q_t
    K += b * k_b + h // G * k_h
    V += b * v_b + h // G * v_h
    Q_DOT += b * dq_b + h * dq_h + first * q_t
    K_DOT += b * dk_b + h // G * dk_h
    V_DOT += b * dv_b + h // G * dv_h
    if MASK is not None:
        MASK += b * m_b + first * m_t
        SPANS += b * s_b
    q = _factor(Q, q_at, row, d, D, True, CHUNK, WIDE)
    q_dot1 = _factor(Q_DOT + one * dq_n, q_at, row, d, D, True, CHUNK, WIDE)
    if PAIR:
        q_dot2 = _factor(Q_DOT + two * dq_n, q_at, row, d, D, True, CHUNK, WIDE)
    at = head * T + first + i
    top = tl.load(TOP + at, mask=row, other=float("inf"))

    out1, mean1 = tl.zeros([BE, BM], tl.float32), tl.zeros([BM], tl.float32)
    if PAIR:
        out2, mean2 = tl.zeros([BE, BM], tl.float32), tl.zeros([BM], tl.float32)
    low, full, rest, high = _span(SPANS, block, S, BN, SPLIT)
    for edge in tl.static_range(0 if SPLIT else 1, 2):
        for j in range(full - low + high - rest if edge else rest - full):
            start = (tl.where(j < full - low, low + j, rest - full + low + j) if edge else full + j) * BN
            near = start + s < S
            k_go, v_go = start.to(tl.int64) * k_s, start.to(tl.int64) * v_s
            k = _factor(K + k_go, k_at, near, d, D, edge, CHUNK, WIDE)
            v = _tile(V + v_go, v_at, near, c, E, edge, WIDE)
            y, slope = _capped(_scores(tl.zeros([BM, BN], tl.float32), q, k, row, near, D, CHUNK, WIDE), scale, cap)
            e = tl.exp2(y - top[:, None])
            if edge:
                seen = _seen(MASK, start.to(tl.int64) * m_s, i[:, None], s[None, :], m_t, m_s, row[:, None] & near[None, :])
                e = tl.where(seen, e, 0.0)
            right = e.to(v.dtype).T
            e *= slope
            out1, mean1 = _move(
                out1, mean1, e, right, q, q_dot1, k, v, K_DOT + one * dk_n + k_go, V_DOT + one * dv_n + v_go, k_at, v_at,
                row, near, d, c, D, E, edge, CHUNK, WIDE,
            )  # fmt: skip
            if PAIR:
                out2, mean2 = _move(
                    out2, mean2, e, right, q, q_dot2, k, v, K_DOT + two * dk_n + k_go, V_DOT + two * dv_n + v_go, k_at, v_at,
                    row, near, d, c, D, E, edge, CHUNK, WIDE,
                )  # fmt: skip

    inside = row[None, :] & (c < E)[:, None]
    o = tl.load(PV + at[None, :] * E + c[:, None], mask=inside, other=0.0)
    sum = tl.load(SUM + at, mask=row, other=1.0)[None, :]
    size = tl.cast(B, tl.int64) * H * T * E
    OUT += at[None, :] * E + c[:, None]
    tl.store(OUT + one * size, (out1 - mean1[None, :] * o) / sum, mask=inside)
    if PAIR:
        tl.store(OUT + two * size, (out2 - mean2[None, :] * o) / sum, mask=inside)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None) -> Tensor:
    """softmax(cap(scale q kᵀ) where mask) v as reference.attention defines it; nothing of size T x T except the mask.

    q [B, Hk, G, T, D], k [B, Hk, S, D], v [B, Hk, S, E] of one dtype, bfloat16, float16 or float32, D and E at most 256; mask
    [B or 1, 1, T, S] -> [B, Hk, G, T, E]. Blocks of the mask in which nothing is seen are skipped; those in which everything is
    seen are not masked. It has no derivative. torch.compile keeps it as one node, torch.ops.tokdyn.attention_triton.

    Raises ValueError for other shapes, dtypes or devices. Cost: 4 T S D flops per head; float32 does not use the matrix units.
    """
    return _attention(q, k, v, mask, scale, softcap)


def tangent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Ȯ for n tangents as reference.tangent_attention defines it: one attention, then one pass for every two tangents.

    dq [n, B, Hk, G, T, D], dk [n, B, Hk, S, D], dv [n, B, Hk, S, E] in the dtype of q, k, v -> [n, B, Hk, G, T, E]; those, the
    mask and the errors are as in `attention`. torch.compile keeps it as one node, torch.ops.tokdyn.tangent_attention_triton.

    Cost: 9 T S D flops per head and tangent (8 its own, 1 a share of the softmax), and 4 for the attention; memory for the
    attention's output and two numbers per row.
    """
    return _tangent_attention(q, k, v, dq, dk, dv, mask, scale, softcap)


@torch.library.custom_op(
    "tokdyn::attention_triton",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float? softcap) -> Tensor",
)
def _attention(q, k, v, mask, scale, softcap) -> Tensor:
    require_attention("attention", q, k, v, mask, softcap)
    out = _empty_attention(q, k, v, mask, scale, softcap)
    if out.numel():
        with on_device_of("attention", q, k, v, mask):
            run_attention(adjacent(q.flatten(1, 2)), adjacent(k), adjacent(v), mask, scale, softcap, out)
    return out


@_attention.register_fake
def _empty_attention(q, k, v, mask, scale, softcap) -> Tensor:
    return q.new_empty(*q.shape[:4], v.shape[3])


@torch.library.custom_op(
    "tokdyn::tangent_attention_triton",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor dq, Tensor dk, Tensor dv, Tensor? mask, float scale, float? softcap) "
    "-> Tensor",
)
def _tangent_attention(q, k, v, dq, dk, dv, mask, scale, softcap) -> Tensor:
    op = "tangent_attention"
    require_attention(op, q, k, v, mask, softcap)
    for name, x, dx in (("q", q, dq), ("k", k, dk), ("v", v, dv)):
        if dx.shape[1:] != x.shape or len(dx) != len(dq) or dx.dtype != x.dtype:
            expected = [len(dq), *x.shape]
            raise ValueError(f"{op}: d{name} must be {expected} in {x.dtype}, got {list(dx.shape)} in {dx.dtype}")
    out = _empty_tangents(q, k, v, dq, dk, dv, mask, scale, softcap)
    if not out.numel():
        return out
    with on_device_of(op, q, k, v, dq, dk, dv, mask):
        n, (B, Hk, G, T, _), (S, E) = len(dq), q.shape, v.shape[2:]
        (q, dq), (k, dk), (v, dv) = alike(q.flatten(1, 2), dq.flatten(2, 3)), alike(k, dk), alike(v, dv)
        o, top, sum = run_attention(q, k, v, mask, scale, softcap, q.new_empty(B, Hk * G, T, E, dtype=torch.float32))
        shape = launch_shape("tangent", q, v, softcap, n)
        seen, steps = spans(mask, shape["BM"], shape["BN"])
        programs = triton.cdiv(T, shape["BM"]) * B * Hk * G * triton.cdiv(n, 2 if shape["PAIR"] else 1)
        _tangent_kernel[(programs,)](
            q, k, v, dq, dk, dv, *seen, o, top, sum, out, n, T, S, B, Hk * G, G, scale, softcap,
            *(step for x in (q, k, v, dq, dk, dv) for step in x.stride()[:3]), *steps, **shape,
        )  # fmt: skip
    return out


@_tangent_attention.register_fake
def _empty_tangents(q, k, v, dq, dk, dv, mask, scale, softcap) -> Tensor:
    return q.new_empty(dq.shape[0], *q.shape[:4], v.shape[3])


def run_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the attention of q [B, H, T, D] to `out`; return it with every row's largest exponent and sum, [B, H, T]."""
    B, H, T, _ = q.shape
    top, sum = (q.new_empty(B, H, T, dtype=torch.float32) for _ in range(2))
    shape = launch_shape("attention", q, v, softcap)
    seen, steps = spans(mask, shape["BM"], shape["BN"])
    _attention_kernel[(triton.cdiv(T, shape["BM"]) * B * H,)](
        q, k, v, *seen, out, top, sum, T, k.shape[2], H, H // k.shape[1], scale, softcap,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *steps, **shape,
    )  # fmt: skip
    return out, top, sum


def spans(mask: Tensor | None, rows: int, columns: int, *, by_key: bool = False) -> tuple[tuple, tuple]:
    """Prepare a mask for the kernels: its bytes, the spans of _span for every block of rows, and strides.

    Spans [B or 1, blocks, 4]: for every block of `rows` queries the blocks of `columns` keys; by_key, for every block of `rows`
    keys the blocks of `columns` queries. Strides: the mask's of batch, query and key, and the spans' of batch.
    """
    if mask is None:
        return (None, None), (0, 0, 0, 0)
    mask = mask.view(torch.uint8)
    B, _, R, C = (mask.mT if by_key else mask).shape
    b, _, r, c = (mask.mT if by_key else mask).stride()
    many, blocks = triton.cdiv(R, rows), triton.cdiv(C, columns)
    kinds = mask.new_empty(B, many, blocks)
    met = mask.new_empty(B, many, 4, dtype=torch.int32)
    _blocks_kernel[(kinds.numel(),)](mask, kinds, R, C, blocks, b, r, c, BR=rows, BC=columns)
    _spans_kernel[(B * many,)](kinds, met, blocks, N=triton.next_power_of_2(blocks))
    each = 0 if B == 1 else 1
    return (mask, met), (b * each, *mask.stride()[2:], 4 * many * each)


def launch_shape(kernel: str, q: Tensor, v: Tensor, softcap: float | None, n: int = 0) -> dict[str, Any]:
    """Constants of a launch on q [B, H, T, D] and v [B, Hk, S, E] with n tangents or cotangents."""
    family = "float32" if q.dtype == torch.float32 else "interpreted"
    if q.is_cuda and family != "float32":
        family = "sm_90" if torch.cuda.get_device_capability(q.device) >= (9, 0) else "sm_80"
    return shape_of(kernel, family, q.shape[-1], v.shape[-1], softcap is not None, n) | dict(WIDE=not q.is_cuda)


def shape_of(kernel: str, family: str, D: int, E: int, capped: bool, n: int) -> dict[str, Any]:
    """Look up SHAPES for a head width; with a softcap the cotangents' passes have no registers for PAIR."""
    widths = [max(16, triton.next_power_of_2(x)) for x in (D, E)]
    row = 0 if max(widths) <= 64 else 1 if max(widths) <= 128 else 2
    BM, BN, chunk, pair, warps, stages = SHAPES[family][kernel][row]
    found = dict(D=D, E=E, BD=widths[0], BE=widths[1], BM=BM, BN=BN, CHUNK=chunk, num_warps=warps, num_stages=stages)
    if family == "float32":
        # masking costs little beside these products, so one loop serves blocks with and without a mask; and ptxas spills, to
        # fit two blocks on a multiprocessor, unless a thread is allowed all registers
        found |= dict(SPLIT=False, maxnreg=255)
    else:
        found |= dict(SPLIT=True)
    pair = bool(pair) and n > 1 and not (capped and kernel in ("query", "key"))
    return found if kernel == "attention" else found | dict(PAIR=pair)


def alike(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Return a primal and its tangents with adjacent columns and equal row strides; copied if they differ."""
    if x.stride(-1) == dx.stride(-1) == 1 and x.stride(-2) == dx.stride(-2):
        return x, dx
    return x.contiguous(), dx.contiguous()


def require_attention(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None) -> None:
    """Raise ValueError unless q, k, v and mask form an attention that the kernels take."""
    if q.dim() != 5 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"{op}: q must be [B, Hk, G, T, D], k and v [B, Hk, S, .], got {[list(x.shape) for x in (q, k, v)]}")
    if k.shape != (*q.shape[:2], k.shape[2], q.shape[4]) or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{op}: q, k and v do not fit together, got {[list(x.shape) for x in (q, k, v)]}")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"{op}: q, k and v must share float32, bfloat16 or float16, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (0 < q.shape[4] <= WIDEST and 0 < v.shape[3] <= WIDEST):
        raise ValueError(f'{op}: heads may be 1 to {WIDEST} wide, got {q.shape[4]} and {v.shape[3]}; take impl="reference"')
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1:] != (1, q.shape[3], k.shape[2])):
        raise ValueError(
            f"{op}: mask must be bool [B or 1, 1, T, S]=[{q.shape[0]} or 1, 1, {q.shape[3]}, {k.shape[2]}], "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    if mask is not None and len(mask) not in (1, len(q)):
        raise ValueError(f"{op}: mask must have one entry or B={len(q)}, got {len(mask)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be above 0, got {softcap}")


def variants() -> list[Variant]:
    """The attention and its tangents for heads 64, 128 and 256 wide on sm_80 and sm_90, and the kernels that read the mask."""
    signature = dict(MASK="*u8:16", KINDS="*u8:16", R="i32", C="i32", blocks="i32", m_b="i32:16", m_r="i32:16", m_c="i32")
    by_block = Variant("blocks of a mask", _blocks_kernel, signature, dict(BR=64, BC=64), 4, 3)
    signature = dict(KINDS="*u8:16", SPANS="*i32:16", blocks="i32")
    spans = Variant("spans of a mask", _spans_kernel, signature, dict(N=1024), 4, 3)
    return [by_block, spans, *attention_variants(attention=_attention_kernel, tangent=_tangent_kernel)]


def attention_variants(**kernels: Any) -> list[Variant]:
    """Variants of each kernel for every entry of SHAPES, with a mask; for the wider heads also with a softcap."""
    found = []
    for kernel, function in kernels.items():
        for family, name, architectures in (("sm_80", "bf16", (80,)), ("sm_90", "bf16", (90,)), ("float32", "fp32", (80, 90))):
            for width in (64, 128, 256):
                capped = width > 64
                constants = shape_of(kernel, family, width, width, capped, 16) | dict(WIDE=False)
                constants |= {} if capped else dict(cap=None)
                warps, stages, registers = (constants.pop(key, None) for key in ("num_warps", "num_stages", "maxnreg"))
                signature = {key: _type(key, name) for key in function.arg_names if key not in constants}
                title = f"{kernel} {name} {family} {width}"
                launched = dict(num_warps=warps, num_stages=stages, maxnreg=registers, architectures=architectures)
                found.append(Variant(title, function, signature, constants, **launched))
    return found


def _type(argument: str, name: str) -> str:
    """Return the type of an attention kernel's argument in Triton's notation."""
    own = {key: "*fp32:16" for key in ("PV", "TOP", "SUM", "DELTA")}
    own |= dict(MASK="*u8:16", SPANS="*i32:16", m_s="i32", s_b="i32")
    if argument in own:
        return own[argument]
    if argument in ("scale", "cap"):
        return "fp32"
    if argument in ("n", "T", "S", "B", "H", "G"):
        return "i32"
    return f"*{name}:16" if argument.isupper() else "i32:16"
