"""What supervised training on the chosen answers does to twelve kinds of other answers to the same prompts.

Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), §4.1 and its figure on SFT: the chosen answer's
log-probability rises monotonically; answers similar to it (rephrasings, the rejected one) rise too, for a while, since K is
large between them, and the pull fades or turns as the model becomes confident; random words fall. Twelve kinds exist in the
paper's probe sets (`data=` their folder); of the shipped pairs `td.probes` makes the six that need no writer.

The highest reading of a curve never lies below its first, so a rise is compared with that of a null: irr_test, answers to
prompts that are not trained on. The same for a turn, the smaller of the rise to the highest reading and the fall from it.

Robust, asserted: the chosen answers rise at every reading and more than any other kind. Measured, over seeds, each with rows of
its own: which kinds rise at first and which turn, and whether random words fall: they do where a model knows its words already,
while a small model on a small set first learns which words that set uses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tokdyn as td

from .. import probes
from ..loading import load_model
from . import texts, training
from .figures import BLUE, COLOURS, GREEN, GREY, PURPLE, VERMILION, band, figure
from .parts import Keep, unkept
from .result import Claim, Estimate, Result, above, below, both, of_runs, told

PAPER = "arXiv 2407.10490 §4.1"
SIMILAR = ("chosen_gptsemantic", "chosen_gptformat", "rejected", "reject_gptsemantic", "reject_gptformat")
NULL = "irr_test"
RANDOM = ("random_permute", "random_nonhum")


def run(
    quick: bool = False,
    seed: int = 0,
    model: str = "demo",
    data: str | Path | None = None,
    keep: Keep = unkept,
    runs: int | None = None,
) -> Result:
    """Supervised training with readings of every kind of answer.

    Args:
        quick: 24 rows, one seed and three passes over the data instead of up to 100 rows, five seeds and eight passes.
        seed: of the first run.
        model: a folder or a hub name.
        data: the folder of the paper's probe sets, or a preference file; the shipped pairs when absent.
        keep: where finished seeds are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    start, tokenizer = load_model(model)
    rows = texts.pairs(data, tokenizer=tokenizer, longest=160)
    seeds = range(seed, seed + (runs or (1 if quick else 5)))
    table = [row for s in seeds for row in keep(f"seed-{s}", partial(_seed, start, tokenizer, rows, quick, s))]
    return conclude(table, min(24 if quick else 100, len(rows)) * 3 // 4)


def _seed(model: Any, tokenizer: Any, rows: list[texts.Row], quick: bool, seed: int) -> list[dict[str, Any]]:
    """The readings of one seed, on rows of its own."""
    rows = texts.drawn(rows, 24 if quick else 100, seed)
    train, held_out = rows[: len(rows) * 3 // 4], rows[len(rows) * 3 // 4 :]
    return [
        {"seed": seed, "epoch": epoch, "kind": kind, "row": i, "log_prob": value}
        for epoch, kind, values in follow(model, tokenizer, train, held_out, seed=seed, epochs=3 if quick else 8)
        for i, value in enumerate(values)
    ]


def conclude(table: list[dict[str, Any]], prompts: int) -> Result:
    """The study's claims and figure, computed from the table of readings that `run` took."""
    import pyarrow as pa

    curves = by_kind(table)
    others = [kind for kind in curves if kind != "chosen"]
    total = {kind: of_runs(each(table, kind, _total)) for kind in curves}
    mean = {kind: value.mean for kind, value in total.items()}
    first = sum(above(beyond_null(table, kind, rise)) == "holds" for kind in others if kind != NULL)
    last = sum(above(total[kind]) == "holds" for kind in others)
    said = f"of {len(others)} other kinds {first} rise at first and {last} end higher"
    return Result(
        f"Training on the chosen answers lifts them by {mean['chosen']:.2f} nats a token; {said}",
        [*_of_chosen(table, curves, total), *_of_similar(table, curves)], {"log_probs": pa.Table.from_pylist(table)},
        {"sft_dynamics": _figure(curves, f"The chosen answers rise by {mean['chosen']:.2f} nats a token; {said}")},
        notes=f"{prompts} prompts trained on, {len(curves['chosen'])} run(s); kinds: {', '.join(curves)}. irr_test answers a "
        "prompt that is not trained on.",
    )  # fmt: skip


def _of_chosen(
    table: list[dict[str, Any]], curves: dict[str, dict[int, list[float]]], total: dict[str, Estimate]
) -> list[Claim]:
    """Claims about the chosen answer, the words alone, and the order of all kinds."""
    steps = [b - a for run in curves["chosen"].values() for a, b in zip(run, run[1:], strict=False)]
    more = {kind: of_runs(each(table, "chosen", _total, less=kind)) for kind in curves if kind != "chosen"}
    return [
        Claim(
            f"The chosen answer rises monotonically ({PAPER})",
            "mean log-probability per token rises at every reading of every run",
            f"smallest change between readings {min(steps):+.3f} nats a token, in all {total['chosen'].words('nats a token')}",
            told(min(steps) > 0),
        ),
        Claim(
            f"Random words fall ({PAPER})",
            "mean change of random_permute and random_nonhum below 0, interval too",
            "; ".join(f"{kind} {total[kind].words('nats a token')}" for kind in RANDOM),
            both(*(below(total[kind]) for kind in RANDOM)),
        ),
        Claim(
            f"The order of words is learned, not words alone ({PAPER}, the order of its curves)",
            "the chosen answer rises more than every other kind, its own words in random order included, intervals of the "
            "differences above 0",
            "; ".join(f"{kind} {value.mean:+.2f}" for kind, value in sorted(total.items(), key=lambda item: -item[1].mean))
            + f" nats a token; smallest difference {min(more.values(), key=lambda x: x.low).words()}",
            both(*map(above, more.values())),
        ),
    ]  # fmt: skip


def _of_similar(table: list[dict[str, Any]], curves: dict[str, dict[int, list[float]]]) -> list[Claim]:
    """Claims about the answers that resemble the chosen one, each against the null."""
    similar = [kind for kind in SIMILAR if kind in curves]
    measures: tuple[Measure, Measure] = (rise, turn)
    found = {f: {kind: beyond_null(table, kind, f) for kind in similar} for f in measures}
    null = {f: of_runs(each(table, NULL, f)) for f in measures}

    def words(f: Measure) -> str:
        return (
            "; ".join(f"{kind} {x.words('nats a token')}" for kind, x in found[f].items()) + f"; the null's {null[f].words()}"
        )

    return [
        Claim(
            f"Answers similar to the chosen one rise with it at first ({PAPER})",
            f"{', '.join(similar)}: highest reading minus the first, less what {NULL} shows, above 0, intervals too",
            words(rise),
            both(*map(above, found[rise].values())),
        ),
        Claim(
            f"and then fall again ({PAPER})",
            f"{', '.join(similar)}: the smaller of that rise and of the fall to the last reading, less what {NULL} shows, is "
            "above 0, intervals too",
            words(turn),
            both(*map(above, found[turn].values())),
        ),
    ]


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


Measure = Callable[[Sequence[float]], float]


def rise(curve: Sequence[float]) -> float:
    """Highest reading minus the first; never negative."""
    return max(curve) - curve[0]


def turn(curve: Sequence[float]) -> float:
    """The smaller of the rise to the highest reading and the fall from it; 0 for a curve that goes one way."""
    return min(max(curve) - curve[0], max(curve) - curve[-1])


def _total(curve: Sequence[float]) -> float:
    return curve[-1] - curve[0]


def each(table: list[dict[str, Any]], kind: str, measure: Measure, less: str | None = None) -> list[list[float]]:
    """A measure of the mean curve of each seed; of one seed alone, of the curve of each of its rows.

    `less` takes the same of another kind off; among rows, its mean.
    """
    seeds = list(dict.fromkeys(row["seed"] for row in table))
    if len(seeds) > 1:
        curves = by_kind(table)
        return [[measure(curves[kind][s]) - (measure(curves[less][s]) if less else 0)] for s in seeds]
    of: dict[str, dict[int, list[float]]] = {}
    for row in table:
        of.setdefault(row["kind"], {}).setdefault(row["row"], []).append(row["log_prob"])
    other = sum(map(measure, of[less].values())) / len(of[less]) if less else 0
    return [[measure(curve) - other for curve in of[kind].values()]]


def beyond_null(table: list[dict[str, Any]], kind: str, measure: Measure) -> Estimate:
    """How much more of a measure a kind shows than the null."""
    return of_runs(each(table, kind, measure, less=NULL))


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
