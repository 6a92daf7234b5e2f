"""Peaks and valleys of right and wrong answers: which of the four kinds of tokens lowers the entropy, and do winners alone do?

YSS et al., *A Gradient Perspective on RLVR Stability and Winner Advantage Policy Optimization* (arXiv 2606.16154), sort the
tokens of an update by the sign of their advantage and by whether the policy's probability of them is at least Σ p_i² (a peak)
or below (a valley), and say from it what an update does to probabilities and entropy; training on positive advantages alone
(WAPO) is more stable. At the logits a push c on token y moves the entropy by -c [p_y (log p_y + H) - Σ p_i² (log p_i + H)]: a
peak that is pulled up should lower it, a valley raise it, and pushes down the reverse. Here on sums that the demo model half
solves, beside the exact forces over all parameters, which act on other contexts too.

Asserted: that formula is the force on the entropy where the logits themselves move. Measured, over seeds with problems of
their own: signs of the four kinds at the logits, at their own contexts and in all; what winners alone do, in a step and in
training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tokdyn as td

from ..observables import Entropy
from . import answers, training
from .answers import Row, column, matrix, over
from .figures import BLUE, GREY, VERMILION, figure
from .grpo_training import Schedule, gained, gains, train
from .parts import Keep, unkept
from .result import Claim, Result, above, below, both, estimate, told

PAPER = "arXiv 2606.16154"
KINDS = {"peak, A > 0": -1, "valley, A > 0": 1, "peak, A < 0": 1, "valley, A < 0": -1}  # sign of what each does to the entropy
LEVELS = ("at the logits", "own context", "all contexts")
ALONE = "Pos-only"  # of grpo_training: winners alone


def run(quick: bool = False, seed: int = 0, model: str = "demo", keep: Keep = unkept, runs: int | None = None) -> Result:
    """Forces on the entropy by kind of token, then training on all and on winners alone.

    Args:
        quick: one seed of 4 prompts and no training; else six seeds of 12 prompts and 20 steps each.
        seed: of the first run.
        model: a folder or a hub name.
        keep: where finished seeds are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    seeds = range(seed, seed + (runs or (1 if quick else 6)))
    tables: dict[str, list[Row]] = {"prompts": [], "tokens": [], "training": []}
    for row in answers.of_seeds(_seed, model, quick, seeds, keep):
        tables[row.pop("table")].append(row)
    return conclude(tables)


def _seed(model: Any, tokenizer: Any, quick: bool, seed: int) -> list[Row]:
    made = answers.answered(model, tokenizer, 6 if quick else 16, 4 if quick else 12, seed)
    rows = [row for k, chis in enumerate(made.groups) for row in _prompt(made.policy, chis, k)]
    if not quick:
        rows += [
            {"table": "training", "method": name} | row
            for name in ("GRPO", ALONE)
            for row in train(made.policy, tokenizer, made.sums, made.unseen, name, Schedule(20, 10, 8, 8), seed=seed)
        ]
    return [{"seed": seed} | row for row in rows]


def _prompt(model: Any, chis: list[td.Chi], prompt: int) -> list[Row]:
    """A row for each update token, its force on the entropy at three levels, and one for the prompt."""
    found = td.forces(model, chis, chis, td.objectives.GRPO(), observable="entropy")
    F, of, c = matrix(found), answers.tokens(chis), found.c.double()
    with torch.no_grad():
        z = training.logits(model, chis).double()
    y, p = of.token, column(found.updated, "log_prob").exp()
    peak = p >= z.softmax(1).square().sum(1)
    own = torch.where(of.context[:, None] == of.context, F, 0.0).sum(0)
    forces = dict(zip(LEVELS, (of_logits(z, y, c), own, F.sum(0)), strict=True))
    kinds = [side & of_kind for side in (of.advantage > 0, of.advantage < 0) for of_kind in (peak, ~peak)]
    row: Row = {"table": "prompts", "prompt": prompt, "gap": _gap(z, y, c)}
    for level, force in forces.items():
        row |= {f"{name}, {level}": float(force[here].sum()) for name, here in zip(KINDS, kinds, strict=True)}
    weight = forces[LEVELS[0]].abs()
    row["same sign"] = float(weight[(own > 0) == (forces[LEVELS[0]] > 0)].sum() / weight.sum())
    row["winners spare"] = abs(float(F.sum())) - abs(float(F[:, of.advantage > 0].sum()))
    names = [next(name for name, here in zip(KINDS, kinds, strict=True) if here[k]) for k in range(len(p))]
    tokens = [{"table": "tokens", "prompt": prompt, "kind": name, "p": float(p[k])}
              | {level: float(force[k]) for level, force in forces.items()} for k, name in enumerate(names)]  # fmt: skip
    return [row, *tokens]


