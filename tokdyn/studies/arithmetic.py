"""A verifiable task for the demo model: sums of two numbers, learned until half of the sampled answers are right.

A sum may be said in three ways, " 7 + 5 = 12.", " The answer is 12." and " It is 12.", so that a policy can keep or lose
variety that the reward does not ask for.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tokdyn as td

from . import training

FORMS = (" {a} + {b} = {c}.", " The answer is {c}.", " It is {c}.")
LENGTH = 14  # tokens that a sampled answer may have
HALF, PASSES = 0.5, 60  # mean probability of the right number at which teaching ends, and most passes over the problems


@dataclass(frozen=True)
class Sum:
    """One problem: what is a + b?"""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        """The question as the demo model's pairs spell a dialogue."""
        return f"Human: What is {self.a} + {self.b}?\n\nAssistant:"

    def answer(self, form: int) -> str:
        """A right answer in one of the three forms."""
        return FORMS[form].format(a=self.a, b=self.b, c=self.a + self.b)

    def right(self, text: str) -> bool:
        """Whether the last number in a text is the sum."""
        said = re.findall(r"\d+", text)
        return bool(said) and int(said[-1]) == self.a + self.b


def problems(seed: int, n: int) -> list[Sum]:
    """n different sums of two numbers between 2 and 13."""
    every = [Sum(a, b) for a in range(2, 14) for b in range(2, 14)]
    return random.Random(seed).sample(every, n)


def halves(seed: int, n: int) -> tuple[list[Sum], list[Sum]]:
    """n problems to train on and as many others to judge by."""
    both = problems(seed, 2 * n)
    return both[:n], both[n:]


def half_taught(model: Any, tokenizer: Any, sums: Sequence[Sum], *, seed: int) -> Any:
    """A copy of the model, supervised on all forms until it gives the right number with mean probability HALF."""
    model = copy.deepcopy(model)
    chis = [td.encode(tokenizer, s.prompt, s.answer(form), group=i) for i, s in enumerate(sums) for form in range(len(FORMS))]
    optimizer, objective = training.adam(model, 1e-3), td.objectives.SFT()
    for epoch in range(PASSES):
        for batch in training.batches(chis, 24, 1000 * seed + epoch, epochs=1):
            training.step(model, optimizer, objective, batch, mean_over=sum(len(chi) for chi in batch))
        if float(torch.tensor(number_probability(model, tokenizer, sums)).mean()) >= HALF:
            break
    return model


def number_probability(model: Any, tokenizer: Any, sums: Sequence[Sum]) -> list[float]:
    """pi(right number | question, start of the answer) for each sum, mean over the forms."""
    chis = []
    for s in sums:
        for form in range(len(FORMS)):
            start, number = s.answer(form).rsplit(" ", 1)
            chis.append(td.encode(tokenizer, s.prompt + start, " " + number, eos=False))
    found = [float(part.sum().exp()) for part in training.log_probs(model, chis, 96)]
    return [sum(found[i : i + len(FORMS)]) / len(FORMS) for i in range(0, len(found), len(FORMS))]


@dataclass(frozen=True)
class Rollouts:
    """Sampled answers: sequences with advantages (group = number of the problem), and the rewards [problems, G]."""

    chis: list[td.Chi]
    rewards: Tensor

    def of(self, group: int) -> list[td.Chi]:
        """The sequences that answer one problem."""
        return [chi for chi in self.chis if chi.group == group]


def roll_out(model: Any, tokenizer: Any, sums: Sequence[Sum], G: int, *, seed: int, before: str = "") -> Rollouts:
    """G sampled answers to every problem, reward 1 for a right one; `before` is text in front of each question."""
    prompts = [tokenizer(before + s.prompt).input_ids for s in sums for _ in range(G)]
    sampled = training.sample(model, prompts, length=LENGTH, end=tokenizer.eos_token_id, seed=seed)
    said = [tokenizer.decode(ids) for ids in sampled]
    rewards = torch.tensor([float(s.right(said[i * G + k])) for i, s in enumerate(sums) for k in range(G)]).view(len(sums), G)
    chis = []
    for i, s in enumerate(sums):
        kept = [k for k in range(G) if said[i * G + k].strip()]  # an empty answer has no token to train
        if len(kept) > 1:
            answers, r = [said[i * G + k] for k in kept], [float(rewards[i, k]) for k in kept]
            chis += td.rollouts(tokenizer, before + s.prompt, answers, r, group=i)
    return Rollouts(chis, rewards)


def pass_at(rewards: Tensor, k: int) -> float:
    """Mean over problems of the unbiased pass@k from n samples, 1 - C(n-c, k)/C(n, k)."""
    n = rewards.shape[1]
    fail = torch.ones(len(rewards), dtype=torch.float64)
    wrong = n - rewards.double().sum(1)
    for i in range(k):
        fail = fail * ((wrong - i).clamp(min=0) / (n - i))
    return float((1 - fail).mean())
