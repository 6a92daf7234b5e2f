"""What to leave out of a data set, by its scan: weights of tokens or a filter of rows, written back as the user's own rows.

    td.scan.weights("runs/scan", "tokens", on="chosen", share=0.1, out="weighted.jsonl")

The rows that were scanned come out as they are, with a column more: `keep` (rule "rows"), by which a Trainer's data set is
filtered; or `token_weights` (rule "tokens"), one a scored token for each sequence of the row, {"chosen": [1.0, …], "rejected":
[0.0, …]}, which `interventions.loss(weights=…)` takes one after the other (`flat`).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._rows import Source, source
from ..runs.scans import Scan

Rule = str | Callable[[np.ndarray], np.ndarray]
RULES = ("tokens", "rows")


def weights(
    folder: str | Path,
    rule: Rule = "tokens",
    *,
    on: str | Mapping[str, float],
    share: float = 0.1,
    scale: float = 0.0,
    data: Any = None,
    out: str | Path | None = None,
) -> dict[int, dict[str, list[float]]] | dict[int, bool]:
    """Weights that spare the tokens, or leave out the rows, whose exact force on a group is worst.

    Args:
        folder: of the scan; it must be whole.
        rule: "tokens": weight `scale` for the tokens of the most negative forces, at most a share of all; "rows": the share of
            rows of the most negative forces is not kept; or a function of all tokens' forces [L] to their weights [L].
        on: the group to protect, or groups with how much each counts, per token of it.
        share: at most so much of all tokens or rows; only what is negative.
        scale: what is left of a token's gradient.
        data: the rows that were scanned, where they were not files, or the files have moved.
        out: a .jsonl or .parquet file to write the rows to, with the column; it is whole or not there.

    Returns:
        By number of the row: whether it is kept; or for each sequence of it ("chosen", "rejected"; "response", "response 2", …)
        its weights, one a scored token. Rows without tokens are kept, and have no weights.

    Raises:
        ValueError: the scan is not whole, an unknown group or rule, share or scale outside [0, 1], other data.
        FileExistsError: out is there.

    Cost: reads the scan's tables once; memory for two numbers a token.
    """
    scan = Scan(folder)
    _check(scan, rule, share, scale)
    groups = _groups(scan, on)
    table = None if out is None else _data(scan, data)
    found: dict[int, Any] = _rows(scan, groups, share) if rule == "rows" else _tokens(scan, groups, rule, share, scale)
    if out is not None and table is not None:
        column = "keep" if rule == "rows" else "token_weights"
        _write(Path(out), column, _labelled(table, found, scan))
    return found


def flat(weights: Mapping[str, list[float]]) -> list[float]:
    """The weights of a row's tokens one after the other, sequence by sequence, as `interventions.loss` takes them."""
    return [w for each in weights.values() for w in each]


def _check(scan: Scan, rule: Rule, share: float, scale: float) -> None:
    if not scan.complete:
        raise ValueError(f"{scan.path} is not whole, {len(scan.missing)} blocks are missing: go on with --resume first")
    if not callable(rule) and rule not in RULES:
        raise ValueError(f'rule must be "tokens", "rows" or a function of the forces, got {rule!r}')
    for name, value in (("share", share), ("scale", scale)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")


def _groups(scan: Scan, on: str | Mapping[str, float]) -> dict[str, float]:
    """How much the force on each group counts: per token of it."""
    asked = {on: 1.0} if isinstance(on, str) else dict(on)
    if unknown := [name for name in asked if name not in scan.groups]:
        raise ValueError(f"the scan has no group {unknown[0]!r}: it has {', '.join(scan.groups)}")
    return {name: w / max(1, scan.tokens_of[name]) for name, w in asked.items()}


def _force(table: Any, groups: Mapping[str, float]) -> np.ndarray:
    """The weighted force of a table's lines, NaN where a row has none."""
    total = np.zeros(table.num_rows)
    for name, w in groups.items():
        total = total + w * np.asarray(table[f"force_{name}"].to_numpy(), dtype=np.float64)
    return total


def spared(forces: np.ndarray, share: float) -> np.ndarray:
    """Which of these are the most negative, at most a share of all; of equal ones the first."""
    worst = np.argsort(forces, kind="stable")[: int(share * len(forces))]
    mask = np.zeros(len(forces), bool)
    mask[worst[forces[worst] < 0]] = True
    return mask


def _rows(scan: Scan, groups: Mapping[str, float], share: float) -> dict[int, bool]:
    table = scan.rows(["row", *(f"force_{name}" for name in groups)])
    forces = np.nan_to_num(_force(table, groups))
    return dict(zip(table["row"].to_pylist(), (~spared(forces, share)).tolist(), strict=True))


def _tokens(
    scan: Scan, groups: Mapping[str, float], rule: Rule, share: float, scale: float
) -> dict[int, dict[str, list[float]]]:
    columns = [f"force_{name}" for name in groups]
    forces = np.concatenate([_force(part, groups) for part in scan.each(columns=columns)])
    if callable(rule):
        w = np.asarray(rule(forces), dtype=np.float64)
        if w.shape != forces.shape:
            raise ValueError(f"rule must return [L]=({len(forces)},) weights, one a token, got {list(w.shape)}")
    else:
        w = np.where(spared(forces, share), scale, 1.0)
    found: dict[int, dict[str, list[float]]] = {}
    start = 0
    for part in scan.each(columns=["row", "sequence", "role"]):
        lines = zip(part["row"].to_pylist(), part["sequence"].to_pylist(), part["role"].to_pylist(), strict=True)
        for (row, sequence, role), weight in zip(lines, w[start : start + part.num_rows].tolist(), strict=True):
            of_row = found.setdefault(row, {})
            name = role if sequence == 0 or role not in ("response", "") else f"{role} {sequence + 1}"
            of_row.setdefault(name, []).append(weight)
        start += part.num_rows
    return found


# ---------------------------------------------------------------- the user's rows


def _data(scan: Scan, data: Any) -> Source:
    """The rows that were scanned."""
    recorded = scan.about["data"]
    if data is None:
        paths = [each.get("path") for each in recorded]
        if not all(paths):
            raise ValueError("the rows of this scan were no files: give them again (data=)")
        data = paths
    table = source(data, scan.about["settings"]["limit"])
    same = [each.get("sha256") or each.get("fingerprint") for each in table.about]
    if same != [each.get("sha256") or each.get("fingerprint") for each in recorded]:
        raise ValueError("these are not the rows that were scanned: their checksums differ")
    return table


def _labelled(table: Source, found: Mapping[int, Any], scan: Scan) -> Iterator[tuple[Any, Any]]:
    """Every row with its label; None where it has none (a row without tokens, under the rule for tokens)."""
    n, step = 0, int(scan.about["settings"]["block"])
    while places := table.read(n, n + step):
        for i, (where, row) in enumerate(places):
            if not isinstance(row, Mapping):
                raise ValueError(f"{where} is no object, so it cannot have a column more: leave it out of the data")
            yield dict(row), found.get(n + i)
        n += len(places)


def _write(out: Path, column: str, rows: Iterator[tuple[Any, Any]]) -> None:
    if out.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{out} must end in .jsonl or .parquet")
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose another place")
    handle, part = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    try:
        if out.suffix == ".jsonl":
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row | {column: label}, ensure_ascii=False) + "\n" for row, label in rows)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            os.close(handle)
            pq.write_table(pa.Table.from_pylist([row | {column: label} for row, label in rows]), part)
        os.chmod(part, 0o644)
        os.replace(part, out)
    except BaseException:
        os.unlink(part)
        raise
