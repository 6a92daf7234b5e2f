"""The folder that the records of a monitored training go to.

It holds run.json and, for every rank, parquet files that are each whole or absent:

    tokens-00000-000001.parquet   one row per scored token of the update
    probe-00000-000001.parquet    one row per probe token and probe step
    steps-00000-000001.parquet    one row per recorded step with its sums
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runs.folder import ABOUT, FORMAT, PAGE, finite, kind_of
from .heartbeat import ALIVE
from .steps import Step


class Folder:
    """The folder of a monitored training; every file is written beside its place and then moved there.

    run.json says in `written` when records were last written: a training that still runs writes again.

    Raises:
        FileExistsError: see `check_free`.
    """

    def __init__(self, path: Path, rank: int, about: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path, self.rank, self.shards = path, rank, 0
        self.waiting: list[Step] = []
        self.about = {"format": FORMAT, "kind": "training", "status": "running"} | dict(about)
        if rank == 0:
            check_free(path, overwrite)
            for file in _records(path):
                file.unlink()
        path.mkdir(parents=True, exist_ok=True)
        self._write_about()

    def add(self, step: Step, every: int = 20) -> None:
        """Keep a step; every so many, write them out."""
        self.waiting.append(step)
        if len(self.waiting) >= every:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self.waiting:
            return
        self.shards += 1
        tables = {
            "tokens": [s.tokens for s in self.waiting],
            "probe": [s.observed for s in self.waiting if s.observed is not None],
        }
        tables["steps"] = [pa.Table.from_pylist([self._row(s)]) for s in self.waiting]
        for name, parts in tables.items():
            if parts:
                path = self.path / f"{name}-{self.rank:05d}-{self.shards:06d}.parquet"
                part = path.with_name(f".{path.name}")
                pq.write_table(pa.concat_tables(parts, promote_options="permissive"), part)
                os.replace(part, path)
        for step in self.waiting:
            step._tokens = self.path / f"tokens-{self.rank:05d}-{self.shards:06d}.parquet"
        self.waiting = []
        self._write_about()

    def _row(self, s: Step) -> dict[str, Any]:
        about = dict(step=s.step, rank=self.rank, passes=s.passes, excluded=s.excluded, routes=" ".join(s.routes))
        probe = dict(linearity=s.linearity, carried=s.carried, accounted=s.accounted)
        return about | s.metrics | probe | {f"sum_{name}": value for name, value in s.sums.items()}

    def close(self, status: str, **about: Any) -> None:
        """Write the rest, and how the training ended."""
        self.flush()
        self.about |= {"status": status} | about
        self._write_about()

    def _write_about(self) -> None:
        if self.rank == 0:
            self.about["written"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            part = self.path / f".{ABOUT}"
            part.write_text(json.dumps(finite(self.about), indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
            os.replace(part, self.path / ABOUT)


def check_free(path: Path, overwrite: bool = False) -> None:
    """Raise unless a training's records can be written to a path.

    Raises:
        FileExistsError: it is taken: by an earlier training where overwrite is False, or by anything else.
    """
    if not path.exists() or path.is_dir() and not any(path.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} exists already: choose another place for this training's records, or replace those with overwrite=True"
        )
    other = set(path.iterdir()) - set(_records(path)) if path.is_dir() else {path}
    if other or kind_of(path) != "training":
        what = f"it holds {', '.join(sorted(file.name for file in other)[:3])}" if other else "it is no training's"
        raise FileExistsError(f"{path} is not overwritten, {what}: choose another place for this training's records")


def _records(path: Path) -> list[Path]:
    """The files in a folder that a training and its page left there."""
    found = [file for name in ("tokens", "probe", "steps") for file in path.glob(f"{name}-*-*.parquet")]
    return found + [path / name for name in (ABOUT, ALIVE, f".{ALIVE}", PAGE) if (path / name).exists()]


def unwritten_for(about: Mapping[str, Any]) -> float | None:
    """For how many seconds a training's folder has been as it is; None where an older version wrote it."""
    try:
        written = datetime.datetime.fromisoformat(str(about.get("written")))
    except ValueError:
        return None
    return (datetime.datetime.now(datetime.UTC) - written).total_seconds()


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """run.json and the tables "tokens", "probe" and "steps" (pyarrow) of all ranks of a monitored training.

    Raises:
        FileNotFoundError: the folder holds no run. ValueError: it holds something else, or a later format.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not (path / ABOUT).exists():
        raise FileNotFoundError(f"{path} holds no run: {ABOUT} is missing")
    about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    if about.get("kind") != "training" or about.get("format", 0) > FORMAT:
        raise ValueError(f"{path} holds {about.get('kind')} in format {about.get('format')}, not a training in format {FORMAT}")
    tables = {}
    for name in ("tokens", "probe", "steps"):
        parts = [pq.read_table(file) for file in sorted(path.glob(f"{name}-*.parquet"))]
        tables[name] = pa.concat_tables(parts, promote_options="permissive") if parts else None
    return about, tables
