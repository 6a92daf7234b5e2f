"""Which tokens of a GRPO update lower the policy's entropy: the likely ones of right answers?

Cui et al., *The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models* (arXiv 2505.22617): under policy
gradient the entropy changes by -eta Cov(log pi(a), pi(a) A(a)), so that likely actions of positive advantage lower it and
unlikely ones raise it; a few tokens of high covariance (log pi - mean)(A - mean) do most, and the entropy collapses early in
training. The formula is that of a tabular softmax policy (a special case of forces on the entropy,
tests/test_observables.py); a network shares parameters between contexts. Here on sums that the demo model half solves: the
exact force of every update token on the entropy along the policy's own answers, all parameters, beside its covariance, with
real steps, and GRPO training.

Asserted: forces predict the real step. Measured, over seeds with problems of their own: signs by confidence and advantage,
rank by covariance, how few tokens do most, whether the entropy falls in a step and in training. With texts that are given the
update is one on chosen answers (reward 1) against rejected ones (reward 0), which the policy did not sample.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

import tokdyn as td

from . import answers, texts
from .answers import Row, over
from .figures import BLUE, GREY, VERMILION, band, figure
from .grpo_training import TRAINED, Schedule, gains, lines, train
from .parts import Keep, unkept
from .result import Claim, Result, above, below, both, estimate, told

PAPER = "arXiv 2505.22617"
LIKELY = 0.5  # probability from which a token is called likely
FEW = 0.2  # of the tokens, by covariance
MOVE = 0.003  # nats by which a real step changes the entropy it changes most
KINDS = ("likely, A > 0", "unlikely, A > 0", "likely, A < 0", "unlikely, A < 0")
UNIT = "nats per unit learning rate"


def run(
    quick: bool = False, seed: int = 0, model: str = "demo", data: str | Path | None = None, keep: Keep = unkept,
    runs: int | None = None,
) -> Result:  # fmt: skip
    """Forces on the entropy of one GRPO step a prompt, then GRPO training.

    Args:
        quick: one seed of 4 prompts and no training; else six seeds of 12 prompts and 20 steps each.
        seed: of the first run.
        model: a folder or a hub name.
        data: pairs instead of sampled sums (`texts.pairs`), rewarded 1 and 0; without training.
        keep: where finished seeds are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    seeds = range(seed, seed + (runs or (1 if quick else 6)))
    if data:
        rows = texts.of_seeds(_given, model, data, quick, seeds, keep)
    else:
        rows = answers.of_seeds(_sampled, model, quick, seeds, keep)
    tables: dict[str, list[Row]] = {"tokens": [], "prompts": [], "training": []}
    for row in rows:
        tables[row.pop("table")].append(row)
    return conclude(tables)


def _given(model: Any, tokenizer: Any, rows: list[texts.Row], quick: bool, seed: int) -> list[Row]:
    """The rows of pairs drawn by the seed."""
    rows = texts.drawn(rows, 4 if quick else 12, seed)
    groups = [
        td.rollouts(tokenizer, r["prompt"], [r["chosen"], r["rejected"]], [1.0, 0.0], group=i) for i, r in enumerate(rows)
    ]
    return [{"seed": seed} | row for n, chis in enumerate(groups) for row in _update(model, chis, n)]


def _sampled(model: Any, tokenizer: Any, quick: bool, seed: int) -> list[Row]:
    """The rows of a policy's own answers, and the readings of its training (full form)."""
    n, most = (6, 4) if quick else (16, 12)
    made = answers.answered(model, tokenizer, n, most, seed)
    rows = [row for n, chis in enumerate(made.groups) for row in _update(made.policy, chis, n)]
    if not quick:
        learn = partial(train, made.policy, tokenizer, made.sums, made.unseen, "GRPO", Schedule(20, 10, 8, 8), seed=seed)
        rows += [{"table": "training", "method": "GRPO"} | row for row in learn()]
    return [{"seed": seed} | row for row in rows]


