"""How far a computation has come, told to the caller as (done, total)."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]


def share(progress: Progress | None, first: int, size: int, whole: int) -> Progress | None:
    """What a part that is `size` of `whole`, after `first` of them are done, reports to as if it were all there is."""
    if progress is None or size == whole:
        return progress
    return lambda done, total: progress(first * total + size * done, whole * total)
