"""A table in a terminal whose figures are never cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Listing:
    """Rows under the names of their columns; where the terminal is too narrow, without some, or one cell below the other.

    Args:
        title: above the table; none when empty.
        columns: their names.
        figures: which of them hold figures, by number: right-aligned, and never broken.
        dim: which are of less interest, and left out where that makes room for the others.
    """

    def __init__(self, title: str, columns: Sequence[str], figures: Sequence[int] = (), dim: Sequence[int] = ()) -> None:
        self.title, self.columns, self.figures, self.dim = title, list(columns), set(figures), set(dim)
        self.rows: list[list[str]] = []

    def add_row(self, *cells: str) -> None:
        """One more row; cells are plain text, "" where there is nothing to say."""
        self.rows.append(list(cells))

    def __rich_console__(self, console: Any, options: Any) -> Any:
        """Side by side if that fits, with as few columns as it takes (rich asks for this)."""
        from rich.text import Text

        if self.title:
            yield Text(self.title, style="bold")
        every = list(range(len(self.columns)))
        first = [i for i in every if i not in self.dim]
        if self._width(every) <= options.max_width:
            yield self._wide(every)
        elif self.dim and self._width(first) <= options.max_width:
            yield self._wide(first)
            left_out = "; ".join(self.columns[i] for i in sorted(self.dim))
            yield Text(f"in a wider terminal also: {left_out}", style="dim")
        else:
            yield self._tall()

    def _width(self, shown: Sequence[int]) -> int:
        """What columns take side by side: a figure whole, text by its longest word."""
        from rich.cells import cell_len

        widths = [
            max(cell_len(part) for cell in column for part in ([cell] if i in self.figures else cell.split() or [""]))
            for i, column in enumerate(zip(self.columns, *self.rows, strict=True))
        ]
        return sum(widths[i] for i in shown) + 2 * (len(shown) - 1)

    def _wide(self, shown: Sequence[int]) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for i in shown:
            style = "dim" if i in self.dim else ""
            number = i in self.figures
            table.add_column(
                self.columns[i], justify="right" if number else "left", no_wrap=number, overflow="fold", style=style
            )
        for row in self.rows:
            table.add_row(*(Text(row[i]) for i in shown))  # a token may look like markup
        return table

    def _tall(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = []
        for head, *cells in self.rows:
            grid = Table.grid(padding=(0, 1))
            grid.add_column(style="dim", overflow="fold")
            grid.add_column(overflow="fold")
            for i, (name, cell) in enumerate(zip(self.columns[1:], cells, strict=False), 1):
                if cell:
                    grid.add_row(Text(f"  {name}"), Text(cell, no_wrap=i in self.figures))
            parts += [Text(head, style="bold"), grid]
        return Group(*parts)
