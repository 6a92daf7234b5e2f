"""Rows of data files and data sets, one after the other: any number, and only the ones asked for are held.

objects(path)              every object of a file with its number: .jsonl, .json, .csv (each also .gz), .parquet
source(paths)              rows of several files, of a datasets.Dataset or of any iterable, by their number
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import _json, _parquet

Numbered = Iterator[tuple[int, Any]]
Places = list[tuple[str, Any]]  # rows with their places for messages
ENDINGS = "must end in .jsonl, .ndjson, .json or .csv (each also with .gz), or in .parquet"


@dataclass(frozen=True)
class Rows:
    """The rows of one file, read as they are asked for.

    Attributes:
        unit: what is numbered, for messages: "line", "row" or "item".
        numbered: (number from 1, row as it stands in the file).
        parse: such a row and its number as an object; rows that are passed over are not parsed.
        size: how many rows there are, None where only the end of the file tells.
    """

    unit: str
    numbered: Numbered
    parse: Callable[[Any, int], Any] = lambda raw, n: raw
    size: int | None = None


def require_file(path: Path) -> None:
    """Raise unless there is a file.

    Raises:
        FileNotFoundError: there is nothing, or a folder.
    """
    if not path.is_file():
        what = f"{path} is a folder, no data file" if path.is_dir() else f"no data file {path}"
        raise FileNotFoundError(f"{what}: give a .jsonl, .json, .csv or .parquet file")


def rows_of(path: str | Path) -> Rows:
    """A file's rows.

    Raises:
        FileNotFoundError: no such file. ValueError: another ending; while reading, what is wrong (file and line are named).
    """
    path = Path(path)
    require_file(path)
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix == ".parquet" and not name.endswith(".gz"):
        return _parquet_rows(path)
    if suffix in (".jsonl", ".ndjson", ".json"):
        return Rows("item", _array(path)) if _is_array(path) else Rows("line", _json_lines(path), _parser(path))
    if suffix == ".csv":
        return Rows("row", _csv(path))
    raise ValueError(f"{path} {ENDINGS}")


def objects(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The objects in a file, unchecked, each with its place for error messages ("pairs.jsonl line 3").

    Raises:
        FileNotFoundError: no such file. ValueError: it is empty or cannot be read (file and line are named).
    """
    rows, n = rows_of(path), 0
    for n, raw in rows.numbered:
        yield f"{path} {rows.unit} {n}", rows.parse(raw, n)
    if not n:
        raise ValueError(f"{path} holds no rows")


def part(path: str | Path, start: int, stop: int) -> tuple[Places, int]:
    """The objects start to stop - 1 of a file, from 0, with their places, and how many the file has; the others are not parsed.

    Raises:
        FileNotFoundError: no such file. ValueError: it is empty or cannot be read (file and line are named).
    """
    rows = rows_of(path)
    found, n = [], 0
    for n, (number, raw) in enumerate(rows.numbered, 1):
        if start < n <= stop:
            found.append((f"{path} {rows.unit} {number}", rows.parse(raw, number)))
        if n >= stop and rows.size is not None:
            break
    if not n:
        raise ValueError(f"{path} holds no rows")
    return found, n if rows.size is None else rows.size


# ---------------------------------------------------------------- formats


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A text file's bytes, unpacked as they are read.

    Raises:
        ValueError: it is UTF-16, or not a whole gzip file.
    """
    packed = path.name.lower().endswith(".gz")
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            first = file.peek(4)[:4]
            if first[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in first:
                raise ValueError(f"{path} is UTF-16 (or 32), not UTF-8: save it as UTF-8")
            yield file
    except (OSError, EOFError, zlib.error) as error:
        if not packed:
            raise
        raise ValueError(f"{path} is not a whole gzip file ({error})") from None


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, blank ones too.

    Raises:
        ValueError: as `_opened`; a line is longer than any row.
    """
    with _opened(path) as file:
        for n in itertools.count(1):
            line = file.readline(_json.LONGEST + 1)
            if len(line) > _json.LONGEST:
                raise ValueError(f"{path} line {n} has more than {_json.LONGEST >> 20} MiB: that is no row of a data set")
            if not line:
                return
            yield line


