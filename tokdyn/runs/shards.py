"""A matrix on disk in blocks of rows: each a commit of its own, so that what was interrupted can be read, and gone on with."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import manifest
from .folder import ABOUT, FORCES, TOKENS, as_json, read_table, read_tensors
from .schema import require_shape

NAME, DESCRIPTION = "matrix.safetensors", "description"
ROWS = re.compile(r"rows (\d{1,18}):(\d{1,18})")


class Shards:
    """A matrix [M, L] in a folder, written block by block and read in part.

    `shards[3:8]` reads these rows, `shards.tensor()` all of them. A folder whose writing was interrupted can be read as far as
    it got (`complete` is then False).

    Attributes:
        path: the folder.
        shape: (M, L).
        blocks: (first row, end, file), in order.
        about: what else the writer said of the matrix.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a folder that `create` made.

        Raises:
            FileNotFoundError: the folder holds no sharded matrix. ValueError: a file of it is damaged.
        """
        self.path = Path(path)
        about = manifest.about(self.path)
        if about is None or "shape" not in about:
            raise FileNotFoundError(f"{self.path} holds no sharded matrix: there is no manifest of one")
        self.about = about
        self.shape = require_shape(about["shape"], f"{self.path}: shape")
        self.blocks = self._blocks(manifest.committed(self.path))

    @classmethod
    def create(
        cls, path: str | Path, shape: tuple[int, int], about: Mapping[str, Any] | None = None, *, resume: bool = False
    ) -> Shards:
        """Make a new folder, without any rows yet; or, to resume, go on with one that was made for the same.

        Args:
            path: the folder.
            shape: (M, L).
            about: what must be the same for the rows to belong together, plain JSON.
            resume: go on with a folder that is there.

        Raises:
            FileExistsError: the path exists, and is not to be resumed. ValueError: it was begun with something else.
        """
        path = Path(path)
        if path.exists() and not (resume and manifest.manifests(path)):
            raise FileExistsError(f"{path} exists already: choose another place for the matrix")
        with manifest.Writer(path, "0", {"shape": list(shape)} | dict(about or {})):
            return cls(path)

    @property
    def rows(self) -> int:
        """How many rows have been written."""
        return self.blocks[-1][1] if self.blocks else 0

    @property
    def complete(self) -> bool:
        """Whether all M rows have been written."""
        return self.rows == self.shape[0]

    def append(self, rows: Tensor) -> None:
        """Write the next rows [n, L]; they are on the disk when this returns.

        Raises:
            ValueError: they are not [n, L], more than are missing, or not finite. FileExistsError: somebody else writes here.
        """
        from safetensors.torch import save_file

        start = self.rows
        stop = start + len(rows)
        if rows.dim() != 2 or rows.shape[1] != self.shape[1] or stop > self.shape[0]:
            raise ValueError(
                f"rows must be [n, {self.shape[1]}] with n at most {self.shape[0] - start}, got {list(rows.shape)}"
            )
        if not bool(rows.isfinite().all()):
            raise ValueError(f"rows {start}:{stop} of the matrix are not finite: they are not written")
        part = {"matrix": rows.detach().cpu().contiguous()}
        with manifest.Writer(self.path, "0", self.about) as writer:
            if self._blocks(writer.commits) != self.blocks:
                raise FileExistsError(f"another process has written to {self.path}: open it anew")
            made = writer.commit({NAME: lambda path: save_file(part, path)}, f"rows {start}:{stop}")
        self.blocks.append((start, stop, made.files[NAME].name))

    def describe(self, record: Mapping[str, Any], tokens: Any, tensors: Mapping[str, Tensor]) -> None:
        """Add what makes the matrix a result: run.json, the token table (pyarrow) and small tensors; see `read_description`."""
        import pyarrow.parquet as pq
        from safetensors.torch import save_file

        small = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with manifest.Writer(self.path, "0", self.about) as writer:
            if not writer.done(DESCRIPTION):
                files = {TOKENS: lambda path: pq.write_table(tokens, path), FORCES: lambda path: save_file(small, path)}
                writer.commit(files, DESCRIPTION)
            manifest.replace(self.path / ABOUT, as_json(record))

    def read_description(self) -> tuple[Any, dict[str, Tensor]]:
        """The token table (pyarrow) and the tensors that `describe` wrote.

        Raises:
            FileNotFoundError: the matrix was interrupted before; its rows can be read all the same.
        """
        found = [commit for commit in manifest.committed(self.path) if commit.key == DESCRIPTION]
        if not found:
            raise FileNotFoundError(
                f"{self.path} holds rows of a matrix that was interrupted: go on with resume=True, or read them as Shards"
            )
        if not {TOKENS, FORCES} <= found[0].files.keys():
            raise ValueError(f"{self.path} is damaged: what describes the matrix is not among its files")
        return read_table(found[0].files[TOKENS]), read_tensors(found[0].files[FORCES])

    def copy_to(self, path: str | Path) -> Shards:
        """The same matrix in another new folder, copied file by file.

        Raises:
            FileExistsError: the path exists.
        """
        new = Shards.create(path, self.shape, {name: value for name, value in self.about.items() if name != "shape"})
        with manifest.Writer(new.path, "0", new.about) as writer:
            for start, stop, name in self.blocks:
                source = self.path / name
                writer.commit({NAME: functools.partial(shutil.copyfile, source)}, f"rows {start}:{stop}")
        return Shards(path)

    def _blocks(self, commits: list[manifest.Commit]) -> list[tuple[int, int, str]]:
        """The blocks among a folder's commits, which must follow one another.

        Raises:
            ValueError: they do not.
        """
        found: list[tuple[int, int, str]] = []
        for commit in commits:
            if (rows := ROWS.fullmatch(commit.key)) and NAME in commit.files:
                start, stop = int(rows[1]), int(rows[2])
                if start != (found[-1][1] if found else 0) or not start < stop <= self.shape[0]:
                    raise ValueError(f"{self.path} is damaged: rows {start}:{stop} do not follow what is before them")
                found.append((start, stop, commit.files[NAME].name))
        return found

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        """Read rows, [n, L].

        Raises:
            ValueError: some of them have not been written, or step is not 1.
        """
        from safetensors import safe_open

        start, stop, step = rows.indices(self.shape[0])
        if step != 1 or stop > self.rows:
            raise ValueError(
                f"rows {start}:{stop}:{step} of {self.path}: {self.rows} of {self.shape[0]} rows are there, step is 1"
            )
        parts = []
        for a, z, name in self.blocks:
            if a < stop and z > start:
                with safe_open(self.path / name, "pt") as file:
                    parts.append(file.get_slice("matrix")[max(start, a) - a : min(stop, z) - a])
        return torch.cat(parts) if parts else torch.empty(0, self.shape[1])

    def tensor(self) -> Tensor:
        """The whole matrix."""
        return self[:]
