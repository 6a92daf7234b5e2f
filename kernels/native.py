"""What the C++ forms share: the extension, checks of arguments, and the products W h in chunks of the vocabulary.

The products come from torch's BLAS, in float32 and into one reused buffer; bfloat16 weights are widened chunk by chunk, which
is exact. A chunk is then in the cache when C++ turns it into logits, and no array over the whole vocabulary exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
ROWS = 1024  # hidden states that are multiplied with a chunk at a time
COLUMNS = 2048  # most tokens of a chunk
BUFFER = 8 << 20  # bytes of one buffer of products, or of widened weights


def extension() -> ModuleType:
    """Return tokdyn._C, or raise RuntimeError with the reason why this installation has none."""
    from .. import _native

    built, reason = _native.load()
    if built is None:
        raise RuntimeError(f"the native kernels are missing: {reason}")
    return built


def require_float(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor is float32 or bfloat16 on the CPU; None is an absent argument."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{op}: {name} must be float32 or bfloat16, got {tensor.dtype}")
        if tensor.device.type != "cpu":
            raise ValueError(f"{op}: {name} must be on the CPU, got {tensor.device}")


def require_ids(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless the token ids are int64 on the CPU."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64 or tensor.device.type != "cpu":
            raise ValueError(f"{op}: {name} must be int64 on the CPU, got {tensor.dtype} on {tensor.device}")


def require_adjacent(op: str, logits: Tensor) -> None:
    """Raise ValueError unless the columns of the logits are adjacent in memory."""
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"{op}: the columns of logits must be adjacent, got strides {logits.stride()}")


def empty_stats(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return uninitialised statistics of T rows: the six real ones [6, T], and rank and argmax [2, T]."""
    T = rows.shape[0]
    return rows.new_empty((6, T), dtype=torch.float32), rows.new_empty((2, T), dtype=torch.int64)


def in_order(real: Tensor, whole: Tensor) -> tuple[Tensor, ...]:
    """Return the eight statistics of `empty_stats` in the order of token_stats."""
    *first, argmax_log_prob = real.unbind()
    return *first, *whole.unbind(), argmax_log_prob


class Readout(NamedTuple):
    """z = softcap(scale (W h + bias)) / temperature, checked, in the form that the extension takes."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float
    temperature: float
    ids: Tensor | None = None  # restrict the vocabulary to these tokens

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
        """Build a readout, its bias in float32; raise ValueError unless it fits itself and the hidden states [rows, d]."""
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
        """Return the readout restricted to some tokens; their weights are gathered chunk by chunk."""
        return self._replace(ids=ids, bias=None if self.bias is None else self.bias[ids])

    @property
    def numbers(self) -> tuple[int, float, float, float]:
        """Address of the bias, scale, softcap and temperature, as the extension takes them."""
        return address(self.bias), self.scale, self.softcap, self.temperature

    def columns(self, rows: int) -> int:
        """Return the tokens per chunk for this many rows: its products, and its widened weights, must fit a buffer."""
        widths = [4 * max(rows, 1)] + ([4 * max(self.weight.shape[1], 1)] if self.weight.dtype != torch.float32 else [])
        return max(256, min(BUFFER // max(widths), COLUMNS))

    def chunks(self, columns: int) -> Iterator[tuple[int, Tensor]]:
        """Yield first token and float32 weights [n, d] of every chunk; a chunk is valid until the next one."""
        V, d = self.weight.shape if self.ids is None else (len(self.ids), self.weight.shape[1])
        wide = None if self.weight.dtype == torch.float32 else torch.empty(min(columns, V), d)
        for first in range(0, V, columns):
            some = slice(first, first + columns)
            chunk = self.weight[some] if self.ids is None else self.weight[self.ids[some]]
            yield first, chunk if wide is None else wide[: len(chunk)].copy_(chunk)


def address(tensor: Tensor | None) -> int:
    """Return the address of a tensor's data, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def products(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Return hidden @ weight.T, [rows, n] from [rows, d] and [n, d], written to the front of the buffer."""
    z = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
    return torch.mm(hidden, weight.T, out=z)


def chunk(z: Tensor, first: int) -> tuple[int, int, int, int, int]:
    """Describe products [rows, n] to the extension: address, rows, row stride, first column, number of columns."""
    return z.data_ptr(), z.shape[0], z.shape[1], first, z.shape[1]


def rows_at_once(hidden: Tensor) -> int:
    """Return how many rows make a block: ROWS, or fewer where their float32 copy would exceed 32 MiB."""
    return ROWS if hidden.dtype == torch.float32 else max(64, min(ROWS, 4 * BUFFER // (4 * max(hidden.shape[1], 1))))


def row_blocks(n: int, most: int) -> Iterator[slice]:
    """Yield slices of about equal length, at most `most`, that cover n rows."""
    blocks = -(-n // most)
    for i in range(blocks):
        yield slice(n * i // blocks, n * (i + 1) // blocks)
