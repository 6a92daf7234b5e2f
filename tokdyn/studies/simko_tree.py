"""On a small tree of choices GRPO keeps one rewarded path, and SimKO keeps several.

Peng, Ren et al., *SimKO: Simple Pass@K Policy Optimization* (arXiv 2510.14807; later CaSP), toy experiment: three choices among
four actions each, six of the 64 paths are rewarded. Here the policy is a table of logits, one row for each node, all zero at
the start; a step adds the objective's own force at every visited node. The reward is ±1 and serves as the advantage: in a
normalised group it would vanish as soon as every path is right, and with it what SimKO does to the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

import tokdyn as td

from ..objectives import GRPO, Objective, Scores, SimKO
from .figures import BLUE, GREEN, GREY, ORANGE, band, figure
from .result import Claim, Result, above, below, both, estimate, told

REWARDED = ("ACD", "ACB", "BDC", "BDA", "CAB", "DBA")
PAPER = "arXiv 2510.14807, toy experiment"
GOOD = torch.tensor([sum((ord(a) - 65) * 4 ** (2 - i) for i, a in enumerate(path)) for path in REWARDED])
OBJECTIVES: dict[str, Objective] = {
    "GRPO": GRPO(),
    "SimKO, paper's constants": SimKO(),
    "SimKO, α = 0.1": SimKO(alpha=0.1),
    "SimKO, α = 0.1, two tokens of three": SimKO(alpha=0.1, quantile=0.0),
}
COLOURS = dict(zip(OBJECTIVES, (GREY, BLUE, ORANGE, GREEN), strict=True))
ETA = 3.0  # times the mean over rollouts of the sum of a response's forces, each divided by its length 3
ROLLOUTS = 16
KEPT = 0.01  # a path is kept when it is taken once in a hundred times


def run(quick: bool = False, seed: int = 0) -> Result:
    """Train with each objective from several seeds and count the rewarded paths that survive."""
    seeds, steps, every = (8, 1000, 20) if quick else (20, 2000, 40)
    found = {name: train(objective, seed, seeds, steps, every) for name, objective in OBJECTIVES.items()}
    accuracy = {name: x.sum(-1) for name, x in found.items()}  # [checkpoint, seed]
    modes = {name: (x > KEPT).sum(-1).double() for name, x in found.items()}
    end = {name: (estimate(accuracy[name][-1].tolist()), estimate(modes[name][-1].tolist())) for name in found}
    words = {name: f"{m.words('paths')} at accuracy {a.words()}" for name, (a, m) in end.items()}
    plain, paper, *stronger = OBJECTIVES
    more = {name: estimate((modes[name][-1] - modes[plain][-1]).tolist()) for name in OBJECTIVES if name != plain}
    claims = [
        Claim(
            f"GRPO concentrates on one of the six rewarded paths ({PAPER}).",
            "accuracy above 0.95, fewer than 2 paths on average",
            words[plain],
            both(above(end[plain][0], 0.95), below(end[plain][1], 2)),
        ),
        Claim(
            f"SimKO with α = 0.01, λ = 1.1, the top 3 and the entropy gate keeps all six at accuracy 1 ({PAPER}).",
            "more than 5.5 paths on average at accuracy above 0.95",
            f"{words[paper]}; that is {more[paper].words('paths')} more than GRPO",
            both(above(end[paper][1], 5.5), above(end[paper][0], 0.95)),
        ),
        Claim(
            f"Sharing a correct token's gradient with the other candidates keeps more rewarded paths ({PAPER}).",
            "with α = 0.1 more paths than GRPO, interval of the difference above 0, at accuracy above 0.9",
            "; ".join(f"{name}: {words[name]}, {more[name].words('paths')} more than GRPO" for name in stronger),
            both(*(v for name in stronger for v in (above(more[name]), above(end[name][0], 0.9)))),
        ),
        identity_claim(seed),
    ]
    steps_at = (torch.arange(len(next(iter(found.values())))) * every).tolist()
    return Result(
        f"On the tree, GRPO ends with {end[plain][1].mean:.1f} of six rewarded paths; sharing gradients keeps up to "
        f"{max(m.mean for _, m in end.values()):.1f}",
        claims,
        {"tree": curves(found, steps_at)},
        {"tree": draw(accuracy, modes, found, steps_at)},
        f"A path is kept when its probability is above {KEPT:g}. In a table nothing is shared between nodes, so that a "
        "rewarded "
        "path can only be kept where the objective itself keeps it; the paper's own policy and step size are not given in "
        "full.",
    )


def paths(z: Tensor) -> Tensor:
    """Probability of every path, [.., 64], from the logits of the 21 nodes, [.., 21, 4]."""
    log_pi = z.log_softmax(-1)
    second, third = log_pi[..., 1:5, :], log_pi[..., 5:, :].unflatten(-2, (4, 4))
    return (log_pi[..., 0, :, None, None] + second[..., None] + third).flatten(-3).exp()


def force(objective: Objective, pi: Tensor, y: Tensor, right: Tensor) -> Tensor:
    """Γ of every token of responses with advantage ±1, [.., 3, 4]: the closed form of the objective at the sampling policy.

    A > 0: ẽ - pi where the gate is open (e_y - pi elsewhere), ẽ = (1-α) e_y + (α/N) Σ e_top.    A < 0: -λ (e_y - pi) where the
    gate is open and y is the most likely token, -(e_y - pi) elsewhere. Each is divided by the length 3 and by no group size.
    """
    e = torch.nn.functional.one_hot(y, 4).to(pi)
    if not isinstance(objective, SimKO):
        return torch.where(right[..., None, None], e - pi, pi - e) / 3
    alpha, N = objective.alpha, objective.n_candidates
    entropy = -(pi * pi.log()).nan_to_num().sum(-1)
    gate = (entropy > entropy.quantile(objective.quantile, dim=-1, keepdim=True))[..., None]
    top = pi.topk(N, -1).indices
    shared = (1 - alpha) * e + (alpha / N) * torch.zeros_like(e).scatter(-1, top, 1.0)
    harder = 1 + (objective.lam - 1) * (gate & (top[..., :1] == y[..., None])).to(pi)
    return torch.where(right[..., None, None], torch.where(gate, shared, e) - pi, harder * (pi - e)) / 3


def train(objective: Objective, first: int, seeds: int, steps: int, every: int) -> Tensor:
    """Probability of each rewarded path at every checkpoint, [checkpoint, seed, 6]."""
    generator = torch.Generator().manual_seed(first)
    z = torch.zeros(seeds, 21, 4, dtype=torch.float64)
    rewarded = torch.zeros(64, dtype=torch.bool).index_fill(0, GOOD, True)
    kept = []
    for step in range(steps + 1):
        p = paths(z)
        if step % every == 0:
            kept.append(p[:, GOOD])
        path = torch.multinomial(p, ROLLOUTS, replacement=True, generator=generator)  # [seed, rollout]
        a, b, c = path // 16, path // 4 % 4, path % 4
        nodes = torch.stack([torch.zeros_like(a), 1 + a, 5 + 4 * a + b], -1)
        at = nodes.flatten(1)[..., None].expand(-1, -1, 4)
        pi = z.softmax(-1).gather(1, at).unflatten(1, (ROLLOUTS, 3))
        pushes = force(objective, pi, torch.stack([a, b, c], -1), rewarded[path]) / ROLLOUTS
        z = z.scatter_add(1, at, ETA * pushes.flatten(1, 2))
    return torch.stack(kept)


def identity_claim(seed: int) -> Claim:
    """Claim that `force` is minus the G of td.objectives, on random responses of both signs."""
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for i in range(50):
        z = 2 * torch.randn(3, 4, dtype=torch.float64, generator=generator)
        y, right = torch.randint(0, 4, (3,), generator=generator), bool(i % 2)
        chi = td.Chi(torch.cat([torch.zeros(1, dtype=torch.long), y]), torch.arange(4) > 0, advantage=1.0 if right else -1.0)
        log_pi = z.log_softmax(1)
        top = log_pi.topk(3, 1)
        scores = Scores(-(log_pi.exp() * log_pi).sum(1), log_pi.mean(1), top.indices, top.values)
        for objective in (GRPO(), SimKO()):
            G = td.dynamics.G(z, objective.g_terms(log_pi.gather(1, y[:, None]).squeeze(1), [chi], scores))
            worst = max(worst, float((force(objective, z.softmax(1), y, torch.tensor(right)) + G).abs().max()))
    return Claim(
        "SimKO's force on a correct token is ẽ - pi, ẽ = (1-α) e_y + (α/N) Σ e_top, and on a wrong rank-1 token λ times GRPO's "
        f"({PAPER}; γ⁺ and γ⁻) †.",
        "equal to the gradient of the paper's loss to 1e-12",
        f"largest difference {worst:.1e} over 50 responses of three tokens",
        told(worst < 1e-12),
    )


def curves(found: dict[str, Tensor], steps: list[int]) -> pa.Table:
    """Table of the probability of each rewarded path by objective, step and seed."""
    rows = [
        (name, step, s, REWARDED[k], float(x[i, s, k]))
        for name, x in found.items()
        for i, step in enumerate(steps)
        for s in range(x.shape[1])
        for k in range(6)
    ]
    return pa.table(dict(zip(("objective", "step", "seed", "path", "probability"), zip(*rows, strict=True), strict=True)))


def draw(accuracy: dict[str, Tensor], modes: dict[str, Tensor], found: dict[str, Tensor], steps: list[int]) -> Any:
    """Accuracy and number of kept paths through training, and the probabilities of the rewarded paths at its end."""
    made, (left, middle, right) = figure(
        1, 3, width=11, title="Sharing a correct token's gradient keeps more ways to the reward"
    )
    for name in found:
        band(left, steps, accuracy[name].T, COLOURS[name], name)
        band(middle, steps, modes[name].T, COLOURS[name], name)
    left.set(xlabel="update", ylabel="probability of a rewarded path", ylim=(0, 1.02))
    left.set_title("Accuracy")
    middle.set(xlabel="update", ylabel=f"paths with probability above {KEPT:g}", ylim=(0, 6.2))
    middle.set_title("Rewarded paths kept (of six)")
    for i, (name, x) in enumerate(found.items()):
        share = x[-1].sort(-1, descending=True).values.mean(0)
        right.bar(np.arange(6) + (i - 1.5) * 0.2, share, 0.2, color=COLOURS[name], label=name)
    right.set_xticks(range(6), ["1st", "2nd", "3rd", "4th", "5th", "6th"])
    right.set(xlabel="rewarded paths, most likely first", ylabel="probability at the end, mean over seeds")
    right.set_title("Where the probability lies")
    right.legend(loc="upper right")
    return made
