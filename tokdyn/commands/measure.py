"""`tokdyn bench`, `study` and `doctor`: what it costs, what the papers say, and whether this installation computes rightly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .._app import Json, app, plain_errors, print_json, tell
from .._console import out_console, progress
from .._version import __version__


@app.command()
def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="operators, e.g. token_stats; all by default")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one")] = "auto",
    side: Annotated[list[str] | None, typer.Option(help="only these sides, e.g. --side cpp --side eager")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="small sizes, to see that everything runs")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="times that every side takes its turn")] = 7,
    seconds: Annotated[float, typer.Option(min=0, help="for each case, after three rounds")] = 60.0,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of a CPU; torch's own choice by default")] = None,
    memory: Annotated[bool, typer.Option(help="measure peak memory too")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all figures here")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="write the table here")] = None,
) -> None:
    """Time every operator beside plain torch, torch.compile and other projects' kernels, and against the machine's floor."""
    with plain_errors():
        import json

        import torch

        from ..bench import bench as run
        from ..bench import report as pages

        if threads:
            torch.set_num_threads(threads)
        for file in (json_file, markdown_file):
            if file is not None and not file.parent.is_dir():
                raise FileNotFoundError(f"{file} cannot be written: there is no folder {file.parent}")
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        with progress() as stage:
            found = run(
                device=place, ops=ops or [], sides=side or [], quick=quick, rounds=rounds, seconds=seconds, memory=memory,
                stage=stage,
            )  # fmt: skip
        for line in pages.heading(found):
            out_console.print(line, markup=False, soft_wrap=True)
        for table in pages.tables(found):
            out_console.print()
            out_console.print(table)
        if json_file:
            json_file.write_text(json.dumps(found, indent=1) + "\n")
        if markdown_file:
            markdown_file.write_text(pages.markdown(found))


@app.command()
def study(
    name: Annotated[str | None, typer.Argument(help="one study; without a name they are listed")] = None,
    all_: Annotated[bool, typer.Option("--all", help="all that are not finished in --out, and one page of all")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="a small form of about 20 s, which judges the same claims on less data")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="the first seed")] = 0,
    model: Annotated[
        str | None, typer.Option(help="your own model, a folder or a hub name, for the studies that take one")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="your own texts, a folder or a file, for the studies that take them")
    ] = None,
    runs: Annotated[
        int | None, typer.Option(min=1, help="how many, each with a seed of its own, for studies of several")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder: runs/studies/NAME, or with --all runs/studies")] = None,
    docs: Annotated[Path | None, typer.Option(help="write gallery.md and its figures here, from the studies in --out")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="run again what is finished, and keep no part of it")] = False,
    json_: Json = False,
) -> None:
    """Reproduce a phenomenon of the papers: verdict lines, figure, JSON, curves and a page.

    A claim holds, does not, or is undecided: each is a result like any other, and the exit code stays 0. A long study that is
    interrupted goes on where it was.
    """
    with plain_errors():
        from ..studies import documents, gallery, load, names

        root = Path("runs/studies-quick" if quick else "runs/studies")
        if name and (all_ or docs):
            raise ValueError(f"--all and --docs take all studies: leave the name {name!r} out")
        if not (name or all_ or docs):
            tell({each: (load(each).__doc__ or "").strip().splitlines()[0] for each in names()}, json_)
            return
        settings = gallery.Settings(quick, seed, model, str(data) if data else None, runs)
        if name:
            gallery.check_takes(name, settings)
        folders = {name: out or root / name} if name else {each: (out or root) / each for each in names()} if all_ else {}
        waiting = [each for each, folder in folders.items() if name or fresh or not gallery.finished(each, folder, settings)]
        if all_ and not json_:
            out_console.print(gallery.outlook(waiting, folders, settings), soft_wrap=True)
        for each in waiting:
            with progress() as stage:
                stage(f"study {each}", 0, 0)
                told = gallery.run_study(each, folders[each], settings, resume=not fresh)
            if json_:
                continue
            out_console.print(f"{each}, {told['seconds']:.0f} s: {told['title']}", style="bold", markup=False, soft_wrap=True)
            for line in gallery.verdicts(told):
                out_console.print(f"  {line}", markup=False, soft_wrap=True)
        places = []
        if all_:
            page = (out or root) / "gallery.html"
            page.write_text(gallery.page(list(folders.values())), "utf-8")
            places.append(f"Page in {page}")
        elif name:
            places.append(f"Study in {folders[name]}, page in {folders[name] / 'page.html'}")
        if docs:
            places.append(f"Gallery in {documents.write_docs(out or root, docs)}")
        if json_:
            print_json({each: gallery.read(folder) for each, folder in folders.items()})
            return
        for place in places:
            out_console.print(place)


@app.command()
def doctor(json_: Json = False) -> None:
    """Versions, devices, which native parts were built, and a check of the mathematics on a tiny model."""
    with plain_errors():
        import platform
        from importlib.metadata import PackageNotFoundError, version

        import torch

        from .. import _native
        from ..loading import DEMO_MODEL
        from ..runs.table import Listing

        table = Listing("", ("", ""))
        table.add_row("tokdyn", __version__)
        system = f"{platform.system()} {platform.machine()}"
        table.add_row("python", f"{platform.python_version()} on {system}, {os.cpu_count()} processors")
        for name in ("torch", "transformers", "numpy", "triton", "trl", "peft"):
            try:
                table.add_row(name, version(name))
            except PackageNotFoundError:
                table.add_row(name, "not installed")
        cuda = torch.cuda.is_available()
        cpu = f"cpu, {torch.get_num_threads()} threads (no CUDA device)"
        table.add_row("device", torch.cuda.get_device_name() if cuda else cpu)
        for part, state in _native.parts().items():
            table.add_row(part, state)
        table.add_row("demo model", "present" if (DEMO_MODEL / "model.safetensors").exists() else "missing")
        with progress() as stage:
            stage("checking the mathematics", 0, 0)
            error = self_check()
        good = error < 1e-5
        verdict = "agree" if good else "DISAGREE"
        table.add_row("exact forces", f"{verdict} with one gradient per token: relative error {error:.1e}")
        if json_:
            print_json({name: value for name, value in table.rows} | {"relative error": error, "agree": good})
        else:
            out_console.print(table)
        if not good:
            raise typer.Exit(1)


def self_check() -> float:
    """The larger relative error of the matrix and of a reduction against one gradient per token, on a tiny random model."""
    from .. import forces
    from ..testing import random_chis, relative_error, tiny

    model, u, o = tiny("llama"), random_chis([(3, 4)], seed=1), random_chis([(2, 5)], seed=2)
    truth = forces(model, u, o, method="naive").matrix
    matrix, vector = forces(model, u, o).matrix, forces(model, u, o, reduce="update").vector
    assert truth is not None and matrix is not None and vector is not None
    return max(relative_error(matrix, truth), relative_error(vector, truth.sum(1)))
