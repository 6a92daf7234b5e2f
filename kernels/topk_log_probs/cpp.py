"""topk_log_probs and linear_topk_log_probs on the CPU in C++: one pass with a rising threshold (csrc/README.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import (
    DTYPES,
    Readout,
    address,
    chunk,
    extension,
    products,
    require_adjacent,
    require_float,
    row_blocks,
    rows_at_once,
)

CANDIDATES = 16 << 20  # most bytes of the candidates of all rows of a block


def topk_log_probs(logits: Tensor, k: int, *, simd: str = "") -> tuple[Tensor, Tensor]:
    """The k largest log-probabilities of every row, in descending order, and their tokens; equal logits by id.

    logits [T, V] on the CPU, float32 or bfloat16, any row stride, adjacent columns -> values [T, k] float32, ids [T, k] int64.
    A row with a NaN gives NaN, with the ids of NaN first, as torch.sort has them. It has no derivative. It is
    torch.ops.tokdyn.topk_log_probs_cpp; `simd` as in token_stats.

    Raises ValueError for another dtype, device, layout or k, RuntimeError without the extension. Cost: T·V logits read once.
    """
    return _topk_log_probs(logits, k, simd)


@torch.library.custom_op(
    "tokdyn::topk_log_probs_cpp", mutates_args=(), schema="(Tensor logits, int k, str simd) -> (Tensor, Tensor)"
)
def _topk_log_probs(logits: Tensor, k: int, simd: str) -> tuple[Tensor, Tensor]:
    values, ids = _empty(logits, k, simd)
    extension().topk_log_probs(
        address(logits), DTYPES[logits.dtype], *logits.shape, logits.stride(0), k, address(values), address(ids),
        threads=torch.get_num_threads(), simd=simd,
    )  # fmt: skip
    return values, ids


def linear_topk_log_probs(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    simd: str = "",
) -> tuple[Tensor, Tensor]:
    """topk_log_probs of softcap(scale (W h + b)); the [T, V] logits never exist as a whole.

    hidden [T, d], weight [V, d], bias [V] in float32 or bfloat16 on the CPU -> values [T, k], ids [T, k], from float32 logits.
    Raises as topk_log_probs. Cost: 2 T V d flops; a buffer of 8 MiB, another for bfloat16 weights, 24 bytes for each of up to
    16 MiB of candidates.
    """
    return _linear_topk_log_probs(hidden, weight, k, bias, scale, softcap, simd)


@torch.library.custom_op(
    "tokdyn::linear_topk_log_probs_cpp",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, int k, Tensor? bias, float scale, float? softcap, str simd) -> (Tensor, Tensor)",
)
def _linear_topk_log_probs(
    hidden: Tensor, weight: Tensor, k: int, bias: Tensor | None, scale: float, softcap: float | None, simd: str
) -> tuple[Tensor, Tensor]:
    values, ids = _empty_linear(hidden, weight, k, bias, scale, softcap, simd)
    readout = Readout.of("linear_topk_log_probs", weight, bias, scale, softcap)
    T, _C, threads = len(hidden), extension(), torch.get_num_threads()
    room = _C.topk_capacity(k) * _C.CANDIDATE_BYTES
    for block in row_blocks(T, max(1, min(rows_at_once(hidden), CANDIDATES // room))):
        h = hidden[block].float()
        columns = readout.columns(len(h))
        buffer = torch.empty(len(h) * min(columns, len(weight)))
        rows, candidates = (torch.empty(len(h) * size, dtype=torch.uint8) for size in (_C.TOPK_ROW_BYTES, room))
        _C.clear_topk(address(rows), len(h))
        for first, w in readout.chunks(columns):
            z = chunk(products(h, w, buffer), first)
            _C.topk_chunk(z, readout.numbers, k, address(rows), address(candidates), threads=threads, simd=simd)
        _C.finish_topk(
            len(h), k, address(rows), address(candidates), address(values[block]), address(ids[block]), threads=threads
        )
    return values, ids


@_topk_log_probs.register_fake
def _empty(logits, k, simd) -> tuple[Tensor, Tensor]:
    """Check the arguments, then return uninitialised results; also the op's fake for torch.compile."""
    op = "topk_log_probs"
    require_float(op, logits=logits)
    if logits.dim() != 2:
        raise ValueError(f"{op}: logits must be [T, V], got {list(logits.shape)}")
    require_adjacent(op, logits)
    return _k_of_every_row(op, logits, k, logits.shape[1])


@_linear_topk_log_probs.register_fake
def _empty_linear(hidden, weight, k, bias, scale, softcap, simd) -> tuple[Tensor, Tensor]:
    """Check the arguments, then return uninitialised results; also the op's fake for torch.compile."""
    op = "linear_topk_log_probs"
    Readout.of(op, weight, bias, scale, softcap, hidden=hidden)
    return _k_of_every_row(op, hidden, k, weight.shape[0])


def _k_of_every_row(op: str, rows: Tensor, k: int, V: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    if not 1 <= k <= V:
        raise ValueError(f"{op}: k must lie in [1, V]=[1, {V}], got {k}")
    T = rows.shape[0]
    return rows.new_empty((T, k), dtype=torch.float32), rows.new_empty((T, k), dtype=torch.int64)
