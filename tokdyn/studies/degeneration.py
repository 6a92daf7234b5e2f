"""Does preference training turn a model into a repeater, and does its first choice take the mass?

Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), §1 and §4.2: after long off-policy DPO models repeat
simple phrases, which the paper lays to squeezing: negative gradients on unlikely answers feed what was most likely anyway. Here
the policy answers the training prompts itself, before DPO and after it: the share of repeated n-grams in its samples, and the
mass of the most likely token along them. A control takes as many passes of supervised training on the chosen answers.

Measured, over seeds, each with pairs of its own: both before and after, and against the control.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

import tokdyn as td

from . import texts, training
from .figures import BLUE, GREY, VERMILION, figure
from .parts import Keep, unkept
from .result import Claim, Result, above, estimate, of_runs

PAPER = "arXiv 2407.10490 §4.2"
GRAM, LENGTH = 3, 48  # tokens of an n-gram, and of a sampled answer
WAYS = ("before", "DPO", "SFT")


def run(
    quick: bool = False,
    seed: int = 0,
    model: str = "demo",
    data: str | Path | None = None,
    keep: Keep = unkept,
    runs: int | None = None,
) -> Result:
    """Sample answers before and after DPO, and after the control.

    Args:
        quick: one seed of 12 pairs and 6 passes instead of five seeds of 24 pairs and 12 passes.
        seed: of the first run.
        model: a folder or a hub name.
        data: texts instead of the shipped pairs (`texts.pairs`).
        keep: where finished seeds are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    seeds = range(seed, seed + (runs or (1 if quick else 5)))
    table = texts.of_seeds(_seed, model, data, quick, seeds, keep)
    return conclude(table)


def _seed(model: Any, tokenizer: Any, rows: list[texts.Row], quick: bool, seed: int) -> list[dict[str, Any]]:
    """One row for each prompt and way: repetition in its samples, and the mass of the first choice along them."""
    rows, passes = texts.drawn(rows, 12 if quick else 24, seed), 6 if quick else 12
    before = copy.deepcopy(model)
    training.sft(before, texts.chis(tokenizer, rows, "chosen"), epochs=2, lr=2e-4, seed=seed)
    pairs = [training.with_reference(before, texts.preferences(tokenizer, [row])) for row in rows]
    pairs = [[chi.with_(group=i) for chi in pair] for i, pair in enumerate(pairs)]
    pressed, taught = copy.deepcopy(before), copy.deepcopy(before)
    optimizer = training.adam(pressed, 3e-5)
    for batch in training.batches(pairs, 4, seed, epochs=passes):
        training.step(pressed, optimizer, td.objectives.DPO(), [chi for pair in batch for chi in pair], mean_over=len(batch))
    training.sft(taught, texts.chis(tokenizer, rows, "chosen"), epochs=passes, lr=3e-5, seed=seed)
    ways = dict(zip(WAYS, (before, pressed, taught), strict=True))
    return [{"seed": seed, "way": way} | row for way, policy in ways.items() for row in said(policy, tokenizer, rows, seed)]


def said(policy: Any, tokenizer: Any, rows: list[texts.Row], seed: int, samples: int = 4) -> list[dict[str, Any]]:
    """Rows {prompt, repeated, mass, length}, means over the samples of a prompt that have an n-gram."""
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows for _ in range(samples)]
    answers = training.sample(policy, prompts, length=LENGTH, end=tokenizer.eos_token_id, seed=seed)
    found: dict[int, list[tuple[float, float, int]]] = {}
    for k, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if len(answer) >= GRAM:
            ids = torch.tensor([*prompt, *answer])
            chi = td.Chi(ids, torch.arange(len(ids)) >= len(prompt))
            mass = float(training.read(policy, [chi]).argmax[0].exp())
            found.setdefault(k // samples, []).append((repeated(answer), mass, len(answer)))
    return [
        {"prompt": i} | {key: sum(x[j] for x in of) / len(of) for j, key in enumerate(("repeated", "mass", "length"))}
        for i, of in found.items()
    ]


def repeated(ids: list[int]) -> float:
    """Share of a text's n-grams that have stood in it before: 1 - different ones / all."""
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams)


def conclude(table: list[dict[str, Any]]) -> Result:
    """The study's claims and figure, from the rows of `_seed`."""
    import pyarrow as pa

    more = {key: of_runs(beyond(table, "DPO", "before", key)) for key in ("repeated", "mass")}
    control = {key: of_runs(beyond(table, "DPO", "SFT", key)) for key in ("repeated", "mass")}
    level = {way: estimate([row["repeated"] for row in table if row["way"] == way], "answers").mean for way in WAYS}
    said = ", ".join(f"{way} {value:.3f}" for way, value in level.items())
    claims = [
        Claim(
            f"After DPO a model repeats itself more ({PAPER})",
            f"the share of repeated {GRAM}-grams in its own samples is higher than before, its interval too",
            f"{more['repeated'].words()}; {said}",
            above(more["repeated"]),
        ),
        Claim(
            f"and more than after as long a supervised training ({PAPER}, control)",
            "the share is higher than after SFT on the chosen answers, its interval too",
            control["repeated"].words(),
            above(control["repeated"]),
        ),
        Claim(
            f"The first choice takes the mass along what the model itself says ({PAPER})",
            "geometric mean probability of the most likely token along its samples is higher than before, its interval too",
            f"{more['mass'].words()}; against SFT {control['mass'].words()}",
            above(more["mass"]),
        ),
    ]
    return Result(
        f"After DPO {level['DPO']:.1%} of the {GRAM}-grams in the model's samples are repeated, before {level['before']:.1%}",
        claims, {"samples": pa.Table.from_pylist(table)}, {"degeneration": _figure(table)},
        notes=f"{len({row['seed'] for row in table})} seed(s), {len({row['prompt'] for row in table})} prompts a seed, four "
        f"samples of at most {LENGTH} tokens at temperature 1 for each.",
    )  # fmt: skip


def beyond(table: list[dict[str, Any]], way: str, other: str, key: str) -> list[list[float]]:
    """How much more of a measure one way shows than another, prompt by prompt, one list a seed."""
    of = {(row["seed"], row["prompt"], row["way"]): row[key] for row in table}
    found: dict[int, list[float]] = {}
    for (s, prompt, name), value in of.items():
        if name == way and (s, prompt, other) in of:
            found.setdefault(s, []).append(value - of[s, prompt, other])
    return list(found.values())


def _figure(table: list[dict[str, Any]]) -> Any:
    made, axes = figure(1, 2, title="What the model says itself: repetition, and the mass of its first choice", height=3.4)
    for panel, key, label in zip(
        axes, ("repeated", "mass"), (f"repeated {GRAM}-grams", "mass of the first choice"), strict=True
    ):
        values = [[row[key] for row in table if row["way"] == way] for way in WAYS]
        means = [estimate(of, "answers") for of in values]
        panel.bar(WAYS, [m.mean for m in means], yerr=[m.half for m in means], color=[GREY, VERMILION, BLUE], capsize=3)
        panel.set(ylabel=f"{label}, mean over prompts", title=label, xlabel="training")
    return made
