"""Does CHES, a score of how alike two answers look to the model, find the pairs that displace the chosen one in DPO?

Razin et al., *Unintentional Unalignment* (arXiv 2410.08847), §4: the chosen answer's likelihood falls in preference training
where chosen and rejected answer have similar hidden states. The centred hidden embedding similarity CHES = <Σh⁺, Σh⁻> -
‖Σh⁺‖² ranks pairs by it, and leaving out those with a high score prevents the fall. Here: DPO on the third of the pairs with
the lowest score, on the third with the highest, and on random thirds, all of equal length.

Identity, asserted: CHES is the readout's force without its factor <g, g>.
Measured, over seeds, each with pairs of its own: displacement on the trained pairs.
"""

from __future__ import annotations

import copy
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tokdyn as td

from ..loading import load_model
from . import texts, training
from .dpo_decay import changes, follow
from .figures import BLUE, GREY, ORANGE, VERMILION, figure
from .parts import Keep, unkept
from .result import Claim, Estimate, Result, above, below, estimate, of_runs, told

PAPER = "arXiv 2410.08847 §4"
THIRDS = ("low CHES", "high CHES", "random")


def run(
    quick: bool = False,
    seed: int = 0,
    model: str = "demo",
    data: str | Path | None = None,
    keep: Keep = unkept,
    runs: int | None = None,
) -> Result:
    """DPO on the pairs of lowest and of highest CHES, and on random ones.

    Args:
        quick: 24 pairs, one seed, two passes instead of up to 72 pairs, five seeds, six passes.
        seed: of the first run.
        model: a folder or a hub name.
        data: texts instead of the shipped pairs (`texts.pairs`).
        keep: where finished seeds are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    start, tokenizer = load_model(model)
    rows = texts.pairs(data, tokenizer=tokenizer, longest=128)
    seeds = range(seed, seed + (runs or (1 if quick else 5)))
    parts = [keep(f"seed-{s}", partial(_seed, start, tokenizer, rows, quick, s)) for s in seeds]
    return conclude([row for part in parts for row in part["table"]], [row for part in parts for row in part["scores"]],
                    max(part["gap"] for part in parts))  # fmt: skip


def _seed(model: Any, tokenizer: Any, rows: list[texts.Row], quick: bool, seed: int) -> dict[str, Any]:
    """One seed on pairs of its own: the readings of all three trainings, the scores, and the error of the identity."""
    rows = texts.drawn(rows, 24 if quick else 72, seed)
    tuned = copy.deepcopy(model)
    training.sft(tuned, texts.chis(tokenizer, rows, "chosen"), epochs=1, lr=1e-4, seed=seed)
    scored = [scores(tuned, texts.preferences(tokenizer, [row])) for row in rows]
    table: list[dict[str, Any]] = []
    for name, members in thirds(scored, seed).items():
        kept = [rows[i] for i in members]
        watched = {kind: texts.chis(tokenizer, kept, kind) for kind in ("chosen", "rejected")}
        readings = follow(tuned, tokenizer, kept, watched, td.objectives.DPO(), epochs=2 if quick else 6, seed=seed)
        table += [{"variant": name, "seed": seed, "pair": members[row["row"]]} | row for row in readings]
    gap = _identity(tuned, texts.preferences(tokenizer, rows[:1]))
    return {"table": table, "scores": [{"seed": seed, "pair": i} | row for i, row in enumerate(scored)], "gap": gap}


def thirds(scored: list[dict[str, float]], seed: int) -> dict[str, list[int]]:
    """Pairs of low, high and random CHES, each third with as long answers: one of every three neighbours in length."""
    order = sorted(range(len(scored)), key=lambda i: scored[i]["length"])
    triples = [sorted(order[k : k + 3], key=lambda i: scored[i]["ches"]) for k in range(0, len(order) - len(order) % 3, 3)]
    rng = random.Random(seed)
    return {
        "low CHES": [t[0] for t in triples],
        "high CHES": [t[2] for t in triples],
        "random": [rng.choice(t) for t in triples],
    }


def conclude(table: list[dict[str, Any]], scored: list[dict[str, float]], gap: float) -> Result:
    """The study's claims and figure, computed from the table of readings that `run` took."""
    import pyarrow as pa

    seeds = sorted({row["seed"] for row in table})
    change = {name: changes(table, name, "chosen") for name in THIRDS}
    low, high, chance = (of_runs(change[name]) for name in THIRDS)
    held, against = (_beyond(change["low CHES"], change[other]) for other in THIRDS[1:])
    rank = {key: estimate(_rank(table, scored, key, s) for s in seeds) for key in ("ches", "ches_normalised", "length")}
    claims = [
        Claim(
            "CHES is the readout's force without its factor <g, g> (identity; docs/theory.md, The kernel)",
            "the readout's force of the rejected answer's tokens on the chosen one's is (h⁺·h⁻) <g⁺, g⁻>, to float32 rounding",
            f"relative difference {gap:.1e}",
            told(gap < 1e-4),
        ),
        Claim(
            f"Pairs with a low score displace the chosen answer less ({PAPER})",
            "after DPO on the low third the chosen answers stand higher, against their start, than on the high third of equal "
            "length",
            f"low {low.words()}, high {high.words()}, difference {held.words()} nats a token",
            above(held),
        ),
        Claim(
            f"Filtering by CHES beats random filtering ({PAPER}, §6)",
            "the low third stands higher than a random third of equal length",
            f"difference {against.words()} nats a token; random {chance.words()}",
            above(against),
        ),
        Claim(
            f"The score ranks single pairs by displacement ({PAPER})",
            "rank correlation of CHES with the chosen answer's change over the pairs of a random third: below 0, its interval "
            "too",
            f"CHES {rank['ches'].words()}, length-normalised {rank['ches_normalised'].words()}; the chosen answer's length "
            f"alone {rank['length'].words()}",
            below(rank["ches"]),
        ),
    ]
    return Result(
        f"DPO on the pairs of lowest CHES moves the chosen answers by {low.mean:+.2f} nats a token, on those of highest, as "
        f"long, by {high.mean:+.2f}",
        claims, {"scores": pa.Table.from_pylist(scored), "readings": pa.Table.from_pylist(table)},
        {"ches_filter": _figure(table, low.mean, high.mean)},
        notes=f"{len(scored) // len(seeds)} pairs a seed in thirds of {len(change['random'][0])}, {len(seeds)} seed(s), DPO "
        "after one pass of SFT. The unnormalised score grows with length; so each third has one of every three pairs that are "
        f"neighbours in length: {_lengths(table, scored)} tokens in the mean.",
    )  # fmt: skip


