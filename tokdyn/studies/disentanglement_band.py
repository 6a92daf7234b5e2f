"""When does a step on a preference pair lower the rejected answer without lowering the chosen one?

Chen et al., *Towards Disentangled Preference Optimization Dynamics* (arXiv 2604.18239): preference losses share their update
directions s⁺ = ∇ log π(y⁺), s⁻ = ∇ log π(y⁻) and differ in two weights, θ += η (d⁺ s⁺ - d⁻ s⁻). With ρ the cosine of s⁺ and
s⁻ and a = ‖s⁻‖/‖s⁺‖ the chosen answer rises if r = d⁺/d⁻ > ρ a and the rejected one falls if r < a/ρ (ρ > 0): the
disentanglement band. Margin losses leave it and press the chosen answer down; reward calibration, r = a, is inside it always,
as ρ < 1. Here the three inner products are sums of exact forces over all parameters of the demo model, pair by pair, for
seven losses.

Asserted: forces of every loss are these products times its weights; a step with r = a lifts y⁺ and lowers y⁻ at every pair.
Measured, over seeds with pairs of their own: what the band foretells of real steps, how often losses leave it, and training.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokdyn as td

from ..objectives import Objective
from . import texts, training
from .figures import BLUE, GREY, VERMILION, figure
from .parts import Keep, unkept
from .result import Claim, Estimate, Result, above, below, both, of_runs, told
from .shared_prefix import LOSSES

PAPER = "arXiv 2604.18239"
CALIBRATED = "calibrated"
MOVE = 0.01  # nats by which a real step moves the answer that it moves most
SOME = 0.1  # share of pairs from which displacement is no exception
Row = dict[str, Any]


def run(
    quick: bool = False, seed: int = 0, model: str = "demo", data: str | Path | None = None, keep: Keep = unkept,
    runs: int | None = None,
) -> Result:  # fmt: skip
    """Bands and real steps pair by pair, before DPO and after it, and DPO with and without calibration.

    Args:
        quick: one seed of 6 pairs and one pass; else five seeds of 16 pairs and 6 passes.
        seed: of the first run.
        model: a folder or a hub name.
        data: texts instead of the shipped pairs (`texts.pairs`).
        keep: where finished seeds are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    seeds = range(seed, seed + (runs or (1 if quick else 5)))
    tables: dict[str, list[Row]] = {"steps": [], "training": []}
    for row in texts.of_seeds(_seed, model, data, quick, seeds, keep):
        tables[row.pop("table")].append(row)
    return conclude(tables["steps"], tables["training"])


def _seed(model: Any, tokenizer: Any, rows: list[texts.Row], quick: bool, seed: int) -> list[Row]:
    """A row for each stage, pair and loss, and one for each pair and way of training."""
    drawn, found = texts.drawn(rows, 6 if quick else 16, seed), list[Row]()
    start = copy.deepcopy(model)
    training.sft(start, texts.chis(tokenizer, drawn, "chosen"), epochs=2, lr=2e-4, seed=seed)
    pairs = [training.with_reference(start, texts.preferences(tokenizer, [row])) for row in drawn]
    before = [training.read(start, pair).log_prob for pair in pairs]
    for way in ("DPO", CALIBRATED):
        policy = _train(start, pairs, way, 1 if quick else 6, seed)
        change = [(training.read(policy, pair).log_prob - old).tolist() for pair, old in zip(pairs, before, strict=True)]
        found += [{"table": "training", "way": way, "pair": i, "chosen": a, "rejected": b} for i, (a, b) in enumerate(change)]
        if way == "DPO":
            for stage, at in (("before DPO", start), ("after DPO", policy)):
                for i, pair in enumerate(pairs[: 2 if quick else 8]):
                    found += [{"table": "steps", "stage": stage, "pair": i} | row for row in _steps(at, pair)]
    return [{"seed": seed} | row for row in found]


def products(model: Any, pair: list[td.Chi]) -> Tensor:
    """[[<s⁺, s⁺>, <s⁺, s⁻>], [<s⁻, s⁺>, <s⁻, s⁻>]] of the answers' gradients of log π, from exact forces."""
    F = td.forces(model, pair, pair, td.objectives.SFT(), groups="sequence").matrix
    assert F is not None
    return torch.stack([part.double().sum(0) for part in F.split([len(chi) for chi in pair])])


