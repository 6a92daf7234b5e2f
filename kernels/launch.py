"""Host code that the Triton forms share: checks of their arguments, and the products W h by cuBLAS, in chunks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # with Triton's names


def on_device_of(op: str, *tensors: Tensor | None) -> torch.cuda.device_of:
    """Return a context in which the tensors' GPU is the current device; a None among them is an absent argument.

    Raises ValueError when the tensors are not on one device, or not on a GPU while Triton compiles (it interprets kernels on
    the CPU when TRITON_INTERPRET=1 is set before it is imported).
    """
    present = [tensor for tensor in tensors if tensor is not None]
    devices = {tensor.device for tensor in present}
    if len(devices) != 1:
        raise ValueError(f"{op}: the tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
    if not (present[0].is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(f'{op}: impl="triton" needs tensors on a GPU, got {present[0].device}')
    return torch.cuda.device_of(present[0])


def require_logits(op: str, logits: Tensor) -> None:
    """Raise ValueError unless the logits are [T, V], of a supported dtype, with columns adjacent in memory."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{op}: logits must be [T, V] with V >= 1, got {list(logits.shape)}")
    if logits.dtype not in DTYPES:
        raise ValueError(f"{op}: logits must be float32, bfloat16 or float16, got {logits.dtype}")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"{op}: the columns of logits must be adjacent, got strides {logits.stride()}")


def require_readout(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    """Raise ValueError unless hidden, weight, bias and softcap form a readout: shapes that fit, one supported dtype."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not len(weight):
        raise ValueError(f"{op}: hidden must be [T, d], weight [V, d], got {list(hidden.shape)} and {list(weight.shape)}")
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        raise ValueError(f"{op}: hidden and weight must share float32, bfloat16 or float16, got {hidden.dtype}, {weight.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in DTYPES):
        raise ValueError(f"{op}: bias must be [V]=[{len(weight)}] in such a dtype, got {bias.dtype} {list(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be above 0, got {softcap}")


def factors(scale: float, softcap: float | None, temperature: float = 1.0) -> tuple[float | None, float | None]:
    """(factor, cap) such that softcap(scale x) / temperature = cap tanh(factor x), or factor x without a cap; None for a 1."""
    factor, cap = (scale / temperature, None) if softcap is None else (scale / softcap, softcap / temperature)
    return None if factor == 1 else factor, cap


def adjacent(x: Tensor) -> Tensor:
    """Return x, copied if its columns are not adjacent in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in float32, [n, k] by [k, m]; half-precision inputs are multiplied as they are and summed in float32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())


def products(hidden: Tensor, weight: Tensor, limit: int) -> Iterator[tuple[int, Tensor]]:
    """Yield hidden @ weight.T in chunks of the vocabulary: the chunk's first column and its float32 products [T, n].

    hidden [T, d], weight [V, d]. A chunk is valid until the next one: all share one buffer of `limit` bytes, or of 1024 columns
    where that is more.
    """
    T, V = len(hidden), len(weight)
    n = min(V, max(1024, limit // (4 * T) // 1024 * 1024))
    buffer = hidden.new_empty(T * n, dtype=torch.float32)
    for first in range(0, V, n):
        w = weight[first : first + n]
        z = buffer[: T * len(w)].view(T, len(w))
        if hidden.dtype == torch.float32:
            torch.mm(hidden, w.T, out=z)
        elif hidden.is_cuda:
            torch.mm(hidden, w.T, out_dtype=torch.float32, out=z)
        else:
            torch.mm(hidden.float(), w.float().T, out=z)
        yield first, z
