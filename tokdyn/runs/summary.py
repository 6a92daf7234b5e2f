"""A run in the terminal: what moved, who moved it, and whether the prediction held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .findings import blocks, by_sequence, sequence_names, shown

if TYPE_CHECKING:
    from ..profile import Run


def summary(run: Run) -> Any:
    """A rich renderable with the step by answer, the strongest token pairs, rising and falling tokens, and the checks."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    about = run.about
    rows = run.tokens.to_pylist()
    u = [row for row in rows if row["side"] == "updated"]
    o = [row for row in rows if row["side"] == "observed"]
    names = sequence_names(rows)
    eta = about["settings"]["eta"]
    constants = ", ".join(f"{k}={v}" for k, v in about["objective"]["arguments"].items())
    parts: list[Any] = [
        Text.assemble(
            (f"{about['objective']['name']}({constants})", "bold"),
            f" on {about['model']['name']}, {len(u)} update tokens, {len(o)} observed tokens, step eta = {eta:.3g}",
        )
    ]
    if about["status"] != "complete":
        parts.append(Text("Interrupted: the force matrix is not complete.", style="bold yellow"))

    whole = run.matrix is not None and not bool(run.matrix.isnan().any())
    table = Table(title="Change of each answer, nats", title_justify="left", box=None, pad_edge=False)
    columns = [name for (side, _), name in names.items() if side == "updated"]
    for name in ("answer", "tokens", "predicted", "actual"):
        table.add_column(name, justify="left" if name == "answer" else "right")
    by = blocks(o, u, run.matrix, names) if whole and run.matrix is not None and len(columns) <= 8 else None
    for name in columns if by else ():
        table.add_column(f"by {name}", justify="right", style="dim")
    for name, sums in by_sequence(o, names).items():
        cells = [name, str(int(sums["tokens"])), f"{sums['predicted']:+.4f}", f"{sums['actual']:+.4f}"]
        table.add_row(*cells, *([f"{eta * by[name][column]:+.4f}" for column in columns] if by else []))
    parts += ["", table]

    moved = sorted(o, key=lambda row: -abs(row["actual"]))[:5]
    table = Table(title="The tokens that move most", title_justify="left", box=None, pad_edge=False)
    for name in ("token", "of", "predicted", "actual"):
        table.add_column(name, justify="right" if name in ("predicted", "actual") else "left")
    if whole:
        table.add_column("moved most by")
    table.add_column("rising at that place")
    table.add_column("falling at that place")
    for row in moved:
        cells = [
            shown(row["token"]),
            f"{names['observed', row['sequence']]} @{row['position']}",
            f"{row['predicted']:+.4f}",
            f"{row['actual']:+.4f}",
        ]
        if whole and run.matrix is not None:
            force = run.matrix[row["row"]]
            mover = u[int(force.abs().argmax())]
            by_it = eta * float(force[mover["row"]])
            cells.append(f"{shown(mover['token'])} {names['updated', mover['sequence']]} @{mover['position']} ({by_it:+.4f})")
        for key in ("risers", "fallers"):
            cells.append(" ".join(shown(entry["token"]) for entry in row[key][:3]))
        table.add_row(*(Text(cell) for cell in cells))  # a token may look like markup
    parts += ["", table, ""]

    for finding in about["findings"]:
        parts.append(Text.assemble(("• ", "cyan"), (finding["title"] + ". ", "bold"), finding["text"]))
    parts.append("")
    checks = [f"{name} {value:.1e}" for name, value in about["checks"].items()]
    parts.append(Text("Checks: " + "; ".join(checks) + f". {sum(about['seconds'].values()):.1f} s.", style="dim"))
    return Group(*parts)
