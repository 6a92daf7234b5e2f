"""What preference training does to the chosen answer, the rejected one, and what was most likely anyway.

Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), §3.3 and §4.2: in off-policy DPO the rejected
answer falls most, the chosen answer falls after a while, and the mass goes to the first choice of every position (squeezing).
Theory says that this is weaker where the rejected answer is likely: in on-policy DPO, where both answers are the model's own,
and in SPIN, where the rejected one is. Losses that stop pushing (IPO, SLiC, SPPO) or protect the chosen answer (DPOP) squeeze
less too.

A variant is compared with off-policy DPO at the widest margin that both reach: chosen minus rejected has then grown as much in
each.

Squeezing is read where the first choice along the rejected answer is another token than the answer's own: there the theory
lets it gain. Where the first choice is the rejected token itself the loss pushes it down, and an average over both hides the
gain. The first choice is fixed at the start of the training; the largest log-probability of each moment at the same positions
(floating) is given besides. The paper's own recorded argmax is not this one: its released probe overwrote the argmax along the
chosen answers by that along random_nonhum (issue 2 of its repository, where the author confirms it and finds similar curves
once mended).

Robust, asserted: the rejected answer falls most of all kinds, and the margin grows. Measured: the rest, over seeds, each with
pairs of its own.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokdyn as td

from ..objectives import Objective
from . import sft_dynamics, texts, training
from .figures import BLUE, COLOURS, GREY, INK, VERMILION, figure
from .parts import Keep, unkept
from .result import Claim, Estimate, Result, above, below, both, estimate, of_runs

PAPER = "arXiv 2407.10490 §4.2"
LOSS = td.objectives
VARIANTS: dict[str, tuple[Objective, str]] = {  # name -> loss, where the answers come from
    "DPO": (LOSS.DPO(), "data"), "on-policy DPO": (LOSS.DPO(), "on-policy"), "SPIN": (LOSS.SPIN(), "rejected sampled"),
    "IPO": (LOSS.IPO(), "data"), "SLiC": (LOSS.SLiC(delta=10.0), "data"), "SPPO": (LOSS.SPPO(), "data"),
    "SimPO": (LOSS.SimPO(), "data"), "KTO": (LOSS.KTO(), "data"), "DPOP": (LOSS.DPOP(), "data"),
}  # fmt: skip
QUICK = ("DPO", "on-policy DPO", "SPIN", "DPOP")
FIRST, FLOATING, OWN, ANY = FIRST_CHOICES = (
    "first choice (not y⁻)", "first choice (not y⁻), floating", "first choice (y⁻ itself)", "argmax everywhere")  # fmt: skip


def run(
    quick: bool = False,
    seed: int = 0,
    model: str = "demo",
    data: str | Path | None = None,
    keep: Keep = unkept,
    runs: int | None = None,
) -> Result:
    """Train every variant from the same supervised model, with a reading at every pass.

    Args:
        quick: one seed, four variants, 12 pairs, four passes instead of five seeds, nine variants, 24 pairs, eight passes.
        seed: of the first run.
        model: a folder or a hub name.
        data: the folder of the paper's probe sets, or a preference file; the shipped pairs when absent.
        keep: where finished seeds are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    seeds = range(seed, seed + (runs or (1 if quick else 5)))
    table = texts.of_seeds(_seed, model, data, quick, seeds, keep)
    return conclude(table, len({row["row"] for row in table if row["kind"] == "chosen"}))


