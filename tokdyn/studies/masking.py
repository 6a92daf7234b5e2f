"""Leaving out the tokens that a scan says push the chosen answers down: does DPO then keep them?

The exact force of an update token on the chosen answers says to first order what it does to them. Before a DPO training a scan
(`td.scan`) gives it for every token of every pair, and the tenth of the tokens whose force is most negative is masked. Compared
with as many tokens that NTHR would spare (Deng et al., arXiv 2505.18830: tokens of wrong answers that share most with right
ones, by the readout alone; here the rejected answers are the wrong ones), as many at random, and none. What pushes the chosen
answer down in DPO is the subject of Ren & Sutherland (arXiv 2407.10490 §4.2) and Razin et al. (arXiv 2410.08847).

Masked tokens are not trained on, so that the margin grows more slowly too: variants are compared at the widest margin (chosen
minus rejected) that both reach. Weights are those of the start and stay.

Identity, asserted: what is masked by the scan takes most of the pull away, at the start. Measured: the decay, over seeds, each
with pairs of its own.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokdyn as td

from ..interventions import nthr_scores, spare
from . import texts, training
from .dpo_decay import at_margin
from .figures import BLUE, GREY, ORANGE, VERMILION, figure
from .parts import Keep, unkept
from .result import Claim, Estimate, Result, above, estimate, told

SHARE = 0.1  # of all tokens
RULES = {"none": GREY, "scan": BLUE, "NTHR": ORANGE, "random": VERMILION}
Pair = tuple[list[td.Chi], Tensor]  # chosen and rejected answer, a weight for each token of both


def run(
    quick: bool = False,
    seed: int = 0,
    model: str = "demo",
    data: str | Path | None = None,
    keep: Keep = unkept,
    runs: int | None = None,
) -> Result:
    """Train by DPO under every rule from the same supervised model, with a reading at every pass.

    Args:
        quick: one seed, 12 pairs, three passes instead of five seeds, 24 pairs, eight passes.
        seed: of the first run.
        model: a folder or a hub name.
        data: the folder of the paper's probe sets, or a preference file; the shipped pairs when absent.
        keep: where finished seeds are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    seeds = range(seed, seed + (runs or (1 if quick else 5)))
    return conclude(texts.of_seeds(_seed, model, data, quick, seeds, keep))


def _seed(model: Any, tokenizer: Any, rows: list[texts.Row], quick: bool, seed: int) -> list[dict[str, Any]]:
    """The readings of all rules on one seed's pairs, and what each takes away of the pull at the start."""
    rows = texts.drawn(rows, 12 if quick else 24, seed)
    tuned = copy.deepcopy(model)
    training.sft(tuned, texts.chis(tokenizer, rows, "chosen"), epochs=2, lr=2e-4, seed=seed)
    chis = training.with_reference(tuned, texts.preferences(tokenizer, rows))
    pairs = [chis[i : i + 2] for i in range(0, len(chis), 2)]
    force = scanned(tuned, pairs)
    table: list[dict[str, Any]] = []
    for name, w in weights(tuned, pairs, force, seed).items():
        pull = float(((1 - w) * force).sum() / force.clamp(max=0).sum().abs())
        parts = w.split([sum(map(len, pair)) for pair in pairs])
        for row in _follow(tuned, list(zip(pairs, parts, strict=True)), 3 if quick else 8, seed):
            table.append({"rule": name, "seed": seed, "masked": float((w == 0).double().mean()), "taken": -pull} | row)
    return table


def scanned(model: Any, pairs: list[list[td.Chi]]) -> Tensor:
    """The exact force of every token of every pair on all chosen answers, by a scan: nats per unit learning rate."""
    with tempfile.TemporaryDirectory() as place:
        scan = td.scan(model, pairs, {"chosen": [pair[0] for pair in pairs]}, td.objectives.DPO(), out=Path(place) / "scan")
        return torch.tensor(scan.tokens(["force_chosen"])["force_chosen"].to_pylist(), dtype=torch.float64)


def weights(model: Any, pairs: list[list[td.Chi]], force: Tensor, seed: int) -> dict[str, Tensor]:
    """By rule a weight for each token of all pairs: 0 for the tenth that it masks, 1 for the others."""
    chosen, k = torch.cat([torch.arange(sum(map(len, pair))) < len(pair[0]) for pair in pairs]), int(SHARE * len(force))
    answers = [chi.with_(advantage=a) for pair in pairs for chi, a in zip(pair, (1.0, -1.0), strict=True)]
    shared = nthr_scores(model, answers).double().masked_fill(chosen, -torch.inf)
    nthr, drawn = torch.ones(len(force)), torch.ones(len(force))
    nthr[shared.topk(k).indices] = 0
    drawn[torch.randperm(len(force), generator=torch.Generator().manual_seed(seed))[:k]] = 0
    return {"none": torch.ones(len(force)), "scan": spare(force, share=SHARE).float(), "NTHR": nthr, "random": drawn}


