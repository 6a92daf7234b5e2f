"""What RL's kernel owes to features that are alike, and to gradients: does every update make the policy more confident?

Tomihari, *Learning Dynamics in RL Post-Training for Language Models* (arXiv 2601.04670), splits the tangent kernel into a
representation part, the inner products of the features h, and a gradient part, what moves h itself: features that vary little
make RL updates raise confidence systematically, at other samples too, which would explain lost variety; and learning is
quicker where the classifier is trained first (CF-RL). Here on sums that the demo model half solves: the representation part
is the readout's force, (h_m·h_l) <∂O/∂z_m, c_l (e_l - π_l)>, the gradient part that of all other parameters; O the
log-probability of the most likely token.

Asserted: the parts are these and add up. Measured, over seeds with problems of their own: how alike features are, what each
part of an update does to confidence along answers to other problems, and (full form) training with the readout first.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tokdyn as td

from . import answers, training
from .answers import Row, over
from .figures import BLUE, GREY, ORANGE, VERMILION, figure
from .grpo_training import reading
from .parts import Keep, unkept
from .result import Claim, Result, above, both, told

PAPER = "arXiv 2601.04670"
ALIKE = 0.5  # cosine from which features count as alike
STEPS, FIRST = 20, 10  # of training, and those that move the readout alone
PARTS = ("representation", "gradient", "whole")


def run(quick: bool = False, seed: int = 0, model: str = "demo", keep: Keep = unkept, runs: int | None = None) -> Result:
    """Parts of the forces on confidence, then training with and without a readout that goes first.

    Args:
        quick: one seed of 5 problems and no training; else six seeds of 12 and 20 steps each.
        seed: of the first run.
        model: a folder or a hub name.
        keep: where finished seeds are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    seeds = range(seed, seed + (runs or (1 if quick else 6)))
    return conclude(answers.of_seeds(_seed, model, quick, seeds, keep))


def confidence(z: Tensor) -> Tensor:
    """Log-probability of the most likely token."""
    return z.log_softmax(1).max(1).values


def _seed(model: Any, tokenizer: Any, quick: bool, seed: int) -> list[Row]:
    """A row for each problem: what a GRPO update on the answers to all others does to confidence along its own."""
    made = answers.answered(model, tokenizer, 7 if quick else 16, 5 if quick else 12, seed)
    trained = {} if quick else _trained(made, tokenizer, seed)
    rows = []
    for n, observed in enumerate(made.groups):
        update = [chi for k, chis in enumerate(made.groups) if k != n for chi in chis]
        ask = partial(td.forces, made.policy, update, observed, td.objectives.GRPO(), observable=confidence)
        found = ask(by="kind", reduce="update")
        assert found.parts is not None and found.vector is not None
        parts = {name: torch.as_tensor(part).double() for name, part in found.parts.items()}
        whole, readout = found.vector.double(), parts["readout"]
        closed, cosine = _closed(made.policy, observed, update, found.c.double())
        values = dict(zip(PARTS, (readout, whole - readout, whole), strict=True))
        rows.append({
            "seed": seed, "problem": n, "gap": float((closed - readout).norm() / readout.norm()),
            "left over": float((torch.stack(list(parts.values())).sum(0) - whole).norm() / whole.norm()), "cosine": cosine,
            **{name: float(value.mean()) for name, value in values.items()}, **trained,
        })  # fmt: skip
    return rows


def _closed(policy: Any, observed: list[td.Chi], update: list[td.Chi], c: Tensor) -> tuple[Tensor, float]:
    """Σ_l (h_m·h_l) <e_top - π_m, c_l (e_l - π_l)> for each observed token, and the mean cosine of h_m and h_l."""
    h, hu = (torch.cat(training.hidden(policy, chis)).double() for chis in (observed, update))
    with torch.no_grad():
        z, zu = (training.logits(policy, chis).double() for chis in (observed, update))
    V = z.shape[1]
    top = nn.functional.one_hot(z.argmax(1), V) - z.softmax(1)
    push = c[:, None] * (nn.functional.one_hot(training.targets(update), V) - zu.softmax(1))
    cosine = nn.functional.normalize(h, dim=1) @ nn.functional.normalize(hu, dim=1).T
    return ((h @ hu.T) * (top @ push.T)).sum(1), float(cosine.mean())