def _seed(model: Any, tokenizer: Any, rows: list[texts.Row], quick: bool, seed: int) -> list[dict[str, Any]]:
    """The readings of all variants on one seed's pairs."""
    rows = texts.drawn(rows, 15 if quick else 30, seed)
    train, held_out = rows[: len(rows) * 4 // 5], rows[len(rows) * 4 // 5 :]
    tuned = copy.deepcopy(model)
    training.sft(tuned, texts.chis(tokenizer, train, "chosen"), epochs=2, lr=2e-4, seed=seed)
    table: list[dict[str, Any]] = []
    for name in QUICK if quick else VARIANTS:
        loss, source = VARIANTS[name]
        pairs = sampled(tuned, tokenizer, train, source, seed)
        watched = sft_dynamics.probe(tokenizer, pairs, held_out, seed, 8 if quick else 16)
        watched = {kind: watched[kind] for kind in (watched if name == "DPO" else ("chosen", "rejected"))}
        for row in follow(tuned, tokenizer, pairs, watched, loss, epochs=4 if quick else 8, seed=seed):
            table.append({"variant": name, "seed": seed} | row)
    return table


def conclude(table: list[dict[str, Any]], pairs: int) -> Result:
    """The study's claims and figure, computed from the table of readings that `run` took."""
    import pyarrow as pa

    read = kinds([row for row in table if row["variant"] == "DPO"])  # the first choice may be y⁻ along another's answers alone
    end = {kind: of_runs(changes(table, "DPO", kind)) for kind in read}
    falls = {kind: value.mean for kind, value in end.items()}
    return Result(
        f"DPO presses the rejected answer down by {-falls['rejected']:.2f} nats a token; the chosen one moves by "
        f"{falls['chosen']:+.2f}, the first choice beside it by {falls[FIRST]:+.2f}",
        [*_alone(table, end), *_against_dpo(table)],
        {"readings": pa.Table.from_pylist(table)}, {"dpo_decay": _figure(table, falls)},
        notes=f"{pairs} pairs a seed are read, {len(seeds(table))} seed(s); log-probabilities are means over the tokens of an "
        "answer. chosen and rejected are the answers that a variant trains on; first choices are those along its rejected "
        "answers. On-policy pairs are two samples of the supervised model, preferred is the one that "
        "shares more words with the data's chosen answer. Adam with one learning rate for all; variants differ in speed, "
        f"so each is compared with DPO at the widest margin that both reach with a seed.\n\n{_pooled(end)}",
    )  # fmt: skip


def _alone(table: list[dict[str, Any]], end: dict[str, Estimate]) -> list[Claim]:
    """Claims about off-policy DPO by itself, and that every variant widens its margin."""
    falls = {kind: value.mean for kind, value in end.items()}
    chosen = path(table, "DPO", "chosen")
    gained = {name: of_runs(margins(table, name)) for name in variants(table)}
    others = [kind for kind in falls if kind != "rejected" and kind not in FIRST_CHOICES]
    further = [below(of_runs(changes(table, "DPO", "rejected", kind))) for kind in others]
    return [
        Claim(
            f"Off-policy DPO presses the rejected answer down most ({PAPER})",
            "the change of the rejected answer's log-probability is below that of every other kind, and below 0, intervals too",
            f"rejected {end['rejected'].words('nats a token')}; "
            + "; ".join(f"{kind} {falls[kind]:+.2f}" for kind in sorted(others, key=lambda k: falls[k])),
            both(below(end["rejected"]), *further),
        ),
        Claim(
            "The margin between chosen and rejected answer grows (the loss is minimised)",
            "chosen minus rejected rises in every variant, its interval too",
            "; ".join(f"{name} {value.words()}" for name, value in gained.items()) + " nats a token",
            both(*map(above, gained.values())),
        ),
        Claim(
            f"The chosen answer falls late ({PAPER})",
            "its last reading lies below its start, the interval too",
            f"highest {max(chosen):+.3f} against the start, last {end['chosen'].words('nats a token')}",
            below(end["chosen"]),
        ),
        Claim(
            f"The first choice rises while the rejected answer falls: squeezing ({PAPER})",
            "along the rejected answers, where the first choice before DPO is another token, its log-probability rises, its "
            "interval above 0",
            f"{end[FIRST].words('nats a token')}; floating {end[FLOATING].words()}",
            above(end[FIRST]),
        ),
    ]  # fmt: skip


def _against_dpo(table: list[dict[str, Any]]) -> list[Claim]:
    """Claims about the other variants against off-policy DPO, at the widest margin that both reach."""
    others = [name for name in variants(table) if name != "DPO"]
    first = {name: beyond(table, name, "DPO", "first") for name in others}
    margin = {name: estimate(common(table, name, "DPO")).mean for name in others}
    keeps = beyond(table, "on-policy DPO", "DPO", "chosen")
    return [
        Claim(
            f"On-policy DPO squeezes less than off-policy DPO ({PAPER} and §3.3)",
            "at equal margin the first choice (not y⁻) rises less and the chosen answer keeps more, intervals of both "
            "differences beside 0",
            f"at {margin['on-policy DPO']:.2f} nats a token: first choice {first['on-policy DPO'].words()}, chosen "
            f"{keeps.words()} against DPO",
            both(below(first["on-policy DPO"]), above(keeps)),
        ),
        Claim(
            f"So do the other losses, and SPIN ({PAPER}; docs/theory.md, Phenomena)",
            "at equal margin the first choice (not y⁻) rises less than in off-policy DPO, in every variant, intervals of the "
            "differences too",
            "nats a token against DPO: " + ", ".join(f"{name} {x.words()} at {margin[name]:.2f}" for name, x in first.items()),
            both(*map(below, first.values())),
        ),
    ]


def _pooled(end: dict[str, Estimate]) -> str:
    """What the positions whose first choice is the rejected token do to an average over all."""
    own = f"Where the first choice is the rejected token itself it moves by {end[OWN].words()}; t" if OWN in end else "T"
    return f"{own}he argmax at all positions together moves by {end[ANY].words('nats a token')}."


def sampled(model: Any, tokenizer: Any, rows: list[texts.Row], source: str, seed: int) -> list[texts.Row]:
    """The rows with the answers that a variant trains on: the data's, or the model's own."""
    if source == "data":
        return rows
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows for _ in range(2)]
    answers = training.sample(model, prompts, length=48, end=tokenizer.eos_token_id, seed=seed)
    said = [" " + tokenizer.decode(ids).strip() for ids in answers]
    made = []
    for row, first, second in zip(rows, said[::2], said[1::2], strict=True):
        if len(first.strip()) == 0 or len(second.strip()) == 0 or first == second:
            continue
        if source == "on-policy":
            better, worse = sorted((first, second), key=lambda text: -_overlap(text, row["chosen"]))
            made.append(row | {"chosen": better, "rejected": worse})
        else:
            made.append(row | {"rejected": first})
    return made


