"""The interface between a loss and the engine: `Objective`, and `GTerm`, the gradient of a loss at the logits.

The losses themselves are in objectives/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .kernels.readout_forces.reference import logit_force
from .sequences import Chi


@dataclass(frozen=True)
class GTerm:
    """The loss gradient at the logits, without the logits: everything besides pi that G needs (docs/theory.md, Objectives).

        G_l = (Σ_k c_lk (pi_l - e_{targets_lk}) - v_l pi_l ⊙ (log pi_l + H_l) + u_l (pi_l - 1/V)) / temperature

    with pi = softmax(z / temperature) and H its entropy.

    Args:
        targets: the token of each position, or K tokens per position, the first of which stands there.
        c: -∂L/∂log pi of the targets; positive pulls a target up, negative pushes it down.
        v: ∂L/∂H, or None where the loss reads no entropy.
        uniform: u = -∂L/∂(mean log pi), or None.
        temperature: what the loss divides the logits by.
    """

    targets: Int[Tensor, "L"] | Int[Tensor, "L K"]
    c: Float[Tensor, "L"] | Float[Tensor, "L K"]
    v: Float[Tensor, "L"] | None = None
    uniform: Float[Tensor, "L"] | None = None
    temperature: float = 1.0

    def logit_force(self, logits: Float[Tensor, "L V"]) -> Float[Tensor, "L V"]:
        """Γ = -G at these logits, the negative gradient of the loss at each token's own logits; [L, V], loss per logit."""
        if self.temperature == 1:
            return logit_force(logits, self.targets, self.c, self.v, self.uniform)
        return logit_force(logits / self.temperature, self.targets, self.c, self.v, self.uniform) / self.temperature

    @property
    def own_c(self) -> Float[Tensor, "L"]:
        """c of the token that stands at each position, without that of further targets; [L]."""
        return self.c if self.c.dim() == 1 else self.c[:, 0]

    @property
    def is_plain(self) -> bool:
        """Whether G is c (pi - e_y) of one target: no further targets, entropy, uniform part or temperature."""
        return self.targets.dim() == 1 and self.v is None and self.uniform is None and self.temperature == 1

    @property
    def is_closed(self) -> bool:
        """Whether the fields say all of it, as the readout's operators need; not so of an observable's own cotangent."""
        return True

    def rows(self, index: Tensor | slice) -> GTerm:
        """The terms of some tokens."""
        v, uniform = (None if x is None else x[index] for x in (self.v, self.uniform))
        return replace(self, targets=self.targets[index], c=self.c[index], v=v, uniform=uniform)

    @classmethod
    def joined(cls, terms: Sequence[GTerm]) -> GTerm:
        """Concatenate the tokens of several terms of one kind; v or u that only some of them have is 0 for the others.

        Raises:
            ValueError: their temperatures differ.
        """
        temperatures = {term.temperature for term in terms}
        if len(temperatures) > 1:
            raise ValueError(f"terms of one temperature can be joined, got {sorted(temperatures)}")

        def whole(parts: list[Tensor | None]) -> Tensor | None:
            if all(part is None for part in parts):
                return None
            filled = zip(parts, terms, strict=True)
            return torch.cat([torch.zeros_like(term.own_c) if part is None else part for part, term in filled])

        v, uniform = whole([term.v for term in terms]), whole([term.uniform for term in terms])
        targets, c = torch.cat([term.targets for term in terms]), torch.cat([term.c for term in terms])
        return replace(terms[0], targets=targets, c=c, v=v, uniform=uniform)

    def to(self, device: torch.device) -> GTerm:
        """The same term on a device."""
        v, uniform = (None if x is None else x.to(device) for x in (self.v, self.uniform))
        return replace(self, targets=self.targets.to(device), c=self.c.to(device), v=v, uniform=uniform)

    def split(self, sizes: Sequence[int]) -> list[GTerm]:
        """Split into terms of `sizes` consecutive tokens each."""
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [self.rows(slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)]

    def times(self, weights: Float[Tensor, "L"]) -> GTerm:
        """Multiply the gradient of each token by a weight: c, v and u."""
        w = weights.to(self.c)
        v, uniform = (None if x is None else x * w for x in (self.v, self.uniform))
        return replace(self, c=self.c * (w if self.c.dim() == 1 else w[:, None]), v=v, uniform=uniform)


