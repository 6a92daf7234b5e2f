"""Whether a network learns an effect from its cause sooner than the cause from its effect, and what decides it.

Tamim, *Causal Direction from Convergence Time* (arXiv 2602.22254): with y = f(x) + ε, noise independent of x and f one-to-one,
a network that predicts y from x reaches a loss in fewer steps than one that predicts x from y. Here first with that paper's
kind of data (exponential, cubic, sine; both variables standardised) and two losses to reach, one close to the noise; then with
tokens whose joint distribution is known, so that only what lies above the least possible loss counts.

Three worlds of tokens: several causes share an effect; every cause has its own effect (the joint distribution is then the same
in both directions: a null); and that again with causes of unequal frequency. Asserted: a step lowers the loss by η Σ F, the
forces of all tokens on all. Measured, over seeds that draw mechanism and weights: which direction is learned first, and
whether the forces before the first step tell.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import dynamics
from .classifiers import hard, jacobians, network
from .figures import BLUE, GREY, ORANGE, figure
from .result import Claim, Estimate, Result, above, below, both, estimate

PAPER = "arXiv 2602.22254"
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exponential": torch.exp,
    "cubic": lambda x: x**3,
    "sine": lambda x: torch.sin(1.5 * x),  # one-to-one on [-1, 1]
}
POINTS, NOISE, LIMIT = 200, 0.2, 2000  # examples, spread of ε in units of f's, most steps
LOSSES = (0.1, 0.06)  # mean squared errors to reach; the noise alone leaves 0.04 of y
TOKENS, FLIPPED, LEFT = 12, 0.2, 0.1  # vocabulary; share of effects that are drawn at random; share of the excess that is left
WORLDS = {
    "shared": "several causes share an effect",
    "own": "every cause has its own effect",
    "unequal": "every cause has its own effect, causes of unequal frequency",
}


def run(quick: bool = False, seed: int = 0) -> Result:
    """Time both directions on continuous variables and on tokens, and compare with the forces before the first step.

    Args:
        quick: 3 seeds instead of 30.
        seed: of the first run.
    """
    import pyarrow as pa

    seeds = range(seed, seed + (3 if quick else 30))
    fitted = {name: torch.tensor([fit_times(f, s) for s in seeds]) for name, f in FUNCTIONS.items()}  # [seed, direction, loss]
    worlds = {name: torch.stack([token_times(joint(name, s), s) for s in seeds]) for name in WORLDS}  # [seed, direction, 2]
    order = estimate(force_order(joint("shared", s), s) for s in seeds)
    claims = [
        Claim(
            "A step lowers the loss by η Σ F, the forces of all tokens on all (identity; docs/theory.md, The decomposition).",
            "order 2: the residual against a real step falls fourfold when η halves",
            f"order {order.words()}",
            both(above(order, 1.9), below(order, 2.1)),
        ),
        *(_fit_claim(name, times[..., k], loss) for k, loss in enumerate(LOSSES) for name, times in fitted.items()),
        *_token_claims(worlds),
    ]
    rows = [
        {"data": name, "seed": s, "direction": direction, "steps": float(table[i, k, 0]), "force": float(table[i, k, 1])}
        for name, table in [
            *(
                (f"{name}, {loss}", _without_force(times[..., k]))
                for k, loss in enumerate(LOSSES)
                for name, times in fitted.items()
            ),
            *worlds.items(),
        ]
        for i, s in enumerate(seeds)
        for k, direction in enumerate(("effect from cause", "cause from effect"))
    ]
    return Result(
        "Among tokens the effect is learned before its cause where several causes share it, and else neither comes first",
        claims,
        {"times": pa.Table.from_pylist(rows)},
        {"direction": _figure(worlds)},
        f"Continuous data: {POINTS} points, one hidden layer of 32, full-batch descent with one size of step, at most {LIMIT} "
        f"steps. Tokens: {TOKENS} of them, {FLIPPED:.0%} of effects drawn at random, descent on the exact expected loss until "
        f"{LEFT:.0%} of its excess over the conditional entropy is left. Force: the sum of all forces before the first step in "
        "shares of the excess, so that both directions start from 1.",
    )


def fit_times(f: Callable[[Tensor], Tensor], seed: int) -> tuple[list[float], list[float]]:
    """Steps until the mean squared error is below LOSSES for y from x, and x from y, [direction, loss]; LIMIT if never."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(POINTS, 1, generator=generator, dtype=torch.float64) - 1
    y = f(x)
    y = y + NOISE * y.std() * torch.randn(y.shape, generator=generator, dtype=torch.float64)
    x, y = ((values - values.mean()) / values.std() for values in (x, y))
    return _fit(x, y, seed), _fit(y, x, seed)


