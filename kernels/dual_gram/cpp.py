"""dual_gram on the CPU: tiles of both Gram matrices by BLAS, sums over segments in C++ (csrc/README.md)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..native import ROWS, address, extension, require_float, require_ids, row_blocks

TILE = (2048, 2048)  # rows and columns of a tile of the Gram matrices
ROOM = 16 << 20  # most bytes of one side's summed outer products
CALL = 1e6  # overhead of calling a matrix product, in flops


def dual_gram(
    a1: Tensor,
    a2: Tensor,
    d1: Tensor,
    d2: Tensor,
    *,
    out: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    simd: str = "",
) -> Tensor:
    """out += (a1 a2ᵀ) ⊙ (d1 d2ᵀ), or its sums over pairs of segments, as reference.dual_gram defines it.

    a1 [M, p], a2 [L, p], d1 [M, q], d2 [L, q], float32 or bfloat16 on the CPU -> float32 [M, L]; with segments = (ids [M],
    ids [L]) int64 -> [S_o, S_u]. bfloat16 is widened, which is exact, and summed in float32. `out` is float32 with adjacent
    columns. It has no derivative. It is torch.ops.tokdyn.dual_gram_cpp; `simd` as in token_stats.

    Raises ValueError for shapes, dtypes and devices that do not fit, RuntimeError without the extension.

    Cost: 2 M L (p + q) flops; beside the result a tile of up to 16 MiB, two when adding. Summed over segments it is an inner
    product of sums of outer products, Σ_{m,l} (a_m·a_l)(d_m·d_l) = <Σ_m a_m d_mᵀ, Σ_l a_l d_lᵀ>, so it may also cost
    2 (M + L + S_o S_u) p q, with up to 16 MiB a side for those sums; the cheaper way is taken. Segments that are not in order
    add 8 bytes a row.
    """
    ids, shape = segments or (None, None), [len(a1), len(a2)]
    if segments is not None:
        shape = [int(s.max()) + 1 if s.numel() else 0 for s in segments]
    total = torch.empty(shape) if out is None else out
    _dual_gram(a1, a2, d1, d2, total, out is not None, *ids, simd)
    return total


@torch.library.custom_op(
    "tokdyn::dual_gram_cpp",
    mutates_args=("out",),
    schema="(Tensor a1, Tensor a2, Tensor d1, Tensor d2, Tensor(a!) out, bool add, Tensor? rows, Tensor? columns, str simd) "
    "-> ()",
)
def _dual_gram(
    a1: Tensor,
    a2: Tensor,
    d1: Tensor,
    d2: Tensor,
    out: Tensor,
    add: bool,
    rows: Tensor | None,
    columns: Tensor | None,
    simd: str,
) -> None:
    _check(a1, a2, d1, d2, out, add, rows, columns, simd)
    M, L = len(a1), len(a2)
    for side, size in ((rows, out.shape[0]), (columns, out.shape[1])):
        if side is not None and len(side) and not 0 <= int(side.min()) <= int(side.max()) < size:
            raise ValueError(f"dual_gram: segments must lie in [0, {size}), got {int(side.min())} to {int(side.max())}")
    if rows is not None and columns is not None:
        block = outer_block(M, L, out.shape, a1.shape[1], d1.shape[1])
        summed = outer_sums if block else tile_sums
        sums = summed((a1, d1, rows), (a2, d2, columns), out.shape, block, simd)
        out.copy_(out + sums if add else sums)
        return
    for some, others, g_a, g_d in tiles(a1, a2, d1, d2, None if add else out):
        if add:
            out[some, others].addcmul_(g_a, g_d)
        else:
            g_a.mul_(g_d)


@_dual_gram.register_fake
def _check(a1, a2, d1, d2, out, add, rows, columns, simd) -> None:
    """Raise ValueError unless the arguments fit; also the op's fake for torch.compile."""
    op = "dual_gram"
    require_float(op, a1=a1, a2=a2, d1=d1, d2=d2, out=out)
    M, L = a1.shape[0], a2.shape[0]
    if any(x.dim() != 2 for x in (a1, a2, d1, d2)) or a1.shape[1] != a2.shape[1] or d1.shape[1] != d2.shape[1]:
        raise ValueError(f"{op}: a1 [M, p], a2 [L, p], d1 [M, q], d2 [L, q], got {[list(x.shape) for x in (a1, a2, d1, d2)]}")
    if d1.shape[0] != M or d2.shape[0] != L:
        raise ValueError(
            f"{op}: d1 and d2 must have as many rows as a1 and a2, {M} and {L}, got {d1.shape[0]} and {d2.shape[0]}"
        )
    if out.dim() != 2 or out.dtype != torch.float32 or (out.shape[1] > 1 and out.stride(1) != 1):
        raise ValueError(
            f"{op}: out must be float32 with two dimensions and adjacent columns, "
            f"got {out.dtype} {list(out.shape)} with strides {out.stride()}"
        )
    if rows is None and tuple(out.shape) != (M, L):
        raise ValueError(f"{op}: out must be [M, L]=[{M}, {L}], got {list(out.shape)}")
    if rows is not None:
        require_ids(op, rows=rows, columns=columns)
        if tuple(rows.shape) != (M,) or tuple(columns.shape) != (L,):
            raise ValueError(f"{op}: segments must be ([M], [L])=([{M}], [{L}]), got {list(rows.shape)}, {list(columns.shape)}")


