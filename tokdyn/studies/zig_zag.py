"""A wrongly labelled sample is first pulled to the truth by its neighbours, and only then to its label: a zig-zag path.

Ren, Guo & Sutherland, *Better Supervisory Signals by Observing Learning Paths* (arXiv 2203.02485), and the thesis (arXiv
2509.19554): three Gaussian classes with a known p*(y | x), labels drawn from p*, a network trained until it has learned every
label. The path of its prediction runs on a simplex; the forces of dynamics.F say who pulls. Filter-KD averages the
predictions along the path and uses them as targets; here also on real digits with wrong labels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from .. import dynamics
from .classifiers import descend, digits, network, pieces
from .figures import BLUE, GREEN, GREY, ORANGE, VERMILION, band, figure
from .result import Claim, Result, above, below, both, estimate

PAPER = "arXiv 2203.02485"
N, DIM, STEPS, EVERY, ETA = 150, 20, 1000, 10, 0.3
LOOKS = (0, 30, STEPS)  # where the forces are taken
AVERAGE = 0.05  # weight of the newest prediction in Filter-KD's average, as in the paper
NOISE = 0.4  # share of digits with a wrong label


class Path(NamedTuple):
    """One run: p* and labels of the training samples, predictions q [checkpoint, N, 3], and forces on mislabelled ones."""

    truth: Tensor
    labels: Tensor
    q: Tensor
    stop: int  # checkpoint of the lowest loss on fresh samples
    pulls: Tensor  # [stage, own or others], force on log p(label)/p(true class) of the wrongly labelled


def run(quick: bool = False, seed: int = 0) -> Result:
    """Measure paths, forces and targets on the Gaussian classes, and distilled students on digits."""
    seeds = range(seed, seed + (5 if quick else 20))
    found = [learn(s) for s in seeds]
    claims = [*path_claims(found), *force_claims(found), *target_claims(found)]
    accuracy = [students(s, steps=300 if quick else 1500) for s in seeds]
    claims.append(student_claim(accuracy))
    return Result(
        "Wrongly labelled samples first move to the truth, then to their label; averaged predictions are a little closer to it",
        claims,
        {"distance": curves(found), "students": pa.table({key: [a[key] for a in accuracy] for key in accuracy[0]})},
        {"paths": draw_paths(found[0]), "distance": draw_distance(found, accuracy)},
        "Wrongly labelled: the label is not the most likely class under p*. Easy: it is, with p* above 0.9. The network is "
        "stopped "
        "for comparison where the loss on fresh samples is lowest; that place knows nothing of the training samples' paths.",
    )


def learn(seed: int) -> Path:
    """Full-batch gradient descent on N samples until the labels are learned."""
    generator = torch.Generator().manual_seed(seed)
    means = 1.5 * torch.eye(3, DIM, dtype=torch.float64)

    def sample(n: int) -> tuple[Tensor, Tensor, Tensor]:
        source = torch.randint(0, 3, (n,), generator=generator)
        x = means[source] + torch.randn(n, DIM, generator=generator, dtype=torch.float64)
        truth = (-torch.cdist(x, means).square() / 2).softmax(1)
        return x, truth, torch.multinomial(truth, 1, generator=generator).squeeze(1)

    (x, truth, labels), (fresh, fresh_truth, _) = sample(N), sample(500)
    model = network((DIM, 64, 3), seed)
    wrong = labels != truth.argmax(1)
    q, losses, pulls = [], [], []

    def look(step: int) -> None:
        if step % EVERY == 0:
            with torch.no_grad():
                q.append(model(x).softmax(1))
                losses.append(float(-(fresh_truth * model(fresh).log_softmax(1)).sum(1).mean()))
        if step in LOOKS:
            pulls.append(pull(model, x, labels, truth.argmax(1), wrong))

    descend(model, x, labels, ETA, STEPS, look)
    return Path(truth, labels, torch.stack(q), int(np.argmin(losses)), torch.stack(pulls))


def pull(model: torch.nn.Module, x: Tensor, labels: Tensor, true: Tensor, wrong: Tensor) -> Tensor:
    """Mean force on log p(label) - log p(true class) of the wrongly labelled: [from the sample itself, from all others]."""
    A, K, G = pieces(model, x[wrong], x, labels)
    F = dynamics.F(A, K, G, labels[wrong]) - dynamics.F(A, K, G, true[wrong])
    own = F.gather(1, wrong.nonzero()).squeeze(1)
    return torch.stack([own.mean(), (F.sum(1) - own).mean()])


def groups(path: Path) -> dict[str, Tensor]:
    """Masks [N] of the wrongly and rightly labelled samples, and of the easy ones (p* above 0.9, label right)."""
    wrong = path.labels != path.truth.argmax(1)
    return {"wrong": wrong, "right": ~wrong, "easy": ~wrong & (path.truth.max(1).values > 0.9)}


def distance(path: Path, group: str) -> Tensor:
    """Mean ‖q - p*‖ of a group at each checkpoint."""
    return (path.q - path.truth).norm(dim=2)[:, groups(path)[group]].mean(1)


def detour(path: Path, group: str) -> float:
    """Length of the path over the distance between its ends, mean over a group; 1 is a straight line."""
    steps = path.q.diff(dim=0).norm(dim=2).sum(0) / (path.q[-1] - path.q[0]).norm(dim=1)
    return float(steps[groups(path)[group]].mean())


def truthful(path: Path, i: int) -> float:
    """Share of the wrongly labelled whose most likely class under p* is predicted at a checkpoint."""
    right = path.q[i].argmax(1) == path.truth.argmax(1)
    return float(right[groups(path)["wrong"]].double().mean())


def path_claims(found: list[Path]) -> list[Claim]:
    """Claims about paths: mislabelled samples approach p* and leave it, easy ones go straight."""
    d = [distance(path, "wrong") for path in found]
    start, stop, end = (estimate([float(x[i]) for x, i in zip(d, at, strict=True)]) for at in
                        ([0] * len(found), [path.stop for path in found], [-1] * len(found)))  # fmt: skip
    closer = estimate([float(x[0] - x[path.stop]) for x, path in zip(d, found, strict=True)])
    away = estimate([float(x[-1] - x[path.stop]) for x, path in zip(d, found, strict=True)])
    ratio = {name: estimate([detour(path, name) for path in found]) for name in ("easy", "wrong")}
    longer = estimate([detour(path, "wrong") - detour(path, "easy") for path in found])
    early, late = (estimate([truthful(path, i) for path, i in zip(found, at, strict=True)]) for at in
                   ([path.stop for path in found], [-1] * len(found)))  # fmt: skip
    return [
        Claim(
            f"A wrongly labelled sample first approaches its true distribution and then leaves it ({PAPER}, zig-zag path).",
            "‖q - p*‖ at the early stop is below its start and below its end, intervals of both differences above 0",
            f"{start.words()} at the start, {stop.words()} at the early stop, {end.words()} at the end; closer by "
            f"{closer.words()}, then away by {away.words()}; the true class is predicted for {early.words()} of them at the "
            "early "
            f"stop and for {late.words()} at the end",
            both(above(closer), above(away)),
        ),
        Claim(
            f"An easy sample goes straight to its label ({PAPER}).",
            "length of the path over distance of its ends: near 1 for easy samples (below 1.1), longer for wrongly labelled "
            "ones",
            f"{ratio['easy'].words()} for easy samples, {ratio['wrong'].words()} for wrongly labelled ones; difference "
            f"{longer.words()}",
            both(below(ratio["easy"], 1.1), above(longer)),
        ),
    ]


def force_claims(found: list[Path]) -> list[Claim]:
    """Claim about forces: the other samples pull to the true class, the sample's own gradient to its label, and that wins."""
    own, others, net = ([estimate([float(x) for x in values]) for values in torch.stack(parts, 1).tolist()] for parts in zip(
        *((path.pulls[1:, 0], path.pulls[1:, 1], path.pulls[1:].sum(1)) for path in found), strict=True))  # fmt: skip
    return [
        Claim(
            "The turn has a cause in the decomposition: all other samples pull a wrongly labelled one to the truth, its own "
            f"gradient pulls to the label and outlasts them ({PAPER}).",
            f"force on log p(label) - log p(true class) by others below 0 and by itself above 0 after {LOOKS[1]} steps and at "
            "the "
            "end, and their sum above 0 at the end, intervals too",
            f"after {LOOKS[1]} steps {own[0].words()} by itself and {others[0].words()} by others; at the end {own[1].words()} "
            f"and {others[1].words()}, together {net[1].words('nats')} per unit learning rate",
            both(*map(above, own), *map(below, others), above(net[1])),
        )
    ]


