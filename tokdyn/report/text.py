"""Values as a reader writes them, and as the page's script reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from datetime import date, datetime
from typing import Any

import numpy as np

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def facts(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return nested mappings as (dotted name, text) rows."""
    rows: list[tuple[str, str]] = []
    for key, value in (values or {}).items():
        label = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows += facts(value, f"{label} · ")
        elif value is not None:
            rows.append((label, show(value)))
    return rows


def show(value: Any) -> str:
    """Return a value as a reader would write it."""
    value = plain(value)
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        digits, _, power = f"{value:.3g}".replace("-", "\N{MINUS SIGN}").partition("e")
        return f"{digits}×10{str(int(power.replace('−', '-'))).translate(SUPERSCRIPT)}" if power else digits
    if isinstance(value, list | tuple):
        return ", ".join(show(item) for item in value)
    return str(value)


def signed(value: float) -> str:
    """Return a number as `show` does, with its sign in front."""
    return ("+" if value > 0 else "") + show(float(value))


def count(number: Any, noun: str) -> str:
    """Return 5,482,240 parameters as "5.48 M parameters"."""
    if not isinstance(number, int | float):
        return ""
    for size, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter} {noun}s"
    return f"{number} {noun}{'' if number == 1 else 's'}"


def day(created: Any) -> str:
    """Return an ISO time as "2026-07-14 09:30"; anything else as it came."""
    if isinstance(created, datetime | date):
        created = created.isoformat()
    try:
        return datetime.fromisoformat(str(created)).strftime("%Y-%m-%d %H:%M") if created else ""
    except ValueError:
        return str(created)


def plain(value: Any) -> Any:
    """Return a value that JSON can hold: six digits for floats, None for NaN and infinities."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str) or not isinstance(value, Iterable):
        return value if isinstance(value, str | int | None) else str(value)
    return [plain(item) for item in value]


def to_json(payload: Any) -> str:
    """Return JSON that is inert inside <script>: ASCII only, and none of < > & in the clear."""
    text = json.dumps(plain(payload), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
