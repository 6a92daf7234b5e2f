"""Does learning to solve some problems in GRPO make right answers to others less likely, and does the winner take all?

Nguyen et al., *The Reasoning Boundary Paradox* (arXiv 2510.02230): with verifiable rewards, learning to solve certain
problems lowers the likelihood of right solutions to others (negative interference), and problems whose right solutions are
likely under the base model are reinforced, while unlikely ones are suppressed (winner takes all), because the policy learns
from its own samples. Here on sums that the demo model half solves: the exact force of every problem's answers on the
log-probability that any of the three right answers to another problem is given, all parameters; and GRPO training.

Asserted: forces predict a real step. Measured, over seeds with problems of their own: which problems harm which, and whether
likely right answers gain more than unlikely ones, in one update and (full form) in training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tokdyn as td

from ..interventions import loss
from . import answers, arithmetic, training
from .answers import Row, matrix
from .figures import BLUE, GREY, VERMILION, figure
from .parts import Keep, unkept
from .result import Claim, Result, above, below, both, of_runs, told

PAPER = "arXiv 2510.02230"
MANY = 0.1  # share of pairs from which interference is no exception
MOVE = 0.01  # nats by which the real step moves the right answers most
FORMS = len(arithmetic.FORMS)


def run(quick: bool = False, seed: int = 0, model: str = "demo", keep: Keep = unkept, runs: int | None = None) -> Result:
    """Forces between problems in one GRPO update, then training.

    Args:
        quick: one seed of 8 problems and no training; else eight seeds of 16 and 20 steps each.
        seed: of the first run.
        model: a folder or a hub name.
        keep: where finished seeds are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    seeds = range(seed, seed + (runs or (1 if quick else 8)))
    return conclude(answers.of_seeds(_seed, model, quick, seeds, keep))


def _seed(model: Any, tokenizer: Any, quick: bool, seed: int) -> list[Row]:
    """A row for each problem j: what the others' and its own answers do to its right ones, and what training does."""
    n = 8 if quick else 16
    made = answers.answered(model, tokenizer, n, n, seed)
    observed = [
        td.encode(tokenizer, s.prompt, s.answer(form), group=j) for j, s in enumerate(made.sums) for form in range(FORMS)
    ]
    update = [chi for chis in made.groups for chi in chis]
    problems = [chis[0].group for chis in made.groups]
    owner = torch.tensor([problems.index(chi.group) for chi in update for _ in range(len(chi))])
    before = right(made.policy, observed)
    F = matrix(td.forces(made.policy, update, observed, td.objectives.GRPO(), groups=owner))
    force = _of_problems(made.policy, observed, F)  # [problem, learned problem]
    slope = _slope(made.policy, update, observed, force.sum(1))
    after = before if quick else right(answers.tuned(made, tokenizer, 20, 8, seed), observed)
    rows = []
    for j in range(n):
        own = problems.index(j) if j in problems else -1
        others = torch.arange(len(problems)) != own
        rows.append({
            "seed": seed, "problem": j, "before": float(before[j]), "gained": float(after[j] - before[j]), "slope": slope,
            "harmful": float((force[j][others] < 0).double().mean()), "by others": float(force[j][others].sum()),
            "own": float(force[j][own]) if own >= 0 else float("nan"), "total": float(force[j].sum()),
        })  # fmt: skip
    return rows


def right(policy: Any, observed: list[td.Chi]) -> Tensor:
    """log of the probability that one of a problem's right answers is given, [problems]."""
    whole = torch.stack([part.sum() for part in training.log_probs(policy, observed)]).double()
    return whole.view(-1, FORMS).logsumexp(1)


def _of_problems(policy: Any, observed: list[td.Chi], F: Tensor) -> Tensor:
    """Force on `right`: its gradient is that of the answers' log-probabilities, each times its share of the probability."""
    whole = torch.stack([part.sum() for part in training.log_probs(policy, observed)]).double().view(-1, FORMS)
    share = whole.softmax(1).flatten()
    sizes = [len(chi) for chi in observed]
    answer = torch.stack([part.sum(0) for part in F.split(sizes)])
    return (share[:, None] * answer).view(len(whole), FORMS, -1).sum(1)


def _slope(policy: Any, update: list[td.Chi], observed: list[td.Chi], predicted: Tensor) -> float:
    """<predicted, real>/‖predicted‖² of a real gradient step that moves a problem by MOVE nats, to first order."""
    parameters = list(policy.parameters())
    move = torch.autograd.grad(loss(policy, update, td.objectives.GRPO()), parameters)
    eta, before = MOVE / float(predicted.abs().max()), right(policy, observed)
    with torch.no_grad():
        kept = [theta.clone() for theta in parameters]
        for theta, g in zip(parameters, move, strict=True):
            theta.sub_(eta * g)
        real = right(policy, observed) - before
        for theta, old in zip(parameters, kept, strict=True):
            theta.copy_(old)
    return float(eta * predicted @ real / (eta * predicted).square().sum())


