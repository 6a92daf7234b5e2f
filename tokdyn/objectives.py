"""Fine-tuning objectives, each written as its paper's plain loss on the log-probabilities of the given tokens.

Every loss here reads log pi(y_l) of the scored tokens, a vector [L]. Its gradient at the logits is then

    G_l = c_l (pi_l - e_{y_l}),   c_l = -dL/d log pi(y_l),

and autograd on that small vector gives c; the closed forms (docs/theory.md, Objectives) are the tests' oracle. c > 0 pulls
the token up, c < 0 pushes it down. Three generalisations cover the rest: several target tokens per position (c [L, K]), an
entropy term v_l = dL/dH_l, and a uniform target u_l = -dL/d(mean over the vocabulary of log pi_l).

The loss is a SUM over sequences, pairs or prompts (a group), normalised inside each as its paper does (DAPO alone is a mean
over all of them); scale eta to turn the sum into a mean. pi_ref and pi_old are fields of the Chi; if absent they are the
policy itself, as at step 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from ._arguments import objective_name
from .objective import NO_SCORES
from .objective import Objective as Objective
from .objective import Scores as Scores
from .sequences import Chi, by_group, required_advantage

# ---------------------------------------------------------------- parts of losses


def _each(x: Tensor, chis: Sequence[Chi]) -> list[Tensor]:
    return list(x.split([len(chi) for chi in chis]))


def _reference(lp: Tensor, chi: Chi) -> Tensor:
    return lp.detach() if chi.reference_log_probs is None else chi.reference_log_probs.to(lp)


def _old(lp: Tensor, chi: Chi) -> Tensor:
    return lp.detach() if chi.old_log_probs is None else chi.old_log_probs.to(lp)


@dataclass(frozen=True)
class _Pair:
    """One preference pair: per-token log-probs and log-ratios r = log(pi/pi_ref) of the whole responses."""

    plus: Tensor
    minus: Tensor
    r_plus: Tensor
    r_minus: Tensor

    @property
    def h(self) -> Tensor:
        return self.r_plus - self.r_minus


def _pairs(log_probs: Tensor, chis: Sequence[Chi]) -> Iterator[_Pair]:
    lps = _each(log_probs, chis)
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
        ratio = [(lps[i] - _reference(lps[i], chis[i])).sum() for i in (p, n)]
        yield _Pair(lps[p], lps[n], *ratio)


def _advantage(chi: Chi) -> float:
    return required_advantage(chi, "a policy-gradient objective needs Chi.advantage: build the sequences with td.rollouts(...)")


@dataclass(frozen=True)
class _Clip:
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


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0 without cancellation; each branch sees only its own x, so that no gradient is 0 · inf."""
    near, half = x > -math.log(2), torch.full_like(x, -math.log(2))
    close, far = torch.where(near, x, half), torch.where(near, half, x)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))


# ---------------------------------------------------------------- supervised


