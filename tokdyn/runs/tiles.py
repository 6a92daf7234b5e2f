"""Tiles of a matrix that is being made, kept beside the run that it is for, so that a killed profile goes on with them.

runs/profile              the run, once it is whole
runs/.profile.tiles/      its tiles so far, in commits (manifest.py); gone when the run is written
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import manifest
from .folder import read_tensors

FILE = "tiles.safetensors"
EVERY = 5.0  # seconds of work that are written together


class KeptTiles:
    """Tiles by name: a kill loses those of the last `EVERY` seconds, and a matrix that is made quicker is never written.

    Raises:
        FileExistsError: another process writes tiles there. ValueError: what is there belongs to another matrix.
    """

    def __init__(self, run: Path, about: Mapping[str, Any], resume: bool) -> None:
        """Open the tiles of a run.

        Args:
            run: the folder of the run, there or not.
            about: what must be the same for tiles to belong together, plain JSON.
            resume: take what is there; otherwise it is removed.
        """
        self.folder, self.about = run.with_name(f".{run.name}.tiles"), dict(about)
        self._waiting, self._since = dict[str, Tensor](), time.monotonic()
        self._found = dict[str, Path]()
        if manifest.busy(self.folder):
            raise FileExistsError(f"another process makes {run}: let it end, or choose another place")
        if self.folder.exists() and not resume:
            self.remove()
        if self.folder.exists():
            manifest.Writer(self.folder, "0", self.about).close()  # says where it is another matrix's, sweeps what a kill left
            for commit in manifest.committed(self.folder):
                self._found |= dict.fromkeys(commit.key.split("; "), commit.files[FILE])

    def get(self, name: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows [m], columns [l] and entries [parts, m, l] of a tile that is there."""
        if name not in self._found:
            return None
        found = read_tensors(self._found[name])
        return found[f"{name} rows"], found[f"{name} columns"], found[f"{name} F"]

    def restore(self, name: str, out: Tensor) -> bool:
        """Put a tile that is there into a matrix [parts, M, L]; whether it was there."""
        if (found := self.get(name)) is None:
            return False
        rows, columns, F = found
        out[:, rows[:, None], columns] = F.to(out)
        return True

    def put(self, name: str, rows: Tensor, columns: Tensor, F: Tensor) -> None:
        """Keep a tile."""
        for what, x in (("rows", rows), ("columns", columns), ("F", F)):
            self._waiting[f"{name} {what}"] = x.detach().cpu().clone().contiguous()
        if time.monotonic() - self._since >= EVERY:
            self.write()

    def write(self) -> None:
        """Have all tiles on the disk."""
        from safetensors.torch import save_file

        self._since = time.monotonic()
        if self._waiting:
            tensors, self._waiting = self._waiting, {}
            names = [name.removesuffix(" F") for name in tensors if name.endswith(" F")]
            with manifest.Writer(self.folder, "0", self.about) as writer:
                made = writer.commit({FILE: lambda path: save_file(tensors, path)}, "; ".join(names))
            self._found |= dict.fromkeys(names, made.files[FILE])

    def remove(self) -> None:
        """Remove the folder: the matrix is whole."""
        self._waiting = {}
        shutil.rmtree(self.folder, ignore_errors=True)