def _update(model: Any, chis: list[td.Chi], prompt: int) -> list[Row]:
    """A row for each update token (probability, advantage, covariance, force on the summed entropy), and one for the prompt."""
    found = td.forces(model, chis, chis, td.objectives.GRPO(), observable="entropy")
    F, of = answers.matrix(found), answers.tokens(chis)
    log_prob, A = answers.column(found.updated, "log_prob"), of.advantage
    covariance = (log_prob - log_prob.mean()) * (A - A.mean())
    p, force = log_prob.exp(), F.sum(0)
    own = torch.where(of.context[:, None] == of.context, F, 0.0).sum(0)
    few = covariance.topk(max(1, round(FEW * len(p)))).indices
    check = td.verify(model, chis, chis, td.objectives.GRPO(), observable="entropy", move=MOVE)
    row = dict(zip(KINDS, (float(force[here].sum()) for here in _kinds(p, A)), strict=True)) | {
        "rank": td.rank_correlation(covariance, force), "few": float(force[few].clamp(max=0).sum() / force.clamp(max=0).sum()),
        "chance": float(force[few].mean() - force.mean()), "total": float(force.sum()), "linearity": check.linearity,
        "others": float((force - own).abs().sum() / force.abs().sum()),
    }  # fmt: skip
    columns = zip(p.tolist(), A.tolist(), covariance.tolist(), force.tolist(), own.tolist(), strict=True)
    names = ("p", "advantage", "covariance", "force", "own")
    return [{"table": "prompts", "prompt": prompt} | row] + [
        {"table": "tokens", "prompt": prompt} | dict(zip(names, values, strict=True)) for values in columns
    ]


def _kinds(p: torch.Tensor, A: torch.Tensor) -> list[torch.Tensor]:
    """Masks of KINDS."""
    return [(p >= LIKELY) & (A > 0), (p < LIKELY) & (A > 0), (p >= LIKELY) & (A < 0), (p < LIKELY) & (A < 0)]


def conclude(tables: dict[str, list[Row]]) -> Result:
    """The study's claims and figure, from a row for each token and prompt of the updates and each reading of the trainings."""
    import pyarrow as pa

    tokens, prompts, training = (tables[name] for name in ("tokens", "prompts", "training"))
    down = sum(row["force"] for row in tokens if row["force"] < 0)
    right = sum(row["force"] for row in tokens if row["force"] < 0 and row["advantage"] > 0) / down
    likely = sum(row["force"] for row in tokens if row["force"] < 0 and row["advantage"] > 0 and row["p"] >= LIKELY) / down
    return Result(
        f"{right:.0%} of what lowers the entropy in a GRPO update comes from right answers, "
        f"{likely:.0%} from their likely tokens",
        [_predicted(prompts), *_signs(prompts), *_few(prompts), *_falls(prompts, training)],
        {name: pa.Table.from_pylist(rows) for name, rows in tables.items() if rows},
        {"entropy_collapse": _figure(tokens, training)},
        notes=f"{len(prompts)} prompts with right and wrong answers, {len(tokens)} update tokens. Of the size of a token's "
        f"force {over(prompts, 'others').words()} acts on contexts that are not its own, which no covariance knows of.",
    )


def _predicted(prompts: list[Row]) -> Claim:
    off = max(abs(row["linearity"] - 1) for row in prompts)
    return Claim(
        "The exact forces on the entropy predict a real step (docs/theory.md, Observables and parts)",
        f"slope of real on predicted changes within a tenth of 1 in a step of {MOVE:g} nats, at every prompt",
        f"off by at most {off:.3f} at {len(prompts)} prompts",
        told(off < 0.1),
    )


