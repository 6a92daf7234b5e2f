"""A run in the terminal: what moved, who moved it, and whether the prediction held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .by_sequence import BySequence
from .findings import shown

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
    from rich.table import Table

    table = Table(title="Change of each answer, nats", title_justify="left", box=None, pad_edge=False)
    for name in ("answer", "tokens", "predicted", "actual"):
        table.add_column(name, justify="left" if name == "answer" else "right")
    updated = [name for (side, _), name in run.names.items() if side == "updated"]
    forces = run.forces() if run.matrix is not None and len(updated) <= COLUMNS else {}
    for name in updated if forces else ():
        table.add_column(f"by {name}", justify="right", style="dim")
    for name, change in run.changes().items():
        cells = [name, str(int(change["tokens"])), f"{change['predicted']:+.4f}", f"{change['actual']:+.4f}"]
        table.add_row(*cells, *(f"{eta * force:+.4f}" for force in forces.get(name, {}).values()))
    return table


def _movers(run: BySequence, eta: float) -> Any:
    """The observed tokens that move most, the update token behind each, and what rises and falls in their places."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="The tokens that move most", title_justify="left", box=None, pad_edge=False)
    for name in ("token", "of", "predicted", "actual"):
        table.add_column(name, justify="right" if name in ("predicted", "actual") else "left")
    if run.matrix is not None:
        table.add_column("moved most by")
    table.add_column("rising at that place")
    table.add_column("falling at that place")
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
        table.add_row(*(Text(cell) for cell in cells))  # a token may look like markup
    return table
