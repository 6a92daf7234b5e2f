"""dual_gram on a GPU: both products in registers where the rank is low or segments are summed, else by cuBLAS (README.md)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import DTYPES, adjacent, on_device_of, product
from ..variant import Variant

RANK = {2: 2048, 4: 32}  # by bytes of an element: up to this p + q the products stay in registers (without segments)
BUFFER = 256 << 20  # most bytes of each of the two buffers of products by cuBLAS
ROOM = 64 << 20  # most bytes of one side's summed outer products
NOWHERE = tl.constexpr(2147483647)


@triton.jit
def _gram(A1, A2, ms, ls, m_inside, l_inside, P, a_m, a_l, BK: tl.constexpr, WIDE: tl.constexpr):
    """The tile A1[ms] A2[ls]ᵀ, [BM, BL]. WIDE multiplies in float32: the interpreter's half-precision dot is wrong."""
    k = tl.arange(0, BK)
    one = A1 + ms.to(tl.int64)[:, None] * a_m + k[None, :]  # [BM, BK]
    two = A2 + ls.to(tl.int64)[:, None] * a_l + k[None, :]  # [BL, BK]
    gram = tl.zeros([ms.shape[0], ls.shape[0]], tl.float32)
    for first in range(0, P, BK):
        inside = (k < P - first)[None, :]
        x = tl.load(one + first, mask=m_inside[:, None] & inside, other=0.0)
        y = tl.load(two + first, mask=l_inside[:, None] & inside, other=0.0)
        if WIDE:
            x, y = x.to(tl.float32), y.to(tl.float32)
        gram = tl.dot(x, y.T, gram, input_precision="ieee")
    return gram