def average(q: Tensor) -> Tensor:
    """Filter-KD: the exponential moving average of the predictions along the path, [N, C]."""
    kept = q[0]
    for each in q[1:]:
        kept = (1 - AVERAGE) * kept + AVERAGE * each
    return kept


def target_claims(found: list[Path]) -> list[Claim]:
    """Claim about targets: how far labels, last predictions and averaged predictions are from p*."""

    def far(target: Tensor, path: Path) -> float:
        return float((target - path.truth).norm(dim=1).mean())

    one_hot = estimate([far(torch.nn.functional.one_hot(p.labels, 3).double(), p) for p in found])
    last = estimate([far(p.q[-1], p) for p in found])
    filtered = estimate([far(average(p.q), p) for p in found])
    gain = estimate([far(p.q[-1], p) - far(average(p.q), p) for p in found])
    return [
        Claim(
            f"Predictions averaged along the path (Filter-KD) are better targets than those of the trained teacher ({PAPER}).",
            "closer to p*, interval of the difference above 0",
            f"mean ‖target - p*‖ {one_hot.words()} for labels, {last.words()} for the trained teacher, {filtered.words()} "
            "averaged; "
            f"difference of the last two {gain.words()}",
            above(gain),
        )
    ]


def students(seed: int, steps: int) -> dict[str, float]:
    """Test accuracy on digits with 40% wrong labels: of the teacher, of students of its last and averaged predictions."""
    train, test = digits(seed, train=200)
    generator = torch.Generator().manual_seed(seed)
    flip = torch.rand(len(train.y), generator=generator) < NOISE
    labels = torch.where(flip, (train.y + torch.randint(1, 10, train.y.shape, generator=generator)) % 10, train.y)
    path: list[Tensor] = []
    teacher = network((64, 32, 10), seed)

    @torch.no_grad()
    def look(step: int) -> None:
        if step % (steps // 60) == 0:
            path.append(teacher(train.x).softmax(1))

    @torch.no_grad()
    def accuracy(model: torch.nn.Module) -> float:
        return float((model(test.x).argmax(1) == test.y).double().mean())

    descend(teacher, train.x, labels, 1.0, steps, look)
    fitted = float((path[-1].argmax(1) == labels).double().mean())
    found = {"seed": float(seed), "learned": fitted, "labels": accuracy(teacher)}
    for name, targets in (("last prediction", path[-1]), ("Filter-KD", average(torch.stack(path)))):
        student = network((64, 32, 10), seed + 1000)
        descend(student, train.x, targets, 1.0, steps)
        found[name] = accuracy(student)
    return found


def student_claim(accuracy: list[dict[str, float]]) -> Claim:
    """Claim about students: Filter-KD's targets against the labels; plain distillation is measured beside it."""
    reached = {name: estimate([a[name] for a in accuracy]) for name in accuracy[0] if name not in ("seed", "learned")}
    over_labels, over_last = (estimate([a["Filter-KD"] - a[name] for a in accuracy]) for name in ("labels", "last prediction"))
    return Claim(
        f"With wrong labels, a student of Filter-KD's targets beats training on the labels ({PAPER}).",
        f"test accuracy on digits with {NOISE:.0%} wrong labels is higher, interval of the difference above 0",
        "; ".join(f"{name}: {x.words()}" for name, x in reached.items())
        + f"; Filter-KD gains {over_labels.words()} over the labels and {over_last.words()} over the last prediction; "
        f"the teacher had learned {estimate([a['learned'] for a in accuracy]).words()} of its labels",
        above(over_labels),
    )


def curves(found: list[Path]) -> pa.Table:
    """Distance to p* by seed, step and group."""
    rows = [
        (s, i * EVERY, name, float(value))
        for s, path in enumerate(found)
        for name in ("wrong", "easy")
        for i, value in enumerate(distance(path, name))
    ]
    return pa.table(dict(zip(("run", "step", "group", "distance"), zip(*rows, strict=True), strict=True)))


def corner(p: Tensor) -> tuple[Any, Any]:
    """Coordinates of distributions [.., 3] in a triangle."""
    return (p[..., 1] + p[..., 2] / 2).numpy(), (p[..., 2] * 3**0.5 / 2).numpy()


def draw_paths(path: Path) -> Any:
    """Three easy and three wrongly labelled samples on the simplex."""
    made, axes = figure(1, 2, height=4.2, title="Easy samples go straight; wrongly labelled ones turn at the truth")
    for panel, name, title in zip(axes, ("easy", "wrong"), ("Label right and p* clear", "Label wrong"), strict=True):
        panel.plot([0, 1, 0.5, 0], [0, 0, 3**0.5 / 2, 0], color=GREY, linewidth=0.8)
        picked = groups(path)[name].nonzero().flatten()
        picked = picked[path.truth[picked].max(1).values.argsort(descending=True)][:3]
        for colour, i in zip((BLUE, ORANGE, GREEN), picked.tolist(), strict=False):
            panel.plot(*corner(path.q[:, i]), color=colour)
            panel.plot(*corner(path.truth[i]), "*", color=colour, markersize=11, clip_on=False)
            panel.plot(*corner(torch.nn.functional.one_hot(path.labels[i], 3).double()), "s", color=colour, markersize=7,
                       fillstyle="none", clip_on=False)  # fmt: skip
            panel.plot(*corner(path.q[0, i]), "o", color=colour, markersize=4)
        for k, (x, y) in enumerate(((-0.02, -0.05), (1.02, -0.05), (0.5, 0.9))):
            panel.text(x, y, f"class {k + 1}", ha="center", fontsize=8)
        panel.set_aspect("equal")
        panel.axis("off")
        panel.set_title(f"{title}: ● start   ★ p*   □ label")
    return made


def draw_distance(found: list[Path], accuracy: list[dict[str, float]]) -> Any:
    """Distance to p* through training, forces on mislabelled samples by their source, and test accuracy of the students."""
    made, (left, middle, right) = figure(
        1, 3, width=11, title="Neighbours pull a wrongly labelled sample to the truth until they are learned"
    )
    steps = np.arange(len(found[0].q)) * EVERY + 1
    for name, colour, label in (("wrong", VERMILION, "wrongly labelled"), ("easy", BLUE, "easy")):
        band(left, steps, np.stack([distance(path, name).numpy() for path in found]), colour, label)
    left.set(xscale="log", xlabel="gradient steps", ylabel="distance of the prediction to p*, mean")
    left.set_title("Closer to p*, then away")
    left.legend()
    pulls = np.stack([path.pulls.numpy() for path in found]).mean(0)
    for k, (colour, label) in enumerate(((VERMILION, "the sample itself"), (BLUE, "all other samples"))):
        middle.bar(np.arange(3) + (k - 0.5) * 0.36, pulls[:, k], 0.36, color=colour, label=label)
    middle.axhline(0, color=GREY, linewidth=0.8)
    middle.set_xticks(range(3), [f"step {n}" for n in LOOKS])
    middle.set(ylabel="force towards the label, nats per unit η", yscale="symlog")
    middle.set_title("Who pulls")
    middle.legend()
    names = [name for name in accuracy[0] if name not in ("seed", "learned")]
    reached = [estimate([a[name] for a in accuracy]) for name in names]
    right.bar(range(3), [100 * x.mean for x in reached], 0.6, yerr=[100 * x.half for x in reached], color=(GREY, ORANGE, GREEN),
              error_kw={"elinewidth": 1.2})  # fmt: skip
    right.set_xticks(range(3), ["labels", "last\nprediction", "Filter-KD"])
    right.set(ylabel="test accuracy on digits, %", xlabel="training targets", ylim=(0, 100))
    right.set_title(f"{NOISE:.0%} of the labels wrong")
    return made
