"""What preference training does to the chosen answer, the rejected one, and what was most likely anyway.

Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), §3.3 and §4.2: in off-policy DPO the rejected
answer falls most, the chosen answer falls after a while, and the mass goes to the argmax of every position (squeezing).
Theory says that this is weaker where the rejected answer is likely: in on-policy DPO, where both answers are the model's own,
and in SPIN, where the rejected one is. Losses that stop pushing (IPO, SLiC, SPPO) or protect the chosen answer (DPOP) squeeze
less too.

A variant is compared with off-policy DPO at the widest margin that both reach: chosen minus rejected has then grown as much in
each.

Robust, asserted: the rejected answer falls most of all kinds, and the margin grows. Measured: the rest, over seeds, which set
the order of the pairs and not which pairs they are.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tokdyn as td

from ..loading import load_model
from ..objectives import Objective
from . import sft_dynamics, texts, training
from .figures import BLUE, COLOURS, GREY, INK, VERMILION, figure
from .result import Claim, Estimate, Result, estimate

PAPER = "arXiv 2407.10490 §4.2"
LOSS = td.objectives
VARIANTS: dict[str, tuple[Objective, str]] = {  # name -> loss, where the answers come from
    "DPO": (LOSS.DPO(), "data"), "on-policy DPO": (LOSS.DPO(), "on-policy"), "SPIN": (LOSS.SPIN(), "rejected sampled"),
    "IPO": (LOSS.IPO(), "data"), "SLiC": (LOSS.SLiC(delta=10.0), "data"), "SPPO": (LOSS.SPPO(), "data"),
    "SimPO": (LOSS.SimPO(), "data"), "KTO": (LOSS.KTO(), "data"), "DPOP": (LOSS.DPOP(), "data"),
}  # fmt: skip
QUICK = ("DPO", "on-policy DPO", "SPIN", "DPOP")


def run(quick: bool = False, seed: int = 0, data: str | Path | None = None) -> Result:
    """Train every variant from the same supervised model, with a reading at every pass.

    Args:
        quick: one seed, four variants, 12 pairs, four passes instead of five seeds, nine variants, 24 pairs, eight passes.
        seed: of the first run.
        data: the folder of the paper's probe sets, or a preference file; the shipped pairs when absent.
    """
    model, tokenizer = load_model()
    rows = texts.pairs(data, 15 if quick else 30, tokenizer=tokenizer, longest=128)
    train, held_out = rows[: len(rows) * 4 // 5], rows[len(rows) * 4 // 5 :]
    table: list[dict[str, Any]] = []
    for run_seed in range(seed, seed + (1 if quick else 5)):
        tuned = copy.deepcopy(model)
        training.sft(tuned, texts.chis(tokenizer, train, "chosen"), epochs=2, lr=2e-4, seed=run_seed)
        for name in QUICK if quick else VARIANTS:
            loss, source = VARIANTS[name]
            pairs = sampled(tuned, tokenizer, train, source, run_seed)
            watched = sft_dynamics.probe(tokenizer, pairs, held_out, run_seed, 8 if quick else 16)
            watched = {kind: watched[kind] for kind in (watched if name == "DPO" else ("chosen", "rejected"))}
            for row in follow(tuned, tokenizer, pairs, watched, loss, epochs=4 if quick else 8, seed=run_seed):
                table.append({"variant": name, "seed": run_seed} | row)
    return conclude(table, len(train))


def conclude(table: list[dict[str, Any]], pairs: int) -> Result:
    """The study's claims and figure, computed from the table of readings that `run` took."""
    import pyarrow as pa

    end = {kind: estimate(path(table, "DPO", kind, s)[-1] for s in seeds(table)) for kind in kinds(table)}
    falls = {kind: value.mean for kind, value in end.items()}
    return Result(
        f"DPO presses the rejected answer down by {-falls['rejected']:.2f} nats a token; the chosen one moves by "
        f"{falls['chosen']:+.2f}, the argmax by {falls['argmax']:+.2f}",
        [*_alone(table, end), *_against_dpo(table)],
        {"readings": pa.Table.from_pylist(table)}, {"dpo_decay": _figure(table, falls)},
        notes=f"{pairs} pairs, {len(seeds(table))} seed(s); log-probabilities are means over the tokens of an answer. "
        "chosen and rejected are the answers that a variant trains on; argmax is the most likely token at each position "
        "along its rejected answers. On-policy pairs are two samples of the supervised model, preferred is the one that "
        "shares more words with the data's chosen answer. Adam with one learning rate for all; variants differ in speed, "
        "so each is compared with DPO at the widest margin that both reach with a seed.",
    )  # fmt: skip


