"""How far a computation has come, told to the caller as (done, total)."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]


def share(progress: Progress | None, first: int, size: int, whole: int) -> Progress | None:
    """A callback for a sub-task covering [first, first + size) of `whole`: maps its (done, total) onto the whole."""
    if progress is None or size == whole:
        return progress
    return lambda done, total: progress(first * total + size * done, whole * total)
