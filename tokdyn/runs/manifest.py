"""A write of several files is one commit: its files count once a manifest names them, all of them or none.

    folder/
      manifest-0.json               what writer 0 committed: names, sizes, checksums; replaced by rename, last of all
      tokens-0-000001.parquet       named there: it counts
      tokens-0-000002.parquet       not named: left by a killed write, removed by the writer's next run
      .tokens-0-000003.parquet.part the same
      .lock-0                       held while writer 0 is at work, gone when it closes

    with Writer(folder) as writer:                      # goes on where a killed one stopped
        for key, rows in blocks:
            if not writer.done(key):
                writer.commit({"rows.parquet": lambda path: pq.write_table(rows, path)}, key)
    for commit in committed(folder):                    # of all writers; a key counts once
        pq.read_table(commit.files["rows.parquet"])

Several processes write into one folder, each as a writer of its own with a manifest of its own. Files and folder are
synced to the disk before the manifest is, and the manifest before `commit` returns.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .lock import lock, nothing

FORMAT = 1
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")  # a file name that cannot leave its folder, nor hide in it
Write = Callable[[Path], object]  # writes one new file where it is told to


@dataclass(frozen=True)
class Commit:
    """Files that count together.

    Attributes:
        writer, number: who committed them, and the place among this writer's commits, from 1.
        key: what the caller calls this part of the work; "" where it has no name.
        files: the name that was given to `commit` -> the file.
        sums: the same name -> (size in bytes, CRC-32).
    """

    writer: str
    number: int
    key: str
    files: dict[str, Path]
    sums: dict[str, tuple[int, int]]

    def verify(self) -> None:
        """Raise unless every file holds the bytes that were committed; reads them all.

        Raises:
            ValueError: one is missing, or differs.
        """
        self.check_sizes()
        for name, path in self.files.items():
            if _crc(path) != self.sums[name][1]:
                raise ValueError(f"{path} is not what was written: its checksum differs; take the folder from a backup")

    def check_sizes(self) -> None:
        """Raise unless every file is there in its size.

        Raises:
            ValueError: one is missing, or has another size.
        """
        for name, path in self.files.items():
            size = path.stat().st_size if path.is_file() else None
            if size != self.sums[name][0]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(f"{path} {found}, {self.sums[name][0]} were written: take the folder from a backup")


class Writer:
    """One process's way into a folder; it goes on where an earlier one of the same name stopped.

    Args:
        folder: made if it is not there.
        name: of this writer, a plain word: "0", a rank. None takes the first number that no other process works under.
        about: what all writers of the folder must agree on (settings, a fingerprint), plain JSON; kept in the manifest.
        fresh: forget and remove what a writer of this name committed before.

    Attributes:
        commits: what counts of this writer, in order.

    Raises:
        FileExistsError: a process works under this name. ValueError: a manifest cannot be read, or `about` differs from one.
    """

    def __init__(
        self, folder: str | Path, name: str | None = "0", about: Mapping[str, Any] | None = None, *, fresh: bool = False
    ) -> None:
        self._unlock: Callable[[], None] = nothing
        self.folder, self.about = Path(folder), json.loads(json.dumps(dict(about or {})))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name, self._unlock = _take(self.folder, name)
        self.commits: list[Commit] = []
        self._own_keys: set[str] = set()
        self._others: dict[str, tuple[int, set[str]]] = {}  # manifest -> when it was written, keys
        try:
            if not fresh:
                self._reload()
            self._join_others()
            _write(self.folder, self.name, self.about, self.commits)
            self._sweep()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Let another process work under this name. Safe to call twice."""
        unlock, self._unlock = self._unlock, nothing
        unlock()

    __del__ = close

    def done(self, key: str) -> bool:
        """Whether a writer of the folder has committed a key; what others did is looked up at every commit of one's own."""
        return key in self._own_keys or any(key in keys for _, keys in self._others.values())

    def commit(self, files: Mapping[str, Write], key: str = "") -> Commit:
        """Write files that count together, and return when they are on the disk.

        An exception leaves nothing: neither files nor a used number. One that comes after the manifest was replaced (Ctrl-C)
        leaves the commit whole, and `commits` names it.

        Args:
            files: "tokens.parquet" -> what writes it to the path it is given; the file becomes tokens-WRITER-NUMBER.parquet.
            key: what this part of the work is called; a key that is done is not written again where readers look.

        Raises:
            ValueError: a name is not a plain one. OSError: the disk is full, or as the caller's function raises.

        Cost: each file is read once for its checksum, and the manifest written anew, about 150 bytes for every file so far.
        """
        number = self.commits[-1].number + 1 if self.commits else 1
        try:
            paths = {name: self.folder / self._numbered(name, number) for name in files}
            sums = {name: _put(paths[name], write) for name, write in files.items()}
            sync_folder(self.folder)
            made = Commit(self.name, number, key, paths, sums)
            _write(self.folder, self.name, self.about, [*self.commits, made])
            self.commits.append(made)
        except BaseException:
            with contextlib.suppress(OSError, ValueError):
                self._reload()
                self._sweep()
            raise
        self._own_keys |= {key} - {""}
        self._join_others()
        return made

    def _numbered(self, name: str, number: int) -> str:
        if not PLAIN.fullmatch(name):
            raise ValueError(f"a file of a commit is named by letters, digits, - _ and ., got {name!r}")
        stem, dot, suffix = name.partition(".")
        return f"{stem}-{self.name}-{number:06d}{dot}{suffix}"

    def _reload(self) -> None:
        """What the disk says counts of this writer."""
        path = self.folder / _manifest(self.name)
        self.commits = []
        if path.exists():
            about, self.commits = _read(path)
            self._require_same(about)
        self._own_keys = {c.key for c in self.commits if c.key}

    def _join_others(self) -> None:
        """The keys of the folder's other writers, which must be about the same."""
        for path in manifests(self.folder):
            written = path.stat().st_mtime_ns
            if path.name != _manifest(self.name) and self._others.get(path.name, (0,))[0] != written:
                about, commits = _read(path)
                self._require_same(about)
                self._others[path.name] = written, {c.key for c in commits if c.key}

    def _require_same(self, about: Mapping[str, Any]) -> None:
        for key in sorted(about.keys() | self.about.keys()):
            if about.get(key) != self.about.get(key):
                raise ValueError(
                    f"{self.folder} was begun with {key}={_short(about.get(key))}, not {_short(self.about.get(key))}: "
                    "go on with the same, or choose another place"
                )

    def _sweep(self) -> None:
        """Remove what killed writes of this writer left: files of numbers that no commit has used, and parts."""
        own = re.compile(rf"\.?[^.]+-{re.escape(self.name)}-(\d{{6}})(\..+)?|\.manifest-{re.escape(self.name)}\.json\.part")
        last = self.commits[-1].number if self.commits else 0
        for path in [self.folder / entry.name for entry in os.scandir(self.folder) if own.fullmatch(entry.name)]:
            number = own.fullmatch(path.name)[1]  # type: ignore[index]
            if (number is None or int(number) > last) and not path.is_dir():
                path.unlink(missing_ok=True)


