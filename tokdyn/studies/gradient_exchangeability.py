"""Tokens that all answers of a group share: which RL losses let their gradients cancel, and which push them for no reward?

Ding et al., *Design Conditions for Intra-Group Learning of Sequence-Level Rewards: Token Gradient Cancellation* (arXiv
2604.13088): a group's objective has to keep token gradients exchangeable, so that they cancel at frequent tokens that earn no
credit; two common mechanisms, weights that are coupled to the whole sequence and asymmetric clipping, break it, and such
tokens drift. Here on groups of four right and four wrong answers to sums that share their working, the wrong ones longer, for
a policy that a few GRPO steps took away from the one that is said to have sampled them. At a token that all eight share with
its context they have one ratio γ and one Jacobian, so that the net push is Σ_i c_i, c_i the loss's weight of answer i there.

Asserted: it is 0 where c_i = A_i f(γ) with one f, for Dr. GRPO without its clip and for CISPO, whose clip has one side for
both signs, and so is the exact force over all parameters. Measured, over seeds with problems of their own: what is left of it
under a ratio of the sequence (GSPO), a mean over each answer (GRPO), and PPO's clip.
"""

from __future__ import annotations

from typing import Any

import torch

import tokdyn as td

from ..objectives import Objective
from ..sequences import context_numbers
from . import answers, arithmetic, training
from .answers import Row, over
from .figures import BLUE, GREY, VERMILION, figure
from .parts import Keep, unkept
from .result import Claim, Result, above, both, told

PAPER = "arXiv 2604.13088"
FREE = 1e9  # a clip that never acts
EPSILON = 0.05  # PPO's clip here: the policy is a few steps away only
SOME = 0.01  # share of the gross push that counts as a drift
EXCHANGEABLE: dict[str, Objective] = {"Dr. GRPO, no clip": td.objectives.DrGRPO(clip=FREE), "CISPO": td.objectives.CISPO()}
COUPLED: dict[str, Objective] = {"GSPO, no clip": td.objectives.GSPO(clip=FREE, clip_high=FREE),
                                 "GRPO, no clip": td.objectives.GRPO(clip=FREE)}  # fmt: skip
CLIPPED: dict[str, Objective] = {"Dr. GRPO, clip": td.objectives.DrGRPO(clip=EPSILON)}


