"""DPO does nothing at a prefix that both answers share, and moves two logits where they part: squeezing needs what follows.

At a position where chosen and rejected answer have the same context and the same token, their gradients at the logits are
c⁺(pi - e_y) and c⁻(pi - e_y) with c⁺ = -c⁻ = β(1-a), a = σ(βh): they cancel, and so do their exact forces over all
parameters, since the hidden states are the same too. At the first position where the answers differ, G⁺ + G⁻ = β(1-a)(e₋ -
e₊): pi is gone, so this position takes no mass from any third token, whatever the features (Ren & Sutherland, arXiv
2407.10490, §3.3, derive squeezing for one negative gradient; the cancellation was re-derived for this project). What presses
the rejected answer into a valley and lifts the argmax must come from the positions behind the divergence.

Identities, asserted: the prefix's G and force are zero to rounding, the divergence's G has two entries. Also asserted, from
the table of losses: those whose weights differ in size (SimPO, KTO, SPPO) do not cancel at the prefix. Measured: the step on
the tokens behind the divergence lifts the argmax more than the step on the divergence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokdyn as td

from ..loading import load_model
from ..objectives import Objective
from . import texts, training
from .figures import BLUE, GREEN, GREY, ORANGE, VERMILION, figure
from .result import Claim, Result, above, estimate, told

PARTS = ("shared prefix", "divergence", "behind it")
MARGIN = 5.0  # nats by which the whole step moves h, to first order
CANCEL = ("DPO", "IPO", "SLiC")
LOSSES: dict[str, Objective] = {
    "DPO": td.objectives.DPO(), "IPO": td.objectives.IPO(), "SLiC": td.objectives.SLiC(delta=1e3),
    "SimPO": td.objectives.SimPO(), "KTO": td.objectives.KTO(), "SPPO": td.objectives.SPPO(), "DPOP": td.objectives.DPOP(),
}  # fmt: skip


def run(quick: bool = False, seed: int = 0, model: str = "demo", data: str | Path | None = None) -> Result:
    """Measure the cancellation on pairs that share a prefix: at the logits, in exact forces and in real steps.

    Args:
        quick: fewer pairs, exact forces on two of them instead of six.
        seed: of the DPO steps that take the model away from its reference.
        model: a folder or a hub name.
        data: texts instead of the shipped pairs (`texts.pairs`); the first 64 that fit are taken.
    """
    policy, tokenizer = load_model(model)
    pairs = [training.with_reference(policy, pair) for pair in _drawn(tokenizer, quick, data)]
    optimizer = training.adam(policy, 2e-5)
    for pair in training.batches(pairs, 1, seed, epochs=1):  # away from h = 0, where every pair has the same weight
        training.step(policy, optimizer, td.objectives.DPO(), pair[0])

    by_position, by_loss, by_step = [], [], []
    for i, pair in enumerate(pairs):
        by_position += [{"pair": i} | row for row in _positions(policy, pair)]
        by_loss += [{"pair": i} | row for row in _prefix_weights(policy, pair)]
        by_step += [{"pair": i} | row for row in _steps(policy, pair)]
    forces = [_prefix_force(policy, pair) for pair in pairs[: 2 if quick else 6]]
    return conclude({"positions": by_position, "losses": by_loss, "steps": by_step}, forces)


def _drawn(tokenizer: Any, quick: bool, data: str | Path | None) -> list[list[td.Chi]]:
    """Chosen and rejected answer of every pair: those that share their first two tokens, and spliced ones."""
    given = texts.pairs(data, 64 if data else None, tokenizer=tokenizer if data else None)
    natural = [row for row in given if _shares(tokenizer, row)]
    spliced = [_spliced(row, other) for row, other in zip(given, given[1:] + given[:1], strict=True)]
    rows = natural + (spliced[::2] if quick else spliced)
    return [td.preference(tokenizer, row["prompt"], row["chosen"], row["rejected"]) for row in rows]


def conclude(tables: dict[str, list[dict[str, Any]]], forces: list[float]) -> Result:
    """The study's claims and figure, from rows by position, by loss and by step, and the relative force of some prefixes."""
    import pyarrow as pa

    by_position, by_loss, by_step = (tables[name] for name in ("positions", "losses", "steps"))
    pairs = len({row["pair"] for row in by_position})
    gain = {part: [row["argmax_gain"] for row in by_step if row["part"] == part] for part in (*PARTS, "all")}
    return Result(
        "DPO is silent where chosen and rejected agree; squeezing comes from behind the divergence",
        [*_identities(by_position, forces, pairs), *_measured(gain, by_loss, pairs)],
        {name: pa.Table.from_pylist(rows) for name, rows in tables.items()},
        {"shared_prefix": _figure(by_position, gain)},
        notes="Pairs: those whose answers share two tokens or more, and chosen answers whose rejected partner keeps "
        "their first third and goes on with another prompt's answer.\n\nA step on a part takes the DPO gradient of that part's "
        f"tokens alone, with the step size at which the whole gradient widens the margin h by {MARGIN:g} nats to first order. "
        "DPOP cancels while the chosen answer is above its reference.",
    )


