"""A run as one self-contained HTML page.

Python prepares three things: the prose that must be readable without scripts (header, findings, footer), one JSON block
with the token tables, and the force matrix as base64 float32. static/*.js draws the rest in the browser. The page carries
a Content-Security-Policy that forbids every request and every script but its own, so text out of a model stays text.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..runs.by_sequence import block_sums, sequence_names
from ..runs.cards import Cards
from ..runs.explain import sums
from ..runs.pairs import Pairs
from ..runs.watched import watched
from .net import contexts_of, headline, net_sums, strongest
from .text import count, day, facts, plain, show, to_json

if TYPE_CHECKING:
    import pyarrow as pa

SIDES = ("observed", "updated")
# Column of `tokens` -> kept for which side. `sequence`, `group` and `role` live in the sequence list instead.
COLUMNS = {
    "position": SIDES,
    "token_id": SIDES,
    "context": SIDES,
    "token": SIDES,
    "log_prob": SIDES,
    "entropy": SIDES,
    "g_norm": SIDES,
    "collision": SIDES,
    "rank": SIDES,
    "argmax_token": SIDES,
    "argmax_log_prob": SIDES,
    "c": ("updated",),
    "p_target_after": ("updated",),
    "p_argmax_after": ("updated",),
    "mass_to_argmax": ("updated",),
    "falling_share": ("updated",),
    "force": ("observed",),
    "predicted": ("observed",),
    "actual": ("observed",),
    "risers": ("observed",),
    "fallers": ("observed",),
}
STYLES = ("page.css",)
SCRIPTS = (  # read in this order inside one function scope
    "format.js",
    "data.js",
    "colour.js",
    "store.js",
    "tip.js",
    "svg.js",
    "export.js",
    "export_run.js",
    "text.js",
    "card.js",
    "inspector.js",
    "painter.js",
    "map_grid.js",
    "heatmap.js",
    "bars.js",
    "scatter.js",
    "vocabulary.js",
    "squeeze.js",
    "main.js",
)
CARDS = 300  # strongest net forces whose card is on the page, about 1 kB each
MATRIX_CELLS = 6_000_000  # 24 MB of float32; a larger matrix is shown by its block sums and each token's strongest partners


def render(about: Mapping[str, Any], tokens: pa.Table, matrix: np.ndarray | None, pairs: Pairs | None = None) -> str:
    """Return the report of one run as one HTML document that needs nothing but a browser.

    Args:
        about: run.json. Every key may be absent; what is absent is left out of the page.
        tokens: tokens.parquet: one row per token of each side, `row` being its index on the matrix axis of that side.
        matrix: F [M, L] in nats per unit learning rate, NaN where a partial run has not computed it; None if not kept.
            Embedded bit for bit as float32 up to 6 million cells; above, sums over sequence blocks and the strongest net
            partners of each token.

        pairs: the pairs that the run keeps; the cards of the CARDS strongest net ones are shown.

    Raises:
        ValueError: if `tokens` lacks a column that places tokens, or `matrix` does not have shape [M, L].

    Cost: reads each input once; the page takes about 5.4 bytes per matrix cell and 0.5 kB per token, plus 100 kB.
    """
    sides = {side: _side(about, tokens, side) for side in SIDES}
    M, L = (len(sides[side]["columns"]["token"]) for side in SIDES)
    if matrix is not None:
        matrix = np.require(matrix, "<f4", ["C", "W"])
        if matrix.shape != (M, L):
            raise ValueError(f"matrix must have shape [M, L]=({M}, {L}) to match tokens, got {matrix.shape}")
    contexts = contexts_of(sides)
    fits = matrix is None or matrix.size <= MATRIX_CELLS
    payload = {
        "eta": _eta(about),
        "watched": watched(about),
        "cards": _cards(about, tokens, matrix, pairs),
        "status": about.get("status"),
        "verify": about.get("verify"),
        "observed": sides["observed"],
        "updated": sides["updated"],
        "contexts": contexts,
        "net": None if matrix is None else net_sums(matrix, contexts, sides["observed"]["sequences"]),
        "headline": None if matrix is None else headline(matrix, contexts),
        "partners": None if matrix is None or fits else strongest(matrix, contexts),
        "matrix": _packed(matrix),
        "blocks": _blocks(matrix, sides["observed"]["sequences"], sides["updated"]["sequences"]),
    }
    return assemble("page.html.jinja", STYLES, SCRIPTS, payload, _prose(about, sides, matrix))


def assemble(
    template: str, styles: Iterable[str], scripts: Iterable[str], payload: Mapping[str, Any], prose: Mapping[str, Any]
) -> str:
    """Return a template with its styles, its one script (hashed for the policy), its data and its words filled in."""
    import jinja2
    from markupsafe import Markup

    folder = files(__package__)
    style = "\n".join(folder.joinpath("static", name).read_text("utf-8") for name in styles)
    script = "\n".join(folder.joinpath("static", name).read_text("utf-8") for name in scripts)
    script = f'(() => {{\n"use strict";\n{script}\n}})();'
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(folder.joinpath(template).read_text("utf-8")).render(
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        payload=Markup(to_json(payload)),
        **prose,
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate in run.json must not stop the file


def _side(about: Mapping[str, Any], tokens: pa.Table, side: str) -> dict[str, Any]:
    """Return {"columns": {name: list}, "sequences": [...]} of one side, in the order of the matrix axis."""
    import pyarrow.compute as pc

    missing = {"side", "row", "sequence", "token"} - set(tokens.column_names)
    if missing:
        raise ValueError(f"tokens lacks the columns {sorted(missing)}")
    table = tokens.filter(pc.equal(tokens.column("side").cast("string"), side)).sort_by("row")
    columns = {
        name: [plain(value) for value in table.column(name).to_pylist()]
        for name, of in COLUMNS.items()
        if side in of and name in table.column_names
    }
    columns["token"] = ["" if text is None else text for text in columns["token"]]
    for name in ("risers", "fallers"):
        if name in columns:
            columns[name] = [[[item["token"], item["delta"]] for item in items or []] for items in columns[name]]
    return {"columns": columns, "sequences": _sequences(about, table, side)}


def _sequences(about: Mapping[str, Any], table: pa.Table, side: str) -> list[dict[str, Any]]:
    """Return the sequences of one side as blocks [start, stop) of the matrix axis, with their names and texts."""
    recorded = {item.get("sequence"): item for item in about.get("sequences") or [] if item.get("side") == side}
    rows = table.select([name for name in ("sequence", "group", "role") if name in table.column_names]).to_pylist()
    found: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        if not found or rows[index - 1]["sequence"] != row["sequence"]:
            info = {**row, **recorded.get(row["sequence"], {})}
            found.append(
                {
                    "group": info.get("group"),
                    "role": str(info.get("role") or "response"),
                    "prompt": str(info.get("prompt") or ""),
                    "response": str(info.get("response") or ""),
                    "truncated": int(info.get("truncated") or 0),
                    "start": index,
                    "stop": index,
                }
            )
        found[-1]["stop"] = index + 1
    names = sequence_names((item["role"], item["group"]) for item in found)
    return [{"name": name, **item} for name, item in zip(names, found, strict=True)]


def _packed(matrix: np.ndarray | None) -> dict[str, Any] | None:
    """Return the matrix as base64 of little-endian float32 in row-major order, or None if absent or too large."""
    if matrix is None or matrix.size > MATRIX_CELLS:
        return None
    return {"shape": list(matrix.shape), "dtype": "<f4", "base64": base64.b64encode(matrix.tobytes()).decode()}


def _blocks(matrix: np.ndarray | None, rows: list[dict[str, Any]], columns: list[dict[str, Any]]) -> list[Any] | None:
    """Return the sums of F over (observed sequence, update sequence) blocks; None where a block holds a NaN."""
    if matrix is None:
        return None
    of_row, of_column = (
        torch.repeat_interleave(torch.tensor([item["stop"] - item["start"] for item in side], dtype=torch.long))
        for side in (rows, columns)
    )
    return plain(block_sums(torch.from_numpy(matrix), of_row, of_column).tolist())


def _cards(about: Mapping[str, Any], tokens: pa.Table, matrix: np.ndarray | None, pairs: Pairs | None) -> list[dict[str, Any]]:
    """Return the cards of the strongest net forces between different places: m, context, sentence, parts, kernel, texts."""
    if matrix is None or pairs is None:
        return []
    found = Cards(about, tokens, torch.from_numpy(matrix), pairs)
    if found.contexts.run.matrix is None:
        return []
    return [
        {
            "m": m,
            "x": x,
            "sentence": card.sentence,
            "layers": [[name, plain(force)] for name, force in sums(card.facts["parts"], 0).items()],
            "kinds": [[name, plain(force)] for name, force in sums(card.facts["parts"], 1).items()],
            "kernel": {name: plain(value) for name, value in card.facts["kernel"].items()},
            "texts": [card.facts["texts"]["observed"], card.facts["texts"]["updated"]],
            "prefix": card.facts["shared"]["prefix"],
        }
        for m, x, card in found.strongest_net(CARDS)
    ]


def _eta(about: Mapping[str, Any]) -> float | None:
    """Return the step size of the predictions: that of the verification, else that of the settings."""
    for source in ("verify", "settings"):
        eta = (about.get(source) or {}).get("eta")
        if isinstance(eta, int | float):
            return float(eta)
    return None


def _prose(about: Mapping[str, Any], sides: Mapping[str, Any], matrix: np.ndarray | None) -> dict[str, Any]:
    """Return the words and tables of the page that do not need a script."""
    model, data, objective, settings = (about.get(key) or {} for key in ("model", "data", "objective", "settings"))
    M, L = (len(sides[side]["columns"]["token"]) for side in SIDES)
    eta, name = _eta(about), objective.get("name") or "fine-tuning"
    arguments = ", ".join(f"{key} = {show(value)}" for key, value in (objective.get("arguments") or {}).items())
    shape = " × ".join(str(model[key]) for key in ("layers", "width") if model.get(key))
    details = (
        count(model.get("parameters"), "parameter"),
        shape and f"{shape} (layers × width)",
        model.get("vocabulary") and f"vocabulary {model['vocabulary']:,}",
        {True: "tied embeddings", False: "untied embeddings"}.get(model.get("tied")),  # type: ignore[arg-type]
        " on ".join(str(model[key]) for key in ("dtype", "device") if model.get(key)),
        arguments and f"{name}: {arguments}",
        settings.get("scope") and f"scope {settings['scope']}",
        settings.get("method") and f"method {settings['method']}",
        data.get("path") and f"{data.get('used', '?')} of {data.get('rows', '?')} rows of {PurePath(str(data['path'])).name}",
    )
    computed = None if matrix is None or not matrix.size else float(np.isfinite(matrix).mean())
    return {
        "watched": watched(about),
        "model": model.get("name") or "a model",
        "objective": name,
        "M": M,
        "L": L,
        "eta": None if eta is None else show(eta),
        "details": [str(item) for item in details if item],
        "status": about.get("status") or "complete",
        "created": day(about.get("created")),
        "version": about.get("tokdyn") or "",
        "findings": [
            {key: item.get(key) or "" for key in ("title", "text")} | {"address": _selection(item)}
            for item in about.get("findings") or []
            if item
        ],
        "computed": computed,
        "rows_done": None if matrix is None else int(np.isfinite(matrix).all(axis=1).sum()),
        "tables": [
            {"title": title, "rows": rows}
            for title, rows in (
                ("Settings", facts(settings)),
                ("Parameters covered", _coverage(about.get("coverage"))),
                ("Self-checks", facts(about.get("checks"))),
                ("Time, seconds", facts(about.get("seconds"))),
                ("Versions", facts({"tokdyn": about.get("tokdyn"), **(about.get("versions") or {})})),
            )
            if rows
        ],
        "cite": _cite(about, M, L),
    }


def _selection(finding: Mapping[str, Any]) -> str:
    """Return the part of the page's address that selects a finding's two tokens, "" where it names none."""
    address = str(finding.get("address"))
    return address if re.fullmatch(r"#m=\d+&l=\d+", address) else ""


def _cite(about: Mapping[str, Any], M: int, L: int) -> str:
    """Return one sentence that says what was measured, ready to paste under a figure."""
    settings, coverage = about.get("settings") or {}, about.get("coverage") or {}
    parts = [f"Token-level forces of one {(about.get('objective') or {}).get('name') or 'fine-tuning'} update"]
    parts.append(f"of {(about.get('model') or {}).get('name') or 'a model'}, {L:,} update × {M:,} observed tokens")
    if settings.get("scope"):
        parts.append(f"scope {settings['scope']}")
    if coverage:
        parts.append("parameters " + ", ".join(f"{key}: {value}" for key, value in _coverage(coverage)))
    if settings.get("method"):
        parts.append(f"method {settings['method']}")
    return f"{parts[0]} {', '.join(parts[1:])}; tokdyn {about.get('tokdyn') or ''}".rstrip() + "."


def _coverage(coverage: Any) -> list[tuple[str, str]]:
    """Return {parameter: its rule, or why it was left out} with a row for each rule or reason, and names of those left out."""
    names_by_rule: dict[str, list[str]] = {}
    for name, rule in (coverage or {}).items():
        if not isinstance(rule, str):
            return facts(coverage)
        names_by_rule.setdefault(rule, []).append(str(name))
    rows = []
    for rule, names in names_by_rule.items():
        absent = rule.startswith(("frozen", "outside", "one direction"))
        named = ": " + ", ".join(names[:6]) + (", …" if len(names) > 6 else "") if absent else ""
        rows.append((rule, f"{len(names):,} tensor{'' if len(names) == 1 else 's'}{named}"))
    return rows
