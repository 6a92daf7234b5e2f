"""SimKO shares the pull on a right answer's forking tokens with their runners-up, to keep pass@K while pass@1 rises.

Peng, Ren et al., *SimKO* (arXiv 2510.14807, later CaSP), §3-4: GRPO concentrates a policy on its most likely token, which
costs pass@K. SimKO gives a share α of a right answer's gradient at high-entropy tokens to the N most likely candidates, and
presses a wrong answer harder (λ) where its token is the most likely one. Here with the paper's constants on the sums of
grpo-forces, besides GRPO, from the same start and on the same problems; the tree of the paper is the study simko-tree. Each
seed draws its sums and teaches its own policy, and both are judged by sums that GRPO and SimKO never saw.

Identities, asserted: SimKO's loss has GRPO's value, and at its forking tokens the gradient at the logits is sg(γ)A(pi - ẽ)
with ẽ = (1-α)e_y + (α/N) Σ e_candidates. Measured, over seeds: pass@1, pass@K, top-1 mass and entropy.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import tokdyn as td

from ..interventions import loss
from ..loading import load_model
from ..objectives import Scores
from . import arithmetic, training
from .figures import BLUE, VERMILION, band, figure
from .grpo_training import TRAINED, G, K, Schedule, gained, gains, lines, train
from .parts import Keep, unkept
from .result import Claim, Estimate, Result, above, below, estimate, told

PAPER = "arXiv 2510.14807 §4"
LOSSES = {"GRPO": td.objectives.GRPO(), "SimKO": td.objectives.SimKO()}
MARGIN = 0.02  # of pass@1 that counts as no cost
PANELS = {"pass_1": "pass@1", "pass_K": f"pass@{K}", "top_1": "mass of the most likely token",
          "answers": "different answers a problem"}  # fmt: skip


def run(quick: bool = False, seed: int = 0, keep: Keep = unkept, runs: int | None = None) -> Result:
    """Train the same policy with GRPO and with SimKO, and read both.

    Args:
        quick: one seed of 4 small steps on 8 problems instead of six seeds of 60 steps on 48.
        seed: of the first run.
        keep: where finished seeds are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    model, tokenizer = load_model()
    schedule = Schedule(4, 4, 4, 8) if quick else Schedule(60, 20, 8, 16)
    n = 8 if quick else 48
    found = [
        keep(f"seed-{s}", partial(_seed, model, tokenizer, n, schedule, s))
        for s in range(seed, seed + (runs or (1 if quick else 6)))
    ]
    curves = [row for part in found for row in part["curves"]]
    return conclude(curves, max(part["value"] for part in found), max(part["spread"] for part in found), n)


def _seed(model: Any, tokenizer: Any, n: int, schedule: Schedule, seed: int) -> dict[str, Any]:
    """One seed: its sums and taught policy, the errors of the identities on it, and the readings of both trainings."""
    sums, unseen = arithmetic.halves(seed, n)
    taught = arithmetic.half_taught(model, tokenizer, sums + unseen, seed=seed)
    rollouts = [chi for chi in arithmetic.roll_out(taught, tokenizer, sums[:4], G, seed=seed).chis if chi.advantage]
    value, spread = _identities(taught, rollouts)
    curves = [
        {"method": name, "seed": seed} | row
        for name, objective in LOSSES.items()
        for row in train(taught, tokenizer, sums, unseen, name, schedule, seed=seed, objective=objective)
    ]
    return {"curves": curves, "value": value, "spread": spread}


