"""Every operator beside plain torch, torch.compile and other projects' kernels, in one run on one machine: `tokdyn bench`.

The arguments of `bench` are the options of the command, and so more than five.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .cases import Bar, Case, cases_on
from .measure import MIB, Call, Floors, floors, interleaved, machine, once, peak_memory, spread, steady_memory, versions

Stage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """Where and how the sides of a case are measured; the fields are those arguments of `bench`."""

    device: torch.device
    quick: bool
    rounds: int
    seconds: float
    memory: bool


def bench(
    *,
    device: str = "cpu",
    ops: Sequence[str] = (),
    sides: Sequence[str] = (),
    quick: bool = False,
    rounds: int = 7,
    seconds: float = 60.0,
    memory: bool = True,
    stage: Stage = lambda what, done, total: None,
) -> dict[str, Any]:
    """Times, rates, peak memory and shares of the machine's floor for every operator and every side that runs.

    Args:
        device: "cpu" or "cuda".
        ops: the operators, all when empty; "readout_forces:bfloat16" for the cases of one dtype.
        sides: who takes part ("cpp", "triton", "cuda", "eager", "compile", "liger", ...: how a side's name begins); all when
            empty. A side that does not run is reported with the reason.
        quick: small sizes, to see that everything runs.
        rounds, seconds: the sides of a case take turns for so many rounds; after three, a case ends when so long has passed.
        memory: also measure peak memory, on a CPU in a process of its own for every case.
        stage: called with what is measured next, the number of cases done, and the number of all.

    Returns:
        machine, versions, date, settings, floors (GB/s and TFLOP/s), rows (one for a side of a case) and bars (the numbers
        that a side is held to, each met, missed or not measured). It is JSON.

    Raises:
        ValueError: no such device, operator or side.
    """
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here: take device cpu")
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device}")
    every = cases_on(place, quick)
    _known("operator", [op.partition(":")[0] for op in ops], {case.op for case in every})
    _known("dtype", [op.partition(":")[2] for op in ops], {_kind(case) for case in every})
    _known("side", sides, {side.split(",")[0] for case in every for side in case.sides})
    chosen = [case for case in every if not ops or case.op in ops or f"{case.op}:{_kind(case)}" in ops]
    about = dict(device=device, quick=quick, rounds=rounds, seconds=seconds, ops=list(ops), sides=list(sides))
    found: dict[str, Any] = dict(
        machine=machine(place), versions=versions(), date=datetime.date.today().isoformat(), settings=about, rows=[], bars=[]
    )
    stage("measuring the machine", 0, 0)
    limits = floors(place, tuple({case.dtype for case in chosen}), quick)
    found["floors"] = dict(
        gb_per_s=round(limits.bandwidth / 1e9, 2),
        tflop_per_s={str(dtype).removeprefix("torch."): round(rate / 1e12, 3) for dtype, rate in limits.flops.items()},
    )
    for done, case in enumerate(chosen):
        stage(f"{case.name} {_kind(case)}", done, len(chosen))
        mine = [name for name in case.sides if not sides or any(name.startswith(side) for side in sides)]
        rows = measured(case, mine, limits, Settings(place, quick, rounds, seconds, memory))
        found["rows"] += rows.values()
        if not quick:
            found["bars"] += [held(bar, case, rows) for bar in case.bars]
    return found


def join(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of bench() on one machine as one, each row with the share of the floor that its own run measured.

    A side that was measured twice keeps what came first; what that lacks, as peak memory, is taken from the other. The bars are
    held again, against all rows. `parts` lists load, floors, rounds and operators of every run.

    Raises:
        ValueError: no runs, or runs on different machines, with different versions or of different sizes.
    """
    if not runs:
        raise ValueError("join needs at least one run")

    def about(run: dict[str, Any]) -> dict[str, Any]:
        machine = {key: run["machine"][key] for key in ("processor", "system", "processors", "threads", "gpu")}
        return dict(machine=machine, versions=run["versions"], device=run["settings"]["device"], quick=run["settings"]["quick"])

    for run in runs[1:]:
        if about(run) != about(runs[0]):
            raise ValueError(f"runs of different machines, versions or sizes: {about(runs[0])} and {about(run)}")
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    parts = []
    for run in runs:
        ops = list(dict.fromkeys(row["op"] for row in run["rows"]))
        parts.append(
            dict(
                ops=ops,
                load=run["machine"].get("load"),
                floors=run["floors"],
                rounds=run["settings"]["rounds"],
                date=run["date"],
            )
        )
        for row in run["rows"]:
            key = row["case"], row["dtype"], row["side"]
            rows[key] = row | rows[key] if key in rows and rows[key]["ran"] >= row["ran"] else row
    found = dict(runs[0], date=max(run["date"] for run in runs), rows=[], bars=[], parts=parts)
    for case in cases_on(torch.device(runs[0]["settings"]["device"]), runs[0]["settings"]["quick"]):
        mine = {side: row for (name, dtype, side), row in rows.items() if (name, dtype) == (case.name, _kind(case))}
        found["rows"] += mine.values()
        if mine and not runs[0]["settings"]["quick"]:
            found["bars"] += [held(bar, case, mine) for bar in case.bars]
    return found


def _kind(case: Case) -> str:
    """The dtype as "float32"."""
    return str(case.dtype).removeprefix("torch.")


def _known(what: str, given: Sequence[str], known: set[str]) -> None:
    """ValueError for a given name that no known one begins with."""
    for name in given:
        if not any(k.startswith(name) for k in known):
            raise ValueError(f"no {what} {name!r} on this device: there are {', '.join(sorted(known))}")


def measured(case: Case, names: list[str], limits: Floors, settings: Settings) -> dict[str, dict[str, Any]]:
    """Run the named sides of a case: {side: row} with times, rates, difference from the reference and peak memory.

    A side that raises is part of the result: its row has ran=False and the reason.
    """
    device = settings.device
    inputs = case.make(device)
    rows = {name: dict(case=case.name, op=case.op, dtype=_kind(case), sizes=case.sizes, side=name, ran=True) for name in names}
    calls: dict[str, Call] = {}
    repeats, results = {}, {}
    for name in names if case.timed else []:
        call = calls[name] = functools.partial(case.sides[name], *inputs)
        try:
            with torch.no_grad():
                results[name] = case.main(call())
                alone = once(call, device)
                repeats[name] = min(100, math.ceil(5e-3 / max(alone, 1e-6))) if device.type == "cuda" else 1
                if settings.memory and device.type == "cuda":
                    rows[name]["peak_mib"] = round(peak_memory(call, device) / MIB, 1)
        except Exception as error:
            rows[name] |= dict(ran=False, why=_said(error))
            del calls[name]
    with torch.no_grad():
        times = interleaved(calls, device, rounds=settings.rounds, seconds=settings.seconds, repeats=repeats)
    base = next((name for name in ("reference", "eager") if name in results), None)
    for name, taken in times.items():
        median, low, high = spread(taken)
        floor = limits.seconds(case.moved, case.flops, case.dtype)
        rows[name] |= dict(
            seconds=taken, median_ms=1e3 * median, low_ms=1e3 * low, high_ms=1e3 * high, floor_share=floor / median,
            gb_per_s=case.moved / median / 1e9 or None, tflop_per_s=case.flops / median / 1e12 or None,
            differs=_difference(results[name], results[base]) if base else None,
        )  # fmt: skip
    if settings.memory and device.type == "cpu":
        del inputs, results, calls
        _add_memory(rows, case, settings.quick)
    return rows


def _add_memory(rows: dict[str, dict[str, Any]], case: Case, quick: bool) -> None:
    """Add the peak memory of every side that ran, measured in a new process (`tokdyn.bench.memory`)."""
    names = [name for name, row in rows.items() if row["ran"]]
    request = dict(case=case.name, dtype=str(case.dtype), sides=names, quick=quick, threads=torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-m", "tokdyn.bench.memory", json.dumps(request)], capture_output=True, text=True,
        env=os.environ | steady_memory(),
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for answer in answers:
        rows[answer.pop("side")] |= answer
    for name in names[len(answers) :]:
        rows[name]["memory_why"] = f"the process that measures memory ended with {done.returncode}: {done.stderr[-300:]}"


def _difference(result: torch.Tensor, base: torch.Tensor) -> float | None:
    """‖result - base‖ / ‖base‖; None for results of another shape."""
    if result.shape != base.shape:
        return None
    total = float(base.double().norm())
    return float((result.double() - base.double()).norm()) / total if total else 0.0


def _said(error: Exception) -> str:
    """An error as one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def held(bar: Bar, case: Case, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compare a bar with the rows of its case: the value, and whether it is met; None where a side did not run."""
    mine, other = rows.get(bar.side, {}), rows.get(bar.other, {})

    def ratio(field: str, over: dict[str, Any], under: dict[str, Any]) -> float | None:
        return over[field] / max(under[field], 1e-9) if field in over and field in under else None

    value, text, least = {
        "speedup": (ratio("median_ms", other, mine), f"at least {bar.limit:g}x faster than {bar.other}", True),
        "times": (ratio("median_ms", mine, other), f"at most {bar.limit:g}x the time of {bar.other}", False),
        "memory": (ratio("peak_mib", mine, other), f"at most {bar.limit:g}x the memory of {bar.other}", False),
        "floor": (mine.get("floor_share"), f"at least {bar.limit:.0%} of the floor", True),
        "ms": (mine.get("median_ms"), f"at most {bar.limit:g} ms", False),
        "mib": (mine.get("peak_mib"), f"at most {bar.limit:g} MiB", False),
    }[bar.measure]
    met = None if value is None else (value >= bar.limit if least else value <= bar.limit)
    return dict(case=case.name, dtype=_kind(case), side=bar.side, bar=text, value=value, met=met)
