"""topk_log_probs on a GPU in CUDA C++: one read of the logits (csrc/cuda/topk_log_probs.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import cuda_extension, place, require_rows, rows

MAX_K = 32  # one for each lane of a warp


def topk_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest log-probabilities of every row, in descending order, and their tokens; equal logits by id.

    logits [T, V] on a CUDA device, float32 or bfloat16, any row stride, adjacent columns; k at most MAX_K -> values [T, k]
    float32, ids [T, k] int64. A row with a NaN gives NaN, with the ids of NaN first, as torch.sort has them. It
    has no derivative. It is torch.ops.tokdyn.topk_log_probs_cuda, one node to torch.compile.

    Raises ValueError for another dtype, device, layout or k, RuntimeError without the CUDA part or when the launch fails; it
    never waits for the device. Cost: T·V logits read once; for logits in random order a warp inserts about k ln(V / 8k) times.
    """
    return _topk_log_probs(logits, k)


@torch.library.custom_op("tokdyn::topk_log_probs_cuda", mutates_args=(), schema="(Tensor logits, int k) -> (Tensor, Tensor)")
def _topk_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    op, _C = "topk_log_probs", cuda_extension()
    require_rows(op, logits)
    if not 1 <= k <= min(logits.shape[1], MAX_K):
        raise ValueError(f'{op}: impl="cuda" takes k in [1, min(V, {MAX_K})]=[1, {min(logits.shape[1], MAX_K)}], got {k}')
    values, ids = _empty(logits, k)
    if len(logits):
        with torch.cuda.device(logits.device):
            _C.cuda_topk_log_probs(*rows(logits), k, values.data_ptr(), ids.data_ptr(), **place(logits))
    return values, ids


@_topk_log_probs.register_fake
def _empty(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    T = logits.shape[0]
    return logits.new_empty((T, k), dtype=torch.float32), logits.new_empty((T, k), dtype=torch.int64)
