"""Pushing an unlikely token down lifts the most likely one and lowers nearly all others: the squeezing effect.

Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), §3.3 and its appendix on squeezing. First a softmax
readout alone: the paper's toy notebook to the last digit, the lemma, what always holds, and sweeps over the peakiness of p and
over p(y⁻). Then the demo model: the exact first-order effect of pushing one token down, through the readout alone and through
all parameters, on every entry of the vocabulary at that token's own place.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

import tokdyn as td

from .figures import BLUE, COLOURS, GREY, ORANGE, VERMILION, band, figure
from .result import Claim, Result, above, both, estimate, told

PAPER = "arXiv 2407.10490 §3.3"
PEAKINESS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
RANKS = (2, 5, 10, 25, 50)  # of y⁻, counted from 1; rank 1 is the argmax
MODEL_RANKS = (2, 30, 1000)
STRENGTH = 0.5


def run(quick: bool = False, seed: int = 0) -> Result:
    """Check the toy's numbers and the lemma, sweep the toy, and measure the demo model."""
    sweep = toy_sweep(draws=50 if quick else 400, seed=seed)
    model = demo_model(pairs=5 if quick else 32, places=1 if quick else 2, seed=seed)
    claims = [*oracle_claims(), *lemma_claims(1000 if quick else 5000, seed), *sweep_claims(sweep), *model_claims(model)]
    return Result(
        "Pushing an unlikely token down feeds the most likely one; the peakier the distribution, the more of all others pay",
        claims,
        {"toy": pa.table(sweep), "demo_model": pa.table(model)},
        {"toy": toy_figure(sweep), "demo-model": model_figure(model)},
        "The paper also says that the argmax gains more the less likely y⁻ is. At a fixed distribution the opposite is true, "
        "exactly and at every step size: a less likely y⁻ frees less mass, and every other token, the argmax included, ends "
        "lower. What varies together with p(y⁻) in such experiments is the peakiness of p, and that does what the paper "
        "says.\n\n"
        "With all parameters of the demo model the law is weaker: what the argmax gains per nat that y⁻ loses differs between "
        "y⁻ "
        f"of rank {MODEL_RANKS[-1]} and of rank {MODEL_RANKS[0]} by {gain(model)}.",
    )


# The toy


def toy() -> tuple[Tensor, dict[str, Tensor]]:
    """X [4] and the three logit vectors [50] of the paper's notebook, drawn in its order from its seed."""
    random = np.random.RandomState(10086)
    X = torch.tensor(random.randn(4))
    uniform, flat = torch.tensor(random.randn(4, 50)), torch.tensor(1 + 0.05 * random.randn(4, 50))
    z = X @ torch.tensor(random.randn(4, 50))
    many_hot = torch.zeros_like(z).index_fill(0, torch.arange(5, 13), 1.0)
    return X, {"uniform": X @ uniform, "flat": X @ flat, "peaky": z + (X @ X) * (many_hot - z.softmax(0))}


def toy_cases() -> dict[str, tuple[Tensor, Tensor, dict[str, Any]]]:
    """The notebook's steps, name -> probabilities [50] before and after, and what squeeze.json says of them."""
    X, logits = toy()
    cases = {}
    for name, case in json.loads(files(__package__).joinpath("squeeze.json").read_text("utf-8"))["cases"].items():
        z, update = logits[next(kind for kind in logits if kind in name)], case["update"]
        asked = [(update[y], sign * update[rate]) for y, rate, sign in (("minus", "lm", -1), ("plus", "lp", 1)) if y in update]
        targets, c = torch.tensor([y for y, _ in asked]), torch.tensor([c for _, c in asked], dtype=torch.float64)
        cases[name] = z.softmax(0), td.squeeze.step(z, targets, c, float(X @ X)).softmax(0), case
    return cases


