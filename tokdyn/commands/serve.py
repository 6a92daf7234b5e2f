"""`tokdyn serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .._app import app, plain_errors
from .._console import out_console


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="folder with runs and trainings, up to three levels deep")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8471,
    read_only: Annotated[bool, typer.Option("--read-only", help="compute nothing on request, write nothing")] = False,
) -> None:
    """Show the runs of a folder in a browser of this machine; trainings are followed while they are written.

    A run can be profiled again with other words or another loss, and a row of a scan in full. It listens on the loopback
    address alone, and refuses requests for other hosts and forms of other sites.
    """
    with plain_errors():
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        import uvicorn

        from ..report.recompute import Jobs
        from ..report.server import application

        jobs = None if read_only else Jobs()
        application_ = application(folder, pages(), jobs)
        server = uvicorn.Server(uvicorn.Config(application_, host="127.0.0.1", port=port, log_level="warning"))
        place = server.config.bind_socket()
        out_console.print(f"Runs of {folder} at http://127.0.0.1:{place.getsockname()[1]}/; Ctrl-C ends it", soft_wrap=True)
        try:
            server.run(sockets=[place])
        finally:
            if jobs is not None:
                jobs.close()


def pages() -> dict[str, Any]:
    """The page of each kind of run, out of its folder; nothing is written."""

    def training(path: Path) -> str:
        from ..report.training import render
        from ..training.step_folder import read

        return render(*read(path))

    def profile(path: Path) -> str:
        import tokdyn as td

        return td.load(path).to_html()

    def scan(path: Path) -> str:
        from ..report.scan import render
        from ..runs.scans import Scan

        return render(Scan(path))

    return {"profile": profile, "scan": scan, "training": training}
