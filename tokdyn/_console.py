"""What the command line prints to: results on stdout, notes, errors and progress on stderr."""

from __future__ import annotations

import codecs
import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.segment import Segment

from ._arguments import printable


class PlainConsole(Console):
    """A console on which text is text: no markup in it, and what would steer the terminal is shown escaped.

    Paths, names, roles and tokens come from files that somebody else wrote.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """Rich's segments, their text escaped; rich's own control codes are segments of another kind."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


out_console, err_console = PlainConsole(), PlainConsole(stderr=True)


# What a terminal without Unicode shows; anything else becomes its code, as in \u4f60
SPELLED = {"“": '"', "”": '"', "’": "'", "␣": "_", "↵": "\\n", "…": "...", "•": "*", "·": "-", "–": "-", "−": "-", "×": "x",
           "≈": "~", "→": "->", "←": "<-", "‖": "||", "Σ": "Sum", "Δ": "d", "η": "eta", "θ": "theta", "π": "pi", "β": "beta",
           "√": "sqrt", "²": "^2", "⁻": "^-", "∇": "grad", "°": "deg"}  # fmt: skip


def _spelled(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    return "".join(SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode() for c in found), error.end


codecs.register_error("tokdyn", _spelled)


def spell_out() -> None:
    """Let standard output and error spell out what their encoding does not have, where Python would raise."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="tokdyn")


@contextlib.contextmanager
def progress() -> Iterator[Any]:
    """A progress line on stderr; yields `stage(what, done, total)`, with a bar where total is not 0."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    what = TextColumn("{task.description}", markup=False)
    bar = Progress(SpinnerColumn(), what, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err_console,
                   transient=True, disable=not err_console.is_terminal)  # fmt: skip
    with bar:
        task = bar.add_task("starting", total=None)

        def stage(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield stage
