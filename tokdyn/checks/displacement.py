"""The check of displacement: answers that a step is to raise and lowers, and the tokens that do it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import exact
from ..model.optimizer import preconditioner
from ..model.trace import trace
from ..model.unwrap import local, require_no_prefix
from ..sequences import Chi
from ..training.own_passes import own_passes
from ..training.probe import observed_side, updated_side
from .finding import FINE, SUSPICIOUS, Finding
from .seen import Seen

STRONGEST = 5


def displacement(seen: Seen) -> list[Finding]:
    """Σ log π of chosen answers, or of those with A > 0, after one step of this batch, to first order, token by token.

    F_l = -<∇ Σ_m log π(y_m), P ⊙ J_lᵀ G_l> of every scored token l of the batch, P the optimizer's, as in `td.forces`. Its sum
    is the change per unit of learning rate.
    """
    raised = _raised(seen)
    if not raised:
        return []
    if seen.sharded:
        raise ValueError("the weights are sharded: forces of single tokens are not computed")
    require_no_prefix(seen.outer)
    F, n = _forces(seen, raised), sum(map(len, raised))
    total, size = float(F.double().sum()), float(F.double().abs().sum())
    lr = float(seen.option("learning_rate", 1.0) or 1.0)
    whose = "chosen answers" if any(row.role == "chosen" for row in seen.rows) else "answers with a positive advantage"
    if total >= -1e-2 * size:
        return [Finding("displacement", FINE, f"one step makes {whose} likelier", "", lr * total / n, "nats a token")]
    worst = F.argsort()[:STRONGEST].tolist()
    pushes = "; ".join(f"{_place(seen, i)} ({lr * float(F[i]) / n:+.2g})" for i in worst)
    what = f"one step makes {whose} less likely (likelihood displacement); the strongest pushes are by"
    do = ("add a term that holds them (RPO's NLL, DPOP), lower beta, drop pairs whose answers share most of their text; or "
          "spare these tokens: tokdyn.integrations.intervene.protect")  # fmt: skip
    return [Finding("displacement", SUSPICIOUS, what, pushes, lr * total / n, "nats a token at the given learning rate", do)]


def _raised(seen: Seen) -> list[Chi]:
    """The sequences that the step is to make likelier."""
    found = list[Chi]()
    for f in seen.forwards:
        roles, A = f.metadata.get("roles"), f.metadata.get("advantages")
        if roles is None and (A is None or A.dim() != 1):
            continue
        for s, chi in enumerate(f.chis()):
            good = roles[s] == "chosen" if roles is not None else A is not None and float(A[s]) > 0
            if len(chi) and good:
                found.append(chi)
    return found


def _forces(seen: Seen, raised: list[Chi]) -> Tensor:
    """F of every scored token of the batch on the raised answers, [L]."""
    with own_passes(seen.lm), trace(seen.lm) as tracer:
        inner = getattr(seen.optimizer, "optimizer", seen.optimizer)
        gradient = {name: g for name, g in seen.gradients.items() if name in tracer.trained}
        P = None if inner is None else preconditioner(inner, tracer.trained, _clipped(seen, gradient))
        scope = exact.Scope(tracer, exact.select(tracer, "full"), P)
        D = scope.preconditioned(scope.vjp(observed_side(tracer, raised)))
        return torch.cat([scope.jvp(updated_side(tracer, f, seen.scale), D).cpu() for f in seen.forwards if len(f)])


def _clipped(seen: Seen, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gradient as torch.nn.utils.clip_grad_norm_ leaves it."""
    limit = float(getattr(seen.args, "max_grad_norm", 0) or 0)
    norm = float(torch.stack([local(g).norm() for g in gradient.values()]).norm()) if gradient else 0.0
    share = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
    return gradient if share == 1 else {name: share * g for name, g in gradient.items()}


def _place(seen: Seen, index: int) -> str:
    """The token of that number among all scored ones, with the text around it."""
    for number, f in enumerate([f for f in seen.forwards if len(f)], 1):
        if index < len(f):
            s, t = int(f.sequence[index]), int(f.position[index])
            rows = [row for row in seen.rows if row.where == f"batch {number} sequence {s + 1}"]
            return rows[0].around(t, 2) if rows and t < len(rows[0].tokens) else f"batch {number} sequence {s + 1} @{t}"
        index -= len(f)
    return ""
