"""Whose answer does a model speak after supervised training: do phrases of another prompt's answer appear in what it says?

Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), §4.1, find that SFT lifts the answer of one training
prompt behind another (the study hallucination, on log-probabilities) and lay a kind of hallucination to it: the model may use
phrases of B's answer for A's question. Here the model answers the training prompts itself, before and after SFT, and its
n-grams are looked up: in the answers to other training prompts, without those in the prompt's own, and in as many answers to
prompts that are not trained on, which is what chance and style alone would give.

Measured, over seeds, each with texts of its own: the share of foreign n-grams, its growth, and that beyond the unseen answers'.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from . import texts, training
from .figures import BLUE, GREEN, VERMILION, figure
from .parts import Keep, unkept
from .result import Claim, Result, above, estimate, of_runs

PAPER = "arXiv 2407.10490 §4.1"
GRAM, LENGTH = 3, 48  # tokens of an n-gram, and of a sampled answer
KINDS = ("own", "foreign", "unseen")


def run(
    quick: bool = False,
    seed: int = 0,
    model: str = "demo",
    data: str | Path | None = None,
    keep: Keep = unkept,
    runs: int | None = None,
) -> Result:
    """Sample answers to the training prompts before and after SFT, and look their n-grams up.

    Args:
        quick: one seed of 12 prompts and 8 passes instead of five seeds of up to 48 and 12 passes.
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
    """One row for each prompt, before and after SFT: shares of its n-grams by whose answer has them."""
    rows = texts.drawn(rows, 24 if quick else 96, seed)
    train, unseen = rows[: len(rows) // 2], rows[len(rows) // 2 : len(rows) // 2 * 2]
    tuned = copy.deepcopy(model)
    training.sft(tuned, texts.chis(tokenizer, train, "chosen"), epochs=8 if quick else 12, lr=3e-4, seed=seed)
    return [{"seed": seed, "when": when} | row for when, policy in (("before", model), ("after", tuned))
            for row in looked_up(policy, tokenizer, train, unseen, seed)]  # fmt: skip


def looked_up(
    policy: Any, tokenizer: Any, train: list[texts.Row], unseen: list[texts.Row], seed: int, samples: int = 4
) -> list[dict[str, Any]]:
    """Rows {prompt, own, foreign, unseen}: shares of the n-grams of a prompt's samples; foreign and unseen without own."""
    prompts = [tokenizer(row["prompt"]).input_ids for row in train for _ in range(samples)]
    answers = training.sample(policy, prompts, length=LENGTH, end=tokenizer.eos_token_id, seed=seed)
    trained, others = ([grams(tokenizer(row["chosen"]).input_ids) for row in some] for some in (train, unseen))
    found = []
    for i in range(len(train)):
        said = [gram for answer in answers[i * samples : (i + 1) * samples] for gram in sorted(grams(answer))]
        asked = grams(prompts[i * samples]) | trained[i]
        foreign, unknown = (set().union(*(of for j, of in enumerate(sets) if j != i)) - asked for sets in (trained, others))
        if said:
            row = {"own": trained[i], "foreign": foreign, "unseen": unknown}
            found.append({"prompt": i} | {kind: sum(gram in of for gram in said) / len(said) for kind, of in row.items()})
    return found


def grams(ids: list[int]) -> set[tuple[int, ...]]:
    """The n-grams of a text."""
    return {tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)}


def conclude(table: list[dict[str, Any]]) -> Result:
    """The study's claims and figure, from the rows of `_seed`."""
    import pyarrow as pa

    growth = {kind: of_runs(grown(table, kind)) for kind in KINDS}
    beyond = of_runs(grown(table, "foreign", less="unseen"))
    level = {when: [estimate((row[kind] for row in table if row["when"] == when), "answers").mean for kind in KINDS]
             for when in ("before", "after")}  # fmt: skip
    claims = [
        Claim(
            f"After SFT the model's answers hold phrases of other prompts' answers ({PAPER})",
            f"the share of its {GRAM}-grams that stand in another training prompt's answer, and not in its own or in the "
            "prompt, grows over SFT, its interval above 0",
            f"{growth['foreign'].words()}, to {level['after'][1]:.3f}",
            above(growth["foreign"]),
        ),
        Claim(
            f"and more of them than of answers that were not trained on ({PAPER}, control)",
            "that growth less the growth for as many answers of unseen prompts above 0, its interval too",
            f"{beyond.words()}; unseen {growth['unseen'].words()}",
            above(beyond),
        ),
        Claim(
            f"It learns its own answers most ({PAPER})",
            f"the share of {GRAM}-grams of the prompt's own answer grows, its interval above 0",
            f"{growth['own'].words()}, to {level['after'][0]:.3f}",
            above(growth["own"]),
        ),
    ]
    return Result(
        f"After SFT {level['after'][1]:.1%} of the {GRAM}-grams in what the model says are another training answer's, before "
        f"{level['before'][1]:.1%}",
        claims, {"samples": pa.Table.from_pylist(table)}, {"hallucination_samples": _figure(level)},
        notes=f"{len({row['seed'] for row in table})} seed(s), {len({row['prompt'] for row in table})} prompts a seed, four "
        f"samples of at most {LENGTH} tokens at temperature 1 for each; an n-gram counts once a sample.",
    )  # fmt: skip


def grown(table: list[dict[str, Any]], kind: str, less: str | None = None) -> list[list[float]]:
    """After minus before for each prompt, one list a seed; `less` takes another kind's growth off."""
    of = {(row["seed"], row["prompt"], row["when"]): row[kind] - (row[less] if less else 0) for row in table}
    found: dict[int, list[float]] = {}
    for (s, prompt, when), value in of.items():
        if when == "after" and (s, prompt, "before") in of:
            found.setdefault(s, []).append(value - of[s, prompt, "before"])
    return list(found.values())


def _figure(level: dict[str, list[float]]) -> Any:
    made, axes = figure(title="Whose phrases the model uses, before and after SFT", height=3.4, width=7)
    for k, (kind, colour) in enumerate(zip(KINDS, (BLUE, VERMILION, GREEN), strict=True)):
        axes.bar([k - 0.2, k + 0.2], [100 * level[when][k] for when in ("before", "after")], 0.36, color=colour,
                 alpha=0.85, label=kind)  # fmt: skip
    axes.set_xticks(range(3), ["own answer", "another training\nprompt's answer", "an unseen\nprompt's answer"])
    axes.set(ylabel=f"{GRAM}-grams of the samples found there, %", title="left: before, right: after")
    return made
