"""What GRPO's negative gradient does to the right answers it comes with, token by token: does it hold them back?

Deng et al., *On the Effect of Negative Gradient in GRPO* (arXiv 2505.18830): after a step on a group of rollouts the right
answers' log-probability rises less than it could, or falls (lazy likelihood displacement, LLD), because wrong answers that
share tokens with right ones are pushed down. Training on the right answers alone (Pos-only) has no LLD; NTHR finds the shared
tokens by the readout's force and scales their gradient down. Here on sums that the demo model half solves: per prompt, exact
forces of the right and of the wrong answers' tokens, real steps of GRPO, Pos-only, NTHR and of a control that spares as many
random tokens; then training with pass@1, pass@K and the mass of the most likely token.

Asserted: NTHR's score is the gradient product it claims to be. Measured, for sampled answers and for constructed ones that
share their working: LLD, what the exact force of the wrong answers foretells, and what sparing NTHR's tokens changes. Where
right and wrong answers part at one number, pushing the wrong one down also makes room for the right one; with shared working
the shared tokens are pulled up and pushed down alike.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokdyn as td

from ..interventions import loss, nthr, nthr_scores
from ..loading import load_model
from ..testing import float64
from . import arithmetic, training
from .figures import BLUE, COLOURS, GREEN, GREY, VERMILION, band, figure
from .grpo_training import TRAINED, G, K, Schedule, gained, gains, lines, signs, train, weights_of
from .parts import Keep, unkept
from .result import Claim, Estimate, Result, above, below, both, estimate, jackknife, told

PAPER = "arXiv 2505.18830"
STEPS = ("GRPO", "Pos-only", "NTHR", "random tokens")
SAMPLED, SHARED, FAR = KINDS = ("sampled", "shared working", "long context")
LIFT = 0.005  # nats a token by which Pos-only lifts the right answers in one step, to first order


def run(quick: bool = False, seed: int = 0, keep: Keep = unkept, runs: int | None = None) -> Result:
    """One step per prompt in four ways, then training in three ways.

    Args:
        quick: 4 prompts, one seed of 2 small training steps; else 24 prompts, six seeds of 30 steps, a 1,000-token context.
        seed: of the first run, whose policy takes the single steps.
        keep: where finished parts are kept (`parts`).
        runs: how many, each with a seed of its own; as above when absent.
    """
    model, tokenizer = load_model()
    n = 8 if quick else 48
    schedule = Schedule(2, 2, 4, 8) if quick else Schedule(30, 15, 8, 16)
    seeds = range(seed, seed + (runs or (1 if quick else 6)))
    curves = [row for s in seeds for row in keep(f"seed-{s}", partial(_training, model, tokenizer, n, schedule, s))]
    steps = keep("steps", partial(_steps, model, tokenizer, n, quick, seed))
    return conclude(steps["one_step"], curves, steps["gap"], steps["about"])


def _training(model: Any, tokenizer: Any, n: int, schedule: Schedule, seed: int) -> list[dict[str, Any]]:
    """Readings of three trainings from one taught policy, on sums of the seed's own."""
    sums, unseen = arithmetic.halves(seed, n)
    taught = arithmetic.half_taught(model, tokenizer, sums + unseen, seed=seed)
    return [
        {"method": name, "seed": seed} | row
        for name in ("GRPO", "Pos-only", "NTHR")
        for row in train(taught, tokenizer, sums, unseen, name, schedule, seed=seed)
    ]


def _steps(model: Any, tokenizer: Any, n: int, quick: bool, seed: int) -> dict[str, Any]:
    """Rows of single steps on sampled and constructed answers, and the error of NTHR's identity."""
    sums, unseen = arithmetic.halves(seed, n)
    taught = arithmetic.half_taught(model, tokenizer, sums + unseen, seed=seed)
    rollouts = arithmetic.roll_out(taught, tokenizer, sums, G, seed=seed)
    mixed = [g for g in range(len(sums)) if _mixed(rollouts.of(g))][: 4 if quick else 24]
    one_step = [{"rollouts": SAMPLED, "prompt": g} | _displacement(taught, rollouts.of(g), seed) for g in mixed]
    one_step += [{"rollouts": SHARED, "prompt": g} | _displacement(taught, worked(tokenizer, s, g), seed)
                 for g, s in enumerate(sums[: 3 if quick else 24])]  # fmt: skip
    if not quick:
        one_step += _long(taught, tokenizer, sums, seed)
    with float64():
        gap = _identity(copy.deepcopy(taught).double(), rollouts.of(mixed[0]))
    about = f"{n} sums of two numbers and as many held out, {rollouts.rewards.mean():.0%} of sampled answers right before GRPO"
    return {"one_step": one_step, "gap": gap, "about": about}


