"""What the command line prints to: results on stdout, notes, errors and progress on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console

out_console, err_console = Console(highlight=False), Console(stderr=True, highlight=False)


@contextlib.contextmanager
def progress() -> Iterator[Any]:
    """A progress line on stderr; yields `stage(what, done, total)`, with a bar where total is not 0."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    what = TextColumn("{task.description}", markup=False)
    bar = Progress(SpinnerColumn(), what, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err_console,
                   transient=True)  # fmt: skip
    with bar:
        task = bar.add_task("starting", total=None)

        def stage(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield stage
