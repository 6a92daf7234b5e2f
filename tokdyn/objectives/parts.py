"""What losses are made of: log-ratios, pairs, clips. Losses read the scored tokens of all sequences in a row, [L]."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..objective import NO_SCORES, Objective
from ..sequences import Chi, by_group, required_advantage


def each(x: Tensor, chis: Sequence[Chi]) -> list[Tensor]:
    """The part of each sequence."""
    return list(x.split([len(chi) for chi in chis]))


def reference(lp: Tensor, chi: Chi) -> Tensor:
    """log pi_ref of a sequence, or the policy's own held constant."""
    return lp.detach() if chi.reference_log_probs is None else chi.reference_log_probs.to(lp)


def old(lp: Tensor, chi: Chi) -> Tensor:
    """log pi_old of a sequence, or the policy's own held constant."""
    return lp.detach() if chi.old_log_probs is None else chi.old_log_probs.to(lp)


@dataclass(frozen=True)
class Pair:
    """One preference pair: per-token log-probs and log-ratios r = log(pi/pi_ref) of the whole responses."""

    plus: Tensor
    minus: Tensor
    r_plus: Tensor
    r_minus: Tensor

    @property
    def h(self) -> Tensor:
        """r⁺ - r⁻."""
        return self.r_plus - self.r_minus


def pairs(log_probs: Tensor, chis: Sequence[Chi]) -> Iterator[Pair]:
    """The pair of each group.

    Raises:
        ValueError: a group holds something else than one chosen and one rejected sequence.
    """
    lps = each(log_probs, chis)
    for members in by_group(chis):
        by_role: dict[str, list[int]] = {}
        for i in members:
            by_role.setdefault(chis[i].role, []).append(i)
        if len(by_role.get("chosen", ())) != 1 or len(by_role.get("rejected", ())) != 1:
            roles = sorted(chis[i].role for i in members)
            raise ValueError(
                f"group {chis[members[0]].group} must hold one chosen and one rejected sequence, it holds {roles}: "
                "build pairs with td.preference(tokenizer, prompt, chosen, rejected, group=i)"
            )
        p, n = by_role["chosen"][0], by_role["rejected"][0]
        ratio = [(lps[i] - reference(lps[i], chis[i])).sum() for i in (p, n)]
        yield Pair(lps[p], lps[n], *ratio)


def advantage(chi: Chi) -> float:
    """A of a sequence.

    Raises:
        ValueError: it has none.
    """
    return required_advantage(chi, "a policy-gradient objective needs Chi.advantage: build the sequences with td.rollouts(...)")


@dataclass(frozen=True)
class Clip:
    """Where a surrogate is flat: below 1 - low and above 1 + high the way A wants, and for A < 0 above `dual`."""

    low: float
    high: float
    dual: float | None

    def surrogate(self, ratio: Tensor, advantage: float | Tensor) -> Tensor:
        """min(γA, clip(γ)A), and for A < 0 no less than dual · A."""
        value = torch.minimum(ratio * advantage, ratio.clamp(1 - self.low, 1 + self.high) * advantage)
        if self.dual is None:
            return value
        A = torch.as_tensor(advantage).to(value)
        return torch.where(A < 0, torch.maximum(value, self.dual * A), value)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0 without cancellation; each branch sees only its own x, so that no gradient is 0 · inf."""
    near, half = x > -math.log(2), torch.full_like(x, -math.log(2))
    close, far = torch.where(near, x, half), torch.where(near, half, x)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))


@dataclass(frozen=True)
class Preference(Objective):
    """Sum over pairs of a function of one pair."""

    reads: ClassVar[str] = "preference"

    def pair_loss(self, pair: Pair) -> Tensor:
        """The loss of one pair, as the paper writes it."""
        raise NotImplementedError

    def loss(self, log_probs, chis, scores=NO_SCORES):
        """Σ over pairs of `pair_loss`."""
        return torch.stack([self.pair_loss(pair) for pair in pairs(log_probs, chis)]).sum()
