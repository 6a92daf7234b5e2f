"""The command line: `tokdyn profile` and `report`; the other commands are in `tokdyn/commands/`.

A command has as many parameters as options, for typer reads them from its signature.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from . import commands as commands
from ._app import DATA, Json, app, data_file, load_profile, note, plain_errors, print_json, tell
from ._console import out_console, progress, spell_out
from .commands import recipe
from .commands.recipe import Config, FromFile


def main() -> None:
    """Run the command line. --debug may stand anywhere, and SIGTERM (a scheduler's, a timeout's) is what Ctrl-C is."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    spell_out()
    given = sys.argv[1:]
    app(["--debug"] * ("--debug" in given) + [word for word in given if word != "--debug"])


Unit = Annotated[str, typer.Option(help="of what is printed: step, nats after the step; rate, per unit learning rate")]
Per = Annotated[
    str, typer.Option(help="who moved it: contexts, net of what tokens behind the same text cancel; tokens, one by one")
]


@app.command(cls=FromFile)
def profile(
    model: Annotated[str, typer.Option(help="'demo', a local folder (also of a PEFT adapter), or a hub name")] = "demo",
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter for the model: forces are those on its weights")] = None,
    data: Annotated[str, typer.Option(help=DATA)] = "demo",
    objective: Annotated[str, typer.Option(help="loss of the update: sft, dpo, ipo, simpo, kto, grpo, …")] = "dpo",
    set_: Annotated[list[str] | None, typer.Option("--set", help="constant of the objective, e.g. beta=0.5")] = None,
    rows: Annotated[int, typer.Option(min=1, help="rows of the data in the update")] = 2,
    held_out: Annotated[int, typer.Option(min=0, help="further rows that are only observed")] = 1,
    skip: Annotated[int, typer.Option(min=0, help="rows to pass over first")] = 0,
    scan: Annotated[
        Path | None, typer.Option(help="folder of a scan: --row is then of its data, by its model and loss")
    ] = None,
    row: Annotated[int | None, typer.Option(min=1, help="the row of the data that is the update, from 1")] = None,
    eta: Annotated[float | None, typer.Option(help="size of the checking step; by default 0.2 nats at the largest")] = None,
    scope: Annotated[str, typer.Option(help="full, readout, backbone, or a regular expression over parameter names")] = "full",
    method: Annotated[str, typer.Option(help="how the matrix is computed: tangent, naive, or none")] = "tangent",
    memory: Annotated[str, typer.Option(help="what the matrix may take, e.g. 2GiB")] = "4GiB",
    reference: Annotated[str | None, typer.Option(help="reference model; the policy itself when absent")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="read weights that are there as .bin alone")] = False,
    observable: Annotated[
        str, typer.Option(help="what is watched: log-prob, entropy, margin, mass:ID,…, logit:ID")
    ] = "log-prob",
    pairs: Annotated[int | None, typer.Option(min=1, help="strongest pairs to explain; 2,000 or 10 % when absent")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="longest sequence in tokens")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/profile"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run that lies there")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with what a killed or stopped call of the same left")] = False,
    unit: Unit = "step",
    per: Per = "contexts",
    config: Config = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done, and what it takes by one batch; write nothing")
    ] = False,
    json_: Json = False,
) -> None:
    """Profile the token-level forces of one update and write run.json, tokens.parquet, forces.safetensors and report.html.

    Ctrl-C or SIGTERM during the matrix keeps what is done as a readable partial run. The options go to run.yaml in the run's
    folder, and `--config` takes them from there.
    """
    if row is not None:
        skip, rows = row - 1, 1
    options = dict(locals())
    with plain_errors():
        if scan is not None:
            from .commands.scan import profile_row

            profile_row(scan, row, method=method, memory=memory, eta=eta, overwrite=overwrite, resume=resume, unit=unit,
                        per=per, allow_pickle=allow_pickle)  # fmt: skip
            return
        loss, table, total = _checked(**options)

        import tokdyn as td

        from ._arguments import size_in_bytes
        from .data import sequences, watched
        from .exact import Asked
        from .loading import load_tokenizer, load_weights
        from .prediction import told
        from .runs.job import shared
        from .runs.summary import summary

        if device == "cuda" and "LOCAL_RANK" in os.environ:
            device = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun, accelerate: a process a GPU
        with contextlib.ExitStack() as stack, progress() as stage:
            stage(f"loading {model}", 0, 0)
            tokenizer = load_tokenizer(model, adapter)
            update = sequences(tokenizer, table[:rows], loss, max_length=max_length)
            observe = watched(tokenizer, table, max_length=max_length)
            _note_length(tokenizer, [*update, *observe])
            lm = load_weights(model, device, adapter=adapter, allow_pickle=allow_pickle)
            stage("timing one batch" if dry_run else "counting", 0, 0)
            takes = told(lm, Asked(update, observe, loss), scope, method != "none", size_in_bytes(memory), timed=dry_run)
            if dry_run:
                tell(_plan(update, observe, loss, options) | takes, json_)
                return
            note(f"memory: {takes['memory']}")
            other = load_weights(reference, device, allow_pickle=allow_pickle) if reference else None
            team = stack.enter_context(shared())
            run = td.profile(
                lm, update, observe, loss, tokenizer=tokenizer, eta=eta, scope=scope, method=method, memory=memory,
                reference=other, observable=observable, pairs=pairs, out=out, overwrite=overwrite, resume=resume, stage=stage,
                job=team, about={"model": {"name": model} | ({"adapter": adapter} if adapter else {}),
                       "data": {"path": data, "rows": total, "used": len(table)}},
            )  # fmt: skip
        if team is not None and team.rank:
            return  # the first process has written it
        if run.path is not None:
            recipe.write(run.path, options)
        if json_:
            print_json(_record(run, run.path))
        else:
            out_console.print(summary(run.about, run.tokens, run.matrix, unit=unit, per=per))
            if run.path is not None:
                out_console.print(f"Run in {run.path}, page in {run.path / 'report.html'}", soft_wrap=True)
        if run.path != out or run.about["status"] != "complete":
            raise typer.Exit(1 if run.path != out else 130)


