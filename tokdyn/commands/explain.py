"""`tokdyn explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._app import Json, app, load_profile, plain_errors, print_json
from .._console import out_console


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="folder of a run that tokdyn profile wrote")],
    m: Annotated[int | None, typer.Argument(help="row of the observed token; the strongest pair when absent")] = None,
    l: Annotated[int | None, typer.Argument(help="row of the update token")] = None,  # noqa: E741
    per: Annotated[str, typer.Option(help="contexts, net of what tokens behind one text cancel; tokens")] = "contexts",
    json_: Json = False,
) -> None:
    """Say why an update token moves an observed one: the force by layer and kind, the kernel, the texts, and a sentence."""
    with plain_errors():
        from .._arguments import check_view

        check_view("rate", per)
        if (m is None) != (l is None):
            raise ValueError("give both M and L, or none of them for the strongest pair")

        card = load_profile(run).explain(m, l, per)
        if json_:
            print_json(card.to_dict())
        else:
            out_console.print(card.text, soft_wrap=True)
