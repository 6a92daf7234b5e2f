"""Simple mappings are learned faster, because their examples hardly contradict each other.

Ren, *Learning Dynamics of Deep Learning* (thesis, arXiv 2509.19554), and Ren & Sutherland, *Understanding Simplicity Bias
towards Compositional Mappings via Learning Dynamics* (arXiv 2409.09626): a world of four objects, two attributes of two values
each, and messages of two symbols. Of the 24 one-to-one mappings 8 are compositional: each symbol names one attribute. The
forces between the examples at the start say which mappings will be fast. And among real digits, wrong labels are learned last.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

import tokdyn as td

from .. import dynamics
from .classifiers import descend, digits, hard, network
from .figures import BLUE, GREY, ORANGE, VERMILION, figure
from .result import Claim, Result, above, below, estimate

PAPER = "arXiv 2409.09626 and thesis"
OBJECTS = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]], dtype=torch.float64)  # two one-hot attributes
MESSAGES = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
MAPPINGS = torch.stack([MESSAGES[list(order)] for order in permutations(range(4))])  # [24, object, symbol]
WIDTH, ETA, FIT = 32, 0.5, 0.9
NOISE = 0.2  # share of digits with a wrong label


def compositional(mapping: Tensor) -> bool:
    """Whether each symbol depends on one attribute alone, the two on different ones."""
    first, second = mapping[:, 0], mapping[:, 1]
    by_a = [bool(s[0] == s[1] and s[2] == s[3] and s[0] != s[2]) for s in (first, second)]
    by_b = [bool(s[0] == s[2] and s[1] == s[3] and s[0] != s[1]) for s in (first, second)]
    return (by_a[0] and by_b[1]) or (by_b[0] and by_a[1])


SIMPLE = torch.tensor([compositional(mapping) for mapping in MAPPINGS])


def run(quick: bool = False, seed: int = 0) -> Result:
    """Measure time to fit and forces of all 24 mappings, and how soon right and wrong labels of digits are learned."""
    seeds = range(seed, seed + (10 if quick else 50))
    times, help_ = (torch.stack(x) for x in zip(*((fit_times(s), cooperation(s)) for s in seeds), strict=True))  # [seed, 24]
    noisy = [label_times(s, steps=400 if quick else 1500) for s in seeds[: 5 if quick else 20]]
    rows = [
        (s, k, bool(SIMPLE[k]), float(times[i, k]), float(help_[i, k]))
        for i, s in enumerate(seeds)
        for k in range(len(MAPPINGS))
    ]
    columns = ("seed", "mapping", "compositional", "steps_to_fit", "cooperation")
    labels = pa.table({name: [float(pair[i]) for pair in noisy] for i, name in enumerate(("right", "wrong"))})
    faster = times[:, ~SIMPLE].mean(1) / times[:, SIMPLE].mean(1)
    return Result(
        f"Compositional mappings are learned {estimate(faster.tolist()).mean:.1f} times as fast; the examples of other "
        "mappings contradict each other",
        [*mapping_claims(times, help_), label_claim(noisy)],
        {"mappings": pa.table(dict(zip(columns, zip(*rows, strict=True), strict=True))), "labels": labels},
        {"mappings": draw(times, help_, noisy)},
        f"Time to fit: steps until every symbol of every message has a probability above {FIT}. Cooperation: the force of one "
        "example's update on the log-probability of another's message, mean over the 12 ordered pairs. That of a compositional "
        "mapping is close to 0 beside the others': its examples hardly hinder each other. That they help is not seen in it.",
    )


def mapping_claims(times: Tensor, help_: Tensor) -> list[Claim]:
    """Claims about times to fit and cooperation, both [seed, 24]: the 8 compositional mappings against the 16 others."""
    simple, other = (estimate(times[:, keep].mean(1).tolist()) for keep in (SIMPLE, ~SIMPLE))
    faster = estimate((times[:, ~SIMPLE].mean(1) / times[:, SIMPLE].mean(1)).tolist())
    good, bad = (estimate(help_[:, keep].mean(1).tolist()) for keep in (SIMPLE, ~SIMPLE))
    helps = estimate((help_[:, SIMPLE].mean(1) - help_[:, ~SIMPLE].mean(1)).tolist())
    tells = estimate([td.rank_correlation(h, t) for h, t in zip(help_, times, strict=True)])
    return [
        Claim(
            f"The 8 compositional mappings are learned faster than the 16 others ({PAPER}).",
            "ratio of the mean times to fit above 1, its interval too",
            f"{simple.words('steps')} against {other.words('steps')}, ratio {faster.words()}",
            above(faster, 1),
        ),
        Claim(
            f"Examples of a good mapping get on better with each other than those of a bad one ({PAPER}).",
            "mean force of an example on the messages of the others is larger for compositional mappings, interval above 0",
            f"{good.words('nats')} against {bad.words('nats')} per unit learning rate before the first step, difference "
            f"{helps.words()}",
            above(helps),
        ),
        Claim(
            f"Examples of a good mapping help each other ({PAPER}).",
            "that mean force is above 0 for the 8 compositional mappings, its interval too",
            f"{good.words('nats')} per unit learning rate",
            above(good),
        ),
        Claim(
            f"Examples of a bad mapping contradict each other ({PAPER}).",
            "that mean force is below 0 for the 16 others, its interval too",
            f"{bad.words('nats')} per unit learning rate",
            below(bad),
        ),
        Claim(
            "The forces before the first step tell which mapping will be fast.",
            "rank correlation of force and time to fit over the 24 mappings below 0, its interval too",
            tells.words(),
            below(tells),
        ),
    ]


def label_claim(noisy: list[Tensor]) -> Claim:
    """Claim about the steps that right and wrong labels take, from `label_times` of each seed."""
    right, wrong = (estimate([float(pair[i]) for pair in noisy]) for i in (0, 1))
    later = estimate([float(pair[1] / pair[0]) for pair in noisy])
    return Claim(
        f"Right labels are learned faster than wrong ones ({PAPER}).",
        f"time until p(label) > 0.5 in the same training, {NOISE:.0%} of the digits' labels wrong: ratio above 1, interval too",
        f"{right.words('steps')} against {wrong.words('steps')}, ratio {later.words()}",
        above(later, 1),
    )


def logits(weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """Logits [.., object, symbol, value] of a network with one hidden layer, for each leading index of the weights."""
    W1, b1, W2, b2 = weights
    return ((x @ W1 + b1).tanh() @ W2 + b2).unflatten(-1, (2, 2))


def start(seed: int) -> tuple[Tensor, ...]:
    """The weights that all mappings of one seed begin with."""
    generator = torch.Generator().manual_seed(seed)
    W1 = torch.randn(4, WIDTH, generator=generator, dtype=torch.float64) / 2
    W2 = torch.randn(WIDTH, 4, generator=generator, dtype=torch.float64) / WIDTH**0.5
    return W1, torch.zeros(1, WIDTH, dtype=torch.float64), W2, torch.zeros(1, 4, dtype=torch.float64)


def fit_times(seed: int, limit: int = 1000) -> Tensor:
    """Steps of gradient descent until each of the 24 mappings fits, all trained side by side, [24]."""
    weights = tuple(w.expand(len(MAPPINGS), *w.shape).clone().requires_grad_() for w in start(seed))
    times = torch.full((len(MAPPINGS),), float(limit), dtype=torch.float64)
    for step in range(limit):
        log_pi = logits(weights, OBJECTS).log_softmax(-1).gather(-1, MAPPINGS[..., None]).squeeze(-1)  # [24, object, symbol]
        fits = log_pi.detach().exp().flatten(1).min(1).values > FIT
        times = torch.where(fits & (times == limit), float(step), times)
        if bool(fits.all()):
            break
        gradients = torch.autograd.grad(-log_pi.sum(2).mean(1).sum(), weights)
        weights = tuple((w - ETA * g).detach().requires_grad_() for w, g in zip(weights, gradients, strict=True))
    return times


def cooperation(seed: int) -> Tensor:
    """Mean force between different examples at the start, for each mapping, [24]; nats per unit learning rate.

    A symbol is a token: F [8, 8] over (object, symbol) from dynamics.F, with the kernel of both symbols of a message.
    """
    from torch.func import jacrev

    weights = start(seed)
    J = torch.cat([j.flatten(3) for j in jacrev(logits)(weights, OBJECTS)], 3).flatten(0, 1)  # [object · symbol, 2, P]
    z = logits(weights, OBJECTS).flatten(0, 1)
    A, K = dynamics.A(z), dynamics.K(J, J)
    found = []
    for mapping in MAPPINGS:
        y = mapping.flatten()
        F = dynamics.F(A, K, dynamics.G(z, hard(y)), y).view(4, 2, 4, 2).sum((1, 3))
        found.append(F[~torch.eye(4, dtype=torch.bool)].mean())
    return torch.stack(found)


def label_times(seed: int, steps: int) -> Tensor:
    """Mean number of steps until p(label) > 1/2, for right and for wrong labels of 200 digits, [2]."""
    train, _ = digits(seed, train=200)
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(train.y), generator=generator) < NOISE
    labels = torch.where(wrong, (train.y + torch.randint(1, 10, train.y.shape, generator=generator)) % 10, train.y)
    model = network((64, 32, 10), seed)
    times = torch.full((len(labels),), float(steps), dtype=torch.float64)

    @torch.no_grad()
    def look(step: int) -> None:
        p = model(train.x).softmax(1).gather(1, labels[:, None]).squeeze(1)
        times[(p > 0.5) & (times == steps)] = step

    descend(model, train.x, labels, 1.0, steps, look)
    return torch.stack([times[~wrong].mean(), times[wrong].mean()])


def draw(times: Tensor, help_: Tensor, noisy: list[Tensor]) -> Any:
    """Time to fit of every mapping; the same against the forces at the start; steps of right and wrong labels."""
    made, (left, middle, right) = figure(
        1,
        3,
        width=11,
        title="Compositional mappings are learned faster; examples of the others contradict each other",
        width_ratios=(1.2, 1.2, 0.7),
    )
    order = times.mean(0).argsort()
    colours = [BLUE if SIMPLE[k] else GREY for k in order]
    half = [estimate(times[:, k].tolist()).half for k in order]
    left.bar(range(24), times.mean(0)[order], 0.75, color=colours, yerr=half, error_kw={"elinewidth": 0.8})
    left.set_xticks([])
    left.set(xlabel="the 24 mappings, fastest first", ylabel="gradient steps until learned")
    left.set_title("Blue: compositional; grey: all others")
    for keep, colour, label in ((SIMPLE, BLUE, "compositional"), (~SIMPLE, GREY, "other")):
        middle.scatter(help_.mean(0)[keep], times.mean(0)[keep], color=colour, s=22, label=label)
    middle.axvline(0, color=GREY, linewidth=0.8)
    middle.set(
        xlabel="force of an example on another at the start,\nnats per unit learning rate",
        ylabel="gradient steps until learned",
    )
    middle.set_title("Left: they contradict; right: they help")
    middle.legend()
    times_to = [estimate([float(pair[i]) for pair in noisy]) for i in (0, 1)]
    right.bar((0, 1), [x.mean for x in times_to], 0.6, yerr=[x.half for x in times_to], color=(ORANGE, VERMILION))
    right.set_xticks((0, 1), ["right\nlabel", "wrong\nlabel"])
    right.set(ylabel="gradient steps until p(label) > 0.5")
    right.set_title(f"Digits, {NOISE:.0%} wrong")
    return made