def _steps(model: Any, pair: list[td.Chi]) -> list[Row]:
    """What each loss and the calibration do to both answers: by the band, by forces, and in a real step."""
    S, log_pi = products(model, pair), torch.cat(training.log_probs(model, pair))
    a, rho = float((S[1, 1] / S[0, 0]).sqrt()), float(S[0, 1] / (S[0, 0] * S[1, 1]).sqrt())
    weights = {name: objective.g_terms(log_pi, pair).c.double()[[0, -1]] for name, objective in LOSSES.items()}
    weights[CALIBRATED] = torch.tensor([a, -1.0], dtype=torch.float64)
    rows = []
    for name, d in weights.items():
        r, predicted = float(-d[0] / d[1]), S @ d
        inside = bool(d[0] > 0 > d[1]) and r > rho * a and r * rho < a
        moved = _moved(model, pair, d * MOVE / predicted.abs().max())
        gap = _gap(model, pair, LOSSES[name], predicted) if name != CALIBRATED else 0.0
        rows.append({"loss": name, "a": a, "rho": rho, "r": r, "inside": inside, "gap": gap,
                     "chosen": moved[0], "rejected": moved[1], "agrees": inside == (moved[0] > 0 > moved[1])})  # fmt: skip
    return rows


def _gap(model: Any, pair: list[td.Chi], objective: Objective, predicted: Tensor) -> float:
    """‖F - S d‖/‖F‖, F the loss's own force on each answer."""
    F = td.forces(model, pair, pair, objective, reduce="update").vector
    assert F is not None
    whole = torch.stack([part.double().sum() for part in F.split([len(chi) for chi in pair])])
    return float((whole - predicted).norm() / whole.norm())


def _moved(model: Any, pair: list[td.Chi], weights: Tensor) -> list[float]:
    """Real change of log π of both answers after θ += d⁺ s⁺ + d⁻ s⁻ (d⁻ below 0 pushes down)."""
    parameters = list(model.parameters())
    c = torch.cat([w.expand(len(chi)) for w, chi in zip(weights, pair, strict=True)]).float()
    log_pi = training.logits(model, pair).log_softmax(-1).gather(1, training.targets(pair)[:, None]).squeeze(1)
    move = torch.autograd.grad((c * log_pi).sum(), parameters)
    before = training.log_probs(model, pair)
    with torch.no_grad():
        kept = [theta.clone() for theta in parameters]
        for theta, v in zip(parameters, move, strict=True):
            theta.add_(v)
        after = training.log_probs(model, pair)
        for theta, old in zip(parameters, kept, strict=True):
            theta.copy_(old)
    return [float((x - y).sum()) for x, y in zip(after, before, strict=True)]


def _train(start: Any, pairs: list[list[td.Chi]], way: str, passes: int, seed: int) -> Any:
    """DPO on a copy, one pair a step; calibrated, with both weights of the pair in the ratio a and their product unchanged."""
    policy = copy.deepcopy(start)
    optimizer = training.adam(policy, 3e-5)
    for (pair,) in training.batches(pairs, 1, seed, epochs=passes):
        weights = None
        if way == CALIBRATED:
            S = products(policy, pair)
            a = float((S[1, 1] / S[0, 0]).sqrt())
            weights = torch.cat([torch.full((len(chi),), w) for chi, w in zip(pair, (a**0.5, a**-0.5), strict=True)])
        training.step(policy, optimizer, td.objectives.DPO(), pair, weights=weights)
    return policy


