"""Head probing and feature adaptation beyond a classifier: pixels under convolutions, rows in sequence, graphs of strokes.

Ren, Guo, Bae & Sutherland, *How to Prepare Your Task Head for Finetuning* (arXiv 2302.05779), and the thesis (arXiv
2509.19554), chapter 6: the loss that head probing leaves, the energy E = mean ‖p - e_y‖, decides how far features move in
fine-tuning, on other tasks than classification too. Here on three tasks over scikit-learn's handwritten digits, each with a
network trained on 0 to 4, a new head that is probed for τ steps, and fine-tuning on 5 to 9: naming the digit of every inked
pixel or the background (a segmentation, convolutions), naming the digit after its eight rows were read one after the other (a
recurrent network), and naming it from the graph of its inked pixels, neighbours joined (two rounds of messages between nodes).
The study feature-adaptation has the plain classifier.

Asserted: features move by their Jacobian times the step. Measured, over seeds that draw images and weights: distance and
cosine of the features against the energy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tokdyn as td

from .classifiers import Data, cross_entropy, descend, digits
from .figures import COLOURS, band, figure
from .result import Claim, Result, above, below, both, estimate

PAPER = "arXiv 2302.05779, arXiv 2509.19554 chapter 6"
PROBED = (0, 10, 100, 1000)  # steps of head probing, τ
IMAGES, WIDTH, TUNED = 40, 12, 100  # images of each half, width of the features, steps of fine-tuning
COLUMNS = ("energy", "distance", "cosine")


class Pixels(nn.Module):
    """Two convolutions: features [images · 64, WIDTH], one row a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, WIDTH, 5, padding=2), nn.Tanh(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Features of images [N, 64]."""
        return self.layers(x.view(-1, 1, 8, 8)).permute(0, 2, 3, 1).reshape(-1, WIDTH)


class Rows(nn.Module):
    """A recurrent network over the eight rows: features [N, WIDTH] after the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.turn = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features of images [N, 64]."""
        rows, h = x.view(-1, 8, 8), x.new_zeros(len(x), WIDTH)
        for t in range(8):
            h = torch.tanh(self.read(rows[:, t]) + self.turn(h))
        return h


class Strokes(nn.Module):
    """Messages on the graph of the inked pixels, each joined to its inked neighbours: features [N, WIDTH], the mean over nodes.

    A round takes every node to tanh(W h + U mean of its neighbours' h). (Gilmer et al., arXiv 1704.01212.)
    """

    def __init__(self) -> None:
        super().__init__()
        row, column = (i.flatten() for i in torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"))
        apart = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
        self.near = (apart == 1).double()
        self.places = torch.stack([row, column], 1) / 3.5 - 1
        self.own = nn.ModuleList(nn.Linear(n, WIDTH) for n in (3, WIDTH))
        self.others = nn.ModuleList(nn.Linear(n, WIDTH, bias=False) for n in (3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Features of images [N, 64]."""
        node = (x >= 0.5).to(x.dtype)
        edges = self.near.to(x.dtype) * node[:, :, None] * node[:, None, :]
        edges = edges / edges.sum(2, keepdim=True).clamp_min(1)
        h = torch.cat([x[..., None], self.places.to(x.dtype).expand(len(x), 64, 2)], 2)
        for own, others in zip(self.own, self.others, strict=True):
            h = torch.tanh(own(h) + others(edges @ h))
        return (h * node[..., None]).sum(1) / node.sum(1, keepdim=True)


def inked(data: Data) -> Tensor:
    """Class of every pixel: 0 where less than half inked, else 1 + the image's class."""
    return torch.where(data.x >= 0.5, 1 + data.y[:, None], 0).flatten()


@dataclass(frozen=True)
class Task:
    """What is learned: the network up to its features, the targets, how many classes, and the step size of each stage."""

    body: Callable[[], nn.Module]
    targets: Callable[[Data], Tensor]
    classes: int
    taught: int
    eta: float
    tuning: float


TASKS = {
    "pixels": Task(Pixels, inked, 6, 200, 0.3, 0.1),
    "rows": Task(Rows, lambda data: data.y, 5, 300, 0.5, 0.05),
    "strokes": Task(Strokes, lambda data: data.y, 5, 300, 2.0, 0.2),
}


def run(quick: bool = False, seed: int = 0) -> Result:
    """Teach, probe for τ steps, fine-tune, and follow the features, on every task.

    Args:
        quick: 3 seeds instead of 20.
        seed: of the first run.
    """
    import pyarrow as pa

    seeds = range(seed, seed + (3 if quick else 20))
    found = {name: [one(task, s) for s in seeds] for name, task in TASKS.items()}
    tables = {name: torch.stack([table for table, _ in runs]) for name, runs in found.items()}  # [seed, τ, column]
    orders = {name: estimate(order for _, order in runs) for name, runs in found.items()}
    claims = [
        Claim(
            f"Features move by their Jacobian times the step, up to O(η²) ({PAPER}, the adaptation to first order).",
            "order 2 on every task: the residual against a real step falls fourfold when η halves",
            "; ".join(f"{name} {order.words()}" for name, order in orders.items()),
            both(*(both(above(order, 1.9), below(order, 2.1)) for order in orders.values())),
        ),
        *(claim for name, table in tables.items() for claim in _claims(name, table)),
    ]
    rows = [{"task": name, "seed": s, "probing_steps": tau} | dict(zip(COLUMNS, table[i, k].tolist(), strict=True))
            for name, table in tables.items() for i, s in enumerate(seeds) for k, tau in enumerate(PROBED)]  # fmt: skip
    return Result(
        _title(tables),
        claims,
        {"adaptation": pa.Table.from_pylist(rows)},
        {"tasks": _figure(tables)},
        notes=f"{IMAGES} images of each half; {TUNED} full-batch steps of fine-tuning for every τ of "
        f"{', '.join(map(str, PROBED))}. "
        "Features are those of a pixel on the first task and of an image on the others.",
    )


def one(task: Task, seed: int) -> tuple[Tensor, float]:
    """COLUMNS for every τ, [τ, column], and the order of the residual of the first-order formula."""
    data, _ = digits(seed, train=1797)
    halves = [Data(data.x[here][:IMAGES], data.y[here][:IMAGES] % 5) for here in (data.y < 5, data.y >= 5)]
    torch.manual_seed(seed)
    body = task.body().double()
    old, head = (nn.Linear(WIDTH, task.classes).double() for _ in range(2))
    descend(nn.Sequential(body, old), halves[0].x, task.targets(halves[0]), task.eta, task.taught)
    x, y = halves[1].x, task.targets(halves[1])
    start = {name: p.detach().clone() for name, p in body.state_dict().items()}
    with torch.no_grad():
        h0 = body(x)
    found, done, order = [], 0, float("nan")
    for tau in PROBED:
        descend(head, h0, y, task.eta, tau - done)  # probing goes on from the last τ
        done, probed = tau, {name: p.detach().clone() for name, p in head.state_dict().items()}
        body.load_state_dict(start)
        with torch.no_grad():
            energy = (head(h0).softmax(1) - nn.functional.one_hot(y, task.classes)).norm(dim=1).mean()
        if tau == PROBED[1]:
            order = formula_order(body, head, x, y)
        descend(nn.Sequential(body, head), x, y, task.tuning, TUNED)
        with torch.no_grad():
            h = body(x)
        head.load_state_dict(probed)
        found.append(
            torch.stack([energy, (h - h0).norm(dim=1).mean(), nn.functional.cosine_similarity(h, h0, dim=1).mean()]).detach()
        )
    return torch.stack(found), order


def formula_order(body: nn.Module, head: nn.Module, x: Tensor, y: Tensor) -> float:
    """log2 of how much the residual of Δh = (∂h/∂θ)(-η ∇L) falls when a real step is halved."""
    params = {name: p.detach() for name, p in body.named_parameters()}
    gradients = torch.autograd.grad(cross_entropy(head(body(x)), y), list(body.parameters()))
    moves = dict(zip(params, gradients, strict=True))

    def features(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(body, values, (x,))

    h, velocity = torch.func.jvp(features, (params,), (moves,))[:2]

    def residual(eta: float) -> float:
        moved = features({name: p - eta * moves[name] for name, p in params.items()})
        return float((moved - h + eta * velocity).norm())

    return float(np.log2(residual(0.02) / residual(0.01)))


def _claims(name: str, table: Tensor) -> list[Claim]:
    """Claims about distance and cosine of one task's features, [seed, τ, column]."""
    energy, distance, cosine = table.unbind(2)
    further, turned = (
        estimate(td.rank_correlation(e, v) for e, v in zip(energy, values, strict=True)) for values in (distance, cosine)
    )
    ends = ", ".join(f"{estimate(distance[:, k].tolist()).words()} at τ = {PROBED[k]}" for k in (0, -1))
    return [
        Claim(
            f"The more energy is left after head probing, the further the features of {name} move ({PAPER}).",
            "rank correlation of energy and ‖h - h₀‖ over τ above 0.9, its interval too",
            f"{further.words()}; {ends}",
            above(further, 0.9),
        ),
        Claim(
            f"They also turn further: the cosine of h and h₀ falls with the energy, for {name} ({PAPER}).",
            "rank correlation of energy and cosine over τ below -0.9, its interval too",
            turned.words(),
            below(turned, -0.9),
        ),
    ]


def _title(tables: dict[str, Tensor]) -> str:
    """The finding: the mean rank correlation of energy and distance of every task."""
    found = {name: estimate(td.rank_correlation(e, d) for e, d in zip(*table.unbind(2)[:2], strict=True)).mean
             for name, table in tables.items()}  # fmt: skip
    words = ", ".join(f"{value:.2f} for {name}" for name, value in found.items())
    return f"The loss that head probing leaves and how far features then move: rank correlation {words}"


def _figure(tables: dict[str, Tensor]) -> Any:
    made, axes = figure(1, 2, title="Little head probing leaves energy, and energy moves the features", height=3.4)
    for k, (name, table) in enumerate(tables.items()):
        energy, distance, cosine = table.unbind(2)
        for panel, values in zip(axes, (distance / distance[:, :1], cosine), strict=True):
            band(panel, energy.mean(0), values, COLOURS[k], name, marker="o", markersize=3.5)
    axes[0].set(xlabel="energy after head probing, mean ‖p - e_y‖", ylabel="‖h - h₀‖ against τ = 0", title="distance")
    axes[1].set(xlabel="energy after head probing, mean ‖p - e_y‖", ylabel="cosine of h and h₀", title="direction")
    axes[0].legend()
    return made
