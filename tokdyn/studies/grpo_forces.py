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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tokdyn as td

from ..interventions import loss, nthr, nthr_scores
from ..loading import load_model
from ..testing import float64
from . import arithmetic, training
from .figures import BLUE, COLOURS, GREEN, GREY, VERMILION, band, figure
from .result import Claim, Estimate, Result, estimate

PAPER = "arXiv 2505.18830"
STEPS = ("GRPO", "Pos-only", "NTHR", "random tokens")
SAMPLED, SHARED, FAR = KINDS = ("sampled", "shared working", "long context")
LIFT = 0.005  # nats a token by which Pos-only lifts the right answers in one step, to first order
G = 8  # rollouts a prompt
K = 4  # of pass@K
LR = 1e-4  # of 3e-5, 1e-4 and 3e-4 the one with the highest pass@1 after 40 steps of GRPO at seed 100


def run(quick: bool = False, seed: int = 0) -> Result:
    """One step per prompt in four ways, then training in three ways.

    Args:
        quick: 4 prompts, one seed of 2 small training steps; else 24 prompts, five seeds of 30 steps, a 1,000-token context.
        seed: of the problems and of the first run.
    """
    model, tokenizer = load_model()
    sums = arithmetic.problems(seed, 12 if quick else 48)
    taught = arithmetic.half_taught(model, tokenizer, sums, seed=seed)
    rollouts = arithmetic.roll_out(taught, tokenizer, sums, G, seed=seed)
    mixed = [g for g in range(len(sums)) if _mixed(rollouts.of(g))][: 4 if quick else 24]
    one_step = [{"rollouts": SAMPLED, "prompt": g} | _displacement(taught, rollouts.of(g), seed) for g in mixed]
    one_step += [{"rollouts": SHARED, "prompt": g} | _displacement(taught, worked(tokenizer, s, g), seed)
                 for g, s in enumerate(sums[: 3 if quick else 24])]  # fmt: skip
    if not quick:
        one_step += _long(taught, tokenizer, sums, seed)
    curves = []
    for run_seed in range(seed, seed + (1 if quick else 5)):
        for name in ("GRPO", "Pos-only", "NTHR"):
            schedule = Schedule(2, 2, 4, 8) if quick else Schedule(30, 10, 8, 16)
            rows = train(taught, tokenizer, sums, name, schedule, seed=run_seed)
            curves += [{"method": name, "seed": run_seed} | row for row in rows]
    with float64():
        gap = _identity(copy.deepcopy(taught).double(), rollouts.of(mixed[0]))
    return conclude(one_step, curves, gap, f"{len(sums)} sums of two numbers, {rollouts.rewards.mean():.0%} of sampled answers "
                    "right before GRPO")  # fmt: skip