def run(quick: bool = False, seed: int = 0, model: str = "demo", keep: Keep = unkept, runs: int | None = None) -> Result:
    """Weights and exact forces of shared tokens under five losses.

    Args:
        quick: one seed of 4 groups, 3 steps away; else eight seeds of 16, 8 steps away.
        seed: of the first run.
        model: a folder or a hub name.
        keep: where finished seeds are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    seeds = range(seed, seed + (runs or (1 if quick else 8)))
    return conclude(answers.of_seeds(_seed, model, quick, seeds, keep))


def _seed(model: Any, tokenizer: Any, quick: bool, seed: int) -> list[Row]:
    """A row for each group: what each loss leaves of the gross push at shared tokens, in weights and in exact forces."""
    n = 6 if quick else 16
    made = answers.answered(model, tokenizer, n, n, seed)
    policy = answers.tuned(made, tokenizer, 3 if quick else 8, 4, seed)
    rows = []
    for g, s in enumerate(made.sums[: 4 if quick else 16]):
        chis = group(tokenizer, s, g)
        old = training.log_probs(made.policy, chis)
        chis = [chi.with_(old_log_probs=part) for chi, part in zip(chis, old, strict=True)]
        rows.append({"seed": seed, "group": g} | _left(policy, chis))
    return rows


def group(tokenizer: Any, s: arithmetic.Sum, number: int) -> list[td.Chi]:
    """Eight answers with one working: four right ones, and four wrong ones that say their number twice."""
    first, more = s.a + s.b, 3 + number % 4
    right = [f" {s.a} + {s.b} = {first}. {first} + {more} = {first + more}."] * 4
    wrong = [f" {s.a} + {s.b} = {first}. {first} + {more} = {n}. It is {n}." for n in range(first + more + 1, first + more + 5)]
    prompt = f"Human: What is {s.a} + {s.b} + {more}?\n\nAssistant:"
    return td.rollouts(tokenizer, prompt, right + wrong, [1.0] * 4 + [0.0] * 4, group=number)


def shared(chis: list[td.Chi]) -> torch.Tensor:
    """Mask of the tokens that every answer has behind the same text."""
    keys = list(zip(context_numbers(chis).tolist(), torch.cat([chi.ids[chi.scored] for chi in chis]).tolist(), strict=True))
    return torch.tensor([keys.count(key) == len(chis) for key in keys])


def _left(policy: Any, chis: list[td.Chi]) -> Row:
    """Σ|Σ_i c_i|/Σ|c_i| over shared tokens by loss, and ‖F of them all‖/‖F of right answers' alone‖ on the right answers."""
    log_pi, at = torch.cat(training.log_probs(policy, chis)), shared(chis)
    old = torch.cat([chi.old_log_probs for chi in chis if chi.old_log_probs is not None])
    context, right = context_numbers(chis)[at], torch.cat([torch.full((len(chi),), (chi.advantage or 0) > 0) for chi in chis])
    ratio = (log_pi - old)[at].exp()
    row: Row = {"shared": int(at.sum()) // len(chis), "outside": float(((ratio - 1).abs() > EPSILON).double().mean())}
    observed = [chi for chi in chis if (chi.advantage or 0) > 0][:1]
    K = answers.matrix(td.forces(policy, chis, observed, td.objectives.SFT()))[:, at]  # c = 1: <g_m, g_l>
    for name, objective in (EXCHANGEABLE | COUPLED | CLIPPED).items():
        c = objective.g_terms(log_pi, chis).c.double()[at]
        net = torch.stack([c[context == k].sum().abs() for k in context.unique()]).sum()
        row |= {
            f"weights, {name}": float(net / c.abs().sum()),
            f"force, {name}": float((K @ c).norm() / (K @ (c * right[at])).norm()),
        }
    return row


def conclude(rows: list[Row]) -> Result:
    """The study's claims and figure, from a row for each group."""
    import pyarrow as pa

    left = {name: over(rows, f"weights, {name}") for name in EXCHANGEABLE | COUPLED | CLIPPED}
    force = {name: over(rows, f"force, {name}") for name in left}
    most = max(row[f"{what}, {name}"] for row in rows for name in EXCHANGEABLE for what in ("weights", "force"))
    outside = over(rows, "outside")
    return Result(
        f"Of the push on tokens that all answers share GSPO leaves {left['GSPO, no clip'].mean:.1%}, a mean over each answer "
        f"{left['GRPO, no clip'].mean:.0%} and PPO's clip {left['Dr. GRPO, clip'].mean:.1%}; one weight a token leaves nothing",
        [
            Claim(
                f"One function of the token's own ratio for all answers cancels what they share (identity; {PAPER})",
                "Σ_i c_i against Σ_i |c_i|, and the exact force of all against that of right answers: 0 to float32 "
                "rounding, for "
                "Dr. GRPO without clip and CISPO",
                f"at most {most:.1e} over {len(rows)} groups",
                told(most < 1e-4),
            ),
            Claim(
                f"Weights coupled to the sequence leave a push on shared tokens ({PAPER})",
                f"share that is left of the gross push above {SOME} under GSPO's ratio and under GRPO's mean over each answer, "
                "intervals too",
                _each(left, COUPLED),
                both(*(above(left[name], SOME) for name in COUPLED)),
            ),
            Claim(
                f"So does asymmetric clipping ({PAPER})",
                f"the same under PPO's clip of {EPSILON}, which stops one sign of the advantage alone",
                f"{_each(left, CLIPPED)}; the ratio is outside at {outside.words()} of shared tokens",
                both(*(above(left[name], SOME) for name in CLIPPED)),
            ),
            Claim(
                f"and the drift is one of the whole network ({PAPER}, reward-irrelevant drift)",
                f"‖exact force of all shared tokens‖ on a right answer against that of the right answers' above {SOME} "
                f"under each of "
                "the three, intervals too",
                _each(force, COUPLED | CLIPPED),
                both(*(above(force[name], SOME) for name in COUPLED | CLIPPED)),
            ),
        ],
        {"groups": pa.Table.from_pylist(rows)},
        {"gradient_exchangeability": _figure(rows)},
        notes=f"{len(rows)} groups of 8 answers that share {over(rows, 'shared').words()} tokens. Which losses stand for "
        f"the paper's "
        "two mechanisms is our reading of it.",
    )


def _each(values: dict[str, Any], names: dict[str, Objective]) -> str:
    return "; ".join(f"{name} {values[name].words()}" for name in names)


def _figure(rows: list[Row]) -> Any:
    made, axes = figure(1, 2, title="What is left of the push on tokens that all answers share", width=10.5, height=3)
    names = list(EXCHANGEABLE | COUPLED | CLIPPED)
    for panel, what in zip(axes, ("weights", "force"), strict=True):
        for k, name in enumerate(names):
            value = over(rows, f"{what}, {name}")
            colour = BLUE if name in EXCHANGEABLE else VERMILION
            panel.plot([row[f"{what}, {name}"] for row in rows], [k] * len(rows), "|", color=GREY, markersize=7)
            panel.errorbar([value.mean], [k], xerr=[value.half], fmt="o", color=colour, capsize=3)
        panel.set_yticks(range(len(names)), names)
    axes[0].set(xlabel="Σ|Σ c| / Σ|c| at shared tokens", ylabel="loss", title="weights; a mark is a group")
    axes[1].set(xlabel="‖F of all‖ / ‖F of right answers‖", ylabel="loss", title="exact force on a right answer")
    return made