def conclude(rows: list[Row]) -> Result:
    """The study's claims and figure, from a row for each seed and problem."""
    import pyarrow as pa

    seeds = [[row for row in rows if row["seed"] == s] for s in sorted({row["seed"] for row in rows})]
    harmful, others = (of_runs([[row[key] for row in some] for some in seeds], "problems") for key in ("harmful", "by others"))
    off = max(abs(row["slope"] - 1) for row in rows)
    claims = [
        Claim(
            "The exact forces between problems predict a real step (docs/theory.md, The decomposition)",
            f"slope of real on predicted changes of log P(right) within a tenth of 1 in a step of {MOVE:g} nats",
            f"off by at most {off:.3f} in {len(seeds)} updates",
            told(off < 0.1),
        ),
        Claim(
            f"Learning some problems makes right answers to others less likely ({PAPER}, negative interference)",
            f"share of ordered pairs of problems with a negative force above {MANY}, its interval too",
            harmful.words(),
            above(harmful, MANY),
        ),
        Claim(
            f"and on the whole others' answers harm a problem ({PAPER}, decline of pass@k)",
            "sum of the other problems' forces on a problem's right answers below 0, its interval too",
            others.words("nats per unit learning rate"),
            below(others),
        ),
        *_winners(seeds),
    ]
    return Result(
        f"Of the forces between problems {harmful.mean:.0%} lower the right answers of another problem",
        claims,
        {"problems": pa.Table.from_pylist(rows)},
        {"interference": _figure(rows)},
        notes=f"{len(rows)} problems in {len(seeds)} updates; P(right) is the probability of the three right answers together. "
        "Problems that no answer or every answer solves push nothing and are observed all the same.",
    )


def _winners(seeds: list[list[Row]]) -> list[Claim]:
    """Claims about likely and unlikely right answers; of training, where there was one."""

    def rank(some: list[Row], key: str) -> float:
        """Rank correlation of P(right) at the start with its change, in probability."""
        p = torch.tensor([row["before"] for row in some], dtype=torch.float64).exp()
        change = torch.tensor([row[key] for row in some], dtype=torch.float64)
        return td.rank_correlation(p, p * change if key == "total" else (p.log() + change).exp() - p)

    def low(some: list[Row], key: str) -> list[float]:
        """Change of log P(right) of the third of the problems at which it is lowest."""
        return [row[key] for row in sorted(some, key=lambda row: row["before"])[: len(some) // 3]]

    def claim(text: str, oracle: str, key: str) -> Claim:
        ranks, lowest = (
            of_runs([[rank(some, key)] for some in seeds], "seeds"),
            of_runs([low(s, key) for s in seeds], "problems"),
        )
        return Claim(text, oracle, f"rank correlation {ranks.words()}; unlikely third {lowest.words()}",
                     both(above(ranks), below(lowest)))  # fmt: skip

    claims = [claim(
        f"The winner takes all: likely right answers are reinforced, unlikely ones suppressed ({PAPER}, in one update)",
        "P(right) before and its change to first order are rank-correlated over problems, interval above 0, and the force on "
        "log P(right) of the unlikely third is below 0",
        "total",
    )]  # fmt: skip
    if any(row["gained"] for some in seeds for row in some):
        claims.append(claim(
            f"and so it is in training ({PAPER})",
            "P(right) before and its change in 20 steps of GRPO are rank-correlated over problems, interval above 0, and log "
            "P(right) of the unlikely third falls",
            "gained",
        ))  # fmt: skip
    return claims


def _figure(rows: list[Row]) -> Any:
    made, (left, right_) = figure(1, 2, title="What other problems' answers do to a problem's right ones", height=3.4)
    x = [row["before"] for row in rows]
    left.plot(x, [row["by others"] for row in rows], ".", color=VERMILION, label="other problems")
    left.plot(x, [row["own"] for row in rows], ".", color=BLUE, label="itself")
    left.axhline(0, color=GREY, linewidth=0.8)
    left.set(xlabel="log P(right) before", ylabel="force on log P(right)\n(nats per unit lr)", title="one GRPO update")
    left.legend()
    trained = any(row["gained"] for row in rows)
    right_.plot(x, [row["gained" if trained else "total"] for row in rows], ".", color=BLUE)
    right_.axhline(0, color=GREY, linewidth=0.8)
    right_.set(xlabel="log P(right) before", ylabel="change (nats)" if trained else "force of all (nats per unit lr)",
               title="after 20 steps" if trained else "one GRPO update, all problems")  # fmt: skip
    return made
