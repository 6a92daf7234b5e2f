"""The longer the supervised training before it, the more DPO squeezes.

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
from tokdyn.loading import load_model

from . import texts, training
from .dpo_decay import at_margin, follow, means, variants
from .figures import COLOURS, GREY, figure
from .result import Claim, Result, estimate

PAPER = "arXiv 2407.10490 §4.2"


def run(quick: bool = False, seed: int = 0, data: str | Path | None = None) -> Result:
    """DPO from one model after no, few and many passes of SFT.

    Args:
        quick: 12 pairs, one seed, three passes of DPO after 0, 2 or 6 passes of SFT; else 64 pairs, five seeds and eight passes
            after 0, 2, 6 or 12.
        seed: of the first run.
        data: texts instead of the shipped pairs (`texts.pairs`).
    """
    import pyarrow as pa

    model, tokenizer = load_model()
    rows = texts.pairs(data, 12 if quick else 64, tokenizer=tokenizer, longest=128)
    seeds, passes = range(seed, seed + (1 if quick else 5)), (0, 2, 6) if quick else (0, 2, 6, 12)
    table: list[dict[str, Any]] = []
    peak: dict[int, list[float]] = {n: [] for n in passes}
    for run_seed in seeds:
        tuned, done = copy.deepcopy(model), 0
        for n in passes:
            training.sft(tuned, texts.chis(tokenizer, rows, "chosen"), epochs=n - done, lr=1e-4, seed=100 * run_seed + n)
            done = n
            watched = {kind: texts.chis(tokenizer, rows, kind) for kind in ("chosen", "rejected")}
            peak[n].append(float(training.read(tuned, watched["rejected"]).argmax.mean()))
            readings = follow(tuned, tokenizer, rows, watched, td.objectives.DPO(), epochs=3 if quick else 8, seed=run_seed)
            table += [{"variant": f"{n} passes", "seed": run_seed} | row for row in readings]
    names = variants(table)
    margin = min(max(x["margin"] for x in means(table, name)) for name in names)
    at = {name: at_margin(means(table, name), margin) for name in names}
    by_seed = {
        (name, s): at_margin(means([row for row in table if row["seed"] == s], name), margin) for name in names for s in seeds
    }
    claims = [
        Claim(
            f"Supervised training makes the model peakier ({PAPER})",
            "the argmax's log-probability along the rejected answers is higher the longer the SFT",
            "; ".join(f"{n} passes {sum(values) / len(values):+.3f} nats a token" for n, values in peak.items()),
            all(sum(peak[b]) > sum(peak[a]) for a, b in zip(passes, passes[1:], strict=False)),
        ),
        Claim(
            "DPO widens the margin after each (the loss is minimised)",
            "chosen minus rejected rises",
            "; ".join(f"{name} {means(table, name)[-1]['margin']:+.2f}" for name in names) + " nats a token",
            all(means(table, name)[-1]["margin"] > 0 for name in names),
        ),
        Claim(
            f"The longer the SFT, the more the chosen answer loses in DPO ({PAPER})",
            "its change at equal margin falls with the length of SFT",
            _listed(at, by_seed, "chosen", margin),
            _falling([at[name]["chosen"] for name in names]),
        ),
        Claim(
            f"and the more the argmax rises ({PAPER})",
            "its change at equal margin rises with the length of SFT",
            _listed(at, by_seed, "argmax", margin),
            _falling([-at[name]["argmax"] for name in names]),
        ),
    ]
    return Result(
        f"At a margin of {margin:.2f} nats a token the chosen answer has moved {at[names[0]]['chosen']:+.2f} without SFT and "
        f"{at[names[-1]]['chosen']:+.2f} after {names[-1]}",
        claims, {"readings": pa.Table.from_pylist(table)}, {"longer_sft_worse_dpo": _figure(table, at)},
        notes=f"{len(rows)} pairs, {len(seeds)} seed(s); DPO with Adam, one learning rate.",
    )  # fmt: skip


def _falling(values: list[float]) -> bool:
    return all(b < a for a, b in zip(values, values[1:], strict=False))


def _listed(at: dict[str, dict[str, float]], by_seed: dict[tuple[str, int], dict[str, float]], key: str, margin: float) -> str:
    found = []
    for name, reading in at.items():
        values = [of[key] for (variant, _), of in by_seed.items() if variant == name]
        found.append(f"{name} " + (estimate(values).words() if len(values) > 1 else f"{reading[key]:+.3f}"))
    return "; ".join(found) + f" nats a token, at a margin of {margin:.2f}"


def _figure(table: list[dict[str, Any]], at: dict[str, dict[str, float]]) -> Any:
    first, *_, last = at
    title = f"DPO moves the chosen answer {at[first]['chosen']:+.2f} without SFT, {at[last]['chosen']:+.2f} after {last}"
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
