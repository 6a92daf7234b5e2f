"""A matrix on disk in blocks of rows: safetensors files, and an index that names only those that are complete."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

INDEX = "index.json"


class Shards:
    """A matrix [M, L] in a folder, written block by block and read in part.

    `shards[3:8]` reads these rows, `shards.tensor()` all of them. The index is replaced after every
    block, so that a folder whose writing was interrupted can be read as far as it got (`complete` is then False).

    Attributes:
        path: the folder.
        shape: (M, L).
        blocks: (first row, end, file name), in order.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a folder that `create` made.

        Raises:
            FileNotFoundError: the folder holds no index.
        """
        self.path = Path(path)
        if not (self.path / INDEX).exists():
            raise FileNotFoundError(f"{self.path} holds no sharded matrix: {INDEX} is missing")
        about = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
        self.shape = (int(about["shape"][0]), int(about["shape"][1]))
        self.blocks = [(int(a), int(z), str(name)) for a, z, name in about["blocks"]]

    @classmethod
    def create(cls, path: str | Path, shape: tuple[int, int]) -> Shards:
        """Make a new folder, without any rows yet.

        Raises:
            FileExistsError: the path exists.
        """
        path = Path(path)
        if path.exists():
            raise FileExistsError(f"{path} exists already: choose another place for the matrix")
        path.mkdir(parents=True)
        _write_index(path, shape, [])
        return cls(path)

    @property
    def complete(self) -> bool:
        """Whether all M rows have been written."""
        return (self.blocks[-1][1] if self.blocks else 0) == self.shape[0]

    def append(self, rows: Tensor) -> None:
        """Write the next rows [n, L].

        Raises:
            ValueError: they are not [n, L], or more than are missing.
        """
        from safetensors.torch import save_file

        start = self.blocks[-1][1] if self.blocks else 0
        stop = start + len(rows)
        if rows.dim() != 2 or rows.shape[1] != self.shape[1] or stop > self.shape[0]:
            raise ValueError(
                f"rows must be [n, {self.shape[1]}] with n at most {self.shape[0] - start}, got {list(rows.shape)}"
            )
        name = f"rows-{start:07d}-{stop:07d}.safetensors"
        part = self.path / f".{name}"
        save_file({"matrix": rows.detach().cpu().contiguous()}, part, metadata={"rows": f"{start}:{stop}"})
        os.replace(part, self.path / name)
        self.blocks.append((start, stop, name))
        _write_index(self.path, self.shape, self.blocks)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        """Read rows, [n, L].

        Raises:
            ValueError: some of them have not been written, or step is not 1.
        """
        from safetensors import safe_open

        start, stop, step = rows.indices(self.shape[0])
        have = self.blocks[-1][1] if self.blocks else 0
        if step != 1 or stop > have:
            raise ValueError(f"rows {start}:{stop}:{step} of {self.path}: {have} of {self.shape[0]} rows are there, step is 1")
        parts = []
        for a, z, name in self.blocks:
            if a < stop and z > start:
                with safe_open(self.path / name, "pt") as file:
                    parts.append(file.get_slice("matrix")[max(start, a) - a : min(stop, z) - a])
        return torch.cat(parts) if parts else torch.empty(0, self.shape[1])

    def tensor(self) -> Tensor:
        """The whole matrix."""
        return self[:]


def _write_index(path: Path, shape: tuple[int, int], blocks: list[tuple[int, int, str]]) -> None:
    part = path / f".{INDEX}"
    part.write_text(json.dumps({"shape": shape, "blocks": blocks}), encoding="utf-8")
    os.replace(part, path / INDEX)