def conclude(one_step: list[dict[str, Any]], curves: list[dict[str, Any]], gap: float, about: str) -> Result:
    """What the readings say."""
    import pyarrow as pa

    of = {kind: [row for row in one_step if row["rollouts"] == kind] for kind in KINDS}
    of = {kind: rows for kind, rows in of.items() if rows}
    both = {kind: of[kind] for kind in (SAMPLED, SHARED)}
    lift = {kind: {name: estimate(row[name] for row in rows) for name in STEPS} for kind, rows in of.items()}
    held = {kind: estimate(row["Pos-only"] - row["GRPO"] for row in rows) for kind, rows in of.items()}
    taken = {kind: 100 * held[kind].mean / lift[kind]["Pos-only"].mean for kind in of}
    against = {other: {kind: estimate(row["NTHR"] - row[other] for row in rows) for kind, rows in both.items()}
               for other in ("GRPO", "random tokens")}  # fmt: skip
    order = {kind: td.rank_correlation(*(torch.tensor([row[f"{how}_negative"] for row in rows]) for how in ("exact", "real")))
             for kind, rows in both.items()}  # fmt: skip
    ranks = {kind: estimate(row["nthr_rank"] for row in rows if row["nthr_rank"] == row["nthr_rank"])
             for kind, rows in both.items()}  # fmt: skip
    fell = sum(row["GRPO"] < 0 for row in of[SAMPLED])
    claims = [
        Claim(
            "An NTHR score is a gradient product (identity; theory §3, re-derived from the paper's eq.)",
            "s_k = <∇_W Σ log pi(right answers), ∇_W log pi(y_k)> with W the readout, in float64 to 1e-12",
            f"relative difference {gap:.1e}",
            gap < 1e-12,
        ),
        Claim(
            f"The negative gradient holds the right answers back (LLD; {PAPER} §4)",
            "after one step on sampled answers the right ones rose more under Pos-only than under GRPO, mean over prompts",
            f"Pos-only {_words(lift[SAMPLED]['Pos-only'])}, GRPO {_words(lift[SAMPLED]['GRPO'])}; the negative gradient takes "
            f"{taken[SAMPLED]:.0f}% of the lift in the mean and something at "
            f"{sum(row['Pos-only'] > row['GRPO'] for row in of[SAMPLED])} of {len(of[SAMPLED])} prompts; right answers fall at "
            f"{fell}",
            held[SAMPLED].low > 0,
        ),
        Claim(
            f"Where wrong answers share the working of right ones it takes the lift away ({PAPER} §4, its mechanism)",
            "Pos-only minus GRPO above 0 over constructed answers that differ in the last number only; the pushes on all "
            "other tokens cancel by construction",
            f"{_words(held[SHARED])} of {LIFT:g} that Pos-only gives at first order",
            held[SHARED].low > 0,
        ),
        Claim(
            "The exact force of the wrong answers' tokens says what they do to the right ones (theory §5)",
            "rank correlation over prompts of the exact negative force with what a real step owes to it: 0.9 or more, for each "
            "kind of answers",
            "; ".join(f"{kind} {order[kind]:.3f} over {len(rows)} prompts" for kind, rows in both.items()),
            all(value >= 0.9 for value in order.values()),
        ),
        Claim(
            f"NTHR finds the harmful tokens ({PAPER} §5)",
            "rank correlation of its score with the exact harm (all parameters) over the tokens of wrong answers: above 0, for "
            "each kind of answers",
            _each(ranks),
            all(value.low > 0 for value in ranks.values()),
        ),
        Claim(
            f"Reweighting NTHR's tokens lowers the displacement ({PAPER} §5; theory §5)",
            "right answers rise more under NTHR than under GRPO, mean over prompts, for each kind of answers",
            f"NTHR minus GRPO: {_each(against['GRPO'], 'nats a token')}",
            all(value.low > 0 for value in against["GRPO"].values()),
        ),
        Claim(
            f"and that because of which tokens it spares ({PAPER}, random control)",
            "they rise more under NTHR than when as many random tokens of wrong answers are spared, for each kind of answers",
            f"NTHR minus random: {_each(against['random tokens'], 'nats a token')}",
            all(value.low > 0 for value in against["random tokens"].values()),
        ),
        *_far(of.get(FAR, [])),
        *_trained(curves),
    ]
    return Result(
        f"Pushing wrong answers down changes the right ones' lift in a GRPO step by {-taken[SAMPLED]:+.0f}%, and by "
        f"{-taken[SHARED]:+.0f}% where they share their working",
        claims, {"one_step": pa.Table.from_pylist(one_step), "training": pa.Table.from_pylist(curves)},
        {"grpo_forces": _figure(of[SAMPLED] + of[SHARED], curves, taken[SAMPLED], taken[SHARED])},
        notes=f"{about}; {len(of[SAMPLED])} prompts have right and wrong answers among G = {G}. One step has the size at which "
        f"Pos-only lifts the right answers by {LIFT:g} nats a token, the same for all four ways.",
    )  # fmt: skip


def _words(value: Estimate) -> str:
    return value.words("nats a token", of="prompts")


def _each(values: dict[str, Estimate], unit: str = "") -> str:
    return "; ".join(f"{kind} {value.words(unit, of='prompts')}" for kind, value in values.items())


# ---------------------------------------------------------------- one step


def _mixed(chis: list[td.Chi]) -> bool:
    return len({chi.advantage > 0 for chi in chis if chi.advantage}) == 2


def _sign(chis: list[td.Chi]) -> Tensor:
    return torch.cat([torch.full((len(chi),), float(chi.advantage or 0)).sign() for chi in chis])


