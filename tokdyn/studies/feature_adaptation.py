"""How long the head is trained alone decides how far the features move afterwards.

Ren, Guo, Bae & Sutherland, *How to Prepare Your Task Head for Finetuning* (arXiv 2302.05779): a network is trained on one task,
gets a new head for another, the head is probed for τ steps while the features h stand still, then everything is fine-tuned.
What is left of the loss at that moment, the energy E = mean ‖p - e_y‖, drives the features: Δh_o = -(η/N) Σ_n K_on (∇_h z)ᵀ
(p_n - e_n). Real digits: 0 to 4 first, then 5 to 9.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

import tokdyn as td

from .classifiers import Data, cross_entropy, descend, digits, jacobians, network
from .figures import BLUE, GREEN, ORANGE, band, figure
from .result import Claim, Result, above, below, both, estimate

PAPER = "arXiv 2302.05779"
PROBED = (0, 3, 10, 30, 100, 300, 1000)  # steps of head probing, τ
WIDTH, ETA, TUNING, TUNED = 24, 0.3, 0.03, 300  # TUNING: small enough for the loss to fall at every step, for every τ
COLUMNS = ("energy", "distance", "cosine", "dot", "norm", "rises")


def run(quick: bool = False, seed: int = 0) -> Result:
    """Probe for τ steps, fine-tune, and follow the features; and check the first-order formula."""
    seeds = range(seed, seed + (5 if quick else 20))
    found, orders = zip(*(one(s) for s in seeds), strict=True)
    table = torch.stack(found)  # [seed, τ, column]
    energy, distance, cosine, dot = (table[:, :, i] for i in range(4))
    order = estimate(orders)
    ranks = estimate([td.rank_correlation(e, d) for e, d in zip(energy, distance, strict=True)])
    turns = estimate([td.rank_correlation(e, c) for e, c in zip(energy, cosine, strict=True)])
    chosen, judged = dot[: len(dot) // 2], dot[len(dot) // 2 :]
    peak = 1 + int(chosen.mean(0)[1:-1].argmax())
    rise, fall = (estimate((judged[:, peak] - judged[:, end]).tolist()) for end in (-1, 0))
    claims = [
        Claim(
            f"Features move by Δh_o = -(η/N) Σ K (∇_h z)ᵀ (p - e_y) + O(η²) ({PAPER}, eq. of the adaptation).",
            "order 2: the residual against a real step falls fourfold when η halves",
            f"order {order.words()}",
            both(above(order, 1.9), below(order, 2.1)),
        ),
        Claim(
            f"The more energy is left after head probing, the further the features move ({PAPER}).",
            "rank correlation of energy and ‖h - h₀‖ over τ above 0.9, its interval too",
            f"{ranks.words()}; from {estimate(distance[:, -1].tolist()).words()} at τ = {PROBED[-1]} "
            f"(E = {estimate(energy[:, -1].tolist()).words()}) to {estimate(distance[:, 0].tolist()).words()} at τ = 0 "
            f"(E = {estimate(energy[:, 0].tolist()).words()})",
            above(ranks, 0.9),
        ),
        Claim(
            f"They also turn further: the cosine of h and h₀ falls with the energy ({PAPER}).",
            "rank correlation of energy and cosine below -0.9, its interval too",
            f"{turns.words()}; from {estimate(cosine[:, -1].tolist()).words()} to {estimate(cosine[:, 0].tolist()).words()}",
            below(turns, -0.9),
        ),
        Claim(
            f"With growing energy h·h₀ first rises and then falls ({PAPER}).",
            "at the energy between the ends at which it is largest in the first half of the seeds it is above both ends in the "
            "other half, intervals of both differences above 0",
            f"chosen: τ = {PROBED[peak]}; there above the smallest energy by {rise.words()}, above the largest by "
            f"{fall.words()}",
            both(above(rise), above(fall)),
        ),
    ]
    rows = [(s, tau, *map(float, table[i, k])) for i, s in enumerate(seeds) for k, tau in enumerate(PROBED)]
    return Result(
        "The loss that head probing leaves decides how far features move in fine-tuning",
        claims,
        {"adaptation": pa.table(dict(zip(("seed", "probing_steps", *COLUMNS), zip(*rows, strict=True), strict=True)))},
        {"adaptation": draw(energy, distance, cosine, dot)},
        f"Fine-tuning takes {TUNED} full-batch steps of η = {TUNING} for every τ; the loss rose in {int(table[..., 5].sum())} "
        "of them. h is the input of the head, a linear layer's output that may grow freely, h₀ its value before fine-tuning; "
        "distance and h·h₀ are means over the training "
        "images, the latter relative to ‖h₀‖².",
    )


def one(seed: int) -> tuple[Tensor, float]:
    """One seed: COLUMNS for every τ, [τ, column], and the order of the residual of the first-order formula."""
    train, _ = digits(seed, train=300)
    first, second = train.y < 5, train.y >= 5
    source, target = Data(train.x[first], train.y[first]), Data(train.x[second], train.y[second] - 5)
    body, old = network((64, WIDTH, WIDTH), seed), nn.Linear(WIDTH, 5, dtype=torch.float64)
    torch.nn.init.zeros_(old.weight)
    torch.nn.init.zeros_(old.bias)
    descend(nn.Sequential(body, old), source.x, source.y, ETA, 300)
    start = {name: p.detach().clone() for name, p in body.state_dict().items()}
    head = network((WIDTH, 5), seed + 1)
    with torch.no_grad():
        h0 = body(target.x)
    found, order, done = [], float("nan"), 0
    for tau in PROBED:
        descend(head, h0, target.y, ETA, tau - done)  # probing goes on from the last τ: the features have not moved
        done = tau
        body.load_state_dict(start)
        probed = {name: p.detach().clone() for name, p in head.state_dict().items()}
        if tau == PROBED[1]:
            order = formula_order(body, head, target)
        with torch.no_grad():
            p = head(h0).softmax(1)
        energy = (p - nn.functional.one_hot(target.y, 5)).norm(dim=1).mean()
        whole, losses = nn.Sequential(body, head), list[float]()

        @torch.no_grad()
        def look(step: int, whole: nn.Module = whole, losses: list[float] = losses) -> None:
            losses.append(float(cross_entropy(whole(target.x), target.y)))

        descend(whole, target.x, target.y, TUNING, TUNED, look)
        with torch.no_grad():
            h = body(target.x)
        head.load_state_dict(probed)
        size = h0.square().sum(1).mean()
        found.append(torch.stack([
            energy, (h - h0).norm(dim=1).mean(), nn.functional.cosine_similarity(h, h0, dim=1).mean(),
            (h * h0).sum(1).mean() / size, h.norm(dim=1).mean(), (torch.tensor(losses).diff() > 0).sum(),
        ]).detach())  # fmt: skip
    return torch.stack(found), order


def formula_order(features: nn.Module, head: nn.Sequential, data: Data, n: int = 30) -> float:
    """log2 of how much the residual of Δh = -(η/N) Σ K (∇_h z)ᵀ (p - e_y) falls when a real step is halved."""
    x, y = data.x[:n], data.y[:n]
    J = jacobians(features, x)  # [n, d, P]
    with torch.no_grad():
        h = features(x)
        G = head(h).softmax(1) - nn.functional.one_hot(y, 5)
        back = G @ head[0].weight  # (∇_h z)ᵀ (p - e_y), [n, d]
        K = td.dynamics.K(J, J)  # ∂h_o/∂θ (∂h_n/∂θ)ᵀ, [n, n, d, d]
        predicted = -torch.einsum("onde,ne->od", K, back) / n
        direction = torch.einsum("ndp,nd->p", J, back) / n
        params = dict(features.named_parameters())
        parts = direction.split([p.numel() for p in params.values()])
        moves = {name: d.view_as(p) for (name, p), d in zip(params.items(), parts, strict=True)}

        def residual(eta: float) -> float:
            moved = {name: p - eta * moves[name] for name, p in params.items()}
            return float((torch.func.functional_call(features, moved, (x,)) - h - eta * predicted).norm())

        return float(np.log2(residual(0.02) / residual(0.01)))


def draw(energy: Tensor, distance: Tensor, cosine: Tensor, dot: Tensor) -> Any:
    """Three panels against the energy at the start of fine-tuning: distance, cosine and h·h₀ of the features."""
    made, axes = figure(1, 3, width=11, title="Little head probing leaves energy, and energy moves the features")
    at = energy.mean(0)
    for panel, values, colour, label, title in zip(
        axes, (distance, cosine, dot), (BLUE, ORANGE, GREEN),
        ("distance ‖h - h₀‖, mean over images", "cosine of h and h₀, mean", "h·h₀ / ‖h₀‖², mean"),
        ("Features move further", "and turn further", "h·h₀: longer at first, then away"), strict=True,
    ):  # fmt: skip
        band(panel, at, values, colour, marker="o", markersize=3.5)
        panel.set(xlabel="energy after head probing, mean ‖p - e_y‖", ylabel=label)
        panel.set_title(title)
    for x, value, tau in zip(at, distance.mean(0), PROBED, strict=True):
        axes[0].annotate(f"τ={tau}", (float(x), float(value)), textcoords="offset points", xytext=(4, -9), fontsize=7)
    return made
