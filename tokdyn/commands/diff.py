"""`tokdyn diff`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._app import Json, app, load_profile, plain_errors, print_json
from .._console import out_console

if TYPE_CHECKING:
    from ..runs.difference import Difference


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="folder of a run")],
    b: Annotated[Path, typer.Argument(help="folder of another, of the same data: a later checkpoint, another objective")],
    out: Annotated[Path | None, typer.Option(help="page to write, .html; by default diff.html in the folder of B")] = None,
    unit: Annotated[str | None, typer.Option(help="of forces: step (nats after each run's own) or rate (per unit lr)")] = None,
    json_: Json = False,
) -> None:
    """Show what changed from run A to run B, tokens aligned, and write a page of both."""
    with plain_errors():
        from ..report.diff import render
        from ..runs.difference import Difference
        from ..runs.manifest import replace

        first, second = load_profile(a), load_profile(b)
        page = out or b / "diff.html"
        found = Difference.of(first, second, unit)
        replace(page, render(found, (str(a), str(b))).encode())
        if json_:
            print_json(found.as_dict() | {"page": str(page)})
            return
        out_console.print(summary(found))
        out_console.print(f"Page in {page}", soft_wrap=True)


def summary(found: Difference) -> Any:
    """A rich renderable: each answer, the tokens and the pushes that changed most."""
    from rich.console import Group

    from .._arguments import UNITS
    from ..runs.findings import shown
    from ..runs.table import Listing

    unit = UNITS[found.unit]
    names = ("answer", "tokens", "log-prob in A", "in B", "force in A", "in B")
    answers = Listing(f"Each answer: log-prob in nats, force of the step, {unit}", names, range(1, 6))
    for name, x in found.answers().items():
        figures = (f"{x[key]:+.4g}" for key in ("log_prob_a", "log_prob_b", "force_a", "force_b"))
        answers.add_row(name, f"{x['tokens']:.0f}", *figures)
    moved = Listing(f"The tokens whose force changed most, {unit}", ("token", "of", "in A", "in B", "change"), (2, 3, 4))
    for i in found.most("force"):
        pair = found.observed[i]
        figures = (f"{x:+.4g}" for x in (pair.a["force"], pair.b["force"], pair.change("force")))
        moved.add_row(shown(pair.a["token"]), found.a.place(pair.a), *figures)
    parts: list[Any] = [answers, "", moved if moved.rows else "No token's force changed by more than rounding."]
    if pushes := found.pushes():
        table = Listing(f"The net pushes that changed most, {unit}", ("on", "of", "by", "change"), (3,))
        for m, by, change in pushes:
            row = found.observed[m].a
            table.add_row(shown(row["token"]), found.a.place(row), by, f"{change:+.4g}")
        parts += ["", table]
    parts += [f"{what}: {in_a} in A, {in_b} in B" for what, in_a, in_b in found.settings]
    return Group(*parts)
