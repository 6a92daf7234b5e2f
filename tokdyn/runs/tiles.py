"""Tiles of a matrix that is being made, kept beside the run that it is for, so that a killed profile goes on with them.

runs/profile              the run, once it is whole
runs/.profile.tiles/      its tiles so far, in commits (manifest.py); gone when the run is written

The processes of a job (job.py) make tiles of one matrix, each the next that nobody has taken; the first one reads them all.
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
from .job import Queue

FILE = "tiles.safetensors"
EVERY = 5.0  # seconds of work that are written together
POLL = 0.1  # seconds between two looks at what others have made


class KeptTiles:
    """Tiles by name: a kill loses those of the last `EVERY` seconds, and a matrix that is made quicker is never written.

    Raises:
        FileExistsError: another process writes tiles there. ValueError: what is there belongs to another matrix.
    """

    def __init__(self, run: Path, about: Mapping[str, Any], resume: bool, job: Queue | None = None) -> None:
        """Open the tiles of a run.

        Args:
            run: the folder of the run, there or not.
            about: what must be the same for tiles to belong together, plain JSON.
            resume: take what is there; otherwise it is removed.
            job: of the processes that make them together, all with the same memory, so that their tiles are the same.
        """
        self.folder, self.about = run.with_name(f".{run.name}.tiles"), dict(about)
        self._waiting, self._since = dict[str, Tensor](), time.monotonic()
        self._found, self.job, self._others = dict[str, Path](), job, set[str]()
        if job is None:
            self._open(run, resume)
        else:
            job.first_says(lambda: self._open(run, resume))
        self._read()

    def _open(self, run: Path, resume: bool) -> None:
        """Look whether tiles can be written and taken here; raises as above."""
        if manifest.busy(self.folder):
            raise FileExistsError(f"another process makes {run}: let it end, or choose another place")
        if self.folder.exists() and not resume:
            self.remove()
        if self.folder.exists():
            manifest.Writer(self.folder, "0", self.about).close()  # says where it is another matrix's, sweeps what a kill left

    def _read(self) -> None:
        """What is on the disk by now, of every process."""
        for commit in manifest.committed(self.folder) if self.folder.exists() else ():
            self._found |= dict.fromkeys(commit.key.split("; "), commit.files[FILE])

    def get(self, name: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows [m], columns [l] and entries [parts, m, l] of a tile that is there."""
        if name not in self._found:
            return None
        found = read_tensors(self._found[name])
        return found[f"{name} rows"], found[f"{name} columns"], found[f"{name} F"]

    def restore(self, name: str, out: Tensor) -> bool:
        """Put a tile that is there into a matrix [parts, M, L]; whether it need not be made here.

        Of a job a process other than the first needs no tile but its own; the first one leaves out what others make (`wait`).
        """
        if self.job is not None and self.job.rank:
            return name in self._found or not self.job.claims(name)
        if name not in self._found and self.job is not None and not self.job.claims(name):
            self._read()
            if name not in self._found:
                self._others.add(name)
                return True
        if (found := self.get(name)) is None:
            return False
        rows, columns, F = found
        out[:, rows[:, None], columns] = F.to(out)
        return True

    def put(self, name: str, rows: Tensor, columns: Tensor, F: Tensor) -> None:
        """Keep a tile."""
        for what, x in (("rows", rows), ("columns", columns), ("F", F)):
            self._waiting[f"{name} {what}"] = x.detach().cpu().clone().contiguous()
        if self.job is not None or time.monotonic() - self._since >= EVERY:
            self.write()

    def wait(self) -> bool:
        """Wait for the tiles that were left to other processes; whether there were any, so that the matrix lacks them still.

        Those of a process that died are taken over: made here when the matrix is gone through again.
        """
        left, self._others = self._others, set()
        while left:
            self._read()
            missing = left - self._found.keys()
            if not missing or any(self.job is not None and self.job.claims(name) for name in missing):
                return True
            time.sleep(POLL)
        return False

    def write(self) -> None:
        """Have all tiles on the disk."""
        from safetensors.torch import save_file

        self._since = time.monotonic()
        if self._waiting:
            tensors, self._waiting = self._waiting, {}
            names = [name.removesuffix(" F") for name in tensors if name.endswith(" F")]
            own = "0" if self.job is None else self.job.name
            with manifest.Writer(self.folder, own, self.about) as writer:
                made = writer.commit({FILE: lambda path: save_file(tensors, path)}, "; ".join(names))
            self._found |= dict.fromkeys(names, made.files[FILE])

    def remove(self) -> None:
        """Remove the folder: the matrix is whole."""
        self._waiting = {}
        shutil.rmtree(self.folder, ignore_errors=True)
