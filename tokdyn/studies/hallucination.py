"""Learning one prompt's answer makes it likelier behind other prompts too: the kind of hallucination that SFT teaches.

Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), §4.1: during supervised training the answer y_j of
one training prompt rises also behind another one x_u (irr_train in their plots), although that pair is never trained on,
since every token of y_j is pulled up in a context much like its own; an answer to a prompt outside the training set rises
less.

Robust, asserted: every foreign training answer's mean log-probability rises, more than an unseen prompt's answer, and the
exact force says so before the first step. Measured, over seeds, each with prompts of its own: how much of the answer's own rise
goes along.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import tokdyn as td

from ..loading import load_model
from . import texts, training
from .figures import BLUE, GREEN, GREY, VERMILION, band, figure
from .parts import Keep, unkept
from .result import Claim, Result, above, both, of_runs

PAPER = "arXiv 2407.10490 §4.1"
KINDS = {"own": "y_u behind x_u, trained", "foreign": "y_j behind x_u, both trained, not together",
         "unseen": "y of an unseen prompt behind x_u"}  # fmt: skip


def run(
    quick: bool = False,
    seed: int = 0,
    model: str = "demo",
    data: str | Path | None = None,
    keep: Keep = unkept,
    runs: int | None = None,
) -> Result:
    """SFT, reading the log-probability of own, foreign and unseen answers behind the training prompts.

    Args:
        quick: 18 prompts, one seed, three passes instead of up to 60 prompts, five seeds, eight passes.
        seed: of the first run.
        model: a folder or a hub name.
        data: texts instead of the shipped pairs (`texts.pairs`).
        keep: where finished seeds are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    start, tokenizer = load_model(model)
    rows = texts.pairs(data, tokenizer=tokenizer, longest=160)
    seeds = range(seed, seed + (runs or (1 if quick else 5)))
    parts = [keep(f"seed-{s}", partial(_seed, start, tokenizer, rows, quick, s)) for s in seeds]
    return conclude([row for part in parts for row in part["readings"]], [part["forces"] for part in parts])


