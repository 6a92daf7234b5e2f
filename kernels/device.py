"""What the CUDA C++ forms share: the extension's CUDA part, and checks and arguments of its row kernels."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .native import DTYPES, extension

MAX_V = 1 << 30  # columns are counted in 32 bits


def cuda_extension() -> ModuleType:
    """Return tokdyn._C, or raise RuntimeError with the reason why this installation has no CUDA part."""
    built = extension()
    if not hasattr(built, "cuda_token_stats"):
        raise RuntimeError(f"the CUDA kernels are {built.build()['cuda']}; install where nvcc is found (TOKDYN_CUDA=1 insists)")
    return built


def require_rows(op: str, logits: Tensor) -> None:
    """Raise ValueError unless the logits are [T, V], of a supported dtype, on a CUDA device, with adjacent columns."""
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_V:
        raise ValueError(f"{op}: logits must be [T, V] with V in [1, 2^30], got {list(logits.shape)}")
    if logits.dtype not in DTYPES:
        raise ValueError(f"{op}: logits must be float32 or bfloat16, got {logits.dtype}")
    if not logits.is_cuda:
        raise ValueError(f'{op}: impl="cuda" needs logits on a CUDA device, got {logits.device}')
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"{op}: the columns of logits must be adjacent, got strides {logits.stride()}")


def rows(logits: Tensor) -> tuple[int, str, int, int, int]:
    """Describe logits to the extension: address, dtype, T, V, row stride."""
    return logits.data_ptr(), DTYPES[logits.dtype], *logits.shape, logits.stride(0)


def place(logits: Tensor) -> dict[str, int]:
    """Return the tensor's device and torch's current stream there, on which the extension launches."""
    return dict(device=logits.get_device(), stream=torch.cuda.current_stream(logits.device).cuda_stream)
