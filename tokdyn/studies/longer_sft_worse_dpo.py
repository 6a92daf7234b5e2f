"""Does DPO cost the chosen answer more, and squeeze more, the longer the supervised training before it?

Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), §4.2: supervised training makes the model's
distributions peakier and the rejected answers, which it does not see, less likely; a negative gradient then presses on a
deeper valley and its mass goes to fewer tokens. So DPO after more passes of SFT should lose more of the chosen answers and
lift the first choice more (where it is not the rejected token: see dpo-decay), at the same margin gained.

Robust, asserted: longer SFT makes the distributions along the rejected answers peakier and every DPO widens the margin.
Measured: whether squeezing grows with it, at one margin, over seeds.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tokdyn as td

from . import texts, training
from .dpo_decay import ANY, beyond, common, follow, margins, means, seeds, standing, variants
from .figures import COLOURS, GREY, figure
from .parts import Keep, unkept
from .result import Claim, Result, above, below, both, estimate, of_runs

PAPER = "arXiv 2407.10490 §4.2"


def run(
    quick: bool = False,
    seed: int = 0,
    model: str = "demo",
    data: str | Path | None = None,
    keep: Keep = unkept,
    runs: int | None = None,
) -> Result:
    """Run DPO from one model after no, few and many passes of SFT.

    Args:
        quick: 12 pairs, one seed, three passes of DPO after 0, 2 or 6 passes of SFT; else 24 pairs, five seeds and six passes
            after 0, 2, 6 or 12.
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
    """The readings of DPO after each length of SFT, on one seed's pairs."""
    rows = texts.drawn(rows, 12 if quick else 24, seed)
    tuned, done = copy.deepcopy(model), 0
    table: list[dict[str, Any]] = []
    for n in (0, 2, 6) if quick else (0, 2, 6, 12):
        training.sft(tuned, texts.chis(tokenizer, rows, "chosen"), epochs=n - done, lr=1e-4, seed=100 * seed + n)
        done = n
        watched = {kind: texts.chis(tokenizer, rows, kind) for kind in ("chosen", "rejected")}
        readings = follow(tuned, tokenizer, rows, watched, td.objectives.DPO(), epochs=3 if quick else 6, seed=seed)
        table += [{"variant": f"{n} passes", "seed": seed} | row for row in readings]
    return table


def conclude(table: list[dict[str, Any]], pairs: int) -> Result:
    """The study's claims and figure, computed from the table of readings that `run` took."""
    import pyarrow as pa

    names = variants(table)
    widest = common(table, *names)
    margin, at = estimate(widest).mean, {name: standing(table, name, widest) for name in names}
    mean = [estimate(run["chosen"] for run in at[name]).mean for name in names]
    chosen, first, floating = (beyond(table, names[-1], names[0], key) for key in ("chosen", "first", "floating"))
    peak = {name: _peak(table, name) for name in names}
    growth = [of_runs([b - a for a, b in zip(x, y, strict=True)] for x, y in zip(peak[a], peak[b], strict=True))
              for a, b in zip(names, names[1:], strict=False)]  # fmt: skip
    gained = [of_runs(margins(table, name)) for name in names]
    claims = [
        Claim(
            f"Supervised training makes the model peakier ({PAPER})",
            "the argmax's log-probability along the rejected answers is higher the longer the SFT, at every step its interval "
            "too",
            "; ".join(f"{name} {of_runs(values).words('nats a token')}" for name, values in peak.items())
            + "; each minus the one before "
            + ", ".join(value.words() for value in growth),
            both(*map(above, growth)),
        ),
        Claim(
            "DPO widens the margin after each (the loss is minimised)",
            "chosen minus rejected rises",
            "; ".join(f"{name} {value.words()}" for name, value in zip(names, gained, strict=True)) + " nats a token",
            both(*map(above, gained)),
        ),
        Claim(
            f"The longer the SFT, the more the chosen answer loses in DPO ({PAPER})",
            "its change at equal margin is lower after the longest SFT than without, the difference's interval below 0",
            _listed(at, "chosen", margin) + f"; last minus first {chosen.words()}",
            below(chosen),
        ),
        Claim(
            f"and the more the first choice rises ({PAPER})",
            "its change along the rejected answers, where it is another token before DPO, is higher at equal margin after the "
            "longest SFT than without, the difference's interval above 0",
            _listed(at, "first", margin) + f"; last minus first {first.words()}; floating {floating.words()}",
            above(first),
        ),
    ]
    return Result(
        f"At a margin of {margin:.2f} nats a token the chosen answer has moved {mean[0]:+.2f} without SFT and "
        f"{mean[-1]:+.2f} after {names[-1]}",
        claims, {"readings": pa.Table.from_pylist(table)}, {"longer_sft_worse_dpo": _figure(table, mean)},
        notes=f"{pairs} pairs a seed, {len(seeds(table))} seed(s); DPO with Adam, one learning rate.",
    )  # fmt: skip


def _peak(table: list[dict[str, Any]], variant: str) -> list[list[float]]:
    """Log-probability of the argmax along each rejected answer before DPO, one list a seed."""
    first = [row for row in table if (row["variant"], row["kind"], row["epoch"]) == (variant, ANY, 0)]
    return [[row["log_prob"] for row in first if row["seed"] == s] for s in seeds(table)]


def _listed(at: dict[str, list[dict[str, float]]], key: str, margin: float) -> str:
    found = [f"{name} {estimate(run[key] for run in of).words()}" for name, of in at.items()]
    return "; ".join(found) + f" nats a token, at a margin of {margin:.2f}"


def _figure(table: list[dict[str, Any]], chosen: list[float]) -> Any:
    title = f"DPO moves the chosen answer {chosen[0]:+.2f} without SFT, {chosen[-1]:+.2f} after {variants(table)[-1]}"
    made, axes = figure(1, 2, title=title, width=10, height=3.6)
    for panel, key, label in zip(
        axes, ("chosen", "first"), ("chosen answer", "first choice (not y⁻) along the rejected one"), strict=True
    ):
        for k, name in enumerate(variants(table)):
            readings = means(table, name)
            panel.plot([r["margin"] for r in readings], [r[key] for r in readings], "o-", markersize=3, color=COLOURS[k],
                       label=f"{name} of SFT")  # fmt: skip
        panel.axhline(0, color=GREY, linewidth=0.8)
        panel.set(xlabel="margin gained (nats a token)", ylabel="change of log-probability (nats a token)", title=label)
    axes[0].legend()
    return made
