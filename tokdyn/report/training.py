"""The page of a training: what a monitored run's folder holds, as one self-contained HTML file.

Python reduces the tables to curves (a number per step and kind of response) and to the forces of a few steps; the words at the
top need no script. static/training/*.js draws the rest with the helpers of the profile's page, under the same policy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..runs.folder import PAGE
from ..runs.manifest import replace
from ..runs.watched import is_log_prob, watched
from ..steps import metrics, read
from ..training.fallen import FALLEN, told
from ..training.heartbeat import silent_since
from .page import assemble
from .text import count, facts, show, signed
from .training_maps import ON, own_contexts, probe_groups, token_maps

SCRIPTS = ("format.js", "colour.js", "tip.js", "svg.js", "export.js", "training/data.js", "training/charts.js",
           "training/forces.js", "training/main.js")  # fmt: skip
STYLES = ("page.css", "training/training.css")
FIGURES = (
    "force",
    "force_up_share",
    "c_up",
    "c_down",
    "squeezing",
    "shared_prefix",
    "clipped",
    "fallen",
    "entropy",
    "p_argmax",
    "residual",
)
REFRESH = 20  # seconds between the reloads of a page whose training still runs


def watch(folder: str | Path, *, steps: Sequence[int] | None = None, follow: bool = False, every: float = 20.0) -> Path:
    """Write the page of a training that td.Monitor or td.attach records (`out=`) into its folder, and say where it is.

    The page shows learning curves of each kind of response with what first order predicted, the model's own first choice, the
    balance of forces, and which update tokens moved the probe. While the training runs, the page loads itself anew.

    Args:
        folder: the folder given as `out`.
        steps: the steps whose forces are shown token by token; up to nine evenly spaced ones when absent.
        follow: write it again every so many seconds until the training has ended, or gives no sign of life any more.
        every: seconds.

    Raises:
        FileNotFoundError: the folder holds no run. ValueError: it holds something else, or a step has no forces.
    """
    path = Path(folder)
    while True:
        about, tables = read(path)
        silent = silent_since(path) if about.get("status") == "running" else None
        about |= {"silent_since": silent and silent.isoformat(timespec="seconds")}
        replace(path / PAGE, render(about, tables, steps).encode())
        if not follow or about.get("status") != "running" or silent:
            return path / PAGE
        time.sleep(every)


def render(about: Mapping[str, Any], tables: Mapping[str, Any], steps: Sequence[int] | None = None) -> str:
    """The page of a training as HTML.

    Args:
        about: run.json; `silent_since` is when a run that says "running" gave its last sign of life.
        tables: "tokens", "probe" and "steps" as `tokdyn.steps.read` gives them; any may be None.
        steps: as in `watch`.

    Raises:
        ValueError: a step of `steps` has no forces.

    Cost: reads each table once. The page takes about 100 bytes per token shown and 50 per curve and step, plus 60 kB.
    """
    curves, series = _curves(about, tables.get("probe")), _step_series(tables.get("steps"))
    tokens, unexplained = _drop_unexplained(tables.get("tokens"), series)
    pushes = _forces_by_role(tokens)
    maps = token_maps(tables.get("tokens") if steps else tokens, steps, own_contexts(tables.get("probe")))
    payload = {"status": about.get("status"), "probe": curves, "steps": series, "pushes": pushes, "maps": maps}
    payload["watched"] = watched(about)
    prose = _prose(about, curves, series, pushes, unexplained)
    prose["findings"] = _alarms(series, tokens) + prose["findings"]
    return assemble("training.html.jinja", STYLES, SCRIPTS, payload, prose)


# ---------------------------------------------------------------- curves


def _curves(about: Mapping[str, Any], probe: Any) -> dict[str, Any]:
    """Mean log-probs per token by kind of response: {"steps", "types": [{name, sequences, before, after, predicted, …}]}."""
    if probe is None or not probe.num_rows:
        return {"steps": [], "types": []}
    wanted = ("before", "after", "predicted", "argmax_log_prob")
    means = probe.group_by(["probe", "step"], use_threads=False).aggregate(
        [(name, "mean") for name in wanted] + [("position", "count"), ("sequence", "count_distinct")]
    )
    at = {(row["probe"], row["step"]): row for row in means.to_pylist()}
    steps = sorted({step for _, step in at})
    names = list(dict.fromkeys([*(about.get("probe") or {}), *(name for name, _ in at)]))
    types = []
    for name in (name for name in names if any((name, step) in at for step in steps)):
        rows = [at.get((name, step), {}) for step in steps]
        found = {"name": name, "sequences": max(row.get("sequence_count_distinct", 0) for row in rows)}
        for key, column in zip(("before", "after", "predicted", "argmax"), wanted, strict=True):
            found[key] = [row.get(f"{column}_mean") for row in rows]
        found["path"] = _predicted_path(steps, found["before"], found["predicted"])
        types.append(found)
    return {"steps": steps, "types": types}


def _predicted_path(steps: Sequence[int], before: Sequence[float | None], rates: Sequence[float | None]) -> list[float | None]:
    """Predicted log-prob at each probe step: the first one plus predicted changes, their mean standing for steps in between."""
    at, path = before[0] if before else None, list[float | None]()
    for k, step in enumerate(steps):
        rate, last = rates[k], rates[k - 1] if k else None
        if at is not None and rate is not None:
            between = step - steps[k - 1] - 1 if k else 0
            at += rate + (between * (last + rate) / 2 if last is not None else 0.0)
        path.append(at)
    return path


def _step_series(table: Any) -> dict[str, Any]:
    """Figures of every recorded step, over all ranks: {"step": [...], "force": [...], …}."""
    found: dict[str, Any] = {"step": []} | {name: [] for name in (*FIGURES, "linearity", "accounted", "carried")}
    if table is None:
        return found
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        by_step.setdefault(row["step"], []).append(row)
    for step, rows in sorted(by_step.items()):
        sums: dict[str, float] = {}
        for row in rows:
            for name, value in row.items():
                if name.startswith("sum_") and value is not None:
                    sums[name[4:]] = sums.get(name[4:], 0.0) + value
        figures = metrics(sums | {"steps": 1.0})
        found["step"].append(step)
        for name in FIGURES:
            found[name].append(figures.get(name))
        for name in ("linearity", "accounted", "carried"):
            found[name].append(next((row[name] for row in rows if row.get(name) is not None), None))
    return found


# ---------------------------------------------------------------- forces


def _drop_unexplained(tokens: Any, series: Mapping[str, Any]) -> tuple[Any, list[int]]:
    """The token table without the steps whose forces do not sum to the gradient's effect within 5%, and these steps.

    5% is also the bound of Step.notes. Where more than half of the steps miss it, all are kept: the page must show something.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    known = {step: x for step, x in zip(series["step"], series["accounted"], strict=True) if x is not None}
    unexplained = [step for step, x in known.items() if not abs(x - 1) <= 0.05]
    if tokens is None or not unexplained or 2 * len(unexplained) > len(known):
        return tokens, []
    return tokens.filter(pc.invert(pc.is_in(tokens["step"], value_set=pa.array(unexplained, tokens["step"].type)))), unexplained


