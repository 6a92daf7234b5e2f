"""The page of a scan: which rows and tokens hurt and help each group most, where they stand, and how much cancels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..runs.manifest import replace
from ..runs.scan_totals import BEST, EDGES, Ends, Share, Totals, totals
from ..runs.scans import Scan
from ..runs.table import Listing
from ..sequences import visible
from .page import assemble
from .text import count, day, facts, show, signed

STYLES = ("page.css", "scan/scan.css")
SHOWN = 3  # rows and tokens of each end in a terminal
BARS = 40  # of the histogram of rows
PARTS = 24  # of what moves, that are shown one by one
PROFILES = "profiles"


def render(scan: Scan, found: Mapping[str, Totals] | None = None) -> str:
    """The report of a scan as one HTML document without a script, of what has been written so far.

    Args:
        scan: the folder.
        found: its totals, if they are known; they are read otherwise.

    Forces are nats of a group's mean log-probability a token (or of what is watched, in its unit), per unit learning rate.
    """
    found = totals(scan) if found is None else found
    per = {name: 1 / max(1, n) for name, n in scan.tokens_of.items()}
    groups = [_group(scan, name, of, per[name]) for name, of in found.items()]
    return assemble(
        "scan.html.jinja", STYLES, (), {}, _prose(scan, found, per) | {"groups": groups, "best": BEST, "watched": scan.watched}
    )


def write(scan: Scan, found: Mapping[str, Totals] | None = None) -> Path:
    """Write the page into the scan's folder and say where it is."""
    path = scan.path / "report.html"
    replace(path, render(scan, found).encode())
    return path


def listings(scan: Scan, found: Mapping[str, Totals]) -> list[Any]:
    """The findings and the worst and best rows and tokens of every group, for a terminal (rich)."""
    made: list[Any] = [f"{finding['title']}. {finding['text']}" for finding in findings(scan, found)]
    for name, of in found.items():
        per = 1 / max(1, scan.tokens_of[name])
        for what, rows, tokens in (("hurt", of.rows.worst, of.tokens.worst), ("help", of.rows.best, of.tokens.best)):
            table = Listing(f"What {what}s {spaced(name)} most", ("where", "force", "token"), (1,))
            for entry in rows[:SHOWN]:
                table.add_row(f"row {entry['row'] + 1}{times(entry)}", signed(entry["force"] * per), "")
            for entry in tokens[:SHOWN]:
                place = f"row {entry['row'] + 1}{times(entry)} {entry['role']} @{entry['position']}"
                text = f"{visible(entry['before'][-24:])}[{visible(entry['token'])}]"
                table.add_row(place, signed(entry["force"] * per), text)
            made.append(table)
    return made


def findings(scan: Scan, found: Mapping[str, Totals]) -> list[dict[str, str]]:
    """What a reader should know first of each group, in whole sentences with their numbers."""
    made = []
    for name, of in found.items():
        if not of.whole.tokens:
            continue
        per = 1 / max(1, scan.tokens_of[name])
        change, left = of.whole.force * per, abs(of.whole.force) / of.whole.size if of.whole.size else 0.0
        verb = "lift" if change > 0 else "push down"
        lost = _share_of(of.row_forces, 0.1)
        made.append({
            "title": f"All rows together {verb} {spaced(name)}",
            "text": f"Mean {scan.watched['label']} of a token {signed(change)} {scan.watched['unit']} per unit learning rate, "
            "every row counted once; "
            f"{of.hurting:.0%} of the rows pull it down. Of the tokens' forces {left:.1%} is left when they are added up. The "
            f"tenth of the rows that hurts most makes up {lost:.0%} of all that pulls down.",
        })  # fmt: skip
    return made


def times(entry: Mapping[str, Any]) -> str:
    """How often the same text is there, where it is more than once: " ×3"."""
    return f" ×{entry['times']}" if entry["times"] > 1 else ""


def spaced(name: str) -> str:
    """A kind of answer as a reader writes it: "irr train"."""
    return name.replace("_", " ")


def _share_of(forces: np.ndarray, worst: float) -> float:
    """How much of all negative force the worst share of rows has."""
    negative = -np.sort(forces[forces < 0])
    total = float(negative[::-1].sum()) if len(negative) else 0.0
    k = max(1, int(worst * len(forces)))
    return float(np.sort(negative)[::-1][:k].sum()) / total if total else 0.0


def _group(scan: Scan, name: str, of: Totals, per: float) -> dict[str, Any]:
    """One group's section."""
    places = {_bin(edge): of.places[edge] for edge in EDGES if edge in of.places}
    return {
        "name": name,
        "title": spaced(name),
        "tokens": scan.tokens_of[name],
        "change": signed(of.whole.force * per),
        "cancel": [
            ("all tokens, sizes added", show(of.whole.size * per), 1.0),
            ("after tokens behind the same text cancel", show(of.net * per), of.net / of.whole.size if of.whole.size else 0.0),
            ("after the tokens of a row", show(of.row_size * per), of.row_size / of.whole.size if of.whole.size else 0.0),
            ("after all rows", show(abs(of.whole.force) * per), abs(of.whole.force) / of.whole.size if of.whole.size else 0.0),
        ],
        "histogram": _histogram(of.row_forces * per),
        "shares": [
            ("by role", _shares(of.roles, per)),
            ("by shared text", _shares(of.prefix, per)),
            ("by place in the answer", _shares(places, per)),
            *([("by what moves", _shares(_largest(of.parts), per))] if of.parts else []),
        ],
        "rows": _ends(of.rows, per, scan),
        "token_ends": _ends(of.tokens, per, scan),
        "vocabulary": _ends(of.vocabulary, per, scan),
    }


