"""Parts of a long study, each kept on disk when it is done, so that an interrupted study goes on where it was.

A study hands its parts to `keep(name, make)`: made once, as plain lists, dicts, numbers and strings. Which code, form and
data made a part is in the folder's key; parts of another key are not used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..runs.manifest import replace

Keep = Callable[[str, Callable[[], Any]], Any]


def unkept(name: str, make: Callable[[], Any]) -> Any:
    """Make the part; nothing is kept."""
    return make()


def kept_in(folder: Path, key: str) -> Keep:
    """Keep parts in a folder, as files NAME.json that hold the key and the part."""

    def keep(name: str, make: Callable[[], Any]) -> Any:
        """Read the part, or make it and keep it; both give what JSON holds of it."""
        path = folder / f"{name}.json"
        if path.is_file():
            found = json.loads(path.read_text("utf-8"))
            if found["key"] == key:
                return found["part"]
        start = time.perf_counter()
        part = make()
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"key": key, "seconds": time.perf_counter() - start, "part": part})
        replace(path, text.encode())
        return json.loads(text)["part"]

    return keep


def spent(folder: Path, key: str) -> float:
    """Seconds that the parts in a folder have taken."""
    found = [json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")]
    return sum(part["seconds"] for part in found if part["key"] == key)
