"""A run in the terminal: what moved, who moved it, and whether the prediction held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .by_sequence import BySequence
from .findings import shown
from .table import Listing

MOVERS = 5  # tokens that are listed
COLUMNS = 8  # updated sequences that a terminal has room for


def summary(about: Mapping[str, Any], tokens: Any, matrix: Tensor | None) -> Any:
    """A rich renderable with the step by answer, the tokens that move most, who moves them, the findings, and the checks.

    Args:
        about: run.json.
        tokens: the token table (pyarrow).
        matrix: F [M, L] or None; what needs it is left out where it is not complete.
    """
    from rich.console import Group
    from rich.text import Text

    run, eta = BySequence.of(tokens, matrix), about["settings"]["eta"]
    constants = ", ".join(f"{k}={v}" for k, v in about["objective"]["arguments"].items())
    parts: list[Any] = [
        Text.assemble(
            (f"{about['objective']['name']}({constants})", "bold"),
            f" on {about['model']['name']}, {len(run.updated)} update tokens, {len(run.observed)} observed tokens, "
            f"step eta = {eta:.3g}",
        )
    ]
    if about["status"] != "complete":
        parts.append(Text("Interrupted: the force matrix is not complete.", style="bold yellow"))
    parts += ["", _answers(run, eta), "", _movers(run, eta), ""]
    for finding in about["findings"]:
        parts.append(Text.assemble(("• ", "cyan"), (finding["title"] + ". ", "bold"), finding["text"]))
    parts.append("")
    checks = [f"{name} {value:.1e}" for name, value in about["checks"].items()]
    parts.append(Text("Checks: " + "; ".join(checks) + f". {sum(about['seconds'].values()):.1f} s.", style="dim"))
    return Group(*parts)


def _answers(run: BySequence, eta: float) -> Any:
    """Change of each observed sequence, and what each updated one contributes to it."""
    updated = [name for (side, _), name in run.names.items() if side == "updated"]
    forces = run.forces() if run.matrix is not None and len(updated) <= COLUMNS else {}
    columns = ["answer", "tokens", "predicted", "actual", *(f"by {name}" for name in updated if forces)]
    table = Listing("Change of each answer, nats", columns, range(1, len(columns)), range(4, len(columns)))
    for name, change in run.changes().items():
        cells = [name, str(int(change["tokens"])), f"{change['predicted']:+.4f}", f"{change['actual']:+.4f}"]
        table.add_row(*cells, *(f"{eta * force:+.4f}" for force in forces.get(name, {}).values()))
    return table


def _movers(run: BySequence, eta: float) -> Any:
    """The observed tokens that move most, the update token behind each, and what rises and falls in their places."""
    by = ["moved most by"] if run.matrix is not None else []
    columns = ["token", "of", "predicted", "actual", *by, "rising at that place", "falling at that place"]
    table = Listing("The tokens that move most", columns, (2, 3))
    for row in sorted(run.observed, key=lambda row: -abs(row["actual"]))[:MOVERS]:
        cells = [
            shown(row["token"]),
            f"{run.name(row)} @{row['position']}",
            f"{row['predicted']:+.4f}",
            f"{row['actual']:+.4f}",
        ]
        if run.matrix is not None:
            force = run.matrix[row["row"]]
            mover = run.updated[int(force.abs().argmax())]
            by_it = eta * float(force[mover["row"]])
            cells.append(f"{shown(mover['token'])} {run.name(mover)} @{mover['position']} ({by_it:+.4f})")
        for key in ("risers", "fallers"):
            cells.append(" ".join(shown(entry["token"]) for entry in row[key][:3]))
        table.add_row(*cells)
    return table