Ask = Callable[[], Tensor]
AskTop = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Scores:
    """What a loss may read besides the targets' log-probabilities; only the fields that its `needs` names are filled.

    Args:
        entropy: H of the distribution at each scored token, [L], differentiable.
        mean_log_prob: mean over the vocabulary of log pi, [L], differentiable.
        candidates: the `n_candidates` most likely tokens, [L, N].
        candidate_log_probs: their log pi, [L, N], differentiable.
    """

    entropy: Float[Tensor, "L"] | None = None
    mean_log_prob: Float[Tensor, "L"] | None = None
    candidates: Int[Tensor, "L N"] | None = None
    candidate_log_probs: Float[Tensor, "L N"] | None = None

    @classmethod
    def needed(cls, objective: Objective, *, entropy: Ask, mean_log_prob: Ask, candidates: AskTop) -> Scores:
        """The scores that an objective's `needs` names; what is not needed is not computed.

        Args:
            objective: the loss that reads them.
            entropy, mean_log_prob: functions that compute theirs, [L].
            candidates: a function of N -> log pi of the N most likely tokens and their ids, each [L, N].
        """
        H = entropy() if "entropy" in objective.needs else None
        mean = mean_log_prob() if "mean_log_prob" in objective.needs else None
        if "candidates" not in objective.needs:
            return cls(H, mean)
        log_probs, ids = candidates(objective.n_candidates)
        return cls(H, mean, ids, log_probs)

    def rows(self, index: Tensor) -> Scores:
        """The scores of some tokens."""
        columns = (getattr(self, f.name) for f in fields(self))
        return Scores(*(None if column is None else column[index.to(column.device)] for column in columns))

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """The tokens of several, one after the other; all hold the same fields."""
        columns = zip(*([getattr(part, f.name) for f in fields(cls)] for part in parts), strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))


NO_SCORES = Scores()

RANGES = {"label_smoothing": (0, 1), "epsilon": (0, 1), "alpha": (0, 1), "quantile": (0, 1), "fraction": (0, 1),
          "beta": (0, math.inf), "clip": (0, math.inf), "clip_high": (0, math.inf), "max_tokens": (1, math.inf),
          "dual_clip": (1, math.inf)}  # fmt: skip


class Objective:
    """A loss over log-probabilities. Subclasses are frozen dataclasses whose fields are the paper's constants.

    Class attributes: `reads`, the kind of sequences, "completion", "preference" (chosen and rejected) or "rollouts" (with
    advantages); `needs`, the fields of Scores that the loss reads; `by_sequence`, whether a sequence's c depends on no other
    sequence, which holds for the class that says it and is not inherited, since a subclass may compute another loss.
    """

    reads: ClassVar[str] = "completion"
    by_sequence: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    n_candidates: int = 0

    def __init_subclass__(cls) -> None:
        cls.by_sequence = vars(cls).get("by_sequence", False)

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name, None)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{type(self).__name__}: {name} must lie in [{low}, {high}], got {value}")

    def loss(self, log_probs: Float[Tensor, "L"], chis: Sequence[Chi], scores: Scores = NO_SCORES) -> Float[Tensor, ""]:
        """The loss, summed over sequences, pairs or groups.

        Args:
            log_probs: log pi of the scored tokens of all `chis`, concatenated, [L] nats.
            chis: the sequences they belong to.
            scores: the further quantities that `needs` names.
        """
        raise NotImplementedError

    def g_terms(self, log_probs: Float[Tensor, "L"], chis: Sequence[Chi], scores: Scores = NO_SCORES) -> GTerm:
        """c = -dL/dlog pi, v = dL/dH and u = -dL/d(mean log pi) at `log_probs`, by autograd in float64.

        Raises:
            ValueError: the lengths do not fit, a needed score is absent, or the sequences lack what the loss needs (a
                pair's partner, an advantage).
        """
        L = sum(len(chi) for chi in chis)
        if log_probs.shape != (L,):
            raise ValueError(f"log_probs must have shape [L]=({L},), got {list(log_probs.shape)}")
        for i, chi in enumerate(chis):
            if not len(chi):
                raise ValueError(f"sequence {i} has no scored token, so it adds nothing to the loss: leave it out")
        for name in self.needs:
            if getattr(scores, name) is None:
                raise ValueError(f"{type(self).__name__} needs scores.{name}")

        def leaf(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().double().requires_grad_()

        with torch.enable_grad():
            lp = log_probs.detach().double().requires_grad_()
            held = Scores(leaf(scores.entropy), leaf(scores.mean_log_prob), scores.candidates, leaf(scores.candidate_log_probs))
            leaves = [lp, held.entropy, held.mean_log_prob, held.candidate_log_probs]
            loss = self.loss(lp, chis, held)
            if not loss.requires_grad:
                loss = loss + 0 * lp.sum()
            grads = iter(torch.autograd.grad(loss, [x for x in leaves if x is not None], allow_unused=True))
        of = [next(grads) if x is not None else None for x in leaves]
        dtype, device = log_probs.dtype, log_probs.device
        targets = torch.cat([chi.ids[chi.scored] for chi in chis]).to(device)
        c = (-of[0] if of[0] is not None else torch.zeros_like(lp)).to(dtype)
        if of[3] is not None and scores.candidates is not None:
            targets = torch.cat([targets[:, None], scores.candidates], 1)
            c = torch.cat([c[:, None], -of[3].to(dtype)], 1)
        return GTerm(
            targets,
            c,
            None if of[1] is None else of[1].to(dtype),
            None if of[2] is None else -of[2].to(dtype),
        )

    def describe(self) -> dict[str, Any]:
        """Name and constants, as a run records them."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}  # type: ignore[arg-type]
        return {"name": type(self).__name__, "arguments": {k: v for k, v in values.items() if not isinstance(v, Objective)}}