def _signs(prompts: list[Row]) -> list[Claim]:
    """Claims about the sign of kinds of tokens, and about the covariance."""
    sums = {name: over(prompts, name) for name in KINDS}
    rank = over(prompts, "rank")
    return [
        Claim(
            f"Likely tokens of right answers lower the entropy ({PAPER}, Theorem 1)",
            f"Σ F_H of a prompt's tokens with pi >= {LIKELY} and A > 0 below 0, its interval too",
            f"{sums[KINDS[0]].words(UNIT)}; " + ", ".join(f"{name} {sums[name].words()}" for name in KINDS[2:]),
            below(sums[KINDS[0]]),
        ),
        Claim(
            f"Unlikely tokens of right answers raise it ({PAPER}, Theorem 1)",
            f"Σ F_H of a prompt's tokens with pi < {LIKELY} and A > 0 above 0, its interval too",
            sums[KINDS[1]].words(UNIT),
            above(sums[KINDS[1]]),
        ),
        Claim(
            f"A token's covariance of log-probability and advantage ranks its effect on the entropy ({PAPER} §3)",
            "rank correlation of covariance and F_H over a prompt's tokens below 0, its interval too",
            rank.words(),
            below(rank),
        ),
    ]


def _few(prompts: list[Row]) -> list[Claim]:
    """Claims about the tokens of the largest covariance."""
    few, chance = over(prompts, "few"), over(prompts, "chance")
    return [
        Claim(
            f"A few tokens of high covariance do most of it ({PAPER} §4)",
            f"the {FEW:.0%} of a prompt's tokens with the largest covariance hold more than half of what lowers the entropy, "
            "its interval too",
            few.words(),
            above(few, 0.5),
        ),
        Claim(
            f"so that leaving them out spares entropy ({PAPER} §4, against random tokens)",
            "their mean F_H is below that of all tokens, the difference's interval too",
            chance.words(UNIT),
            below(chance),
        ),
    ]


def _falls(prompts: list[Row], training: list[Row]) -> list[Claim]:
    """Claims about the entropy itself; that of training where there was one."""
    total = over(prompts, "total")
    claims = [
        Claim(
            f"One GRPO step lowers the policy's entropy along its answers ({PAPER} §2)",
            "Σ F_H over all update tokens of a prompt below 0, its interval too",
            total.words(UNIT),
            below(total),
        )
    ]
    if training:
        entropy, solved = (estimate(gains(training, "GRPO", key, TRAINED)) for key in ("entropy", "pass_1"))
        apart = [estimate(gains(training, "GRPO", key)) for key in ("entropy", "pass_1")]
        claims.append(Claim(
            f"In GRPO training the entropy falls while the reward grows ({PAPER} §2)",
            "over 20 steps, on the sums trained on: entropy along fresh answers below 0, pass@1 above 0, intervals too",
            f"entropy {entropy.words('nats')}, pass@1 {solved.words()}; held out {apart[0].words()} and {apart[1].words()}",
            both(below(entropy), above(solved)),
        ))  # fmt: skip
    return claims


def _figure(tokens: list[Row], training: list[Row]) -> Any:
    made, axes = figure(1, 3, title="Which update tokens move the entropy", width=11.5, height=3.4)
    for sign, colour, label in ((1, BLUE, "A > 0"), (-1, VERMILION, "A < 0")):
        some = [row for row in tokens if row["advantage"] * sign > 0]
        for panel, key in zip(axes, ("p", "covariance"), strict=False):
            panel.plot([r[key] for r in some], [r["force"] for r in some], ".", color=colour, label=label, markersize=3)
    names = ("probability of the update token", "(log π − mean)(A − mean)")
    for panel, name, title in zip(axes, names, ("confidence", "covariance"), strict=False):
        panel.axhline(0, color=GREY, linewidth=0.8)
        panel.set(xlabel=name, ylabel="force on the entropy (nats per unit lr)", title=title)
    axes[0].legend()
    if training:
        steps = sorted({row["step"] for row in training})
        band(axes[2], steps, lines(training, "GRPO", "entropy"), BLUE)
        axes[2].set(xlabel="GRPO step", ylabel="entropy along fresh answers (nats)", title="training, held-out sums")
    else:
        axes[2].plot([row["own"] for row in tokens], [row["force"] for row in tokens], ".", color=BLUE, markersize=3)
        axes[2].set(xlabel="force on its own context (nats per unit lr)", ylabel="force on all (nats per unit lr)",
                    title="shared parameters")  # fmt: skip
    return made
