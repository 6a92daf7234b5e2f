"""A sign of life in a training's folder, so that a run that was killed is told from one that computes.

run.json says "running" until the training ends, which a run that is killed never writes. The file `alive` is written anew every
few seconds by a daemon thread, between records too; it ends with its process, and goes when the training ends.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
from pathlib import Path

ALIVE = "alive"
EVERY = 10.0  # seconds
MISSED = 6  # so many in a row: a process that swaps, or a slow disk, misses some


class Heartbeat:
    """Write `alive` into a folder every so many seconds until `stop`; a disk that fails is no error of the training."""

    def __init__(self, folder: Path, every: float = EVERY) -> None:
        self.path, self.every = folder / ALIVE, every
        self._over = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="tokdyn heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self.every):
            self._beat()

    def _beat(self) -> None:
        part = self.path.with_name(f".{ALIVE}")
        with contextlib.suppress(OSError):
            part.write_text(json.dumps({"at": datetime.datetime.now(datetime.UTC).isoformat(), "every": self.every}))
            os.replace(part, self.path)

    def stop(self) -> None:
        """End the thread and take the file away."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def silent_since(folder: Path) -> datetime.datetime | None:
    """When a training's folder last had a sign of life, if too many are missing since; None where it lives, or had none ever.

    The clocks of both machines are compared: between them they may differ by less than a minute.
    """
    try:
        said = json.loads((folder / ALIVE).read_text())
        at, every = datetime.datetime.fromisoformat(said["at"]), float(said["every"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    silent = (datetime.datetime.now(datetime.UTC) - at).total_seconds()
    return at if silent > MISSED * every else None
