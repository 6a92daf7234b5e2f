"""Which mappings carry over to objects that were never seen, and do the forces before the first step say so?

Ren & Sutherland, *Understanding Simplicity Bias towards Compositional Mappings via Learning Dynamics* (arXiv 2409.09626),
and the thesis (arXiv 2509.19554): a compositional mapping, one symbol for each attribute, is learned faster because its
examples get on with each other (the study simplicity-bias); by the same force an example should also teach the message of an
object that it shares an attribute with. Here a world of 3 x 3 objects: a network learns the messages of six and is asked for
the other three, each of whose attribute values it has seen. Mappings go from compositional to arbitrary by exchanging the
messages of some objects.

Measured, over seeds: accuracy on the unseen objects, the exact forces of the seen on the unseen before training, and whether
these tell which mapping carries over.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

import tokdyn as td

from .classifiers import network
from .figures import BLUE, ORANGE, band, figure
from .result import Claim, Result, above, below, both, estimate

PAPER = "arXiv 2409.09626 and thesis"
VALUES, WIDTH, ETA, STEPS = 3, 32, 0.5, 300
OBJECTS = torch.cartesian_prod(torch.arange(VALUES), torch.arange(VALUES))  # [9, attribute]
INPUTS = nn.functional.one_hot(OBJECTS, VALUES).flatten(1).double()  # [9, 6]
UNSEEN = torch.tensor([(a + b) % VALUES == 0 for a, b in OBJECTS.tolist()])  # three objects, every value in two seen ones
EXCHANGED = (0, 2, 4, 6, 9)  # objects whose messages are permuted


def run(quick: bool = False, seed: int = 0) -> Result:
    """Train a network on every mapping, and ask it for the unseen objects.

    Args:
        quick: 10 seeds instead of 50.
        seed: of the first run.
    """
    seeds = range(seed, seed + (10 if quick else 50))
    found = torch.tensor([[one(s, n) for n in EXCHANGED] for s in seeds], dtype=torch.float64)  # [seed, mapping, column]
    force, accuracy, fitted = found.unbind(2)
    simple, arbitrary = (estimate(accuracy[:, k].tolist()) for k in (0, -1))
    more = estimate((accuracy[:, 0] - accuracy[:, -1]).tolist())
    pulls = {name: estimate(force[:, k].tolist()) for name, k in (("compositional", 0), ("arbitrary", -1))}
    tells = estimate(td.rank_correlation(f, a) for f, a in zip(force, accuracy, strict=True))
    learned = estimate(fitted.min(1).values.tolist())
    claims = [
        Claim(
            f"A compositional mapping carries over to unseen objects ({PAPER}).",
            f"both symbols right for more of the unseen objects than by chance, 1 in {VALUES**2}, and for more than under an "
            "arbitrary mapping, intervals too",
            f"{simple.words()} against {arbitrary.words()}, difference {more.words()}",
            both(above(simple, 1 / VALUES**2), above(more)),
        ),
        Claim(
            f"Before the first step, the seen objects lift the messages of the unseen ones ({PAPER}, by its forces).",
            "mean exact force on their log-probability above 0 for compositional mappings, below that for arbitrary ones, "
            "intervals too",
            "; ".join(f"{name} {value.words('nats')}" for name, value in pulls.items()) + " per unit learning rate",
            both(above(pulls["compositional"]), below(estimate((force[:, -1] - force[:, 0]).tolist()))),
        ),
        Claim(
            "That force tells which mapping will carry over.",
            "rank correlation of force and accuracy over the mappings above 0, its interval too",
            tells.words(),
            above(tells),
        ),
    ]
    rows = [(s, n, *map(float, found[i, k])) for i, s in enumerate(seeds) for k, n in enumerate(EXCHANGED)]
    columns = ("seed", "exchanged", "force", "accuracy", "fitted")
    return Result(
        f"A compositional mapping is right on {simple.mean:.0%} of unseen objects, an arbitrary one on {arbitrary.mean:.0%}",
        claims, {"mappings": pa.table(dict(zip(columns, zip(*rows, strict=True), strict=True)))},
        {"unseen": draw(force, accuracy)},
        notes=f"{len(seeds)} seeds; {STEPS} full-batch steps of η = {ETA} on six objects; of their symbols {learned.words()} "
        "are right at the end, in the mapping that is learned worst.",
    )  # fmt: skip


def messages(seed: int, exchanged: int) -> Tensor:
    """A mapping [9, symbol]: symbols of permuted attribute values, the messages of `exchanged` objects permuted among them."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.stack([torch.randperm(VALUES, generator=generator)[OBJECTS[:, i]] for i in (0, 1)], 1)
    some = torch.randperm(len(found), generator=generator)[:exchanged]
    return found.index_copy(0, some, found[some.roll(1)]) if exchanged else found


def one(seed: int, exchanged: int) -> tuple[float, float, float]:
    """Force of the seen on the unseen before training, share of unseen objects right after it, and of seen symbols."""
    said = messages(seed, exchanged)
    model = network((2 * VALUES, WIDTH, 2 * VALUES), seed)
    parameters = list(model.parameters())

    def log_probs(of: Tensor) -> Tensor:
        log_pi = model(INPUTS[of]).unflatten(1, (2, VALUES)).log_softmax(2)
        return log_pi.gather(2, said[of][..., None]).squeeze(2)  # [object, symbol]

    up = torch.autograd.grad(log_probs(UNSEEN).mean(), parameters)
    push = torch.autograd.grad(log_probs(~UNSEEN).sum(1).mean(), parameters)  # minus the loss's gradient
    force = sum(float((a * b).sum()) for a, b in zip(up, push, strict=True))
    for _ in range(STEPS):
        step = torch.autograd.grad(-log_probs(~UNSEEN).sum(1).mean(), parameters)
        with torch.no_grad():
            for theta, g in zip(parameters, step, strict=True):
                theta.sub_(ETA * g)
    with torch.no_grad():
        right = model(INPUTS).unflatten(1, (2, VALUES)).argmax(2) == said
    return force, float(right[UNSEEN].all(1).double().mean()), float(right[~UNSEEN].double().mean())


def draw(force: Tensor, accuracy: Tensor) -> Any:
    """Accuracy on the unseen objects, and the force on them before training, by how many messages are exchanged."""
    made, (left, right) = figure(1, 2, title="What carries over to unseen objects is what the forces lift before training")
    band(left, EXCHANGED, accuracy, BLUE, marker="o", markersize=3)
    left.set(xlabel="objects with exchanged messages (of 9)", ylabel="unseen objects with both symbols right", ylim=(0, 1.02))
    left.set_title("After training")
    band(right, EXCHANGED, force, ORANGE, marker="o", markersize=3)
    right.set(xlabel="objects with exchanged messages (of 9)", ylabel="force on an unseen symbol, nats per unit learning rate")
    right.set_title("Before the first step")
    return made
