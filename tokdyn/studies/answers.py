"""What the studies of a single GRPO update share: a policy that half solves the sums of `arithmetic`, and its answers to them.

Problems, teaching and answers are the seed's own. Only problems with right and wrong answers have an advantage, so that
others are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokdyn as td

from ..loading import load_model
from ..sequences import context_numbers
from . import arithmetic, training
from .grpo_training import LR
from .parts import Keep
from .result import Estimate, of_runs

G = 8  # answers a problem
Row = dict[str, Any]


@dataclass(frozen=True)
class Answered:
    """A policy and its answers.

    Attributes:
        policy: gives the right number with mean probability one half.
        sums, unseen: what it was taught; answers are to `sums` alone.
        groups: the answers to each problem that has right and wrong ones.
    """

    policy: Any
    sums: list[arithmetic.Sum]
    unseen: list[arithmetic.Sum]
    groups: list[list[td.Chi]]


def answered(model: Any, tokenizer: Any, n: int, most: int, seed: int) -> Answered:
    """Teach a copy of the model n sums and n others, sample G answers to each of the first, keep up to `most` problems.

    Raises:
        ValueError: no problem has both right and wrong answers.
    """
    sums, unseen = arithmetic.halves(seed, n)
    policy = arithmetic.half_taught(model, tokenizer, sums + unseen, seed=seed)
    sampled = arithmetic.roll_out(policy, tokenizer, sums, G, seed=seed)
    groups = [sampled.of(g) for g in range(n)]
    groups = [chis for chis in groups if len({chi.advantage for chi in chis}) > 1][:most]
    if not groups:
        right = float(sampled.rewards.mean())
        raise ValueError(f"none of {n} sums has right and wrong answers: {right:.0%} of all are right. Give a larger model.")
    return Answered(policy, sums, unseen, groups)


def of_seeds(one: Callable[..., list[Row]], model: str, quick: bool, seeds: Iterable[int], keep: Keep) -> list[Row]:
    """The rows of `one`(model, tokenizer, quick, seed) for each seed, one list; kept seed by seed."""
    start, tokenizer = load_model(model)
    return [row for s in seeds for row in keep(f"seed-{s}", partial(one, start, tokenizer, quick, s))]


@dataclass(frozen=True)
class Tokens:
    """Facts of every scored token of some answers, [N] each: id, advantage, number of its answer and of its context."""

    token: Tensor
    advantage: Tensor
    answer: Tensor
    context: Tensor


def tokens(chis: Sequence[td.Chi]) -> Tokens:
    """The facts of the tokens, in the order of a force matrix's rows."""
    sizes = [len(chi) for chi in chis]
    advantage = torch.tensor([chi.advantage or 0.0 for chi in chis], dtype=torch.float64)
    number = torch.repeat_interleave(torch.arange(len(chis)), torch.tensor(sizes))
    return Tokens(torch.cat([chi.ids[chi.scored] for chi in chis]), advantage[number], number, context_numbers(chis))


def matrix(forces: td.Forces) -> Tensor:
    """F [M, L] in float64."""
    assert forces.matrix is not None
    return forces.matrix.double()


def column(table: Any, name: str) -> Tensor:
    """A column of a row table, float64."""
    return torch.tensor(table[name].to_pylist(), dtype=torch.float64)


def over(rows: Iterable[Row], key: str) -> Estimate:
    """The estimate of a column over seeds, or over the prompts of one seed; prompts without such tokens (nan) are left out."""
    runs: dict[int, list[float]] = {}
    for row in rows:
        if row[key] == row[key]:
            runs.setdefault(row["seed"], []).append(row[key])
    return of_runs(runs.values(), "prompts") if runs else Estimate(float("nan"), 0.0, 1, "set of prompts without such tokens")


def tuned(made: Answered, tokenizer: Any, steps: int, prompts: int, seed: int, *, head_first: int = 0) -> Any:
    """A copy of the policy after GRPO steps on fresh answers to its sums.

    Args:
        made, tokenizer: where it starts, and what it learns from.
        steps, prompts: optimizer steps, and problems of each.
        seed: of batches and answers.
        head_first: steps at the start in which the readout's weight alone moves.
    """
    policy = copy.deepcopy(made.policy)
    optimizer, objective = training.adam(policy if not head_first else policy.get_output_embeddings(), LR), td.objectives.GRPO()
    batches = training.batches(made.sums, prompts, seed, epochs=1 + steps * prompts // len(made.sums))
    for n, batch in zip(range(steps), batches, strict=False):
        if head_first and n == head_first:
            optimizer = training.adam(policy, LR)
        chis = arithmetic.roll_out(policy, tokenizer, batch, G, seed=1000 * seed + n).chis
        learned = [chi for chi in chis if chi.advantage]
        if learned:
            training.step(policy, optimizer, objective, learned, mean_over=len(batch))
    return policy