def conclude(one_step: list[dict[str, Any]], curves: list[dict[str, Any]], gap: float, about: str) -> Result:
    """The study's claims and figure, from one row a prompt for the single steps and one a reading for the trainings.

    Args:
        one_step: rows of `_displacement`, with "rollouts" (one of KINDS) and "prompt".
        curves: rows of `train`, with "method" and "seed".
        gap: relative difference of NTHR's scores and the gradients' products.
        about: a sentence on the problems.
    """
    import pyarrow as pa

    of = {kind: [row for row in one_step if row["rollouts"] == kind] for kind in KINDS}
    of = {kind: rows for kind, rows in of.items() if rows}
    short = {kind: of[kind] for kind in (SAMPLED, SHARED)}
    lift = {kind: {name: estimate((row[name] for row in rows), "prompts") for name in STEPS} for kind, rows in of.items()}
    held = {kind: estimate((row["Pos-only"] - row["GRPO"] for row in rows), "prompts") for kind, rows in of.items()}
    taken = {kind: 100 * held[kind].mean / lift[kind]["Pos-only"].mean for kind in of}
    identity = Claim(
        "An NTHR score is a gradient product (identity; docs/theory.md, The kernel)",
        "s_k = <∇_W Σ log pi(right answers), ∇_W log pi(y_k)> with W the readout, in float64 to 1e-12",
        f"relative difference {gap:.1e}",
        told(gap < 1e-12),
    )
    return Result(
        f"Pushing wrong answers down changes the right ones' lift in a GRPO step by {-taken[SAMPLED]:+.0f}%, and by "
        f"{-taken[SHARED]:+.0f}% where they share their working",
        [identity, *_displaced(of[SAMPLED], lift, held, taken[SAMPLED]), *_spared(short), *_far(of.get(FAR, [])),
         *_trained(curves)],
        {"one_step": pa.Table.from_pylist(one_step), "training": pa.Table.from_pylist(curves)},
        {"grpo_forces": _figure(of[SAMPLED] + of[SHARED], curves, taken[SAMPLED], taken[SHARED])},
        notes=f"{about}; {len(of[SAMPLED])} prompts have right and wrong answers among G = {G}. One step has the size at which "
        f"Pos-only lifts the right answers by {LIFT:g} nats a token, the same for all four ways. On the sums trained on pass@1 "
        f"changes under GRPO by {estimate(gains(curves, 'GRPO', 'pass_1', TRAINED)).words()}, pass@{K} by "
        f"{estimate(gains(curves, 'GRPO', 'pass_K', TRAINED)).words()}.",
    )  # fmt: skip


def _displaced(
    sampled: list[dict[str, Any]], lift: dict[str, dict[str, Estimate]], held: dict[str, Estimate], taken: float
) -> list[Claim]:
    """Claims about one step: how much of the right answers' lift the negative gradient takes (`taken`, percent)."""
    fell = sum(row["GRPO"] < 0 for row in sampled)
    return [
        Claim(
            f"The negative gradient holds the right answers back (LLD; {PAPER} §4)",
            "after one step on sampled answers the right ones rose more under Pos-only than under GRPO, mean over prompts",
            f"Pos-only {_words(lift[SAMPLED]['Pos-only'])}, GRPO {_words(lift[SAMPLED]['GRPO'])}; the negative gradient takes "
            f"{taken:.0f}% of the lift in the mean and something at "
            f"{sum(row['Pos-only'] > row['GRPO'] for row in sampled)} of {len(sampled)} prompts; right answers fall at "
            f"{fell}",
            above(held[SAMPLED]),
        ),
        Claim(
            f"Where wrong answers share the working of right ones it takes the lift away ({PAPER} §4, its mechanism)",
            "Pos-only minus GRPO above 0 over constructed answers that differ in the last number only; the pushes on all "
            "other tokens cancel by construction",
            f"{_words(held[SHARED])} of {LIFT:g} that Pos-only gives at first order",
            above(held[SHARED]),
        ),
    ]