def _alone(table: list[dict[str, Any]], end: dict[str, Estimate]) -> list[Claim]:
    """Claims about off-policy DPO by itself, and that every variant widens its margin."""
    falls = {kind: value.mean for kind, value in end.items()}
    chosen = path(table, "DPO", "chosen")
    gained = {name: estimate(means(table, name, s)[-1]["margin"] for s in seeds(table)) for name in variants(table)}
    return [
        Claim(
            f"Off-policy DPO presses the rejected answer down most ({PAPER})",
            "the change of the rejected answer's log-probability is the lowest of all kinds, and below 0, its interval too",
            f"rejected {end['rejected'].words('nats a token')}; "
            + "; ".join(f"{kind} {falls[kind]:+.2f}" for kind in sorted(falls, key=lambda k: falls[k]) if kind != "rejected"),
            min(falls, key=lambda k: falls[k]) == "rejected" and end["rejected"].high < 0,
        ),
        Claim(
            "The margin between chosen and rejected answer grows (the loss is minimised)",
            "chosen minus rejected rises in every variant, its interval too",
            "; ".join(f"{name} {value.words()}" for name, value in gained.items()) + " nats a token",
            all(value.low > 0 for value in gained.values()),
        ),
        Claim(
            f"The chosen answer falls late ({PAPER})",
            "its last reading lies below its highest one, and below its start with its interval",
            f"highest {max(chosen):+.3f} against the start, last {end['chosen'].words('nats a token')}",
            chosen[-1] < max(chosen) and end["chosen"].high < 0,
        ),
        Claim(
            f"The argmax rises while everything that is watched falls: squeezing ({PAPER})",
            "log-probability of the most likely token along the rejected answers rises over DPO, its interval above 0",
            end["argmax"].words("nats a token"),
            end["argmax"].low > 0,
        ),
    ]  # fmt: skip


def _against_dpo(table: list[dict[str, Any]]) -> list[Claim]:
    """Claims about the other variants against off-policy DPO, at the widest margin that both reach."""
    others = [name for name in variants(table) if name != "DPO"]
    argmax = {name: beyond(table, name, "DPO", "argmax") for name in others}
    margin = {name: estimate(common(table, name, "DPO")).mean for name in others}
    keeps = beyond(table, "on-policy DPO", "DPO", "chosen")
    return [
        Claim(
            f"On-policy DPO squeezes less than off-policy DPO ({PAPER} and §3.3)",
            "at equal margin its argmax rises less and its chosen answer keeps more, intervals of both differences beside 0",
            f"at {margin['on-policy DPO']:.2f} nats a token: argmax {argmax['on-policy DPO'].words()}, chosen {keeps.words()} "
            "against DPO",
            argmax["on-policy DPO"].high < 0 < keeps.low,
        ),
        Claim(
            f"So do the other losses, and SPIN ({PAPER}; docs/theory.md, Phenomena)",
            "at equal margin the argmax rises less than in off-policy DPO, in every variant, intervals of the differences too",
            "nats a token against DPO: " + ", ".join(f"{name} {x.words()} at {margin[name]:.2f}" for name, x in argmax.items()),
            all(difference.high < 0 for difference in argmax.values()),
        ),
    ]


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
    """Readings {epoch, kind, row, log_prob, change} of a preference training from a copy of the model, one at every pass."""
    policy, reference = copy.deepcopy(model), model
    groups = [training.with_reference(reference, pair) for pair in _pairs(tokenizer, pairs)]
    optimizer = training.adam(policy, 3e-5)
    start: dict[str, list[float]] = {}
    rows: list[dict[str, Any]] = []
    for epoch in range(epochs + 1):
        readings = {kind: training.read(policy, chis) for kind, chis in watched.items()}
        values = {kind: reading.log_prob.tolist() for kind, reading in readings.items()}
        values["argmax"] = readings["rejected"].argmax.tolist()
        start = start or values
        rows += [{"epoch": epoch, "kind": kind, "row": i, "log_prob": value, "change": value - start[kind][i]}
                 for kind, of in values.items() for i, value in enumerate(of)]  # fmt: skip
        if epoch < epochs:
            for batch in training.batches(groups, 4, 1000 * seed + epoch, epochs=1):
                training.step(policy, optimizer, loss, [chi for pair in batch for chi in pair], mean_over=len(batch))
    return rows


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


def means(table: list[dict[str, Any]], variant: str, seed: int | None = None) -> list[dict[str, float]]:
    """Mean changes of chosen, rejected and argmax at every reading, and the margin; of one seed or over all."""
    columns = {kind: path(table, variant, kind, seed) for kind in ("chosen", "rejected", "argmax")}
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
    title = f"DPO presses the rejected answer down; the chosen moves {falls['chosen']:+.2f}, the argmax {falls['argmax']:+.2f}"
    made, (left, right) = figure(1, 2, title=title, height=3.8, width=11)
    colour = {"chosen": BLUE, "rejected": VERMILION, "argmax": INK}
    spare = [c for c in COLOURS if c not in colour.values()]
    others = iter([(c, dashes) for dashes in ("--", ":", "-.") for c in spare])  # a pair of its own for each kind
    for kind in kinds(table):
        c, dashes = (colour[kind], "-") if kind in colour else next(others)
        left.plot(path(table, "DPO", kind), color=c, label=kind.replace("_", " "), linestyle=dashes)
    left.axhline(0, color=GREY, linewidth=0.8)
    left.set(xlabel="passes over the pairs", ylabel="change of log-probability (nats a token)", title="off-policy DPO")
    left.legend(ncols=2, fontsize=7)
    for k, name in enumerate(variants(table)):
        readings = means(table, name)
        right.plot([r["margin"] for r in readings], [r["argmax"] for r in readings], color=COLOURS[k % len(COLOURS)],
                   linestyle="-" if k < len(COLOURS) else ":", marker="o", markersize=2.5, label=name)  # fmt: skip
    right.axhline(0, color=GREY, linewidth=0.8)
    right.set(xlabel="margin gained: chosen minus rejected (nats a token)", ylabel="change of the argmax (nats a token)",
              title="squeezing at equal margin")  # fmt: skip
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return made
