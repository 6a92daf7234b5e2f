"""Policy gradients that gate, mask or redistribute: every change of GRPO that needs more than another weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import relu

from ..objective import NO_SCORES, Objective
from .parts import Clip, advantage, each, old
from .policy import GRPO, GSPO


@dataclass(frozen=True)
class SimKO(GRPO):
    """GRPO that shares positive gradients with top candidates and presses harder on a wrong rank-1 token (arXiv 2510.14807).

    At the tokens whose entropy lies above the response's q-quantile: for A > 0,
    γ⁺ = (1-α)γ + (α/N) Σ_n sg(γ/γ⁽ⁿ⁾) γ⁽ⁿ⁾ over the N most likely tokens (its value equals γ); for A < 0, where y is the
    most likely token, A is multiplied by λ and γ clipped as it stands, as the authors' code does (the paper writes λγ, which
    would be clipped elsewhere). pi_old of the candidates cancels, so none is needed.
    """

    alpha: float = 0.01
    lam: float = 1.1
    n_candidates: int = 3
    quantile: float = 0.8
    needs: ClassVar[tuple[str, ...]] = ("entropy", "candidates", "candidate_log_probs")

    def surrogate(self, lp, chi, index, scores):
        """The GRPO surrogate on the redistributed ratio, or with the larger A, at forking tokens; the plain one elsewhere."""
        entropy = scores.entropy[index].detach()
        gate = entropy > entropy.quantile(self.quantile)
        A, ratio = advantage(chi), (lp - old(lp, chi)).exp()
        if A > 0:
            others = scores.candidate_log_probs[index]
            others = (others - others.detach()).exp()
            shared = (ratio.detach()[:, None] / others.detach() * others).mean(1)
            forked = (1 - self.alpha) * ratio + self.alpha * shared
            return self.clipping().surrogate(torch.where(gate, forked, ratio), A)
        first = scores.candidates[index, 0] == chi.ids[chi.scored].to(lp.device)
        pressed = torch.where(gate & first, self.lam * A, torch.full_like(ratio, A))
        return self.clipping().surrogate(ratio, pressed)


@dataclass(frozen=True)
class LLDS(GRPO):
    """GRPO + λ mean_t max(0, log pi_old - log pi) on responses with A >= 0 whose total log-probability fell.

    After arXiv 2512.04220, with the mask and the mean of the authors' released code: the mean is over the tokens of all
    responses given, those that are not penalised included.
    """

    lam: float = 0.2

    def loss(self, log_probs, chis, scores=NO_SCORES):
        """GRPO + (λ/N) Σ over responses with A >= 0 and Σ_t(log pi_old - log pi) > 0 of Σ_t max(0, log pi_old - log pi)."""
        total = super().loss(log_probs, chis, scores)
        for lp, chi in zip(each(log_probs, chis), chis, strict=True):
            drop = old(lp, chi) - lp
            if advantage(chi) >= 0 and float(drop.detach().sum()) > 0:
                total = total + self.lam * relu(drop).sum() / len(log_probs)
        return total


@dataclass(frozen=True)
class BNPO(GRPO):
    """GRPO as one mean over the tokens of all responses given, TRL's loss_type "bnpo": DAPO with one clip."""

    def token_weight(self, chi, group, chis):
        """1/Σ_i |y_i| over all responses."""
        return 1 / sum(len(every) for every in chis)


@dataclass(frozen=True)
class CISPO(BNPO):
    """-Σ sg(min(γ, ε_max)) A log pi / Σ|y|: the ratio is clipped as a weight, no token loses its gradient.

    arXiv 2506.13585, without a lower bound, as there; ε_max is `clip_high`, the bound itself and not 1 + ε.
    """

    clip_high: float | None = 5.0

    def surrogate(self, lp, chi, index, scores):
        """sg(min(γ, ε_max)) A log pi."""
        ratio = (lp - old(lp, chi)).exp().detach()
        return ratio.clamp(max=self.clip_high) * advantage(chi) * lp


@dataclass(frozen=True)
class SAPO(GRPO):
    """GRPO with a soft gate for the clip: (4/τ) σ(τ(γ - 1)) A, τ by the sign of A (arXiv 2511.20347)."""

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def surrogate(self, lp, chi, index, scores):
        """(4/τ) σ(τ(γ - 1)) A."""
        A = advantage(chi)
        tau = self.tau_pos if A > 0 else self.tau_neg
        return 4 / tau * (tau * ((lp - old(lp, chi)).exp() - 1)).sigmoid() * A