def oracle_claims() -> list[Claim]:
    """All numbers of squeeze.json: probabilities, entropies, and how many tokens rise and fall."""
    worst, counts, right = 0.0, 0, 0
    for p, q, case in toy_cases().values():
        pairs = [(float(-(p * p.log()).sum()), case["entropy_before"]), (float(-(q * q.log()).sum()), case["entropy_after"])]
        for token, values in case["prob"].items():
            pairs += zip((float(p[int(token)]), float(q[int(token)])), values, strict=True)
        worst = max(worst, *(abs(value / truth - 1) for value, truth in pairs))
        integers = [
            (int((q > p).sum()), case["up"]),
            (int((q < p).sum()), case["down"]),
            (int(p.argmax()), case["argmax_before"]),
        ]
        counts, right = counts + len(integers), right + sum(a == b for a, b in integers)
    return [
        Claim(
            f"The toy experiment of the squeezing effect ({PAPER}, notebook) has these probabilities and entropies.",
            "every number to 1e-6 relative, every count exactly",
            f"largest relative difference {worst:.1e}, {right} of {counts} counts equal",
            told(worst < 1e-6 and right == counts),
        )
    ]


def lemma_claims(rows: int, seed: int) -> list[Claim]:
    """Claims about the lemma's ratio, about every negative step, and the sign rule, on distributions from flat to peaky."""
    g = torch.Generator().manual_seed(seed)
    peak = torch.linspace(0.1, 6, rows, dtype=torch.float64)
    z = torch.randn(rows, 50, dtype=torch.float64, generator=g) * peak[:, None]
    y = torch.randint(0, 50, (rows,), generator=g)
    minus = -torch.ones(rows, dtype=torch.float64)
    p, q = z.softmax(1), td.squeeze.step(z, y, minus, STRENGTH).softmax(1)
    delta = STRENGTH * (p - torch.nn.functional.one_hot(y, 50))
    beta = (delta[:, None, :] - delta[:, :, None]).exp()
    worst = float(((q / p) / (z.exp().sum(1)[:, None] / (beta * z.exp()[:, None, :]).sum(2)) - 1).abs().max())
    seen = td.squeeze.diagnose(z, y, minus, STRENGTH)
    other = z.argmax(1) != y
    falls = int((seen.target_after < seen.target_before).sum())
    rises = int((seen.argmax_gain[other] > 0).sum())
    tiny = td.squeeze.step(z, y, minus, 1e-6).log_softmax(1) - td.squeeze.step(z, y, minus, -1e-6).log_softmax(1)
    others = torch.nn.functional.one_hot(y, 50) == 0
    bound = p.square().sum(1, keepdim=True) - p.gather(1, y[:, None])
    clear = others & ((p - bound).abs() > 1e-9)  # beyond the rounding of the difference, 1e-16 / 2e-6
    agree = float(((tiny < 0) == (p < bound))[clear].double().mean())
    return [
        Claim(
            f"After a negative step p'_i/p_i = Σ_j exp z_j / Σ_j β_j exp z_j ({PAPER}, lemma).",
            "equal to rounding",
            f"largest relative difference {worst:.1e} over {rows} distributions of 50 tokens",
            told(worst < 1e-12),
        ),
        Claim(
            f"A negative step always lowers its own token, and always lifts the argmax when that is another token ({PAPER}).",
            "every time",
            f"own token fell in {falls} of {rows} steps, the argmax rose in {rises} of {int(other.sum())}",
            told(falls == rows and rises == int(other.sum())),
        ),
        Claim(
            "To first order another token i falls if and only if p_i < ‖p‖² - p(y⁻) (re-derived from that lemma).",
            "every token's sign",
            f"{agree:.6%} of {int(clear.sum())} signs agree at strength 1e-6",
            told(agree == 1),
        ),
    ]


