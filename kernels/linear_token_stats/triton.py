"""linear_token_stats on a GPU: products by cuBLAS in chunks of the vocabulary, each folded into the rows' running sums.

`fused=True` keeps the products in registers instead: less memory, slower. The running sums and the device functions on them are
those of token_stats (README.md there).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import DTYPES, adjacent, factors, on_device_of, products, require_readout
from ..token_stats.triton import (
    FLOOR,
    TURNS,
    _exp,
    _finite_or_zero,
    _logit,
    _merge,
    _next_above,
    _row,
    _store,
    _weight,
    in_order,
)
from ..variant import Variant

BUFFER = 64 << 20  # most bytes of the buffer of float32 products
ROWS = 16384  # hidden states that are multiplied with a chunk at a time
SPLIT = 2048  # columns of the vocabulary per thread block of the fused kernel


@triton.jit(do_not_specialize=["d", "V", "h_t", "w_v"])
def _target_kernel(H, W, Y, Z, V, d, h_t, w_v, BD: tl.constexpr):
    """h·w_y of every row in float32, NaN for a target outside the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(Y + row)
    known = (y >= 0) & (y < V)
    W += tl.where(known, y, 0) * w_v
    z = tl.zeros([BD], tl.float32)
    for i in range(0, d, BD):
        o = i + tl.arange(0, BD)
        h = tl.load(H + row * h_t + o, mask=o < d, other=0.0).to(tl.float32)
        z += h * tl.load(W + o, mask=o < d, other=0.0).to(tl.float32)
    tl.store(Z + row, tl.where(known, tl.sum(z, 0), float("nan")))