def _fit(given: Tensor, wanted: Tensor, seed: int) -> list[float]:
    model = network((1, 32, 1), seed)
    return _descend(model, lambda: (model(given) - wanted).square().mean(), 0.05, LOSSES)


def _descend(model: nn.Module, loss: Callable[[], Tensor], eta: float, until: tuple[float, ...]) -> list[float]:
    """Steps of gradient descent until a loss is below each of several falling values, LIMIT where it never is."""
    parameters, found = list(model.parameters()), list[float]()
    for step in range(LIMIT):
        value = loss()
        while len(found) < len(until) and value.detach() < until[len(found)]:
            found.append(float(step))
        if len(found) == len(until):
            break
        gradients = torch.autograd.grad(value, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.sub_(eta * g)
    return found + [float(LIMIT)] * (len(until) - len(found))


def joint(world: str, seed: int) -> Tensor:
    """p(cause, effect) of a world, [TOKENS, TOKENS]: a mechanism drawn by the seed, and noise that does not ask the cause."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.ones(TOKENS, dtype=torch.float64)
    if world == "unequal":
        causes = 1 / torch.arange(1, TOKENS + 1, dtype=torch.float64)
    effect = torch.randperm(TOKENS, generator=generator)
    if world == "shared":
        effect = effect % (TOKENS // 3)
    given = torch.full((TOKENS, TOKENS), FLIPPED / TOKENS, dtype=torch.float64)
    given[torch.arange(TOKENS), effect] += 1 - FLIPPED
    return causes[:, None] / causes.sum() * given


def excess(model: nn.Module, table: Tensor) -> Tensor:
    """Expected cross-entropy of the second token given the first over its least value: Σ p(a) KL(p(. | a) ‖ π(. | a)), nats."""
    given = table / table.sum(1, keepdim=True)
    return (table * (given.log() - model(torch.eye(TOKENS, dtype=torch.float64)).log_softmax(1))).sum()


def token_times(table: Tensor, seed: int) -> Tensor:
    """For the effect from its cause and the cause from its effect, [2, 2]: steps until LEFT of the excess, and force/excess."""
    found = []
    for direction in (table, table.T):
        model = network((TOKENS, 32, TOKENS), seed)
        start = excess(model, direction)
        gradients = torch.autograd.grad(start, list(model.parameters()))
        force = sum(float(g.square().sum()) for g in gradients) / float(start.detach())
        steps = _descend(model, partial(excess, model, direction), 1.0, (LEFT * float(start.detach()),))
        found.append((steps[0], force))
    return torch.tensor(found, dtype=torch.float64)


def force_order(table: Tensor, seed: int) -> float:
    """log2 of how much |ΔL + η Σ F| falls when η halves; F of all pairs of tokens, weighted by p on both sides."""
    model = network((TOKENS, 32, TOKENS), seed)
    a, b = (i.flatten() for i in torch.meshgrid(torch.arange(TOKENS), torch.arange(TOKENS), indexing="ij"))
    p, x = table.flatten(), torch.eye(TOKENS, dtype=torch.float64)
    with torch.no_grad():
        z, J = model(x), jacobians(model, x)
        F = dynamics.F(dynamics.A(z)[a], dynamics.K(J, J)[a][:, a], dynamics.G(z[a], hard(b)), b)
    total = float(p @ F @ p)  # what one unit of learning rate adds to the expected log-probability
    before = excess(model, table)
    gradients = torch.autograd.grad(before, list(model.parameters()))

    def residual(eta: float) -> float:
        moved = network((TOKENS, 32, TOKENS), seed)
        with torch.no_grad():
            for q, g in zip(moved.parameters(), gradients, strict=True):
                q.sub_(eta * g)
            return abs(float(excess(moved, table) - before) + eta * total)

    return float(torch.log2(torch.tensor(residual(0.02) / residual(0.01))))


def _slower(times: Tensor) -> Estimate:
    """How many times as long the cause takes to be learned from its effect, the mean over seeds of the ratio's logarithm."""
    return estimate((times[:, 1].clamp_min(1) / times[:, 0].clamp_min(1)).log().tolist())


def _without_force(times: Tensor) -> Tensor:
    return torch.stack([times, times.new_full(times.shape, float("nan"))], 2)


def _fit_claim(name: str, times: Tensor, loss: float) -> Claim:
    slower = _slower(times)
    never = [int((times[:, k] >= LIMIT).sum()) for k in (0, 1)]
    return Claim(
        f"y = f(x) + ε is fitted to {loss} sooner than x from y, f {'an' if name[0] in 'aeiou' else 'a'} {name} ({PAPER}).",
        f"log of the ratio of steps to a mean squared error of {loss}, cause from effect over effect from cause, above 0",
        f"{slower.words()}; first in {int((times[:, 0] < times[:, 1]).sum())} of {len(times)}; never reached "
        f"{never[0]} and {never[1]} times",
        above(slower),
    )


def _token_claims(worlds: dict[str, Tensor]) -> list[Claim]:
    slower = {name: _slower(table[..., 0]) for name, table in worlds.items()}
    shared = worlds["shared"]
    first = (shared[:, 0, 1] > shared[:, 1, 1]) == (shared[:, 0, 0] < shared[:, 1, 0])
    told_by = estimate(first.double().tolist())
    steps = {name: "{:.0f} and {:.0f} steps".format(*table[..., 0].mean(0).tolist()) for name, table in worlds.items()}
    return [
        *(
            Claim(
                f"Tokens: an effect is learned from its cause sooner than the cause from it where {words} (after {PAPER}).",
                "log of the ratio of steps until a tenth of the excess loss is left, above 0, its interval too",
                f"{slower[name].words()}; {steps[name]}",
                above(slower[name]),
            )
            for name, words in WORLDS.items()
        ),
        Claim(
            "Where several causes share an effect, the forces before the first step tell which direction is learned first.",
            "share of seeds in which the direction of larger Σ F in shares of its excess is the first, above a half",
            told_by.words(),
            above(told_by, 0.5),
        ),
    ]


def _figure(worlds: dict[str, Tensor]) -> Any:
    made, (left, right) = figure(1, 2, title="The effect comes first where several causes share it", height=3.4)
    for k, (name, table) in enumerate(worlds.items()):
        for direction, colour in enumerate((BLUE, ORANGE)):
            values = estimate(table[:, direction, 0].tolist())
            label = ("effect from cause", "cause from effect")[direction] if k == 0 else None
            left.bar(k + 0.4 * direction - 0.2, values.mean, 0.38, yerr=values.half, color=colour, label=label)
        right.scatter(
            (table[:, 0, 1] / table[:, 1, 1]).tolist(), (table[:, 0, 0] / table[:, 1, 0]).tolist(), s=20, label=name,
            color=(BLUE, GREY, ORANGE)[k],
        )  # fmt: skip
    left.set_xticks(range(len(worlds)), ["shared\neffects", "own\neffects", "unequal\ncauses"])
    left.set(ylabel=f"steps until {LEFT:.0%} of the excess is left")
    left.legend()
    right.axhline(1, color=GREY, linewidth=0.8)
    right.axvline(1, color=GREY, linewidth=0.8)
    right.set(xlabel="Σ F / excess at the start, effect over cause", ylabel="steps, effect over cause")
    right.legend()
    return made
