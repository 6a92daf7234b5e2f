"""Reused memory: fresh pages of a large array cost more than filling them, and leave holes behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor


class ScratchBuffer:
    """One allocation that arrays are carved from, again and again."""

    def __init__(self, device: torch.device) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)

    def arrays(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> Iterator[Tensor]:
        """Uninitialised arrays [rows, columns]; invalidates those of earlier calls."""
        sizes = [rows * columns * dtype.itemsize for rows, columns in shapes]
        starts = list(accumulate((-(-size // 64) * 64 for size in sizes), initial=0))
        if starts[-1] > len(self._bytes):
            device = self._bytes.device
            del self._bytes  # before the larger one is taken
            self._bytes = torch.empty(starts[-1], dtype=torch.uint8, device=device)
        for shape, start, size in zip(shapes, starts, sizes, strict=False):
            yield self._bytes[start : start + size].view(dtype).view(shape)
