"""What does supervised training on the rejected answers too, before DPO, do to the chosen answers and the first choice in it?

Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), §5: DPO squeezes because the rejected answer lies
in a valley that supervised training on y⁺ alone has dug. Training on both answers first ("extend") lifts the rejected one out
of it, so that the negative gradient of the DPO that follows takes its mass from the rejected answer itself.

Robust, asserted: the extended start has more likely rejected answers. Measured, over seeds: the decay of the chosen answers
at equal margin, and how far the first choice rises where it is
another token than the rejected answer's (see dpo-decay).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tokdyn as td

from ..interventions import both_answers
from . import texts, training
from .dpo_decay import beyond, common, follow, means, seeds, standing, variants
from .figures import BLUE, GREY, ORANGE, figure
from .parts import Keep, unkept
from .result import Claim, Result, above, below, estimate, of_runs

PAPER = "arXiv 2407.10490 §5"


def run(
    quick: bool = False,
    seed: int = 0,
    model: str = "demo",
    data: str | Path | None = None,
    keep: Keep = unkept,
    runs: int | None = None,
) -> Result:
    """Run DPO after SFT on the chosen answers, and after SFT on both.

    Args:
        quick: 8 pairs, one seed, four passes of DPO instead of 24 pairs, five seeds, eight passes.
        seed: of the first run.
        model: a folder or a hub name.
        data: texts instead of the shipped pairs (`texts.pairs`).
        keep: where finished seeds are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    seeds = range(seed, seed + (runs or (1 if quick else 5)))
    table = texts.of_seeds(_seed, model, data, quick, seeds, keep)
    return conclude(table, len({row["row"] for row in table}))


def _seed(model: Any, tokenizer: Any, rows: list[texts.Row], quick: bool, seed: int) -> list[dict[str, Any]]:
    """The readings of both trainings on one seed's pairs."""
    rows = texts.drawn(rows, 8 if quick else 24, seed)
    pairs = [td.encode(tokenizer, row["prompt"], row["completion"]) for row in both_answers(rows)]
    table: list[dict[str, Any]] = []
    for name, chis in {"chosen only": texts.chis(tokenizer, rows, "chosen"), "both answers": pairs}.items():
        tuned = copy.deepcopy(model)
        training.sft(tuned, chis, epochs=4, lr=1e-4, seed=seed)
        watched = {kind: texts.chis(tokenizer, rows, kind) for kind in ("chosen", "rejected")}
        readings = follow(tuned, tokenizer, rows, watched, td.objectives.DPO(), epochs=4 if quick else 8, seed=seed)
        table += [{"variant": name, "seed": seed} | row for row in readings]
    return table


def conclude(table: list[dict[str, Any]], pairs: int) -> Result:
    """The study's claims and figure, computed from the table of readings that `run` took."""
    import pyarrow as pa

    names = variants(table)
    margins = common(table, *names)
    margin = estimate(margins).mean
    chosen, first, floating = (beyond(table, "both answers", "chosen only", key) for key in ("chosen", "first", "floating"))
    decay = {name: _decay(table, name, margins) for name in names}
    slower = estimate(b - a for a, b in zip(*decay.values(), strict=True))
    lifted = of_runs(_lifted(table, s) for s in seeds(table))
    claims = [
        Claim(
            f"Training on both answers lifts the rejected ones out of the valley ({PAPER})",
            "log-probability of the rejected answers at the start of DPO: higher than after SFT on the chosen ones alone",
            lifted.words("nats a token"),
            above(lifted),
        ),
        Claim(
            f"The chosen answers then stand higher in DPO ({PAPER})",
            "their change at equal margin is higher than after SFT on the chosen ones alone",
            f"{chosen.words('nats a token')} at a margin of {margin:.2f}",
            above(chosen),
        ),
        Claim(
            f"and decay more slowly ({PAPER}; docs/theory.md, Phenomena)",
            "what they have lost from their highest reading at equal margin is less, the difference's interval too",
            f"{_listed(decay)}; difference {slower.words('nats a token')} at a margin of {margin:.2f}",
            below(slower),
        ),
        Claim(
            f"The first choice takes less of the mass ({PAPER})",
            "its change along the rejected answers, where it is another token before DPO, is lower at equal margin",
            f"{first.words('nats a token')} at a margin of {margin:.2f}; floating {floating.words()}",
            below(first),
        ),
    ]
    change = {name: estimate(x["chosen"] for x in standing(table, name, margins)).mean for name in names}
    return Result(
        f"After SFT on both answers DPO moves the chosen one by {change['both answers']:+.2f} nats a token, after SFT on it "
        f"alone by {change['chosen only']:+.2f}, at equal margin",
        claims, {"readings": pa.Table.from_pylist(table)}, {"extended_sft": _figure(table, change)},
        notes=f"{pairs} pairs a seed, {len(seeds(table))} seed(s); both starts take four passes over their data, so that the "
        "extended one takes twice the steps, as in the paper.",
    )  # fmt: skip


def _decay(table: list[dict[str, Any]], variant: str, margins: list[float]) -> list[float]:
    """How far the chosen answers have fallen from their highest reading when a margin is reached, for each seed."""
    found = []
    for s, margin, end in zip(seeds(table), margins, standing(table, variant, margins), strict=True):
        before = [reading["chosen"] for reading in means(table, variant, s) if reading["margin"] <= margin]
        found.append(max([*before, end["chosen"]]) - end["chosen"])
    return found


def _listed(values: dict[str, list[float]]) -> str:
    return "; ".join(f"SFT on {name} {estimate(of).words()}" for name, of in values.items())


def _lifted(table: list[dict[str, Any]], seed: int) -> list[float]:
    """How much likelier each rejected answer of a seed is before DPO after SFT on both answers than after it on one."""
    first = {(row["variant"], row["row"]): row["log_prob"] for row in table
             if (row["kind"], row["epoch"], row["seed"]) == ("rejected", 0, seed)}  # fmt: skip
    return [value - first["chosen only", i] for (name, i), value in first.items() if name == "both answers"]


def _figure(table: list[dict[str, Any]], change: dict[str, float]) -> Any:
    both, alone = change["both answers"], change["chosen only"]
    title = f"DPO moves the chosen answer {both:+.2f} after SFT on both answers, {alone:+.2f} after SFT on it alone"
    made, axes = figure(1, 2, title=title, width=10, height=3.6)
    for panel, key, label in zip(
        axes, ("chosen", "first"), ("chosen answer", "first choice (not y⁻) along the rejected one"), strict=True
    ):
        for name, colour in zip(variants(table), (ORANGE, BLUE), strict=True):
            for n, s in enumerate(seeds(table)):
                readings = means(table, name, s)
                panel.plot([r["margin"] for r in readings], [r[key] for r in readings], "o-", markersize=2.5, color=colour,
                           alpha=0.7, label=None if n else f"SFT on {name}")  # fmt: skip
        panel.axhline(0, color=GREY, linewidth=0.8)
        panel.set(xlabel="margin gained (nats a token)", ylabel="change of log-probability (nats a token)", title=label)
    axes[0].legend()
    return made
