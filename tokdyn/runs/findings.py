"""What a run found, in sentences a colleague can read; every number comes from the run's own tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sequences import visible
from .by_sequence import BySequence
from .cards import Cards
from .contexts import Contexts
from .explain import Explanation
from .pairs import Pairs
from .watched import is_log_prob, watched

Finding = dict[str, str]
ROUNDING = 1e-6  # of the largest entry: what sums of float32 forces that cancel leave
ROW_SUMS = "row sums of the matrix against the tangent pass"


def findings(about: dict[str, Any], tokens: Any, matrix: Tensor | None, pairs: Pairs | None = None) -> list[Finding]:
    """The step, the strongest net pushes and why they happen, the balance behind them, squeezing, and the checks, with figures.

    Args:
        about: a run's record; its sequences, settings, checks and verify are read.
        tokens: its token table (pyarrow).
        matrix: F [M, L] or None. Where entries are NaN (an interrupted run), findings that need it are left out.
        pairs: the pairs that the run keeps.
    """
    run = BySequence.of(tokens, matrix)
    if about["settings"]["eta"] is None:
        return _still(run)
    found = [_step(about, run)]
    if run.matrix is not None:
        contexts = Contexts.of(run, about["sequences"])
        cards = Cards(about, tokens, matrix, pairs)
        found += [_strongest(about, contexts), _why(cards), _rejected(about, cards), _balance(about, contexts)]
    found += [_squeezing(run), _prediction(about), _row_sums(about)]
    return [finding for finding in found if finding is not None]


def signed(x: float) -> str:
    """A number with its sign, three decimals, and a minus that reads as one."""
    return f"{x:+.3f}".replace("-", "−")


def shown(token: str) -> str:
    """A token in quotes with its white space visible."""
    return f"“{visible(token)}”"


def moves(about: dict[str, Any], force: float) -> str:
    """The verb of a force: what is watched rises or falls."""
    if is_log_prob(about):
        return "lifts" if force > 0 else "lowers"
    return f"{'raises' if force > 0 else 'lowers'} the {watched(about)['label']} at"


def _step(about: dict[str, Any], run: BySequence) -> Finding | None:
    """What the step did to each answer, and whether answers that were trained on moved the way they should."""
    changes = run.changes()
    changed = ", ".join(f"{name} {signed(change['actual'])}" for name, change in changes.items())
    trained = {(row["role"], row["group"]) for row in run.updated}
    direction = {"chosen": 1, "rejected": -1}
    gains = {
        run.name(row): changes[run.name(row)]["actual"] * direction[row["role"]]
        for row in run.observed
        if row["role"] in direction and (row["role"], row["group"]) in trained
    }
    wrong = [f"{name} {'rises' if name.startswith('rejected') else 'falls'}" for name, gain in gains.items() if gain < 0]
    of = watched(about)
    if not is_log_prob(about):
        title = f"What the step does to the {of['label']}"
    elif wrong:
        title = f"Against its purpose, {' and '.join(wrong)}"
    elif gains:
        title = "The step moves every answer it trains on the way it should"
    else:
        title = "What the step does to each answer"
    return dict(
        title=title,
        text=f"Change of {of['label']} after a step of {about['settings']['eta']:.3g}, in {of['unit']}: {changed}.",
    )


def _still(run: BySequence) -> list[Finding]:
    """What there is to say of an update whose pushes cancel to rounding: no step was taken."""
    texts: dict[tuple[Any, ...], list[str]] = {}
    for name in run.names:
        if name[0] == "updated":
            key = tuple(row["context"] for row in run.updated if row["sequence"] == name[1])
            texts.setdefault(key, []).append(run.names[name])
    same = "; ".join(" and ".join(names) for names in texts.values() if len(names) > 1)
    text = (
        "The pushes of this update cancel to rounding: wherever one update token pulls, others behind the same tokens push as "
        f"much. The same text up to the last token: {same}. No step was taken, since it would follow rounding errors alone: "
        "leave these answers out, or look for why their texts are the same."
    )
    return [dict(title="Nothing moves", text=text)]


def _balance(about: dict[str, Any], contexts: Contexts) -> Finding | None:
    """The observed sequence on which most force cancels, with the two groups of tokens that pull and push it hardest."""
    table, eta, unit = contexts.forces(), about["settings"]["eta"], watched(about)["unit"]
    best: tuple[float, str] | None = None
    for name, forces in table.items():
        lift, press = sum(f for f in forces.values() if f > 0), sum(f for f in forces.values() if f < 0)
        if not (lift and press):
            continue
        up, down = max(forces, key=lambda k: forces[k]), min(forces, key=lambda k: forces[k])
        text = (
            f"On {name}, the tokens of {up} do {signed(eta * forces[up])} {unit} and those of {down} "
            f"{signed(eta * forces[down])}; all updated answers together leave {signed(eta * (lift + press))}. "
            "Tokens behind the same text count as one, under all the answers that share it."
        )
        cancelled = min(lift, -press)
        if best is None or cancelled > best[0]:
            best = (cancelled, text)
    if best is None:
        return None
    net = sum(abs(sum(forces.values())) for forces in table.values())
    gross = sum(abs(f) for forces in table.values() for f in forces.values())
    return dict(title="Most of the force cancels" if net < 0.5 * gross else "Who pulls and who pushes", text=best[1])


def _strongest(about: dict[str, Any], contexts: Contexts) -> Finding | None:
    """The largest net force of a context on a token that stands elsewhere, and how much of all force cancels before that.

    None where there is none: all that is left of a model that is certain of every token is rounding.
    """
    ended = len(contexts.members)
    contexts = contexts.alike_joined
    run, others = contexts.run, contexts.others
    assert run.matrix is not None
    if not bool(others.abs().max() > ROUNDING * run.matrix.abs().max() if others.numel() else False):
        return None
    m, x = divmod(int(others.abs().argmax()), others.shape[1])
    a, force, eta = run.observed[m], float(others[m, x]), about["settings"]["eta"]
    gross, net = float(run.matrix.abs().sum(dtype=torch.float64)), float(contexts.matrix.abs().sum(dtype=torch.float64))
    share = 100 * abs(force) / float(others[m].abs().sum())
    text = (
        f"{contexts.name(x)} {moves(about, force)} {shown(a['token'])} {run.place(a)}: {signed(eta * force)} "
        f"{watched(about)['unit']} in this step, {share:.0f}% of the net force on it from elsewhere."
    )
    if contexts.own[m] >= 0:
        text += f" What is trained in its own place does {signed(eta * contexts.itself(m))}."
    if len(contexts.members) < ended:
        text += " What both answers of a pair say alike, place by place, counts as one, under both."
    if net < 0.99 * gross:
        text += f" {100 * (1 - net / gross):.0f}% of all force between single tokens cancels where answers say the same."
    return dict(title=f"The strongest net {'pull' if force > 0 else 'push'} of one token on another", text=text)


def _why(cards: Cards) -> Finding | None:
    """The sentence of the strongest net push between different places."""
    found = cards.strongest()
    card = found and cards.card(*found)
    return dict(title="Why", text=card.sentence, **_pair(card)) if card else None


def _rejected(about: dict[str, Any], cards: Cards) -> Finding | None:
    """The rejected token that pushes a chosen one down most, and through which layers."""
    run = cards.contexts.run
    chosen, rejected = (
        [row["row"] for row in rows if row["role"] == role]
        for rows, role in ((run.observed, "chosen"), (run.updated, "rejected"))
    )
    found = cards.strongest(chosen, rejected, down=True) if is_log_prob(about) else None
    card = found and cards.card(*found)
    if not card or abs(card.facts["force"]) <= ROUNDING * float(run.matrix.abs().max() if run.matrix is not None else 0):
        return None
    title = "The rejected token that pushes a chosen one down most"
    return dict(title=title, text=card.sentence, **_pair(card))


def _pair(card: Explanation) -> Finding:
    """Where the page shows a card: the part of its address that selects the two tokens."""
    return {"address": card.address}


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
    text = f"Its row sums differ from the whole step's forces by {error:.1e} of all force: do not trust the matrix of this run."
    return dict(title="The force matrix does not add up", text=text)
