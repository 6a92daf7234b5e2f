"""A run of bench() as a page of Markdown and as tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..runs.table import Listing

COLUMNS = ("case", "side", "median ms", "least-most ms", "GB/s", "TFLOP/s", "% of floor", "peak MiB", "differs by")


def lines(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The table of rows as text, in the order of COLUMNS."""
    for row in found["rows"]:
        sizes = " ".join(f"{name}={size}" for name, size in row["sizes"].items())
        start = (f"{row['case']} {row['dtype']} {sizes}", row["side"])
        if not row["ran"]:
            yield *start, "did not run: " + row["why"], *[""] * (len(COLUMNS) - 3)
            continue
        peak = f"{row['peak_mib']:.1f}" if "peak_mib" in row else row.get("memory_why", "")
        if "low_ms" not in row:  # a case for memory alone: one run
            yield *start, number(row.get("median_ms")), "once", "", "", "", peak, ""
            continue
        differs = "" if row["differs"] is None else f"{row['differs']:.1e}"
        yield (
            *start, number(row["median_ms"]), f"{number(row['low_ms'])}-{number(row['high_ms'])}", number(row["gb_per_s"]),
            number(row["tflop_per_s"]), f"{100 * row['floor_share']:.0f}", peak, differs,
        )  # fmt: skip


def number(x: float | None) -> str:
    """Format with three significant digits, none behind the point from 100 on; "" for None."""
    return "" if x is None else f"{x:.3g}" if x < 100 else f"{x:.0f}"


def verdicts(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The bars as rows of text: case, side, bar, value, and whether it is met."""
    for bar in found["bars"]:
        met = {True: "met", False: "missed", None: "not measured"}[bar["met"]]
        yield f"{bar['case']} {bar['dtype']}", bar["side"], bar["bar"], number(bar["value"]), met


def heading(found: dict[str, Any]) -> list[str]:
    """Lines that name the machine, its floors, the date and the versions."""
    about = found["machine"]
    place = about["gpu"] or f"{about['processor']}, {about['threads']} threads"
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    part = dict(floors=found["floors"], load=about.get("load"))
    parts = [f"Floor, measured in this run: {_floor(part, about['gpu'])}."]
    if "parts" in found:  # several runs: bench.join
        parts = [f"Floor, measured in the run of {', '.join(p['ops'])}: {_floor(p, about['gpu'])}." for p in found["parts"]]
    units = {True: "with", False: "without", None: ""}[None if about["gpu"] else about.get("bfloat16_matrix_units")]
    place += f" {units} bfloat16 matrix units" if units else ""
    return [f"{place}; {about['system']}; {found['date']}.", *parts, f"{packages}."]


def _floor(part: dict[str, Any], gpu: str | None) -> str:
    limits, load = part["floors"], "" if part["load"] is None else f" (load {part['load']} at the start)"
    rates = ", ".join(f"{rate:.3g} TFLOP/s in {dtype}" for dtype, rate in limits["tflop_per_s"].items())
    return f"{limits['gb_per_s']:.3g} GB/s {'copied' if gpu else 'read'}, {rates}{load}"


def markdown(found: dict[str, Any]) -> str:
    """The run as a page of Markdown: machine, rows and bars."""
    settings = found["settings"]
    quick = " Small sizes: nothing here says how fast it is." if settings["quick"] else ""
    rounds = max(part["rounds"] for part in found.get("parts", [settings]))
    page = [f"# tokdyn bench on {settings['device']}", "", "  \n".join(heading(found)), ""]
    page += [f"Median of up to {rounds} rounds in which the sides take turns; peak memory beyond the inputs.{quick}", ""]
    page += _table(COLUMNS, lines(found))
    if found["bars"]:
        page += ["", "## Held against", "", *_table(("case", "side", "bar", "value", ""), verdicts(found))]
    return "\n".join(page) + "\n"


def _table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    table = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return table + ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]


def tables(found: dict[str, Any]) -> Iterator[Any]:
    """The run for a terminal: a table for each case, then the bars."""
    case, current = "", Listing("", ())
    for cells in lines(found):
        if cells[0] != case:
            if case:
                yield current
            columns = ("side", "ms", "least-most", "rate", "% floor", "peak MiB", "differs by")
            case, current = cells[0], Listing(cells[0], columns, range(1, 5))
        _, side, ms, between, bandwidth, rate, share, peak, differs = cells
        if ms.startswith("did not run"):
            current.add_row(side, "-", "", "", "", "", ms)
        else:
            speed = f"{rate} TFLOP/s" if rate else f"{bandwidth} GB/s" if bandwidth else ""
            current.add_row(side, ms, between, speed, share, peak, differs)
    if case:
        yield current
    if found["bars"]:
        bars = Listing("held against", ("case", "side", "bar", "value", ""), (3,))
        for row in verdicts(found):
            bars.add_row(*row)
        yield bars
