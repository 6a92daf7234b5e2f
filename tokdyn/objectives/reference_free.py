"""Preferences without a reference, and the answers of KTO, which are no pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid, relu

from ..objective import NO_SCORES, Objective
from .parts import Preference, each, log1mexp, pairs, reference


@dataclass(frozen=True)
class SLiC(Objective):
    """max(0, δ - log pi(y⁺) + log pi(y⁻)) - λ log pi(y_ref) (arXiv 2305.10425, eq. 4).

    The second term acts on the sequences of role "reference"; without any it is absent.
    """

    reads: ClassVar[str] = "preference"
    delta: float = 1.0
    lam: float = 0.1

    def loss(self, log_probs, chis, scores=NO_SCORES):
        """Σ hinge + λ Σ NLL(reference)."""
        paired = [i for i, chi in enumerate(chis) if chi.role != "reference"]
        lps = each(log_probs, chis)
        hinge = [
            relu(self.delta - pair.plus.sum() + pair.minus.sum())
            for pair in pairs(torch.cat([lps[i] for i in paired]), [chis[i] for i in paired])
        ]
        kept = [lp.sum() for lp, chi in zip(lps, chis, strict=True) if chi.role == "reference"]
        return sum(hinge) - self.lam * sum(kept, start=log_probs.new_zeros(()))


@dataclass(frozen=True)
class SimPO(Preference):
    """-log σ(β(ā⁺ - ā⁻) - γ), ā the length-mean log-prob; no reference (arXiv 2405.14734, eq. 6)."""

    beta: float = 2.0
    gamma: float = 1.0

    def pair_loss(self, pair):
        """-log σ(β(ā⁺ - ā⁻) - γ)."""
        return -logsigmoid(self.beta * (pair.plus.mean() - pair.minus.mean()) - self.gamma)


@dataclass(frozen=True)
class ORPO(Preference):
    """-ā⁺ - λ log σ(lo⁺ - lo⁻), lo = log odds of exp(ā) (arXiv 2403.07691, eq. 6-7)."""

    lam: float = 0.1

    def pair_loss(self, pair):
        """-ā⁺ - λ log σ(lo⁺ - lo⁻)."""
        plus, minus = pair.plus.mean(), pair.minus.mean()
        return -plus - self.lam * logsigmoid(plus - log1mexp(plus) - minus + log1mexp(minus))


@dataclass(frozen=True)
class KTO(Objective):
    """Unpaired: λ_D (1 - σ(βr - z₀)) on chosen, λ_U (1 - σ(z₀ - βr)) on rejected answers (arXiv 2402.01306, eq. 8).

    z₀ = β KL(pi ‖ pi_ref), estimated over the batch by the caller and held constant; 0 at step 0.
    """

    reads: ClassVar[str] = "preference"
    by_sequence: ClassVar[bool] = True
    beta: float = 0.1
    z0: float = 0.0
    desirable: float = 1.0
    undesirable: float = 1.0

    def loss(self, log_probs, chis, scores=NO_SCORES):
        """Σ λ (1 - σ(±(βr - z₀)))."""
        total = log_probs.new_zeros(())
        for lp, chi in zip(each(log_probs, chis), chis, strict=True):
            if chi.role not in ("chosen", "rejected"):
                raise ValueError(f'KTO needs the role "chosen" or "rejected" on every sequence, got {chi.role!r}')
            gain = self.beta * (lp - reference(lp, chi)).sum() - self.z0
            total = total + (
                self.desirable * (1 - gain.sigmoid()) if chi.role == "chosen" else self.undesirable * (1 - (-gain).sigmoid())
            )
        return total
