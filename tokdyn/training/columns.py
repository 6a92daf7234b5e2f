"""The token table of a monitored step, a column at a time, and the figures that a step's columns sum up to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..sequences import prefix_keys
from .fallen import fallen_tokens
from .forward import Forward

SUMS = ("steps", "tokens", "c_up", "c_down", "force", "force_up", "entropy", "collision", "log_prob", "p_target", "p_argmax",
        "pushed", "squeezed", "shared", "paired", "clipped", "clippable", "explained", "checked", "fallen",
        "rewarded")  # fmt: skip


# ---------------------------------------------------------------- columns


def token_columns(forwards: Sequence[Forward], scale: float) -> dict[str, Any]:
    """Columns of the token table, one tensor or list each; c, v, u and force times `scale`.

    Raises:
        ValueError: what the training loop said of a pass does not fit its sequences.
    """
    parts: dict[str, list[Any]] = {}
    first, numbers = 0, sorted({f.micro_batch for f in forwards})
    for f in forwards:
        place = dict(micro_batch=torch.full_like(f.targets, numbers.index(f.micro_batch)), sequence=first + f.sequence)
        for name, value in (place | _of_the_loss(f, scale) | of_the_policy(f) | _of_the_sequences(f, first)).items():
            parts.setdefault(name, []).append(value)
        first += f.layout.sequences
    of: dict[str, Any] = {
        name: sum(part, []) if isinstance(part[0], list) else torch.cat([x.detach() for x in part]).cpu()
        for name, part in parts.items()
    }
    ids = _ids(forwards)
    return of | dict(cancelled=cancelled(of, forwards), context=_contexts(of, ids))


def _of_the_loss(f: Forward, scale: float) -> dict[str, Tensor]:
    """What the loss does to each token of a pass, and the statistics of its distribution."""
    assert f.c is not None
    zero, stats = torch.zeros_like(f.c), f.stats._asdict()
    p, top = f.stats.log_prob.exp(), f.stats.argmax_log_prob.exp()
    rate = top * (top - f.stats.collision + p) * (f.stats.argmax != f.targets)
    values = dict(
        position=f.position,
        token_id=f.targets,
        c=scale * f.c,
        v=zero if f.v is None else scale * f.v,
        u=zero if f.u is None else scale * f.u,
        force=scale * f.norm_of_G,
        p_target=p,
        p_argmax=top,
        squeezing=rate * (f.c < 0),
        h_square=zero if f.square is None else f.square,
        token_rank=stats.pop("rank"),  # rank is the process's
    )
    return values | stats


def of_the_policy(f: Forward) -> dict[str, Tensor]:
    """Advantage, ratio new/old, and whether the objective clips it; NaN where that is not known.

    The ratio is that of the token, or of its sequence where the objective takes that (GSPO); 1 where the rollout's
    policy is the present one.
    """
    assert f.c is not None
    unknown, known = torch.full_like(f.c, math.nan), f.metadata
    if known.get("advantages") is None:
        return dict(advantage=unknown, ratio=unknown, clipped=unknown)
    A, old = f.of_rows(torch.as_tensor(known["advantages"])), known.get("old_log_probs")
    moved = torch.zeros_like(f.c) if old is None else f.stats.log_prob - f.of_rows(old)
    if known.get("level") == "sequence":
        moved = _mean_of_each(moved, f.sequence, f.layout.sequences)
    ratio, clipped = moved.exp(), unknown
    if known.get("clip") is not None and f.touched is None:  # else a clipped token is not among them
        low, high = known["clip"]
        clipped = (((A > 0) & (ratio > 1 + high)) | ((A < 0) & (ratio < 1 - low))).float()
    return dict(advantage=A.float(), ratio=ratio, clipped=clipped)


def _of_the_sequences(f: Forward, first: int) -> dict[str, list[Any]]:
    """Role and group of the sequence that each token is of; `first` is the number of the first sequence of the pass."""
    n, sequence = f.layout.sequences, f.sequence.tolist()
    for name in ("roles", "groups"):
        given = f.metadata.get(name)
        if given is not None and len(given) != n:
            raise ValueError(f"{name} must name each of the {n} sequences of the batch, got {len(given)}")
    roles, groups = f.metadata.get("roles"), f.metadata.get("groups")
    roles = ["response"] * n if roles is None else list(roles)
    groups = list(range(n)) if groups is None else list(groups)
    return dict(role=[roles[s] for s in sequence], group=[first + groups[s] for s in sequence])


def _mean_of_each(values: Float[Tensor, " N"], sequence: Tensor, n: int) -> Float[Tensor, " N"]:
    sums = torch.zeros(2, n, dtype=values.dtype, device=values.device)
    sums.index_add_(1, sequence, torch.stack([values, torch.ones_like(values)]))
    return (sums[0] / sums[1].clamp(min=1))[sequence]


# ---------------------------------------------------------------- what the two answers of a pair cancel


def cancelled(of: Mapping[str, Any], forwards: Sequence[Forward]) -> Float[Tensor, " N"]:
    """Force of each token that the other answer of its pair cancels; NaN outside pairs.

    Where chosen and rejected answer begin alike, so do their hidden states, and G⁺ + G⁻ = -(c⁺ + c⁻)(e_y - pi)/temperature:
    (|c⁺| + |c⁻| - |c⁺ + c⁻|) ‖pi - e_y‖/temperature is lost, half of it on either side.
    """
    c, T = of["c"], torch.cat([torch.full_like(f.c, f.temperature) for f in forwards if f.c is not None]).cpu()
    found = torch.full_like(c, math.nan)
    if "chosen" not in of["role"]:
        return found
    ids = _ids(forwards)
    for plus, minus, s, t in _paired_answers(of):
        if s not in ids:
            continue
        found[[*plus.values(), *minus.values()]] = 0.0
        a, b = ids[s], ids[t]
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        shared = [position for position in plus if position < same and position in minus]
        up, down = [plus[position] for position in shared], [minus[position] for position in shared]
        half = (c[up].abs() + c[down].abs() - (c[up] + c[down]).abs()) / 2
        for side in (up, down):
            found[side] = half * of["g_norm"][side] / T[side]
    return found


def _contexts(of: Mapping[str, Any], ids: Mapping[int, list[int]]) -> Int[Tensor, " N"]:
    """The key of the ids before each token (`prefix_keys`); a negative number of its own where they are not known."""
    keys = {s: prefix_keys(own) for s, own in ids.items()}
    places = zip(of["sequence"].tolist(), of["position"].tolist(), strict=True)
    found = [keys[s][t] if s in keys and t < len(keys[s]) else -1 - n for n, (s, t) in enumerate(places)]
    return torch.tensor(found, dtype=torch.long)


def _ids(forwards: Sequence[Forward]) -> dict[int, list[int]]:
    """The ids of each sequence by its number, of the passes whose ids are known."""
    ids: dict[int, list[int]] = {}
    first = 0
    for f in forwards:
        if f.layout.ids is not None:
            for s in range(f.layout.sequences):
                ids[first + s] = f.layout.ids[(f.layout.sequence == s) & f.layout.real].tolist()
        first += f.layout.sequences
    return ids


def _paired_answers(of: Mapping[str, Any]) -> Iterator[tuple[dict[int, int], dict[int, int], int, int]]:
    """For each pair, the rows of the chosen and of the rejected answer by position, and the numbers of the two sequences."""
    rows: dict[tuple[int, str], dict[int, int]] = {}
    sequence: dict[tuple[int, str], int] = {}
    numbers = (of[name].tolist() for name in ("sequence", "position"))
    for row, (group, role, s, position) in enumerate(zip(of["group"], of["role"], *numbers, strict=True)):
        rows.setdefault((group, role), {})[position] = row
        sequence[group, role] = s
    for (group, role), plus in rows.items():
        if role == "chosen" and (group, "rejected") in rows:
            yield plus, rows[group, "rejected"], sequence[group, "chosen"], sequence[group, "rejected"]


def table(of: Mapping[str, Any]) -> Any:
    """Columns as a pyarrow table; floats in single precision."""
    import pyarrow as pa

    arrays = {}
    for name, value in of.items():
        if isinstance(value, Tensor):
            value = pa.array((value.float() if value.is_floating_point() else value).numpy())
        arrays[name] = value
    return pa.table(arrays)


# ---------------------------------------------------------------- figures


def sums(of: Mapping[str, Any], forwards: Sequence[Forward]) -> dict[str, float]:
    """The quantities that figures are ratios of; they add over ranks and steps."""
    c, force = of["c"].double(), of["force"].double()
    push = (-c).clamp(min=0)
    clipped, lost = of["clipped"], of["cancelled"].double()
    weight = [(f.check.residual, f.check.total) for f in forwards if not math.isnan(f.check.scored)]
    values = dict(
        steps=1.0, tokens=float(len(c)), c_up=float(c.clamp(min=0).sum()), c_down=float(push.sum()),
        force=float(force.sum()), force_up=float(force[c > 0].sum()),
        pushed=float(push.sum()), squeezed=float((push * of["squeezing"]).sum()),
        shared=float(lost.nansum()), paired=float(force[~lost.isnan()].sum()),
        clipped=float(clipped.nansum()), clippable=float((~clipped.isnan()).sum()),
        explained=float(sum(r * r * w for r, w in weight)), checked=float(sum(w for _, w in weight)),
    )  # fmt: skip
    for name in ("entropy", "collision", "log_prob", "p_target", "p_argmax"):
        values[name] = float(of[name].double().sum())
    values["fallen"], values["rewarded"] = float(fallen_tokens(of).sum()), float((of["advantage"] > 0).sum())
    return values


def metrics(of: Mapping[str, float]) -> dict[str, float]:
    """Figures of one or many steps from their sums.

        c_up, c_down            Σ of c over tokens pulled up, and of -c over those pushed down, per step
        force, force_up_share   Σ ‖G‖ per step, and the share of it that pulls up
        entropy, collision, log_prob, p_target, p_argmax    means over the scored tokens
        squeezing               rate at which a first choice gains probability per unit of push on another token, 0 to 1:
                                Σ_{c<0} |c| p* (p* - ‖pi‖² + p_y) / Σ_{c<0} |c|, p* the argmax, 0 where it is y itself
        shared_prefix           share of the pairs' force that their shared prefixes cancel
        clipped                 share of tokens whose ratio the objective clips
        fallen                  share of the tokens with a positive advantage whose response is less likely than at its rollout:
                                lazy likelihood displacement
        residual                the captures' self-check

    Those that do not apply are left out.
    """
    n, tokens = of["steps"], of["tokens"]
    if not n or not tokens:
        return {}
    found = dict(
        tokens=tokens / n, c_up=of["c_up"] / n, c_down=of["c_down"] / n, force=of["force"] / n,
        force_up_share=of["force_up"] / of["force"] if of["force"] else math.nan,
    )  # fmt: skip
    found |= {name: of[name] / tokens for name in ("entropy", "collision", "log_prob", "p_target", "p_argmax")}
    for name, part, whole in (("squeezing", "squeezed", "pushed"), ("shared_prefix", "shared", "paired"),
                              ("clipped", "clipped", "clippable"), ("fallen", "fallen", "rewarded")):  # fmt: skip
        if of.get(whole):  # an older folder lacks some
            found[name] = of[part] / of[whole]
    if of["checked"]:
        found["residual"] = (of["explained"] / of["checked"]) ** 0.5
    return found
