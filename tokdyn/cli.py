"""The command line: `tokdyn profile`, `report`, `probe build`, `bench`, `study` and `doctor`.

A command has as many parameters as options, for typer reads them from its signature.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ._arguments import sentence
from ._console import err_console, out_console, progress
from ._version import __version__

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
probe_app = typer.Typer(no_args_is_help=True, help="Probe sets: responses watched while a model is trained.")
app.add_typer(probe_app, name="probe")

_options = {"debug": False}  # of `tokdyn` itself, as `about` last read them
DATA = "'demo', or a file with prompt/completion, prompt/chosen/rejected, messages …: .jsonl, .json, .csv (.gz) or .parquet"


def main() -> None:
    """Run the command line. --debug may stand anywhere, and SIGTERM (a scheduler's, a timeout's) is what Ctrl-C is."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    given = sys.argv[1:]
    app(["--debug"] * ("--debug" in given) + [word for word in given if word != "--debug"])


def _print_version(wanted: bool) -> bool:
    if wanted:
        out_console.print(f"tokdyn {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,  # fmt: skip
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """tokdyn: which token of an update moved which token of an answer, which way, how much, and why."""
    _options["debug"] = debug


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Print what goes wrong as one sentence and exit with 2, with 130 after Ctrl-C; warnings are one line each."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        if _options["debug"]:
            err_console.print_exception()
        err_console.print("error:", style="bold red", end=" ")
        err_console.print(sentence(error), markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        err_console.print("interrupted before there was anything to keep; nothing was written", style="yellow")
        raise typer.Exit(130) from None


def _print_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """A warning as a note of one line; what libraries say to their own developers is left out."""
    if not issubclass(category, (DeprecationWarning, FutureWarning)):
        _note(" ".join(str(message).split()))


def _note(text: str) -> None:
    err_console.print(f"note: {text}", style="yellow", markup=False, soft_wrap=True)


Unit = Annotated[str, typer.Option(help="of what is printed: step, nats after the step; rate, per unit learning rate")]
Per = Annotated[
    str, typer.Option(help="who moved it: contexts, net of what tokens behind the same text cancel; tokens, one by one")
]


@app.command()
def profile(
    model: Annotated[str, typer.Option(help="'demo', a local folder (also of a PEFT adapter), or a hub name")] = "demo",
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter for the model: forces are those on its weights")] = None,
    data: Annotated[str, typer.Option(help=DATA)] = "demo",
    objective: Annotated[str, typer.Option(help="loss of the update: sft, dpo, ipo, simpo, kto, grpo, …")] = "dpo",
    set_: Annotated[list[str] | None, typer.Option("--set", help="constant of the objective, e.g. beta=0.5")] = None,
    rows: Annotated[int, typer.Option(min=1, help="rows of the data in the update")] = 2,
    held_out: Annotated[int, typer.Option(min=0, help="further rows that are only observed")] = 1,
    skip: Annotated[int, typer.Option(min=0, help="rows to pass over first")] = 0,
    eta: Annotated[float | None, typer.Option(help="size of the checking step; by default 0.2 nats at the largest")] = None,
    scope: Annotated[str, typer.Option(help="full, readout, backbone, or a regular expression over parameter names")] = "full",
    method: Annotated[str, typer.Option(help="how the matrix is computed: tangent, naive, or none")] = "tangent",
    memory: Annotated[str, typer.Option(help="what the matrix may take, e.g. 2GiB")] = "4GiB",
    reference: Annotated[str | None, typer.Option(help="reference model; the policy itself when absent")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="longest sequence in tokens")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/profile"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run that lies there")] = False,
    unit: Unit = "step",
    per: Per = "contexts",
) -> None:
    """Profile the token-level forces of one update and write run.json, tokens.parquet, forces.safetensors and report.html.

    Ctrl-C or SIGTERM during the matrix keeps what is done as a readable partial run.
    """
    with plain_errors():
        from . import _arguments as arguments
        from .loading import DEMO_PAIRS, check_device, find_model, load_tokenizer, load_weights
        from .runs.folder import check_free

        # all that can be refused without torch, then without the model
        arguments.objective_name(objective, arguments.objective_names())
        chosen = arguments.constants(set_ or [])
        arguments.check_eta(eta)
        arguments.check_method(method)
        arguments.size_in_bytes(memory)
        arguments.scope_pattern(scope)
        arguments.check_view(unit, per)
        for name, with_adapter in [(model, adapter), *([(reference, None)] if reference else [])]:
            find_model(name, with_adapter)
        source = DEMO_PAIRS if data == "demo" else Path(data)
        if not source.is_file():
            raise FileNotFoundError(f"no data file {source}: give a .jsonl, .json, .csv or .parquet file")
        check_free(out, overwrite)

        import tokdyn as td

        from .data import read, sequences, watched
        from .runs.summary import summary

        loss = td.objectives.by_name(objective, **chosen)
        check_device(device)
        table = read(source)
        total, table = len(table), table[skip : skip + rows + held_out]
        if len(table) < rows:
            raise ValueError(f"{data} has {total} rows, after skipping {skip} there are not {rows} for the update")
        if len(table) < rows + held_out:
            left, asked = len(table) - rows, f"{held_out} further row{'s' * (held_out > 1)}"
            _note(f"--held-out asks for {asked} and {data} has {left or 'none'}: so many are held out")
        with progress() as stage:
            stage(f"loading {model}", 0, 0)
            tokenizer = load_tokenizer(model, adapter)
            update = sequences(tokenizer, table[:rows], loss, max_length=max_length)
            observe = watched(tokenizer, table, max_length=max_length)
            lm = load_weights(model, device, adapter=adapter)
            other = load_weights(reference, device) if reference else None
            run = td.profile(
                lm, update, observe, loss, tokenizer=tokenizer, eta=eta, scope=scope, method=method, memory=memory,
                reference=other, out=out, overwrite=overwrite, stage=stage,
                about={"model": {"name": model} | ({"adapter": adapter} if adapter else {}),
                       "data": {"path": data, "rows": total, "used": len(table)}},
            )  # fmt: skip
        out_console.print(summary(run.about, run.tokens, run.matrix, unit=unit, per=per))
        if run.path is not None:
            out_console.print(f"Run in {run.path}, page in {run.path / 'report.html'}", soft_wrap=True)
        if run.path != out:
            raise typer.Exit(1)
        if run.about["status"] != "complete":
            raise typer.Exit(130)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="folder of a run, or of a training that td.attach or td.Monitor records")],
    step: Annotated[list[int] | None, typer.Option(help="of a training: a step whose forces are shown token by token")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="of a training: write the page anew until it has ended")] = False,
    unit: Unit = "step",
    per: Per = "contexts",
) -> None:
    """Show a run in the terminal and write its page anew; of a training, write its page."""
    with plain_errors():
        import tokdyn as td

        from ._arguments import check_view
        from .runs.folder import kind_of
        from .runs.summary import summary

        check_view(unit, per)
        if kind_of(run) == "training":
            out_console.print(f"Page in {td.watch(run, steps=step)}", soft_wrap=True)
            if follow:
                _follow(run, step)
            return
        found = td.load(run)
        found.to_html(run / "report.html")
        out_console.print(summary(found.about, found.tokens, found.matrix, unit=unit, per=per))
        out_console.print(f"Page in {run / 'report.html'}")


