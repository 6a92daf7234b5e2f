"""Rows of a parquet file, in the memory of a few of them: a kilobyte can hold a text of 16 MB in each of 250 rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH = 64  # rows that are decoded together
SMALL = 1 << 26  # bytes that the rows of a batch may take as objects, at most, to be made together
FEW = 1 << 22  # values of a column, in lists, that any part of a file may hold
READING = (ValueError, OSError, MemoryError, OverflowError, NotImplementedError)  # what pyarrow raises of damaged files
A_ROW = 64  # more of them, so many a row and a byte: bytes that are no list of lists pack a million nulls


class Batch:
    """Rows of a file that are decoded and not yet objects; texts that are repeated are held once."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch
        self.rows: list[Any] | None = None

    def row(self, i: int) -> Any:
        """One row as an object."""
        if self.batch.nbytes * self.batch.num_rows > SMALL:  # each of its texts may stand in every row
            return self.batch.slice(i, 1).to_pylist()[0]
        if self.rows is None:
            self.rows = self.batch.to_pylist()
        return self.rows[i]


def size(path: Path) -> int:
    """How many rows a file has, from its last bytes.

    Raises:
        ValueError: it is not a parquet file.
    """
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows
    except READING as error:
        raise _unreadable(path, error) from None


def numbered(path: Path) -> Iterator[tuple[int, tuple[Batch, int]]]:
    """The rows, from 1, each as its batch and its place in there.

    Raises:
        ValueError: it is not a parquet file, names a column twice, or holds more values than its rows and bytes can.
    """
    import pyarrow.parquet as pq

    n = 0
    try:
        with pq.ParquetFile(path) as file:
            names, about = file.schema_arrow.names, file.metadata
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{path} has more than one column {', '.join(twice)}: keep one of each")
        _require_plausible(path, about)
        columns = [about.schema.column(i) for i in range(about.num_columns)]
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        with pq.ParquetFile(path, read_dictionary=texts, pre_buffer=False) as file:
            for decoded in file.iter_batches(batch_size=BATCH):
                batch = Batch(decoded)
                for i in range(decoded.num_rows):
                    n += 1
                    yield n, (batch, i)
    except READING as error:
        raise error if str(error).startswith(str(path)) else _unreadable(path, error) from None


def _unreadable(path: Path, error: BaseException) -> ValueError:
    """One sentence: pyarrow does not name the file, and says some things over several lines."""
    return ValueError(f"{path} is not a parquet file ({' '.join(str(error).split())[:200]})")


def _require_plausible(path: Path, about: Any) -> None:
    """Raise where a part of a file says that a column of it holds more values than a data set would pack into its bytes."""
    for group in (about.row_group(i) for i in range(about.num_row_groups)):
        for column in (group.column(i) for i in range(group.num_columns)):
            most = max(FEW, A_ROW * (min(group.num_rows, 1 << 20) + column.total_compressed_size))
            if column.path_in_schema.count(".") and column.num_values > most:
                raise ValueError(
                    f"{path} has {column.num_values:,} values of {column.path_in_schema} in {group.num_rows:,} rows and "
                    f"{column.total_compressed_size:,} bytes: that is no data set, and would take all memory"
                )
