"""`tokdyn scan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .._app import DATA, app, plain_errors
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
    optimizer: Annotated[
        str | None, typer.Option(help="checkpoint folder of a Trainer: forces are those of its AdamW's coming step")
    ] = None,
    step_rows: Annotated[int, typer.Option(min=1, help="rows of one step, under --optimizer")] = 32,
    max_length: Annotated[int | None, typer.Option(min=2, help="longest sequence in tokens")] = None,
    truncate: Annotated[str, typer.Option(help="what --max-length cuts: end, of the answer; start, of the prompt")] = "end",
    memory: Annotated[str, typer.Option(help="what tangents may take, e.g. 2GiB")] = "4GiB",
    block: Annotated[int, typer.Option(min=1, help="rows that are written together: what a kill loses at most")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="go on with a scan that was begun there")] = False,
    shard: Annotated[str | None, typer.Option(help="i/n: of n jobs the i-th, from 0; all into one folder")] = None,
) -> None:
    """What every row and token of a data set does to each kind of answer of a probe set: exact forces, row by row.

    Each row is an update of its own. Written as it is computed; Ctrl-C, SIGTERM or a kill lose the block at hand, and --resume
    goes on. Then `tokdyn report OUT`.
    """
    with plain_errors():
        from .. import _arguments as arguments
        from ..loading import DEMO_PAIRS, check_device, find_model, load_optimizer, load_tokenizer, load_weights

        arguments.objective_name(objective, arguments.objective_names())
        chosen, part = arguments.constants(set_ or []), arguments.shard_of(shard)
        arguments.size_in_bytes(memory)
        if truncate not in ("end", "start"):
            raise ValueError(f'--truncate must be "end" or "start", got {truncate!r}')
        arguments.scope_pattern(scope)
        for name, with_adapter in [(model, adapter), *([(reference, None)] if reference else [])]:
            find_model(name, with_adapter)
        paths = [DEMO_PAIRS if name == "demo" else Path(name) for name in data]
        watched = DEMO_PAIRS if probe == "demo" else Path(probe)
        for path in (*paths, watched):
            if not path.is_file():
                raise FileNotFoundError(f"no data file {path}: give a .jsonl, .json, .csv or .parquet file")

        import tokdyn as td

        loss = td.objectives.by_name(objective, **chosen)
        check_device(device)
        about: dict[str, Any] = {
            "model": {"name": model} | ({"adapter": adapter} if adapter else {}),
            "probe": {"path": str(watched), "rows": probe_rows, "kinds": kind},
            "given": {"reference": reference, "optimizer": optimizer, "device": device},
        }
        with progress() as stage:
            stage(f"loading {model}", 0, 0)
            tokenizer = load_tokenizer(model, adapter)
            length: dict[str, Any] = {} if max_length is None else {"max_length": max_length, "truncate": truncate}
            groups = td.probes.load(tokenizer, watched, types=kind, rows=probe_rows, **length)
            lm = load_weights(model, device, adapter=adapter)
            try:
                found = td.scan(
                    lm, paths, groups, loss, out=out, tokenizer=tokenizer, scope=scope,
                    optimizer=load_optimizer(lm, optimizer) if optimizer else None, step_rows=step_rows,
                    reference=load_weights(reference, device) if reference else None, memory=memory, block=block, limit=rows,
                    shard=part, resume=resume, about=about, stage=stage, **length,
                )  # fmt: skip
            except KeyboardInterrupt:
                if (out / "run.json").exists():
                    err_console.print(f"interrupted; what is in {out} can be read, and --resume goes on", style="yellow")
                    raise typer.Exit(130) from None
                raise
        print_scan(found)


def print_scan(found: Any) -> None:
    """What a folder holds, in two lines."""
    rows = found.rows(["problem", "tokens"])
    problems = rows.num_rows - rows["problem"].null_count
    left = f", {len(found.missing)} blocks are missing (--resume, or other shards)" if found.missing else ""
    bad = f", {problems} of them without tokens (column `problem` says why)" if problems else ""
    tokens = sum(rows["tokens"].to_pylist())
    out_console.print(f"{rows.num_rows:,} rows{bad}, {tokens:,} tokens, {len(found.groups)} groups{left}", soft_wrap=True)
    out_console.print(f"Scan in {found.path}; its page: tokdyn report {found.path}", soft_wrap=True)