@triton.jit(do_not_specialize=["T", "n", "v0", "last"])
def _fold_kernel(
    X, Y, Z, BIAS, SUMS, SEEN, REAL, WHOLE, T, n, v0, scale, cap, last, LANES: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """Fold a chunk of products X [T, n], columns v0 to v0 + n, into SUMS [4, T] and SEEN [2, T]; the last writes the results.

    Column y of the chunk is replaced by Z, the row's z_y computed beforehand, so that rank, log-prob and argmax belong to one
    set of logits.
    """
    row = tl.program_id(0).to(tl.int64)
    T = T.to(tl.int64)
    y = tl.load(Y + row)
    z_y = tl.load(Z + row)
    tl.store(X + row * n + y - v0, z_y, mask=(y >= v0) & (y < v0 + n))
    tl.debug_barrier()
    z_y = _logit(z_y, BIAS, y, z_y == z_y, scale, cap)
    m, a, s, t, q, above = _row(X, row * n, n, y, z_y, BIAS, v0, scale, cap, LANES, E)

    later = v0 > 0
    m0 = tl.load(SUMS + row, mask=later, other=-float("inf"))
    s0 = tl.load(SUMS + T + row, mask=later, other=0.0)
    t0 = tl.load(SUMS + 2 * T + row, mask=later, other=0.0)
    q0 = tl.load(SUMS + 3 * T + row, mask=later, other=0.0)
    a0 = tl.load(SEEN + row, mask=later, other=2147483647)
    above += tl.load(SEEN + T + row, mask=later, other=0)
    m, a, s, t, q = _merge(m0, a0, s0, t0, q0, m, a, s, t, q, y)
    if last:
        _store(REAL, WHOLE, row, T, m, a, s, t, q, above, y, z_y, True)
    else:
        tl.store(SUMS + row, m)
        tl.store(SUMS + T + row, s)
        tl.store(SUMS + 2 * T + row, t)
        tl.store(SUMS + 3 * T + row, q)
        tl.store(SEEN + row, a)
        tl.store(SEEN + T + row, above)


@triton.jit
def _linear_kernel(
    H, W, Y, Z, BIAS, SUMS, SEEN, T, V, d, h_t, w_v, scale, cap,
    SPLIT: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Running sums of BT rows over SPLIT columns, without column y: SUMS [splits, 4, T], SEEN [splits, 2, T].

    WIDE multiplies in float32: the bfloat16 dot of Triton's interpreter is wrong.
    """
    tiles = tl.cdiv(T, BT)
    split = tl.program_id(0) // tiles  # neighbouring programs read the same weights
    rows = (tl.program_id(0) % tiles * BT + tl.arange(0, BT)).to(tl.int64)
    inside = rows < T
    y = tl.load(Y + rows, mask=inside, other=-1).to(tl.int32)
    z_y = tl.load(Z + rows, mask=inside, other=0.0)
    z_y = _logit(z_y, BIAS, y, inside & (z_y == z_y), scale, cap)
    strictly = _next_above(z_y)
    m = tl.full([BT], -float("inf"), tl.float32)
    a = tl.full([BT], 2147483647, tl.int32)
    s = tl.zeros([BT], tl.float32)
    t = tl.zeros([BT], tl.float32)
    q = tl.zeros([BT], tl.float32)
    above = tl.zeros([BT], tl.int32)
    k = tl.arange(0, BD)
    for v0 in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, V), BV):
        columns = v0 + tl.arange(0, BV)
        known = columns < V
        h_at = H + rows[:, None] * h_t + k[None, :]
        w_at = W + columns.to(tl.int64)[None, :] * w_v + k[:, None]
        z = tl.zeros([BT, BV], tl.float32)
        for i in range(0, d, BD):
            h = tl.load(h_at + i, mask=inside[:, None] & (k < d - i)[None, :], other=0.0)  # [BT, BD]
            w = tl.load(w_at + i, mask=known[None, :] & (k < d - i)[:, None], other=0.0)  # [BD, BV]
            if WIDE:
                z += tl.dot(h.to(tl.float32), w.to(tl.float32), input_precision="ieee")
            else:
                z = tl.dot(h, w, z, input_precision="ieee")
        z = _logit(z, BIAS, columns[None, :], known[None, :], scale, cap)  # [BT, BV]
        others = known[None, :] & (columns[None, :] != y[:, None])
        z = tl.where(others, z, -float("inf"))
        floor = tl.where(columns[None, :] < y[:, None], z_y[:, None], strictly[:, None])
        above += tl.sum((z >= floor).to(tl.int32), 1)
        top = tl.max(z, 1)
        top_at = tl.min(tl.where(others & (z == top[:, None]), columns[None, :], 2147483647), 1)
        rises = (top > m) | ((top == m) & (top_at < a))
        higher = tl.maximum(m, top)
        base = _finite_or_zero(higher)
        gap = tl.maximum(m - base, FLOOR)
        f = _exp(gap)
        joins = tl.where(rises, _weight(gap), 0.0)  # the old maximum joins the sums when a larger logit replaces it
        m = higher
        a = tl.where(rises, top_at, a)
        u = z - base[:, None]
        e = tl.where(columns[None, :] == a[:, None], 0.0, _weight(u))
        t = f * (t + gap * s) + joins * gap + tl.sum(e * tl.maximum(u, FLOOR), 1)
        s = f * s + joins + tl.sum(e, 1)
        q = f * (f * q) + joins * joins + tl.sum(e * e, 1)
    at = SUMS + split.to(tl.int64) * 4 * T + rows
    tl.store(at, m, mask=inside)
    tl.store(at + T, s, mask=inside)
    tl.store(at + 2 * T, t, mask=inside)
    tl.store(at + 3 * T, q, mask=inside)
    at = SEEN + split.to(tl.int64) * 2 * T + rows
    tl.store(at, a, mask=inside)
    tl.store(at + T, above, mask=inside)


@triton.jit(do_not_specialize=["T", "splits"])
def _finish_kernel(Y, Z, BIAS, SUMS, SEEN, REAL, WHOLE, T, splits, scale, cap, BT: tl.constexpr):
    """Merge the splits of BT rows in order, add column y, and write the results."""
    rows = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    inside = rows < T
    T = T.to(tl.int64)
    y = tl.load(Y + rows, mask=inside, other=-1)
    z_y = tl.load(Z + rows, mask=inside, other=0.0)
    z_y = _logit(z_y, BIAS, y, inside & (z_y == z_y), scale, cap)
    m = z_y
    a = y.to(tl.int32)
    s = tl.zeros([BT], tl.float32)
    t = tl.zeros([BT], tl.float32)
    q = tl.zeros([BT], tl.float32)
    above = tl.zeros([BT], tl.int32)
    for split in range(0, splits):
        at = SUMS + split * 4 * T + rows
        m1 = tl.load(at, mask=inside, other=-float("inf"))
        s1 = tl.load(at + T, mask=inside, other=0.0)
        t1 = tl.load(at + 2 * T, mask=inside, other=0.0)
        q1 = tl.load(at + 3 * T, mask=inside, other=0.0)
        at = SEEN + split * 2 * T + rows
        a1 = tl.load(at, mask=inside, other=2147483647)
        above += tl.load(at + T, mask=inside, other=0)
        m, a, s, t, q = _merge(m, a, s, t, q, m1, a1, s1, t1, q1, y)
    _store(REAL, WHOLE, rows, T, m, a, s, t, q, above, y, z_y, inside)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    fused: bool = False,
) -> tuple[Tensor, ...]:
    """token_stats(softcap(scale (W h + b)) / temperature, targets) as reference.linear_token_stats defines it.

    hidden [T, d], weight [V, d] of one dtype, float32, bfloat16 or float16; bias [V]; targets [T] int64 -> eight tensors [T] in
    the order of token_stats; rank and argmax are int64, the others float32. Logits are float32 whatever the inputs. A row with
    a NaN, or a target outside [0, V), gives NaN, rank 0 and argmax -1. It has no derivative. torch.compile keeps it as one
    node, torch.ops.tokdyn.linear_token_stats_triton.

    z_y is computed by a product of its own in float32; a logit that differs from it only by rounding may rank on either side.

    Raises ValueError for another dtype, device or shape. Cost: 2 T V d flops, and T V products written and read once, through a
    buffer of 64 MiB; with fused, 24 bytes for each row and 2048 columns instead.
    """
    return in_order(*_linear_token_stats(hidden, weight, targets, bias, scale, softcap, temperature, fused))


@torch.library.custom_op(
    "tokdyn::linear_token_stats_triton",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float scale, float? softcap, float temperature, "
    "bool fused) -> (Tensor, Tensor)",
)
def _linear_token_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,
    scale: float, softcap: float | None, temperature: float, fused: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The six real results [6, T] and the two integers [2, T]."""
    require_readout("linear_token_stats", hidden, weight, bias, softcap)
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [T]=[{len(hidden)}], got {targets.dtype} {list(targets.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    real, whole = _empty_stats(hidden, weight, targets, bias, scale, softcap, temperature, fused)
    T, d = hidden.shape
    if not T:
        return real, whole
    with on_device_of("linear_token_stats", hidden, weight, targets, bias):
        hidden, weight, targets = adjacent(hidden), adjacent(weight), targets.contiguous()
        factor, cap = factors(scale, softcap, temperature)
        z_y = hidden.new_empty(T, dtype=torch.float32)
        _target_kernel[(T,)](
            hidden, weight, targets, z_y, len(weight), d, hidden.stride(0), weight.stride(0), BD=1024, num_warps=4
        )
        run = _fused if fused else _chunked
        run(hidden, weight, targets, z_y, bias, factor, cap, real, whole)
    return real, whole


@_linear_token_stats.register_fake
def _empty_stats(hidden, weight, targets, bias, scale, softcap, temperature, fused) -> tuple[Tensor, Tensor]:
    T = hidden.shape[0]
    return hidden.new_empty((6, T), dtype=torch.float32), hidden.new_empty((2, T), dtype=torch.int64)


def _chunked(hidden, weight, targets, z_y, bias, factor, cap, real, whole) -> None:
    """Loop over blocks of rows and, inside, chunks as wide as the buffer allows: the weights are read once per block."""
    T, V = len(hidden), len(weight)
    sums, seen = z_y.new_empty(4, T), whole.new_empty((2, T), dtype=torch.int32)
    for first in range(0, T, ROWS):
        some = slice(first, first + ROWS)
        h, outputs = hidden[some], [x[:, some] for x in (sums, seen, real, whole)]
        for v0, z in products(h, weight, BUFFER):
            n, last = z.shape[1], int(v0 + z.shape[1] == V)
            _fold_kernel[(len(h),)](z, targets[some], z_y[some], bias, *outputs, T, n, v0, factor, cap, last, **_fold_shape(T))


def _fused(hidden, weight, targets, z_y, bias, factor, cap, real, whole) -> None:
    """One kernel for the sums of blocks of rows over SPLIT columns, products in registers; a second merges the splits."""
    (T, d), V = hidden.shape, len(weight)
    splits = triton.cdiv(V, SPLIT)
    sums, seen = z_y.new_empty(splits, 4, T), whole.new_empty((splits, 2, T), dtype=torch.int32)
    tiles = _tiles(hidden.dtype)
    _linear_kernel[(triton.cdiv(T, tiles["BT"]) * splits,)](
        hidden, weight, targets, z_y, bias, sums, seen, T, V, d, hidden.stride(0), weight.stride(0), factor, cap,
        SPLIT=SPLIT, WIDE=not hidden.is_cuda, **tiles,
    )  # fmt: skip
    _finish_kernel[(triton.cdiv(T, 128),)](
        targets, z_y, bias, sums, seen, real, whole, T, splits, factor, cap, BT=128, num_warps=4
    )


def _fold_shape(T: int) -> dict[str, int]:
    """One warp per row if there are many rows: chunks are then short, and the work after the loop grows with the lanes."""
    warps = 1 if T >= 2048 else 4
    return dict(LANES=32 * warps, E=4, num_warps=warps, num_stages=1)


def _tiles(dtype: torch.dtype) -> dict[str, int]:
    """Rows, columns and depth of a tile of the fused kernel: the largest that spill no registers."""
    if dtype == torch.float32:
        return dict(BT=32, BV=128, BD=32, num_warps=8, num_stages=3)
    return dict(BT=64, BV=128, BD=64, num_warps=8, num_stages=3)


def variants() -> list[Variant]:
    """The four kernels for a plain readout, and the fold with a bias and softcap."""
    found = []
    rows = dict(Y="*i64:16", Z="*fp32:16", BIAS="*bf16:16", SUMS="*fp32:16", SEEN="*i32:16", REAL="*fp32:16", WHOLE="*i64:16")
    sizes = dict(T="i32", n="i32", v0="i32", last="i32", scale="fp32", cap="fp32")
    plain = dict(BIAS=None, scale=None, cap=None)
    for T, name, absent, budget in (
        (8192, "plain", plain, 15.0),
        (64, "plain", plain, 15.0),
        (8192, "bias, softcap", {}, 45.0),
    ):
        shape = _fold_shape(T)
        warps, stages = shape.pop("num_warps"), shape.pop("num_stages")
        signature = {key: value for key, value in (dict(X="*fp32:16") | rows | sizes).items() if key not in absent}
        found.append(
            Variant(f"fold, {name}, {warps} warps", _fold_kernel, signature, shape | absent, warps, stages,
                    elements=TURNS.value * shape["LANES"] * shape["E"], budget=budget)
        )  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        name = DTYPES[dtype]
        weights = dict(H=f"*{name}:16", W=f"*{name}:16", Y="*i64:16", Z="*fp32:16")
        target = weights | dict(V="i32", d="i32", h_t="i32", w_v="i32")
        found.append(Variant(f"target {name}", _target_kernel, target, dict(BD=1024), 4, 3))
        tiles = _tiles(dtype)
        warps, stages = tiles.pop("num_warps"), tiles.pop("num_stages")
        fused = weights | dict(SUMS="*fp32:16", SEEN="*i32:16", T="i32:16", V="i32:16", d="i32:16", h_t="i32:16", w_v="i32:16")
        constants = dict(SPLIT=SPLIT, WIDE=False) | tiles | plain
        found.append(Variant(f"fused {name}", _linear_kernel, fused, constants, warps, stages))
    finish = {key: value for key, value in (rows | dict(T="i32", splits="i32")).items() if key != "BIAS"}
    found.append(Variant("finish", _finish_kernel, finish, dict(BT=128) | plain, 4, 3))
    return found
