"""Supervised: what an answer's own tokens are pulled up by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..objective import NO_SCORES, Objective


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
