"""linear_token_stats on the CPU: chunks of products from BLAS, folded by C++ into running statistics (csrc/README.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import (
    BUFFER,
    Readout,
    address,
    chunk,
    empty_stats,
    extension,
    in_order,
    products,
    require_ids,
    row_blocks,
    rows_at_once,
)

WIDTH = 1024  # from this many columns on MKL was seen to sum in the same order as in a chunk's product


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    simd: str = "",
) -> tuple[Tensor, ...]:
    """token_stats(softcap(scale (W h + b)) / temperature, targets) as reference.linear_token_stats defines it.

    hidden [T, d], weight [V, d], bias [V] in float32 or bfloat16 on the CPU, targets [T] int64 -> eight tensors [T] in the
    order of token_stats; rank and argmax are int64, the others float32. bfloat16 is widened, which is exact, and its products
    are summed in float32: logits are not rounded to 8 bits. A NaN affects only rows whose logits contain it. It has no
    derivative. It is torch.ops.tokdyn.linear_token_stats_cpp; `simd` as in token_stats.

    Counting the rank needs the target's logit z_y before the first chunk. It is computed first, as the product of the hidden
    states with the targets' rows of W, and column y of the chunks is skipped, so that log_prob, rank and argmax belong to one
    set of logits. Two tokens with equal rows of W tie exactly if the BLAS sums a product in the same order at every place of
    its result.

    Raises ValueError for shapes, dtypes, devices and constants that do not fit, RuntimeError without the extension.
    Cost: 2 T V d flops, and 2 T · 1024 d for z_y; at most 64 MiB beside the arguments up to d = 8192.
    """
    return in_order(*_linear_token_stats(hidden, weight, targets, bias, scale, softcap, temperature, simd))


@torch.library.custom_op(
    "tokdyn::linear_token_stats_cpp",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float scale, float? softcap, float temperature, "
    "str simd) -> (Tensor, Tensor)",
)
def _linear_token_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,
    scale: float, softcap: float | None, temperature: float, simd: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    real, whole = _empty(hidden, weight, targets, bias, scale, softcap, temperature, simd)
    readout = Readout.of("linear_token_stats", weight, bias, scale, softcap, temperature)
    T, V = len(hidden), len(weight)
    if T and (int(targets.min()) < 0 or int(targets.max()) >= V):
        raise ValueError(
            f"linear_token_stats: targets must lie in [0, V)=[0, {V}), got {int(targets.min())} to {int(targets.max())}"
        )
    _C, threads, outputs = extension(), torch.get_num_threads(), in_order(real, whole)
    for block in row_blocks(T, rows_at_once(hidden)):
        h, y = hidden[block].float(), targets[block].contiguous()
        columns = readout.columns(len(h))
        buffer = torch.empty(len(h) * min(columns, max(V, len(h), WIDTH)))
        z_y = target_logits(readout, h, y, columns, buffer, simd)
        rows = torch.empty(len(h) * _C.ROW_BYTES, dtype=torch.uint8)
        _C.clear_rows(address(rows), len(h))
        for first, w in readout.chunks(columns):
            z = chunk(products(h, w, buffer), first)
            _C.fold_chunk(z, readout.numbers, address(y), address(z_y), address(rows), threads=threads, simd=simd)
        _C.finish_token_stats(len(h), address(y), address(z_y), address(rows), [address(x[block]) for x in outputs])
    return real, whole


@_linear_token_stats.register_fake
def _empty(hidden, weight, targets, bias, scale, softcap, temperature, simd) -> tuple[Tensor, Tensor]:
    """Check the arguments, then return uninitialised results; also the op's fake for torch.compile."""
    op = "linear_token_stats"
    Readout.of(op, weight, bias, scale, softcap, temperature, hidden=hidden)
    require_ids(op, targets=targets)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"{op}: targets must have shape [T]=[{hidden.shape[0]}], got {list(targets.shape)}")
    return empty_stats(hidden)


def target_logits(readout: Readout, h: Tensor, y: Tensor, columns: int, buffer: Tensor, simd: str) -> Tensor:
    """Return z_y of every row, by a product with as many rows as the chunks' and at least WIDTH columns (same rounding)."""
    z_y = torch.empty(len(h))
    most = min(columns, max(64, BUFFER // max(h.shape[1], 1)))  # 32 MiB of gathered weights
    for part in row_blocks(len(h), most):
        ids = y[part].repeat(-(-WIDTH // (part.stop - part.start)))[: max(part.stop - part.start, min(WIDTH, most))]
        square = products(h, readout.weight[ids].float(), buffer)
        z_y[part] = square[part, : part.stop - part.start].diagonal()
    bias = None if readout.bias is None else readout.bias[y]
    extension().apply_readout(chunk(z_y[None], 0), readout._replace(bias=bias).numbers, simd=simd)
    return z_y
