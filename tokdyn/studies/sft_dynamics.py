"""What supervised training on the chosen answers does to twelve kinds of other answers to the same prompts.

Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), §4.1 and its figure on SFT: the chosen answer's
log-probability rises monotonically; answers similar to it (rephrasings, the rejected one) rise too, for a while, since K is
large between them, and the pull fades or turns as the model becomes confident; random words fall. Twelve kinds exist in the
paper's probe sets (`data=` their folder); of the shipped pairs `td.probes` makes the six that need no writer.

Robust, asserted: the chosen answers rise at every reading and more than any other kind, and on the shipped pairs the rejected
ones rise at first. Measured: which kinds rise at first and which turn, and whether random words fall: they do where a model
knows its words already, while a small model on a small set first learns which words that set uses.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

import tokdyn as td

from .. import probes
from ..loading import load_model
from . import texts, training
from .figures import BLUE, COLOURS, GREEN, GREY, PURPLE, VERMILION, band, figure
from .result import Claim, Result, estimate

PAPER = "arXiv 2407.10490 §4.1"
SIMILAR = ("chosen_gptsemantic", "chosen_gptformat", "rejected", "reject_gptsemantic", "reject_gptformat")
RANDOM = ("random_permute", "random_nonhum")


def run(quick: bool = False, seed: int = 0, data: str | Path | None = None) -> Result:
    """Supervised training with readings of every kind of answer.

    Args:
        quick: one seed and three passes over the data instead of five seeds and ten passes.
        seed: of the first run.
        data: the folder of the paper's probe sets, or a preference file; the shipped pairs when absent.
    """
    model, tokenizer = load_model()
    rows = texts.pairs(data, 24 if quick else 100, tokenizer=tokenizer, longest=160)
    train, held_out = rows[: len(rows) * 3 // 4], rows[len(rows) * 3 // 4 :]
    table: list[dict[str, Any]] = []
    for run_seed in range(seed, seed + (1 if quick else 5)):
        for epoch, kind, values in follow(model, tokenizer, train, held_out, seed=run_seed, epochs=3 if quick else 10):
            table += [{"seed": run_seed, "epoch": epoch, "kind": kind, "row": i, "log_prob": v} for i, v in enumerate(values)]
    return conclude(table, len(train))


def conclude(table: list[dict[str, Any]], prompts: int) -> Result:
    """The study's claims and figure, computed from the table of readings that `run` took."""
    import pyarrow as pa

    curves = by_kind(table)
    kinds = list(curves)
    chosen = [b - a for run in curves["chosen"].values() for a, b in zip(run, run[1:], strict=False)]
    total = {kind: [run[-1] - run[0] for run in curves[kind].values()] for kind in kinds}
    peak = {kind: [max(run) - run[-1] for run in curves[kind].values()] for kind in kinds}
    rise = {kind: [max(run) - run[0] for run in curves[kind].values()] for kind in kinds}
    similar = [kind for kind in SIMILAR if kind in kinds]
    mean = {kind: sum(values) / len(values) for kind, values in total.items()}
    others = [kind for kind in kinds if kind != "chosen"]
    first, last = (sum(estimate(of[kind]).low > 0 for kind in others) for of in (rise, total))
    said = f"of {len(others)} other kinds {first} rise at first and {last} end higher"
    claims = [
        Claim(
            f"The chosen answer rises monotonically ({PAPER})",
            "mean log-probability per token rises at every reading of every run",
            f"smallest change between readings {min(chosen):+.3f} nats a token, in all {_words(total['chosen'])}",
            min(chosen) > 0,
        ),
        Claim(
            f"Answers similar to the chosen one rise with it at first ({PAPER})",
            f"{', '.join(similar)}: highest reading above the first in every run",
            "; ".join(f"{kind} {_words(rise[kind])}" for kind in similar),
            all(min(rise[kind]) > 0 for kind in similar),
        ),
        Claim(
            f"and then fall again ({PAPER})",
            f"{', '.join(similar)}: last reading below the highest, and that one after the first, in every run",
            "; ".join(f"{kind} {_words(peak[kind])} below its peak, after a rise in {sum(x > 0 for x in rise[kind])} of "
                      f"{len(rise[kind])} runs" for kind in similar),
            all(min(peak[kind]) > 0 and min(rise[kind]) > 0 for kind in similar),
        ),
        Claim(
            f"Random words fall ({PAPER})",
            "mean change of random_permute and random_nonhum below 0, interval too",
            "; ".join(f"{kind} {_words(total[kind])}" for kind in RANDOM),
            all(estimate(total[kind]).high < 0 for kind in RANDOM),
        ),
        Claim(
            f"The order of words is learned, not words alone ({PAPER}, the order of its curves)",
            "the chosen answer rises more than every other kind, its own words in random order included",
            "; ".join(f"{kind} {mean[kind]:+.2f}" for kind in sorted(kinds, key=lambda k: -mean[k])) + " nats a token",
            all(mean["chosen"] > mean[kind] for kind in kinds if kind != "chosen"),
        ),
    ]  # fmt: skip
    return Result(
        f"Training on the chosen answers lifts them by {mean['chosen']:.2f} nats a token; {said}",
        claims, {"log_probs": pa.Table.from_pylist(table)},
        {"sft_dynamics": _figure(curves, f"The chosen answers rise by {mean['chosen']:.2f} nats a token; {said}")},
        notes=f"{prompts} prompts trained on, {len(curves['chosen'])} run(s); kinds: {', '.join(kinds)}. irr_test answers a "
        "prompt that is not trained on.",
    )  # fmt: skip


