"""GRPO on the sums of `arithmetic`, for the studies grpo-forces and simko: a policy learns from its own answers and is read.

It is read on sums that it was taught as the others but that GRPO never saw, and at both ends on those it learned from.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tokdyn as td

from ..interventions import nthr
from . import arithmetic, training
from .result import Estimate, estimate

G = 8  # rollouts a prompt
K = 4  # of pass@K
HELD_OUT, TRAINED = "held out", "trained on"
LR = 1e-4  # of 3e-5, 1e-4 and 3e-4 the one with the highest pass@1 after 40 steps of GRPO at seed 100


def signs(chis: list[td.Chi]) -> Tensor:
    """Sign of the advantage, for each scored token."""
    return torch.cat([torch.full((len(chi),), float(chi.advantage or 0)).sign() for chi in chis])


def weights_of(method: str, chis: list[td.Chi], spare: Tensor, seed: int) -> Tensor:
    """A weight for each update token: 0 on wrong answers (Pos-only), `spare` (NTHR), 1/2 on as many random wrong ones."""
    sign = signs(chis)
    if method == "Pos-only":
        return (sign > 0).float()
    if method == "random tokens":
        wrong, n = (sign < 0).nonzero().squeeze(1), int((spare < 1).sum())
        chance = torch.ones_like(spare)
        chance[wrong[torch.randperm(len(wrong), generator=torch.Generator().manual_seed(seed))[:n]]] = 0.5
        return chance
    return spare if method == "NTHR" else torch.ones_like(sign)


@dataclass(frozen=True)
class Schedule:
    """How long a policy is trained and how it is read.

    Attributes:
        steps: optimizer steps.
        every: steps from one reading to the next; the last step is read too.
        prompts: problems of a step, each answered G times.
        samples: fresh answers to every problem for a reading.
    """

    steps: int
    every: int
    prompts: int
    samples: int


def train(
    model: Any, tokenizer: Any, sums: list[arithmetic.Sum], unseen: list[arithmetic.Sum], method: str, schedule: Schedule, *,
    seed: int, objective: td.objectives.GRPO | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Readings {step, sums, pass@1, pass@K, top-1 mass, entropy} of a copy of the model that learns from its own answers.

    Args:
        model, tokenizer: where the policy starts.
        sums: the problems that it learns from, read before the first step and after the last.
        unseen: others, read at every reading.
        method: "GRPO", "Pos-only", "NTHR" or "random tokens" (`weights_of`), or any name for the objective unweighted.
        schedule: steps and readings.
        seed: of batches and samples.
        objective: GRPO's loss when absent.
    """
    policy = copy.deepcopy(model)
    optimizer, rows = training.adam(policy, LR), []
    objective = objective or td.objectives.GRPO()
    steps, prompts = schedule.steps, schedule.prompts
    batches = list(training.batches(sums, prompts, seed, epochs=1 + steps * prompts // len(sums)))
    for n in range(steps + 1):
        if n % schedule.every == 0 or n == steps:
            read = {HELD_OUT: unseen} | ({TRAINED: sums} if n in (0, steps) else {})
            rows += [{"step": n, "sums": which} | reading(policy, tokenizer, of, schedule.samples, seed)
                     for which, of in read.items()]  # fmt: skip
        if n < steps:
            rollouts = arithmetic.roll_out(policy, tokenizer, batches[n], G, seed=1000 * seed + n).chis
            learned = [chi for chi in rollouts if chi.advantage]
            if learned:
                spare = nthr(policy, learned) if method == "NTHR" else torch.ones(0)
                weights = weights_of(method, learned, spare, seed)
                training.step(policy, optimizer, objective, learned, mean_over=len(batches[n]), weights=weights)
    return rows


@torch.no_grad()
def reading(model: Any, tokenizer: Any, sums: list[arithmetic.Sum], n: int, seed: int) -> dict[str, float]:
    """pass@1 and pass@K of n fresh answers a problem, the top-1 mass and entropy along them, different answers a problem."""
    sampled = arithmetic.roll_out(model, tokenizer, sums, n, seed=seed + 10**6)
    mass, entropy = [], []
    for start in range(0, len(sampled.chis), 128):
        some = sampled.chis[start : start + 128]
        stats = td.ops.token_stats(training.logits(model, some), training.targets(some))
        mass.append(stats.argmax_log_prob.exp())
        entropy.append(stats.entropy)
    texts = {(chi.group, chi.response) for chi in sampled.chis}
    return {"pass_1": arithmetic.pass_at(sampled.rewards, 1), "pass_K": arithmetic.pass_at(sampled.rewards, K), "K": K,
            "top_1": float(torch.cat(mass).mean()), "entropy": float(torch.cat(entropy).mean()),
            "answers": len(texts) / len(sums)}  # fmt: skip


def gains(curves: list[dict[str, Any]], method: str, key: str, sums: str = HELD_OUT) -> list[float]:
    """Last minus first reading of each seed, on held-out sums or on those trained on."""
    found: dict[int, list[float]] = {}
    for row in curves:
        if (row["method"], row["sums"]) == (method, sums):
            found.setdefault(row["seed"], []).append(row[key])
    return [values[-1] - values[0] for values in found.values()]


def gained(curves: list[dict[str, Any]], method: str, other: str, key: str) -> Estimate:
    """How much more a method gains on held-out sums than another one with the same seed."""
    return estimate(a - b for a, b in zip(gains(curves, method, key), gains(curves, other, key), strict=True))


def lines(curves: list[dict[str, Any]], method: str, key: str) -> list[list[float]]:
    """Every reading on held-out sums, one list a seed."""
    found: dict[int, list[float]] = {}
    for row in curves:
        if (row["method"], row["sums"]) == (method, HELD_OUT):
            found.setdefault(row["seed"], []).append(row[key])
    return list(found.values())