def _beyond(mine: list[list[float]], other: list[list[float]]) -> Estimate:
    """How much more the answers of one third change than those of another, triple by triple."""
    return of_runs([a - b for a, b in zip(x, y, strict=True)] for x, y in zip(mine, other, strict=True))


def _lengths(table: list[dict[str, Any]], scored: list[dict[str, float]]) -> str:
    """The mean length of the chosen answers of each third."""
    of = {(row["seed"], row["pair"]): row["length"] for row in scored}
    said = []
    for name in THIRDS:
        members = {(row["seed"], row["pair"]) for row in table if row["variant"] == name}
        said.append(f"{name} {sum(of[pair] for pair in members) / len(members):.1f}")
    return ", ".join(said)


def _rank(table: list[dict[str, Any]], scored: list[dict[str, float]], key: str, seed: int) -> float:
    """Rank correlation of a score with the chosen answer's change at the end, over the random third of one seed."""
    mine = [row for row in table if (row["variant"], row["kind"], row["seed"]) == ("random", "chosen", seed)]
    ended = [row for row in mine if row["epoch"] == max(row["epoch"] for row in mine)]
    of = {(row["seed"], row["pair"]): row[key] for row in scored}
    columns = [of[seed, row["pair"]] for row in ended], [row["change"] for row in ended]
    return td.rank_correlation(*(torch.tensor(column, dtype=torch.float64) for column in columns))


@torch.no_grad()
def scores(model: Any, pair: list[td.Chi]) -> dict[str, float]:
    """CHES of one pair, plain and length-normalised, and the chosen answer's length; forward passes only."""
    plus, minus = (h.double() for h in training.hidden(model, pair))
    p, n = plus.sum(0), minus.sum(0)
    a, b = len(plus), len(minus)
    return {"ches": float(p @ n - p @ p), "ches_normalised": float(p @ n / (a * b) - p @ p / a**2), "length": a}


@torch.no_grad()
def _identity(model: Any, pair: list[td.Chi]) -> float:
    """Relative error of (h⁺·h⁻) <g⁺, g⁻> as the readout's force of the rejected answer's tokens on the chosen one's."""
    plus, minus = (h.double() for h in training.hidden(model, pair))
    z = training.logits(model, pair).double()
    g = torch.nn.functional.one_hot(training.targets(pair), z.shape[1]) - z.softmax(1)
    force = td.forces(model, pair[1:], pair[:1], td.objectives.SFT(), scope="readout").matrix
    assert force is not None
    truth = (plus @ minus.T) * (g[: len(plus)] @ g[len(plus) :].T)
    return float((force - truth).norm() / truth.norm())


def _figure(table: list[dict[str, Any]], low: float, high: float) -> Any:
    title = f"DPO moves the chosen answers {low:+.2f} on pairs of low CHES, {high:+.2f} on pairs of high CHES"
    made, axes = figure(1, 2, title=title, width=10, height=3.6)
    for panel, key in zip(axes, ("chosen", "rejected"), strict=True):
        for name, colour in (("low CHES", BLUE), ("random", ORANGE), ("high CHES", VERMILION)):
            for n, s in enumerate(sorted({row["seed"] for row in table})):
                path: dict[int, list[float]] = {}
                for row in table:
                    if (row["variant"], row["kind"], row["seed"]) == (name, key, s):
                        path.setdefault(row["epoch"], []).append(row["change"])
                values = [sum(v) / len(v) for v in path.values()]
                panel.plot(values, color=colour, alpha=0.8, label=None if n else name)
        panel.axhline(0, color=GREY, linewidth=0.8)
        panel.set(xlabel="passes over the pairs", ylabel="change of log-probability (nats a token)", title=f"{key} answers")
    axes[0].legend()
    return made