def fill(folder: Path, files: Mapping[str, Write], about: Mapping[str, Any] | None = None) -> None:
    """Write one commit into an empty folder, its files under their own names; the manifest says that it is whole."""
    sums = {name: _put(folder / name, write) for name, write in files.items()}
    sync_folder(folder)
    _write(folder, "0", about or {}, [Commit("0", 1, "", {name: folder / name for name in files}, sums)])


def committed(folder: str | Path) -> list[Commit]:
    """What counts in a folder: the commits of all its writers, by writer and number; of a key the first alone.

    Raises:
        ValueError: a manifest cannot be read, or a file it names is missing or has another size.
    """
    found, keys = [], set()
    for path in manifests(Path(folder)):
        for commit in _read(path)[1]:
            if commit.key == "" or commit.key not in keys:
                commit.check_sizes()
                found.append(commit)
                keys.add(commit.key)
    return found


def about(folder: str | Path) -> dict[str, Any] | None:
    """What the writers of a folder say it is about; None where there is no manifest.

    Raises:
        ValueError: the manifest cannot be read.
    """
    first = next(iter(manifests(Path(folder))), None)
    return None if first is None else _read(first)[0]


def manifests(folder: Path) -> list[Path]:
    """The manifests in a folder, by the names of their writers."""
    if not folder.is_dir():
        return []
    names = [entry.name for entry in os.scandir(folder) if re.fullmatch(r"manifest-[A-Za-z0-9_\-]+\.json", entry.name)]
    return [folder / name for name in sorted(names, key=lambda name: (len(name), name))]