def of_logits(z: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """-c [p_y (log p_y + H) - Σ p² (log p + H)], what a push c on y does to the entropy of its logits z [N, V]."""
    p, log_p = z.softmax(1), z.log_softmax(1)
    weight = log_p - (p * log_p).sum(1, keepdim=True)  # log p + H
    return -c * ((p * weight).gather(1, y[:, None]).squeeze(1) - (p.square() * weight).sum(1))


def _gap(z: Tensor, y: Tensor, c: Tensor) -> float:
    """Relative difference of `of_logits` and <∂H/∂z, c (e_y - pi)> from the library's own terms."""
    pushed = c[:, None] * (torch.nn.functional.one_hot(y, z.shape[1]) - z.softmax(1))
    truth = (Entropy().term(z, y).logit_force(z) * pushed).sum(1)
    return float((of_logits(z, y, c) - truth).norm() / truth.norm())


def conclude(tables: dict[str, list[Row]]) -> Result:
    """The study's claims and figure, from a row for each prompt and token, and each reading of the trainings."""
    import pyarrow as pa

    prompts, curves = tables["prompts"], tables["training"]
    gap, same = max(row["gap"] for row in prompts), over(prompts, "same sign")
    signs = [_signs(prompts, level) for level in LEVELS]
    met = sum(claim.verdict == "holds" for claim in signs)
    return Result(
        f"The taxonomy's signs of the entropy hold at {met} of {len(LEVELS)} levels; weighted by size {same.mean:.0%} of "
        f"tokens "
        "move their own context's entropy as their logits say",
        [
            Claim(
                "A push's effect on its own logits' entropy has this closed form (identity; docs/theory.md, Observables and "
                "parts)",
                "<∂H/∂z, c (e_y - π)> = -c [p_y (log p_y + H) - Σ p² (log p + H)] to rounding",
                f"relative difference at most {gap:.1e} at {len(prompts)} prompts",
                told(gap < 1e-4),
            ),
            *signs,
            *_winners(prompts, curves),
        ],
        {name: pa.Table.from_pylist(rows) for name, rows in tables.items() if rows},
        {"token_taxonomy": _figure(tables["tokens"])},
        notes="The four kinds are the paper's; the signs follow from the closed form above, for p well above or below Σ p².",
    )


def _signs(prompts: list[Row], level: str) -> Claim:
    """Whether each kind moves the entropy as predicted: at the logits, of the tokens' own contexts, or of all."""
    sums = {name: over(prompts, f"{name}, {level}") for name in KINDS}
    where = {LEVELS[0]: "of the logits pushed", LEVELS[1]: "of the tokens' own contexts, all parameters",
             LEVELS[2]: "of all contexts, all parameters"}[level]  # fmt: skip
    return Claim(
        f"Sign of advantage and peak or valley decide what a token does to the entropy ({PAPER}), {level}",
        f"sum of the forces on the entropy {where}: below 0 for peaks of right and valleys of wrong answers, above 0 for the "
        "other two kinds, intervals too",
        "; ".join(f"{name} {value.words()}" for name, value in sums.items()) + " nats per unit learning rate",
        both(*((above if KINDS[name] > 0 else below)(value) for name, value in sums.items())),
    )


def _winners(prompts: list[Row], curves: list[Row]) -> list[Claim]:
    """Claims about updates on positive advantages alone."""
    spare = over(prompts, "winners spare")
    claims = [
        Claim(
            f"Winners alone move the entropy less ({PAPER}, in one update)",
            "|Σ F_H| of all update tokens minus that of right answers' alone above 0, its interval too",
            spare.words("nats per unit learning rate"),
            above(spare),
        )
    ]
    if curves:
        entropy = {name: estimate(map(abs, gains(curves, name, "entropy"))) for name in ("GRPO", ALONE)}
        pairs = zip(gains(curves, "GRPO", "entropy"), gains(curves, ALONE, "entropy"), strict=True)
        less, better = estimate(abs(a) - abs(b) for a, b in pairs), gained(curves, ALONE, "GRPO", "pass_1")
        claims.append(Claim(
            f"and in training, where they solve at least as much ({PAPER}, WAPO)",
            "|change of the entropy| in 20 steps under GRPO minus that with winners alone above 0; pass@1 at most 0.02 less",
            f"entropy {entropy['GRPO'].words('nats')} and {entropy[ALONE].words()}, difference {less.words()}; pass@1 against "
            f"GRPO {better.words()}",
            both(above(less), above(better, -0.02)),
        ))  # fmt: skip
    return claims


def _figure(tokens: list[Row]) -> Any:
    made, (left, right) = figure(1, 2, title="Peaks and valleys: what the logits say, and what the network does", height=3.4)
    colours = dict(zip(KINDS, ((BLUE, "^"), (BLUE, "v"), (VERMILION, "^"), (VERMILION, "v")), strict=True))
    for name, (colour, marker) in colours.items():
        some = [row for row in tokens if row["kind"] == name]
        left.plot([row["p"] for row in some], [row[LEVELS[0]] for row in some], marker, color=colour, markersize=3, label=name)
        right.plot([row[LEVELS[0]] for row in some], [row[LEVELS[2]] for row in some], marker, color=colour, markersize=3)
    for panel in (left, right):
        panel.axhline(0, color=GREY, linewidth=0.8)
    left.set(
        xlabel="probability of the update token", ylabel="effect on the entropy, at the logits (nats)", title="logits alone"
    )
    right.set(xlabel="effect on the entropy, at the logits (nats)", ylabel="exact force on all entropies\n(nats per unit lr)",
              title="all parameters")  # fmt: skip
    left.legend(fontsize=7)
    return made
