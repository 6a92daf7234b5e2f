"""One recorded optimizer step of a monitored training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
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
        files: of the commit that holds the record, by the names it was given; None while it is in memory alone.
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
    files: Mapping[str, Path] | None = field(default=None, repr=False)

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
            return _rows(self._tokens, self.step)
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

    def is_in(self, files: Mapping[str, Path]) -> None:
        """The record is on the disk: its token table is read from there from now on."""
        self._tokens, self.files = files["tokens.parquet"], files

    def row(self) -> dict[str, Any]:
        """The record without its tables, as a row of the folder's steps table."""
        about = dict(step=self.step, passes=self.passes, excluded=self.excluded, routes=" ".join(self.routes))
        probe = dict(linearity=self.linearity, carried=self.carried, accounted=self.accounted)
        sums = {f"sum_{name}": value for name, value in self.sums.items()}
        return about | {"notes": "\n".join(self.notes)} | self.metrics | probe | sums

    @classmethod
    def read(cls, files: Mapping[str, Path], number: int) -> Step:
        """A record as the commit that holds it has it."""
        tables = {name: _rows(files[name], number) for name in files}
        row = {name: value for name, value in tables["steps.parquet"].to_pylist()[0].items() if value is not None}
        tokens, observed = tables["tokens.parquet"], tables.get("probe.parquet")
        observed = observed if observed is not None and observed.num_rows else None
        blamed = next((name for name in tokens.column_names if name.startswith("on ")), None)
        own = {name: row.pop(name, None) for name in ("linearity", "carried", "accounted")}
        given = {name: row.pop(name) for name in ("step", "passes", "excluded")}
        routes, notes = tuple(row.pop("routes").split()), row.pop("notes").splitlines()
        sums = {name.removeprefix("sum_"): row.pop(name) for name in list(row) if name.startswith("sum_")}
        row.pop("rank")
        return cls(
            residual=row.get("residual", math.nan), c=_column(tokens, "c"), _tokens=files["tokens.parquet"], metrics=row,
            routes=routes, notes=notes, observed=observed, sums=sums, files=files,
            predicted=_column(observed, "predicted"), actual=_column(observed, "actual"), forces=_column(tokens, blamed),
            **own, **given,
        )  # fmt: skip

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


class Records(Sequence[Step]):
    """The records of a training, in order: the latest are in memory; of earlier ones those on the disk are read from there.

    Args:
        kept: how many stay in memory. Where there is no folder the earlier ones let go of their token tables alone.
    """

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self._written: list[tuple[int, Mapping[str, Path]]] = []  # number and files of those that are on the disk alone
        self._recent: list[Step] = []

    def append(self, step: Step, to_disk: bool) -> None:
        """One more; to_disk: it will be written."""
        self._recent.append(step)
        if len(self._recent) > self.kept and not to_disk:
            self._recent[-self.kept - 1].let_go()
        while len(self._recent) > self.kept and (files := self._recent[0].files) is not None:
            self._written.append((self._recent.pop(0).step, files))

    def __len__(self) -> int:
        return len(self._written) + len(self._recent)

    def __iter__(self) -> Iterator[Step]:
        return (self._at(i) for i in range(len(self)))

    def __getitem__(self, i: Any) -> Any:
        places = range(len(self))[i]
        return [self._at(k) for k in places] if isinstance(places, range) else self._at(places)

    def _at(self, i: int) -> Step:
        if i >= len(self._written):
            return self._recent[i - len(self._written)]
        number, files = self._written[i]
        return Step.read(files, number)


def _rows(file: Path, number: int) -> Any:
    """The rows of a table that are of one step."""
    import pyarrow.parquet as pq

    return pq.read_table(file, filters=[("step", "=", number)])


def _column(table: Any, name: str | None) -> Any:
    return None if table is None or name is None else torch.tensor(table[name].to_numpy())
