"""Who influences whom settles in training: how stable the empirical NTK becomes, on digits and in fine-tuning a language model.

Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), §3 and the appendix on the relative stability of the
eNTK. On real digits with a small network, at checkpoints a fixed number of steps apart: ‖K‖_F, how the ranking of all
influences agrees between neighbouring checkpoints, LBK = ‖Δ log pi‖² / (‖A‖² ‖G‖²) from one real step as a lower bound of
η² ‖K‖², and SignDelta of the predicted against the real change. On the demo model: td.kernel_drift over steps of SFT.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

import tokdyn as td

from .. import dynamics
from .classifiers import Data, descend, digits, jacobians, network, pieces
from .figures import BLUE, GREEN, ORANGE, VERMILION, band, figure
from .result import Claim, Result, above, estimate, told

PAPER = "arXiv 2407.10490, stability of the eNTK"
EVERY, CHECKPOINTS, BATCH, ETA = 60, 11, 32, 0.1
SMALL = 1e-4  # η of the real steps on one image


def run(quick: bool = False, seed: int = 0) -> Result:
    """Stability of the kernel on digits, over seeds, and between a few tokens of the demo model."""
    seeds = range(seed, seed + (5 if quick else 20))
    found = [one(s, each=20 if quick else 40) for s in seeds]
    norms, agreement = (torch.stack([run[key] for run in found]) for key in ("norm", "agreement"))
    ratio, signs = (torch.cat([run[key].flatten() for run in found]) for key in ("lbk", "signs"))
    settles = estimate((agreement[:, -3:].mean(1) - agreement[:, :3].mean(1)).tolist())
    first, last = (estimate(agreement[:, part].mean(1).tolist()) for part in (slice(0, 3), slice(-3, None)))
    grows = estimate((norms[:, -1] / norms[:, 0]).tolist())
    answers = range(2 if quick else 8)
    demo = [demo_drift(k, steps=4 if quick else 16, tokens=2 if quick else 4, samples=4 if quick else 12) for k in answers]
    cosine, change, gained = (estimate([run[key] for run in demo], "answers") for key in ("cosine", "change", "gained"))
    claims = [
        Claim(
            f"The ranking of influences settles: neighbouring checkpoints agree more and more ({PAPER}).",
            "rank correlation of ‖K‖_F over all pairs, last three intervals minus first three, interval above 0",
            f"{first.words()} between the first checkpoints, {last.words()} between the last; difference {settles.words()}",
            above(settles),
        ),
        Claim(
            f"LBK, seen from one real step, is a lower bound of η² ‖K‖² ({PAPER}).",
            "LBK ≤ η² ‖K‖² for every pair of images at every checkpoint",
            f"largest LBK/(η² ‖K‖²) is {float(ratio.max()):.3g}, median {float(ratio.median()):.2g}, over {len(ratio)} pairs",
            told(bool((ratio <= 1).all())),
        ),
        Claim(
            f"One-step forces foresee the sign of a real change ({PAPER}, SignDelta).",
            f"SignDelta of -η A K G against a real step of η = {SMALL:g} above 0.99 at every checkpoint",
            f"lowest {float(signs.min()):.4f}, mean {float(signs.mean()):.4f} over {len(signs)} checkpoints and seeds",
            told(float(signs.min()) > 0.99),
        ),
        Claim(
            "In fine-tuning the demo model the kernel keeps its direction (the assumption of the decomposition over several "
            "steps).",
            "cosine of K before and after above 0.9, its interval too",
            f"cosine {cosine.words()}, relative change {change.words()} after {demo[0]['steps']:.0f} steps of SFT on one "
            f"answer that lowered its loss by {gained.words('nats a token')}; each the mean over {demo[0]['pairs']:.0f} pairs "
            "of tokens",
            above(cosine, 0.9),
        ),
    ]
    rows = [
        (s, (k + 1) * EVERY, float(agreement[i, k]), float(norms[i, k + 1]))
        for i, s in enumerate(seeds)
        for k in range(CHECKPOINTS - 1)
    ]
    columns = ("seed", "step", "agreement_with_previous", "mean_norm")
    return Result(
        "Who influences whom settles early in training",
        claims,
        {"stability": pa.table(dict(zip(columns, zip(*rows, strict=True), strict=True)))},
        {"stability": draw(norms, agreement, found)},
        f"‖K‖_F itself does not stand still: over {(CHECKPOINTS - 1) * EVERY} steps its mean changes by a factor "
        f"{grows.words()}. Stability is that of the ranking, as the paper says, not of the size.",
    )


def one(seed: int, each: int) -> dict[str, Tensor]:
    """One training, read at every checkpoint.

    norm [checkpoint] mean ‖K‖_F; agreement [checkpoint - 1]; lbk [checkpoint, observed] LBK/(η² ‖K‖²); signs [checkpoint].
    """
    train, test = digits(seed, train=600)
    model = network((64, 16, 10), seed)
    observed, updated = test.x[:each], Data(train.x[:each], train.y[:each])
    sizes, lbk, signs = [], [], []

    def look(step: int) -> None:
        if step % EVERY:
            return
        J_o, J_u = jacobians(model, observed), jacobians(model, updated.x)
        sizes.append(dynamics.K(J_o, J_u).square().sum((2, 3)).sqrt())
        ratio, sign = real_step(model, observed, Data(updated.x[:1], updated.y[:1]), sizes[-1][:, 0])
        lbk.append(ratio)
        signs.append(sign)

    descend(model, train.x, train.y, ETA, EVERY * (CHECKPOINTS - 1), look, batch=BATCH, seed=seed)
    agreement = [td.rank_correlation(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    return {
        "norm": torch.stack([x.mean() for x in sizes]),
        "agreement": torch.tensor(agreement, dtype=torch.float64),
        "lbk": torch.stack(lbk),
        "signs": torch.tensor(signs, dtype=torch.float64),
    }


def real_step(model: torch.nn.Module, observed: Tensor, image: Data, norm: Tensor) -> tuple[Tensor, float]:
    """LBK/(η² ‖K‖²) for each observed image after a real step on one image, and SignDelta of the prediction."""
    A, K, G = pieces(model, observed, image.x, image.y)
    loss = -model(image.x).log_softmax(1)[0, image.y]
    gradients = torch.autograd.grad(loss.sum(), list(model.parameters()))
    moved = {name: p - SMALL * g for (name, p), g in zip(model.named_parameters(), gradients, strict=True)}
    with torch.no_grad():
        before = model(observed).log_softmax(1)
        after = torch.func.functional_call(model, moved, (observed,)).log_softmax(1)
        bound = td.kernel_lower_bound(before, after, G[0])
        return bound / (SMALL * norm) ** 2, td.sign_delta(dynamics.delta_log_pi(A, K, G, SMALL), after - before)


def demo_drift(answer: int, *, steps: int, tokens: int, samples: int) -> dict[str, float]:
    """Drift of K between the first tokens of one shipped answer over steps of SFT of the demo model on it."""
    from copy import deepcopy

    from ..data import read
    from ..loading import DEMO_PAIRS, load_model

    model, tokenizer = load_model("demo")
    pair = read(DEMO_PAIRS)[answer]
    whole = td.encode(tokenizer, pair["prompt"], pair["chosen"])
    few = whole.with_(scored=whole.scored & (whole.scored.cumsum(0) <= tokens))
    tuned = deepcopy(model)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=3e-3)

    def loss() -> Tensor:
        z = tuned(whole.ids[None]).logits[0, :-1][whole.scored[1:]]
        return torch.nn.functional.cross_entropy(z, whole.ids[whole.scored])

    with torch.no_grad():
        start = float(loss())
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        end = float(loss())
    drift = td.kernel_drift(model, tuned.requires_grad_(), [few], [few], samples=samples)
    return dict(cosine=float(drift.cosine.mean()), change=float(drift.change.mean()), steps=steps, gained=start - end,
                pairs=drift.cosine.numel())  # fmt: skip


def draw(norms: Tensor, agreement: Tensor, found: list[dict[str, Tensor]]) -> Any:
    """Agreement and norm of K through training, and LBK over its bound."""
    made, (left, middle, right) = figure(
        1, 3, width=11, title="The ranking of influences settles, while their size still grows"
    )
    steps = np.arange(CHECKPOINTS) * EVERY
    band(left, steps[1:], agreement, BLUE, marker="o", markersize=3)
    left.set(xlabel="training step", ylabel="rank correlation with the previous one", ylim=(None, 1.005))
    left.set_title("‖K‖_F of all pairs, neighbouring checkpoints")
    band(middle, steps, norms, VERMILION, marker="o", markersize=3)
    middle.set(xlabel="training step", ylabel="mean ‖K‖_F over pairs of images", ylim=(0, None))
    middle.set_title("The size is not constant")
    for k, colour, label in ((0, ORANGE, "untrained"), (CHECKPOINTS - 1, GREEN, "trained")):
        values = torch.cat([run["lbk"][k] for run in found]).clamp(min=1e-9).log10().numpy()
        right.hist(values, bins=20, histtype="step", color=colour, label=label, linewidth=1.6)
    right.axvline(0, color=VERMILION, linestyle="--", linewidth=1)
    right.set(xlabel="log₁₀ of LBK / (η² ‖K‖²); 0 is the bound", ylabel="pairs of images")
    right.set_title("LBK stays below η² ‖K‖²")
    right.legend(loc="upper left")
    return made
