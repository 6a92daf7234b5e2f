"""token_stats on the CPU in C++: one read of the logits, vectorised and threaded (csrc/cpu/token_stats_simd.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import DTYPES, address, empty_stats, extension, in_order, require_adjacent, require_float, require_ids


def token_stats(logits: Tensor, targets: Tensor, *, simd: str = "") -> tuple[Tensor, ...]:
    """Statistics of softmax(logits) at the targets, as reference.token_stats defines them.

    logits [T, V] on the CPU, float32 or bfloat16, any row stride, adjacent columns; targets [T] int64 -> (logsumexp, log_prob,
    entropy, collision, g_norm, rank, argmax, argmax_log_prob), each [T]; rank and argmax are int64, the others float32. A row
    with a NaN gives NaN, rank 0 and argmax -1; other rows are not affected. It has no derivative. It is
    torch.ops.tokdyn.token_stats_cpp, one node to torch.compile.

    `simd` names an instruction set of tokdyn._C.simd_levels(); empty takes the fastest. The result depends on it in its last
    bits, but not on the number of threads (torch.get_num_threads()).

    Raises ValueError for another dtype, device or layout and for a target outside [0, V), and RuntimeError when this
    installation has no extension. Cost: T·V logits read once, about 25 vector instructions for every 16 (AVX-512).
    """
    return in_order(*_token_stats(logits, targets, simd))


@torch.library.custom_op(
    "tokdyn::token_stats_cpp", mutates_args=(), schema="(Tensor logits, Tensor targets, str simd) -> (Tensor, Tensor)"
)
def _token_stats(logits: Tensor, targets: Tensor, simd: str) -> tuple[Tensor, Tensor]:
    real, whole = _empty(logits, targets, simd)
    targets, out = targets.contiguous(), [address(x) for x in in_order(real, whole)]
    extension().token_stats(
        address(logits), DTYPES[logits.dtype], *logits.shape, logits.stride(0), address(targets), out,
        threads=torch.get_num_threads(), simd=simd,
    )  # fmt: skip
    return real, whole


@_token_stats.register_fake
def _empty(logits: Tensor, targets: Tensor, simd: str) -> tuple[Tensor, Tensor]:
    """Check the arguments, then return uninitialised results; also the op's fake for torch.compile."""
    op = "token_stats"
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"{op}: logits must be [T, V] and targets [T], got {list(logits.shape)} and {list(targets.shape)}")
    require_float(op, logits=logits)
    require_ids(op, targets=targets)
    require_adjacent(op, logits)
    return empty_stats(logits)