def weights_of(method: str, chis: list[td.Chi], spare: Tensor, seed: int) -> Tensor:
    """Weights of the update tokens for one way to take the step; `spare` are NTHR's."""
    sign = _sign(chis)
    if method == "Pos-only":
        return (sign > 0).float()
    if method == "random tokens":
        wrong, n = (sign < 0).nonzero().squeeze(1), int((spare < 1).sum())
        chance = torch.ones_like(spare)
        chance[wrong[torch.randperm(len(wrong), generator=torch.Generator().manual_seed(seed))[:n]]] = 0.5
        return chance
    return spare if method == "NTHR" else torch.ones_like(sign)


def _displacement(model: Any, chis: list[td.Chi], seed: int) -> dict[str, Any]:
    """Exact forces of right and wrong tokens on the right answers, and what real steps do to those."""
    objective = td.objectives.GRPO()
    right = [chi for chi in chis if chi.advantage is not None and chi.advantage > 0]
    M = sum(len(chi) for chi in right)
    sign = _sign(chis)
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
    """Answers to a sum of three numbers that share their working: four times the right one, and four wrong last numbers."""
    first, more = s.a + s.b, 3 + group % 4
    last = first + more
    prompt = f"Human: What is {s.a} + {s.b} + {more}?\n\nAssistant:"
    numbers = (*[last] * 4, last + 1, last - 1, last + 2, last - 2)
    said = [f" {s.a} + {s.b} = {first}. {first} + {more} = {n}." for n in numbers]
    return td.rollouts(tokenizer, prompt, said, [1.0] * 4 + [0.0] * 4, group=group)


def _long(model: Any, tokenizer: Any, sums: list[arithmetic.Sum], seed: int, n: int = 4) -> list[dict[str, Any]]:
    """The same behind a context of about 1,000 tokens of solved sums."""
    others = [s for s in arithmetic.problems(seed + 1, 140) if s not in sums]
    shown, before = 0, ""
    while shown < len(others) and len(tokenizer(before).input_ids) < 960:
        before += others[shown].prompt + others[shown].answer(shown % 3) + "\n\n"
        shown += 1
    rollouts = arithmetic.roll_out(model, tokenizer, sums[:16], G, seed=seed, before=before)
    mixed = [g for g in range(16) if _mixed(rollouts.of(g))][:n]
    return [{"rollouts": FAR, "prompt": g} | _displacement(model, rollouts.of(g), seed) for g in mixed]


def _far(rows: list[dict[str, Any]]) -> list[Claim]:
    """Of the steps behind a long context, in the full form."""
    if not rows:
        return []
    off = [abs(row["exact_positive"] + row["exact_negative"] - row["GRPO"]) / abs(row["GRPO"]) for row in rows]
    lift = {name: estimate(row[name] for row in rows) for name in STEPS}
    return [
        Claim(
            "Behind a context of 1,000 tokens the exact forces predict the step as well (theory §5)",
            "positive and negative force together give GRPO's real change of the right answers within a tenth, at every prompt",
            f"off by at most {100 * max(off):.1f}% at {len(rows)} prompts behind {rows[0]['tokens']} tokens; "
            + ", ".join(f"{name} {_words(value)}" for name, value in lift.items()),
            max(off) <= 0.1,
        )
    ]


def _identity(model: Any, chis: list[td.Chi]) -> float:
    """NTHR's scores against gradients of the readout taken one by one, hidden states held."""
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


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Schedule:
    """How long a policy is trained and how it is read.

    Attributes:
        steps: optimizer steps.
        every: steps from one reading to the next; the last step is read too.
        prompts: problems of a step, each answered G times.
        samples: fresh answers to every problem for a reading.
    """

    steps: int
    every: int
    prompts: int
    samples: int


