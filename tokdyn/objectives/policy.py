"""Policy gradients: PPO, GRPO, and what changes the weight of a token or the ratio that is clipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..objective import NO_SCORES, Objective, Scores
from ..sequences import Chi, by_group
from .parts import Clip, advantage, each, old, reference


@dataclass(frozen=True)
class REINFORCE(Objective):
    """-Σ_i A_i Σ_t log pi(y_it) (Williams, 1992)."""

    reads: ClassVar[str] = "rollouts"
    by_sequence: ClassVar[bool] = True

    def loss(self, log_probs, chis, scores=NO_SCORES):
        """-Σ A log pi."""
        return -sum(advantage(chi) * lp.sum() for lp, chi in zip(each(log_probs, chis), chis, strict=True))


@dataclass(frozen=True)
class PPO(Objective):
    """-Σ_t [min(γ A, clip(γ, 1-ε, 1+ε) A) + k H_t], γ = pi/pi_old (arXiv 1707.06347, eq. 7 and 9).

    dual_clip = d clips A < 0 a second time: no less than d A, so that c is 0 at γ > d (arXiv 1912.09729, eq. 5; verl's
    clip_ratio_c, 3 there, and TRL's delta).
    """

    reads: ClassVar[str] = "rollouts"
    by_sequence: ClassVar[bool] = True
    clip: float = 0.2
    entropy: float = 0.0
    dual_clip: float | None = None

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The entropy enters only with a bonus."""
        return ("entropy",) if self.entropy else ()

    def loss(self, log_probs, chis, scores=NO_SCORES):
        """-Σ min(γA, clip(γ)A) - k Σ H."""
        clip = Clip(self.clip, self.clip, self.dual_clip)
        value = -sum(
            clip.surrogate((lp - old(lp, chi)).exp(), advantage(chi)).sum()
            for lp, chi in zip(each(log_probs, chis), chis, strict=True)
        )
        return value - self.entropy * scores.entropy.sum() if self.entropy else value


@dataclass(frozen=True)
class GRPO(Objective):
    """-Σ_groups (1/G) Σ_i (1/|y_i|) Σ_t [min(γA, clip(γ)A) - β(e^ρ - ρ - 1)], ρ = log(pi_ref/pi) (arXiv 2402.03300, eq. 3).

    dual_clip as in PPO.
    """

    reads: ClassVar[str] = "rollouts"
    clip: float = 0.2
    clip_high: float | None = None
    beta: float = 0.0
    dual_clip: float | None = None

    def token_weight(self, chi: Chi, group: Sequence[Chi], chis: Sequence[Chi]) -> float:
        """Weight of one token of `chi` in the loss, among those of its group and of all groups."""
        return 1 / (len(group) * len(chi))

    def clipping(self) -> Clip:
        """Where the surrogate is flat."""
        return Clip(self.clip, self.clip if self.clip_high is None else self.clip_high, self.dual_clip)

    def surrogate(self, lp: Tensor, chi: Chi, index: slice, scores: Scores) -> Tensor:
        """min(γA, clip(γ)A) for every token of one response; `index` is where its tokens lie in `scores`."""
        return self.clipping().surrogate((lp - old(lp, chi)).exp(), advantage(chi))

    def loss(self, log_probs, chis, scores=NO_SCORES):
        """The negated, weighted sum of the surrogate, and the KL penalty."""
        lps, total = each(log_probs, chis), log_probs.new_zeros(())
        starts = torch.tensor([0, *(len(chi) for chi in chis)]).cumsum(0).tolist()
        for members in by_group(chis):
            group = [chis[i] for i in members]
            for i in members:
                lp, chi = lps[i], chis[i]
                value = self.surrogate(lp, chi, slice(starts[i], starts[i + 1]), scores)
                if self.beta:
                    rho = reference(lp, chi) - lp
                    value = value - self.beta * (rho.exp() - rho - 1)
                total = total - self.token_weight(chi, group, chis) * value.sum()
        return total


@dataclass(frozen=True)
class DrGRPO(GRPO):
    """GRPO without the length normalisation: 1/(G·max_tokens) per token (arXiv 2503.20783; advantages with scale=False)."""

    max_tokens: int = 1

    def token_weight(self, chi, group, chis):
        """1/(G·max_tokens), the same for every response."""
        return 1 / (len(group) * self.max_tokens)


@dataclass(frozen=True)
class DAPO(GRPO):
    """One mean over the tokens of all groups, as the authors' code and TRL take it, and a higher upper clip.

    arXiv 2503.14476, eq. 8, writes the mean of one group; the two agree where there is one. This is the one objective here that
    is a mean over groups and not a sum.
    """

    clip_high: float | None = 0.28

    def token_weight(self, chi, group, chis):
        """1/Σ_i |y_i| over all responses."""
        return 1 / sum(len(every) for every in chis)


@dataclass(frozen=True)
class GSPO(GRPO):
    """One ratio per sequence, its length-normalised likelihood ratio (arXiv 2507.18071, eq. 5-7)."""

    clip: float = 3e-4
    clip_high: float | None = 4e-4

    def surrogate(self, lp, chi, index, scores):
        """min(sA, clip(s)A) on every token, s = exp(mean(log pi - log pi_old))."""
        return self.clipping().surrogate((lp - old(lp, chi)).mean().exp().expand_as(lp), advantage(chi))
