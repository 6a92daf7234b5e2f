"""Does CHES, a score of how alike two answers look to the model, find the pairs that displace the chosen one in DPO?

Razin et al., *Unintentional Unalignment* (arXiv 2410.08847), §4: the chosen answer's likelihood falls in preference training
where chosen and rejected answer have similar hidden states. The centred hidden embedding similarity CHES = <Σh⁺, Σh⁻> -
‖Σh⁺‖² ranks pairs by it, and leaving out those with a high score prevents the fall. Here: DPO on the third of the pairs with
the lowest score, on the third with the highest, and on random thirds.

Identity, asserted: CHES is the readout's force without its factor <g, g>.
Measured, over seeds: displacement on the trained pairs.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import torch

import tokdyn as td

from ..loading import load_model
from . import texts, training
from .dpo_decay import follow, means
from .figures import BLUE, GREY, ORANGE, VERMILION, figure
from .result import Claim, Result, estimate

PAPER = "arXiv 2410.08847 §4"


def run(quick: bool = False, seed: int = 0, data: str | Path | None = None) -> Result:
    """DPO on the pairs of lowest and of highest CHES, and on random ones.

    Args:
        quick: 24 pairs, two seeds, two passes instead of up to 128 pairs, five seeds, eight passes.
        seed: of the first run.
        data: texts instead of the shipped pairs (`texts.pairs`).
    """
    model, tokenizer = load_model()
    rows = texts.pairs(data, 24 if quick else 128, tokenizer=tokenizer, longest=128)
    tuned = copy.deepcopy(model)
    training.sft(tuned, texts.chis(tokenizer, rows, "chosen"), epochs=1, lr=1e-4, seed=seed)
    scored = [scores(tuned, texts.preferences(tokenizer, [row])) for row in rows]
    third = len(rows) // 3
    order = sorted(range(len(rows)), key=lambda i: scored[i]["ches"])
    table: list[dict[str, Any]] = []
    for s in range(seed, seed + (2 if quick else 5)):
        thirds = {"low CHES": order[:third], "high CHES": order[-third:],
                  "random": random.Random(s).sample(range(len(rows)), third)}  # fmt: skip
        for name, members in thirds.items():
            kept = [rows[i] for i in members]
            watched = {kind: texts.chis(tokenizer, kept, kind) for kind in ("chosen", "rejected")}
            readings = follow(tuned, tokenizer, kept, watched, td.objectives.DPO(), epochs=2 if quick else 8, seed=s)
            table += [{"variant": name, "seed": s, "pair": members[row["row"]]} | row for row in readings]
    return conclude(table, scored, _identity(tuned, texts.preferences(tokenizer, rows[:1])))


def conclude(table: list[dict[str, Any]], scored: list[dict[str, float]], gap: float) -> Result:
    """The study's claims and figure, computed from the table of readings that `run` took."""
    import pyarrow as pa

    seeds = sorted({row["seed"] for row in table})
    by_seed = {
        name: [means([row for row in table if row["seed"] == s], name)[-1]["chosen"] for s in seeds]
        for name in ("low CHES", "high CHES", "random")
    }
    held = [a - b for a, b in zip(by_seed["low CHES"], by_seed["high CHES"], strict=True)]
    against = [a - b for a, b in zip(by_seed["low CHES"], by_seed["random"], strict=True)]
    rank = {key: estimate(_rank(table, scored, key, s) for s in seeds) for key in ("ches", "ches_normalised", "length")}
    claims = [
        Claim(
            "CHES is the readout's force without its factor <g, g> (identity; docs/theory.md, The kernel)",
            "the readout's force of the rejected answer's tokens on the chosen one's is (h⁺·h⁻) <g⁺, g⁻>, to float32 rounding",
            f"relative difference {gap:.1e}",
            gap < 1e-4,
        ),
        Claim(
            f"Pairs with a low score displace the chosen answer less ({PAPER})",
            "after DPO on the low third the chosen answers stand higher, against their start, than on the high third",
            f"low {_words(by_seed['low CHES'])}, high {_words(by_seed['high CHES'])}, difference {_words(held)} nats a token",
            estimate(held).low > 0,
        ),
        Claim(
            f"Filtering by CHES beats random filtering ({PAPER}, §6)",
            "the low third stands higher than a random third",
            f"difference {_words(against)} nats a token",
            estimate(against).low > 0,
        ),
        Claim(
            f"The score ranks single pairs by displacement ({PAPER})",
            "rank correlation of CHES with the chosen answer's change over the pairs of a random third: below 0, its interval "
            "too",
            f"CHES {rank['ches'].words()}, length-normalised {rank['ches_normalised'].words()}; the chosen answer's length "
            f"alone {rank['length'].words()}",
            rank["ches"].high < 0,
        ),
    ]
    return Result(
        f"DPO on the pairs of lowest CHES moves the chosen answers by {sum(by_seed['low CHES']) / len(held):+.2f} nats a "
        f"token, on those of highest by {sum(by_seed['high CHES']) / len(held):+.2f}",
        claims, {"scores": pa.Table.from_pylist(scored), "readings": pa.Table.from_pylist(table)},
        {"ches_filter": _figure(table, by_seed)},
        notes=f"{len(scored)} pairs in thirds of {len(scored) // 3}, {len(held)} seeds, DPO after one pass of SFT. The "
        "unnormalised score grows with length: the thirds differ in that too.",
    )  # fmt: skip


def _rank(table: list[dict[str, Any]], scored: list[dict[str, float]], key: str, seed: int) -> float:
    """Rank correlation of a score with the chosen answer's change at the end, over the random third of one seed."""
    mine = [row for row in table if (row["variant"], row["kind"], row["seed"]) == ("random", "chosen", seed)]
    ended = [row for row in mine if row["epoch"] == max(row["epoch"] for row in mine)]
    columns = [scored[row["pair"]][key] for row in ended], [row["change"] for row in ended]
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


def _words(values: list[float]) -> str:
    return estimate(values).words()


def _figure(table: list[dict[str, Any]], by_seed: dict[str, list[float]]) -> Any:
    low, high = (sum(by_seed[name]) / len(by_seed[name]) for name in ("low CHES", "high CHES"))
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
