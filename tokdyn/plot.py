"""Figures for papers, by matplotlib (`pip install "tokdyn[plot]"`): a matrix, changes of answers, predicted against actual.

Each function draws on `ax`, or on a figure of its own, and returns the figure. No state of pyplot is touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .runs.by_sequence import BySequence
from .runs.contexts import Contexts
from .sequences import visible

LABELLED = 60  # tokens of a side that are written beside a matrix


def matrix(result: Any, *, eta: float | None = None, net: bool = True, ax: Any = None) -> Any:
    """The matrix of a Run or of Forces, blue where it lifts and red where it lowers; the scale is symmetric about 0.

    Args:
        result: a Run, or Forces with a matrix.
        eta: multiply by this step size; nats per unit learning rate when absent.
        net: of a Run, add up update tokens behind the same text.
        ax: matplotlib axes.

    Raises:
        ValueError: there is no matrix. ImportError: matplotlib is not installed.
    """
    values, observed, updated = _matrix_of(result, net)
    values = values.double() * (1.0 if eta is None else eta)
    figure, ax = _axes(ax, (0.12 * values.shape[1] + 2.5, 0.12 * values.shape[0] + 2))
    largest = float(values.abs().max()) or 1.0
    image = ax.imshow(values.numpy(), cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
    ax.set(xlabel="update token", ylabel="observed token")
    if len(updated) <= LABELLED:
        ax.set_xticks(range(len(updated)), updated, rotation=90, fontsize=6, parse_math=False)
    if len(observed) <= LABELLED:
        ax.set_yticks(range(len(observed)), observed, fontsize=6, parse_math=False)
    figure.colorbar(image, ax=ax, label="nats per unit learning rate" if eta is None else "nats after the step")
    return figure


def predicted_against_actual(result: Any, *, ax: Any = None) -> Any:
    """The predicted change of each observed token against that of a real step; on the diagonal first order holds.

    Args:
        result: a Verification, or a Run that took a step.
        ax: matplotlib axes.

    Raises:
        ValueError: no step was taken. ImportError: matplotlib is not installed.
    """
    if hasattr(result, "predicted"):
        predicted, actual = result.predicted.tolist(), result.actual.tolist()
    else:
        rows = [row for row in result.tokens.to_pylist() if row["side"] == "observed"]
        predicted, actual = ([row[name] for row in rows] for name in ("predicted", "actual"))
    if not predicted or predicted[0] is None:
        raise ValueError("no step was taken (the pushes of this update cancel): there is no actual change to draw")
    figure, ax = _axes(ax, (4, 4))
    low, high = min(predicted + actual), max(predicted + actual)
    ax.plot([low, high], [low, high], color="0.7", linewidth=1, zorder=0)
    ax.scatter(predicted, actual, s=10)
    ax.set(xlabel="predicted change, nats", ylabel="actual change, nats", aspect="equal")
    return figure


def changes(run: Any, *, ax: Any = None) -> Any:
    """The predicted and actual change of each observed answer of a Run, sums over its tokens.

    Raises:
        ValueError: no step was taken. ImportError: matplotlib is not installed.
    """
    if run.about["settings"]["eta"] is None:
        raise ValueError("no step was taken (the pushes of this update cancel): there is no change to draw")
    sums = BySequence.of(run.tokens, None).changes()
    figure, ax = _axes(ax, (5, 0.5 * len(sums) + 1))
    for shift, name in ((-0.2, "predicted"), (0.2, "actual")):
        ax.barh([i + shift for i in range(len(sums))], [each[name] for each in sums.values()], height=0.38, label=name)
    ax.set_yticks(range(len(sums)), list(sums), parse_math=False)
    ax.invert_yaxis()
    ax.axvline(0, color="0.3", linewidth=0.8)
    ax.set(xlabel="change of log-probability, nats")
    ax.legend(frameon=False)
    return figure


def _matrix_of(result: Any, net: bool) -> tuple[Tensor, list[str], list[str]]:
    """A matrix and the texts of its rows and columns."""
    if result.matrix is None:
        raise ValueError('there is no matrix: a run has none after method="none", forces have none after reduce= or out=')
    if not hasattr(result, "tokens") or callable(result.tokens):  # Forces, whose tables are apart
        observed, updated = (table["token"].to_pylist() for table in (result.observed, result.updated))
        return result.matrix.detach().cpu(), list(map(visible, observed)), list(map(visible, updated))
    run = BySequence.of(result.tokens, result.matrix)
    observed = [visible(row["token"]) for row in run.observed]
    if not net or run.matrix is None:
        return result.matrix, observed, [visible(row["token"]) for row in run.updated]
    contexts = Contexts.of(run, result.about["sequences"])
    names = ["/".join(map(visible, contexts.tokens(x))) for x in range(len(contexts.members))]
    return torch.as_tensor(contexts.matrix), observed, names


def _axes(ax: Any, size: tuple[float, float]) -> tuple[Any, Any]:
    """The figure of some axes and those; a figure of its own of that size in inches where there are none."""
    if ax is not None:
        return ax.figure, ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('tokdyn.plot needs matplotlib: pip install "tokdyn[plot]"') from error
    figure = Figure(figsize=(min(size[0], 16), min(size[1], 16)), layout="constrained")
    return figure, figure.add_subplot()