def _spared(kinds: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    """Claims about which tokens harm the right answers, by exact forces and by NTHR, for each kind of answers."""
    order = {kind: jackknife(rows, _foretold, "prompts") for kind, rows in kinds.items()}
    ranks = {kind: estimate((row["nthr_rank"] for row in rows if not math.isnan(row["nthr_rank"])), "prompts")
             for kind, rows in kinds.items()}  # fmt: skip
    against = {other: {kind: estimate((row["NTHR"] - row[other] for row in rows), "prompts") for kind, rows in kinds.items()}
               for other in ("GRPO", "random tokens")}  # fmt: skip
    return [
        Claim(
            "The exact force of the wrong answers' tokens says what they do to the right ones (docs/theory.md, Phenomena)",
            "rank correlation over prompts of the exact negative force with what a real step owes to it: above 0.9, for each "
            "kind of answers, intervals too",
            _each(order),
            both(*(above(value, 0.9) for value in order.values())),
        ),
        Claim(
            f"NTHR finds the harmful tokens ({PAPER} §5)",
            "rank correlation of its score with the exact harm (all parameters) over the tokens of wrong answers: above 0, for "
            "each kind of answers",
            _each(ranks),
            both(*map(above, ranks.values())),
        ),
        Claim(
            f"Reweighting NTHR's tokens lowers the displacement ({PAPER} §5; docs/theory.md, Phenomena)",
            "right answers rise more under NTHR than under GRPO, mean over prompts, for each kind of answers",
            f"NTHR minus GRPO: {_each(against['GRPO'], 'nats a token')}",
            both(*map(above, against["GRPO"].values())),
        ),
        Claim(
            f"and that because of which tokens it spares ({PAPER}, random control)",
            "they rise more under NTHR than when as many random tokens of wrong answers are spared, for each kind of answers",
            f"NTHR minus random: {_each(against['random tokens'], 'nats a token')}",
            both(*map(above, against["random tokens"].values())),
        ),
    ]


def _foretold(rows: Sequence[dict[str, Any]]) -> float:
    """Rank correlation over prompts of the wrong answers' exact force with what a real step owes to it."""
    exact, real = (torch.tensor([row[f"{how}_negative"] for row in rows]) for how in ("exact", "real"))
    return td.rank_correlation(exact, real)


def _words(value: Estimate) -> str:
    return value.words("nats a token")


def _each(values: dict[str, Estimate], unit: str = "") -> str:
    return "; ".join(f"{kind} {value.words(unit)}" for kind, value in values.items())


def _mixed(chis: list[td.Chi]) -> bool:
    """Whether there are both right and wrong answers."""
    return len({chi.advantage > 0 for chi in chis if chi.advantage}) == 2


def _displacement(model: Any, chis: list[td.Chi], seed: int) -> dict[str, Any]:
    """The right answers of one prompt: exact forces on them from right and wrong tokens, and their change in real steps."""
    objective = td.objectives.GRPO()
    right = [chi for chi in chis if chi.advantage is not None and chi.advantage > 0]
    M = sum(len(chi) for chi in right)
    sign = signs(chis)
    F = td.forces(model, chis, right, objective, groups=torch.where(sign > 0, 0, torch.where(sign < 0, 1, -1))).matrix
    assert F is not None
    positive, negative = (F.sum(0) / M).tolist()
    eta = LIFT / abs(positive)
    before = torch.cat(training.log_probs(model, right)).mean()
    parameters = list(model.parameters())
    moved: dict[str, float] = {}
    spare = nthr(model, chis)
    for name in STEPS:
        weights = weights_of(name, chis, spare, seed)
        move = torch.autograd.grad(loss(model, chis, objective, weights=weights), parameters)
        with torch.no_grad():
            kept = [theta.clone() for theta in parameters]
            for theta, g in zip(parameters, move, strict=True):
                theta.sub_(eta * g)
            moved[name] = float(torch.cat(training.log_probs(model, right)).mean() - before)
            for theta, old in zip(parameters, kept, strict=True):
                theta.copy_(old)
    wrong = [chi for chi in chis if chi.advantage is not None and chi.advantage < 0]
    scores = nthr_scores(model, chis)[sign < 0]
    exact = td.forces(model, wrong, right, td.objectives.SFT(), reduce="observe").vector
    assert exact is not None
    return moved | {"share_right": len(right) / len(chis), "exact_positive": eta * positive, "exact_negative": eta * negative,
                    "real_negative": moved["GRPO"] - moved["Pos-only"], "nthr_rank": td.rank_correlation(scores, exact),
                    "nthr_sign": td.sign_delta(scores, exact), "tokens": int(chis[0].ids.numel())}  # fmt: skip


def worked(tokenizer: Any, s: arithmetic.Sum, group: int) -> list[td.Chi]:
    """Eight answers to a sum of three numbers that differ in the last number only: four right ones and four wrong ones."""
    first, more = s.a + s.b, 3 + group % 4
    last = first + more
    prompt = f"Human: What is {s.a} + {s.b} + {more}?\n\nAssistant:"
    numbers = (*[last] * 4, last + 1, last - 1, last + 2, last - 2)
    said = [f" {s.a} + {s.b} = {first}. {first} + {more} = {n}." for n in numbers]
    return td.rollouts(tokenizer, prompt, said, [1.0] * 4 + [0.0] * 4, group=group)


def _long(model: Any, tokenizer: Any, sums: list[arithmetic.Sum], seed: int, n: int = 4) -> list[dict[str, Any]]:
    """The rows of `_displacement` for up to n prompts behind about 1,000 tokens of solved sums."""
    others = [s for s in arithmetic.problems(seed + 1, 140) if s not in sums]
    shown, before = 0, ""
    while shown < len(others) and len(tokenizer(before).input_ids) < 960:
        before += others[shown].prompt + others[shown].answer(shown % 3) + "\n\n"
        shown += 1
    rollouts = arithmetic.roll_out(model, tokenizer, sums[:16], G, seed=seed, before=before)
    mixed = [g for g in range(16) if _mixed(rollouts.of(g))][:n]
    return [{"rollouts": FAR, "prompt": g} | _displacement(model, rollouts.of(g), seed) for g in mixed]


def _far(rows: list[dict[str, Any]]) -> list[Claim]:
    """The claim about steps behind a long context, which only the full form takes."""
    if not rows:
        return []
    off = [abs(row["exact_positive"] + row["exact_negative"] - row["GRPO"]) / abs(row["GRPO"]) for row in rows]
    lift = {name: estimate((row[name] for row in rows), "prompts") for name in STEPS}
    return [
        Claim(
            "Behind a context of 1,000 tokens the exact forces predict the step as well (docs/theory.md, Phenomena)",
            "positive and negative force together give GRPO's real change of the right answers within a tenth, at every prompt",
            f"off by at most {100 * max(off):.1f}% at {len(rows)} prompts behind {rows[0]['tokens']} tokens; "
            + ", ".join(f"{name} {_words(value)}" for name, value in lift.items()),
            told(max(off) <= 0.1),
        )
    ]


def _identity(model: Any, chis: list[td.Chi]) -> float:
    """Relative error of NTHR's scores against gradients of the readout by autograd, token by token, hidden states constant."""
    scores = nthr_scores(model, chis)
    W = model.get_output_embeddings().weight
    hidden = [model(input_ids=chi.ids[None], output_hidden_states=True, use_cache=False).hidden_states[-1][0] for chi in chis]
    hidden = [h[chi.scored.nonzero().squeeze(1) - 1].double() for h, chi in zip(hidden, chis, strict=True)]
    leaf = W.detach().double().requires_grad_()

    def log_pi(i: int) -> Tensor:
        return (hidden[i] @ leaf.T).log_softmax(1).gather(1, chis[i].ids[chis[i].scored][:, None]).squeeze(1)

    right = torch.stack([log_pi(i).sum() for i, chi in enumerate(chis) if chi.advantage and chi.advantage > 0]).sum()
    (toward,) = torch.autograd.grad(right, leaf)
    truth = torch.stack([(toward * torch.autograd.grad(value, leaf, retain_graph=True)[0]).sum()
                         for i in range(2) for value in log_pi(i)])  # fmt: skip
    return float((scores[: len(truth)] - truth).norm() / truth.norm())


def _trained(curves: list[dict[str, Any]]) -> list[Claim]:
    """Claims about the trainings: pass@1, pass@K and the top-1 mass."""
    first, top, many = (estimate(gains(curves, "GRPO", key)) for key in ("pass_1", "top_1", "pass_K"))
    other = {name: gained(curves, name, "GRPO", "pass_1") for name in ("Pos-only", "NTHR")}

    def others(key: str) -> list[tuple[str, Estimate]]:
        return [(name, estimate(gains(curves, name, key))) for name in other]

    return [
        Claim(
            "GRPO raises pass@1 and sharpens: the most likely token's mass grows (arXiv 2510.14807 §3)",
            "both rise over training on held-out sums, intervals above 0",
            f"pass@1 {first.words()}, top-1 mass {top.words()}; top-1 mass under "
            + ", ".join(f"{name} {value.words()}" for name, value in others("top_1")),
            both(above(first), above(top)),
        ),
        Claim(
            "and pays with pass@K (arXiv 2510.14807 §3)",
            f"pass@{K} on held-out sums falls over training, its interval below 0",
            f"pass@{K} {many.words()}; " + ", ".join(f"{name} {value.words()}" for name, value in others("pass_K")),
            below(many),
        ),
        Claim(
            f"NTHR trains better than GRPO ({PAPER} §6)",
            "it gains more pass@1 on held-out sums than GRPO with the same seed, the difference's interval above 0",
            f"GRPO {first.words()}; against it " + ", ".join(f"{name} {value.words()}" for name, value in other.items()),
            above(other["NTHR"]),
        ),
    ]  # fmt: skip


def _figure(one_step: list[dict[str, Any]], curves: list[dict[str, Any]], taken: float, shared: float) -> Any:
    title = f"The negative gradient changes the right answers' lift by {-taken:+.0f}%, with shared working by {-shared:+.0f}%"
    made, axes = figure(1, 4, title=title, width=14.5, height=3.6)
    left, middle, right, mass = axes
    ordered = sorted(one_step, key=lambda row: (row["rollouts"], row["GRPO"]))
    for name, colour, marker in (("Pos-only", BLUE, "^"), ("NTHR", GREEN, "s"), ("GRPO", VERMILION, "o")):
        left.plot(range(len(ordered)), [row[name] for row in ordered], marker, color=colour, markersize=4, label=name)
    left.axvline(sum(row["rollouts"] == "sampled" for row in one_step) - 0.5, color=GREY, linewidth=0.8, linestyle=":")
    left.axhline(0, color=GREY, linewidth=0.8)
    left.set(xlabel="prompt: sampled rollouts | shared working", ylabel="change of the right answers\n(nats a token)",
             title="one real step")  # fmt: skip
    left.legend()
    for kind, colour in (("sampled", VERMILION), ("shared working", BLUE)):
        rows = [row for row in one_step if row["rollouts"] == kind]
        x, y = [row["exact_negative"] for row in rows], [row["real_negative"] for row in rows]
        middle.scatter(x, y, s=14, color=colour, label=kind)
    middle.axline((0, 0), slope=1, color=GREY, linewidth=0.8)
    middle.locator_params(axis="x", nbins=4)
    middle.set(xlabel="exact force of the wrong answers (nats a token)", ylabel="real change by them (nats a token)",
               title="predicted, one point a prompt")  # fmt: skip
    middle.legend()
    steps = sorted({row["step"] for row in curves})
    shown = ((right, "pass_1", "-", ", pass@1"), (right, "pass_K", "--", f", pass@{K}"), (mass, "top_1", "-", ""))
    for k, method in enumerate(dict.fromkeys(row["method"] for row in curves)):
        for panel, key, line, label in shown:
            band(panel, steps, lines(curves, method, key), COLOURS[k], method + label, linestyle=line)
    right.set(xlabel="training step", ylabel="share of held-out problems", title="training")
    mass.set(xlabel="training step", ylabel="probability", title="mass of the most likely token")
    for panel in (right, mass):
        panel.legend(fontsize=7)
    return made