def _is_array(path: Path) -> bool:
    """Whether the first character of a file opens a JSON array."""
    with _opened(path) as file:
        while begins := file.read(1 << 12):
            if shown := begins.removeprefix(b"\xef\xbb\xbf").strip():
                return bool(shown.startswith(b"["))
    return False


def _json_lines(path: Path) -> Numbered:
    for n, line in enumerate(_lines(path), 1):  # bytes, since text would also be split at U+2028
        if line.strip():
            yield n, line


def _parser(path: Path) -> Callable[[bytes, int], Any]:
    def parse(line: bytes, n: int) -> Any:
        try:
            return _json.loads(line)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} line {n} is not UTF-8 ({error.reason} at byte {error.start})") from None
        except json.JSONDecodeError as error:
            shown = line.rstrip(b"\r\n")[:60].decode(errors="replace")
            raise ValueError(f"{path} line {n} is not JSON ({error.msg} at column {error.colno}): {shown!r}") from None

    return parse


def _array(path: Path) -> Numbered:
    """The items of one JSON array, read as they are asked for."""
    try:
        with _opened(path) as file:
            yield from enumerate(_json.array(file.read), 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} begins an array and is not JSON ({error.msg} at line {error.lineno})") from None


def _parquet_rows(path: Path) -> Rows:
    """The rows of a parquet file; passing over one does not make its objects."""

    def parse(raw: tuple[_parquet.Batch, int], n: int) -> Any:
        batch, i = raw
        try:
            return batch.row(i)
        except (ValueError, OverflowError) as error:  # pyarrow's for texts that are not UTF-8, times out of range
            raise ValueError(f"{path} row {n} cannot be read ({' '.join(str(error).split())[:200]})") from None

    return Rows("row", _parquet.numbered(path), parse, _parquet.size(path))


def _csv(path: Path) -> Numbered:
    """The rows of a CSV file under the names of its first line; an empty cell is absent, lists are JSON."""
    csv.field_size_limit(max(csv.field_size_limit(), _json.LONGEST))  # of the process: 131,072 characters are no long text
    try:
        text = (line.decode("utf-8-sig" if n == 0 else "utf-8") for n, line in enumerate(_lines(path)))
        rows = csv.DictReader(text, strict=True)
        names = rows.fieldnames or [""]
        if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), None)):
            raise ValueError(f"{path} separates its cells by {other!r}: save it with commas, or as .jsonl")
        for n, row in enumerate(rows, 1):
            yield n, _cells(path, n, row)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV ({error})") from None


def _cells(path: Path, n: int, row: dict[Any, Any]) -> dict[str, Any]:
    """A row of a CSV file with its lists read."""
    if None in row:
        raise ValueError(f"{path} row {n} has more cells than the first line has names: quote texts that hold a comma")
    for key, cell in row.items():
        if key in ("completions", "rewards", "messages", "conversations") or (cell or "").startswith('[{"'):
            try:
                row[key] = json.loads(cell) if cell else None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} row {n}: {key} is not a JSON list ({error.msg})") from None
    return row | {key: None for key, cell in row.items() if cell == ""}


# ---------------------------------------------------------------- rows by number


class Source:
    """Rows by number, from 0: `read(start, stop)` holds these alone. A row that is not what its file should hold is its error.

    Attributes:
        size: how many there are, or None where that is seen only at the end.
        about: what they are, for a record: paths with checksums, or a fingerprint. The same about, the same rows.
    """

    size: int | None
    about: list[dict[str, Any]]

    def read(self, start: int, stop: int) -> Places:
        """The rows start, start + 1, … before stop, as far as there are any."""
        raise NotImplementedError