def _seed(model: Any, tokenizer: Any, rows: list[texts.Row], quick: bool, seed: int) -> dict[str, Any]:
    """Readings of one seed on rows of its own, and the exact force on every watched answer before the first step."""
    rows = texts.drawn(rows, 24 if quick else 80, seed)
    train, unseen = rows[: len(rows) * 3 // 4], rows[len(rows) * 3 // 4 :]
    n = min(8 if quick else 16, len(train))
    groups = {"own": train, "foreign": train[1:] + train[:1], "unseen": unseen * (len(train) // len(unseen) + 1)}
    watched = {
        kind: [td.encode(tokenizer, train[i]["prompt"], of[i]["chosen"], group=i) for i in range(n)]
        for kind, of in groups.items()
    }  # fmt: skip
    update = texts.chis(tokenizer, train, "chosen")
    forces = {kind: _force(model, update, chis) for kind, chis in watched.items()}
    readings = _follow(model, update, watched, seed, 3 if quick else 8)
    return {"forces": forces, "readings": [{"seed": seed} | row for row in readings]}


def conclude(table: list[dict[str, Any]], forces: list[dict[str, list[float]]]) -> Result:
    """The study's claims and figure, from the readings and each seed's forces {kind: [of each answer]}."""
    import pyarrow as pa

    change = {kind: _changes(table, kind) for kind in KINDS}
    risen = {kind: of_runs(runs) for kind, runs in change.items()}
    beyond = of_runs(_less(change["foreign"], change["unseen"]))
    force = {kind: [of[kind] for of in forces] for kind in KINDS}
    forced = {kind: of_runs(runs) for kind, runs in force.items()}
    order = [of_runs(_less(force[a], force[b])) for a, b in (("own", "foreign"), ("foreign", "unseen"))]
    claims = [
        Claim(
            f"SFT lifts the answer of another training prompt behind x_u ({PAPER})",
            "mean change of log pi(y_j | x_u) over training above 0",
            risen["foreign"].words("nats a token"),
            above(risen["foreign"]),
        ),
        Claim(
            f"more than the answer of a prompt that is not trained on ({PAPER}, irr_train against irr_test)",
            "mean difference above 0",
            f"{beyond.words('nats a token')}; unseen {risen['unseen'].words()}",
            above(beyond),
        ),
        Claim(
            "The exact force says so before the first step (docs/theory.md, Phenomena)",
            "mean force of the whole training set per token: foreign answers above 0, below own and above unseen ones, "
            "intervals too",
            ", ".join(f"{kind} {value.words()}" for kind, value in forced.items()) + " nats a token per unit learning rate; "
            f"own minus foreign {order[0].words()}, foreign minus unseen {order[1].words()}",
            both(above(forced["foreign"]), *map(above, order)),
        ),
    ]
    share = risen["foreign"].mean / risen["own"].mean
    return Result(
        f"Behind a foreign prompt a trained answer rises by {100 * share:.0f}% of what it rises behind its own",
        claims, {"log_probs": pa.Table.from_pylist(table)}, {"hallucination": _figure(table)},
        notes=f"{len(forces)} seed(s), {len(change['own'][0])} prompts of each watched. Before the first step forces tell the "
        "order of the three, not what a whole training does.",
    )  # fmt: skip


def _less(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    """Differences answer by answer, one list a seed."""
    return [[x - y for x, y in zip(mine, other, strict=True)] for mine, other in zip(a, b, strict=True)]


def _force(model: Any, update: list[td.Chi], observe: list[td.Chi]) -> list[float]:
    """Exact force of the whole training set on each answer, mean over its tokens."""
    vector = td.forces(model, update, observe, reduce="update").vector
    assert vector is not None
    return [float(part.mean()) for part in vector.split([len(chi) for chi in observe])]


def _follow(model: Any, update: list[td.Chi], watched: dict[str, list[td.Chi]], seed: int, epochs: int) -> list[dict[str, Any]]:
    model = copy.deepcopy(model)
    optimizer, rows = training.adam(model, 2e-4), []
    for epoch in range(epochs + 1):
        for kind, chis in watched.items():
            values = training.read(model, chis).log_prob.tolist()
            rows += [{"epoch": epoch, "kind": kind, "row": i, "log_prob": value} for i, value in enumerate(values)]
        if epoch < epochs:
            for batch in training.batches(update, 6, 1000 * seed + epoch, epochs=1):
                training.step(model, optimizer, td.objectives.SFT(), batch, mean_over=sum(len(chi) for chi in batch))
    return rows


def _changes(table: list[dict[str, Any]], kind: str) -> list[list[float]]:
    """Last minus first reading of every answer, one list a seed."""
    last = max(row["epoch"] for row in table)
    ends = {(row["seed"], row["row"], row["epoch"]): row["log_prob"] for row in table if row["kind"] == kind}
    seeds = sorted({seed for seed, _, _ in ends})
    return [[ends[s, i, last] - ends[s, i, 0] for i in sorted({row for seed, row, _ in ends if seed == s})] for s in seeds]


def _figure(table: list[dict[str, Any]]) -> Any:
    made, axes = figure(title="A trained answer becomes likelier behind other prompts too", height=3.6)
    for (kind, label), colour in zip(KINDS.items(), (BLUE, VERMILION, GREEN), strict=True):
        of: dict[tuple[int, int], list[float]] = {}
        for row in table:
            if row["kind"] == kind:
                of.setdefault((row["seed"], row["row"]), []).append(row["log_prob"])
        changes = [[value - values[0] for value in values] for values in of.values()]
        band(axes, range(len(changes[0])), changes, colour, label)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(xlabel="passes over the training data", ylabel="change of log-probability (nats a token)",
             title="mean and 95% over answers and seeds")  # fmt: skip
    axes.legend()
    return made
