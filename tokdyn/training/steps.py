"""One recorded optimizer step of a monitored training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..runs.frames import pandas
from ..runs.notebook import step_html
from .columns import table


@dataclass(eq=False)
class Step:
    """One recorded optimizer step.

    Attributes:
        step: its number; the first is 1.
        residual: the capture's self-check, ‖∂L/∂h rebuilt from c and v - ∂L/∂h‖/‖∂L/∂h‖ over the step.
        c: -∂L/∂log pi of each scored token, [tokens], L the loss whose gradient the optimizer sees before clipping.
        tokens: their table (pyarrow), in the same order; read back from the folder once it was written there.
        metrics: the step's own figures, names as in `columns.metrics`, this rank's tokens only.
        routes: how c was captured. passes, excluded: forward passes with gradients, and without.
        notes: what is known to be missing.
        observed: the table of the probe's tokens, [M], with before, after, actual, predicted and predicted_readout.
        predicted, actual: change of their log-probs through this step, first order and real, [M] nats.
        linearity: <predicted, actual>/‖predicted‖²; NaN where the log-probs' last digits are larger than what is predicted.
        forces: nats by which each scored token of this rank moved the blamed group of the probe in this step, [tokens].
        carried: what momentum and weight decay moved it by. accounted: Σ forces of all ranks / what the gradient moved it by.
    """

    step: int
    residual: float
    c: Float[Tensor, " tokens"]
    _tokens: dict[str, Any] | Path | None
    metrics: dict[str, float]
    routes: tuple[str, ...]
    passes: int
    excluded: int
    notes: list[str] = field(default_factory=list)
    observed: Any = None
    predicted: Float[Tensor, " M"] | None = None
    actual: Float[Tensor, " M"] | None = None
    linearity: float | None = None
    forces: Float[Tensor, " tokens"] | None = None
    carried: float | None = None
    accounted: float | None = None
    sums: dict[str, float] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> Any:
        """The table of the update's scored tokens (pyarrow).

        Raises:
            ValueError: it was let go.
        """
        if self._tokens is None:
            raise ValueError(
                f"the token table of step {self.step} was let go to spare memory: give the monitor out=, and all stay on disk"
            )
        if isinstance(self._tokens, Path):
            import pyarrow.parquet as pq

            return pq.read_table(self._tokens, filters=[("step", "=", self.step)])
        return table(self._tokens)

    def to_dataframe(self) -> Any:
        """The table of the update's scored tokens as pandas has it.

        Raises:
            ValueError: it was let go.
        """
        pandas()
        return self.tokens.to_pandas()

    def _repr_html_(self) -> str:
        """What a notebook shows: the step's figures and notes."""
        return step_html(self)

    def add_columns(self, of: dict[str, Tensor]) -> None:
        """Further columns of the token table, while it is in memory."""
        if isinstance(self._tokens, dict):
            self._tokens |= of

    def let_go(self) -> None:
        """Forget the token table; the figures stay."""
        self._tokens = None

    def sequences(self) -> Any:
        """One row per sequence of the update (pyarrow): how many tokens; sums of c, force, force_up and cancelled; means.

        force_up is the force where c > 0. Means are those of the statistics and, as the share of clipped tokens, of clipped.
        """
        import pyarrow.compute as pc

        tokens = self.tokens
        tokens = tokens.append_column("force_up", pc.if_else(pc.greater(tokens["c"], 0.0), tokens["force"], 0.0))
        keys = ["sequence", "micro_batch", "role", "group"]
        sums = ["c", "force", "force_up", "cancelled"]
        means = ["log_prob", "p_target", "p_argmax", "entropy", "collision", "g_norm", "clipped"]
        wanted = [("c", "count")] + [(name, "sum") for name in sums] + [(name, "mean") for name in means]
        return tokens.group_by(keys, use_threads=False).aggregate(wanted)
