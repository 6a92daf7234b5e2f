"""readout_forces on the CPU: chunks of products by BLAS, turned into exponentials or forces by C++ (csrc/README.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..native import Readout, address, chunk, extension, products, require_ids, row_blocks, rows_at_once

TILE = 4096  # with reduce: most rows of either side in a tile of the matrix
SIDE = 8192  # most rows of either side at a time; fewer where their float32 copy would exceed ROOM
ROOM = 64 << 20  # most bytes of both sides' products


def readout_forces(
    h_o: Tensor,
    y_o: Tensor,
    h_u: Tensor,
    targets_u: Tensor,
    c: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    v: Tensor | None = None,
    uniform: Tensor | None = None,
    train_bias: bool = False,
    reduce: str | None = None,
    simd: str = "",
) -> Tensor:
    """F[m, l] = (h_m·h_l [+ 1]) <g_m, γ_l> as reference.readout_forces defines it, streaming over the vocabulary.

    h_o [M, d], y_o [M], h_u [L, d], targets_u and c [L] or [L, K], weight [V, d], bias [V], v and uniform [L] ->
    float32 [M, L]; reduce="update" sums over l -> [M]; reduce="observe" over m -> [L]. Hidden states, weight and bias are
    float32 or bfloat16 on the CPU, ids int64; c, v and uniform are taken in float32. bfloat16 is widened, which is exact, and
    every product is summed in float32. It has no derivative. It is torch.ops.tokdyn.readout_forces_cpp; `simd` as in
    token_stats.

    Raises ValueError for shapes, dtypes, devices and constants that do not fit, RuntimeError without the extension.

    Cost: 2 (M + L) V d + 2 M L V flops, and 2 L V d more with v, or with uniform under a softcap, whose forces need the
    row's softmax beforehand. Memory: the result, and up to 128 MiB. With reduce, the cheaper of: tiles of up to 4096² of
    that matrix, each summed and dropped, or one side's summed gradient of W in chunks of the vocabulary, 6 (M + L) V d flops.
    """
    return _readout_forces(h_o, y_o, h_u, targets_u, c, weight, bias, scale, softcap, v, uniform, train_bias, reduce, simd)


@torch.library.custom_op(
    "tokdyn::readout_forces_cpp",
    mutates_args=(),
    schema="(Tensor h_o, Tensor y_o, Tensor h_u, Tensor targets_u, Tensor c, Tensor weight, Tensor? bias, float scale, "
    "float? softcap, Tensor? v, Tensor? uniform, bool train_bias, str? reduce, str simd) -> Tensor",
)
def _readout_forces(
    h_o: Tensor, y_o: Tensor, h_u: Tensor, targets_u: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, scale: float,
    softcap: float | None, v: Tensor | None, uniform: Tensor | None, train_bias: bool, reduce: str | None, simd: str,
) -> Tensor:  # fmt: skip
    _empty(h_o, y_o, h_u, targets_u, c, weight, bias, scale, softcap, v, uniform, train_bias, reduce, simd)
    readout = Readout.of("readout_forces", weight, bias, scale, softcap)
    for name, ids in (("y_o", y_o), ("targets_u", targets_u)):
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= len(weight)):
            raise ValueError(
                f"readout_forces: {name} must lie in [0, V)=[0, {len(weight)}), got {int(ids.min())} to {int(ids.max())}"
            )
    o = Side.of(h_o, y_o, torch.ones(len(y_o)), None, None)
    u = Side.of(h_u, targets_u, c, v, uniform)
    stream = Stream(readout, train_bias, simd)
    M, L, d = len(h_o), len(h_u), weight.shape[1]
    side = SIDE if h_o.dtype == h_u.dtype == torch.float32 else max(1, min(SIDE, ROOM // (4 * max(d, 1))))
    if reduce is None:
        out = torch.empty(M, L)
        for rows in row_blocks(M, side):
            for columns in row_blocks(L, side):
                stream.gram(o.rows(rows), u.rows(columns), out[rows, columns])
        return out
    most = min(side, TILE)
    if through_weight(M, L, d, most, stream.must_know(u)):
        return stream.through_weight(u, o) if reduce == "update" else stream.through_weight(o, u)
    total = torch.zeros(M if reduce == "update" else L)
    for rows in row_blocks(M, most):
        for columns in row_blocks(L, most):
            tile = torch.empty(rows.stop - rows.start, columns.stop - columns.start)
            stream.gram(o.rows(rows), u.rows(columns), tile)
            total[rows if reduce == "update" else columns] += tile.sum(1 if reduce == "update" else 0)
    return total


def through_weight(M: int, L: int, d: int, most: int = TILE, known: bool = False) -> bool:
    """Whether a reduction multiplies less by way of D [V, d] than by tiles of `most` rows; V is a factor of both.

    known: tiles need the statistics of the update's softmax first (`Stream.must_know`).
    """
    tiles_o, tiles_u = -(-M // most), -(-L // most)
    return 2 * (d * (M * tiles_u + L * tiles_o * (2 if known else 1)) + M * L) > 6 * (M + L) * d


@_readout_forces.register_fake
def _empty(h_o, y_o, h_u, targets_u, c, weight, bias, scale, softcap, v, uniform, train_bias, reduce, simd) -> Tensor:
    """Check the arguments, then return uninitialised results; also the op's fake for torch.compile."""
    op = "readout_forces"
    Readout.of(op, weight, bias, scale, softcap, h_o=h_o, h_u=h_u)
    require_ids(op, y_o=y_o, targets_u=targets_u)
    M, L = h_o.shape[0], h_u.shape[0]
    if targets_u.dim() not in (1, 2) or targets_u.shape[0] != L or c.shape != targets_u.shape:
        raise ValueError(
            f"{op}: targets_u and c must have the shape [L] or [L, K] with L={L}, "
            f"got {list(targets_u.shape)} and {list(c.shape)}"
        )
    for name, x, n in (("y_o", y_o, M), ("v", v, L), ("uniform", uniform, L)):
        if x is not None and tuple(x.shape) != (n,):
            raise ValueError(f"{op}: {name} must have shape [{n}], got {list(x.shape)}")
    if reduce not in (None, "update", "observe"):
        raise ValueError(f'{op}: reduce must be None, "update" or "observe", got {reduce!r}')
    return h_o.new_empty({None: (M, L), "update": (M,), "observe": (L,)}[reduce], dtype=torch.float32)


