"""`tokdyn scan`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .._app import DATA, app, data_file, plain_errors
from .._console import err_console, out_console, progress

PROBE = "what is watched: a probe set or any preference file; its kinds of answer are the groups"


@app.command()
def scan(
    data: Annotated[list[str], typer.Option(help=f"{DATA}; several with --data again")],
    probe: Annotated[str, typer.Option(help=PROBE)],
    out: Annotated[Path, typer.Option(help="folder of the scan")],
    model: Annotated[str, typer.Option(help="'demo', a local folder (also of a PEFT adapter), or a hub name")] = "demo",
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter for the model: forces are those on its weights")] = None,
    objective: Annotated[str, typer.Option(help="loss of each row: sft, dpo, ipo, simpo, kto, grpo, …")] = "dpo",
    set_: Annotated[list[str] | None, typer.Option("--set", help="constant of the objective, e.g. beta=0.5")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="the first so many rows of the data; all by default")] = None,
    probe_rows: Annotated[int | None, typer.Option(min=1, help="the first so many rows of the probe; all by default")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="only these kinds, e.g. --kind chosen --kind rejected")] = None,
    scope: Annotated[str, typer.Option(help="full, readout, backbone, or a regular expression over parameter names")] = "full",
    reference: Annotated[str | None, typer.Option(help="reference model; the policy itself when absent")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="read weights that are there as .bin alone")] = False,
    optimizer: Annotated[
        str | None, typer.Option(help="checkpoint folder of a Trainer: forces are those of its AdamW's coming step")
    ] = None,
    step_rows: Annotated[int, typer.Option(min=1, help="rows of one step, under --optimizer")] = 32,
    max_length: Annotated[int | None, typer.Option(min=2, help="longest sequence in tokens")] = None,
    truncate: Annotated[str, typer.Option(help="what --max-length cuts: end, of the answer; start, of the prompt")] = "end",
    memory: Annotated[str, typer.Option(help="what tangents may take, e.g. 2GiB")] = "4GiB",
    observable: Annotated[str, typer.Option(help="log-prob, entropy, margin, mass:ID,…, logit:ID")] = "log-prob",
    by: Annotated[str | None, typer.Option(help="also the forces by layer, module or kind of parameter")] = None,
    block: Annotated[int, typer.Option(min=1, help="rows that are written together: what a kill loses at most")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="go on with a scan that was begun there")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what it will take, by a few rows; write nothing")] = False,
    shard: Annotated[str | None, typer.Option(help="i/n: of n jobs the i-th, from 0; all into one folder")] = None,
) -> None:
    """What every row and token of a data set does to each kind of answer of a probe set: exact forces, row by row.

    Each row is an update of its own. Written as it is computed; Ctrl-C, SIGTERM or a kill lose the block at hand, and --resume
    goes on. Then `tokdyn report OUT`.
    """
    with plain_errors():
        from .. import _arguments as arguments
        from ..loading import check_device, find_model, load_optimizer, load_tokenizer, load_weights
        from ..runs.folder import check_scan

        arguments.objective_name(objective, arguments.objective_names())
        chosen, part = arguments.constants(set_ or []), arguments.shard_of(shard)
        arguments.size_in_bytes(memory)
        if truncate not in ("end", "start"):
            raise ValueError(f'--truncate must be "end" or "start", got {truncate!r}')
        arguments.scope_pattern(scope)
        arguments.check_observable(observable)
        arguments.check_by(by)
        for name, with_adapter in [(model, adapter), *([(reference, None)] if reference else [])]:
            find_model(name, with_adapter)
        *paths, watched = (data_file(name) for name in (*data, probe))
        if not dry_run:
            check_scan(out, joining=resume or part is not None or joins())

        if device == "cuda" and "LOCAL_RANK" in os.environ:
            device = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun, accelerate: a process a GPU

        import tokdyn as td

        loss = td.objectives.by_name(objective, **chosen)
        check_device(device)
        about: dict[str, Any] = {
            "model": {"name": model} | ({"adapter": adapter} if adapter else {}),
            "probe": {"path": str(watched), "rows": probe_rows, "kinds": kind},
            "given": {"reference": reference, "optimizer": optimizer, "device": device, "observable": observable},
        }
        with progress() as stage:
            stage(f"loading {model}", 0, 0)
            tokenizer = load_tokenizer(model, adapter)
            length: dict[str, Any] = {} if max_length is None else {"max_length": max_length, "truncate": truncate}
            groups = td.probes.load(tokenizer, watched, types=kind, rows=probe_rows, **length)
            lm = load_weights(model, device, adapter=adapter, allow_pickle=allow_pickle)
            stepping = load_optimizer(lm, optimizer) if optimizer else None
            other = load_weights(reference, device, allow_pickle=allow_pickle) if reference else None
            asked: dict[str, Any] = dict(
                tokenizer=tokenizer, scope=scope, optimizer=stepping, step_rows=step_rows, reference=other, memory=memory,
                observable=observable, by=by, limit=rows, **length,
            )  # fmt: skip
            if dry_run:
                stage("timing the first rows", 0, 0)
                said = td.scan.estimate(lm, paths, groups, loss, **asked).lines()  # type: ignore[attr-defined]
                out_console.print("\n".join(said), soft_wrap=True)
                return
            try:
                found = td.scan(
                    lm, paths, groups, loss, out=out, block=block, shard=part, resume=resume, about=about, stage=stage, **asked
                )
            except KeyboardInterrupt:
                if (out / "run.json").exists():
                    err_console.print(f"interrupted; what is in {out} can be read, and --resume goes on", style="yellow")
                    raise typer.Exit(130) from None
                raise
        if part is not None or os.environ.get("RANK", "0") == "0":  # of a job the first process alone
            print_scan(found)


def joins() -> bool:
    """Whether this is one of a job's processes, which all write into one folder, or a job that was started anew."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def print_scan(found: Any) -> None:
    """What a folder holds, in two lines."""
    rows = found.rows(["problem", "tokens"])
    problems = rows.num_rows - rows["problem"].null_count
    left = f", {len(found.missing)} blocks are missing (--resume, or other shards)" if found.missing else ""
    bad = f", {problems} of them without tokens (column `problem` says why)" if problems else ""
    tokens = sum(rows["tokens"].to_pylist())
    out_console.print(f"{rows.num_rows:,} rows{bad}, {tokens:,} tokens, {len(found.groups)} groups{left}", soft_wrap=True)
    out_console.print(f"Scan in {found.path}; its page: tokdyn report {found.path}", soft_wrap=True)