def _follow(run: Path, steps: list[int] | None) -> None:
    """Write a training's page anew until the training has ended or Ctrl-C, and say so first."""
    import tokdyn as td

    from .training.step_folder import read, unwritten_for

    about = read(run)[0]
    if about.get("status") != "running":
        out_console.print(f"The training has ended ({about.get('status')}): there is nothing to follow.")
        return
    since = unwritten_for(about)
    ago = "" if since is None else f", records were last written {since / 60:.0f} min ago (one that was killed writes no more)"
    out_console.print(f"The training runs{ago}. The page is written anew until it ends; Ctrl-C stops that.", soft_wrap=True)
    try:
        td.watch(run, steps=steps, follow=True)
        out_console.print("The training has ended.")
    except KeyboardInterrupt:
        out_console.print("No longer followed; the page is as it was written last.")


@probe_app.command("build")
def probe_build(
    data: Annotated[str, typer.Argument(help="'demo', or a file as profile takes it, with prompt, chosen and rejected")],
    out: Annotated[Path, typer.Option(help="file to write, .jsonl")],
    rows: Annotated[int | None, typer.Option(min=1, help="rows to draw at random; all by default")] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same probe set")] = 0,
    held_out: Annotated[str | None, typer.Option(help="file of prompts that are not trained on, for irr_test")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="only these kinds, e.g. --kind chosen --kind random_permute")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file that lies there")] = False,
) -> None:
    """Make the response types that are watched through training: chosen, rejected, other prompts' answers, permuted, random."""
    with plain_errors():
        from . import probes
        from .loading import DEMO_PAIRS
        from .runs.table import Listing

        made = probes.build(DEMO_PAIRS if data == "demo" else data, held_out=held_out, rows=rows, seed=seed, types=kind)
        probes.write(out, made, overwrite)
        table = Listing("", ("kind", "rows", "words each", "begins"), (1, 2))
        for name in probes.TYPES:
            texts = [probes.text_of(row[name]) for row in made if name in row]
            if texts:
                words = [probes.split_words(text) for text in texts]
                mean = sum(map(len, words)) / len(words)
                table.add_row(name, str(len(texts)), f"{mean:.0f}", "".join(words[0][:5]).strip())
        out_console.print(table)
        out_console.print(f"Probe set of {len(made)} prompts in {out}", soft_wrap=True)


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

        from .bench import bench as run
        from .bench import report as pages

        if threads:
            torch.set_num_threads(threads)
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
    all_: Annotated[bool, typer.Option("--all", help="all of them, and one page of them")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="a small form of about 20 s, which judges the same claims on less data")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="the first seed")] = 0,
    data: Annotated[
        Path | None, typer.Option(help="folder of texts for the studies that take one; the shipped pairs if not")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder: runs/studies/NAME, or with --all runs/studies")] = None,
    docs: Annotated[Path | None, typer.Option(help="write gallery.md and its figures here, from the studies in --out")] = None,
) -> None:
    """Reproduce a phenomenon of the papers: verdict lines, figure, JSON, curves and a page.

    A claim that does not hold is a result like any other: it is said, and the exit code stays 0.
    """
    with plain_errors():
        from .studies import gallery, load, names

        root = Path("runs/studies-quick" if quick else "runs/studies")
        if name and (all_ or docs):
            raise ValueError(f"--all and --docs take all studies: leave the name {name!r} out")
        if not (name or all_ or docs):
            for each in names():
                out_console.print(f"{each:22} {(load(each).__doc__ or '').strip().splitlines()[0]}", markup=False)
            return
        folders = {name: out or root / name} if name else {each: (out or root) / each for each in names()} if all_ else {}
        for each, folder in folders.items():
            with progress() as stage:
                stage(f"study {each}", 0, 0)
                told = gallery.run_study(each, folder, quick=quick, seed=seed, data=data)
            out_console.print(f"{each}, {told['seconds']:.0f} s: {told['title']}", style="bold", markup=False, soft_wrap=True)
            for line in gallery.verdicts(told):
                out_console.print(f"  {line}", markup=False, soft_wrap=True)
        if all_:
            page = (out or root) / "gallery.html"
            page.write_text(gallery.page(list(folders.values())), "utf-8")
            out_console.print(f"Page in {page}")
        elif name:
            out_console.print(f"Study in {folders[name]}, page in {folders[name] / 'page.html'}")
        if docs:
            out_console.print(f"Gallery in {gallery.write_docs(out or root, docs)}")


@app.command()
def doctor() -> None:
    """Versions, devices, which native parts were built, and a check of the mathematics on a tiny model."""
    with plain_errors():
        import platform
        from importlib.metadata import PackageNotFoundError, version

        import torch

        from . import _native
        from .loading import DEMO_MODEL
        from .runs.table import Listing

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
        out_console.print(table)
        if not good:
            raise typer.Exit(1)


def self_check() -> float:
    """The larger relative error of the matrix and of a reduction against one gradient per token, on a tiny random model."""
    from . import forces
    from .testing import random_chis, relative_error, tiny

    model, u, o = tiny("llama"), random_chis([(3, 4)], seed=1), random_chis([(2, 5)], seed=2)
    truth = forces(model, u, o, method="naive").matrix
    matrix, vector = forces(model, u, o).matrix, forces(model, u, o, reduce="update").vector
    assert truth is not None and matrix is not None and vector is not None
    return max(relative_error(matrix, truth), relative_error(vector, truth.sum(1)))
