"""Does DPO cost the chosen answer more, and squeeze more, the longer the supervised training before it?

Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), §4.2: supervised training makes the model's
distributions peakier and the rejected answers, which it does not see, less likely; a negative gradient then presses on a
deeper valley and its mass goes to fewer tokens. So DPO after more passes of SFT should lose more of the chosen answers and
lift the argmax more, at the same margin gained.

Robust, asserted: longer SFT makes the distributions along the rejected answers peakier and every DPO widens the margin.
Measured: whether squeezing grows with it, at one margin, over seeds.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tokdyn as td

from ..loading import load_model
from . import texts, training
from .dpo_decay import beyond, common, follow, means, seeds, standing, variants
from .figures import COLOURS, GREY, figure
from .result import Claim, Result, estimate

PAPER = "arXiv 2407.10490 §4.2"


def run(quick: bool = False, seed: int = 0, data: str | Path | None = None) -> Result:
    """Run DPO from one model after no, few and many passes of SFT.

    Args:
        quick: 12 pairs, one seed, three passes of DPO after 0, 2 or 6 passes of SFT; else 40 pairs, five seeds and eight passes
            after 0, 2, 6 or 12.
        seed: of the first run.
        data: texts instead of the shipped pairs (`texts.pairs`).
    """
    model, tokenizer = load_model()
    rows = texts.pairs(data, 12 if quick else 40, tokenizer=tokenizer, longest=128)
    passes = (0, 2, 6) if quick else (0, 2, 6, 12)
    table: list[dict[str, Any]] = []
    for run_seed in range(seed, seed + (1 if quick else 5)):
        tuned, done = copy.deepcopy(model), 0
        for n in passes:
            training.sft(tuned, texts.chis(tokenizer, rows, "chosen"), epochs=n - done, lr=1e-4, seed=100 * run_seed + n)
            done = n
            watched = {kind: texts.chis(tokenizer, rows, kind) for kind in ("chosen", "rejected")}
            readings = follow(tuned, tokenizer, rows, watched, td.objectives.DPO(), epochs=3 if quick else 8, seed=run_seed)
            table += [{"variant": f"{n} passes", "seed": run_seed} | row for row in readings]
    return conclude(table, len(rows))


def conclude(table: list[dict[str, Any]], pairs: int) -> Result:
    """The study's claims and figure, computed from the table of readings that `run` took."""
    import pyarrow as pa

    names = variants(table)
    margins = common(table, *names)
    margin, at = estimate(margins).mean, {name: standing(table, name, margins) for name in names}
    mean = {key: [estimate(run[key] for run in at[name]).mean for name in names] for key in ("chosen", "argmax")}
    chosen, argmax = (beyond(table, names[-1], names[0], key) for key in mean)
    peak = {name: _peak(table, name) for name in names}
    peakier = estimate(b - a for a, b in zip(peak[names[0]], peak[names[-1]], strict=True))
    gained = [estimate(means(table, name, s)[-1]["margin"] for s in seeds(table)) for name in names]
    claims = [
        Claim(
            f"Supervised training makes the model peakier ({PAPER})",
            "the argmax's log-probability along the rejected answers is higher the longer the SFT",
            "; ".join(f"{name} {estimate(values).words('nats a token')}" for name, values in peak.items())
            + f"; last minus first {peakier.words()}",
            peakier.low > 0 and _falling([-sum(values) for values in peak.values()]),
        ),
        Claim(
            "DPO widens the margin after each (the loss is minimised)",
            "chosen minus rejected rises",
            "; ".join(f"{name} {value.words()}" for name, value in zip(names, gained, strict=True)) + " nats a token",
            all(value.low > 0 for value in gained),
        ),
        Claim(
            f"The longer the SFT, the more the chosen answer loses in DPO ({PAPER})",
            "its change at equal margin falls with the length of SFT, last minus first with its interval below 0",
            _listed(at, "chosen", margin) + f"; last minus first {chosen.words()}",
            chosen.high < 0 and _falling(mean["chosen"]),
        ),
        Claim(
            f"and the more the argmax rises ({PAPER})",
            "its change at equal margin rises with the length of SFT, last minus first with its interval above 0",
            _listed(at, "argmax", margin) + f"; last minus first {argmax.words()}",
            argmax.low > 0 and _falling([-value for value in mean["argmax"]]),
        ),
    ]
    return Result(
        f"At a margin of {margin:.2f} nats a token the chosen answer has moved {mean['chosen'][0]:+.2f} without SFT and "
        f"{mean['chosen'][-1]:+.2f} after {names[-1]}",
        claims, {"readings": pa.Table.from_pylist(table)}, {"longer_sft_worse_dpo": _figure(table, mean["chosen"])},
        notes=f"{pairs} pairs, {len(seeds(table))} seed(s); DPO with Adam, one learning rate.",
    )  # fmt: skip


def _peak(table: list[dict[str, Any]], variant: str) -> list[float]:
    """Log-probability of the argmax along the rejected answers before DPO, mean over answers, for each seed."""
    first = [row for row in table if (row["variant"], row["kind"], row["epoch"]) == (variant, "argmax", 0)]
    of = [[row["log_prob"] for row in first if row["seed"] == s] for s in seeds(table)]
    return [sum(values) / len(values) for values in of]


def _falling(values: list[float]) -> bool:
    return all(b < a for a, b in zip(values, values[1:], strict=False))


def _listed(at: dict[str, list[dict[str, float]]], key: str, margin: float) -> str:
    found = [f"{name} {estimate(run[key] for run in of).words()}" for name, of in at.items()]
    return "; ".join(found) + f" nats a token, at a margin of {margin:.2f}"


def _figure(table: list[dict[str, Any]], chosen: list[float]) -> Any:
    title = f"DPO moves the chosen answer {chosen[0]:+.2f} without SFT, {chosen[-1]:+.2f} after {variants(table)[-1]}"
    made, axes = figure(1, 2, title=title, width=10, height=3.6)
    for panel, key, label in zip(axes, ("chosen", "argmax"), ("chosen answer", "argmax along the rejected one"), strict=True):
        for k, name in enumerate(variants(table)):
            readings = means(table, name)
            panel.plot([r["margin"] for r in readings], [r[key] for r in readings], "o-", markersize=3, color=COLOURS[k],
                       label=f"{name} of SFT")  # fmt: skip
        panel.axhline(0, color=GREY, linewidth=0.8)
        panel.set(xlabel="margin gained (nats a token)", ylabel="change of log-probability (nats a token)", title=label)
    axes[0].legend()
    return made
