"""Learning a 4 makes a 9 look more like a 4: who lifts whom among handwritten digits.

Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), §2: the decomposition -η A K G on a classifier of
MNIST. Here on scikit-learn's real 8 x 8 digits with a network of one hidden layer, at several stages of its training: the
influence of class u on class o is what one step on an image of u does to log p(u | image of o), averaged over unseen images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

import tokdyn as td

from .. import dynamics
from .classifiers import Data, cross_entropy, descend, digits, jacobians, network, pieces
from .figures import BLUE, GREEN, GREY, ORANGE, VERMILION, band, figure
from .result import Claim, Estimate, Result, above, below, both, estimate

PAPER = "arXiv 2407.10490 §2"
STAGES = (0, 20, 100, 300, 900)  # steps of 32 images


def run(quick: bool = False, seed: int = 0) -> Result:
    """Train from several seeds, and compute the class influence matrix at every stage."""
    seeds, each = range(seed, seed + (5 if quick else 20)), 12 if quick else 60
    influence, similarity, accuracy, orders = zip(*(one(s, each) for s in seeds), strict=True)
    I, S = torch.stack(influence), torch.stack(similarity)  # noqa: E741  [seed, stage, u, o], [seed, u, o]
    lift = [estimate(I[:, k, 4, 9].tolist()) for k in range(len(STAGES))]
    agreement = [estimate([likeness(I[i, k], S[i]) for i in range(len(I))]) for k in range(len(STAGES))]
    gap = [estimate([near_minus_far(I[i, k], S[i]) for i in range(len(I))]) for k in range(len(STAGES))]
    order = estimate([value for values in orders for value in values], "steps")
    place = [int((I[:, k, 4, np.r_[0:4, 5:10]].mean(0) > I[:, k, 4, 9].mean()).sum()) + 1 for k in range(len(STAGES))]
    centred = torch.stack([one(s, each, centred=True)[0][:, 4, 9] for s in seeds[:5]])
    claims = [
        Claim(
            f"The change of log p is -η A K G up to O(η²) ({PAPER}, eq. 4).",
            "order 2: the residual against a real step falls fourfold when η halves",
            f"order {order.words()}",
            both(above(order, 1.9), below(order, 2.1)),
        ),
        Claim(
            f"While it learns a 4, the network also finds a 9 more like a 4 ({PAPER}).",
            "Δ log p(4 | a 9) > 0 at every stage, its interval too",
            f"{listed(lift, 'nats')} per unit learning rate; 9 is number {', '.join(map(str, place))} of the nine other digits",
            both(*map(above, lift)),
        ),
        Claim(
            f"Classes that look alike lift each other more than classes that do not ({PAPER}).",
            "influence and similarity of the mean images are rank-correlated at every stage, intervals above 0",
            listed(agreement),
            both(*map(above, agreement)),
        ),
        Claim(
            f"The most similar class is lifted more than the least similar one ({PAPER}).",
            "difference of the two influences above 0 at every stage, its interval too",
            f"{listed(gap, 'nats')} per unit learning rate",
            both(*map(above, gap)),
        ),
    ]
    rows = [
        (s, STAGES[k], u, o, float(I[i, k, u, o]), float(S[i, u, o]))
        for i, s in enumerate(seeds) for k in range(len(STAGES)) for u in range(10) for o in range(10)
    ]  # fmt: skip
    columns = ("seed", "steps", "updated", "observed", "influence", "similarity")
    return Result(
        f"Learning a 4 {'lifts' if claims[1].verdict == 'holds' else 'does not always lift'} p(4) on images of 9; "
        "classes that look alike lift each other",
        claims,
        {"influence": pa.table(dict(zip(columns, zip(*rows, strict=True), strict=True)))},
        {"influence": draw(I)},
        f"Test accuracy after {STAGES[-1]} steps: {estimate([float(a) for a in accuracy]).words()}. Similarity is the cosine "
        "between the mean images of two classes; it knows nothing of the network.\n\n"
        "That a 4 lifts a 9 rests largely on pixels that are not negative, as in the paper: all images then overlap. With the "
        "mean image taken off, Δ log p(4 | a 9) is much smaller: "
        f"{listed([estimate(centred[:, k].tolist()) for k in range(len(STAGES))], 'nats')} per unit learning rate.",
    )


def listed(values: list[Estimate], unit: str = "") -> str:
    """The estimates of all stages in words."""
    return "; ".join(f"{x.words(unit)} after {n} steps" for n, x in zip(STAGES, values, strict=True))


def one(seed: int, each: int, *, centred: bool = False) -> tuple[Tensor, Tensor, float, list[float]]:
    """Influence matrices [stage, u, o], similarity [u, o], test accuracy, and orders of the residual, for one seed."""
    train, test = digits(seed, centred=centred)
    model = network((64, 16, 10), seed)
    half_u, half_o = (pick(Data(test.x[i::2], test.y[i::2]), each) for i in (0, 1))
    found, orders = [], []

    def look(step: int) -> None:
        if step in STAGES:
            found.append(influence(model, half_u, half_o))
            orders.append(residual_order(model, half_u, pick(half_o, 2)))

    descend(model, train.x, train.y, 0.1, STAGES[-1], look, batch=32, seed=seed)
    means = torch.stack([train.x[train.y == c].mean(0) for c in range(10)])
    means = means / means.norm(dim=1, keepdim=True)
    with torch.no_grad():
        right = (model(test.x).argmax(1) == test.y).double().mean()
    return torch.stack(found), means @ means.T, float(right), orders


def pick(data: Data, each: int) -> Data:
    """The first images of each class, class by class."""
    index = torch.cat([(data.y == c).nonzero().flatten()[:each] for c in range(10)])
    return Data(data.x[index], data.y[index])


def influence(model: torch.nn.Module, u: Data, o: Data) -> Tensor:
    """Mean of Δ log p(u | image of o) per unit learning rate when one image of u is learned, [u, o].

    Linear in the update: -A_m Σ_l K_{m,l} G_l = -A_m J_m (Σ_l J_lᵀ G_l); the bracket is the gradient of a class's mean loss.
    """
    gradients = []
    for c in range(10):
        loss = cross_entropy(model(u.x[u.y == c]), u.y[u.y == c])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    with torch.no_grad():
        pushed = jacobians(model, o.x) @ torch.stack(gradients, 1)  # [M, 10, u]
        change = -dynamics.A(model(o.x)) @ pushed
    own = change.diagonal(dim1=1, dim2=2)  # Δ log p(u | image m), [M, u]
    return torch.stack([own[o.y == c].mean(0) for c in range(10)], 1)


def residual_order(model: torch.nn.Module, u: Data, o: Data, eta: float = 0.02) -> float:
    """log2 of how much the residual of the prediction falls when a real step on one 4 is halved."""
    x, y = u.x[u.y == 4][:1], u.y[u.y == 4][:1]
    A, K, G = pieces(model, o.x, x, y)
    predicted = dynamics.delta_log_pi(A, K, G, 1.0)
    direction = torch.einsum("lvp,lv->p", jacobians(model, x), G)
    params = dict(model.named_parameters())
    parts = direction.split([p.numel() for p in params.values()])
    moves = {name: d.view_as(p) for (name, p), d in zip(params.items(), parts, strict=True)}

    @torch.no_grad()
    def residual(step: float) -> float:
        moved = {name: p - step * moves[name] for name, p in params.items()}
        after = torch.func.functional_call(model, moved, (o.x,)).log_softmax(1)
        return float((after - model(o.x).log_softmax(1) - step * predicted).norm())

    size = eta / float(predicted.abs().max())  # the largest change is eta nats
    return float(np.log2(residual(size) / residual(size / 2)))


def likeness(I: Tensor, S: Tensor) -> float:  # noqa: E741
    """Rank correlation of influence and similarity over the nine other classes, mean over the learned class."""
    others = ~torch.eye(10, dtype=torch.bool)
    return float(np.mean([td.rank_correlation(I[u][others[u]], S[u][others[u]]) for u in range(10)]))


def near_minus_far(I: Tensor, S: Tensor) -> float:  # noqa: E741
    """Influence on the most similar class minus that on the least similar one, mean over the learned class."""
    others, u = ~torch.eye(10, dtype=torch.bool), torch.arange(10)
    return float((I[u, S.where(others, -torch.inf).argmax(1)] - I[u, S.where(others, torch.inf).argmin(1)]).mean())


def draw(I: Tensor) -> Any:  # noqa: E741
    """Left: the influence matrix at the third stage. Right: the influence of a 4 on some digits at every stage."""
    made, (left, right) = figure(1, 2, width=10.5, height=4.2, title="Learning one digit lifts the digits that look like it")
    share = I[:, 2].mean(0).numpy()
    top = float(np.abs(share[~np.eye(10, dtype=bool)]).max())
    shown = left.imshow(share, cmap="PuOr_r", vmin=-top, vmax=top)
    left.grid(False)
    left.set_xticks(range(10))
    left.set_yticks(range(10))
    left.set(xlabel="image of digit o", ylabel="digit u that is learned")
    left.set_title(f"Δ log p(u | image of o) after {STAGES[2]} steps")
    left.add_patch(_frame(9, 4))
    made.colorbar(shown, ax=left, shrink=0.85, label="nats per unit learning rate; orange lifts")
    steps = [max(1, n) for n in STAGES]
    for colour, digit in ((VERMILION, 4), (BLUE, 9), (GREEN, 7), (ORANGE, 6), (GREY, 0)):
        runs = I[:, :, 4, digit].numpy()
        label = "on other 4s" if digit == 4 else f"on images of {digit}"
        band(right, steps, runs, colour, label, marker="o", markersize=3)
    right.axhline(0, color=GREY, linewidth=0.8)
    right.set(xscale="log", yscale="symlog", xlabel="training steps (the first point is untrained)")
    right.set_ylabel("Δ log p(4 | image) per unit learning rate, nats")
    right.set_title("What learning one 4 does to log p(4)")
    right.legend(ncols=2, loc="lower left")
    return made


def _frame(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=BLUE, linewidth=1.8)