def toy_sweep(draws: int, seed: int) -> dict[str, list[Any]]:
    """One negative step for each draw of logits, each peakiness and each rank of y⁻, at the same draws throughout."""
    base = torch.randn(draws, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    minus = -torch.ones(draws, dtype=torch.float64)
    table: dict[str, list[Any]] = {
        name: [] for name in ("draw", "peakiness", "rank", "p_top", "p_y", "falling", "argmax", "lower")
    }
    for peak in PEAKINESS:
        z = peak * base
        order = z.argsort(1, descending=True)
        before = torch.full_like(z, torch.nan)
        for rank, likelier in zip(RANKS, (RANKS[0], *RANKS), strict=False):
            y = order[:, rank - 1]
            change = td.squeeze.step(z, y, minus, STRENGTH).log_softmax(1) - z.log_softmax(1)
            seen = td.squeeze.diagnose(z, y, minus, STRENGTH)
            rest = torch.ones_like(z).scatter(1, y[:, None], 0).scatter(1, order[:, likelier - 1 : likelier], 0)
            lower = ((change < before) * rest).sum(1) / rest.sum(1)  # of the tokens that are neither this y⁻ nor the one before
            table["draw"] += range(draws)
            table["peakiness"] += [peak] * draws
            table["rank"] += [rank] * draws
            for name, values in (
                ("p_top", seen.argmax_before), ("p_y", seen.target_before), ("falling", seen.falling),
                ("argmax", change.gather(1, order[:, :1]).squeeze(1)), ("lower", lower),
            ):  # fmt: skip
                table[name] += values.tolist()
            before = change
    return table


def grid(sweep: dict[str, list[Any]], name: str) -> np.ndarray:
    """A column of the sweep as [peakiness, rank, draw]."""
    return np.array(sweep[name]).reshape(len(PEAKINESS), len(RANKS), -1)


def sweep_claims(sweep: dict[str, list[Any]]) -> list[Claim]:
    """Claims about the sweep: the effect of peakiness, and both halves of the paper's statement about p(y⁻)."""
    falling, argmax, lower = (grid(sweep, name) for name in ("falling", "argmax", "lower"))
    flat, peaky = estimate(falling[0, -1], "draws"), estimate(falling[-1, -1], "draws")
    growth = estimate(falling[-1, -1] - falling[0, -1], "draws")
    means = falling[:, -1].mean(1)
    every = float((lower[:, 1:] == 1).mean())
    higher = float((np.diff(argmax, axis=1) > 0).mean())
    first, last = estimate(argmax[:, 0].ravel(), "draws"), estimate(argmax[:, -1].ravel(), "draws")
    return [
        Claim(
            f"The peakier p is, the more of all other tokens fall ({PAPER}).",
            "the share of falling tokens grows with the peakiness, interval of the difference above 0",
            f"{flat.words()} of the others fall at peakiness {PEAKINESS[0]}, {peaky.words()} at "
            f"{PEAKINESS[-1]:g} (difference {growth.words()}), growing at "
            f"{int((np.diff(means) > 0).sum())} of {len(means) - 1} steps of the sweep",
            both(above(growth), told(bool((np.diff(means) > 0).all()))),
        ),
        Claim(
            f"At fixed p, a less likely y⁻ makes the other tokens fall more ({PAPER}).",
            "every token, every time",
            f"every token but the two rises less, or falls more, at the less likely of two y⁻ in {every:.1%} of "
            f"{lower[:, 1:].size} pairs",
            told(every == 1),
        ),
        Claim(
            f"The paper's other half, that the argmax rises more when y⁻ is less likely ({PAPER}), is false at fixed p †.",
            "the argmax, as every token, rises less at the less likely y⁻, every time",
            f"it rose more in {higher:.1%} of {argmax[:, 1:].size} pairs; Δ log p(argmax) is {first.words('nats')} "
            f"with y⁻ of rank {RANKS[0]} and {last.words('nats')} with rank {RANKS[-1]}",
            told(higher == 0),
        ),
    ]


def toy_figure(sweep: dict[str, list[Any]]) -> Any:
    """Left: share of falling tokens against peakiness. Right: change of log p(argmax) against the rank of y⁻."""
    made, (left, right) = figure(
        1, 2, title="Peaked distributions squeeze; at a fixed distribution a less likely y⁻ lifts the argmax less"
    )
    falling, argmax = 100 * grid(sweep, "falling"), grid(sweep, "argmax")
    p_top = grid(sweep, "p_top")[:, 0].mean(1)
    for colour, rank in zip((BLUE, ORANGE, VERMILION), (2, 10, 50), strict=True):
        label = f"y⁻ = token of rank {rank}" + (" (least likely)" if rank == 50 else "")
        band(left, p_top, falling[:, RANKS.index(rank)].T, colour, label, marker="o", markersize=3)
    left.set(xlabel="mean probability of the most likely token", ylabel="other tokens that fall, %", ylim=(0, 103))
    left.set_title("The peakier p, the more of all others fall")
    left.legend(loc="lower right")
    for colour, peak in zip(COLOURS, (0.5, 1.0, 2.0, 4.0), strict=False):
        i = PEAKINESS.index(peak)
        band(right, RANKS, argmax[i].T, colour, f"p_top = {p_top[i]:.2f}", marker="o", markersize=3)
    right.set(
        xscale="log", xlabel="rank of y⁻ (left: likely, right: unlikely)", ylabel="Δ log p of the most likely token, nats"
    )
    right.set_xticks(RANKS, [str(rank) for rank in RANKS])
    right.minorticks_off()
    right.set_title("Each line is one p: less gain for an unlikely y⁻")
    right.legend(title="mean over draws")
    return made


# The demo model


def demo_model(pairs: int, places: int, seed: int) -> dict[str, list[Any]]:
    """First-order change of log p over the vocabulary when one token is pushed down there, per nat that it loses itself.

    Places are drawn from the chosen answers of the shipped pairs; at each, y⁻ is the token of the given rank.
    """
    from ..data import read
    from ..loading import DEMO_PAIRS, load_model

    model, tokenizer = load_model("demo")
    random = np.random.default_rng(seed)
    columns = ("pair", "place", "scope", "rank", "p_top", "p_y", "own", "argmax", "falling")
    table: dict[str, list[Any]] = {name: [] for name in columns}
    for i, row in enumerate(read(DEMO_PAIRS)[:pairs]):
        chi = td.encode(tokenizer, row["prompt"], row["chosen"])
        scored = chi.scored.nonzero().flatten().numpy()
        for t in sorted(random.choice(scored[1:], size=min(places, len(scored) - 1), replace=False).tolist()):
            with torch.no_grad():
                log_pi = model(chi.ids[None, :t]).logits[0, -1].double().log_softmax(0)
            order = log_pi.argsort(descending=True)
            last = torch.arange(t + 1) == t
            pushed = [int(order[rank - 1]) for rank in MODEL_RANKS]
            pushes = [td.Chi(torch.cat([chi.ids[:t], torch.tensor([y])]), last) for y in pushed]
            for scope in ("readout", "full"):
                found = td.forces(model, pushes, pushes, td.objectives.SFT(), scope=scope, reduce="update")
                for m, (rank, y) in enumerate(zip(MODEL_RANKS, pushed, strict=True)):
                    words = found.vocabulary(m, m, k=len(log_pi))
                    down = torch.empty_like(log_pi)
                    down[words.rising] = -words.rise.double()
                    own, down = down[y], down / -down[y]  # per nat that y⁻ loses
                    others = torch.arange(len(log_pi)) != y
                    values = (i, t, scope, rank, log_pi[order[0]].exp(), log_pi[y].exp(), own, down[order[0]],
                              (down[others] < 0).double().mean())  # fmt: skip
                    for name, value in zip(columns, values, strict=True):
                        table[name].append(value if isinstance(value, (int, str)) else float(value))
    return table


def per_pair(model: dict[str, list[Any]], value: str, **where: Any) -> list[float]:
    """Mean of a column for each pair of texts, over the rows where the other columns have the given values."""
    keep = np.all([np.array(model[name]) == wanted for name, wanted in where.items()], axis=0)
    pairs, values = np.array(model["pair"])[keep], np.array(model[value])[keep]
    return [float(values[pairs == i].mean()) for i in np.unique(pairs)]


def gain(model: dict[str, list[Any]]) -> str:
    """In words: rise of log p(argmax) at the least likely y⁻ minus that at the most likely one, all parameters."""
    likely, unlikely = (per_pair(model, "argmax", scope="full", rank=MODEL_RANKS[i]) for i in (0, -1))
    return estimate([b - a for a, b in zip(likely, unlikely, strict=True)], "prompts").words("nats")


def model_claims(model: dict[str, list[Any]]) -> list[Claim]:
    """Claims about the demo model: through the readout alone, and through all parameters at a likely and an unlikely y⁻."""
    own, scope, rank, argmax = (np.array(model[name]) for name in ("own", "scope", "rank", "argmax"))
    first, last = MODEL_RANKS[0], MODEL_RANKS[-1]
    rises = {r: argmax[(scope == "full") & (rank == r)] > 0 for r in (first, last)}
    falling = {r: estimate(per_pair(model, "falling", scope="full", rank=r), "prompts") for r in (first, last)}
    risen = model | {"rises": [value > 0 for value in model["argmax"]]}
    lifted = estimate(per_pair(risen, "rises", scope="full", rank=last), "prompts")
    readout = argmax[scope == "readout"] > 0
    return [
        Claim(
            "On the demo model, a push through the readout alone squeezes as the toy says.",
            "own token falls and the argmax rises at every place",
            f"own token falls in {int((own < 0).sum())} of {len(own)} pushes (readout alone and all parameters), the argmax "
            "rises "
            f"in {int(readout.sum())} of {len(readout)} through the readout alone",
            told(bool((own < 0).all() and readout.all())),
        ),
        Claim(
            f"An unlikely y⁻ squeezes also when all parameters move ({PAPER} argues with the readout's law).",
            f"pushed down, the token of rank {last} lifts the argmax in more than half of the places and lowers more than half "
            "of the other vocabulary, intervals too",
            f"the argmax rises in {int(rises[last].sum())} of {len(rises[last])} places, {lifted.words()} of "
            f"them, {falling[last].words()} "
            "of "
            f"the other vocabulary falls; with y⁻ of rank {first} it rises in {int(rises[first].sum())}, "
            f"{falling[first].words()} falls",
            both(above(lifted, 0.5), above(falling[last], 0.5)),
        ),
    ]


def model_figure(model: dict[str, list[Any]]) -> Any:
    """Left: gain of the argmax by rank of y⁻. Right: share of falling tokens against the probability of the argmax."""
    made, (left, right) = figure(1, 2, title="Demo model: one token pushed down, at its own place, per nat that it loses")
    for scope, colour, label in (("readout", GREY, "readout alone"), ("full", BLUE, "all parameters")):
        runs = np.array([per_pair(model, "argmax", scope=scope, rank=rank) for rank in MODEL_RANKS]).T
        band(left, MODEL_RANKS, runs, colour, label, marker="o", markersize=3)
        keep = np.array(model["scope"]) == scope
        right.scatter(
            np.array(model["p_top"])[keep], 100 * np.array(model["falling"])[keep], s=9, color=colour, alpha=0.6, label=label
        )
    left.axhline(0, color=GREY, linewidth=0.8)
    left.set(
        xscale="log", xlabel="rank of y⁻ (left: likely, right: unlikely)", ylabel="Δ log p(argmax) per nat lost by y⁻, nats"
    )
    left.set_title("What the most likely token gains")
    left.legend()
    right.set(xlabel="probability of the most likely token", ylabel="other vocabulary that falls, %", ylim=(-3, 103))
    right.set_title("Who pays")
    right.legend(loc="lower right")
    return made
