"""A table in a terminal whose figures are never cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Listing:
    """Rows under the names of their columns; in a terminal too narrow for that, one cell below the other.

    Args:
        title: above the table; none when empty.
        columns: their names.
        figures: which of them hold figures, by number: right-aligned, and never broken.
        dim: which are of less interest.
    """

    def __init__(self, title: str, columns: Sequence[str], figures: Sequence[int] = (), dim: Sequence[int] = ()) -> None:
        self.title, self.columns, self.figures, self.dim = title, list(columns), set(figures), set(dim)
        self.rows: list[list[str]] = []

    def add_row(self, *cells: str) -> None:
        """One more row; cells are plain text, "" where there is nothing to say."""
        self.rows.append(list(cells))

    def __rich_console__(self, console: Any, options: Any) -> Any:
        """Side by side if that fits (rich asks for this)."""
        from rich.cells import cell_len

        widths = [
            max(cell_len(part) for cell in column for part in ([cell] if i in self.figures else cell.split() or [""]))
            for i, column in enumerate(zip(self.columns, *self.rows, strict=True))
        ]
        yield self._wide() if sum(widths) + 2 * (len(widths) - 1) <= options.max_width else self._tall()

    def _wide(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for i, name in enumerate(self.columns):
            style = "dim" if i in self.dim else ""
            number = i in self.figures
            table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold", style=style)
        for row in self.rows:
            table.add_row(*map(Text, row))  # a token may look like markup
        return table

    def _tall(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = [Text(self.title, style="bold")] if self.title else []
        for head, *cells in self.rows:
            grid = Table.grid(padding=(0, 1))
            grid.add_column(style="dim", overflow="fold")
            grid.add_column(overflow="fold")
            for i, (name, cell) in enumerate(zip(self.columns[1:], cells, strict=False), 1):
                if cell:
                    grid.add_row(Text(f"  {name}"), Text(cell, no_wrap=i in self.figures))
            parts += [Text(head, style="bold"), grid]
        return Group(*parts)