def conclude(steps: list[Row], training_rows: list[Row]) -> Result:
    """The study's claims and figure, from a row for each stage, pair and loss, and for each pair and way of training."""
    import pyarrow as pa

    losses = [row for row in steps if row["loss"] != CALIBRATED]
    calibrated = [row for row in steps if row["loss"] == CALIBRATED]
    agrees = _over(losses, lambda row: row["agrees"])
    fell = {name: _over([row for row in losses if row["loss"] == name], lambda row: row["chosen"] < 0) for name in LOSSES}
    outside = _over([row for row in losses if row["loss"] == "DPO"], lambda row: not row["inside"])
    gap, kept = max(row["gap"] for row in losses), sum(row["chosen"] > 0 > row["rejected"] for row in calibrated)
    return Result(
        f"DPO leaves the disentanglement band at {outside.mean:.0%} of the pairs; the band foretells {agrees.mean:.0%} of real "
        "steps",
        [
            Claim(
                f"Preference losses share their update directions and differ in two weights (identity; {PAPER})",
                "force of every loss on both answers = <s, s'> times its weights: ‖F - S d‖ / ‖F‖ = 0 up to float32 rounding",
                f"at most {gap:.1e} over {len(losses)} pairs and losses",
                told(gap < 1e-3),
            ),
            Claim(
                f"The band tells whether a step lifts the chosen and lowers the rejected answer ({PAPER})",
                f"share of pairs and losses where a real step of {MOVE:g} nats does as the band says above 0.95, interval too",
                agrees.words(),
                above(agrees, 0.95),
            ),
            Claim(
                f"Margin losses press the chosen answer down with the rejected one ({PAPER}, likelihood displacement)",
                f"share of pairs at which a real step of DPO lowers the chosen answer above {SOME}, its interval too",
                "; ".join(f"{name} {value.words()}" for name, value in fell.items()),
                above(fell["DPO"], SOME),
            ),
            Claim(
                f"Calibrated weights lift the chosen and lower the rejected answer at every pair (identity, ρ < 1; {PAPER})",
                "so does a real step with r = ‖s⁻‖/‖s⁺‖, at all of them",
                f"{kept} of {len(calibrated)}",
                told(kept == len(calibrated)),
            ),
            _trained(training_rows),
        ],
        {"steps": pa.Table.from_pylist(steps), "training": pa.Table.from_pylist(training_rows)},
        {"disentanglement_band": _figure(steps, training_rows)},
        notes=f"ρ is {_over(calibrated, lambda row: row['rho']).words()}, a {_over(calibrated, lambda row: row['a']).words()}; "
        f"DPO, whose r is 1, is outside the band at {outside.words()} of the pairs, before DPO and after it together. The "
        f"paper "
        "takes the band over batches, here it is each pair's own.",
    )  # fmt: skip


def _trained(rows: list[Row]) -> Claim:
    """DPO with calibrated weights against DPO."""
    by = {way: [row for row in rows if row["way"] == way] for way in ("DPO", CALIBRATED)}
    pairs = list(zip(by[CALIBRATED], by["DPO"], strict=True))
    more = _over([{"seed": a["seed"], "x": a["chosen"] - b["chosen"]} for a, b in pairs], lambda row: row["x"])
    chosen, rejected = (
        {way: _over(some, lambda row, key=key: row[key]) for way, some in by.items()} for key in ("chosen", "rejected")
    )
    return Claim(
        f"Trained so, the chosen answers stay higher while the rejected ones fall ({PAPER}, reward calibration)",
        "change of the chosen answers above that under DPO, the difference's interval too, and rejected ones below their start",
        f"chosen {chosen[CALIBRATED].words()} against {chosen['DPO'].words()}, difference {more.words('nats a token')}; "
        f"rejected {rejected[CALIBRATED].words()} against {rejected['DPO'].words()}",
        both(above(more), below(rejected[CALIBRATED])),
    )


def _over(rows: list[Row], value: Any) -> Estimate:
    """Estimate of a value of each row over seeds, or over the rows of one."""
    runs: dict[int, list[float]] = {}
    for row in rows:
        runs.setdefault(row["seed"], []).append(float(value(row)))
    return of_runs(runs.values(), "pairs")


def _figure(steps: list[Row], rows: list[Row]) -> Any:
    made, (left, right) = figure(
        1, 2, title="Weights inside the band lift the chosen answer and lower the rejected", height=3.6
    )
    for inside, colour, label in ((True, BLUE, "inside"), (False, VERMILION, "outside")):
        some = [row for row in steps if row["loss"] != CALIBRATED and row["inside"] == inside]
        left.plot(
            [row["chosen"] for row in some], [row["rejected"] for row in some], ".", color=colour, label=label, markersize=3
        )
    left.axhline(0, color=GREY, linewidth=0.8)
    left.axvline(0, color=GREY, linewidth=0.8)
    left.set(xlabel="change of log π(chosen), nats", ylabel="change of log π(rejected), nats",
             title="a real step, one point a pair and loss")  # fmt: skip
    left.legend(title="by the band")
    for way, colour in (("DPO", VERMILION), (CALIBRATED, BLUE)):
        some = [row for row in rows if row["way"] == way]
        right.plot([row["chosen"] for row in some], [row["rejected"] for row in some], ".", color=colour, label=way)
    right.axvline(0, color=GREY, linewidth=0.8)
    right.set(xlabel="change of the chosen answer (nats a token)", ylabel="change of the rejected answer\n(nats a token)",
              title="after training")  # fmt: skip
    right.legend()
    return made
