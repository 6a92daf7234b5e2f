"""The folder that the records of a monitored training go to.

It holds run.json and, for every rank, commits (runs/manifest.py) of up to three tables each:

    tokens-00000-000001.parquet   one row per scored token of the update
    probe-00000-000001.parquet    one row per probe token and probe step
    steps-00000-000001.parquet    one row per recorded step with its sums

A training that is resumed writes on as its next life. Of a step that two lives recorded (the first was killed later than its
checkpoint), the later one counts.
"""

from __future__ import annotations

import datetime
import functools
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..runs import manifest
from ..runs.folder import ABOUT, PAGE, about_of, as_json, read_about, read_table, require_own, require_place
from .heartbeat import ALIVE
from .steps import Step

FORMAT = 2  # of a training's folder; 1 had no manifests
TABLES = "tokens", "probe", "steps"
RECORDS, SECONDS = 20, 30.0  # written out whichever comes first
MOST = 400  # records that wait for a disk that is full; older ones are dropped, and said
SAME = "model", "probe"  # entries of run.json that a resumed training must share
KEY = re.compile(r"rank (\d{1,18}), life (\d{1,18}), steps (\d{1,18}) to (\d{1,18})")


class Folder:
    """The folder of a monitored training, as one rank writes to it; `prepare` comes before, on rank 0.

    run.json says in `written` when records were last written: a training that still runs writes again.

    Attributes:
        last: the last step that an earlier life recorded, 0 where this is the first.

    Raises:
        FileExistsError: another process writes here as this rank. ValueError: what is to be resumed cannot be read.
    """

    def __init__(self, path: Path, rank: int, about: Mapping[str, Any], resume: bool = False) -> None:
        self.path, self.rank = path, rank
        self.about = {"format": FORMAT, "kind": "training", "status": "running"} | dict(about)
        self.waiting: list[Step] = []
        self.dropped: list[int] = []
        self._patience, self._written = 1, time.monotonic()
        self.writer = manifest.Writer(path, f"{rank:05d}", fresh=not resume)
        parts = [_part(self.path, commit) for commit in self.writer.commits]
        self.life, self.last = 1 + max((p.life for p in parts), default=0), max((p.last for p in parts), default=0)
        self._write_about()

    def add(self, step: Step) -> None:
        """Keep a step; every so many, or seconds after the last write, write them out.

        Raises:
            OSError: the disk is full, or as it may be; the records wait, and are tried again after twice as many.
        """
        self.waiting.append(step)
        if len(self.waiting) > MOST:
            self.dropped.append(self.waiting[0].step)
            self.waiting.pop(0).let_go()
        due = len(self.waiting) >= min(RECORDS * self._patience, MOST)
        if due or time.monotonic() - self._written >= SECONDS * self._patience:
            self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: as `add`.
        """
        if not self.waiting:
            return
        steps, number = self.waiting, len(self.writer.commits)
        key = f"rank {self.rank}, life {self.life}, steps {steps[0].step} to {steps[-1].step}"
        self._written = time.monotonic()
        try:
            self.writer.commit(self._tables(steps), key)
        except Exception as error:
            self._patience *= 2
            lost = f", {len(self.dropped)} were dropped (steps {self.dropped[0]} to {self.dropped[-1]})" if self.dropped else ""
            raise OSError(f"records could not be written: {error}; {len(steps)} wait in memory{lost}") from error
        finally:
            if len(self.writer.commits) > number:  # also where Ctrl-C came after the commit
                self.waiting = []
                for step in steps:
                    step.is_in(self.writer.commits[-1].files)
        self._patience = 1
        self._write_about()

    def _tables(self, steps: list[Step]) -> dict[str, manifest.Write]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        parts = {
            "tokens": [s.tokens for s in steps],
            "probe": [s.observed for s in steps if s.observed is not None],
            "steps": [pa.Table.from_pylist([s.row() | {"rank": self.rank}]) for s in steps],
        }
        joined = {name: pa.concat_tables(part, promote_options="permissive") for name, part in parts.items() if part}
        return {f"{name}.parquet": functools.partial(pq.write_table, table) for name, table in joined.items()}

    def close(self, status: str, **about: Any) -> None:
        """Write the rest, and how the training ended.

        Raises:
            OSError: as `add`; another process may then write here all the same.
        """
        try:
            self.flush()
        finally:
            self.about |= {"status": status} | about
            self._write_about()
            self.writer.close()

    def _write_about(self) -> None:
        if self.rank == 0:
            self.about["written"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            self.about["dropped"] = self.dropped
            manifest.replace(self.path / ABOUT, as_json(self.about))


def prepare(path: Path, about: Mapping[str, Any], overwrite: bool = False, resume: bool = False) -> None:
    """Before the ranks open a folder: check it, and clear it of an earlier training that is to be replaced.

    Raises:
        FileExistsError: see `check_free`. ValueError: a training of something else is to be resumed.
    """
    check_free(path, overwrite, resume)
    if resume and path.exists():
        earlier = about_of(path)
        for name in SAME:
            if earlier and earlier.get(name) != about.get(name):
                raise ValueError(
                    f"{path} is not resumed: its training was of {name} {earlier.get(name)}, not {about.get(name)}; choose "
                    "another place"
                )
    elif path.exists():
        for file in sorted(path.iterdir(), key=lambda file: not file.name.startswith("manifest-")):
            if file.name != ABOUT:  # what a kill leaves meanwhile is a training's still
                file.unlink()


def check_free(path: Path, overwrite: bool = False, resume: bool = False) -> None:
    """Raise unless a training's records can be written to a path.

    Raises:
        FileExistsError: it is taken: by an earlier training where it is neither to be replaced nor resumed, by one that still
            runs, or by anything else. ValueError: overwrite and resume are both asked for.
    """
    if overwrite and resume:
        raise ValueError("overwrite=True begins a training's records anew, resume=True goes on with them: choose one")
    require_place(path)
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite and not resume:
        raise FileExistsError(
            f"{path} exists already: choose another place for this training's records, replace those with overwrite=True, or "
            "go on with them with resume=True"
        )
    require_own(path, ["training"], _own_file)


def _own_file(name: str) -> bool:
    single = (ABOUT, ALIVE, PAGE)
    return (
        name in single
        or name in {f".{each}" for each in single} | {f".{each}.part" for each in single}
        or (manifest.is_ours(name, TABLES))
    )


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
        FileNotFoundError: the folder holds no run. ValueError: it holds something else, another format, or is damaged.
    """
    import pyarrow as pa

    path = Path(path)
    about = read_about(path)
    if about.get("kind") != "training" or about["format"] != FORMAT:
        raise ValueError(f"{path} holds {about.get('kind')} in format {about['format']}, not a training in format {FORMAT}")
    found: dict[str, list[Any]] = {name: [] for name in TABLES}
    for commit, below in _counting(path, manifest.committed(path)):
        for name in TABLES:
            if (file := commit.files.get(f"{name}.parquet")) is not None:
                found[name].append(_rows(file, below))
    try:
        return about, {
            name: pa.concat_tables(parts, promote_options="permissive") if parts else None for name, parts in found.items()
        }
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{path}: its tables do not fit one another ({' '.join(str(error).split())[:200]})") from error


class _Part(NamedTuple):
    """Which of a training's steps a commit is of."""

    rank: int
    life: int
    first: int
    last: int


def _part(path: Path, commit: manifest.Commit) -> _Part:
    key = KEY.fullmatch(commit.key)
    if key is None:
        raise ValueError(f"{path} is no training's folder, or damaged: writer {commit.writer} committed {commit.key[:100]!r}")
    return _Part(*map(int, key.groups()))


def _counting(path: Path, commits: list[manifest.Commit]) -> list[tuple[manifest.Commit, int | None]]:
    """The commits of a training with the step from which on a later life of the rank recorded anew, None for none."""
    parts = [_part(path, commit) for commit in commits]
    found = []
    for commit, part in zip(commits, parts, strict=True):
        later = [other.first for other in parts if other.rank == part.rank and other.life > part.life]
        below = min(later, default=part.last + 1)
        if below > part.first:
            found.append((commit, below if below <= part.last else None))
    return found


def _rows(file: Path, below: int | None) -> Any:
    """A table, or its rows of the steps below one.

    Raises:
        ValueError: the file cannot be read.
    """
    return read_table(file, filters=None if below is None else [("step", "<", below)])
