"""token_stats on a GPU: one read of the logits by a thread block per row; README.md beside this file derives it.

A tile of logits is [LANES, E]: E adjacent logits per lane. Every lane keeps its own running maximum, and its sums relative to
it, so that lanes are reduced only once, at the end of the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import DTYPES, on_device_of, require_logits
from ..variant import Variant

BYTES = 16  # per load and lane
TURNS = tl.constexpr(4)  # loads in flight per lane: z0 to z3 in _row
LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-200.0)  # _weight(x) is 0 for every x below, and 0 · FLOOR is still 0
LIFT = tl.constexpr(50.0)  # sums are of e^x 2^50, so that squares of e^-80 do not underflow in float32
UNIT = tl.constexpr(2.0**50)


@triton.jit
def _exp(x):
    """e^x by exp2 with denormals flushed: one multiplication and one special-function instruction."""
    return tl.exp2(x * LOG2E)


@triton.jit
def _weight(x):
    """e^x 2^50, at the cost of _exp."""
    return tl.exp2(x * LOG2E + LIFT)


@triton.jit
def _log1p(x):
    """Return log1p(x) = log(w) x / (w - 1), w = 1 + x rounded: log(w) / (w - 1) varies slowly, so the rounding cancels."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _finite_or_zero(m):
    """Return m as the reference of exponentials, or 0 if m is infinite, where m - m would be NaN."""
    return tl.where(tl.abs(m) < float("inf"), m, 0.0)


@triton.jit
def _next_above(x):
    """Return the next float32 above x (NaN above inf): z > x is z >= that, so one comparison counts before and after y."""
    bits = x.to(tl.int32, bitcast=True)
    above = tl.where(bits >= 0, bits + 1, tl.where(bits == -2147483648, 1, bits - 1))
    return above.to(tl.float32, bitcast=True)


@triton.jit
def _tanh(x):
    """tanh, by its series near 0, where (1 - e) / (1 + e) would cancel."""
    e = _exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    near = x + x * x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far))


