"""`tokdyn probe build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._app import Json, app, plain_errors, print_json
from .._console import out_console

probe_app = typer.Typer(no_args_is_help=True, help="Probe sets: responses watched while a model is trained.")
app.add_typer(probe_app, name="probe")


@probe_app.command("build")
def probe_build(
    data: Annotated[str, typer.Argument(help="'demo', or a file as profile takes it, with prompt, chosen and rejected")],
    out: Annotated[Path, typer.Option(help="file to write, .jsonl")],
    rows: Annotated[int | None, typer.Option(min=1, help="rows to draw at random; all by default")] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same probe set")] = 0,
    held_out: Annotated[str | None, typer.Option(help="file of prompts that are not trained on, for irr_test")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="only these kinds, e.g. --kind chosen --kind random_permute")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file that lies there")] = False,
    json_: Json = False,
) -> None:
    """Make the response types that are watched through training: chosen, rejected, other prompts' answers, permuted, random."""
    with plain_errors():
        from .. import probes
        from ..loading import DEMO_PAIRS
        from ..runs.table import Listing

        made = probes.build(DEMO_PAIRS if data == "demo" else data, held_out=held_out, rows=rows, seed=seed, types=kind)
        probes.write(out, made, overwrite)
        if json_:
            print_json(
                {"path": out, "prompts": len(made), "kinds": {kind: sum(kind in row for row in made) for kind in probes.TYPES}}
            )
            return
        table = Listing("", ("kind", "rows", "words each", "begins"), (1, 2))
        for name in probes.TYPES:
            texts = [probes.text_of(row[name]) for row in made if name in row]
            if texts:
                words = [probes.split_words(text) for text in texts]
                mean = sum(map(len, words)) / len(words)
                table.add_row(name, str(len(texts)), f"{mean:.0f}", "".join(words[0][:5]).strip())
        out_console.print(table)
        out_console.print(f"Probe set of {len(made)} prompts in {out}", soft_wrap=True)
