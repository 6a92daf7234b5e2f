"""`tokdyn demo`: the demo model trained again, or a larger one for the language studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._app import app, plain_errors


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="folder of the texts to learn from; without it only --export works")] = None,
    large: Annotated[bool, typer.Option("--large", help="22 M parameters instead of the 4 M that ship")] = False,
    work: Annotated[Path | None, typer.Option(help="checkpoints, resumed when present: checkpoints/demo or -large")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="length of the training")] = 20_000_000,
    every: Annotated[int, typer.Option(min=1, help="steps of 4096 tokens between checkpoints")] = 400,
    export: Annotated[Path | None, typer.Option(help="write the best checkpoint here, as a folder for --model")] = None,
) -> None:
    """Train the demo model again, or one of 22 M parameters, from texts on disk; call it again to go on.

    The exported folder is what `tokdyn study NAME --model FOLDER` takes. The demo model as it ships: `tokdyn profile`.
    """
    with plain_errors():
        from ..demo.train import main

        if data is None and export is None:
            raise ValueError(
                "tokdyn demo trains the demo model again: it needs --data FOLDER of texts, or --export FOLDER for the best "
                "checkpoint so far. To profile a step of the demo model as it ships, call tokdyn profile"
            )
        shape = "large" if large else "demo"
        place = work or Path("checkpoints") / ("demo-large" if large else "demo")
        where = ["--export", str(export)] if export else ["--data", str(data)]
        main([*where, "--work", str(place), "--shape", shape, "--tokens", str(tokens), "--every", str(every)])