def _checked(
    *, objective: str, set_: list[str] | None, eta: float | None, method: str, memory: str, scope: str, unit: str, per: str,
    model: str, adapter: str | None, reference: str | None, data: str, out: Path, overwrite: bool, device: str, rows: int,
    held_out: int, skip: int, observable: str, resume: bool, **_: Any,
) -> tuple[Any, list[Any], int]:  # fmt: skip
    """The loss and the rows of a profile, and how many the file has; what can be refused without torch is refused first."""
    from . import _arguments as arguments
    from .loading import check_device, find_model
    from .runs.folder import about_of, check_free

    arguments.objective_name(objective, arguments.objective_names())
    chosen = arguments.constants(set_ or [])
    arguments.check_eta(eta)
    arguments.check_observable(observable)
    arguments.check_method(method)
    arguments.size_in_bytes(memory)
    arguments.scope_pattern(scope)
    arguments.check_view(unit, per)
    for name, with_adapter in [(model, adapter), *([(reference, None)] if reference else [])]:
        find_model(name, with_adapter)
    source = data_file(data)
    check_free(out, overwrite or (resume and about_of(out).get("status") == "partial"))

    import tokdyn as td

    from .data import read_part

    loss = td.objectives.by_name(objective, **chosen)
    check_device(device)
    table, total = read_part(source, skip, skip + rows + held_out)
    if len(table) < rows:
        after = f" after the {skip} that are skipped" if skip else ""
        raise ValueError(f"--rows asks for {rows} for the update and {data} has {max(0, total - skip)} rows{after}")
    if len(table) < rows + held_out:
        left, asked = len(table) - rows, f"{held_out} further row{'s' * (held_out > 1)}"
        note(f"--held-out asks for {asked} and {data} has {left or 'none'}: so many are held out")
    return loss, table, total


def _note_length(tokenizer: Any, chis: list[Any]) -> None:
    """Say so where a sequence is longer than the model's context, as its tokenizer knows that."""
    longest, most = max(len(chi.ids) for chi in chis), getattr(tokenizer, "model_max_length", None)
    if isinstance(most, int) and longest > most:
        note(f"the longest sequence has {longest} tokens, the model was made for {most}: beyond that it is out of its "
             f"range, and so are the forces; --max-length {most} cuts answers there")  # fmt: skip


