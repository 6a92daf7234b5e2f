"""token_stats on a GPU in CUDA C++: one read of the logits, 16 bytes a load (csrc/cuda/token_stats.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import cuda_extension, place, require_rows, rows


def token_stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Statistics of softmax(logits) at the targets, as reference.token_stats defines them.

    logits [T, V] on a CUDA device, float32 or bfloat16, any row stride, adjacent columns; targets [T] int64 -> (logsumexp,
    log_prob, entropy, collision, g_norm, rank, argmax, argmax_log_prob), each [T]; rank and argmax are int64, the others
    float32. A row with a NaN, or a target outside [0, V), gives NaN, rank 0 and argmax -1; other rows are not affected.
    It has no derivative. It is torch.ops.tokdyn.token_stats_cuda, one node to torch.compile.

    Raises ValueError for another dtype, device or layout, RuntimeError without the CUDA part or when the launch fails; it never
    waits for the device. Cost: T·V logits read once, about 11 instructions for each bfloat16 on sm_90.
    """
    real, whole = _token_stats(logits, targets)
    *first, argmax_log_prob = real.unbind()
    return *first, *whole.unbind(), argmax_log_prob


@torch.library.custom_op(
    "tokdyn::token_stats_cuda", mutates_args=(), schema="(Tensor logits, Tensor targets) -> (Tensor, Tensor)"
)
def _token_stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The six real results [6, T] and rank and argmax [2, T]."""
    op, _C = "token_stats", cuda_extension()
    require_rows(op, logits)
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64 or targets.device != logits.device:
        raise ValueError(
            f"{op}: targets must be int64 [T]=[{len(logits)}] on {logits.device}, "
            f"got {targets.dtype} {list(targets.shape)} on {targets.device}"
        )
    real, whole = _empty(logits, targets)
    if len(logits):
        targets = targets.contiguous()
        *first, last = [row.data_ptr() for row in real]
        out = [*first, *(row.data_ptr() for row in whole), last]
        with torch.cuda.device(logits.device):
            _C.cuda_token_stats(*rows(logits), targets.data_ptr(), out, **place(logits))
    return real, whole


@_token_stats.register_fake
def _empty(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    T = logits.shape[0]
    return logits.new_empty((6, T), dtype=torch.float32), logits.new_empty((2, T), dtype=torch.int64)