Factors = tuple[Tensor, Tensor, Tensor]  # a [n, p], d [n, q] and the segments [n] of one side


def tiles(
    a1: Tensor, a2: Tensor, d1: Tensor, d2: Tensor, out: Tensor | None = None
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield rows, columns and both Gram matrices of every tile, in reused buffers; a1 a2ᵀ is written to `out` if given."""
    M, L = len(a1), len(a2)
    buffers = [torch.empty(min(M, TILE[0]) * min(L, TILE[1])) for _ in range(2 if out is None else 1)]
    for rows in row_blocks(M, TILE[0]):
        left = a1[rows].float(), d1[rows].float()
        for columns in row_blocks(L, TILE[1]):
            shape = len(left[0]), columns.stop - columns.start
            places = [buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers]
            if out is not None:
                places.insert(0, out[rows, columns])
            right = a2[columns].float(), d2[columns].float()
            g_a, g_d = (torch.mm(x, y.T, out=place) for x, y, place in zip(left, right, places, strict=True))
            yield rows, columns, g_a, g_d


def outer_block(M: int, L: int, shape: tuple[int, ...], p: int, q: int) -> int:
    """Return how many columns of d `outer_sums` should take at a time, or 0 where `tile_sums` costs less."""
    largest = max(*shape, 1)
    block = min(q, ROOM // (4 * max(largest * p, 1)))
    if block < min(q, 8):
        return 0
    calls = -(-q // max(block, 1)) * (sum(shape) + (M + L) / ROWS)
    outer = 2 * (M + L + shape[0] * shape[1]) * p * q + CALL * calls
    return block if outer < 2 * M * L * (p + q) else 0


def outer_sums(o: Factors, u: Factors, shape: tuple[int, ...], block: int, simd: str) -> Tensor:
    """Return <Σ_m a_m d_mᵀ, Σ_l a_l d_lᵀ> for every pair of segments in float64, computed `block` columns of d at a time."""
    total = torch.zeros(shape, dtype=torch.float64)
    members = [list(parts_of(side[2], n)) for side, n in zip((o, u), shape, strict=True)]
    p, q = o[0].shape[1], o[1].shape[1]
    buffers = [torch.empty(n, p, block) for n in shape]
    for first in range(0, q, block):
        width = min(block, q - first)
        sums = [buffer.view(-1)[: n * p * width].view(n, p, width).zero_() for buffer, n in zip(buffers, shape, strict=True)]
        for (a, d, _), parts, sum_ in zip((o, u), members, sums, strict=True):
            for segment, rows in parts:
                sum_[segment].addmm_(a[rows].float().T, d[rows, first : first + width].float())
        total += sums[0].flatten(1) @ sums[1].flatten(1).T
    return total


def tile_sums(o: Factors, u: Factors, shape: tuple[int, ...], block: int, simd: str) -> Tensor:
    """Return Σ (a_m·a_l)(d_m·d_l) for every pair of segments in float64, summed tile by tile of the Gram matrices."""
    total = torch.zeros(shape, dtype=torch.float64)
    for rows, columns, g_a, g_d in tiles(o[0], u[0], o[1], u[1]):
        by_row = torch.zeros(len(g_a), shape[1], dtype=torch.float64)
        extension().segment_dots(
            address(g_a), address(g_d), *g_a.shape, address(u[2][columns].contiguous()), address(by_row), shape[1],
            threads=torch.get_num_threads(), simd=simd,
        )  # fmt: skip
        total.index_add_(0, o[2][rows], by_row)
    return total


def parts_of(segments: Tensor, n: int) -> Iterator[tuple[int, slice | Tensor]]:
    """Yield (segment, its rows), at most ROWS rows at a time; the rows are slices if the segment ids are sorted."""
    in_order = bool((segments[1:] >= segments[:-1]).all())
    order = None if in_order else segments.argsort(stable=True)
    ends = torch.bincount(segments, minlength=n).cumsum(0).tolist()
    for segment, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        for part in row_blocks(end - begin, ROWS):
            rows = slice(begin + part.start, begin + part.stop)
            yield segment, rows if order is None else order[rows]
