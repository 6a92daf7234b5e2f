"""Wrong labels on real images: does a network first see what is there, and only later what the label says?

Ren, Guo & Sutherland, *Better Supervisory Signals by Observing Learning Paths* (arXiv 2203.02485), show the zig-zag path on
Gaussian classes, where the true distribution is known, and on CIFAR-10. Here on scikit-learn's handwritten digits 3, 5 and 8,
each image with a label drawn from p* = (1 - ε, ε/2, ε/2) around its class, so that p* is known of real images too; the study
zig-zag has the Gaussian classes.

Measured, over seeds that draw images and labels: the distance of the prediction to p* of wrongly labelled images, how straight
the paths are, and what the exact forces say of the turn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from .classifiers import descend, digits, network
from .figures import BLUE, GREY, VERMILION, band, figure
from .result import Claim, Result, above, below, both, estimate
from .zig_zag import Path, detour, distance, pull

PAPER = "arXiv 2203.02485, on real images"
CLASSES, NOISE = (3, 5, 8), 0.3
N, STEPS, EVERY, ETA = 150, 1200, 10, 0.2
LOOKS = (0, 50, STEPS)  # where the forces are taken


def run(quick: bool = False, seed: int = 0) -> Result:
    """Train on noisy labels, and follow predictions, paths and forces.

    Args:
        quick: 6 seeds instead of 20.
        seed: of the first run.
    """
    found = [learn(s) for s in range(seed, seed + (6 if quick else 20))]
    d = [distance(path, "wrong") for path in found]
    closer = estimate(float(x[0] - x[path.stop]) for x, path in zip(d, found, strict=True))
    away = estimate(float(x[-1] - x[path.stop]) for x, path in zip(d, found, strict=True))
    truth = [float((path.q[path.stop].argmax(1) == path.truth.argmax(1))[wrong(path)].double().mean()) for path in found]
    seen = estimate(truth)
    paths = {name: [detour(path, name) for path in found] for name in ("right", "wrong")}
    longer = estimate(b - a for a, b in zip(*paths.values(), strict=True))
    own, others = (estimate(float(path.pulls[1, i]) for path in found) for i in (0, 1))
    end = estimate(float(path.pulls[2].sum()) for path in found)
    claims = [
        Claim(
            f"A wrongly labelled image first approaches its true distribution and then leaves it ({PAPER}).",
            "‖q - p*‖ where the loss on fresh images is lowest is below its start and below its end, intervals too",
            f"closer by {closer.words()}, then away by {away.words()}",
            both(above(closer), above(away)),
        ),
        Claim(
            f"At its closest the network sees through the label ({PAPER}).",
            "it predicts the class of more than half of the wrongly labelled images there, its interval too",
            f"{seen.words()} of them",
            above(seen, 0.5),
        ),
        Claim(
            f"The way of a wrongly labelled image is longer than that of a right one ({PAPER}).",
            "length of the path over the distance of its ends: wrong minus right above 0, its interval too",
            ", ".join(f"{name} {estimate(values).words()}" for name, values in paths.items())
            + f"; difference {longer.words()}",
            above(longer),
        ),
        Claim(
            f"The other images pull it to its class, its own gradient to the label, and the latter outlasts them ({PAPER}).",
            f"force on log p(label) - log p(class) by others below 0 and by itself above 0 after {LOOKS[1]} steps, their sum "
            "above 0 at the end, intervals too",
            f"others {others.words()}, itself {own.words()}; together at the end {end.words('nats')} per unit learning rate",
            both(below(others), above(own), above(end)),
        ),
    ]
    rows = [(s, k * EVERY, float(value)) for s, x in enumerate(d) for k, value in enumerate(x)]
    return Result(
        f"On real images with {NOISE:.0%} wrong labels the network sees through {seen.mean:.0%} of them before it learns them",
        claims, {"distance": pa.table(dict(zip(("run", "step", "distance"), zip(*rows, strict=True), strict=True)))},
        {"paths": draw(found)},
        notes=f"{N} images of {', '.join(map(str, CLASSES))}, {len(found)} seeds; full-batch gradient descent, η = {ETA}. The "
        "stop for comparison is where the loss on images that are not trained on is lowest.",
    )  # fmt: skip


def learn(seed: int) -> Path:
    """One run, as `zig_zag.learn` on the images of this study."""
    data = digits(seed, train=1797, centred=True)[0]
    keep = torch.isin(data.y, torch.tensor(CLASSES))
    x, y = data.x[keep], torch.searchsorted(torch.tensor(CLASSES), data.y[keep])
    truth = torch.nn.functional.one_hot(y, 3).double() * (1 - 1.5 * NOISE) + NOISE / 2
    labels = torch.multinomial(truth, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
    model = network((64, 64, 3), seed)
    q, losses, pulls = [], [], []

    @torch.no_grad()
    def read() -> None:
        q.append(model(x[:N]).softmax(1))
        losses.append(float(-(truth[N:] * model(x[N:]).log_softmax(1)).sum(1).mean()))

    def look(step: int) -> None:
        if step % EVERY == 0:
            read()
        if step in LOOKS:
            pulls.append(pull(model, x[:N], labels[:N], y[:N], (labels != y)[:N]))

    descend(model, x[:N], labels[:N], ETA, STEPS, look)
    return Path(truth[:N], labels[:N], torch.stack(q), int(np.argmin(losses)), torch.stack(pulls))


def wrong(path: Path) -> torch.Tensor:
    """Mask of the images whose label is not their class."""
    return path.labels != path.truth.argmax(1)


def draw(found: list[Path]) -> Any:
    """Distance to p* through training, of wrongly and of rightly labelled images."""
    made, axes = figure(title="Wrongly labelled digits come close to the truth before they are learned", height=3.6)
    steps = torch.arange(len(found[0].q)) * EVERY
    for name, colour in (("wrong", VERMILION), ("right", BLUE)):
        band(axes, steps, torch.stack([distance(path, name) for path in found]), colour, f"{name} label")
    axes.axvline(float(np.mean([path.stop for path in found])) * EVERY, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel="gradient steps (dotted: mean early stop)", ylabel="‖q - p*‖, mean over images")
    axes.legend()
    return made