@triton.jit(do_not_specialize=["M", "L"])
def _product_kernel(
    A1, A2, D1, D2, OUT, M, L, P, Q, a_m, a_l, d_m, d_l, o_m, o_l,
    BM: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write, or with ADD add, a tile of (A1 A2ᵀ) ⊙ (D1 D2ᵀ) to OUT."""
    down = tl.cdiv(M, BM)
    ms = tl.program_id(0) % down * BM + tl.arange(0, BM)
    ls = tl.program_id(0) // down * BL + tl.arange(0, BL)
    gram = _gram(A1, A2, ms, ls, ms < M, ls < L, P, a_m, a_l, BK, WIDE)
    gram *= _gram(D1, D2, ms, ls, ms < M, ls < L, Q, d_m, d_l, BK, WIDE)
    corner = (tl.program_id(0) % down).to(tl.int64) * BM * o_m + (tl.program_id(0) // down).to(tl.int64) * BL * o_l
    at = OUT + corner + (tl.arange(0, BM)[:, None] * o_m + tl.arange(0, BL)[None, :] * o_l)
    inside = (ms < M)[:, None] & (ls < L)[None, :]
    if ADD:
        gram += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, gram, mask=inside)


@triton.jit
def _known(IDS, at, n, S):
    """Segment ids of the rows `at`; NOWHERE for rows beyond n and for ids outside [0, S)."""
    ids = tl.load(IDS + at, mask=at < n, other=-1)
    return tl.where((ids >= 0) & (ids < S), ids, NOWHERE).to(tl.int32)


@triton.jit(do_not_specialize=["M", "L", "S_o", "S_u"])
def _segments_kernel(
    A1, A2, D1, D2, ROWS, COLUMNS, OUT, M, L, P, Q, a_m, a_l, d_m, d_l, o_m, o_l, S_o, S_u,
    BM: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sum a tile of (A1 A2ᵀ) ⊙ (D1 D2ᵀ) over each pair of segments in it, and add each sum to OUT atomically."""
    down = tl.cdiv(M, BM)
    ms = tl.program_id(0) % down * BM + tl.arange(0, BM)
    ls = tl.program_id(0) // down * BL + tl.arange(0, BL)
    gram = _gram(A1, A2, ms, ls, ms < M, ls < L, P, a_m, a_l, BK, WIDE)
    gram *= _gram(D1, D2, ms, ls, ms < M, ls < L, Q, d_m, d_l, BK, WIDE)
    rows = _known(ROWS, ms, M, S_o)
    columns = _known(COLUMNS, ls, L, S_u)
    row = tl.min(rows, 0)
    while row < NOWHERE:
        by_column = tl.sum(tl.where((rows == row)[:, None], gram, 0.0), 0)  # [BL]
        column = tl.min(columns, 0)
        while column < NOWHERE:
            total = tl.sum(tl.where(columns == column, by_column, 0.0), 0)
            tl.atomic_add(OUT + row.to(tl.int64) * o_m + column.to(tl.int64) * o_l, total, sem="relaxed")
            column = tl.min(tl.where(columns > column, columns, NOWHERE), 0)
        row = tl.min(tl.where(rows > row, rows, NOWHERE), 0)


@triton.jit(do_not_specialize=["M", "S"])
def _outer_kernel(
    A, D, ROWS, OUT, M, P, Q, a_m, d_m, S, BM: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Add Σ a_m d_mᵀ over each segment's rows to OUT [S, P, Q]: BM rows and a tile of P x Q per program."""
    down, across = tl.cdiv(P, BP), tl.cdiv(Q, BQ)
    tile = tl.program_id(0) % (down * across)
    ms = tl.program_id(0) // (down * across) * BM + tl.arange(0, BM)
    p, q = tile % down * BP + tl.arange(0, BP), tile // down * BQ + tl.arange(0, BQ)
    A += ms.to(tl.int64)[:, None] * a_m + p[None, :]  # [BM, BP]
    D += ms.to(tl.int64)[:, None] * d_m + q[None, :]  # [BM, BQ]
    rows = _known(ROWS, ms, M, S)
    row = tl.min(rows, 0)
    while row < NOWHERE:
        # rows of other segments are not read: 0 times inf would be NaN
        here = (rows == row)[:, None]
        a = tl.load(A, mask=here & (p < P)[None, :], other=0.0)
        d = tl.load(D, mask=here & (q < Q)[None, :], other=0.0)
        if WIDE:
            a, d = a.to(tl.float32), d.to(tl.float32)
        outer = tl.dot(a.T, d, input_precision="ieee")
        at = OUT + row.to(tl.int64) * P * Q + (p[:, None] * Q + q[None, :])
        tl.atomic_add(at, outer, mask=(p < P)[:, None] & (q < Q)[None, :], sem="relaxed")
        row = tl.min(tl.where(rows > row, rows, NOWHERE), 0)


def dual_gram(
    a1: Tensor,
    a2: Tensor,
    d1: Tensor,
    d2: Tensor,
    *,
    out: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """out += (a1 a2ᵀ) ⊙ (d1 d2ᵀ), or its sums over pairs of segments, as reference.dual_gram defines it.

    a1 [M, p], a2 [L, p], d1 [M, q], d2 [L, q] of one dtype, float32, bfloat16 or float16 -> float32 [M, L]; with segments =
    (ids [M], ids [L]) int64 -> [S_o, S_u]. Everything is summed in float32; `out` is float32. Segment sums are added
    atomically, so their last bits may differ from run to run. It has no derivative. torch.compile keeps it as one node,
    torch.ops.tokdyn.dual_gram_triton.

    Raises ValueError for other shapes, dtypes or devices. Rows whose id lies outside [0, S) of a given `out` are ignored:
    checking the ids would wait for the GPU.

    Cost: 2 M L (p + q) flops. With segments no [M, L] array exists; the sums are computed tile by tile or, where that is
    cheaper, as inner products of summed outer products, Σ_{m,l} (a_m·a_l)(d_m·d_l) = <Σ_m a_m d_mᵀ, Σ_l a_l d_lᵀ>, with
    2 (M + L + S_o S_u) p q flops and up to 64 MiB. Without segments, no buffer up to p + q = 2048 (32 in float32), and
    two of up to 256 MiB beyond.
    """
    ids, shape = segments or (None, None), [len(a1), len(a2)]
    if segments is not None:
        for name, side in zip(("rows", "columns"), segments, strict=True):
            if side.dtype != torch.int64 or side.dim() != 1:
                raise ValueError(f"dual_gram: the segments of {name} must be int64 with one dimension, got {side.dtype}")
        if out is None:
            shape = [int(side.max()) + 1 if len(side) else 0 for side in segments]
    total = a1.new_empty(shape, dtype=torch.float32) if out is None else out
    _dual_gram(a1, a2, d1, d2, total, out is not None, *ids)
    return total


@torch.library.custom_op(
    "tokdyn::dual_gram_triton",
    mutates_args=("out",),
    schema="(Tensor a1, Tensor a2, Tensor d1, Tensor d2, Tensor(a!) out, bool add, Tensor? rows, Tensor? columns) -> ()",
)
def _dual_gram(
    a1: Tensor, a2: Tensor, d1: Tensor, d2: Tensor, out: Tensor, add: bool, rows: Tensor | None, columns: Tensor | None
) -> None:
    op, given = "dual_gram", (a1, a2, d1, d2)
    M, L = len(a1), len(a2)
    if any(x.dim() != 2 for x in given) or a1.shape[1] != a2.shape[1] or d1.shape[1] != d2.shape[1]:
        raise ValueError(f"{op}: a1 [M, p], a2 [L, p], d1 [M, q], d2 [L, q], got {[list(x.shape) for x in given]}")
    if len(d1) != M or len(d2) != L:
        raise ValueError(f"{op}: d1 and d2 must have as many rows as a1 and a2, {M} and {L}, got {len(d1)} and {len(d2)}")
    if a1.dtype not in DTYPES or len({x.dtype for x in given}) > 1:
        raise ValueError(f"{op}: all four must share float32, bfloat16 or float16, got {[x.dtype for x in given]}")
    if out.dtype != torch.float32 or out.dim() != 2 or (rows is None and out.shape != (M, L)):
        expected = [M, L] if rows is None else ["S_o", "S_u"]
        raise ValueError(f"{op}: out must be float32 {expected}, got {out.dtype} {list(out.shape)}")
    if rows is not None and columns is not None and (rows.shape != (M,) or columns.shape != (L,)):
        got = f"{list(rows.shape)} and {list(columns.shape)}"
        raise ValueError(f"{op}: segments must name one for each of M={M} rows and L={L} columns, got {got}")
    if not add and (rows is not None or not (M and L)):
        out.zero_()
    if not (M and L):
        return
    with on_device_of(op, *given, out, rows, columns):
        if rows is not None and columns is not None:
            ids = rows.contiguous(), columns.contiguous()
            _sum_segments(adjacent(a1), adjacent(a2), adjacent(d1), adjacent(d2), out, *ids)
        elif a1.shape[1] + d1.shape[1] <= RANK[a1.element_size()]:
            _tiles(_product_kernel, *(adjacent(x) for x in given), out, ADD=add)
        else:
            _by_cublas(a1, a2, d1, d2, out, add)


@_dual_gram.register_fake
def _no_result(a1, a2, d1, d2, out, add, rows, columns) -> None:
    return None


def _tiles(kernel, a1, a2, d1, d2, *rest, **constants) -> None:
    """Launch `kernel` on every tile of [M, L]; `rest` holds its further tensors, the output last."""
    (M, P), (L, Q), out = a1.shape, d2.shape, rest[-1]
    shape = launch_shape(a1.dtype, add=constants.get("ADD", False))
    programs = triton.cdiv(M, shape["BM"]) * triton.cdiv(L, shape["BL"])
    strides = (x.stride(0) for x in (a1, a2, d1, d2))
    kernel[(programs,)](
        a1, a2, d1, d2, *rest, M, L, P, Q, *strides, *out.stride(), WIDE=not a1.is_cuda, **constants, **shape
    )  # fmt: skip


def _sum_segments(a1, a2, d1, d2, out, rows, columns) -> None:
    """Sum over pairs of segments: tile by tile, or from summed outer products, whichever has fewer flops."""
    (M, p), (L, q), (S_o, S_u) = a1.shape, d2.shape, out.shape
    if (M + L + S_o * S_u) * p * q >= M * L * (p + q) or 4 * max(S_o, S_u) * p * q > ROOM:
        _tiles(_segments_kernel, a1, a2, d1, d2, rows, columns, out, S_o=S_o, S_u=S_u)
        return
    sums = []
    for a, d, ids, S in ((a1, d1, rows, S_o), (a2, d2, columns, S_u)):
        total = out.new_zeros(S, p, q)
        shape = outer_shape(a.dtype)
        programs = triton.cdiv(len(a), shape["BM"]) * triton.cdiv(p, shape["BP"]) * triton.cdiv(q, shape["BQ"])
        _outer_kernel[(programs,)](
            a, d, ids, total, len(a), p, q, a.stride(0), d.stride(0), S, WIDE=not a.is_cuda, **shape
        )  # fmt: skip
        sums.append(total.view(S, p * q))
    out.addmm_(sums[0], sums[1].T)


def _by_cublas(a1, a2, d1, d2, out, add) -> None:
    """Both products by cuBLAS into float32 buffers, as many rows at a time as fit, then multiplied elementwise."""
    step = max(1, BUFFER // (4 * len(a2)))
    for first in range(0, len(a1), step):
        some = slice(first, first + step)
        left, right = product(a1[some], a2.T), product(d1[some], d2.T)
        if add:
            out[some].addcmul_(left, right)
        else:
            torch.mul(left, right, out=out[some])


def launch_shape(dtype: torch.dtype, *, add: bool = False) -> dict[str, Any]:
    """Rows, columns and depth of a tile: two accumulators of 128 x 128 are all that the registers hold."""
    if dtype == torch.float32:
        return dict(BM=64, BL=64, BK=16, num_warps=4, num_stages=3)
    return dict(BM=128, BL=64 if add else 128, BK=64, num_warps=8, num_stages=3)


def outer_shape(dtype: torch.dtype) -> dict[str, Any]:
    """Rows per program, and the tile of P x Q of their outer products."""
    return dict(BM=16 if dtype == torch.float32 else 64, BP=64, BQ=64, num_warps=4, num_stages=1)


def variants() -> list[Variant]:
    """The three kernels for factors of float32 and bfloat16; float16 has the instructions of the latter."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        name = DTYPES[dtype]
        factors = {key: f"*{name}:16" for key in ("A1", "A2", "D1", "D2")}
        ids = dict(ROWS="*i64:16", COLUMNS="*i64:16")
        sizes = dict(M="i32", L="i32", P="i32:16", Q="i32:16", a_m="i32:16", a_l="i32:16", d_m="i32:16", d_l="i32:16")
        out = dict(OUT="*fp32:16", o_m="i32:16")
        for what, kernel, more, constants in (
            ("", _product_kernel, {}, dict(ADD=False)),
            (", added", _product_kernel, {}, dict(ADD=True)),
            (", segments", _segments_kernel, ids | dict(S_o="i32", S_u="i32"), {}),
        ):
            shape = launch_shape(dtype, add=constants.get("ADD", False))
            warps, stages = shape.pop("num_warps"), shape.pop("num_stages")
            constants = shape | constants | dict(WIDE=False, o_l=1)
            found.append(Variant(f"dual_gram {name}{what}", kernel, factors | sizes | out | more, constants, warps, stages))
        shape = outer_shape(dtype)
        warps, stages = shape.pop("num_warps"), shape.pop("num_stages")
        outer = dict(A=f"*{name}:16", D=f"*{name}:16", ROWS="*i64:16", OUT="*fp32:16", M="i32", P="i32:16", Q="i32:16")
        outer |= dict(a_m="i32:16", d_m="i32:16", S="i32")
        found.append(Variant(f"outer products {name}", _outer_kernel, outer, shape | dict(WIDE=False), warps, stages))
    return found
