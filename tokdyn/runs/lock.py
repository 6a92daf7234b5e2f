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
    """Hold a lock file until the function returned is called or the process ends, however it ends; None if it is held.

    The function lets go once; whatever it is called after that, it does nothing. A child that this process forks holds nothing.
    """
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
                taken = _stands_at(path, fd)
            except OSError as error:
                taken = error.errno not in (errno.EACCES, errno.EAGAIN)  # a file system without locks
            if taken:
                break
            os.close(fd)
        if time.monotonic() >= end:
            return None
        time.sleep(0.02)
    key = (os.getpid(), path)
    _held.add(key)
    held = [fd]

    def unlock() -> None:
        if not held:  # called again, as after an error of the first call: the number may be another file's by now
            return
        fd = held.pop()
        try:
            if key[0] == os.getpid():  # a forked child closes its copy: the file is its parent's to remove
                path.unlink(missing_ok=True)
        finally:
            _held.discard(key)
            os.close(fd)

    return unlock


def _stands_at(path: Path, fd: int) -> bool:
    """Whether an open file is the one at a path, and not one that a closing writer has removed."""
    try:
        return path.stat().st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False
