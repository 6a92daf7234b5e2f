"""How far a computation has come, told to the caller as (done, total)."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[int, int], None]
Stage = Callable[[str, int, int], None]  # what, done, total


def share(progress: Progress | None, first: int, size: int, whole: int) -> Progress | None:
    """A callback for a sub-task covering [first, first + size) of `whole`: maps its (done, total) onto the whole."""
    if progress is None or size == whole:
        return progress
    return lambda done, total: progress(first * total + size * done, whole * total)


class Stages:
    """Seconds per stage, and the caller's progress."""

    def __init__(self, stage: Stage | None) -> None:
        self.stage, self.name, self.spent, self.since = stage, "", dict[str, float](), time.perf_counter()

    def __call__(self, name: str) -> None:
        """A stage begins."""
        self.seconds()
        self.name = name
        if self.stage:
            self.stage(name, 0, 0)

    def progress(self, done: int, total: int) -> None:
        """How far the stage has come."""
        if self.stage:
            self.stage(self.name, done, total)

    def seconds(self) -> dict[str, float]:
        """Seconds that each stage took so far."""
        now = time.perf_counter()
        if self.name:
            self.spent[self.name] = round(self.spent.get(self.name, 0.0) + now - self.since, 3)
        self.since = now
        return dict(self.spent)