def train(
    model: Any, tokenizer: Any, sums: list[arithmetic.Sum], method: str, schedule: Schedule, *, seed: int,
    objective: td.objectives.GRPO | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Readings {step, pass@1, pass@K, top-1 mass, entropy} of a copy of the model that learns from its own answers.

    Args:
        model, tokenizer: where the policy starts.
        sums: the problems.
        method: "GRPO", "Pos-only", "NTHR" or "random tokens" (`weights_of`), or any name for the objective unweighted.
        schedule: steps and readings.
        seed: of batches and samples.
        objective: GRPO's loss when absent.
    """
    policy = copy.deepcopy(model)
    optimizer, rows = training.adam(policy, LR), []
    objective = objective or td.objectives.GRPO()
    steps, prompts = schedule.steps, schedule.prompts
    batches = list(training.batches(sums, prompts, seed, epochs=1 + steps * prompts // len(sums)))
    for n in range(steps + 1):
        if n % schedule.every == 0 or n == steps:
            rows.append({"step": n} | reading(policy, tokenizer, sums, schedule.samples, seed))
        if n < steps:
            rollouts = arithmetic.roll_out(policy, tokenizer, batches[n], G, seed=1000 * seed + n).chis
            learned = [chi for chi in rollouts if chi.advantage]
            if learned:
                spare = nthr(policy, learned) if method == "NTHR" else torch.ones(0)
                weights = weights_of(method, learned, spare, seed)
                training.step(policy, optimizer, objective, learned, mean_over=len(batches[n]), weights=weights)
    return rows


@torch.no_grad()
def reading(model: Any, tokenizer: Any, sums: list[arithmetic.Sum], n: int, seed: int) -> dict[str, float]:
    """pass@1 and pass@K of n fresh samples, the top-1 mass and the entropy along them, and how many answers differ."""
    sampled = arithmetic.roll_out(model, tokenizer, sums, n, seed=seed + 10**6)
    mass, entropy = [], []
    for start in range(0, len(sampled.chis), 128):
        some = sampled.chis[start : start + 128]
        stats = td.ops.token_stats(training.logits(model, some), training.targets(some))
        mass.append(stats.argmax_log_prob.exp())
        entropy.append(stats.entropy)
    texts = {(chi.group, chi.response) for chi in sampled.chis}
    return {"pass_1": arithmetic.pass_at(sampled.rewards, 1), "pass_K": arithmetic.pass_at(sampled.rewards, K), "K": K,
            "top_1": float(torch.cat(mass).mean()), "entropy": float(torch.cat(entropy).mean()),
            "answers": len(texts) / len(sums)}  # fmt: skip


def gains(curves: list[dict[str, Any]], method: str, key: str) -> list[float]:
    """Last minus first reading of each seed."""
    found: dict[int, list[float]] = {}
    for row in curves:
        if row["method"] == method:
            found.setdefault(row["seed"], []).append(row[key])
    return [values[-1] - values[0] for values in found.values()]


def gained(curves: list[dict[str, Any]], method: str, other: str, key: str) -> Estimate:
    """How much more a method gains than another one with the same seed."""
    return estimate(a - b for a, b in zip(gains(curves, method, key), gains(curves, other, key), strict=True))


def _trained(curves: list[dict[str, Any]]) -> list[Claim]:
    first, top, many = (estimate(gains(curves, "GRPO", key)) for key in ("pass_1", "top_1", "pass_K"))
    other = {name: gained(curves, name, "GRPO", "pass_1") for name in ("Pos-only", "NTHR")}

    def others(key: str) -> list[tuple[str, Estimate]]:
        return [(name, estimate(gains(curves, name, key))) for name in other]

    return [
        Claim(
            "GRPO raises pass@1 and sharpens: the most likely token's mass grows (arXiv 2510.14807 §3)",
            "both rise over training, intervals above 0",
            f"pass@1 {first.words()}, top-1 mass {top.words()}; top-1 mass under "
            + ", ".join(f"{name} {value.words()}" for name, value in others("top_1")),
            first.low > 0 and top.low > 0,
        ),
        Claim(
            "and pays with pass@K (arXiv 2510.14807 §3)",
            f"pass@{K} falls over training, its interval below 0",
            f"pass@{K} {many.words()}; " + ", ".join(f"{name} {value.words()}" for name, value in others("pass_K")),
            many.high < 0,
        ),
        Claim(
            f"NTHR trains better than GRPO ({PAPER} §6)",
            "it gains more pass@1 than GRPO with the same seed, the difference's interval above 0",
            f"GRPO {first.words()}; against it " + ", ".join(f"{name} {value.words()}" for name, value in other.items()),
            other["NTHR"].low > 0,
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
            of: dict[int, list[float]] = {}
            for row in curves:
                if row["method"] == method:
                    of.setdefault(row["seed"], []).append(row[key])
            band(panel, steps, list(of.values()), COLOURS[k], method + label, linestyle=line)
    right.set(xlabel="training step", ylabel="share of problems", title="training")
    mass.set(xlabel="training step", ylabel="probability", title="mass of the most likely token")
    for panel in (right, mass):
        panel.legend(fontsize=7)
    return made