def _plan(update: Any, observe: Any, loss: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What a profile would do, as `--dry-run` tells it."""
    M, L = (sum(map(len, side)) for side in (observe, update))
    described = loss.describe()
    return {
        "objective": f"{described['name']}({', '.join(f'{k}={v}' for k, v in described['arguments'].items())})",
        "model": options["model"],
        "update": f"{L} tokens in {len(update)} sequences",
        "observed": f"{M} tokens in {len(observe)} sequences",
        "matrix": "none" if options["method"] == "none" else f"{M} x {L}, {4 * M * L / 1e6:.3g} MB on disk",
        "longest sequence": f"{max(len(chi.ids) for chi in [*update, *observe])} tokens",
        "cut to fit": f"{sum(chi.truncated for chi in update)} tokens of the update",
        "out": str(options["out"]),
    }


def _record(run: Any, path: Path | None) -> dict[str, Any]:
    """A run as `--json` prints it: run.json, what each answer did, and where it is."""
    from .runs.by_sequence import BySequence

    table = BySequence.of(run.tokens, run.matrix)
    answers = {} if run.about["settings"]["eta"] is None else table.changes()
    forces = {} if table.matrix is None else table.forces()
    return {"path": path, "page": path and path / "report.html", "answers": answers, "forces": forces, "run": run.about}


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="folder of a run, a scan, or a training that td.attach or td.Monitor records")],
    step: Annotated[list[int] | None, typer.Option(help="of a training: a step whose forces are shown token by token")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="of a training: write the page anew until it has ended")] = False,
    unit: Unit = "step",
    per: Per = "contexts",
    json_: Json = False,
) -> None:
    """Show a run in the terminal and write its page anew; of a training, write its page."""
    with plain_errors():
        import tokdyn as td

        from ._arguments import check_view
        from .runs.folder import kind_of
        from .runs.summary import summary

        check_view(unit, per)
        if kind_of(run) == "scan":
            _report_scan(run, json_)
            return
        if kind_of(run) == "training":
            page = td.watch(run, steps=step)
            if json_:
                print_json({"page": page, "training": _training_record(run)})
            else:
                out_console.print(f"Page in {page}", soft_wrap=True)
            if follow:
                _follow(run, step)
            return
        found = load_profile(run)
        found.to_html(run / "report.html")
        if json_:
            print_json(_record(found, run))
            return
        out_console.print(summary(found.about, found.tokens, found.matrix, unit=unit, per=per))
        out_console.print(f"Page in {run / 'report.html'}")


def _report_scan(run: Path, json_: bool) -> None:
    """Show what a scan has found so far and write its page."""
    from .report.scan import listings, write
    from .runs.scan_totals import totals
    from .runs.scans import Scan

    scan = Scan(run)
    found = totals(scan)
    if json_:
        print_json({"page": write(scan, found), "groups": {name: asdict(group) for name, group in found.items()}})
        return
    for part in listings(scan, found):
        out_console.print(part, markup=False, soft_wrap=isinstance(part, str))
        out_console.print()
    out_console.print(f"Page in {write(scan, found)}", soft_wrap=True)


def _training_record(run: Path) -> dict[str, Any]:
    """A training as `--json` prints it: its run.json and the figures of each recorded step."""
    from .training.step_folder import read

    about, tables = read(run)
    return {"run": about, "steps": tables["steps"].to_pylist() if "steps" in tables else []}


def _follow(run: Path, steps: list[int] | None) -> None:
    """Write a training's page anew until the training has ended or Ctrl-C, and say so first."""
    import tokdyn as td

    from .training.heartbeat import silent_since
    from .training.step_folder import read, unwritten_for

    dead = "No sign of life since {:%Y-%m-%d %H:%M:%S UTC}: the training was killed, or its machine is gone."
    about = read(run)[0]
    if about.get("status") != "running":
        out_console.print(f"The training has ended ({about.get('status')}): there is nothing to follow.")
        return
    if silent := silent_since(run):
        out_console.print(f"{dead.format(silent)} There is nothing to follow.", soft_wrap=True)
        return
    since = unwritten_for(about)
    ago = "" if since is None else f", records were last written {since / 60:.0f} min ago (one that was killed writes no more)"
    out_console.print(f"The training runs{ago}. The page is written anew until it ends; Ctrl-C stops that.", soft_wrap=True)
    try:
        td.watch(run, steps=steps, follow=True)
        silent = silent_since(run)
        out_console.print(dead.format(silent) if silent else "The training has ended.", soft_wrap=True)
    except KeyboardInterrupt:
        out_console.print("No longer followed; the page is as it was written last.")