def _identities(by_position: list[dict[str, Any]], forces: list[float], pairs: int) -> list[Claim]:
    """Claims that are identities: what cancels at the prefix and at the divergence."""
    prefix = [row["cancelled"] for row in by_position if row["offset"] < 0]
    parting = [row["off_two_logits"] for row in by_position if row["offset"] == 0]
    eps = torch.finfo(torch.float32).eps
    return [
        Claim(
            "At a shared prefix DPO's two gradients cancel (identity; docs/theory.md, Contexts)",
            "‖G⁺ + G⁻‖ / (‖G⁺‖ + ‖G⁻‖) = 0 up to float32 rounding of the logits",
            f"at most {max(prefix):.1e} over {len(prefix)} positions of {pairs} pairs",
            told(max(prefix) < 1e3 * eps),
        ),
        Claim(
            "Where the answers part, only the two tokens' logits are pushed, by β(1-a) (identity; docs/theory.md, Contexts)",
            "‖G⁺ + G⁻ - β(1-a)(e₋ - e₊)‖ / ‖β(1-a)(e₋ - e₊)‖ = 0 up to rounding",
            f"at most {max(parting):.1e} over {len(parting)} pairs",
            told(max(parting) < 1e3 * eps),
        ),
        Claim(
            "Through all parameters, attention included, the prefix pushes nothing (identity: same context, same Jacobian)",
            "force of the shared tokens of both answers on every token is zero against that of one answer's alone",
            f"‖F_prefix‖ / ‖F_prefix of the chosen answer‖ at most {max(forces):.1e} over {len(forces)} pairs",
            told(max(forces) < 1e-4),
        ),
    ]


def _measured(gain: dict[str, list[float]], by_loss: list[dict[str, Any]], pairs: int) -> list[Claim]:
    """Claims that are measured: where the argmax gains its mass, and which losses cancel."""
    rest = estimate([b - a for a, b in zip(gain["divergence"], gain["behind it"], strict=True)], "pairs")
    of_loss = {name: sum(row["share"] for row in by_loss if row["loss"] == name) / pairs for name in LOSSES}
    return [
        Claim(
            "Squeezing needs the positions behind the divergence (docs/theory.md, Squeezing)",
            "along the rejected answer the argmax (not the target) gains more from the positions behind than from that one",
            f"behind minus divergence {rest.words('probability a position')}; "
            + ", ".join(f"{part} {100 * sum(g) / len(g):+.2f}%" for part, g in gain.items()),
            above(rest),
        ),
        Claim(
            "Only losses with c⁺ = -c⁻ cancel: SimPO, KTO and SPPO do push the shared prefix (docs/theory.md, Objectives)",
            "|c⁺ + c⁻| / (|c⁺| + |c⁻|) zero for DPO, IPO and SLiC, above zero for SimPO, KTO and SPPO",
            "mean over pairs: " + ", ".join(f"{name} {value:.2g}" for name, value in of_loss.items()),
            told(all((value < 1e-6) == (name in CANCEL) for name, value in of_loss.items() if name != "DPOP")),
        ),
    ]


