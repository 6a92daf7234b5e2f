"""What the C++ forms share: the extension, and the products W h that it turns into logits, chunk by chunk.

The products come from the BLAS that torch ships, in float32 and into one buffer that is used again; half precision is widened
chunk by chunk, which is exact. So a chunk is in the cache when C++ reads it, and no array over the whole vocabulary exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
ROWS = 1024  # hidden states that meet a chunk of the vocabulary together
COLUMNS = 2048  # most tokens of a chunk
BUFFER = 8 << 20  # bytes of one buffer of products, or of widened weights


def extension() -> ModuleType:
    """tokdyn._C; RuntimeError with the reason when this installation has none."""
    from .. import _native

    built, reason = _native.load()
    if built is None:
        raise RuntimeError(f"the native kernels are missing: {reason}")
    return built


def require_float(op: str, **tensors: Tensor | None) -> None:
    """ValueError for a tensor that the C++ kernels do not take; None stands for an argument that is not there."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{op}: {name} must be float32 or bfloat16, got {tensor.dtype}")
        if tensor.device.type != "cpu":
            raise ValueError(f"{op}: {name} must be on the CPU, got {tensor.device}")


def require_ids(op: str, **tensors: Tensor) -> None:
    """ValueError for token ids that are not int64 on the CPU."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64 or tensor.device.type != "cpu":
            raise ValueError(f"{op}: {name} must be int64 on the CPU, got {tensor.dtype} on {tensor.device}")


def require_adjacent(op: str, logits: Tensor) -> None:
    """ValueError for logits whose columns do not stand side by side."""
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"{op}: the columns of logits must be adjacent, got strides {logits.stride()}")


def empty_stats(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the statistics of T rows: the six real ones [6, T], and rank and argmax [2, T]."""
    T = rows.shape[0]
    return rows.new_empty((6, T), dtype=torch.float32), rows.new_empty((2, T), dtype=torch.int64)


def in_order(real: Tensor, whole: Tensor) -> tuple[Tensor, ...]:
    """The eight statistics in the order of token_stats."""
    *first, argmax_log_prob = real.unbind()
    return *first, *whole.unbind(), argmax_log_prob


class Readout(NamedTuple):
    """z = softcap(scale (W h + bias)) / temperature: the argument of every function over chunks."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float
    temperature: float
    ids: Tensor | None = None  # the tokens that count as the vocabulary, where they are not all

    @classmethod
    def of(
        cls,
        op: str,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        temperature: float = 1.0,
        **hidden: Tensor,
    ) -> Readout:
        """The readout with its bias widened; ValueError for what cannot be one, or not of these hidden states [rows, d]."""
        require_float(op, weight=weight, bias=bias, **hidden)
        if weight.dim() != 2 or weight.shape[0] == 0:
            raise ValueError(f"{op}: weight must be [V, d] with V >= 1, got {list(weight.shape)}")
        for name, h in hidden.items():
            if h.dim() != 2 or h.shape[1] != weight.shape[1]:
                raise ValueError(f"{op}: {name} must be [rows, d] with d={weight.shape[1]} as weight has, got {list(h.shape)}")
        if bias is not None and tuple(bias.shape) != (len(weight),):
            raise ValueError(f"{op}: bias must have shape [V]=[{weight.shape[0]}], got {list(bias.shape)}")
        if softcap is not None and not softcap > 0:
            raise ValueError(f"{op}: softcap must be above 0, got {softcap}")
        if not temperature > 0:
            raise ValueError(f"{op}: temperature must be above 0, got {temperature}")
        wide = None if bias is None else bias.detach().float().contiguous()
        return cls(weight.detach(), wide, scale, softcap or 0.0, temperature)

    def at(self, ids: Tensor) -> Readout:
        """The readout of some tokens, which then count as the vocabulary; their weights are gathered chunk by chunk."""
        return self._replace(ids=ids, bias=None if self.bias is None else self.bias[ids])

    @property
    def numbers(self) -> tuple[int, float, float, float]:
        """As the extension takes it."""
        return address(self.bias), self.scale, self.softcap, self.temperature

    def columns(self, rows: int) -> int:
        """Tokens in a chunk for this many rows: the products, and the widened weights, fill a buffer each."""
        widths = [4 * max(rows, 1)] + ([4 * max(self.weight.shape[1], 1)] if self.weight.dtype != torch.float32 else [])
        return max(256, min(BUFFER // max(widths), COLUMNS))

    def chunks(self, columns: int) -> Iterator[tuple[int, Tensor]]:
        """First token and float32 weights [n, d] of every chunk; a chunk is gone when the next is made."""
        V, d = self.weight.shape if self.ids is None else (len(self.ids), self.weight.shape[1])
        wide = None if self.weight.dtype == torch.float32 else torch.empty(min(columns, V), d)
        for first in range(0, V, columns):
            some = slice(first, first + columns)
            chunk = self.weight[some] if self.ids is None else self.weight[self.ids[some]]
            yield first, chunk if wide is None else wide[: len(chunk)].copy_(chunk)


def address(tensor: Tensor | None) -> int:
    """Where a tensor's data stands; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def products(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Hidden [rows, d] times weight [n, d], transposed, at the front of the buffer -> [rows, n]."""
    z = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
    return torch.mm(hidden, weight.T, out=z)


def chunk(z: Tensor, first: int) -> tuple[int, int, int, int, int]:
    """Rows of products as the extension takes them: address, rows, row stride, first column, columns."""
    return z.data_ptr(), z.shape[0], z.shape[1], first, z.shape[1]


def rows_at_once(hidden: Tensor) -> int:
    """Rows of a block: ROWS, or fewer where their widened copy would pass 32 MiB."""
    return ROWS if hidden.dtype == torch.float32 else max(64, min(ROWS, 4 * BUFFER // (4 * max(hidden.shape[1], 1))))


def row_blocks(n: int, most: int) -> Iterator[slice]:
    """Slices of about equal length, at most `most`, that cover n rows."""
    blocks = -(-n // most)
    for i in range(blocks):
        yield slice(n * i // blocks, n * (i + 1) // blocks)
