"""Learning one prompt's answer makes it likelier behind other prompts too: the kind of hallucination that SFT teaches.

Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), §4.1: during supervised training the answer y_j of
one training prompt rises also behind another one x_u (irr_train in their plots), although that pair is never trained on,
since every token of y_j is pulled up in a context much like its own; an answer to a prompt outside the training set rises
less.

Robust, asserted: every foreign training answer's mean log-probability rises, more than an unseen prompt's answer, and the
exact force says so before the first step. Measured: how much of the answer's own rise goes along.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tokdyn as td

from ..loading import load_model
from . import texts, training
from .figures import BLUE, GREEN, GREY, VERMILION, band, figure
from .result import Claim, Result, estimate

PAPER = "arXiv 2407.10490 §4.1"
KINDS = {"own": "y_u behind x_u, trained", "foreign": "y_j behind x_u, both trained, not together",
         "unseen": "y of an unseen prompt behind x_u"}  # fmt: skip


def run(quick: bool = False, seed: int = 0, data: str | Path | None = None) -> Result:
    """SFT, reading the log-probability of own, foreign and unseen answers behind the training prompts.

    Args:
        quick: 16 prompts, one seed, three passes instead of up to 96 prompts, five seeds, eight passes.
        seed: of the first run.
        data: texts instead of the shipped pairs (`texts.pairs`).
    """
    import pyarrow as pa

    model, tokenizer = load_model()
    rows = texts.pairs(data, 24 if quick else 128, tokenizer=tokenizer, longest=160)
    train, unseen = rows[: len(rows) * 3 // 4], rows[len(rows) * 3 // 4 :]
    n = min(8 if quick else 24, len(train))
    groups = {"own": train, "foreign": train[1:] + train[:1], "unseen": unseen * (len(train) // len(unseen) + 1)}
    watched = {
        kind: [td.encode(tokenizer, train[i]["prompt"], of[i]["chosen"], group=i) for i in range(n)]
        for kind, of in groups.items()
    }  # fmt: skip
    update = texts.chis(tokenizer, train, "chosen")
    pull = {kind: _force(model, update, chis) for kind, chis in watched.items()}
    table: list[dict[str, Any]] = []
    for run_seed in range(seed, seed + (1 if quick else 5)):
        table += [{"seed": run_seed} | row for row in _follow(model, update, watched, run_seed, 3 if quick else 8)]
    change = {kind: _changes(table, kind) for kind in KINDS}
    beyond = [a - b for a, b in zip(change["foreign"], change["unseen"], strict=True)]
    claims = [
        Claim(
            f"SFT lifts the answer of another training prompt behind x_u ({PAPER})",
            "mean change of log pi(y_j | x_u) over training above 0",
            estimate(change["foreign"]).words("nats a token", of="answers"),
            estimate(change["foreign"]).low > 0,
        ),
        Claim(
            f"more than the answer of a prompt that is not trained on ({PAPER}, irr_train against irr_test)",
            "mean difference above 0",
            f"{estimate(beyond).words('nats a token', of='prompts')}; unseen {estimate(change['unseen']).words(of='answers')}",
            estimate(beyond).low > 0,
        ),
        Claim(
            "The exact force says so before the first step (docs/theory.md, Phenomena)",
            "mean force of the whole training set per token: foreign answers above 0, and between own and unseen ones",
            ", ".join(f"{kind} {value:+.3g}" for kind, value in pull.items()) + " nats a token per unit learning rate",
            pull["foreign"] > 0 and pull["own"] > pull["foreign"] > pull["unseen"],
        ),
    ]
    share = sum(change["foreign"]) / sum(change["own"])
    return Result(
        f"Behind a foreign prompt a trained answer rises by {100 * share:.0f}% of what it rises behind its own",
        claims, {"log_probs": pa.Table.from_pylist(table)}, {"hallucination": _figure(table)},
        notes=f"{len(train)} prompts trained on, {n} watched. The force on an unseen prompt's answer is above 0 too, and yet "
        "it falls: before the first step forces tell the order of the three, not what a whole training does.",
    )  # fmt: skip


def _force(model: Any, update: list[td.Chi], observe: list[td.Chi]) -> float:
    """Exact force of the whole training set on the answers, mean over their tokens."""
    vector = td.forces(model, update, observe, reduce="update").vector
    assert vector is not None
    return float(vector.mean())


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


def _changes(table: list[dict[str, Any]], kind: str) -> list[float]:
    """Last minus first reading of every answer, mean over seeds."""
    last = max(row["epoch"] for row in table)
    ends: dict[int, dict[int, list[float]]] = {}
    for row in table:
        if row["kind"] == kind and row["epoch"] in (0, last):
            ends.setdefault(row["row"], {}).setdefault(row["epoch"], []).append(row["log_prob"])
    return [sum(of[last]) / len(of[last]) - sum(of[0]) / len(of[0]) for of in ends.values()]


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
