"""What a run found, in sentences a colleague can read; every number comes from the run's own tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sequences import visible
from .by_sequence import BySequence, Row

Finding = dict[str, str]
ROW_SUMS = "row sums of the matrix against the tangent pass"


def findings(about: dict[str, Any], tokens: Any, matrix: Tensor | None) -> list[Finding]:
    """The step, the balance of forces behind it, the strongest pair of tokens, squeezing, and the checks, with their figures.

    Args:
        about: a run's record; its sequences, settings, checks and verify are read.
        tokens: its token table (pyarrow).
        matrix: F [M, L] or None. Where entries are NaN (an interrupted run), findings that need it are left out.
    """
    run = BySequence.of(tokens, matrix)
    found = [_step(about, run)]
    if run.matrix is not None:
        found += [_balance(about, run), _strongest(about, run)]
    found += [_squeezing(run), _prediction(about), _row_sums(about)]
    return [finding for finding in found if finding is not None]


def signed(x: float) -> str:
    """A number with its sign, three decimals, and a minus that reads as one."""
    return f"{x:+.3f}".replace("-", "−")


def shown(token: str) -> str:
    """A token in quotes with its white space visible."""
    return f"“{visible(token)}”"


def _step(about: dict[str, Any], run: BySequence) -> Finding | None:
    """What the step did to each answer, and whether answers that were trained on moved the way they should."""
    changes = run.changes()
    moves = ", ".join(f"{name} {signed(change['actual'])}" for name, change in changes.items())
    trained = {(row["role"], row["group"]) for row in run.updated}
    direction = {"chosen": 1, "rejected": -1}
    gains = {
        run.name(row): changes[run.name(row)]["actual"] * direction[row["role"]]
        for row in run.observed
        if row["role"] in direction and (row["role"], row["group"]) in trained
    }
    wrong = [f"{name} {'rises' if name.startswith('rejected') else 'falls'}" for name, gain in gains.items() if gain < 0]
    if wrong:
        title = f"Against its purpose, {' and '.join(wrong)}"
    elif gains:
        title = "The step moves every answer it trains on the way it should"
    else:
        title = "What the step does to each answer"
    return dict(
        title=title, text=f"Change of log-probability after a step of {about['settings']['eta']:.3g}, in nats: {moves}."
    )


def _balance(about: dict[str, Any], run: BySequence) -> Finding | None:
    """The observed sequence on which most force cancels, with the two sequences that pull and push it hardest."""
    table, eta = run.forces(), about["settings"]["eta"]
    best: tuple[float, str] | None = None
    for name, forces in table.items():
        lift, press = sum(f for f in forces.values() if f > 0), sum(f for f in forces.values() if f < 0)
        if not (lift and press):
            continue
        up, down = max(forces, key=lambda k: forces[k]), min(forces, key=lambda k: forces[k])
        text = (
            f"On {name}, the tokens of {up} do {signed(eta * forces[up])} nats and those of {down} "
            f"{signed(eta * forces[down])}; all updated answers together leave {signed(eta * (lift + press))}."
        )
        cancelled = min(lift, -press)
        if best is None or cancelled > best[0]:
            best = (cancelled, text)
    if best is None:
        return None
    net = sum(abs(sum(forces.values())) for forces in table.values())
    gross = sum(abs(f) for forces in table.values() for f in forces.values())
    return dict(title="Most of the force cancels" if net < 0.5 * gross else "Who pulls and who pushes", text=best[1])


def _strongest(about: dict[str, Any], run: BySequence) -> Finding | None:
    """The largest force between two tokens, leaving out a token of a text that is on both sides and its own force on itself."""
    assert run.matrix is not None
    texts = {(entry["side"], entry["sequence"]): (entry["prompt"], entry["response"]) for entry in about["sequences"]}
    number: dict[tuple[Any, ...], int] = {}

    def numbers(rows: list[Row]) -> Tensor:  # the same token of the same text has one number, whatever its role on that side
        places = [(texts.get((row["side"], row["sequence"])), row["position"], row["token_id"]) for row in rows]
        return torch.tensor([number.setdefault(place, len(number)) for place in places])

    other = (numbers(run.observed)[:, None] != numbers(run.updated)).to(run.matrix.device)
    if not bool(other.any()):
        return None
    m, l = divmod(int((run.matrix.abs() * other).argmax()), len(run.updated))  # noqa: E741
    a, b, force, eta = run.observed[m], run.updated[l], float(run.matrix[m, l]), about["settings"]["eta"]
    row = run.matrix[m].abs()
    return dict(
        title=f"The strongest {'pull' if force > 0 else 'push'} between two different tokens",
        text=f"{shown(b['token'])} at position {b['position']} of {run.name(b)} {'lifts' if force > 0 else 'lowers'} "
        f"{shown(a['token'])} at position {a['position']} of {run.name(a)}: {signed(eta * force)} nats in this step, "
        f"{100 * float(row[l] / row.sum()):.0f}% of all force on that token.",
    )


def _squeezing(run: BySequence) -> Finding | None:
    """Whether pushing tokens down feeds the model's first choice, in a step on the readout alone."""
    pushed = [row for row in run.updated if row["c"] < 0]
    if not pushed:
        return None
    away = [row for row in pushed if row["rank"] > 0]
    gains = [row for row in away if row["mass_to_argmax"] > 0]
    falling = sum(row["falling_share"] for row in pushed) / len(pushed)
    mass = sum(row["mass_to_argmax"] for row in away)
    return dict(
        title="Squeezing" if len(gains) > len(away) / 2 else "Little squeezing",
        text=f"{len(pushed)} update tokens are pushed down, {len(away)} of them are not the model's first choice. In a step on "
        f"the readout alone the first choice gains at {len(gains)} of those ({mass:.2g} of probability in all), while "
        f"on average {100 * falling:.0f}% of the other vocabulary falls.",
    )


def _prediction(about: dict[str, Any]) -> Finding | None:
    """Predicted against actual changes, and the order of their difference."""
    check = about.get("verify")
    if not check:
        return None
    return dict(
        title="The prediction holds" if 1.8 <= check["order"] <= 2.2 else "Check the prediction",
        text=f"Against a real step of {check['eta']:.3g}, predicted and actual changes agree with slope "
        f"{check['linearity']:.3f}; the difference shrinks with order {check['order']:.2f} as the step is halved "
        f"(2 is what first-order theory says).",
    )


def _row_sums(about: dict[str, Any]) -> Finding | None:
    """A warning where the row sums of the matrix and the tangent pass, two exact computations of one vector, differ."""
    error = about["checks"].get(ROW_SUMS)
    if error is None or error < 1e-3:
        return None
    text = (
        f"Its row sums differ from the whole step's forces by {error:.1e} of their size: do not trust the matrix of this run."
    )
    return dict(title="The force matrix does not add up", text=text)