@dataclass(frozen=True)
class LUSPO(GSPO):
    """GSPO weighed by the length of the response: 1/G a token, not 1/(G |y|) (arXiv 2602.05261)."""

    def token_weight(self, chi, group, chis):
        """1/G."""
        return 1 / len(group)


@dataclass(frozen=True)
class VESPO(BNPO):
    """-Σ sg(φ(w)) A log pi / Σ|y|, φ(w) = w^k e^{λ(1 - w)}, w = pi/pi_old of the whole response (arXiv 2602.10693).

    k and λ by the sign of A (A = 0 counts as positive). log w lies in [log 1e-8, 20], the log-ratio of a token in ±20, as in
    TRL.
    """

    k_pos: float = 2.0
    lam_pos: float = 3.0
    k_neg: float = 3.0
    lam_neg: float = 2.0

    def surrogate(self, lp, chi, index, scores):
        """sg(φ(w)) A log pi."""
        A = advantage(chi)
        k, lam = (self.k_pos, self.lam_pos) if A >= 0 else (self.k_neg, self.lam_neg)
        log_w = (lp - old(lp, chi)).detach().clamp(-20, 20).sum().clamp(math.log(1e-8), 20)
        return (lam + k * log_w - lam * log_w.exp()).exp() * A * lp


@dataclass(frozen=True)
class GMPO(GRPO):
    """The geometric mean of a response's clipped ratios times A, a mean over responses (arXiv 2507.20673).

    exp((1/|y|) Σ_t s min(s log γ, s clip(log γ, -ε, ε))) A, s the sign of A; clip and clip_high are bounds of log γ.
    """

    clip: float = 0.4

    def surrogate(self, lp, chi, index, scores):
        """The same value for every token of the response, whose weights add up to 1/G."""
        A, log_ratio = advantage(chi), lp - old(lp, chi)
        clip = self.clipping()
        sign = 1.0 if A > 0 else -1.0
        clipped = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-clip.low, clip.high))
        return clipped.mean().exp().expand_as(lp) * A


@dataclass(frozen=True)
class _Covariance(Objective):
    """A mean over tokens of a surrogate that is changed where A and log pi go together most (arXiv 2505.22617)."""

    reads: ClassVar[str] = "rollouts"
    fraction: float = 2e-4

    def changed(self, ratio: Tensor, A: Tensor, covariance: Tensor) -> Tensor:
        """The surrogate of every token, [L], given (A - mean A)(log pi - mean log pi)."""
        raise NotImplementedError

    def loss(self, log_probs, chis, scores=NO_SCORES):
        """The negated mean."""
        parts = list(zip(each(log_probs, chis), chis, strict=True))
        A = torch.cat([torch.full_like(lp, advantage(chi)) for lp, chi in parts])
        ratio = torch.cat([(lp - old(lp, chi)).exp() for lp, chi in parts])
        lp = log_probs.detach()
        return -self.changed(ratio, A, (A - A.mean()) * (lp - lp.mean())).mean()

    def count(self, L: int) -> int:
        """How many tokens are changed at most."""
        return max(int(self.fraction * L), 1)


@dataclass(frozen=True)
class ClipCov(_Covariance):
    """PPO's clipped surrogate without the gradient of a few tokens whose covariance lies between two bounds.

    arXiv 2505.22617. The paper draws them at random there; these are the first ones in the order of the tokens, so that
    the loss is a function of its arguments.
    """

    clip: float = 0.2
    clip_high: float | None = None
    low: float = 1.0
    high: float = 5.0

    def changed(self, ratio, A, covariance):
        """min(γA, clip(γ)A), 0 at the tokens that were drawn."""
        clip = Clip(self.clip, self.clip if self.clip_high is None else self.clip_high, None)
        value = clip.surrogate(ratio, A)
        flat = ratio.clamp(1 - clip.low, 1 + clip.high) * A < ratio * A
        open_ = (covariance > self.low) & (covariance < self.high) & ~flat
        drawn = open_.nonzero().squeeze(1)[: self.count(len(A))]
        return value.index_fill(0, drawn, 0.0)


@dataclass(frozen=True)
class KLCov(_Covariance):
    """γA, less k |log γ|, k = `kl`, at the tokens of the largest covariance (arXiv 2505.22617)."""

    kl: float = 1.0

    def changed(self, ratio, A, covariance):
        """γA - k |log γ| at the tokens of the largest covariance, γA elsewhere."""
        held = torch.zeros_like(A).index_fill(0, covariance.topk(self.count(len(A))).indices, 1.0)
        return ratio * A - self.kl * held * ratio.log().abs()