def _overlap(a: str, b: str) -> float:
    """F1 of the words two texts share."""
    x, y = set(a.lower().split()), set(b.lower().split())
    return 2 * len(x & y) / (len(x) + len(y))


def follow(
    model: Any, tokenizer: Any, pairs: list[texts.Row], watched: dict[str, list[td.Chi]], loss: Objective, *, epochs: int,
    seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Readings {epoch, kind, row, log_prob, change} of a preference training from a copy of the model, one at every pass.

    Kinds are those watched, and FIRST_CHOICES along the rejected answers, for the answers that have such positions.
    """
    policy, reference = copy.deepcopy(model), model
    groups = [training.with_reference(reference, pair) for pair in _pairs(tokenizer, pairs)]
    optimizer = training.adam(policy, 3e-5)
    start: dict[str, list[float]] = {}
    before = first_choices(policy, watched["rejected"])
    rows: list[dict[str, Any]] = []
    for epoch in range(epochs + 1):
        values = {kind: training.read(policy, chis).log_prob.tolist() for kind, chis in watched.items()}
        values |= along(policy, watched["rejected"], before)
        start = start or values
        rows += [{"epoch": epoch, "kind": kind, "row": i, "log_prob": value, "change": value - start[kind][i]}
                 for kind, of in values.items() for i, value in enumerate(of) if not math.isnan(value)]  # fmt: skip
        if epoch < epochs:
            for batch in training.batches(groups, 4, 1000 * seed + epoch, epochs=1):
                training.step(policy, optimizer, loss, [chi for pair in batch for chi in pair], mean_over=len(batch))
    return rows


@torch.no_grad()
def first_choices(model: Any, chis: list[td.Chi]) -> list[Tensor]:
    """The most likely token at each scored position of each sequence."""
    found = []
    for i in range(0, len(chis), 8):
        some = chis[i : i + 8]
        found += training.logits(model, some).argmax(1).split([len(chi) for chi in some])
    return found


@torch.no_grad()
def along(model: Any, chis: list[td.Chi], before: list[Tensor]) -> dict[str, list[float]]:
    """FIRST_CHOICES of every sequence: mean log-probability over its positions of each sort, NaN where it has none.

    Args:
        model: as it is now.
        chis: the rejected answers.
        before: the first choices before the training, which split the positions.
    """
    found: dict[str, list[float]] = {kind: [] for kind in FIRST_CHOICES}
    for i in range(0, len(chis), 8):
        some = chis[i : i + 8]
        parts = training.logits(model, some).log_softmax(1).split([len(chi) for chi in some])
        for log_pi, chi, first in zip(parts, some, before[i : i + 8], strict=True):
            other = first != chi.ids[chi.scored]
            fixed, top = log_pi.gather(1, first[:, None]).squeeze(1), log_pi.max(1).values
            for kind, values in ((FIRST, fixed[other]), (FLOATING, top[other]), (OWN, top[~other]), (ANY, top)):
                found[kind].append(float(values.mean()))
    return found


def _pairs(tokenizer: Any, rows: list[texts.Row]) -> list[list[td.Chi]]:
    chis = texts.preferences(tokenizer, rows)
    return [chis[i : i + 2] for i in range(0, len(chis), 2)]


# What follows computes on the table of readings.


def variants(table: list[dict[str, Any]]) -> list[str]:
    """The variants in the table, in the order they were run."""
    return list(dict.fromkeys(row["variant"] for row in table))


def kinds(table: list[dict[str, Any]]) -> list[str]:
    """The kinds of answers in the table, in the order they were read."""
    return list(dict.fromkeys(row["kind"] for row in table))


def seeds(table: list[dict[str, Any]]) -> list[int]:
    """The seeds in the table, in the order they were run."""
    return list(dict.fromkeys(row["seed"] for row in table))


def path(table: list[dict[str, Any]], variant: str, kind: str, seed: int | None = None) -> list[float]:
    """Change of log-probability since the start at every reading, mean over answers; of one seed, or over all."""
    found: dict[int, list[float]] = {}
    for row in table:
        if (row["variant"], row["kind"]) == (variant, kind) and seed in (None, row["seed"]):
            found.setdefault(row["epoch"], []).append(row["change"])
    return [sum(values) / len(values) for values in found.values()]


def changes(table: list[dict[str, Any]], variant: str, kind: str, less: str | None = None) -> list[list[float]]:
    """Last change of a kind for each answer, one list a seed that has any; `less` takes another kind's of the same row off."""
    last = max(row["epoch"] for row in table)
    of: dict[tuple[int, str], dict[int, float]] = {}
    for row in table:
        if row["variant"] == variant and row["epoch"] == last and row["kind"] in (kind, less):
            of.setdefault((row["seed"], row["kind"]), {})[row["row"]] = row["change"]
    found = []
    for s in seeds(table):
        mine, other = of.get((s, kind), {}), of.get((s, less or ""), {})
        found.append([value - (other[i] if less else 0) for i, value in mine.items() if less is None or i in other])
    return [values for values in found if values]


def margins(table: list[dict[str, Any]], variant: str) -> list[list[float]]:
    """Last growth of chosen minus rejected for each pair, one list a seed."""
    return changes(table, variant, "chosen", "rejected")


def means(table: list[dict[str, Any]], variant: str, seed: int | None = None) -> list[dict[str, float]]:
    """Mean changes of chosen, rejected and first choices at every reading, and the margin; of one seed or over all."""
    kinds = {"chosen": "chosen", "rejected": "rejected", "first": FIRST, "floating": FLOATING}
    columns = {key: path(table, variant, kind, seed) for key, kind in kinds.items()}
    return [
        dict(zip(columns, values, strict=True)) | {"margin": values[0] - values[1]}
        for values in zip(*columns.values(), strict=True)
    ]


def at_margin(readings: list[dict[str, float]], margin: float) -> dict[str, float]:
    """The readings interpolated to where a training first reaches the margin; the last one if it never does."""
    for before, after in zip(readings, readings[1:], strict=False):
        if before["margin"] <= margin <= after["margin"]:
            w = (margin - before["margin"]) / max(after["margin"] - before["margin"], 1e-12)
            return {key: (1 - w) * before[key] + w * after[key] for key in before}
    return readings[-1]


def common(table: list[dict[str, Any]], *names: str) -> list[float]:
    """The widest margin that all these variants reach, for each seed."""
    return [min(max(reading["margin"] for reading in means(table, name, s)) for name in names) for s in seeds(table)]


def standing(table: list[dict[str, Any]], name: str, margins: list[float]) -> list[dict[str, float]]:
    """A variant's readings at the margin given for each seed (`at_margin`)."""
    return [at_margin(means(table, name, s), margin) for s, margin in zip(seeds(table), margins, strict=True)]


def beyond(table: list[dict[str, Any]], name: str, other: str, key: str) -> Estimate:
    """How much more of a change one variant shows than another at the widest margin that both reach, over seeds."""
    margins = common(table, name, other)
    mine, theirs = (standing(table, variant, margins) for variant in (name, other))
    return estimate(a[key] - b[key] for a, b in zip(mine, theirs, strict=True))


def _figure(table: list[dict[str, Any]], falls: dict[str, float]) -> Any:
    title = f"DPO presses y⁻ down; the chosen moves {falls['chosen']:+.2f}, the first choice beside y⁻ {falls[FIRST]:+.2f}"
    made, (left, right) = figure(1, 2, title=title, height=3.8, width=11)
    colour = {"chosen": BLUE, "rejected": VERMILION, FIRST: INK}
    spare = [c for c in COLOURS if c not in colour.values()]
    others = iter([(c, dashes) for dashes in ("--", ":", "-.") for c in spare])  # a pair of its own for each kind
    for kind in kinds([row for row in table if row["variant"] == "DPO"]):
        c, dashes = (colour[kind], "-") if kind in colour else next(others)
        left.plot(path(table, "DPO", kind), color=c, label=kind.replace("_", " "), linestyle=dashes)
    left.axhline(0, color=GREY, linewidth=0.8)
    left.set(xlabel="passes over the pairs", ylabel="change of log-probability (nats a token)", title="off-policy DPO")
    left.legend(ncols=2, fontsize=7)
    for k, name in enumerate(variants(table)):
        readings = means(table, name)
        right.plot([r["margin"] for r in readings], [r["first"] for r in readings], color=COLOURS[k % len(COLOURS)],
                   linestyle="-" if k < len(COLOURS) else ":", marker="o", markersize=2.5, label=name)  # fmt: skip
    right.axhline(0, color=GREY, linewidth=0.8)
    right.set(xlabel="margin gained: chosen minus rejected (nats a token)", ylabel="change of the first choice (nats a token)",
              title="squeezing at equal margin")  # fmt: skip
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return made
