"""A scan on disk: one row a token and one row an example, in blocks that count as they are committed.

    folder/
      run.json                    what was asked: model, objective, groups, data
      manifest-….json             which files count (manifest.py)
      tokens-….parquet            one row an update token: where it stands, its statistics, its force on every group
      rows-….parquet              one row an example: its sums

Read while it is written: `Scan(folder)` sees the blocks that are whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from . import manifest
from .folder import FORMAT, read_about, read_table
from .frames import pandas
from .notebook import scan_html
from .schema import require_scan
from .watched import watched

TOKENS, ROWS = "tokens.parquet", "rows.parquet"
SEPARATOR = " · "  # of group and part in the name of a column


class Scan:
    """A folder that `td.scan` writes or has written.

    Attributes:
        path: the folder.
        about: its run.json.
        blocks: what is done, in the order of the data: (block, commit).
    """

    def __init__(self, path: str | Path) -> None:
        """Open a folder.

        Raises:
            FileNotFoundError: it holds no scan. ValueError: a later format, or a file of it is missing or cut short.
        """
        self.path = Path(path)
        self.about = read_about(self.path)
        if self.about.get("kind") != "scan":
            raise ValueError(f"{self.path} holds a {self.about.get('kind')}, not a scan: read it with td.load")
        if self.about["format"] > FORMAT:
            raise ValueError(f"{self.path} was written in format {self.about['format']}: update tokdyn")
        require_scan(self.path, self.about)
        found = {
            int(commit.key): commit for commit in manifest.committed(self.path) if re.fullmatch(r"[0-9]{1,18}", commit.key)
        }
        self.blocks = sorted(found.items())

    @property
    def groups(self) -> list[str]:
        """The names of the groups of observed tokens."""
        return [group["name"] for group in self.about["groups"]]

    @property
    def tokens_of(self) -> dict[str, int]:
        """How many observed tokens each group has: a force is on the sum of their log-probabilities, or of what is watched."""
        return {group["name"]: int(group["tokens"]) for group in self.about["groups"]}

    @property
    def watched(self) -> dict[str, str]:
        """Label and unit of what is watched at the observed tokens."""
        return watched(self.about)

    @property
    def parts(self) -> list[str]:
        """By what the forces are divided: beside "force_GROUP" there are the columns "force_GROUP · PART"; often nothing."""
        return list(self.about.get("parts") or [])

    @property
    def size(self) -> int | None:
        """How many rows the data has; None where that was not known before the end."""
        return self.about["settings"]["rows"]

    @cached_property
    def missing(self) -> list[int]:
        """The blocks that are not there yet; of data of unknown size those before the last one that is."""
        have = {block for block, _ in self.blocks}
        size, last = self.size, max(have, default=-1) + 1
        whole = last if size is None else math.ceil(size / self.about["settings"]["block"])
        return [block for block in range(whole) if block not in have]

    @property
    def complete(self) -> bool:
        """Whether every row is there."""
        return bool(self.blocks) and not self.missing

    def each(self, table: str = TOKENS, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """The token tables (or, with ROWS, the row tables) block by block (pyarrow): one block is held at a time."""
        for block, commit in self.blocks:
            if table not in commit.files:
                raise ValueError(f"{self.path} is damaged: block {block} has no {table}")
            yield read_table(commit.files[table], columns=None if columns is None else list(columns))

    def tokens(self, columns: Sequence[str] | None = None) -> Any:
        """All update tokens as one table (pyarrow)."""
        return self._joined(TOKENS, columns)

    def rows(self, columns: Sequence[str] | None = None) -> Any:
        """All examples as one table (pyarrow)."""
        return self._joined(ROWS, columns)

    def to_dataframe(self, table: str = "rows") -> Any:
        """The examples or the update tokens as pandas has them: forces on each group in nats per unit learning rate.

        Args:
            table: "rows" or "tokens".

        Raises:
            ValueError: another word, or no block is there yet. ImportError: pandas is not installed.
        """
        if table not in ("rows", "tokens"):
            raise ValueError(f'table must be "rows" or "tokens", got {table!r}')
        pandas()
        return (self.rows() if table == "rows" else self.tokens()).to_pandas()

    def _repr_html_(self) -> str:
        """What a notebook shows: how far it is, what all rows do to each group, and the rows that hurt most."""
        return scan_html(self)

    def _joined(self, table: str, columns: Sequence[str] | None) -> Any:
        import pyarrow as pa

        parts = list(self.each(table, columns))
        if not parts:
            raise ValueError(f"{self.path} holds no block yet")
        return pa.concat_tables(parts)
