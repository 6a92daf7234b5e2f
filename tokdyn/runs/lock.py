"""A file that is held while a process works, and let go of however it ends."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

_held: set[tuple[int, Path]] = set()  # a process does not lock itself out


def nothing() -> None:
    """What lets go of a lock that was not needed."""


def lock(path: Path, patience: float = 0.0) -> Callable[[], None] | None:
    """Hold a lock file until the function returned is called or the process ends, however it ends; None if it is held."""
    try:
        import fcntl
    except ImportError:  # Windows: nobody is kept out
        return nothing
    path, end = path.resolve(), time.monotonic() + patience
    while True:
        if (os.getpid(), path) not in _held:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and path.stat().st_ino == os.fstat(fd).st_ino:  # not the one a closing writer removed
                    break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                    break
            os.close(fd)
        if time.monotonic() >= end:
            return None
        time.sleep(0.02)
    _held.add((os.getpid(), path))

    def unlock() -> None:
        try:
            path.unlink(missing_ok=True)
        finally:
            _held.discard((os.getpid(), path))
            os.close(fd)

    return unlock