def _forces_by_role(tokens: Any) -> dict[str, Any]:
    """Force of each role's tokens on each probe group, summed in each step, nats: {"steps", "roles", "groups"}."""
    names = probe_groups(tokens)
    if not names:
        return {"steps": [], "roles": [], "groups": []}
    sums = tokens.group_by(["step", "role"], use_threads=False).aggregate([(ON + name, "sum") for name in names])
    rows = [row for row in sums.to_pylist() if any(row[f"{ON}{name}_sum"] is not None for name in names)]
    steps, roles = sorted({row["step"] for row in rows}), sorted({row["role"] for row in rows})
    at = {(row["step"], row["role"]): row for row in rows}
    groups = [
        {"name": name, "sums": [[at.get((step, role), {}).get(f"{ON}{name}_sum") for step in steps] for role in roles]}
        for name in names
    ]
    return {"steps": steps, "roles": roles, "groups": groups}


# ---------------------------------------------------------------- words


def _prose(
    about: Mapping[str, Any], curves: Mapping[str, Any], series: Mapping[str, Any], pushes: Mapping[str, Any],
    unexplained: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """The words and tables of the page that do not need a script."""
    model, settings, versions = (about.get(key) or {} for key in ("model", "settings", "versions"))
    status, recorded = about.get("status") or "complete", series["step"]
    last = about.get("steps") or (recorded[-1] if recorded else 0)
    problems = [str(text) for text in about.get("problems") or []]
    details = (
        count(model.get("parameters"), "parameter"),
        f"{len(recorded):,} step{'' if len(recorded) == 1 else 's'} recorded",
        curves["steps"] and f"probe at {len(curves['steps']):,} of them",
        curves["types"] and f"{len(curves['types'])} kind{'' if len(curves['types']) == 1 else 's'} of response watched",
    )
    return {
        "model": model.get("name") or "a model",
        "status": status,
        "watched": watched(about),
        "written": _moment(about.get("written")),
        "silent": _moment(about.get("silent_since")),
        "refresh": REFRESH if status == "running" and not about.get("silent_since") else None,
        "last": f"{last:,}",
        "recorded": len(recorded),
        "details": [str(item) for item in details if item],
        "problems": problems[:5],
        "more_problems": max(0, len(problems) - 5),
        "findings": _findings(about, curves, series, pushes),
        "version": versions.get("tokdyn") or "",
        "unexplained": ("steps " if len(unexplained) > 1 else "step ") * bool(unexplained)
        + ", ".join(f"{step:,}" for step in unexplained[:8])
        + (", …" if len(unexplained) > 8 else ""),
        "tables": [
            {"title": title, "rows": rows}
            for title, rows in (
                ("Settings", facts(settings)),
                ("Probe, sequences of each kind", facts(about.get("probe"))),
                ("Versions", facts(versions)),
            )
            if rows
        ],
    }


def _moment(iso: Any) -> str:
    """An ISO time of UTC as a reader writes it, "" where there is none."""
    return str(iso or "").replace("T", " ").replace("+00:00", " UTC")


def _findings(
    about: Mapping[str, Any], curves: Mapping[str, Any], series: Mapping[str, Any], pushes: Mapping[str, Any]
) -> list[dict[str, str]]:
    """What a reader should know first, in whole sentences with their numbers."""
    found, of = list[dict[str, str]](), watched(about)
    moved, top = {}, {}
    for kind in curves["types"]:
        before, after, argmax = (_first_and_last(kind[key]) for key in ("before", "after", "argmax"))
        if before and after:
            moved[kind["name"]] = after[1] - before[0]
        if argmax and len(curves["steps"]) > 1:
            top[kind["name"]] = argmax[1] - argmax[0]
    if moved:
        order = sorted(moved, key=lambda name: -moved[name])
        best, worst = order[0], order[-1]
        title = f"{_spaced(best)} {'rose' if moved[best] > 0 else 'fell'} {'most' if moved[best] > 0 else 'least'}"
        if worst != best:
            title += f", {_spaced(worst)} {'fell most' if moved[worst] < 0 else 'rose least'}"
        listed = ", ".join(f"{_spaced(name)} {signed(moved[name])}" for name in order)
        text = f"Change of the mean {of['label']} of a token over the training, {of['unit']}: {listed}."
        found.append({"title": title[0].upper() + title[1:], "text": text})
    name = "rejected" if "rejected" in top else next(iter(top), None)
    if name is not None:
        rises, answers = top[name] > 0, [moved[kind] for kind in ("chosen", "rejected") if kind in moved]
        text = (
            f"Where the {_spaced(name)} answers stand, the log-probability of what the model itself would say first changed by "
            f"{signed(top[name])} nats on average."
        )
        if is_log_prob(about) and rises and len(answers) == 2 and max(answers) < 0:
            text += (
                " Chosen and rejected answers both fell meanwhile: the probability that was pushed away went to what the model "
                "would have said anyway. This is squeezing."
            )
        found.append({"title": f"The first choice became {'more' if rises else 'less'} likely", "text": text})
    for group in pushes["groups"][:1]:
        totals = {role: sum(x for x in row if x is not None) for role, row in zip(pushes["roles"], group["sums"], strict=True)}
        pulls = ", ".join(f"{_spaced(role)} tokens {signed(value)}" for role, value in totals.items())
        found.append(
            {
                "title": f"What moved the {_spaced(group['name'])} answers",
                "text": f"{of['unit'].capitalize()} on all of them in the {len(pushes['steps'])} steps that were looked at, by "
                f"the gradient of the step itself: {pulls}, together {signed(sum(totals.values()))}.",
            }
        )
    ratios = [x for x in series["linearity"] if x is not None and math.isfinite(x)]
    if ratios:
        middle = median(ratios)
        good = 0.8 < middle < 1.25
        found.append(
            {
                "title": "The forces explain the steps" if good else "Steps are too large for a first-order account",
                "text": f"Change of the probe in a step, real over predicted: {show(middle)} in the middle, between "
                f"{show(min(ratios))} and {show(max(ratios))} over {len(ratios)} steps. 1 is perfect.",
            }
        )
    return found


def _alarms(series: Mapping[str, Any], tokens: Any) -> list[dict[str, str]]:
    """What a training does that nobody asked for, in sentences with their numbers; `tokens` has the forces of probe steps."""
    fallen = {step: x for step, x in zip(series["step"], series["fallen"], strict=True) if x}
    if not fallen:
        return []
    worst = max(fallen, key=lambda step: fallen[step])
    text = (
        f"In {count(len(fallen), 'recorded step')} answers with a positive advantage were less likely than at their rollout; "
        f"in step {worst:,} they held {fallen[worst]:.0%} of the tokens with a positive advantage. "
    )
    if rows := _behind(tokens, fallen):
        text += f"In step {rows[0]['step']:,} {told(rows)}."
    else:
        text += "Give td.attach or td.Monitor a probe: its steps name the tokens that push them down."
    return [{"title": "Good answers fell: lazy likelihood displacement", "text": text}]


def _behind(tokens: Any, fallen: Mapping[int, float]) -> list[dict[str, Any]]:
    """The tokens, with their forces on answers that have fallen, of the step where most had; none where there are no forces."""
    import pyarrow.compute as pc

    if tokens is None or ON + FALLEN not in tokens.column_names:
        return []
    known = tokens.filter(pc.is_valid(tokens[ON + FALLEN]))
    steps = [step for step in known["step"].unique().to_pylist() if step in fallen]
    worst = max(steps, key=lambda step: fallen[step], default=None)
    return [] if worst is None else known.filter(pc.equal(known["step"], worst)).to_pylist()


def _first_and_last(values: Sequence[float | None]) -> tuple[float, float] | None:
    """The first and the last finite value, None where there is none."""
    real = [x for x in values if x is not None and math.isfinite(x)]
    return (real[0], real[-1]) if real else None


def _spaced(name: str) -> str:
    """A kind of response as a reader writes it: "irr train"."""
    return str(name).replace("_", " ")