@triton.jit
def _logit(x, BIAS, column, inside, scale, cap):
    """Return cap tanh(scale (x + bias)), or scale (x + bias) without a cap; a None is left out."""
    if BIAS is not None:
        if inside is None:
            x += tl.load(BIAS + column).to(tl.float32)
        else:
            x += tl.load(BIAS + column, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        x *= scale
    if cap is not None:
        x = cap * _tanh(x)
    return x


@triton.jit
def _raise(top, block, m, at, s, t, q):
    """Raise every lane's maximum to a block's `top` and rescale its sums; all [LANES], lane by lane."""
    at = tl.where((top > m) | ((top == m) & (block < at)), block, at)
    higher = tl.maximum(m, top)
    base = _finite_or_zero(higher)
    d = m - base
    f = _exp(d)
    return higher, at, base, f * s, f * (t + tl.maximum(d, FLOOR) * s), f * (f * q)


@triton.jit
def _add(z, base, floor, counted, s, t, q, above):
    """Add a tile z [LANES, E] to the sums of the lanes."""
    u = z - base[:, None]
    e = _weight(u)
    ahead = z >= floor
    if counted is not None:
        ahead = ahead & counted
    above += tl.sum(tl.where(ahead, 1.0, 0.0), 1)
    return s + tl.sum(e, 1), t + tl.sum(e * tl.maximum(u, FLOOR), 1), q + tl.sum(e * e, 1), above


@triton.jit
def _lane_again(
    X, lane, shift, end, first, second, base, BIAS, v0, scale, cap, LANES: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """Compute the sums of one lane again, leaving out the positions `first` and `second`."""
    s = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    q = tl.zeros([LANES], tl.float32)
    for turn in range(0, tl.cdiv(end, LANES * E), LANES):
        p = ((turn + tl.arange(0, LANES)) * LANES + lane)[:, None] * E + tl.arange(0, E)[None, :]  # [LANES, E]
        inside = (p >= shift) & (p < end)
        x = tl.load(X + p, mask=inside, other=-float("inf")).to(tl.float32)
        u = _logit(x, BIAS, v0 + p - shift, inside, scale, cap) - base
        e = tl.where(inside & (p != first) & (p != second), _weight(u), 0.0)
        s += tl.sum(e, 1)
        t += tl.sum(e * tl.maximum(u, FLOOR), 1)
        q += tl.sum(e * e, 1)
    return tl.sum(s, 0), tl.sum(t, 0), tl.sum(q, 0)


@triton.jit
def _row(
    X, start, V, y, z_y, BIAS, v0, scale, cap, LANES: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """Read the V logits from X[start] on once: columns v0 to v0 + V of a row, whose target y may lie outside them.

    -> m, a, s, t, q, above: the largest logit and its first column; Σ e, Σ e (z - m) and Σ e² with e = 2^50 e^{z-m} over all
    but columns a and y; how many columns rank before y. A NaN makes s NaN. Positions p count from the 16-byte boundary at or
    before X[start].
    """
    WIDTH: tl.constexpr = LANES * E
    BLOCK: tl.constexpr = TURNS * WIDTH
    shift = (start % E).to(tl.int32)
    end = shift + V
    X += start // E * E
    here = (y >= v0) & (y < v0 + V)
    y_at = tl.where(here, shift + (y - v0).to(tl.int32), -1)
    until = tl.where(y < v0, -1, tl.where(here, y_at, 2147483647))  # blocks that end at or before it lie left of y
    strictly = _next_above(z_y)

    lane = tl.arange(0, LANES)
    one = (lane * E)[:, None] + tl.arange(0, E)[None, :]  # [LANES, E]
    m = tl.full([LANES], -float("inf"), tl.float32)
    at = tl.full([LANES], 2147483647, tl.int32)
    s = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    q = tl.zeros([LANES], tl.float32)
    above = tl.zeros([LANES], tl.float32)

    # first the blocks that lie inside the row, then the edges in pieces of one turn: the first block, if the row begins inside
    # it, and the rest after the last whole block
    whole = end // BLOCK
    first = tl.where(shift > 0, 1, 0)
    for block in range(first, whole):
        p = block * BLOCK + one
        z0 = tl.load(X + p).to(tl.float32)
        z1 = tl.load(X + p + WIDTH).to(tl.float32)
        z2 = tl.load(X + p + 2 * WIDTH).to(tl.float32)
        z3 = tl.load(X + p + 3 * WIDTH).to(tl.float32)
        c = v0 + p - shift
        z0 = _logit(z0, BIAS, c, None, scale, cap)
        z1 = _logit(z1, BIAS, c + WIDTH, None, scale, cap)
        z2 = _logit(z2, BIAS, c + 2 * WIDTH, None, scale, cap)
        z3 = _logit(z3, BIAS, c + 3 * WIDTH, None, scale, cap)
        top = tl.maximum(tl.maximum(tl.max(z0, 1), tl.max(z1, 1)), tl.maximum(tl.max(z2, 1), tl.max(z3, 1)))
        m, at, base, s, t, q = _raise(top, block, m, at, s, t, q)
        floor = tl.where(until >= block * BLOCK + BLOCK, z_y, strictly)
        s, t, q, above = _add(z0, base, floor, None, s, t, q, above)
        s, t, q, above = _add(z1, base, floor, None, s, t, q, above)
        s, t, q, above = _add(z2, base, floor, None, s, t, q, above)
        s, t, q, above = _add(z3, base, floor, None, s, t, q, above)
    head = tl.minimum(first, whole) * TURNS
    for edge in range(0, head + tl.cdiv(end, WIDTH) - whole * TURNS):
        turn = tl.where(edge < head, edge, whole * TURNS + edge - head)
        p = turn * WIDTH + one
        inside = (p >= shift) & (p < end)
        x = tl.load(X + p, mask=inside, other=-float("inf")).to(tl.float32)
        z = tl.where(inside, _logit(x, BIAS, v0 + p - shift, inside, scale, cap), -float("inf"))
        floor = tl.where(until >= turn // TURNS * BLOCK + BLOCK, z_y, strictly)
        m, at, base, s, t, q = _raise(tl.max(z, 1), turn // TURNS, m, at, s, t, q)
        s, t, q, above = _add(z, base, floor, inside, s, t, q, above)

    # find column a in the first block that holds the largest logit, and count the logits equal to z_y before y in y's block
    M = tl.max(m, 0)
    a_block = tl.min(tl.where(m == M, at, 2147483647 // BLOCK), 0)
    y_block = tl.maximum(y_at, 0) // BLOCK
    a_each = tl.full([LANES], 2147483647, tl.int32)
    equal = tl.zeros([LANES], tl.int32)
    for turn in range(0, TURNS):
        p = a_block * BLOCK + turn * WIDTH + one
        inside = (p >= shift) & (p < end)
        x = tl.load(X + p, mask=inside, other=-float("inf")).to(tl.float32)
        z = _logit(x, BIAS, v0 + p - shift, inside, scale, cap)
        a_each = tl.minimum(a_each, tl.min(tl.where(inside & (z == M), p, 2147483647), 1))
        p = y_block * BLOCK + turn * WIDTH + one
        inside = (p >= shift) & (p < y_at)
        x = tl.load(X + p, mask=inside, other=-float("inf")).to(tl.float32)
        z = _logit(x, BIAS, v0 + p - shift, inside, scale, cap)
        equal += tl.sum((inside & (z == z_y)).to(tl.int32), 1)
    a_at = tl.min(a_each, 0)

    # in the lanes that hold a and y these two drown the rest of the sums: sum those lanes again without them
    base = _finite_or_zero(M)
    a_lane = a_at // E % LANES
    y_lane = tl.where(here, y_at // E % LANES, -1)
    s_a, t_a, q_a = _lane_again(X, a_lane, shift, end, a_at, y_at, base, BIAS, v0, scale, cap, LANES, E)
    if (y_lane != a_lane) & here:
        s_y, t_y, q_y = _lane_again(X, y_lane, shift, end, a_at, y_at, base, BIAS, v0, scale, cap, LANES, E)
        s_a += s_y
        t_a += t_y
        q_a += q_y
    keep = (lane != a_lane) & (lane != y_lane)
    moved = m - base
    f = tl.where(keep, _exp(moved), 0.0)
    t_a += tl.sum(tl.where(keep, f * (t + tl.maximum(moved, FLOOR) * s), 0.0), 0)
    q_a += tl.sum(tl.where(keep, f * (f * q), 0.0), 0)
    s_a += tl.sum(tl.where(keep, f * s, 0.0), 0)
    return M, v0 + a_at - shift, s_a, t_a, q_a, tl.sum(above.to(tl.int32) + equal, 0)


@triton.jit
def _merge(m1, a1, s1, t1, q1, m2, a2, s2, t2, q2, y):
    """Merge two parts of a row, each as _row returns it; the smaller maximum joins the sums unless it is y."""
    left = (m1 > m2) | ((m1 == m2) & (a1 < a2))
    m = tl.maximum(m1, m2)
    base = _finite_or_zero(m)
    d1 = m1 - base
    d2 = m2 - base
    f1 = _exp(d1)
    f2 = _exp(d2)
    d = tl.where(left, d2, d1)
    e = tl.where(tl.where(left, a2, a1) == y, 0.0, _weight(d))
    s = f1 * s1 + f2 * s2 + e
    t = f1 * (t1 + tl.maximum(d1, FLOOR) * s1) + f2 * (t2 + tl.maximum(d2, FLOOR) * s2) + e * tl.maximum(d, FLOOR)
    q = f1 * (f1 * q1) + f2 * (f2 * q2) + e * e
    return m, tl.where(left, a1, a2), s, t, q


@triton.jit
def _store(REAL, WHOLE, row, T, m, a, s, t, q, above, y, z_y, inside):
    """Write a row's eight results, REAL [6, T] and WHOLE [2, T], from the sums over all its columns but a and y."""
    d = z_y - m
    e = tl.where(a == y, 0.0, _weight(d))
    one = tl.where(a == y, 0.0, UNIT)  # what the argmax adds to the sum over v ≠ y
    rest = (s + e) / UNIT
    log_S = _log1p(rest)
    S = 1.0 + rest
    weighted = (t + e * tl.maximum(d, FLOOR)) / UNIT
    others = s + one
    scale = tl.where(others > 2.0**60, 2.0**-40, 1.0)  # the square of a flat row would overflow
    length = tl.sqrt_rn((one * one + q) * (scale * scale) + (others * scale) * (others * scale)) / (UNIT * scale)
    broken = (s != s) | (z_y != z_y)
    lost = tl.where(broken | (tl.abs(m) == float("inf")), float("nan"), 0.0)
    tl.store(REAL + row, m + log_S + lost, mask=inside)
    tl.store(REAL + T + row, d - log_S + lost, mask=inside)
    tl.store(REAL + 2 * T + row, log_S - weighted / S + lost, mask=inside)
    tl.store(REAL + 3 * T + row, (1.0 + (q + e * e) / (UNIT * UNIT)) / (S * S) + lost, mask=inside)
    tl.store(REAL + 4 * T + row, length / S + lost, mask=inside)
    tl.store(REAL + 5 * T + row, -log_S + lost, mask=inside)
    tl.store(WHOLE + row, tl.where(broken, 0, above).to(tl.int64), mask=inside)
    tl.store(WHOLE + T + row, tl.where(broken, -1, a).to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["T", "V", "stride", "lead"])
def _token_stats_kernel(
    X, Y, REAL, WHOLE, T, V, stride, lead, LANES: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = lead + row * stride
    y = tl.load(Y + row)
    z_y = tl.load(X + start + y, mask=(y >= 0) & (y < V), other=float("nan")).to(tl.float32)
    m, a, s, t, q, above = _row(X, start, V, y, z_y, None, 0, None, None, LANES, E)
    _store(REAL, WHOLE, row, T.to(tl.int64), m, a, s, t, q, above, y, z_y, True)


def token_stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Statistics of softmax(logits) at the targets, as reference.token_stats defines them.

    logits [T, V], float32, bfloat16 or float16, any row stride, adjacent columns; targets [T] int64 -> (logsumexp, log_prob,
    entropy, collision, g_norm, rank, argmax, argmax_log_prob), each [T]; rank and argmax are int64, the others float32. A row
    with a NaN, or a target outside [0, V), gives NaN, rank 0 and argmax -1; other rows are not affected. It has no
    derivative. It is torch.ops.tokdyn.token_stats_triton, one node to torch.compile.

    Raises ValueError for another dtype, device or layout. Cost: T·V logits read once, about 14 instructions each.
    """
    return in_order(*_token_stats(logits, targets))


def in_order(real: Tensor, whole: Tensor) -> tuple[Tensor, ...]:
    """Return the results of _store, REAL [6, T] and WHOLE [2, T], in the order of token_stats."""
    logsumexp, log_prob, entropy, collision, g_norm, argmax_log_prob = real.unbind()
    return logsumexp, log_prob, entropy, collision, g_norm, *whole.unbind(), argmax_log_prob


@torch.library.custom_op(
    "tokdyn::token_stats_triton", mutates_args=(), schema="(Tensor logits, Tensor targets) -> (Tensor, Tensor)"
)
def _token_stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The six real results [6, T] and the two integers [2, T], rows in the order of the fields."""
    require_logits("token_stats", logits)
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [T]=[{len(logits)}], got {targets.dtype} {list(targets.shape)}")
    T, V = logits.shape
    real, whole = _empty_stats(logits, targets)
    if T:
        with on_device_of("token_stats", logits, targets):
            view, lead = aligned(logits)
            _token_stats_kernel[(T,)](
                view, targets.contiguous(), real, whole, T, V, logits.stride(0), lead, **_shape(T, logits.dtype)
            )
    return real, whole


@_token_stats.register_fake
def _empty_stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    T = logits.shape[0]
    return logits.new_empty((6, T), dtype=torch.float32), logits.new_empty((2, T), dtype=torch.int64)


def aligned(x: Tensor) -> tuple[Tensor, int]:
    """Return a view of x from the 16-byte boundary at or before it, and how many elements lie between."""
    lead = x.data_ptr() % BYTES // x.element_size()
    return x.as_strided((1,), (1,), x.storage_offset() - lead), lead


def _shape(T: int, dtype: torch.dtype) -> dict[str, int]:
    """Four warps per row; eight if there are too few rows to fill a large GPU."""
    warps = 4 if T >= 512 else 8
    return dict(LANES=32 * warps, E=BYTES // dtype.itemsize, num_warps=warps, num_stages=1)


def variants() -> list[Variant]:
    """The kernel for many rows and for few, in bfloat16 and float32."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        name = DTYPES[dtype]
        for T in (8192, 64):
            shape = _shape(T, dtype)
            warps, stages = shape.pop("num_warps"), shape.pop("num_stages")
            signature = dict(
                X=f"*{name}:16", Y="*i64:16", REAL="*fp32:16", WHOLE="*i64:16", T="i32", V="i32", stride="i32", lead="i32"
            )
            found.append(
                Variant(
                    f"token_stats {name} {warps} warps", _token_stats_kernel, signature, shape, warps, stages,
                    elements=TURNS.value * shape["LANES"] * shape["E"], budget=15.0,
                )
            )  # fmt: skip
    return found