@dataclass(frozen=True)
class Side:
    """Hidden states h [n, d] of one side and its GTerm: targets and c [n, K], v and u [n], None for zeros."""

    h: Tensor
    targets: Tensor
    c: Tensor
    v: Tensor | None
    u: Tensor | None

    @classmethod
    def of(cls, h: Tensor, targets: Tensor, c: Tensor, v: Tensor | None, u: Tensor | None) -> Side:
        """Build a side with contiguous float32 terms; v or u that is all zero becomes None."""
        v, u = (None if x is None or not x.any() else x.detach().float().contiguous() for x in (v, u))
        shape = (len(h), -1) if targets.numel() else (len(h), 1 if targets.dim() == 1 else targets.shape[1])
        return cls(h.detach(), targets.reshape(shape).contiguous(), c.detach().float().reshape(shape).contiguous(), v, u)

    def rows(self, part: slice) -> Side:
        """Return some rows of this side."""
        v, u = (None if x is None else x[part] for x in (self.v, self.u))
        return Side(self.h[part], self.targets[part], self.c[part], v, u)


class Stream:
    """One call of readout_forces: a readout, and the passes over its vocabulary in chunks."""

    def __init__(self, readout: Readout, train_bias: bool, simd: str):
        self.readout, self.train_bias, self.simd = readout, train_bias, simd
        self.C, self.V, self.threads = extension(), len(readout.weight), torch.get_num_threads()

    def must_know(self, side: Side) -> bool:
        """Whether Γ off the targets needs the normalised softmax, so that a pass for the statistics must come first."""
        return side.v is not None or (side.u is not None and self.readout.softcap > 0)

    def columns(self, rows: int) -> int:
        """Return how many tokens make a chunk when both sides together have this many rows."""
        return max(256, min(ROOM // (4 * max(rows, 1)), self.readout.columns(1)))

    def gram(self, o: Side, u: Side, out: Tensor) -> None:
        """Write the matrix of two sides into out [M, L]; csrc/README.md derives what is accumulated."""
        M, L, known = len(o.h), len(u.h), self.must_know(u)
        out.zero_()
        if not (M and L):
            return
        columns, h_o, h_u = self.columns(M + L), o.h.float(), u.h.float()
        z_o, z_u = (torch.empty(n * min(columns, self.V)) for n in (M, L))
        rest_u = self.statistics(u, columns, z_u) if known else self.fresh(L)
        rest_o, raise_o, raise_u = self.fresh(M), torch.ones(M), torch.ones(L)
        targets = torch.cat([o.targets.flatten(), u.targets.flatten()]).unique()
        for first, w in self.readout.chunks(columns):
            a, b = products(h_o, w, z_o), products(h_u, w, z_u)
            raised = self.exponentials(a, first, rest_o, raise_o, targets)
            if known:
                self.forces(b, first, u, rest_u)
            else:
                raised |= self.exponentials(b, first, rest_u, raise_u, targets[:0])
            if raised:
                self.rescale(out, raise_o, raise_u)
            out.addmm_(a, b.T)
        by_column = torch.full((L,), -1.0)
        if not known:
            by_column = self.normalisers(rest_u) * (u.c.sum(1) + (0 if u.u is None else u.u))
        self.rescale(out, self.normalisers(rest_o), by_column)

        # the columns of the targets, which the loop above left out, with normalised forces
        some = self.readout.at(targets)
        uniform = 1 / self.V if known else 0.0
        at_o, at_u = (torch.searchsorted(targets, side.targets) for side in (o, u))
        for first, w in some.chunks(columns):
            a, b = products(h_o, w, z_o), products(h_u, w, z_u)
            self.forces(a, first, o, rest_o, some, at_o)
            self.forces(b, first, u, rest_u, some, at_u, uniform)
            out.addmm_(a, b.T)
        for part in row_blocks(M, 1024):
            out[part] *= (h_o[part] @ h_u.T + float(self.train_bias)) * self.readout.scale**2

    def through_weight(self, source: Side, sink: Side) -> Tensor:
        """Sum the matrix over the source side -> [sink]: D = Σ_s γ_s h_sᵀ in chunks of its rows, then γ_t · D h_t."""
        most = min(rows_at_once(source.h), rows_at_once(sink.h))
        columns = self.columns(2 * most)
        buffer, moved = torch.empty(most * columns), torch.empty(most * columns)
        blocks = [[side.rows(part) for part in row_blocks(len(side.h), most)] for side in (source, sink)]
        statistics = [[self.statistics(block, columns, buffer) for block in side] for side in blocks]
        total = [torch.zeros(len(block.h), dtype=torch.float64) for block in blocks[1]]
        direction = torch.empty(columns, source.h.shape[1])
        for first, w in self.readout.chunks(columns):
            D, D_bias = direction[: len(w)].zero_(), torch.zeros(len(w))
            for block, rest in zip(blocks[0], statistics[0], strict=True):
                h = block.h.float()
                force = self.forces(products(h, w, buffer), first, block, rest)
                D.addmm_(force.T, h)
                if self.train_bias:
                    D_bias += force.sum(0)
            for block, rest, sum_ in zip(blocks[1], statistics[1], total, strict=True):
                h = block.h.float()
                force, velocity = self.forces(products(h, w, buffer), first, block, rest), products(h, D, moved)
                if self.train_bias:
                    velocity += D_bias
                self.C.add_row_dots(
                    address(force), address(velocity), *force.shape, address(sum_), threads=self.threads, simd=self.simd
                )
        return (torch.cat(total) * self.readout.scale**2).float() if total else torch.zeros(0)

    def fresh(self, n: int) -> Tensor:
        """Return the running statistics of n rows before the first token."""
        rest = torch.empty(n, self.C.ROW_BYTES, dtype=torch.uint8)
        self.C.clear_rows(address(rest), n)
        return rest

    def statistics(self, side: Side, columns: int, buffer: Tensor) -> Tensor:
        """Make a pass over the vocabulary and return every row's softmax statistics."""
        rest, h = self.fresh(len(side.h)), side.h.float()
        for first, w in self.readout.chunks(columns):
            z = chunk(products(h, w, buffer), first)
            self.C.fold_chunk(z, self.readout.numbers, 0, 0, address(rest), threads=self.threads, simd=self.simd)
        return rest

    def exponentials(self, z: Tensor, first: int, rest: Tensor, factor: Tensor, dropped: Tensor) -> bool:
        """Turn products into e^(z - max) in place; True if a maximum rose: earlier sums must then be multiplied by `factor`."""
        return self.C.exponentials(
            chunk(z, first), self.readout.numbers, address(rest), address(factor), address(dropped), len(dropped),
            threads=self.threads, simd=self.simd,
        )  # fmt: skip

    def forces(
        self,
        z: Tensor,
        first: int,
        side: Side,
        rest: Tensor,
        readout: Readout | None = None,
        at: Tensor | None = None,
        uniform: float | None = None,
    ) -> Tensor:
        """Turn products into γ (Γ times the softcap's slope) in place.

        Args:
            z, first: the products and their first column.
            side, rest: the rows' GTerm and softmax statistics.
            readout, at: a restricted vocabulary, and the targets' columns in it [n, K], if z does not cover the whole one.
            uniform: probability of a token under the uniform target, if not 1/V.
        """
        places, share = side.targets if at is None else at, 1 / self.V if uniform is None else uniform
        self.C.forces(
            chunk(z, first), (readout or self.readout).numbers,
            (address(side.targets), address(places), places.shape[1], *map(address, (side.c, side.v, side.u)), share),
            address(rest), threads=self.threads, simd=self.simd,
        )  # fmt: skip
        return z

    def normalisers(self, rest: Tensor) -> Tensor:
        """Return 1 / Σ e^(z - max) of every row."""
        out = torch.empty(len(rest))
        self.C.normalisers(address(rest), len(rest), address(out))
        return out

    def rescale(self, matrix: Tensor, by_row: Tensor, by_column: Tensor) -> None:
        """Multiply matrix[m, l] by by_row[m] by_column[l], in place."""
        self.C.rescale(
            address(matrix), *matrix.shape, matrix.stride(0), address(by_row), address(by_column),
            threads=self.threads, simd=self.simd,
        )  # fmt: skip
