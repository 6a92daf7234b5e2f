"""Where a force matrix goes: a tensor, or a folder in blocks of rows as they are done; and where its parts do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runs.shards import Shards
from .engines import choose
from .problem import Coverage, Problem
from .progress import Progress, share

PARTS = "parts"  # entry of a folder's record: name of a part -> its folder inside


class Destination:
    """A matrix to be filled: a tensor of the caller's or of our own, or a folder, new or to be gone on with.

    Attributes:
        matrix, shards: F [M, L] or [M, G], one of the two; None for the other.
        parts: name -> its share of F, a tensor or on disk; None where the problem is not divided.

    Raises:
        ValueError: the caller's tensor has another shape, or the folder was begun with something else.
        FileExistsError: the folder exists, and is not to be gone on with.
    """

    def __init__(
        self, problem: Problem, labels: Tensor | None, out: Tensor | str | Path | None, same: dict[str, str], resume: bool
    ) -> None:
        self.problem, self.labels = problem, labels
        self.shape = (problem.shape[0], problem.shape[1] if labels is None else int(labels.max()) + 1)
        self.names = () if problem.parts is None else problem.parts.names
        self.parts: dict[str, Tensor | Shards] | None = None
        self.shards: Shards | None = None
        if isinstance(out, (str, Path)):
            inside = {name: f"part-{n:03d}" for n, name in enumerate(self.names)}
            about: dict[str, Any] = {**same, PARTS: inside} if inside else {**same}
            self.shards = Shards.create(out, self.shape, about, resume=resume)
            if inside:
                self.parts = {name: Shards.create(Path(out) / at, self.shape, resume=resume) for name, at in inside.items()}
        if isinstance(out, Tensor) and out.shape != self.shape:
            names = f"[M, {'L' if labels is None else 'G'}]"
            raise ValueError(f"out must have shape {names}={self.shape}, got {list(out.shape)}")
        self.matrix = None if self.shards is not None else out if isinstance(out, Tensor) else self._empty(self.shape[0])

    def _empty(self, *rows: int) -> Tensor:
        """Rows of the matrix, NaN where nothing has been computed."""
        tracer = self.problem.tracer
        return torch.full((*rows, self.shape[1]), torch.nan, dtype=tracer.precision, device=tracer.device)

    def fill(self, method: str, memory: int, progress: Progress | None) -> Coverage:
        """Fill the tensor or the shards; returns the coverage.

        Raises:
            ValueError: the parts do not fit into `memory` bytes.
        """
        if self.matrix is None:
            return self._fill_shards(method, memory, progress)
        fill = choose(self.problem, method, self.labels)
        if not self.names:
            return fill(self.problem, self.matrix, memory=memory, progress=progress)
        size = len(self.names) * self.matrix.nbytes
        if size > memory:
            raise ValueError(
                f"{len(self.names)} parts of a matrix {list(self.shape)} take {size / 2**20:.0f} MiB, more than memory allows: "
                "raise memory=, give out= a folder, to which they go in blocks of rows, or divide into fewer parts"
            )
        F = self._empty(len(self.names), self.shape[0])
        coverage = fill(self.problem, F, memory=memory, progress=progress)
        self.matrix.copy_(F.sum(0))
        self.parts = dict(zip(self.names, F, strict=True))
        return coverage

    def _fill_shards(self, method: str, memory: int, progress: Progress | None) -> Coverage:
        assert self.shards is not None
        coverage, first, M = Coverage(), 0, self.shape[0]
        parts = [part for part in (self.parts or {}).values() if isinstance(part, Shards)]
        width = self.shape[1] * self.problem.tracer.precision.itemsize * (1 + len(parts))
        for part in self.problem.row_blocks(max(1, memory // 4 // width)):
            n, done = part.shape[0], self.shards.rows - first  # rows of the part that an interrupted call has made
            if done < n or first + n == M and not coverage:  # the last part again where all is there: for the rules it goes by
                block = self._empty(len(parts), n) if parts else self._empty(n)
                fill = choose(part, method, self.labels)
                coverage |= fill(part, block, memory=memory, progress=share(progress, first, n, M))
            if done < n:
                for shards, rows in zip(parts, block, strict=False):
                    _append(shards, rows, first)
                _append(self.shards, block.sum(0) if parts else block, first)
            first += n
        return coverage


def _append(shards: Shards, rows: Tensor, first: int) -> None:
    """Write those of the rows from `first` on that are not there yet."""
    missing = rows[max(0, shards.rows - first) :]
    if len(missing):
        shards.append(missing)