def conclude(curves: list[dict[str, Any]], value: float, spread: float, problems: int) -> Result:
    """The study's claims and figure, from the table of readings and the errors of the two identities."""
    import pyarrow as pa

    more = {key: gained(curves, "SimKO", "GRPO", key) for key in PANELS}
    change = {key: [f"{name} {estimate(gains(curves, name, key)).words()}" for name in LOSSES] for key in PANELS}
    claims = [
        Claim(
            f"SimKO's ratio has the value of GRPO's (identity; {PAPER})",
            "both losses agree on the same rollouts, but for λ on wrong rank-1 tokens: equal with λ = 1",
            f"relative difference {value:.1e}",
            told(value < 1e-5),
        ),
        Claim(
            "Its gradient at a forking token of a right answer is shared with the candidates (identity; docs/theory.md, "
            "Objectives)",
            "weights c of the target and the N candidates are γA/(G|y|) times (1-α) and α/N",
            f"relative difference {spread:.1e}",
            told(spread < 1e-5),
        ),
        Claim(
            f"SimKO keeps more of pass@K than GRPO ({PAPER})",
            f"its change of pass@{K} on held-out sums over training is higher than GRPO's with the same seed, interval above 0",
            f"{', '.join(change['pass_K'])}, difference {more['pass_K'].words()}",
            above(more["pass_K"]),
        ),
        Claim(
            f"at no cost in pass@1 ({PAPER})",
            f"its change of pass@1 on held-out sums is below GRPO's by no more than {MARGIN:g}, the difference's interval too",
            f"{', '.join(change['pass_1'])}, difference {more['pass_1'].words()}",
            above(more["pass_1"], -MARGIN),
        ),
        Claim(
            f"because it concentrates less ({PAPER})",
            "its change of the top-1 mass is lower than GRPO's with the same seed, interval below 0",
            f"{', '.join(change['top_1'])}, difference {more['top_1'].words()}",
            below(more["top_1"]),
        ),
    ]
    return Result(
        f"With the paper's constants SimKO changes pass@{K} by {more['pass_K'].mean:+.3f} and the top-1 mass by "
        f"{more['top_1'].mean:+.3f} against GRPO",
        claims, {"training": pa.Table.from_pylist(curves)}, {"simko": _figure(curves, more)},
        notes=f"{problems} sums and as many held out, of each seed its own; G = {G} rollouts, "
        f"{max(row['step'] for row in curves)} steps; α = .01, λ = 1.1, N = 3, forking tokens above the .8 quantile of an "
        f"answer's entropy. On the sums trained on the differences are pass@1 {_trained_on(curves, 'pass_1')}, pass@{K} "
        f"{_trained_on(curves, 'pass_K')}.",
    )  # fmt: skip


def _trained_on(curves: list[dict[str, Any]], key: str) -> str:
    """SimKO's gain minus GRPO's on the sums that both learned from, in words."""
    mine, theirs = (gains(curves, name, key, TRAINED) for name in ("SimKO", "GRPO"))
    return estimate(a - b for a, b in zip(mine, theirs, strict=True)).words()


def _identities(model: Any, chis: list[td.Chi]) -> tuple[float, float]:
    """Relative errors of both identities on sampled answers, at ratios γ within the clip but not 1; the second in float64."""
    parts = training.log_probs(model, chis)
    chis = [chi.with_(old_log_probs=lp + torch.linspace(-0.1, 0.1, len(lp))) for chi, lp in zip(chis, parts, strict=True)]
    simko, grpo = td.objectives.SimKO(lam=1.0), td.objectives.GRPO()
    with torch.no_grad():
        a, b = loss(model, chis, simko), loss(model, chis, grpo)
        log_pi = training.logits(model, chis).double().log_softmax(1)
    size = sum(chi.advantage**2 for chi in chis if chi.advantage) ** 0.5
    values, candidates = log_pi.topk(simko.n_candidates)
    scores = Scores(entropy=-(log_pi.exp() * log_pi).sum(1), candidates=candidates, candidate_log_probs=values)
    log_probs = log_pi.gather(1, training.targets(chis)[:, None]).squeeze(1)
    shared, plain = simko.g_terms(log_probs, chis, scores).c, grpo.g_terms(log_probs, chis).c
    forked = shared[:, 1].abs() > 0
    assert forked.any() and bool((plain[forked] > 0).all())
    shares = torch.tensor([1 - simko.alpha, *[simko.alpha / simko.n_candidates] * simko.n_candidates], dtype=torch.float64)
    truth = plain[forked, None] * shares
    return float((a - b).abs()) / size, float((shared[forked] - truth).norm() / truth.norm())


def _figure(curves: list[dict[str, Any]], more: dict[str, Estimate]) -> Any:
    title = f"SimKO against GRPO on half-solved sums: pass@1 {more['pass_1'].mean:+.3f}, pass@{K} {more['pass_K'].mean:+.3f}"
    made, axes = figure(1, 4, title=title, width=12, height=3.2)
    steps = sorted({row["step"] for row in curves})
    for axis, (key, label) in zip(axes, PANELS.items(), strict=True):
        for name, colour in (("GRPO", VERMILION), ("SimKO", BLUE)):
            band(axis, steps, lines(curves, name, key), colour, name)
        axis.set(xlabel="training step", ylabel=label)
    axes[0].legend()
    return made