def _largest(parts: Mapping[str, Share]) -> dict[str, Share]:
    """At most PARTS of the parts, those of the largest size, in their order; what the others do is one more."""
    kept = sorted(parts, key=lambda name: -parts[name].size)[:PARTS]
    found, rest = {name: part for name, part in parts.items() if name in kept}, Share()
    for part in (part for name, part in parts.items() if name not in kept):
        rest = Share(part.tokens, rest.force + part.force, rest.size + part.size)
    return found if len(found) == len(parts) else found | {f"{len(parts) - len(found)} others": rest}


def _bin(edge: int) -> str:
    later = [other for other in EDGES if other > edge]
    return f"{edge} and later" if not later else str(edge) if later[0] == edge + 1 else f"{edge} to {later[0] - 1}"


def _shares(parts: Mapping[str, Share], per: float) -> list[dict[str, Any]]:
    """Bars of parts of the tokens: Σ F, and how much of it is left of Σ |F|."""
    largest = max((abs(part.force) for part in parts.values()), default=0.0) or 1.0
    return [
        {
            "name": spaced(name), "tokens": f"{part.tokens:,}", "force": signed(part.force * per), "up": part.force > 0,
            "width": f"{100 * abs(part.force) / largest:.1f}", "each": signed(part.force / max(1, part.tokens) * per),
            "left": f"{abs(part.force) / part.size:.0%}" if part.size else "–",
        }
        for name, part in parts.items()
    ]  # fmt: skip


def _histogram(forces: np.ndarray) -> dict[str, Any] | None:
    """Rows by their force: bars between the 0.5th and the 99.5th percentile, what is beyond them in the outermost ones."""
    if not len(forces):
        return None
    low, high = np.percentile(forces, [0.5, 99.5])
    reach = max(abs(low), abs(high)) or 1.0
    counts, edges = np.histogram(np.clip(forces, -reach, reach), BARS, (-reach, reach))
    bars = [
        {"x": i, "height": f"{100 * n / max(counts.max(), 1):.1f}", "up": edges[i] >= 0,
         "says": f"{n:,} rows from {show(edges[i])} to {show(edges[i + 1])}"}
        for i, n in enumerate(counts.tolist())
    ]  # fmt: skip
    return {"bars": bars, "low": show(-reach), "high": show(reach), "count": BARS, "rows": f"{len(forces):,}"}


def _ends(ends: Ends, per: float, scan: Scan) -> list[tuple[str, list[dict[str, Any]]]]:
    return [
        ("hurt most", [_entry(e, per, scan) for e in ends.worst]),
        ("help most", [_entry(e, per, scan) for e in ends.best]),
    ]


def _entry(entry: Mapping[str, Any], per: float, scan: Scan) -> dict[str, Any]:
    """A row, a token or a vocabulary entry as the page shows it."""
    made: dict[str, Any] = dict(entry) | {"force": signed(entry["force"] * per), "up": entry["force"] > 0}
    if "token" in entry:
        made["token"] = visible(entry["token"])
    if "prompt" in entry:
        made["prompt"] = " ".join((entry["prompt"] or "").split())
    if "net" in entry:
        made["left"] = f"{abs(entry['force']) / entry['size']:.0%}" if entry["size"] else "–"
    if "c" in entry:
        made |= {"c": signed(entry["c"]), "log_prob": show(entry["log_prob"])}
    if "row" in entry:
        page = Path(PROFILES) / f"row-{entry['row'] + 1:07d}" / "report.html"
        there = page.as_posix() if (scan.path / page).exists() else None
        made |= {"number": f"{entry['row'] + 1:,}{times(entry)}", "profile": there,
                 "command": f"tokdyn profile --scan {scan.path} --row {entry['row'] + 1}"}  # fmt: skip
    return made


def _prose(scan: Scan, found: Mapping[str, Totals], per: Mapping[str, float]) -> dict[str, Any]:
    """The words of the page."""
    about = scan.about
    objective = about.get("objective") or {}
    arguments = ", ".join(f"{key} = {show(value)}" for key, value in (objective.get("arguments") or {}).items())
    done = [len(of.row_forces) for of in found.values()]
    rows = max(done, default=0)
    model = (about.get("model") or {}).get("name") or "a model"
    size = scan.size
    return {
        "version": about.get("tokdyn", ""),
        "status": "complete" if scan.complete else "partial",
        "missing": len(scan.missing),
        "title": f"{rows:,} rows by {objective.get('name', 'a loss')}: what each does to {len(found)} groups of answers",
        "model": model,
        "details": [
            item
            for item in (
                f"{model}, {count((about.get('model') or {}).get('parameters'), 'parameter')}",
                f"{objective.get('name')}{f' ({arguments})' if arguments else ''}",
                f"{rows:,} of {size:,} rows" if size else f"{rows:,} rows",
                f"{sum(of.whole.tokens for of in list(found.values())[:1]):,} tokens",
                day(about.get("created")),
            )
            if item
        ],
        "findings": findings(scan, found),
        "example": f"tokdyn profile --scan {scan.path} --row 1",
        "tables": [
            {"title": title, "rows": facts(values)}
            for title, values in (
                ("Settings", about.get("settings")),
                ("Groups, tokens", {group["name"]: group["tokens"] for group in about.get("groups", [])}),
                (
                    "Data",
                    {str(n + 1): each.get("path") or each.get("fingerprint") for n, each in enumerate(about.get("data", []))},
                ),
                ("Versions", about.get("versions")),
            )
            if values
        ],
    }