def _spliced(row: dict[str, str], other: dict[str, str]) -> dict[str, str]:
    """The pair whose rejected answer is the first third of the chosen one, continued with another prompt's answer."""
    here, there = row["chosen"].split(" "), other["chosen"].split(" ")
    return row | {"rejected": " ".join(here[: len(here) // 3] + there[len(there) // 3 :])}


def _shares(tokenizer: Any, row: dict[str, str]) -> bool:
    """Whether both answers begin with the same two tokens."""
    a, b = (tokenizer(row[key]).input_ids for key in ("chosen", "rejected"))
    return a[:2] == b[:2]


def _shared(pair: list[td.Chi]) -> int:
    """Number of scored tokens before the first difference."""
    a, b = (chi.ids[chi.scored].tolist() for chi in pair)
    return next(k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def _weights(model: Any, pair: list[td.Chi], objective: Objective) -> Tensor:
    """c of the scored tokens of both answers."""
    return objective.g_terms(torch.cat(training.log_probs(model, pair)), pair).c


@torch.no_grad()
def _positions(model: Any, pair: list[td.Chi]) -> list[dict[str, float]]:
    """Norms of the sum of both answers' gradients at the logits; one row a position, counted from the divergence."""
    objective = td.objectives.DPO()
    z = training.logits(model, pair)
    gterm = objective.g_terms(torch.cat(training.log_probs(model, pair)), pair)
    plus, minus = td.dynamics.G(z, gterm).split([len(chi) for chi in pair])
    k = _shared(pair)
    rows = []
    for t in range(min(len(plus), len(minus))):
        total = plus[t] + minus[t]
        two = torch.zeros_like(total)
        two[pair[0].ids[pair[0].scored][t]] -= gterm.c[0]
        two[pair[1].ids[pair[1].scored][t]] += gterm.c[0]
        size = plus[t].norm() + minus[t].norm()
        off = (total - two).norm() / two.norm() if t == k else torch.tensor(float("nan"))
        rows.append({"offset": t - k, "cancelled": float(total.norm() / size), "norm": float(total.norm()),
                     "off_two_logits": float(off)})  # fmt: skip
    return rows


def _prefix_weights(model: Any, pair: list[td.Chi]) -> list[dict[str, Any]]:
    """|c⁺ + c⁻| / (|c⁺| + |c⁻|) of the first shared token, by loss."""
    rows = []
    for name, objective in LOSSES.items():
        c = _weights(model, pair, objective)
        plus, minus = float(c[0]), float(c[len(pair[0])])
        rows.append({"loss": name, "c_plus": plus, "c_minus": minus, "share": abs(plus + minus) / (abs(plus) + abs(minus))})
    return rows


def _part_of(pair: list[td.Chi]) -> Tensor:
    """Index into PARTS for the scored tokens of both answers: 0 shared prefix, 1 divergence, 2 behind it."""
    k = _shared(pair)
    return torch.cat([(torch.arange(len(chi)) >= k).long() + (torch.arange(len(chi)) > k).long() for chi in pair])


def _prefix_force(model: Any, pair: list[td.Chi]) -> float:
    """‖F of the shared tokens of both answers‖ / ‖F of those of the chosen one‖, exact, over all parameters."""
    part = _part_of(pair)
    of_chosen = torch.arange(len(part)) < len(pair[0])
    labels = torch.where(part == 0, torch.where(of_chosen, 0, 1), -1)
    F = td.forces(model, pair, pair, td.objectives.DPO(), groups=labels).matrix
    assert F is not None
    return float(F.sum(1).norm() / F[:, 0].norm())


def _steps(model: Any, pair: list[td.Chi]) -> list[dict[str, Any]]:
    """A real step on each part alone: what the argmax along the rejected answer gains, and how many other tokens fall."""
    parameters = list(model.parameters())
    c, part, rejected = _weights(model, pair, td.objectives.DPO()), _part_of(pair), pair[1:]
    y = training.targets(rejected)

    def gradient(weights: Tensor) -> list[Tensor]:
        log_pi = training.logits(model, pair).log_softmax(-1).gather(1, training.targets(pair)[:, None]).squeeze(1)
        return list(torch.autograd.grad((weights * log_pi).sum(), parameters))

    whole = gradient(c)
    eta = MARGIN * float(c[0]) / float(sum(g.square().sum() for g in whole))  # h rises by eta ‖∇L‖²/c
    rows = []
    with torch.no_grad():
        before = training.logits(model, rejected)
    for p, name in enumerate((*PARTS, "all")):
        move = whole if name == "all" else gradient(c * (part == p))
        with torch.no_grad():
            kept = [theta.clone() for theta in parameters]
            for theta, v in zip(parameters, move, strict=True):
                theta.add_(eta * v)
            after = training.logits(model, rejected)
            for theta, old in zip(parameters, kept, strict=True):
                theta.copy_(old)
        moved = td.squeeze.compare(before, after, y, -torch.ones(len(y)))
        other = before.argmax(1) != y
        fell = after.log_softmax(1).gather(1, y[:, None]) - before.log_softmax(1).gather(1, y[:, None])
        rows.append({"part": name, "eta": eta, "argmax_gain": float(moved.argmax_gain[other].mean()),
                     "falling": float(moved.falling[other].mean()), "rejected": float(fell.mean())})  # fmt: skip
    return rows


def _figure(positions: list[dict[str, float]], gain: dict[str, list[float]]) -> Any:
    made, (left, right) = figure(1, 2, title="DPO: nothing at the shared prefix, two logits where the answers part", height=3.4)
    for label, colour, chosen in (
        ("shared", BLUE, lambda o: o < 0), ("first difference", VERMILION, lambda o: o == 0),
        ("behind it", GREY, lambda o: o > 0),
    ):  # fmt: skip
        points = [(row["offset"], max(row["cancelled"], 1e-9)) for row in positions if chosen(row["offset"])]
        left.scatter(*zip(*points, strict=True), s=12, color=colour, label=label, alpha=0.7, linewidths=0)
    left.set(yscale="log", xlabel="position from the first difference (tokens)", ylabel="‖G⁺ + G⁻‖ / (‖G⁺‖ + ‖G⁻‖)",
             title="the two gradients added up, one point a position")  # fmt: skip
    left.legend(loc="lower right")
    names = list(gain)
    means = [estimate([100 * g for g in gain[name]], "pairs") for name in names]
    right.bar(names, [m.mean for m in means], yerr=[m.half for m in means], color=[BLUE, VERMILION, ORANGE, GREEN], capsize=3)
    right.axhline(0, color=GREY, linewidth=0.8)
    right.set(ylabel="mass the argmax gains\n(percentage points)", title="a step on these tokens alone, 95% over pairs")
    return made
