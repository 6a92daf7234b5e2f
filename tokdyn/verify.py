"""verify(): the predicted change against a real step, and the order at which the difference vanishes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ._arguments import check_eta
from .exact import Asked, Direction, Scope, ScoredProblem, UnscoredProblem
from .exact.contexts import all_cancel
from .model.trace import trace
from .objective import Objective
from .objectives import SFT
from .observables import Function, LogProb, Observable
from .observables import observable as as_observable
from .runs.frames import pandas
from .runs.notebook import verification_html
from .sequences import Chi, context_numbers

HALVINGS = 3


@dataclass(frozen=True)
class Verification:
    """Predicted against actual change of the observed log-probabilities, or of what else is watched, in its unit.

    Attributes:
        eta: step size of `predicted` and `actual`.
        predicted: eta Σ_l F[m,l], [M] nats.
        actual: log pi (or the observable) after the step minus before, [M] nats.
        order: slope of log ‖actual - predicted‖ against log eta over the `etas`; 2 where first order is right.
        etas, residuals: eta, eta/2, eta/4 and ‖actual - predicted‖ there.
        linearity: <predicted, actual>/‖predicted‖², 1 where the step is small enough.
    """

    eta: float
    predicted: Float[Tensor, " M"]
    actual: Float[Tensor, " M"]
    order: float
    etas: list[float]
    residuals: list[float]
    linearity: float

    def to_dataframe(self) -> Any:
        """One row for each observed token: predicted and actual change in nats (pandas)."""
        return pandas().DataFrame({"predicted": self.predicted.tolist(), "actual": self.actual.tolist()})

    def _repr_html_(self) -> str:
        """What a notebook shows: a sentence that says whether the prediction held."""
        return verification_html(self)


def verify(
    model: nn.Module,
    update: Sequence[Chi],
    observe: Sequence[Chi],
    objective: Objective = SFT(),  # noqa: B008
    eta: float | None = None,
    *,
    scope: str = "full",
    optimizer: torch.optim.Optimizer | None = None,
    reference: nn.Module | None = None,
    observable: Observable | Function | str = LogProb(),  # noqa: B008
    move: float = 0.2,
) -> Verification:
    """Take the real step theta - eta P ∇L on a copy of the weights and compare with the first-order prediction.

    Args:
        model, update, observe, objective, scope, optimizer, reference, observable: as in `forces`.
        eta: step size; when absent, the one whose largest predicted change is `move` nats. Under an optimizer it stands for
            the largest learning rate of its groups: at eta = lr the step is what the optimizer's own would make of this
            gradient, momentum of earlier steps and weight decay left out.
        move: see eta.

    The stepped weights exist beside the model's own, which are never written: it is left bit-identical.

    Raises:
        ValueError: as `forces`; eta is not positive; the update moves nothing, or nothing but by rounding errors.

    Cost: one backward and one tangent pass, and four forward passes; twice the memory of the chosen parameters.
    """
    check_eta(eta)
    with trace(model) as tracer:
        asked = Asked(update, observe, objective, reference, optimizer=optimizer, observable=as_observable(observable))
        problem = UnscoredProblem.about(asked, Scope.named(tracer, scope)).scored()
        if nothing_moves(problem):
            raise ValueError(
                "nothing moves: the pushes of this update cancel to rounding, token by token. Are the answers of each pair or "
                "group the same text? Leave those out"
            )
        direction = problem.preconditioned(problem.vjp(problem.updated))
        return against_steps(problem, direction, problem.jvp(problem.observed, direction), eta, move)


@torch.no_grad()
def against_steps(
    problem: ScoredProblem,
    direction: Direction,
    force: Float[Tensor, " M"],
    eta: float | None = None,
    move: float = 0.2,
) -> Verification:
    """The comparison, for a force Σ_l F already known along a direction (see `verify`)."""
    strongest = float(force.abs().max())
    if not math.isfinite(strongest):
        raise ValueError("the force on some observed token is not finite: the step overflows in this precision")
    if strongest == 0:
        raise ValueError(
            "this update moves no observed token at first order: its c is zero everywhere (a vanished or clipped loss), or "
            "what is watched cannot move"
        )
    eta = move / strongest if eta is None else eta

    def at(step: float) -> Tensor:
        params = problem.tracer.stepped(direction, problem.uses, step)
        o = problem.observed
        return torch.cat([o.values(b, problem.tracer.logits(batch, params)) for b, batch in enumerate(o.batches)])

    before = at(0.0)
    etas = [eta / 2**i for i in range(HALVINGS)]
    actual = [at(step) - before for step in etas]
    force = force.double()
    residuals = [float((change - step * force).norm()) for change, step in zip(actual, etas, strict=True)]
    predicted = eta * force
    return Verification(
        eta=eta,
        predicted=predicted,
        actual=actual[0],
        order=_slope(etas, residuals),
        etas=etas,
        residuals=residuals,
        linearity=float((predicted @ actual[0]) / (predicted @ predicted)),
    )


def nothing_moves(problem: ScoredProblem) -> bool:
    """Whether the forces of an update that has some cancel to rounding, so that a step would follow rounding errors alone.

    Judged before any division, where they are added: at the logits of each context (`contexts.all_cancel`).
    """
    return all_cancel(problem.updated, context_numbers(problem.updated.chis), problem.tracer.vocabulary)


def _slope(x: list[float], y: list[float]) -> float:
    """Least-squares slope of log y against log x; NaN where a y is zero."""
    if min(y) <= 0:
        return float("nan")
    a, b = torch.tensor(x, dtype=torch.float64).log(), torch.tensor(y, dtype=torch.float64).log()
    a = a - a.mean()
    return float((a * b).sum() / (a * a).sum())
