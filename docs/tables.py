"""Figures of the documents, read from committed JSON: a block of text is written by the template in the comment above it.

    <!-- figures
    a = benchmarks/results/exact-naive.json
    ---
    | one gradient per token | {a.figures.tangent[0].median_s:.1f} s |
    -->
    | one gradient per token | 8.2 s |

`python docs/tables.py` writes every block anew, up to the next empty line; tests/test_tables.py holds that none would change.
Between braces stands a Python expression of the JSON's values, then a format; keys are attributes, or in [""] where they are no
names. Besides the values there are median, min, max, round and `row(rows, key=value, …)`, the one row that has these values.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^<!-- figures\n(?P<files>.*?)\n---\n(?P<template>.*?)\n-->\n(?P<text>(?:[^\n]+(?:\n|$))*)", re.M | re.S)
FIELD = re.compile(r"\{((?:[^{}\"]|\"[^\"]*\")+?)(?::([^{}:\"]*))?\}")


class Values(dict):
    """A JSON object whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise KeyError(f"{name!r} is not among {', '.join(self)}")


def row(rows: list[Values], **values: Any) -> Values:
    """The one row that has these values.

    Raises:
        ValueError: there is none, or there are several.
    """
    found = [each for each in rows if all(each.get(key) == value for key, value in values.items())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows have {values}")
    return found[0]


def render(files: str, template: str) -> str:
    """A template with its figures.

    Args:
        files: lines "name = path of a JSON file from the root".
        template: text with {expression:format}.

    Raises:
        ValueError: a file is not there, or an expression has no value; the expression is named.
    """
    names: dict[str, Any] = {
        "median": median,
        "min": min,
        "max": max,
        "round": round,
        "row": row,
        "abs": abs,
        "zip": zip,
        "len": len,
    }
    for line in files.splitlines():
        name, _, path = (part.strip() for part in line.partition("="))
        if not (ROOT / path).is_file():
            raise ValueError(f"{line!r}: there is no file {path}")
        names[name] = json.loads((ROOT / path).read_text("utf-8"), object_hook=Values)

    def figure(field: re.Match[str]) -> str:
        try:
            return format(eval(field[1], {"__builtins__": {}} | names), field[2] or "")
        except Exception as error:
            raise ValueError(f"{field[0]}: {type(error).__name__}: {error}") from error

    return FIELD.sub(figure, template)


def written(text: str) -> str:
    """A document with every block written anew from its template."""

    def block(found: re.Match[str]) -> str:
        head = found[0][: found.start("text") - found.start()]
        return head + render(found["files"], found["template"]) + "\n"

    return BLOCK.sub(block, text)


def main() -> None:
    """Write the blocks of all documents, and name those that changed."""
    for page in sorted((ROOT / "docs").rglob("*.md")):
        before = page.read_text("utf-8")
        after = written(before)
        if after != before:
            page.write_text(after, "utf-8")
            sys.stdout.write(f"{page.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
