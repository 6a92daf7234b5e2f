"""`tokdyn explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._app import Json, app, load_profile, plain_errors, print_json
from .._console import out_console

WHICH = "a place as it is printed ('chosen 1 @14'), an answer ('chosen 1'), a role ('chosen'), or a row of the token table"


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="folder of a run that tokdyn profile wrote")],
    on: Annotated[
        str | None, typer.Argument(help=f"which observed token: {WHICH}; of several the one that is moved most")
    ] = None,
    by: Annotated[str | None, typer.Argument(help="which update token, in the same words")] = None,
    down: Annotated[bool, typer.Option("--down", help="the strongest push that lowers")] = False,
    per: Annotated[str, typer.Option(help="contexts, net of what tokens behind one text cancel; tokens")] = "contexts",
    json_: Json = False,
) -> None:
    """Say why an update token moves an observed one: the force by layer and kind, the kernel, the texts, and a sentence.

    `tokdyn explain RUN chosen rejected --down` tells of the rejected token that pushes a chosen one down most.
    """
    with plain_errors():
        from .._arguments import check_view
        from ..runs.folder import PAGE

        check_view("rate", per)
        card = load_profile(run).explain(on, by, per, down)
        page = f"{(run / PAGE).resolve().as_uri()}{card.address}" if (run / PAGE).exists() else None
        if json_:
            print_json({**card.to_dict(), "page": page})
            return
        out_console.print(card.text, soft_wrap=True)
        if page:
            out_console.print(f"\nOn the page: {page}", soft_wrap=True)