def _follow(model: Any, pairs: list[Pair], epochs: int, seed: int) -> list[dict[str, Any]]:
    """Readings {epoch, kind, row, change} of a DPO training from a copy of the model, at every pass."""
    policy, rows, start = copy.deepcopy(model), list[dict[str, Any]](), dict[str, Tensor]()
    optimizer = training.adam(policy, 3e-5)
    watched = {kind: [pair[n] for pair, _ in pairs] for n, kind in enumerate(("chosen", "rejected"))}
    for epoch in range(epochs + 1):
        values = {kind: training.read(policy, chis).log_prob for kind, chis in watched.items()}
        start = start or values
        rows += [{"epoch": epoch, "kind": kind, "row": i, "change": float(value)}
                 for kind, of in values.items() for i, value in enumerate(of - start[kind])]  # fmt: skip
        if epoch < epochs:
            for batch in training.batches(pairs, 4, 1000 * seed + epoch, epochs=1):
                chis, own = [chi for pair, _ in batch for chi in pair], torch.cat([w for _, w in batch])
                training.step(policy, optimizer, td.objectives.DPO(), chis, mean_over=len(batch), weights=own)
    return rows


# What follows computes on the table of readings.


def conclude(table: list[dict[str, Any]]) -> Result:
    """The study's claims and figure, computed from the table of readings that `run` took."""
    import pyarrow as pa

    seeds = list(dict.fromkeys(row["seed"] for row in table))
    kept = {rule: beyond(table, seeds, "scan", rule) for rule in RULES if rule != "scan"}
    taken = {rule: estimate([_one(table, rule, s, "taken") for s in seeds]) for rule in RULES}
    lasts = {rule: estimate([means(table, rule, s)[-1]["chosen"] for s in seeds]) for rule in RULES}
    return Result(
        f"Masking the tenth that a scan names moves the chosen answer by {kept['none'].mean:+.3f} nats a token at equal margin",
        _claims(kept, taken, lasts),
        {"readings": pa.Table.from_pylist(table)},
        {"masking": _figure(table, seeds)},
        notes=f"{len(seeds)} seed(s), pairs drawn by each; {100 * SHARE:.0f} % of the tokens of both answers are masked, by "
        "the model that the training begins with. NTHR chooses among the rejected answers' tokens. Adam, one learning rate.",
    )  # fmt: skip


def _claims(kept: dict[str, Estimate], taken: dict[str, Estimate], lasts: dict[str, Estimate]) -> list[Claim]:
    away = ", ".join(f"{rule} {value.words()}" for rule, value in taken.items() if rule != "none")
    found = [
        Claim(
            "To first order the tenth that the scan masks takes most of the pull away (identity: the most negative forces)",
            "Σ of the masked tokens' forces on the chosen answers, over Σ of all negative ones: most for the scan",
            away,
            told(all(taken["scan"].mean > value.mean for rule, value in taken.items() if rule != "scan")),
        )
    ]
    for other, words in (
        ("none", "The chosen answers then fall less than without a mask"),
        ("random", "and less than with as many tokens masked at random"),
        ("NTHR", "and less than with those that NTHR would spare (arXiv 2505.18830)"),
    ):
        found.append(
            Claim(
                words,
                "at the widest margin that both reach the chosen answer stands higher, the interval of the difference above 0",
                f"{kept[other].words('nats a token')}; at the end scan {lasts['scan'].words()}, {other} {lasts[other].words()}",
                above(kept[other]),
            )
        )
    return found


def _one(table: list[dict[str, Any]], rule: str, seed: int, column: str) -> float:
    return next(row[column] for row in table if (row["rule"], row["seed"]) == (rule, seed))


def means(table: list[dict[str, Any]], rule: str, seed: int) -> list[dict[str, float]]:
    """Mean changes of chosen and rejected answers at every reading of a seed, and the margin."""
    sums: dict[int, dict[str, list[float]]] = {}
    for row in table:
        if (row["rule"], row["seed"]) == (rule, seed):
            sums.setdefault(row["epoch"], {}).setdefault(row["kind"], []).append(row["change"])
    read = [{kind: sum(values) / len(values) for kind, values in of.items()} for _, of in sorted(sums.items())]
    return [of | {"margin": of["chosen"] - of["rejected"]} for of in read]


def beyond(table: list[dict[str, Any]], seeds: list[int], rule: str, other: str) -> Estimate:
    """How much higher the chosen answer stands by one rule than by another at the widest margin that both reach."""
    found = []
    for s in seeds:
        a, b = means(table, rule, s), means(table, other, s)
        margin = min(max(of["margin"] for of in readings) for readings in (a, b))
        found.append(at_margin(a, margin)["chosen"] - at_margin(b, margin)["chosen"])
    return estimate(found)


def _figure(table: list[dict[str, Any]], seeds: list[int]) -> Any:
    made, (left, right) = figure(1, 2, title="DPO with a tenth of the tokens masked: the chosen answers", height=3.4)
    for rule, colour in RULES.items():
        each = [means(table, rule, s) for s in seeds]
        chosen, margin = (
            [sum(of[n][key] for of in each) / len(each) for n in range(len(each[0]))] for key in ("chosen", "margin")
        )
        left.plot(chosen, color=colour, label=rule)
        right.plot(margin, chosen, color=colour, marker="o", markersize=2.5, label=rule)
    for axes in (left, right):
        axes.axhline(0, color=GREY, linewidth=0.8)
    left.set(xlabel="passes over the pairs", ylabel="change of the chosen answer (nats a token)", title="masked by")
    left.legend()
    right.set(xlabel="margin gained: chosen minus rejected (nats a token)", ylabel="change of the chosen answer (nats a token)",
              title="at equal margin")  # fmt: skip
    return made
