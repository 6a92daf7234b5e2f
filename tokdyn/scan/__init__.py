"""scan(): what every row and token of a data set does to groups of observed answers, written as it is computed.

One backward pass a group over the observed answers; then, block by block of rows, one forward pass and one tangent pass a
group (exact/scanning.py). Nothing in memory grows with the number of rows. Blocks are files that count once they are whole
(runs/manifest.py): a killed scan goes on where it was, several processes share one folder, and a block's bytes depend on its
rows alone.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._rows import Source, source
from ..exact.parts import By
from ..objective import Objective
from ..objectives import DPO
from ..observables import Function, Observable
from ..runs import manifest
from ..runs.folder import ABOUT, check_scan, finite
from ..runs.job import Own, Queue, job
from ..runs.scans import ROWS, TOKENS, Scan
from ..sequences import Chi
from .estimate import estimate
from .scanner import Scanner, opened
from .weights import weights

Stage = Callable[[str, int, int], None]
BLOCK = 64  # rows of a block


def scan(
    model: nn.Module,
    rows: Any,
    observe: Mapping[str, Sequence[Chi]] | Sequence[Chi],
    objective: Objective = DPO(),  # noqa: B008
    *,
    out: str | Path,
    tokenizer: Any = None,
    scope: str = "full",
    optimizer: torch.optim.Optimizer | None = None,
    step_rows: int = 32,
    reference: nn.Module | None = None,
    memory: int | str = "4GiB",
    observable: Observable | Function | str = "log-prob",
    by: By | None = None,
    block: int = BLOCK,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    stage: Stage | None = None,
    **encoding: Any,
) -> Scan:
    """Force of every token of every row of a data set on every group of observed answers, F[g,l] = Σ_{m in g} F[m,l].

    Each row is an update of its own, with the objective's loss on it alone: Δ Σ_{m in g} log pi(y_m) ≈ eta Σ_l F[g,l] over its
    tokens l, nats per unit learning rate. It equals td.forces(model, row, group, objective, reduce="observe").vector.

    Args:
        model: a causal LM; it is left as it was.
        rows: data files (a path or several), a datasets.Dataset, or rows: as `data.read` takes them, or lists of Chi.
        observe: groups of sequences by name, as `probes.load` makes them, or one group.
        objective, scope: as in `forces`.
        out: the folder.
        tokenizer: needed where rows are texts.
        optimizer: F is then that of its coming step on `step_rows` rows one after the other, on the mean of their losses; it
            counts for the row's own loss, so that the step's share of it is lr / step_rows. As in `forces`, P is held fixed.
        step_rows: see optimizer; a block holds whole steps.
        reference: model of log pi_ref where rows do not bring it; the policy itself when absent.
        memory: what tangents may take beside the model, its directions and a forward pass.
        observable: what is watched at the observed tokens, as in `forces`; a force is then on its sum over a group.
        by: how forces are divided by what moves, as in `forces`: the columns "force_GROUP · PART" beside "force_GROUP".
        block: rows that are written together: what a kill loses at most.
        limit: the first so many rows.
        shard: (i, n): of n processes the i-th, from 0, which takes every n-th block. All may run at once, into one folder.
        resume: go on in a folder where something was begun with the same arguments.
        about: further entries of run.json.
        stage: called with (what, done, total).
        encoding: of `encode`: max_length, truncate, eos.

    In a job of several processes (torchrun, accelerate launch, a process group) each has the whole model, and they share out
    the blocks by a queue on the group's store (runs/job.py); all return when all is done.

    Rows that cannot be read, or hold nothing to learn, are kept in the row table with the reason and have no tokens.

    Raises:
        FileExistsError: there is a folder already, and resume is False, or it cannot be written to (`check_scan`).
        ValueError: as `forces`; a folder that was begun with other rows, groups, parameters or settings (which is said); out
            of memory.

    Cost: one backward pass over each group; a forward pass and a tangent pass a group for every batch of rows (for each part
    with `by`), and a backward pass too under an optimizer; memory for a copy of the moving parameters for each group (two
    under an optimizer).
    """
    groups = dict(observe) if isinstance(observe, Mapping) else {"observed": observe}
    settings = _settings(block, step_rows if optimizer is not None else None, limit, encoding)
    table, place = source(rows, limit), Path(out)
    end = None if table.size is None else -(-table.size // block)
    team = job() if shard is None else None
    own = Own(end, None if shard is None else _checked_shard(shard))
    joining = resume or shard is not None or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    with contextlib.ExitStack() as stack:
        if team is None:
            check_scan(place, joining)
        else:
            stack.enter_context(team.living())
            team.end, team.done = end, lambda k: any(c.key == _key(k) for c in manifest.committed(place))
            team.first_says(lambda: check_scan(place, joining))
        of_rows = stack.enter_context(
            opened(
                model, groups, objective, tokenizer=tokenizer, scope=scope, optimizer=optimizer, step_rows=step_rows,
                reference=reference, memory=memory, observable=observable, by=by, **encoding,
            )
        )  # fmt: skip
        identity = of_rows.identity | {"data": table.about, "settings": settings | {"rows": table.size, "scope": scope}}
        blocks = own if team is None else team
        with manifest.Writer(place, blocks.name, identity) as writer:
            _write_about(writer, of_rows.record | identity, about or {})
            _run(of_rows, table, writer, blocks, block, stage)
    return Scan(place)


def _settings(block: int, step_rows: int | None, limit: int | None, encoding: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder's blocks must agree on beside model, groups and data.

    Raises:
        ValueError: a number out of range, or a block that does not hold whole steps.
    """
    for name, value in (("block", block), ("step_rows", step_rows), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if step_rows is not None and block % step_rows:
        raise ValueError(f"a block must hold whole steps: block={block} is not a multiple of step_rows={step_rows}")
    return {"block": block, "step_rows": step_rows, "limit": limit, "encoding": dict(encoding)}


def _checked_shard(shard: tuple[int, int]) -> tuple[int, int]:
    i, n = shard
    if not 0 <= i < n:
        raise ValueError(f"shard must be (i, n) with 0 <= i < n, got ({i}, {n})")
    return i, n


def _write_about(writer: manifest.Writer, record: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Write run.json, unless another process or an earlier run has; under a name of one's own until it is whole."""
    path = writer.folder / ABOUT
    part = path.with_name(f".{ABOUT}.{writer.name}.part")
    part.unlink(missing_ok=True)  # of a killed run
    if path.exists():
        return
    mixed = {k: record[k] | x if isinstance(x, dict) and isinstance(record.get(k), dict) else x for k, x in more.items()}
    text = json.dumps(finite({**record, **mixed}), indent=1, ensure_ascii=False, allow_nan=False)
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    manifest.sync_folder(writer.folder)


def _key(k: int) -> str:
    return f"{k:07d}"


def _run(of_rows: Scanner, table: Source, writer: manifest.Writer, blocks: Own | Queue, block: int, stage: Any) -> None:
    """Do the blocks that are not done, and commit each."""
    import pyarrow.parquet as pq

    for k in blocks:
        if stage:
            stage("rows", min(k * block, table.size or k * block), table.size or 0)
        places = [] if writer.done(_key(k)) else table.read(k * block, (k + 1) * block)
        if not places:
            blocks.finished(k, empty=not writer.done(_key(k)))
            continue
        try:
            tables = dict(zip((TOKENS, ROWS), of_rows.tables(places, first=k * block), strict=True))
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            raise ValueError(
                f"out of memory at rows {k * block + 1} to {k * block + len(places)}: give less memory=, fewer groups, or "
                f"shorter sequences (max_length=). What is in {writer.folder} can be read, and gone on with"
            ) from error
        try:
            write = {name: partial(pq.write_table, table, compression="zstd") for name, table in tables.items()}
            writer.commit(write, _key(k))
            blocks.finished(k)
        except OSError as error:
            raise OSError(
                f"{writer.folder} cannot be written to ({error.strerror or error}): what is there can be read, and gone on with"
            ) from error


def _out_of_memory(error: BaseException) -> bool:
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "allocate memory" in said


scan.weights = weights  # type: ignore[attr-defined]  # td.scan is the function: what belongs to it hangs on it
scan.estimate = estimate  # type: ignore[attr-defined]
