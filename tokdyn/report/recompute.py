"""Profiles computed from the browser: a run's rows with other words or another loss, and one row of a scan.

Each is `tokdyn profile` in a process of its own, one at a time. What was edited is a data file beside the new run, and a file
of options like the run's own, so that the new run can be made again like any other.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .._arguments import objective_name, objective_names
from ..data import read
from ..runs.folder import RECIPE
from ..runs.manifest import replace

LONGEST = 20_000  # characters of a text that can be edited


class Jobs:
    """One process of `tokdyn` at a time, with what it says."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.place = Path()
        self._said: Any = None

    @property
    def running(self) -> bool:
        """Whether a process is at work."""
        return self.process is not None and self.process.poll() is None

    def require_free(self) -> None:
        """Raise unless a process could start.

        Raises:
            ValueError: one is at work.
        """
        if self.running:
            raise ValueError(f"{self.place.name} is being computed: one profile at a time")

    def start(self, words: Sequence[str], place: Path) -> None:
        """Start `tokdyn WORDS`, which writes the run `place`.

        Raises:
            ValueError: another one is at work.
        """
        self.require_free()
        self.close()
        self._said, self.place = tempfile.TemporaryFile(), place
        command = [sys.executable, "-m", "tokdyn", *words]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._said, stderr=subprocess.STDOUT)

    def said(self) -> str:
        """The last lines that the process printed."""
        self._said.seek(0)
        text: str = self._said.read().decode("utf-8", "replace")
        return "\n".join(text.replace("\r", "\n").strip().splitlines()[-12:])

    def close(self) -> None:
        """End the process, and forget what it said."""
        if self.running and self.process is not None:
            self.process.terminate()
            self.process.wait()
        if self._said is not None:
            self._said.close()
        self.process = self._said = None


def options_of(run: Path) -> dict[str, Any]:
    """The options that made a run.

    Raises:
        ValueError: they are not there: `tokdyn profile` did not make it.
    """
    import yaml

    try:
        found = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in ("model", "data", "objective")):
        raise ValueError(f"{run.name} has no {RECIPE} that says how it was made: only runs of `tokdyn profile` can be edited")
    return found


def rows_of(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that a run used: those of the update, then those that were observed besides.

    Raises:
        ValueError: the data file is not there any more, or cannot be read.
    """
    try:
        rows = read(options["data"])
    except FileNotFoundError:
        place = "where the run was made" if not Path(options["data"]).is_absolute() else "again"
        raise ValueError(f"the data file {options['data']} is not there: start `tokdyn serve` {place}") from None
    first, count = int(options.get("skip") or 0), int(options.get("rows") or len(rows)) + int(options.get("held_out") or 0)
    return rows[first : first + count]


def editable(row: Mapping[str, Any]) -> dict[str, str]:
    """The texts of a row that can be changed, by name: strings, and the contents of messages as "chosen.0.content"."""
    found: dict[str, str] = {}
    for name, value in row.items():
        messages = value if isinstance(value, list) else []
        contents = {f"{name}.{i}.content": each["content"] for i, each in enumerate(messages) if isinstance(each, Mapping)
                    and "content" in each}  # fmt: skip
        found |= {key: text for key, text in {name: value, **contents}.items() if isinstance(text, str)}
    return {name: text for name, text in found.items() if len(text) <= LONGEST}


def edited(rows: Sequence[Mapping[str, Any]], form: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows with the texts of a form, whose lines may end as a browser ends them; what was not changed stays as it is."""
    made = []
    for n, row in enumerate(rows):
        new: dict[str, Any] = json.loads(json.dumps(row))
        for name, old in editable(row).items():
            text = form.get(f"{n}.{name}", old).replace("\r\n", "\n")
            if text == old.replace("\r\n", "\n"):
                continue
            if name in row:
                new[name] = text
            else:
                of, i, key = name.rsplit(".", 2)
                new[of][int(i)][key] = text
        made.append(new)
    return made


def prepare(run: Path, form: Mapping[str, str]) -> tuple[list[str], Path]:
    """Write the edited rows and their options beside a run; return the words of the command and the new run's place.

    Raises:
        ValueError: the run was not made by a command, its data is gone, or the loss is unknown.
    """
    options = options_of(run)
    rows = edited(rows_of(options), form)
    loss = form.get("objective", options["objective"])
    objective_name(loss, objective_names())
    if loss.lower() != options["objective"].lower():
        options.pop("set", None)  # constants of the other loss
    place = free(run.parent, f"{run.name}-edit")
    data, recipe = (place.with_name(f"{place.name}{suffix}") for suffix in (".jsonl", ".yaml"))
    made = {"data": str(data), "objective": loss, "skip": 0, "allow_pickle": False}
    replace(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    replace(recipe, json.dumps(options | made, ensure_ascii=False, indent=1).encode())  # JSON is YAML
    return ["profile", "--config", str(recipe), "--out", str(place)], place


def free(folder: Path, name: str) -> Path:
    """The first of NAME-1, NAME-2, … that does not exist."""
    return next(path for n in range(1, 10_000) if not (path := folder / f"{name}-{n}").exists())


def form_of(run: Path, action: str) -> str:
    """The form in which a run's rows and its loss are changed: HTML.

    Raises:
        ValueError: see `options_of` and `rows_of`.
    """
    options = options_of(run)
    count, parts = int(options.get("rows") or 0), []
    for n, row in enumerate(rows_of(options)):
        held_out = " (observed only)" if count and n >= count else ""
        fields = [
            f"<label>{escape(name)}<textarea name='{n}.{escape(name)}' rows='{min(12, 2 + len(text) // 90)}'>\n"  # drops one \n
            f"{escape(text)}</textarea></label>"
            for name, text in editable(row).items()
        ]
        parts.append(f"<fieldset><legend>row {n + 1}{held_out}</legend>{''.join(fields)}</fieldset>")
    losses = "".join(
        f"<option{' selected' * (name.lower() == options['objective'].lower())}>{escape(name)}</option>"
        for name in objective_names()
    )
    return (f"<form method='post' action='{escape(action)}'><label>loss <select name='objective'>{losses}</select></label>"
            f"{''.join(parts)}<button>Compute the profile again</button></form>")  # fmt: skip


def row_form(action: str) -> str:
    """The form that asks for one row of a scan: HTML."""
    return (f"<form method='post' action='{escape(action)}'><label>row, from 1 "
            "<input name='row' type='number' min='1' required></label><button>Profile it</button></form>")  # fmt: skip


def prepare_row(scan: Path, form: Mapping[str, str]) -> tuple[list[str], Path]:
    """The words that profile a row of a scan, and where it goes.

    Raises:
        ValueError: it is no number of a row, or that one is there already.
    """
    number = form.get("row", "")
    if not (number.isascii() and number.isdigit() and 0 < int(number) < 10**9):
        raise ValueError(f"row must be a number from 1, got {number!r}")
    place = scan / "profiles" / f"row-{int(number):07d}"
    if place.exists():
        raise ValueError(f"row {number} is profiled already: {place.name} among the runs")
    return ["profile", "--scan", str(scan), "--row", number], place
