"""token_stats on the CPU in C++: one read of the logits, vectorised and threaded (csrc/cpu/token_stats_simd.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def token_stats(logits: Tensor, targets: Tensor, *, simd: str = "") -> tuple[Tensor, ...]:
    """Statistics of softmax(logits) at the targets, as reference.token_stats defines them.

    logits [T, V] on the CPU, float32 or bfloat16, any row stride, adjacent columns; targets [T] int64 -> (logsumexp, log_prob,
    entropy, collision, g_norm, rank, argmax, argmax_log_prob), each [T]; rank and argmax are int64, the others float32. A row
    with a NaN gives NaN, rank 0 and argmax -1 and leaves the other rows alone. Nothing flows back to the logits.

    `simd` names an instruction set of tokdyn._C.simd_levels(); empty takes the fastest. The result depends on it in the last
    bits, and not on the number of threads (torch.get_num_threads()).

    Raises ValueError for another dtype, device or layout and for a target outside [0, V), and RuntimeError when this
    installation has no extension. Cost: T·V logits read once, about 25 vector instructions for every 16 (AVX-512).
    """
    from tokdyn import _native

    extension, reason = _native.load()
    if extension is None:
        raise RuntimeError(f"the native kernels are missing: {reason}")
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits must be [T, V] and targets [T], got {list(logits.shape)} and {list(targets.shape)}")
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits must be float32 or bfloat16, got {logits.dtype}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if logits.device.type != "cpu" or targets.device.type != "cpu":
        raise ValueError(f"logits and targets must be on the CPU, got {logits.device} and {targets.device}")
    T, V = logits.shape
    if V > 1 and logits.stride(1) != 1:
        raise ValueError(f"the columns of logits must be adjacent, got strides {logits.stride()}")

    targets = targets.contiguous()
    outputs = [torch.empty(T, dtype=torch.int64 if name in (5, 6) else torch.float32) for name in range(8)]
    extension.token_stats(
        logits.data_ptr(),
        DTYPES[logits.dtype],
        T,
        V,
        logits.stride(0),
        targets.data_ptr(),
        [output.data_ptr() for output in outputs],
        threads=torch.get_num_threads(),
        simd=simd,
    )
    return tuple(outputs)
