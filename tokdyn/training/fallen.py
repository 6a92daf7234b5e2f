"""Lazy likelihood displacement: answers with a positive advantage that are less likely than at their rollout, and who pushes.

As the gate of LLDS has it (arXiv 2512.04220), Σ_t (log pi - log pi_old) of a response below zero; here by more than the
log-probs' rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from ..sequences import Chi, visible
from .forward import Forward

FALLEN = "fallen"  # the token table has the forces on these answers as those on a probe group of this name
STRONGEST = 5
ROUNDING = 20 * torch.finfo(torch.float32).eps  # of a log-probability

ALARM = (
    "lazy likelihood displacement: {share:.0%} of the tokens with a positive advantage stand in answers that are less likely "
    "now than at their rollout"
)


def fallen_tokens(of: Mapping[str, Tensor]) -> Bool[Tensor, " N"]:
    """Which tokens have A > 0 and stand in a response that has fallen; of sequence, advantage, ratio and log_prob [N]."""
    up = of["advantage"] > 0
    n = int(of["sequence"].max()) + 1 if len(up) else 0
    moved = of["ratio"].double().log()
    total, slack = (
        torch.zeros(n, dtype=torch.float64, device=up.device).index_add_(0, of["sequence"][up], x[up])
        for x in (moved, ROUNDING * of["log_prob"].double().abs())
    )
    return up & (total < -slack)[of["sequence"]]


def fallen_answers(forward: Forward, policy: Mapping[str, Tensor]) -> list[Chi]:
    """The sequences of a pass that have fallen; `policy` has advantage and ratio of its tokens."""
    which = fallen_tokens(dict(policy, sequence=forward.sequence, log_prob=forward.stats.log_prob))
    numbers = set(forward.sequence[which].tolist())
    return [chi for s, chi in enumerate(forward.chis()) if s in numbers] if numbers else []


def told(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a step does to the answers that have fallen and the tokens that push them down most; rows of its token table."""
    forces = [float(row[f"on {FALLEN}"]) for row in rows]
    worst = [k for k in sorted(range(len(rows)), key=lambda k: forces[k])[:STRONGEST] if forces[k] < 0]
    named = ", ".join(f"{_place(rows[k])} {_signed(forces[k])}" for k in worst)
    text = f"the step's gradient moves these answers by {_signed(sum(forces))} nats"
    return text + (f"; the strongest pushes down are by {named}" if named else "; no token pushes them down")


def _place(row: Mapping[str, Any]) -> str:
    token = f"“{visible(row['token'])}”" if row.get("token") else f"token {row['token_id']}"
    rank = f" of rank {row['rank']}" if row.get("rank") else ""
    return f"{token} at {row['position']} of sequence {row['sequence']}{rank} (A {_signed(row['advantage'])})"


def _signed(x: float) -> str:
    return f"{x:+.2g}".replace("-", "−")
