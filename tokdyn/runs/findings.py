"""What a run found, in sentences a colleague can read; every number comes from the run's own tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Finding = dict[str, str]
ROW_SUMS = "row sums of the matrix against the tangent pass"


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
    names = sequence_names(rows)
    found: list[Finding | None] = [_step(about, o, u, names)]
    if matrix is not None and not bool(matrix.isnan().any()):
        found += [_tug_of_war(about, o, u, matrix, names), _strongest(about, o, u, matrix, names)]
    found += [_squeezing(u), _check(about), _sums(about)]
    return [finding for finding in found if finding is not None]


Names = dict[tuple[str, int], str]


def sequence_names(rows: list[dict[str, Any]]) -> Names:
    """(side, sequence) -> its name: role and group counted from 1, as "chosen 1"; twins get a number, "response 1 #2"."""
    found: Names = {}
    seen: dict[tuple[str, str, int], int] = {}
    for row in rows:
        key = (row["side"], row["sequence"])
        if key not in found:
            twin = (row["side"], row["role"], row["group"])
            seen[twin] = seen.get(twin, 0) + 1
            found[key] = f"{row['role']} {row['group'] + 1}" + (f" #{seen[twin]}" if seen[twin] > 1 else "")
    return found


def by_sequence(o: list[dict[str, Any]], names: Names) -> dict[str, dict[str, float]]:
    """Sum of predicted and actual change per observed sequence, in nats."""
    sums: dict[str, dict[str, float]] = {}
    for row in o:
        entry = sums.setdefault(names["observed", row["sequence"]], dict(predicted=0.0, actual=0.0, tokens=0))
        entry["predicted"] += row["predicted"]
        entry["actual"] += row["actual"]
        entry["tokens"] += 1
    return sums


def blocks(o: list[dict[str, Any]], u: list[dict[str, Any]], matrix: Tensor, names: Names) -> dict[str, dict[str, float]]:
    """Force of each updated sequence on each observed one, summed over both; nats per unit learning rate."""
    sums: dict[str, dict[str, float]] = {}
    columns: dict[str, list[int]] = {}
    for l, row in enumerate(u):  # noqa: E741
        columns.setdefault(names["updated", row["sequence"]], []).append(l)
    for m, row in enumerate(o):
        entry = sums.setdefault(names["observed", row["sequence"]], {})
        for name, at in columns.items():
            entry[name] = entry.get(name, 0.0) + float(matrix[m, at].sum())
    return sums


def signed(x: float) -> str:
    """A number with its sign, three decimals, and a minus that reads as one."""
    return f"{x:+.3f}".replace("-", "−")


def shown(token: str) -> str:
    """A token in quotes with its white space visible."""
    return "“" + token.replace("\n", "↵").replace(" ", "␣") + "”"


def _step(about: dict[str, Any], o: list[dict[str, Any]], u: list[dict[str, Any]], names: Names) -> Finding:
    sums = by_sequence(o, names)
    moves = ", ".join(f"{name} {signed(entry['actual'])}" for name, entry in sums.items())
    trained = {(row["role"], row["group"]) for row in u}
    wanted = {"chosen": 1, "rejected": -1}
    judged = {
        names["observed", row["sequence"]]: sums[names["observed", row["sequence"]]]["actual"] * wanted[row["role"]]
        for row in o
        if row["role"] in wanted and (row["role"], row["group"]) in trained
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


def _tug_of_war(
    about: dict[str, Any], o: list[dict[str, Any]], u: list[dict[str, Any]], matrix: Tensor, names: Names
) -> Finding | None:
    table, eta = blocks(o, u, matrix, names), about["settings"]["eta"]
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


def _strongest(
    about: dict[str, Any], o: list[dict[str, Any]], u: list[dict[str, Any]], matrix: Tensor, names: Names
) -> Finding | None:
    texts = {(entry["side"], entry["sequence"]): (entry["prompt"], entry["response"]) for entry in about["sequences"]}

    def place(row: dict[str, Any]) -> tuple[Any, ...]:  # the same token of the same text, whatever its role on that side
        return texts.get((row["side"], row["sequence"])), row["position"], row["token_id"]

    other = torch.tensor([[place(a) != place(b) for b in u] for a in o])
    if not bool(other.any()):
        return None
    index = int(torch.where(other, matrix.abs(), torch.zeros_like(matrix)).argmax())
    m, l = divmod(index, len(u))  # noqa: E741
    a, b, force, eta = o[m], u[l], float(matrix[m, l]), about["settings"]["eta"]
    row = matrix[m].abs()
    return dict(
        title=f"The strongest {'pull' if force > 0 else 'push'} between two different tokens",
        text=f"{shown(b['token'])} at position {b['position']} of {names['updated', b['sequence']]} "
        f"{'lifts' if force > 0 else 'lowers'} {shown(a['token'])} at position {a['position']} of "
        f"{names['observed', a['sequence']]}: {signed(eta * force)} nats in this step, "
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


def _sums(about: dict[str, Any]) -> Finding | None:
    """Only where something is wrong: the matrix and the reduction are two exact computations of one thing."""
    error = about["checks"].get(ROW_SUMS)
    if error is None or error < 1e-3:
        return None
    text = (
        f"Its row sums differ from the whole step's forces by {error:.1e} of their size: do not trust the matrix of this run."
    )
    return dict(title="The force matrix does not add up", text=text)