@dataclass
class Streamed(Source):
    """Rows of something that can be gone through from the beginning again; reading on is cheap, reading back begins anew."""

    begin: Callable[[], Iterator[tuple[Callable[[], str], Callable[[], Any]]]]
    size: int | None
    about: list[dict[str, Any]]
    _open: Iterator[Any] | None = field(default=None, repr=False)
    _at: int = 0

    def read(self, start: int, stop: int) -> Places:
        """See Source."""
        if self._open is None or start < self._at:
            self._open, self._at = self.begin(), 0
        for _ in itertools.islice(self._open, start - self._at):
            self._at += 1
        found = [(place(), _or_error(row)) for place, row in itertools.islice(self._open, stop - start)]
        self._at += len(found)
        return found


def _or_error(row: Callable[[], Any]) -> Any:
    try:
        return row()
    except ValueError as error:
        return error


@dataclass
class Indexed(Source):
    """Rows of a list, or of a datasets.Dataset, which reads them from the disk."""

    rows: Any
    size: int
    about: list[dict[str, Any]]

    def read(self, start: int, stop: int) -> Places:
        """See Source."""
        return [(f"row {n + 1}", self.rows[n]) for n in range(start, min(stop, self.size))]


def source(rows: Any, limit: int | None = None) -> Source:
    """Rows of files, a datasets.Dataset, a list or any iterable.

    Args:
        rows: a path, several, or rows. An iterator is gone through once.
        limit: the first so many.

    Raises:
        FileNotFoundError: no such file. ValueError: no rows, a file that cannot be read, or nothing of these.

    Cost: files are read once for their checksum and their number of rows.
    """
    if isinstance(rows, (str, os.PathLike)):
        rows = [rows]
    if isinstance(rows, Sequence) and rows and all(isinstance(each, (str, os.PathLike)) for each in rows):
        return _files([Path(each) for each in rows], limit)
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__") and not isinstance(rows, Mapping):
        size = len(rows) if limit is None else min(limit, len(rows))
        if not size:
            raise ValueError("the data holds no rows")
        return Indexed(rows, size, [{"rows": size, "fingerprint": _fingerprint(rows, size)}])
    if not isinstance(rows, Iterable) or isinstance(rows, Mapping):
        raise ValueError(f"rows must be paths of data files, or rows, got {type(rows).__name__}")

    def begin() -> Iterator[Any]:
        for n, row in enumerate(itertools.islice(rows, limit), 1):
            yield lambda n=n: f"row {n}", lambda row=row: row

    return Streamed(begin, None, [{"rows": None, "fingerprint": None}])


def _files(paths: list[Path], limit: int | None) -> Source:
    about, left = list[dict[str, Any]](), limit
    for path in paths:
        n = _upto(path, left)
        with path.open("rb") as file:
            about.append({"path": str(path), "rows": n, "sha256": hashlib.file_digest(file, "sha256").hexdigest()})
        left = None if left is None else left - n
    size = sum(each["rows"] for each in about)
    if not size:
        raise ValueError(f"{', '.join(map(str, paths))} holds no rows")

    def begin() -> Iterator[Any]:
        for path in paths:
            rows = rows_of(path)
            for n, raw in rows.numbered:
                yield (
                    lambda n=n, rows=rows, path=path: f"{path} {rows.unit} {n}",
                    lambda n=n, rows=rows, raw=raw: rows.parse(raw, n),
                )

    return Streamed(lambda: itertools.islice(begin(), limit), size, about)


def _upto(path: Path, limit: int | None) -> int:
    """How many rows a file has, at most so many."""
    rows = rows_of(path)
    if rows.size is None:
        return sum(1 for _ in itertools.islice(rows.numbered, limit))
    return rows.size if limit is None else min(rows.size, limit)


def _fingerprint(rows: Any, size: int) -> str:
    """A data set's own fingerprint, or a checksum of rows in memory."""
    own = getattr(rows, "_fingerprint", None)  # of a datasets.Dataset: of its files and what was done to them
    if isinstance(own, str):
        return own
    digest = hashlib.sha256()
    for n in range(size):
        digest.update(json.dumps(rows[n], sort_keys=True, default=repr).encode())
    return digest.hexdigest()