@dataclass(frozen=True)
class SFT(Objective):
    """Cross entropy, summed over tokens: L = -Σ log pi(y_l), with label smoothing ε the target (1-ε) e_y + ε/V."""

    by_sequence: ClassVar[bool] = True
    label_smoothing: float = 0.0

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The mean log-prob enters only with smoothing."""
        return ("mean_log_prob",) if self.label_smoothing else ()

    def loss(self, log_probs, chis, scores=NO_SCORES):
        """-(1-ε) Σ log pi(y) - ε Σ mean_v log pi(v)."""
        value = -(1 - self.label_smoothing) * log_probs.sum()
        return value - self.label_smoothing * scores.mean_log_prob.sum() if self.label_smoothing else value


# ---------------------------------------------------------------- preferences


@dataclass(frozen=True)
class _Preference(Objective):
    """Sum over pairs of a function of one pair."""

    reads: ClassVar[str] = "preference"

    def pair_loss(self, pair: _Pair) -> Tensor:
        """The loss of one pair, as the paper writes it."""
        raise NotImplementedError

    def loss(self, log_probs, chis, scores=NO_SCORES):
        """Σ over pairs of `pair_loss`."""
        return torch.stack([self.pair_loss(pair) for pair in _pairs(log_probs, chis)]).sum()


@dataclass(frozen=True)
class DPO(_Preference):
    """-log σ(β h), h = r⁺ - r⁻, r = log(pi/pi_ref) of the whole response (arXiv 2305.18290, eq. 7)."""

    beta: float = 0.1

    def pair_loss(self, pair):
        """-log σ(βh)."""
        return -logsigmoid(self.beta * pair.h)


@dataclass(frozen=True)
class SPIN(DPO):
    """The DPO form whose reference is the previous iterate and whose rejected answer it sampled (arXiv 2401.01335, eq. 4.7)."""


@dataclass(frozen=True)
class CDPO(_Preference):
    """Conservative DPO for labels flipped with probability ε: -(1-ε) log σ(βh) - ε log σ(-βh) (Mitchell, 2023)."""

    beta: float = 0.1
    epsilon: float = 0.1

    def pair_loss(self, pair):
        """-(1-ε) log σ(βh) - ε log σ(-βh)."""
        return -(1 - self.epsilon) * logsigmoid(self.beta * pair.h) - self.epsilon * logsigmoid(-self.beta * pair.h)


@dataclass(frozen=True)
class IPO(_Preference):
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
        lps = _each(log_probs, chis)
        hinge = [
            relu(self.delta - pair.plus.sum() + pair.minus.sum())
            for pair in _pairs(torch.cat([lps[i] for i in paired]), [chis[i] for i in paired])
        ]
        kept = [lp.sum() for lp, chi in zip(lps, chis, strict=True) if chi.role == "reference"]
        return sum(hinge) - self.lam * sum(kept, start=log_probs.new_zeros(()))


@dataclass(frozen=True)
class SPPO(_Preference):
    """(r⁺ - η/2)² + (r⁻ + η/2)² (arXiv 2405.00675, eq. 4.7, for a win probability of 1)."""

    eta: float = 1.0

    def pair_loss(self, pair):
        """(r⁺ - η/2)² + (r⁻ + η/2)²."""
        return (pair.r_plus - self.eta / 2) ** 2 + (pair.r_minus + self.eta / 2) ** 2


@dataclass(frozen=True)
class SimPO(_Preference):
    """-log σ(β(ā⁺ - ā⁻) - γ), ā the length-mean log-prob; no reference (arXiv 2405.14734, eq. 6)."""

    beta: float = 2.0
    gamma: float = 1.0

    def pair_loss(self, pair):
        """-log σ(β(ā⁺ - ā⁻) - γ)."""
        return -logsigmoid(self.beta * (pair.plus.mean() - pair.minus.mean()) - self.gamma)


@dataclass(frozen=True)
class ORPO(_Preference):
    """-ā⁺ - λ log σ(lo⁺ - lo⁻), lo = log odds of exp(ā) (arXiv 2403.07691, eq. 6-7)."""

    lam: float = 0.1

    def pair_loss(self, pair):
        """-ā⁺ - λ log σ(lo⁺ - lo⁻)."""
        plus, minus = pair.plus.mean(), pair.minus.mean()
        return -plus - self.lam * logsigmoid(plus - _log1mexp(plus) - minus + _log1mexp(minus))


@dataclass(frozen=True)
class DPOP(_Preference):
    """-log σ(β(h - λ max(0, -r⁺))): DPO with a penalty on lowering the chosen answer (arXiv 2402.13228, eq. 3)."""

    beta: float = 0.1
    lam: float = 5.0

    def pair_loss(self, pair):
        """-log σ(β(h - λ max(0, -r⁺)))."""
        return -logsigmoid(self.beta * (pair.h - self.lam * relu(-pair.r_plus)))


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
        for lp, chi in zip(_each(log_probs, chis), chis, strict=True):
            if chi.role not in ("chosen", "rejected"):
                raise ValueError(f'KTO needs the role "chosen" or "rejected" on every sequence, got {chi.role!r}')
            gain = self.beta * (lp - _reference(lp, chi)).sum() - self.z0
            total = total + (
                self.desirable * (1 - gain.sigmoid()) if chi.role == "chosen" else self.undesirable * (1 - (-gain).sigmoid())
            )
        return total


# ---------------------------------------------------------------- policy gradients


@dataclass(frozen=True)
class REINFORCE(Objective):
    """-Σ_i A_i Σ_t log pi(y_it) (Williams, 1992)."""

    reads: ClassVar[str] = "rollouts"
    by_sequence: ClassVar[bool] = True

    def loss(self, log_probs, chis, scores=NO_SCORES):
        """-Σ A log pi."""
        return -sum(_advantage(chi) * lp.sum() for lp, chi in zip(_each(log_probs, chis), chis, strict=True))


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
        clip = _Clip(self.clip, self.clip, self.dual_clip)
        value = -sum(
            clip.surrogate((lp - _old(lp, chi)).exp(), _advantage(chi)).sum()
            for lp, chi in zip(_each(log_probs, chis), chis, strict=True)
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

    def clipping(self) -> _Clip:
        """Where the surrogate is flat."""
        return _Clip(self.clip, self.clip if self.clip_high is None else self.clip_high, self.dual_clip)

    def surrogate(self, lp: Tensor, chi: Chi, index: slice, scores: Scores) -> Tensor:
        """min(γA, clip(γ)A) for every token of one response; `index` is where its tokens lie in `scores`."""
        return self.clipping().surrogate((lp - _old(lp, chi)).exp(), _advantage(chi))

    def loss(self, log_probs, chis, scores=NO_SCORES):
        """The negated, weighted sum of the surrogate, and the KL penalty."""
        lps, total = _each(log_probs, chis), log_probs.new_zeros(())
        starts = torch.tensor([0, *(len(chi) for chi in chis)]).cumsum(0).tolist()
        for members in by_group(chis):
            group = [chis[i] for i in members]
            for i in members:
                lp, chi = lps[i], chis[i]
                value = self.surrogate(lp, chi, slice(starts[i], starts[i + 1]), scores)
                if self.beta:
                    rho = _reference(lp, chi) - lp
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
        return self.clipping().surrogate((lp - _old(lp, chi)).mean().exp().expand_as(lp), _advantage(chi))


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
        A, ratio = _advantage(chi), (lp - _old(lp, chi)).exp()
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
        for lp, chi in zip(_each(log_probs, chis), chis, strict=True):
            drop = _old(lp, chi) - lp
            if _advantage(chi) >= 0 and float(drop.detach().sum()) > 0:
                total = total + self.lam * relu(drop).sum() / len(log_probs)
        return total


__all__ = ["SFT", "DPO", "CDPO", "IPO", "SLiC", "SPPO", "SPIN", "SimPO", "ORPO", "KTO", "DPOP", "PPO", "GRPO", "DrGRPO",
           "DAPO", "GSPO", "REINFORCE", "SimKO", "LLDS"]  # fmt: skip


def by_name(name: str, **constants: Any) -> Objective:
    """The objective of that name, in any case, with its constants.

    Raises:
        ValueError: no such objective (names the nearest), or it has no such constant (names those it has).
    """
    cls: Callable[..., Objective] = globals()[objective_name(name, __all__)]
    allowed = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]
    for constant in constants:
        if constant not in allowed:
            raise ValueError(f"{cls.__name__} has no constant {constant!r}: it has {', '.join(allowed) or 'none'}")
    whole = {f.name for f in fields(cls) if isinstance(f.default, int) and not isinstance(f.default, bool)}  # type: ignore[arg-type]
    for constant, value in constants.items():
        if value is not None and (not math.isfinite(value) or (constant in whole and value != int(value))):
            raise ValueError(
                f"{cls.__name__}: {constant} must be a finite {'whole ' if constant in whole else ''}number, got {value}"
            )
    return cls(**{name: int(value) if name in whole else value for name, value in constants.items()})
