"""The gallery of the documents: docs/gallery.md, from the results and figures that docs/gallery/ keeps of every study."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import gallery, names

CELL = {"holds": "holds", "no": "**no**", "undecided": "*undecided*"}


def write_docs(root: Path, docs: Path) -> Path:
    """Write docs/gallery.md and docs/gallery/ from the studies saved under `root`; returns the path of the former.

    docs/gallery/ keeps each study's result.json and figures: a study that is not under `root` stays as it was there, and its
    page says where its code has changed since.

    Raises:
        ValueError: no study lies there.
    """
    folders = gallery.saved(root)
    if not folders:
        raise ValueError(f"no study lies under {root}: run `tokdyn study --all --out {root}` first")
    pictures = docs / "gallery"
    pictures.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        told = gallery.read(folder)
        for old in pictures.glob(f"{told['study']}-*.svg"):
            if not any(old.name.startswith(f"{other}-") for other in names() if other.startswith(f"{told['study']}-")):
                old.unlink()
        for key in told["figures"]:
            shutil.copy(folder / f"{key}.svg", pictures / f"{told['study']}-{key}.svg")
        (pictures / f"{told['study']}.json").write_text(gallery.as_json(told), "utf-8")
    (docs / "gallery.md").write_text(gallery_text(results(docs)), "utf-8")
    return docs / "gallery.md"


def results(docs: Path) -> list[dict[str, Any]]:
    """What the gallery in a folder of documents holds of each study, in order of their names."""
    return [gallery.current(json.loads(path.read_text("utf-8")), path) for path in sorted((docs / "gallery").glob("*.json"))]


def gallery_text(found: Sequence[dict[str, Any]]) -> str:
    """docs/gallery.md: all claims first, then every study."""
    missing = [name for name in names() if name not in {told["study"] for told in found}]
    lines = [
        "# Gallery", "",
        "Every phenomenon of the learning-dynamics papers, with the number that decides it. `tokdyn study NAME` runs one and",
        "`make studies` all of them and this page, which is written by a program: `tokdyn study --docs docs`.", "",
        f"{gallery.score(found)}. An interval is Student's t at 95% over seeds unless it says otherwise. A claim holds or does",
        "not where the whole interval lies on one side of what its oracle asks; otherwise it is undecided, as where one run",
        "gives no interval.", "",
        "| study | claim | oracle | measured | verdict |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for told in found:
        for claim in told["claims"]:
            cells = [f"[{told['study']}](#{told['study']})", claim["claim"], claim["oracle"], claim["measured"]]
            lines.append("| " + " | ".join(_cell(x) for x in [*cells, CELL[claim["verdict"]]]) + " |")
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    for told in found:
        lines += [
            "",
            f"## {told['study']}",
            "",
            f"**{told['title']}**",
            "",
            told["about"],
            "",
            f"*{gallery.settings_text(told)}*",
            "",
        ]
        if stale(told):
            lines += ["**Its code has changed since; these are the numbers and the wording of that run.**", ""]
        lines += [f"![{told['title']}](gallery/{told['study']}-{key}.svg)" for key in told["figures"]]
        lines += ["", told["notes"].strip()] if told["notes"].strip() else []
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def stale(told: dict[str, Any]) -> bool:
    """Whether a study's code is no longer what made this result."""
    return told["study"] not in names() or bool(told["source"] != gallery.source_digest(told["study"]))


def _cell(text: str) -> str:
    """A text in a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
