"""What a run found, in sentences a colleague can read; every number comes from the run's own tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Finding = dict[str, str]


def findings(about: dict[str, Any], tokens: Any, matrix: Tensor | None) -> list[Finding]:
    """The step, the tug of war behind it, the strongest pair of tokens, squeezing, and the check, each with its figures.

    Args:
        about: a run's record; its sequences, settings and verify are read.
        tokens: its token table.
        matrix: F [M, L] or None; NaN entries (a partial run) leave the findings that need it out.
    """
    rows = tokens.to_pylist()
    u = [row for row in rows if row["side"] == "updated"]
    o = [row for row in rows if row["side"] == "observed"]
    whole = matrix is not None and not bool(matrix.isnan().any())
    found: list[Finding | None] = [_step(about, o)]
    if whole and matrix is not None:
        found += [_tug_of_war(about, o, u, matrix), _strongest(about, o, u, matrix)]
    found += [_squeezing(u), _check(about)]
    return [finding for finding in found if finding is not None]


def sequence_label(row: dict[str, Any]) -> str:
    """'chosen 1': the role of a token or sequence, and its group counted from 1."""
    return f"{row['role']} {row['group'] + 1}"


def by_sequence(o: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Sum of predicted and actual change per observed sequence, in nats."""
    sums: dict[str, dict[str, float]] = {}
    for row in o:
        entry = sums.setdefault(sequence_label(row), dict(predicted=0.0, actual=0.0, tokens=0))
        entry["predicted"] += row["predicted"]
        entry["actual"] += row["actual"]
        entry["tokens"] += 1
    return sums


def blocks(o: list[dict[str, Any]], u: list[dict[str, Any]], matrix: Tensor) -> dict[str, dict[str, float]]:
    """Force of each updated sequence on each observed one, summed over both; nats per unit learning rate."""
    sums: dict[str, dict[str, float]] = {}
    columns: dict[str, list[int]] = {}
    for l, row in enumerate(u):  # noqa: E741
        columns.setdefault(sequence_label(row), []).append(l)
    for m, row in enumerate(o):
        entry = sums.setdefault(sequence_label(row), {})
        for name, at in columns.items():
            entry[name] = entry.get(name, 0.0) + float(matrix[m, at].sum())
    return sums


def signed(x: float) -> str:
    """A number with its sign, three decimals, and a minus that reads as one."""
    return f"{x:+.3f}".replace("-", "−")


def shown(token: str) -> str:
    """A token in quotes with its white space visible."""
    return "“" + token.replace("\n", "↵").replace(" ", "␣") + "”"


def _step(about: dict[str, Any], o: list[dict[str, Any]]) -> Finding:
    sums = by_sequence(o)
    trained = {sequence_label(entry) for entry in about["sequences"] if entry["side"] == "updated"}
    moves = ", ".join(f"{name} {signed(entry['actual'])}" for name, entry in sums.items())
    wanted = {"chosen": 1, "rejected": -1}
    judged = {
        name: sums[name]["actual"] * wanted[name.split()[0]] for name in sums if name in trained and name.split()[0] in wanted
    }
    wrong = [f"{name} {'rises' if name.startswith('rejected') else 'falls'}" for name, gain in judged.items() if gain < 0]
    if wrong:
        title = f"Against its purpose, {' and '.join(wrong)}"
    elif judged:
        title = "The step moves every answer it trains on the way it should"
    else:
        title = "What the step does to each answer"
    return dict(
        title=title, text=f"Change of log-probability after a step of {about['settings']['eta']:.3g}, in nats: {moves}."
    )


def _tug_of_war(about: dict[str, Any], o: list[dict[str, Any]], u: list[dict[str, Any]], matrix: Tensor) -> Finding | None:
    table, eta = blocks(o, u, matrix), about["settings"]["eta"]
    best: tuple[float, str] | None = None
    for name, entry in table.items():
        lift, press = sum(f for f in entry.values() if f > 0), sum(f for f in entry.values() if f < 0)
        if lift and press:
            up, down = max(entry, key=lambda k: entry[k]), min(entry, key=lambda k: entry[k])
            text = (
                f"On {name}, the tokens of {up} do {signed(eta * entry[up])} nats and those of {down} "
                f"{signed(eta * entry[down])}; all updated answers together leave {signed(eta * (lift + press))}."
            )
            cancelled = min(lift, -press)
            if best is None or cancelled > best[0]:
                best = (cancelled, text)
    return None if best is None else dict(title="Most of the force cancels", text=best[1]) if _cancels(table) else dict(
        title="Who pulls and who pushes", text=best[1]
    )  # fmt: skip


def _cancels(table: dict[str, dict[str, float]]) -> bool:
    """Whether the net forces are less than half of the gross ones."""
    net = sum(abs(sum(entry.values())) for entry in table.values())
    gross = sum(abs(f) for entry in table.values() for f in entry.values())
    return net < 0.5 * gross


def _strongest(about: dict[str, Any], o: list[dict[str, Any]], u: list[dict[str, Any]], matrix: Tensor) -> Finding | None:
    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["group"], row["role"], row["position"]

    other = torch.tensor([[place(a) != place(b) for b in u] for a in o])
    if not bool(other.any()):
        return None
    index = int(torch.where(other, matrix.abs(), torch.zeros_like(matrix)).argmax())
    m, l = divmod(index, len(u))  # noqa: E741
    a, b, force, eta = o[m], u[l], float(matrix[m, l]), about["settings"]["eta"]
    row = matrix[m].abs()
    return dict(
        title="The strongest pull between two different tokens"
        if force > 0
        else "The strongest push between two different tokens",
        text=f"{shown(b['token'])} at position {b['position']} of {sequence_label(b)} {'lifts' if force > 0 else 'lowers'} "
        f"{shown(a['token'])} at position {a['position']} of {sequence_label(a)}: {signed(eta * force)} nats in this step, "
        f"{100 * float(row[l] / row.sum()):.0f}% of all force on that token.",
    )


def _squeezing(u: list[dict[str, Any]]) -> Finding | None:
    pushed = [row for row in u if row["c"] < 0]
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


def _check(about: dict[str, Any]) -> Finding | None:
    check = about.get("verify")
    if not check:
        return None
    return dict(
        title="The prediction holds" if 1.8 <= check["order"] <= 2.2 else "Check the prediction",
        text=f"Against a real step of {check['eta']:.3g}, predicted and actual changes agree with slope "
        f"{check['linearity']:.3f}; the difference shrinks with order {check['order']:.2f} as the step is halved "
        f"(2 is what first-order theory says).",
    )