def profile_row(
    folder: Path, row: int | None, *, method: str, memory: str, eta: float | None, overwrite: bool, resume: bool, unit: str,
    per: str, allow_pickle: bool,
) -> None:  # fmt: skip
    """A full profile of one row of a scan, by its model, loss and probe, in its profiles/; its own answers are watched too."""
    from .. import _arguments as arguments
    from .._rows import source
    from ..runs.scans import Scan

    arguments.check_method(method)
    arguments.check_view(unit, per)
    if row is None:
        raise ValueError("--scan needs --row, the number of a row from 1, as its page and `tokdyn report` name them")
    found = Scan(folder)
    given, settings = found.about.get("given"), found.about["settings"]
    paths = [each.get("path") for each in found.about["data"]]
    if given is None or not all(paths):
        raise ValueError(f"{folder} was not made by `tokdyn scan` of files: call td.profile with its model and rows")
    places = source(paths, settings["limit"]).read(row - 1, row)
    if not places:
        raise ValueError(f"the data of {folder} has {found.size} rows, there is no row {row}")
    where, raw = places[0]
    if isinstance(raw, ValueError):
        raise raw

    import tokdyn as td

    from ..data import row_sequences
    from ..loading import load_tokenizer, load_weights
    from ..runs.summary import summary

    model, loss = found.about["model"], td.objectives.by_name(**_named(found.about["objective"]))
    with progress() as stage:
        stage(f"loading {model['name']}", 0, 0)
        tokenizer = load_tokenizer(model["name"], model.get("adapter"))
        probe = found.about["probe"]
        groups = td.probes.load(tokenizer, probe["path"], types=probe["kinds"], rows=probe["rows"], **settings["encoding"])
        update = row_sequences(tokenizer, raw, loss, where, **settings["encoding"])
        watched = [*update, *(chi.with_(group=chi.group + 1) for chis in groups.values() for chi in chis)]
        lm = load_weights(model["name"], given["device"], adapter=model.get("adapter"), allow_pickle=allow_pickle)
        other = load_weights(given["reference"], given["device"], allow_pickle=allow_pickle) if given["reference"] else None
        run = td.profile(
            lm, update, watched, loss, tokenizer=tokenizer, eta=eta, scope=settings["scope"], method=method, memory=memory,
            reference=other, observable=given.get("observable", "log-prob"), overwrite=overwrite, resume=resume, stage=stage,
            out=found.path / "profiles" / f"row-{row:07d}",
            about={"model": model, "data": {"path": where, "rows": 1, "used": 1}},
        )  # fmt: skip
    out_console.print(summary(run.about, run.tokens, run.matrix, unit=unit, per=per))
    out_console.print(f"Run in {run.path}; the next `tokdyn report {folder}` links to its page", soft_wrap=True)


def _named(objective: dict[str, Any]) -> dict[str, Any]:
    return {"name": objective["name"]} | objective["arguments"]
