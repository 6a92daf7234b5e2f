"""`tokdyn check`: data, template and tokenizer of a training that has not begun."""

from __future__ import annotations

from typing import Annotated

import typer

from .._app import DATA, app, data_file, plain_errors
from .._console import out_console, progress


@app.command()
def check(
    data: Annotated[str, typer.Argument(help=DATA)],
    model: Annotated[str, typer.Option(help="'demo', a local folder or a hub name: its tokenizer and template")] = "demo",
    objective: Annotated[str | None, typer.Option(help="loss of the training: rows that it cannot use are wrong")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="so many rows, spread over the file; all by default")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="longest sequence in tokens of the training")] = None,
    assistant_only: Annotated[bool, typer.Option("--assistant-only", help="masks are the template's generation marks")] = False,
    json_: Annotated[bool, typer.Option("--json", help="print all findings as JSON")] = False,
) -> None:
    """Find what is silently wrong in data, template and tokenizer, before a training. Exit code 1 if something is wrong."""
    with plain_errors():
        from .. import _arguments as arguments
        from ..loading import find_model

        if objective is not None:
            arguments.objective_name(objective, arguments.objective_names())
        find_model(model)
        source = data_file(data)
        from ..checks.files import check_named

        with progress() as stage:
            stage(f"checking {data}", 0, 0)
            found = check_named(source, model, objective, rows=rows, max_length=max_length, assistant_only=assistant_only)
        out_console.print(found.json() if json_ else str(found), markup=False, soft_wrap=True)
        if found.wrong:
            raise typer.Exit(1)
