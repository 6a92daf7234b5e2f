"""A run in the terminal: what moved, who moved it, and whether the prediction held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._arguments import UNITS, check_view
from .by_sequence import BySequence, Row
from .contexts import Contexts
from .findings import shown
from .table import Listing
from .watched import is_log_prob, watched

MOVERS = 5  # tokens that are listed
COLUMNS = 8  # groups of updated tokens that a terminal has room for


def summary(
    about: Mapping[str, Any], tokens: Any, matrix: Tensor | None, *, unit: str = "step", per: str = "contexts"
) -> Any:  # fmt: skip
    """A rich renderable with the step by answer, the tokens that move most, who moves them, the findings, and the checks.

    Args:
        about: run.json.
        tokens: the token table (pyarrow).
        matrix: F [M, L] or None; what needs it is left out where it is not complete.
        unit: "step" for nats after the step, "rate" for nats per unit learning rate.
        per: "contexts", net of what cancels between update tokens behind the same text, or the single "tokens".

    Raises:
        ValueError: another unit, or another per.
    """
    from rich.console import Group
    from rich.text import Text

    check_view(unit, per)
    run, eta = BySequence.of(tokens, matrix), about["settings"]["eta"]
    contexts = Contexts.of(run, about["sequences"]) if per == "contexts" and run.matrix is not None else None
    of = watched(about)
    named = UNITS[unit].replace("nats", of["unit"])
    if not is_log_prob(about):
        named = f"{of['label']}, {named}"
    view = _View(run, contexts, 1.0 if eta is None else eta, unit, named)
    constants = ", ".join(f"{k}={v}" for k, v in about["objective"]["arguments"].items())
    parts: list[Any] = [
        Text.assemble(
            (f"{about['objective']['name']}({constants})", "bold"),
            f" on {about['model']['name']}, {len(run.updated)} update tokens, {len(run.observed)} observed tokens, "
            + ("no step" if eta is None else f"step eta = {eta:.3g}"),
        )
    ]
    if about["status"] != "complete":
        parts.append(Text("Interrupted: the force matrix is not complete.", style="bold yellow"))
    parts += ["", view.answers(), "", view.movers(), ""] if eta is not None else [""]
    for finding in about["findings"]:
        parts.append(Text.assemble(("• ", "cyan"), (finding["title"] + ". ", "bold"), finding["text"]))
    parts.append("")
    checks = [f"{name} {value:.1e}" for name, value in about["checks"].items()]
    parts.append(Text("Checks: " + "; ".join(checks) + f". {sum(about['seconds'].values()):.1f} s.", style="dim"))
    return Group(*parts)


@dataclass(frozen=True)
class _View:
    """A run in one unit, its update tokens net by context or one by one."""

    run: BySequence
    contexts: Contexts | None
    eta: float
    unit: str
    named: str  # the unit, and what is watched where that is no log-probability

    def of_force(self, force: float) -> str:
        """A force in the unit."""
        return _number(force * (self.eta if self.unit == "step" else 1))

    def of_change(self, change: float) -> str:
        """A change after the step in the unit."""
        return _number(change / (1 if self.unit == "step" else self.eta))

    def answers(self) -> Listing:
        """Change of each observed sequence, and what each group of updated tokens contributes to it."""
        run = self.run
        forces: dict[str, dict[str, float]] = {}
        if run.matrix is not None:
            forces = run.forces() if self.contexts is None else self.contexts.forces()
            if len(next(iter(forces.values()))) > COLUMNS:
                forces = {}
        columns = ["answer", "tokens", "predicted", "actual", *(f"by {name}" for name in next(iter(forces.values()), {}))]
        figures = range(1, len(columns))
        table = Listing(f"Change of each answer, {self.named}", columns, figures, range(4, len(columns)))
        for name, change in run.changes().items():
            cells = [name, str(int(change["tokens"])), self.of_change(change["predicted"]), self.of_change(change["actual"])]
            table.add_row(*cells, *(self.of_force(force) for force in forces.get(name, {}).values()))
        return table

    def movers(self) -> Listing:
        """The observed tokens that move most, who is behind each, and what rises and falls in their places."""
        by, figures = list[str](), [2, 3]
        if self.run.matrix is not None:
            by = ["moved most by"] if self.contexts is None else ["by itself", "moved most by another, net"]
            figures += [4] if self.contexts is not None else []
        columns = ["token", "of", "predicted", "actual", *by, "rising at that place", "falling at that place"]
        table = Listing(f"The tokens that move most, {self.named}", columns, figures, (len(columns) - 2, len(columns) - 1))
        for row in sorted(self.run.observed, key=lambda row: -abs(row["actual"]))[:MOVERS]:
            changes = (self.of_change(row[name]) for name in ("predicted", "actual"))
            cells = [shown(row["token"]), self.run.place(row), *changes, *self.by(row)]
            for key in ("risers", "fallers"):
                cells.append(" ".join(shown(entry["token"]) for entry in row[key][:3]))
            table.add_row(*cells)
        return table

    def by(self, row: Row) -> list[str]:
        """Who moved a token most: its own context and the strongest other one, or the strongest single token."""
        m = row["row"]
        if self.run.matrix is None:
            return []
        if self.contexts is None:
            mover = self.run.updated[int(self.run.matrix[m].abs().argmax())]
            force = float(self.run.matrix[m, mover["row"]])
            return [f"{shown(mover['token'])} {self.run.place(mover)} ({self.of_force(force)})"]
        contexts = self.contexts.alike_joined
        x = int(contexts.others[m].abs().argmax())
        own = self.of_force(contexts.itself(m)) if contexts.own[m] >= 0 else "–"
        return [own, f"{contexts.name(x)} ({self.of_force(float(contexts.others[m, x]))})"]


def _number(x: float) -> str:
    """Four decimals, or four digits where decimals would say nothing."""
    return f"{x:+.4f}" if 1e-3 <= abs(x) < 1e3 or x == 0 else f"{x:+.4g}"