def _trained(made: answers.Answered, tokenizer: Any, seed: int) -> Row:
    """Gains in pass@1 and top-1 mass on held-out sums in training, and in training with the readout first."""
    policy = copy.deepcopy(made.policy)
    head = policy.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # a classifier of its own, where it was the embedding too
    policy.config.tie_word_embeddings = False
    untied = answers.Answered(policy, made.sums, made.unseen, made.groups)
    before, found = reading(policy, tokenizer, made.unseen, 8, seed), Row()
    for name, first in (("all", 0), ("head first", FIRST)):
        after = reading(answers.tuned(untied, tokenizer, STEPS, 8, seed, head_first=first), tokenizer, made.unseen, 8, seed)
        found |= {f"{key}, {name}": after[key] - before[key] for key in ("pass_1", "top_1")}
    return found


def conclude(rows: list[Row]) -> Result:
    """The study's claims and figure, from a row for each seed and problem."""
    import pyarrow as pa

    gap, left, cosine = max(row["gap"] for row in rows), max(row["left over"] for row in rows), over(rows, "cosine")
    part = {name: over(rows, name) for name in PARTS}
    said = "; ".join(f"{name} {value.words()}" for name, value in part.items()) + " nats per unit learning rate"
    return Result(
        f"Features have a mean cosine of {cosine.mean:.2f}; an update moves confidence at other problems by "
        f"{part['representation'].mean:+.2g} through them and by {part['gradient'].mean:+.2g} through all else",
        [
            Claim(
                "The readout's force is the representation part (h·h) <∂O/∂z, Γ>, and all parts add up (identity; "
                "docs/theory.md, "
                "The kernel)",
                "relative difference of the part and of the sum = 0 up to float32 rounding",
                f"{gap:.1e} and {left:.1e} at most",
                told(max(gap, left) < 1e-3),
            ),
            Claim(
                f"Features vary little ({PAPER})",
                f"mean cosine of h at tokens of answers to different problems above {ALIKE}, its interval too",
                cosine.words(),
                above(cosine, ALIKE),
            ),
            Claim(
                f"so that through the representation part RL raises confidence at other problems too ({PAPER})",
                "mean force of a GRPO update through the readout on the first choice's log-probability along answers to a "
                "problem "
                "that is left out above 0, its interval too",
                said,
                above(part["representation"]),
            ),
            Claim(
                f"and the update as a whole does ({PAPER})",
                "the same of all parameters",
                said,
                above(part["whole"]),
            ),
            *_first(rows),
        ],
        {"problems": pa.Table.from_pylist(rows)},
        {"rl_kernel": _figure(rows)},
        notes=f"{len(rows)} problems, each left out of the update that is observed on its answers. Where the model ties its "
        f"readout "
        "to the embedding, the lookup's share and the cross terms count in the gradient part; training gives the readout a "
        "weight "
        "of its own.",
    )


def _first(rows: list[Row]) -> list[Claim]:
    """Claim about training the readout first, where there was training."""
    if "pass_1, all" not in rows[0]:
        return []
    one = list({row["seed"]: row for row in rows}.values())
    more = {key: over([{"seed": r["seed"], "x": r[f"{key}, head first"] - r[f"{key}, all"]} for r in one], "x")
            for key in ("pass_1", "top_1")}  # fmt: skip
    return [
        Claim(
            f"With the readout first, training raises confidence and reward faster ({PAPER}, CF-RL)",
            f"after {STEPS} steps, the first {FIRST} of them on the readout alone: gains in top-1 mass and pass@1 on "
            f"held-out sums "
            "above those of as many steps on all parameters, intervals of the differences too",
            f"top-1 mass {more['top_1'].words()}, pass@1 {more['pass_1'].words()} against all parameters",
            both(*map(above, more.values())),
        )
    ]


def _figure(rows: list[Row]) -> Any:
    made, axes = figure(title="Confidence along answers to a problem that the update leaves out", height=3.2)
    for k, (name, colour) in enumerate(zip(PARTS, (BLUE, ORANGE, VERMILION), strict=True)):
        value = over(rows, name)
        axes.plot([row[name] for row in rows], [k] * len(rows), "|", color=GREY, markersize=7)
        axes.errorbar([value.mean], [k], xerr=[value.half], fmt="o", color=colour, capsize=3)
    axes.set_yticks(range(len(PARTS)), PARTS)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set(xlabel="force on log π(first choice), mean over tokens (nats per unit lr)", ylabel="part of the kernel",
             title="mean and 95%; a mark is a problem")  # fmt: skip
    return made
