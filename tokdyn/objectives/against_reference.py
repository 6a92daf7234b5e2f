"""Preferences against a reference: losses of r = log(pi/pi_ref) of chosen and rejected answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid, relu

from ..objective import NO_SCORES
from .parts import Preference, pairs


@dataclass(frozen=True)
class DPO(Preference):
    """-log σ(β h), h = r⁺ - r⁻, r = log(pi/pi_ref) of the whole response (arXiv 2305.18290, eq. 7)."""

    beta: float = 0.1

    def pair_loss(self, pair):
        """-log σ(βh)."""
        return -logsigmoid(self.beta * pair.h)


@dataclass(frozen=True)
class SPIN(DPO):
    """The DPO form whose reference is the previous iterate and whose rejected answer it sampled (arXiv 2401.01335, eq. 4.7)."""


@dataclass(frozen=True)
class CDPO(Preference):
    """Conservative DPO for labels flipped with probability ε: -(1-ε) log σ(βh) - ε log σ(-βh) (Mitchell, 2023)."""

    beta: float = 0.1
    epsilon: float = 0.1

    def pair_loss(self, pair):
        """-(1-ε) log σ(βh) - ε log σ(-βh)."""
        return -(1 - self.epsilon) * logsigmoid(self.beta * pair.h) - self.epsilon * logsigmoid(-self.beta * pair.h)


@dataclass(frozen=True)
class IPO(Preference):
    """(h - 1/(2β))² (arXiv 2310.12036, eq. 17); by_length takes h of the mean log ratios of a token, as TRL does."""

    beta: float = 0.1
    by_length: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta == 0:
            raise ValueError("IPO: beta must be positive, its target is 1/(2 beta)")

    def pair_loss(self, pair):
        """(h - 1/(2β))², h of the sums or of the means over tokens."""
        h = pair.r_plus / len(pair.plus) - pair.r_minus / len(pair.minus) if self.by_length else pair.h
        return (h - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class SPPO(Preference):
    """(r⁺ - η/2)² + (r⁻ + η/2)² (arXiv 2405.00675, eq. 4.7, for a win probability of 1)."""

    eta: float = 1.0

    def pair_loss(self, pair):
        """(r⁺ - η/2)² + (r⁻ + η/2)²."""
        return (pair.r_plus - self.eta / 2) ** 2 + (pair.r_minus + self.eta / 2) ** 2


@dataclass(frozen=True)
class DPOP(Preference):
    """-log σ(β(h - λ max(0, -r⁺))): DPO with a penalty on lowering the chosen answer (arXiv 2402.13228, eq. 3)."""

    beta: float = 0.1
    lam: float = 5.0

    def pair_loss(self, pair):
        """-log σ(β(h - λ max(0, -r⁺)))."""
        return -logsigmoid(self.beta * (pair.h - self.lam * relu(-pair.r_plus)))


@dataclass(frozen=True)
class EXO(Preference):
    """KL(p_θ ‖ p_label) of the pair, p_θ = (σ(βh), σ(-βh)), p_label = (1-ε, ε): EXO-pref (arXiv 2402.00856, eq. 16)."""

    beta: float = 0.1
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.epsilon < 1:
            raise ValueError(
                f"EXO: epsilon must lie between 0 and 1, its label's other answer has probability epsilon, got {self.epsilon}"
            )

    def pair_loss(self, pair):
        """σ(βh)(log σ(βh) - log(1-ε)) + σ(-βh)(log σ(-βh) - log ε)."""
        x = self.beta * pair.h
        plus = x.sigmoid() * (logsigmoid(x) - math.log1p(-self.epsilon))
        return plus + (-x).sigmoid() * (logsigmoid(-x) - math.log(self.epsilon))


@dataclass(frozen=True)
class NCA(Preference):
    """-log σ(βr⁺) - ½ log σ(-βr⁺) - ½ log σ(-βr⁻): each answer against noise (arXiv 2402.05369 with K = 2)."""

    beta: float = 0.1

    def pair_loss(self, pair):
        """-log σ(βr⁺) - ½ Σ log σ(-βr)."""
        plus, minus = self.beta * pair.r_plus, self.beta * pair.r_minus
        return -logsigmoid(plus) - 0.5 * logsigmoid(-plus) - 0.5 * logsigmoid(-minus)


@dataclass(frozen=True)
class RobustDPO(Preference):
    """DPO made unbiased for labels flipped with probability ε (arXiv 2403.00409).

    (-(1-ε) log σ(βh) + ε log σ(-βh))/(1-2ε).
    """

    beta: float = 0.1
    epsilon: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon >= 0.5:
            raise ValueError(f"RobustDPO: epsilon must lie below 1/2, where labels say nothing, got {self.epsilon}")

    def pair_loss(self, pair):
        """(-(1-ε) log σ(βh) + ε log σ(-βh))/(1-2ε)."""
        x = self.beta * pair.h
        return (-(1 - self.epsilon) * logsigmoid(x) + self.epsilon * logsigmoid(-x)) / (1 - 2 * self.epsilon)


@dataclass(frozen=True)
class BCO(Preference):
    """-log σ(βr⁺ - δ) - log σ(-(βr⁻ - δ)): chosen and rejected as two classes (arXiv 2404.04656).

    δ is the running mean of the rewards, given by the caller and held constant; TRL's bco_pair has none.
    """

    beta: float = 0.1
    delta: float = 0.0

    def pair_loss(self, pair):
        """-log σ(βr⁺ - δ) - log σ(-(βr⁻ - δ))."""
        return -logsigmoid(self.beta * pair.r_plus - self.delta) - logsigmoid(self.delta - self.beta * pair.r_minus)


@dataclass(frozen=True)
class APOZero(Preference):
    """1 - σ(βr⁺) + σ(βr⁻): chosen up, rejected down (arXiv 2408.06266, eq. 7)."""

    beta: float = 0.1

    def pair_loss(self, pair):
        """1 - σ(βr⁺) + σ(βr⁻)."""
        return 1 - (self.beta * pair.r_plus).sigmoid() + (self.beta * pair.r_minus).sigmoid()


@dataclass(frozen=True)
class APODown(Preference):
    """σ(βr⁺) + 1 - σ(βh): both down, rejected further (arXiv 2408.06266, eq. 8)."""

    beta: float = 0.1

    def pair_loss(self, pair):
        """σ(βr⁺) + 1 - σ(βh)."""
        return (self.beta * pair.r_plus).sigmoid() + 1 - (self.beta * pair.h).sigmoid()


@dataclass(frozen=True)
class DiscoPOP(Preference):
    """-(1-s) log σ(βh) + s e^{-βh}, s = σ(βh/τ): a loss that a search found (arXiv 2406.08414, eq. 5)."""

    beta: float = 0.05
    tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau <= 0:
            raise ValueError(f"DiscoPOP: tau must be positive, got {self.tau}")

    def pair_loss(self, pair):
        """-(1-s) log σ(βh) + s e^{-βh}."""
        x = self.beta * pair.h
        s = (x / self.tau).sigmoid()
        return -(1 - s) * logsigmoid(x) + s * (-x).exp()


@dataclass(frozen=True)
class DPONorm(Preference):
    """-log σ(β(r⁺/|y⁺| - r⁻/|y⁻|)): DPO on the mean log-ratios of a token (arXiv 2411.15124; TRL's sigmoid_norm)."""

    beta: float = 0.1

    def pair_loss(self, pair):
        """-log σ(β(r⁺/|y⁺| - r⁻/|y⁻|))."""
        return -logsigmoid(self.beta * (pair.r_plus / len(pair.plus) - pair.r_minus / len(pair.minus)))


@dataclass(frozen=True)
class AOT(Preference):
    """DPO on sorted log-ratios: the batch of all pairs, not a pair, is to prefer chosen (arXiv 2406.05882).

    Σ_i -(1-ε) log σ(βδ_i) - ε log σ(-βδ_i), δ = sort(log pi(y⁺) - log pi(y⁻)) - sort(the same of pi_ref).
    """

    beta: float = 0.1
    epsilon: float = 0.0

    def loss(self, log_probs, chis, scores=NO_SCORES):
        """Σ over the sorted margins."""
        margins = [(pair.plus.sum() - pair.minus.sum(), pair.h) for pair in pairs(log_probs, chis)]
        own = torch.stack([margin for margin, _ in margins])
        ref = own.detach() - torch.stack([h for _, h in margins]).detach()
        x = self.beta * (own.sort().values - ref.sort().values)
        return (-(1 - self.epsilon) * logsigmoid(x) - self.epsilon * logsigmoid(-x)).sum()