def follow(
    model: Any, tokenizer: Any, train: list[texts.Row], held_out: list[texts.Row], *, seed: int, epochs: int
) -> list[tuple[float, str, list[float]]]:
    """(epoch, kind, log-probability per token of each row) at every reading of a supervised training on the chosen answers."""
    watched = probe(tokenizer, train, held_out, seed)
    model = copy.deepcopy(model)
    chosen = texts.chis(tokenizer, train, "chosen")
    optimizer, objective, readings = training.adam(model, 2e-4), td.objectives.SFT(), []
    order = list(training.batches(chosen, 6, seed, epochs=epochs))
    per_epoch = len(order) / epochs
    every = max(1, round(per_epoch))
    for n in range(len(order) + 1):
        if n % every == 0 or n == len(order):
            readings += [(n / per_epoch, kind, training.read(model, chis).log_prob.tolist()) for kind, chis in watched.items()]
        if n < len(order):
            training.step(model, optimizer, objective, order[n], mean_over=sum(len(chi) for chi in order[n]))
    return readings


def probe(tokenizer: Any, train: list[texts.Row], held_out: list[texts.Row], seed: int, n: int = 16) -> dict[str, list[Any]]:
    """kind -> sequences, of up to n of the rows trained on."""
    rows = probes.build(train, held_out=held_out, rows=min(n, len(train)), seed=seed)
    kinds = [kind for kind in probes.TYPES if all(kind in row for row in rows)]
    return {kind: texts.chis(tokenizer, rows, kind) for kind in kinds}


def by_kind(table: list[dict[str, Any]]) -> dict[str, dict[int, list[float]]]:
    """kind -> seed -> mean over rows at each reading."""
    found: dict[str, dict[int, dict[float, list[float]]]] = {}
    for row in table:
        found.setdefault(row["kind"], {}).setdefault(row["seed"], {}).setdefault(row["epoch"], []).append(row["log_prob"])
    return {kind: {s: [sum(v) / len(v) for v in runs.values()] for s, runs in of.items()} for kind, of in found.items()}


def _words(values: list[float]) -> str:
    return estimate(values).words("nats a token")


def _figure(curves: dict[str, dict[int, list[float]]], title: str) -> Any:
    made, axes = figure(title=title, height=4)
    colour = {"chosen": BLUE, "rejected": VERMILION, "random_nonhum": GREY, "random_permute": PURPLE, "irr_train": GREEN}
    spare = [c for c in COLOURS if c not in colour.values()]
    others = iter([(c, dashes) for dashes in ("--", ":", "-.") for c in spare])  # a pair of its own for each kind
    for kind, runs in curves.items():
        lines = torch.tensor(list(runs.values()))
        c, dashes = (colour[kind], "-") if kind in colour else next(others)
        band(axes, range(lines.shape[1]), (lines - lines[:, :1]).numpy(), c, kind.replace("_", " "), linestyle=dashes)
    axes.set(xlabel="passes over the training data", ylabel="change of log-probability (nats a token)",
             title="mean over prompts; band: 95% over seeds")  # fmt: skip
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.legend(ncols=3)
    return made