def busy(folder: Path) -> list[str]:
    """The writers that are at work in a folder, as far as this machine knows."""
    found = []
    for path in sorted(folder.glob(".lock-*")) if folder.is_dir() else []:
        unlock = lock(path)
        if unlock is None:
            found.append(path.name.removeprefix(".lock-"))
        else:
            unlock()
    return found


def is_ours(name: str, tables: Iterable[str] = ()) -> bool:
    """Whether a file's name is one that a `Writer` gives: a manifest, a lock, or a file of one of these tables."""
    table = "|".join(map(re.escape, tables)) or "(?!)"
    form = rf"\.?manifest-[\w\-]+\.json(\.part)?|\.lock-[\w\-]+|\.?(?:{table})-[\w\-]+-\d{{6}}\.\w+(\.part)?"
    return re.fullmatch(form, name) is not None


# ---------------------------------------------------------------- one file


def replace(path: Path, data: bytes) -> None:
    """Put a file in the place of another: whole or not at all, and on the disk when this returns."""
    _put(path, lambda part: part.write_bytes(data))
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can."""
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def _put(path: Path, write: Write) -> tuple[int, int]:
    """Have a file written beside its place, synced and moved there; its size and CRC-32."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        fd = os.open(part, os.O_RDWR)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        found = part.stat().st_size, _crc(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return found


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


# ---------------------------------------------------------------- manifests


def _manifest(writer: str) -> str:
    return f"manifest-{writer}.json"


def _write(folder: Path, writer: str, about: Mapping[str, Any], commits: list[Commit]) -> None:
    listed = [
        {"number": c.number, "key": c.key, "files": {name: [path.name, *c.sums[name]] for name, path in c.files.items()}}
        for c in commits
    ]
    text = json.dumps({"format": FORMAT, "writer": writer, "about": about, "commits": listed}, ensure_ascii=False)
    replace(folder / _manifest(writer), text.encode())


def _read(path: Path) -> tuple[dict[str, Any], list[Commit]]:
    """What a manifest is about, and its commits.

    Raises:
        ValueError: it cannot be read, is of a later format, or names what no writer would.
    """
    try:
        found = json.loads(path.read_bytes())
        version = found["format"]
        if not isinstance(version, int) or version > FORMAT:
            raise ValueError(f"it is in format {_short(version)}, this version reads up to {FORMAT}: update tokdyn")
        return dict(found["about"]), list(_commits(path, found["commits"]))
    except OSError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else _short(error)
        raise ValueError(f"{path} is not a manifest that tokdyn wrote: {why}") from None


def _commits(path: Path, listed: Any) -> Iterator[Commit]:
    writer = path.name.removeprefix("manifest-").removesuffix(".json")
    for n, each in enumerate(listed, 1):
        files, sums = {}, {}
        for name, (file, size, crc) in each["files"].items():
            if not (isinstance(file, str) and PLAIN.fullmatch(file) and isinstance(size, int) and isinstance(crc, int)):
                raise ValueError(f"commit {n} names a file {_short(file)} of {_short(size)} bytes")
            files[name], sums[name] = path.parent / file, (size, crc)
        if each["number"] != n or not isinstance(each["key"], str):
            raise ValueError(f"commit {n} has the number {_short(each['number'])} and the key {_short(each['key'])}")
        yield Commit(writer, n, each["key"], files, sums)


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else text[:97] + "..."


def _take(folder: Path, name: str | None) -> tuple[str, Callable[[], None]]:
    """The name a writer works under, and what lets go of it."""
    if name is not None and not re.fullmatch(r"\w[\w\-]*", name, re.ASCII):
        raise ValueError(f"a writer is named by letters, digits, - and _, got {name!r}")
    for number in range(1 << 16):
        unlock = lock(folder / f".lock-{number if name is None else name}", patience=0.5 if name is not None else 0.0)
        if unlock is not None:
            return str(number) if name is None else name, unlock
        if name is not None:
            break
    raise FileExistsError(f"another process writes to {folder} as {name}: let it end, or choose another place")
